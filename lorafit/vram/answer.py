"""The answer of `lorafit estimate-vram`: what a recipe takes, where it fits, and what it costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import UsageError
from lorafit.gpus import GPUS, Device, find_gpu, parse_device, parse_memory, sized
from lorafit.hardware import Hardware, available_memory, meant_device
from lorafit.memory import Estimate, Setup, fits, judged
from lorafit.options import EstimateOptions
from lorafit.outcome import Outcome
from lorafit.progress import each
from lorafit.text import gib
from lorafit.vram.advice import Advice, advise
from lorafit.vram.cost import UNKNOWN, Spending, spending
from lorafit.vram.question import Solver, Subject, Sweeps, as_typed, parse_sweeps, solver, subject_of

HERE = "this machine"
Tracer = Callable[[Setup, int | None], Estimate]
"""Estimates by running the real modules without data, for a capacity if there is one. Raises ModelError."""


@dataclass(frozen=True)
class Verdict:
    """Whether it fits a device, by the estimate for that device."""

    device: Device
    estimate: Estimate
    verdict: str
    advice: tuple[Advice, ...] = ()
    asserted: bool = False

    @property
    def failure(self) -> str | None:
        """What is wrong if it has to fit, and doesn't certainly."""
        if not self.asserted or self.verdict == "fits":
            return None
        known = self.estimate
        size = f" with {gib(self.device.memory_bytes)} GiB" if self.device.gpu else ""
        surely = "tight, not certain to fit" if self.verdict == "tight" else "does not fit"
        best = next((advice for advice in self.advice if advice.verdict == "fits"), None)
        hint = f"; {best.change.does} makes it {gib(best.estimate.total)} GiB: {best.change.options}" if best else ""
        return (
            f"{surely} in {self.device.name}{size}: takes {gib(known.total)} GiB, from {gib(known.least)} to "
            f"{gib(known.most)}{hint}"
        )


@dataclass(frozen=True)
class Cell:
    """One place of a sweep's grid: the values in the order of the sweeps."""

    values: tuple[str, ...]
    estimate: Estimate
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What a subject comes to, its estimate, where it fits, and time and money.

    Attributes:
        devices: all known GPUs, by the subject's own estimate; for a CPU, this machine with the memory that is free.
        asked: the devices of the question, each by an estimate for itself.
        asks_cost: whether time and money were asked for; `spending` is None where they aren't known.
        price: of a GPU's hour, if it was given.
    """

    subject: Subject
    found: Outcome
    estimate: Estimate
    devices: tuple[tuple[Device, str], ...]
    asked: tuple[Verdict, ...]
    sweeps: Sweeps = ()
    cells: tuple[Cell, ...] = ()
    asks_cost: bool = False
    spending: Spending | None = None
    price: float | None = None

    @property
    def failures(self) -> list[str]:
        """A line for every asserted device that it doesn't certainly fit."""
        return [failure for one in self.asked if (failure := one.failure) is not None]


def ask(asked: EstimateOptions, tracer: Tracer) -> Answer:
    """Everything that is asked, by a trace where that is asked for. Raises UsageError, RecipeError and ModelError."""
    gpus = [find_gpu(name) for name in asked.gpus]
    sizes = [parse_memory(text) for text in asked.sizes]
    if asked.price is not None and not gpus:
        raise UsageError("--price-per-hour: needs --gpu NAME, whose hours it is the price of")
    if asked.plot is not None:
        from lorafit.vram.plot import check

        check(asked.plot)
    must = [parse_device(text) for text in asked.asserted]
    solve = solver()
    with as_typed(asked.short):
        subject = subject_of(asked, gpus[0] if gpus else None)
        kind = "GPU" if subject.hardware.device == "cuda" else "machine"
        devices = [Device(gpu.name, gpu.memory_bytes, gpu) for gpu in gpus]
        devices += [sized(size, kind) for size in sizes]
        asserted = [one if one.gpu else sized(one.memory_bytes, kind) for one in must]
        stated = meant_device(solve(subject).recipe) if asked.config and not (devices or asserted) else None
        devices += [stated] if stated else []
        sweeps = parse_sweeps(asked.sweeps)
        found = answer(solve, subject, devices, asserted, sweeps, tracer if asked.trace else None)
    if asked.plot is not None:
        _draw(found, asked.plot)
    if not gpus and asked.tokens is None:
        return found
    return dataclasses.replace(found, asks_cost=True, spending=spending(found.found, asked, gpus), price=asked.price)


def answer(
    solve: Solver,
    subject: Subject,
    devices: list[Device],
    asserted: list[Device],
    sweeps: Sweeps,
    tracer: Tracer | None,
) -> Answer:
    """What a subject takes, and where it fits. Raises RecipeError, ModelError and UsageError."""
    found = solve(subject)
    setup = found.setup
    wanted = [*devices, *asserted]
    first = wanted[0].memory_bytes if wanted and setup.device == "cuda" else None
    main = tracer(setup, first) if tracer else found.estimate()

    def judge(other: Subject, capacity: int) -> tuple[Estimate, str]:
        if tracer is None:
            return solve(other).judged(capacity)
        return by_trace(tracer, solve(other).setup, main if other == subject else None, capacity)

    verdicts = []
    for place, device in enumerate(wanted):
        there, capacity = subject.on(device.gpu), device.memory_bytes
        known, verdict = judge(there, capacity)
        advice = () if verdict == "fits" else tuple(advise(solve, there, capacity))
        verdicts.append(Verdict(device, known, verdict, advice, place >= len(devices)))
    return Answer(
        subject=subject,
        found=found,
        estimate=main,
        devices=tuple((one, judge(subject, one.memory_bytes)[1]) for one in usual_devices(subject.hardware)),
        asked=tuple(verdicts),
        sweeps=sweeps,
        cells=tuple(_swept(solve, subject, wanted, sweeps)),
    )


