"""Evaluation: models side by side on the same rows, with intervals, gates and reports.

`lorafit.engine.evaluate` runs the models and keeps what they say, row by row, in records; what comes of scores is here:
figures, gates, results.json and the reports. No torch.
"""
