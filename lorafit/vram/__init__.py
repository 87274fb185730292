"""`lorafit estimate-vram`: from a question to an answer, with devices, advice, sweeps, cost and pictures.

The bytes themselves come from `lorafit.memory` and `lorafit.engine.trace.record`.
"""
