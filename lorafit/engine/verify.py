"""The first steps of a run, trained once more and compared."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.console import Console
from lorafit.engine.train import train
from lorafit.errors import UsageError
from lorafit.hardware import detect
from lorafit.rows.cache import private
from lorafit.run.directory import RunDir
from lorafit.run.manifest import Start, versions

FIGURES = ("loss", "grad_norm")
TOLERANCE = 1e-3
"""Relative, where the machine or the versions are others than those of the run."""


@dataclass(frozen=True)
class Repeated:
    """The beginning of a run beside its repetition.

    Attributes:
        steps: by number: the recorded and the repeated value of each figure.
        tolerance: the relative difference that may be.
        why: why so much.
    """

    steps: dict[int, dict[str, tuple[float, float]]]
    tolerance: float
    why: str

    @property
    def largest(self) -> float:
        """The largest relative difference."""
        pairs = (pair for figures in self.steps.values() for pair in figures.values())
        return max((_difference(*pair) for pair in pairs), default=0.0)

    @property
    def failed(self) -> bool:
        return not self.largest <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        steps = {
            step: {name: [one, two if math.isfinite(two) else None] for name, (one, two) in figures.items()}
            for step, figures in self.steps.items()
        }
        largest = self.largest if math.isfinite(self.largest) else None
        limit = {"tolerance": self.tolerance, "why": self.why}
        return {"steps": steps, **limit, "largest_difference": largest, "ok": not self.failed}


def retrain(run: RunDir, steps: int, tolerance: float | None, console: Console) -> Repeated:
    """Train the first steps of a run's own plan anew, elsewhere. Raises UsageError and what training raises.

    Args:
        tolerance: relative; None: exact on the machine and with the versions of the run, else TOLERANCE.
    """
    plan = run.load_plan()
    recorded = _figures(run, steps)
    if not recorded:
        raise UsageError(f"{run.metrics}: has no losses of the first {steps} steps to compare with")
    here = detect()
    if here.device != plan.hardware.device or here.world_size != plan.hardware.world_size:
        theirs = f"{plan.hardware.world_size} x {plan.hardware.device}"
        raise UsageError(f"{run.path}: was trained on {theirs}, and here it would be {here.world_size} x {here.device}")
    with private(), tempfile.TemporaryDirectory(prefix="lorafit-verify-") as folder:
        again = dataclasses.replace(
            plan, output_dir=str(Path(folder) / plan.name), training_kwargs=plan.training_kwargs | {"report_to": []}
        )
        repeated = train(again, run.recipe.read_bytes(), Start(steps=steps), console)
        found = _figures(repeated, steps)
    limit, why = _tolerance(run, steps, tolerance, here.name == plan.hardware.name and here.device == "cpu")
    pairs = {
        step: {name: (value, found.get(step, {}).get(name, math.nan)) for name, value in figures.items()}
        for step, figures in recorded.items()
    }
    return Repeated(pairs, limit, why)


def _tolerance(run: RunDir, steps: int, asked: float | None, same_machine: bool) -> tuple[float, str]:
    if asked is not None:
        return asked, "as asked"
    if not same_machine:
        return TOLERANCE, "another machine, or a GPU, whose sums are not always in one order"
    if any("passes" in entry for entry in run.metrics_until(steps - 1)):
        return TOLERANCE, "the run went on in other passes, whose sums are in another order"
    before, now = run.read_manifest().get("versions", {}), versions()
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        return TOLERANCE, f"other versions of {', '.join(changed)}"
    return 0.0, "the machine and the versions of the run"


def _figures(run: RunDir, steps: int) -> dict[int, dict[str, float]]:
    """Losses and gradient norms of the first steps."""
    entries = (entry for entry in run.metrics_until(steps) if "loss" in entry and "step" in entry)
    return {entry["step"]: {name: float(entry[name]) for name in FIGURES if name in entry} for entry in entries}


def _difference(one: float, two: float) -> float:
    """Relative; infinite where one is missing."""
    if not (math.isfinite(one) and math.isfinite(two)):
        return math.inf
    return 0.0 if one == two else abs(one - two) / max(abs(one), abs(two))
