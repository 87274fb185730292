"""How far estimates were off on measured runs, by what the runs have in common.

validated.json is written by scripts/validate_vram.py --record from published measurements; docs/vram.md
lists them with their sources.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from importlib import resources
from typing import Any

from lorafit.memory.setup import Setup
from lorafit.memory.types import Band

GROUPED = ("method", "logits", "gpus")
"""What decides about the size of an error: what is trained, whether whole logits exist, one GPU or shards."""
LEAST = 0.03
"""No band is narrower: a few runs say little about the next."""
UNCOVERED = 0.08
"""Assumed where no measured run is alike."""

CPU = Band(0.12, 11, "of a model of 135M parameters on a CPU (docs/vram.md)")
"""scripts/bench/memory.py measures them; the largest error was 11.2%."""


def band_of(setup: Setup, method: str) -> Band:
    """A method's band on the measured runs most like a setup, and what no measured run has."""
    found = _recorded()
    having = features_of(setup)
    group = next((g for g in found["groups"] if all(g[name] == having[name] for name in GROUPED)), None)
    missing = [f"{name} {value}" for name, value in having.items() if value not in found["covered"].get(name, {})]
    alike = ", ".join(having[name] for name in GROUPED)
    if setup.device == "cpu":
        unlike = setup.world > 1 or having["method"] == "8-bit lora"
        if unlike:
            what = "several processes" if setup.world > 1 else having["method"]
            return Band(UNCOVERED, 0, f"no run on a CPU with {what} has been measured")
        other = f"; none of the family {having['family']}" * (having["family"] != "llama")
        return replace(CPU, features=CPU.features + other)
    if group is None or method not in group["error"]:
        return Band(UNCOVERED, 0, f"no run with {alike} has been measured")
    error = max(LEAST, group["error"][method], 0.05 if missing else 0.0)
    lacking = f"; no measured run has {', '.join(missing)}" if missing else ""
    return Band(error, group["rows"], f"with the same method, logits and GPUs ({alike}){lacking}")


def features_of(setup: Setup) -> dict[str, str]:
    """What a setup has in common with others."""
    loss = setup.stack.loss
    sharded = setup.sharding not in ("none", "ddp")
    kind = "lora" if setup.lora else "full training"
    if setup.quantization:
        kind = "8-bit lora" if setup.quantization.get("load_in_8bit") else "4-bit lora"
    return {
        "method": kind,
        "logits": "no whole logits" if loss in ("fused", "compact", "liger") else "whole logits",
        "gpus": setup.sharding if sharded else "one GPU each",
        "checkpointing": "off" if setup.checkpointing == "none" else "on",
        "attention": setup.attention,
        "optimizer": setup.optimizer.replace("_fused", ""),
        "packing": "packed" if setup.packed else "plain rows",
        "dora": "dora" if (setup.lora or {}).get("use_dora") else "plain",
        "family": setup.facts.model_type,
    }


@functools.cache
def _recorded() -> dict[str, Any]:
    text = resources.files("lorafit.memory").joinpath("validated.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