def by_trace(tracer: Tracer, setup: Setup, known: Estimate | None, capacity: int) -> tuple[Estimate, str]:
    """The estimate and the verdict by a trace, of which one may be known already.

    A GPU's trace is made once, for the first that was asked for; a CPU's anew where memory is short.
    """
    main = known or tracer(setup, capacity)
    if main.device == "cuda":
        return main, fits(main, capacity)
    return judged(lambda limit: main if limit is None else tracer(setup, limit), capacity)


def usual_devices(hardware: Hardware) -> list[Device]:
    """What every answer names: the known GPUs; for a CPU, the memory that is free here, if it can be told."""
    if hardware.device == "cuda":
        return [Device(gpu.name, gpu.memory_bytes, gpu) for gpu in GPUS]
    free = available_memory()
    return [] if free is None else [Device(HERE, free)]


def _swept(solve: Solver, subject: Subject, devices: list[Device], sweeps: Sweeps) -> Iterator[Cell]:
    """Every combination of the sweeps' values, by closed form."""
    if not sweeps:
        return
    combinations = list(itertools.product(*(values for _, values in sweeps)))
    for values in each(combinations, "estimating", len(combinations), "settings"):
        overrides = [f"{key}={value}" for (key, _), value in zip(sweeps, values, strict=True)]
        with as_typed({override: f"--sweep {override}" for override in overrides}):
            cell = subject.changed(*overrides)
            known = solve(cell).estimate()
            verdicts = [solve(cell.on(device.gpu)).judged(device.memory_bytes)[1] for device in devices]
        yield Cell(values, known, tuple(verdicts))


def _draw(found: Answer, file: Path) -> None:
    """The terms as a stacked bar, and the timeline of a trace."""
    from lorafit.vram.plot import stacked_bar

    known = found.estimate
    name = found.found.require_plan().model.name_or_path
    stacked_bar(
        [(term.name, term.bytes) for term in known.terms],
        f"{name}: {gib(known.allocated)} GiB allocated, {gib(known.total)} in all",
        [(one.device.name, one.device.memory_bytes) for one in found.asked],
        file,
        known.timeline,
        known.phases,
    )


# --- the answer as data ---------------------------------------------------------------------------


def as_dict(found: Answer) -> dict[str, Any]:
    """The answer as JSON-able values."""
    plan, setup, known = found.found.require_plan(), found.found.setup, found.estimate
    keys = ("name_or_path", "model_type", "source", "parameters", "trainable_parameters")
    cost: dict[str, Any] | None = None
    if found.asks_cost:
        cost = found.spending.as_dict() if found.spending else {"unknown": UNKNOWN}
    return {
        "recipe": str(found.subject.config) if found.subject.config else None,
        "overrides": list(found.subject.overrides),
        "model": {key: getattr(plan.model, key) for key in keys},
        "hardware": dataclasses.asdict(plan.hardware),
        "setup": _setup_dict(setup),
        **_estimate_dict(known),
        "terms": [dataclasses.asdict(term) for term in known.terms],
        "paged": known.paged,
        "moment": known.moment,
        "notes": list(known.notes),
        "devices": [
            {"name": device.name, "memory_bytes": device.memory_bytes, "verdict": verdict}
            for device, verdict in found.devices
        ],
        "asked": [_verdict_dict(one) for one in found.asked],
        "sweep": [
            {
                "values": dict(zip((key for key, _ in found.sweeps), cell.values, strict=True)),
                **_estimate_dict(cell.estimate),
                "verdicts": list(cell.verdicts),
            }
            for cell in found.cells
        ],
        "cost": cost,
        "failures": found.failures,
    }


def _setup_dict(setup: Setup) -> dict[str, Any]:
    return {
        "batch": setup.batch,
        "accumulation": setup.accumulation,
        "max_length": setup.length,
        "packing": setup.packed,
        "eval_batch": setup.eval_batch,
        "dtype": setup.dtype,
        "quantization": setup.quantization,
        "lora_r": setup.adapter.rank,
        "optimizer": setup.optimizer,
        "checkpointing": setup.checkpointing,
        "attention": setup.attention,
        "loss": setup.stack.loss,
        "gpus": setup.world,
        "sharding": setup.sharding,
    }


def _estimate_dict(known: Estimate) -> dict[str, Any]:
    figures = ("method", "allocated", "reserved", "total", "least", "most")
    band = dataclasses.asdict(known.band) | {"status": known.band.status}
    return {name: getattr(known, name) for name in figures} | {"band": band}


_OF_CHANGE = ("overrides", "options", "does", "costs", "harmful")


def _verdict_dict(one: Verdict) -> dict[str, Any]:
    return {
        "name": one.device.name,
        "memory_bytes": one.device.memory_bytes,
        "asserted": one.asserted,
        "verdict": one.verdict,
        **_estimate_dict(one.estimate),
        "notes": list(one.estimate.notes),
        "advice": [
            {
                **{name: getattr(advice.change, name) for name in _OF_CHANGE},
                "verdict": advice.verdict,
                **_estimate_dict(advice.estimate),
            }
            for advice in one.advice
        ],
    }
