"""What a recipe comes to, and whether that fits the memory that it states."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from lorafit.errors import DoesNotFitError, ModelError
from lorafit.facts import ModelFacts
from lorafit.memory import Estimate, Setup, estimate, setup_of
from lorafit.plan import Plan
from lorafit.plan.context import Path
from lorafit.plan.meant import meant_device
from lorafit.validate.findings import Findings
from lorafit.vram.answer import gib, judged


@dataclass
class Estimates:
    """Estimates by closed form. Recipes that differ in nothing that takes memory share one."""

    _known: dict[str, tuple[Estimate, str]] = field(default_factory=dict)

    def judge(self, setup: Setup, capacity: int) -> tuple[Estimate, str]:
        """The estimate and the verdict. Raises ModelError where only a trace can tell."""
        bare = dataclasses.replace(setup, facts=dataclasses.replace(setup.facts, config={}, tensors=(), tokenizer=None))
        key = f"{capacity} {bare}"
        if key not in self._known:
            self._known[key] = judged(lambda limit: estimate(setup, limit), capacity)
        return self._known[key]


def check_fit(found: Findings, plan: Plan, facts: ModelFacts, estimates: Estimates) -> None:
    """Note the sizes of the model and the adapter, and a fault if the stated memory is too small."""
    found.facts |= {
        "model": plan.model["name_or_path"],
        "parameters": plan.model["parameters"],
        "trainable_parameters": plan.trainable_parameters,
        "rows_per_step": plan.rows_per_step,
    }
    stated = found.recipe.hardware
    if stated is None or meant_device(found.recipe) is None or "memory" in found.options.skip:
        return
    path = ("hardware", "gpu" if stated.vram is None else "vram")
    if not facts.tensors:
        found.unchecked(
            path, ModelError(f"memory was not checked: the tensors of {facts.name} are not known without its files")
        )
        return
    try:
        _judge(found, setup_of(plan, facts), path, estimates)
    except ModelError as error:
        found.unchecked(path, error)


def _judge(found: Findings, setup: Setup, path: Path, estimates: Estimates) -> None:
    """Raises ModelError where only a trace can tell."""
    device = meant_device(found.recipe)
    assert device is not None
    known, verdict = estimates.judge(setup, device.memory_bytes)
    found.facts |= {"peak_memory_bytes": known.total, "device": device.name, "fits": verdict}
    size = f"takes {gib(known.total)} GiB, from {gib(known.least)} to {gib(known.most)}"
    where = f"{device.name} ({gib(device.memory_bytes)} GiB)"
    if verdict == "does not fit":
        hint = "`lorafit estimate-vram` says what makes it smaller"
        found.wrong(path, DoesNotFitError(f"{size}, and does not fit in {where}; {hint}"))
    elif verdict == "tight":
        found.unchecked(path, DoesNotFitError(f"not certain to fit in {where}: {size}"))
