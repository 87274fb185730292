"""What is typed after `lorafit estimate-vram`, understood and answered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import UsageError
from lorafit.gpus import Device, find_gpu, parse_device, parse_memory, sized
from lorafit.hardware import meant_device
from lorafit.options.estimate_vram import EstimateOptions
from lorafit.text import gib
from lorafit.vram.answer import Answer, Question, answer, as_dict, failures, subject_of
from lorafit.vram.cost import UNKNOWN, Spending, spending
from lorafit.vram.cost import as_dict as spending_dict
from lorafit.vram.sweep import as_typed, parse_sweeps


@dataclass(frozen=True)
class Reply:
    """The answer, with time and money if they were asked for.

    Attributes:
        spending: None where it isn't known.
    """

    answer: Answer
    asks_cost: bool
    spending: Spending | None
    price: float | None

    @property
    def failures(self) -> list[str]:
        return failures(self.answer)

    def as_dict(self) -> dict[str, Any]:
        cost: dict[str, Any] | None = None
        if self.asks_cost:
            cost = spending_dict(self.spending) if self.spending else {"unknown": UNKNOWN}
        return as_dict(self.answer) | {"cost": cost, "failures": self.failures}


def ask(asked: EstimateOptions) -> Reply:
    """Raises UsageError, RecipeError and ModelError."""
    gpus = [find_gpu(name) for name in asked.gpus]
    sizes = [parse_memory(text) for text in asked.sizes]
    if asked.price is not None and not gpus:
        raise UsageError("--price-per-hour: needs --gpu NAME, whose hours it is the price of")
    if asked.plot is not None:
        from lorafit.vram.plot import check

        check(asked.plot)
    must = [parse_device(text) for text in asked.asserted]
    with as_typed({override: f"--{option} {value}" for option, override, value in asked.short}):
        # --set, as advice gives it, has the last word
        subject = subject_of(
            asked.config,
            asked.model,
            asked.method,
            (*(override for _, override, _ in asked.short), *asked.overrides),
            gpus[0] if gpus else None,
            asked.world,
            asked.sharding,
        )
        kind = "GPU" if subject.hardware.device == "cuda" else "machine"
        devices = [Device(gpu.name, gpu.memory_bytes, gpu) for gpu in gpus]
        devices += [sized(size, kind) for size in sizes]
        asserted = tuple(one if one.gpu else sized(one.memory_bytes, kind) for one in must)
        stated = meant_device(subject.recipe()) if asked.config and not (devices or asserted) else None
        devices += [stated] if stated else []
        question = Question(subject, tuple(devices), asserted, parse_sweeps(asked.sweeps), asked.trace)
        found = answer(question)
    if asked.plot is not None:
        draw(found, asked.plot)
    asks_cost = bool(gpus or asked.tokens is not None)
    spent = spending(found.case, asked.tokens, gpus, asked.price) if asks_cost else None
    return Reply(found, asks_cost, spent, asked.price)


def draw(found: Answer, file: Path) -> None:
    """The terms as a stacked bar, and the timeline of a trace."""
    from lorafit.vram.plot import stacked_bar

    known = found.estimate
    stacked_bar(
        [(term.name, term.bytes) for term in known.terms],
        f"{found.case.plan.model.name_or_path}: {gib(known.allocated)} GiB allocated, {gib(known.total)} in all",
        [(one.device.name, one.device.memory_bytes) for one in found.asked],
        file,
        known.timeline or None,
        known.phases,
    )
