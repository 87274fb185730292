"""The answer of `lorafit estimate-vram`: what a recipe takes, and where it fits. No torch, but for a trace."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lorafit.errors import ModelError, UsageError
from lorafit.facts import ModelFacts, read_facts
from lorafit.gpus import GPUS, Device, Gpu
from lorafit.hardware import Hardware, available_memory, hardware_of, meant_hardware
from lorafit.memory import Estimate, Setup, Sharding, estimate, fits, setup_of
from lorafit.plan import Plan, make_plan
from lorafit.progress import each, stage
from lorafit.recipe import Recipe
from lorafit.text import gib

Method = Literal["lora", "qlora", "full"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {}},
    "qlora": {"lora": {}, "quantization": {"load_in_4bit": True}},
    "full": {},
}
"""The sections that make a method."""
SHARDINGS: tuple[str, ...] = get_args(Sharding)
MOST_TOKENS = 1 << 26
"""Tokens in one pass above which a size is taken for a slip."""
MOST_GPUS = 1 << 16
HERE = "this machine"


@dataclass(frozen=True)
class Subject:
    """What is estimated: a recipe's file, or a model with defaults for everything else.

    Attributes:
        overrides: KEY=VALUE, as `--set` takes them.
        hardware: what the plan is made for; all its processes are alike.
    """

    config: Path | None
    model: str | None
    method: Method
    overrides: tuple[str, ...]
    hardware: Hardware
    sharding: Sharding | None = None

    def changed(self, *overrides: str) -> Subject:
        return dataclasses.replace(self, overrides=(*self.overrides, *overrides))

    def on(self, gpu: Gpu | None) -> Subject:
        """The same for another GPU; as it is for one of which only the memory is known."""
        return self if gpu is None else dataclasses.replace(self, hardware=hardware_of(gpu, self.hardware.world_size))

    def over(self, gpus: int, sharding: Sharding) -> Subject:
        """The same over several GPUs."""
        hardware = dataclasses.replace(self.hardware, world_size=gpus)
        return dataclasses.replace(self, hardware=hardware, sharding=sharding)

    def recipe(self) -> Recipe:
        """Raises RecipeError."""
        return recipe_of(self.config, self.model, self.method, self.overrides)


def recipe_of(config: Path | None, model: str | None, method: str, overrides: Sequence[str]) -> Recipe:
    """The recipe in a file, or a model's with defaults for everything else. Raises RecipeError."""
    if config is not None:
        return Recipe.load(config, overrides)
    source = {"path": "data.jsonl", "format": "text"}  # never read
    values = {"model": {"name_or_path": model}, "dataset": {"train": [source]}}
    return Recipe.of(values | METHODS[method], "--model", overrides)


@dataclass(frozen=True)
class Case:
    """A subject with its plan."""

    subject: Subject
    recipe: Recipe
    facts: ModelFacts
    plan: Plan
    setup: Setup


@dataclass
class Solver:
    """Plans and estimates by closed form, each made once."""

    _facts: dict[tuple[str, str | None], ModelFacts] = field(default_factory=dict)
    _cases: dict[Subject, Case] = field(default_factory=dict)
    _estimates: dict[tuple[Subject, int | None], Estimate] = field(default_factory=dict)

    def case(self, subject: Subject) -> Case:
        """Raises RecipeError, ModelError and UsageError."""
        if subject not in self._cases:
            self._cases[subject] = self._planned(subject)
        return self._cases[subject]

    def estimate(self, subject: Subject, capacity: int | None = None) -> Estimate:
        """Raises the same, and ModelError where only a trace can tell."""
        if (subject, capacity) not in self._estimates:
            self._estimates[subject, capacity] = estimate(self.case(subject).setup, capacity)
        return self._estimates[subject, capacity]

    def judged(self, subject: Subject, capacity: int) -> tuple[Estimate, str]:
        """The estimate and the verdict for a capacity."""
        return judged(lambda limit: self.estimate(subject, limit), capacity)

    def _planned(self, subject: Subject) -> Case:
        recipe = subject.recipe()
        name, revision = recipe.model.name_or_path, recipe.model.revision
        if (name, revision) not in self._facts:
            self._facts[name, revision] = known_tensors(read_facts(name, revision))
        facts = self._facts[name, revision]
        plan = make_plan(recipe, facts, subject.hardware, read_data=False)
        setup = setup_of(plan, facts, subject.sharding)
        check_size(setup)
        return Case(subject, recipe, facts, plan, setup)


def judged(estimated: Callable[[int | None], Estimate], capacity: int) -> tuple[Estimate, str]:
    """The estimate and the verdict for a capacity, from estimates by capacity (None: without a limit).

    What is held beyond what is allocated may be given back: then it is tight rather than too much.
    """
    known = estimated(None)
    verdict = fits(known, capacity)
    if known.device == "cpu" and known.total > capacity:  # then train has large blocks returned at once
        short = estimated(capacity)
        return (short, fits(short, capacity)) if short.served else (known, verdict)
    if verdict == "does not fit" and known.allocated + known.beside[0] <= capacity:
        short = estimated(capacity)
        if short.served:
            return short, "tight"
    return known, verdict


@dataclass(frozen=True)
class Verdict:
    """Whether it fits a device, by the estimate for that device."""

    device: Device
    estimate: Estimate
    verdict: str
    advice: tuple[Advice, ...] = ()
    asserted: bool = False


@dataclass(frozen=True)
class Advice:
    """A change that lowers the memory.

    Attributes:
        overrides: KEY=VALUE for `--set`.
        options: other options of the command, such as --gpus 2.
        does: what is changed.
        costs: what is lost by it.
        harmful: whether the result of the training changes, or more GPUs are needed.
    """

    overrides: tuple[str, ...]
    options: tuple[str, ...]
    does: str
    costs: str
    harmful: bool
    estimate: Estimate
    verdict: str


@dataclass(frozen=True)
class Cell:
    """One place of a sweep's grid: the values in the order of the sweeps."""

    values: tuple[str, ...]
    estimate: Estimate
    verdicts: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """What is asked beside the subject.

    Attributes:
        asked: devices that it should fit.
        asserted: those that it must fit.
        sweeps: (key, values).
    """

    subject: Subject
    asked: tuple[Device, ...] = ()
    asserted: tuple[Device, ...] = ()
    sweeps: tuple[tuple[str, tuple[str, ...]], ...] = ()
    trace: bool = False


@dataclass(frozen=True)
class Answer:
    """A case, its estimate, and where it fits.

    Attributes:
        devices: all known GPUs, by the case's own estimate; for a CPU, this machine with the memory that is free.
        asked: the devices of the question, each by an estimate for itself.
    """

    case: Case
    estimate: Estimate
    devices: tuple[tuple[Device, str], ...]
    asked: tuple[Verdict, ...]
    sweeps: tuple[tuple[str, tuple[str, ...]], ...] = ()
    cells: tuple[Cell, ...] = ()


def answer(question: Question) -> Answer:
    """Everything that is asked. Raises RecipeError, ModelError and UsageError."""
    solve = Solver()
    subject = question.subject
    case = solve.case(subject)
    devices = [(device, False) for device in question.asked] + [(device, True) for device in question.asserted]
    places = usual_devices(subject.hardware)
    if question.trace:
        main = traced(case, devices[0][0].memory_bytes if devices and case.setup.device == "cuda" else None)
        known = [(device, judged_by_trace(case, main, device.memory_bytes)[1]) for device in places]
    else:
        main = solve.estimate(subject)
        known = [(device, solve.judged(subject, device.memory_bytes)[1]) for device in places]
    return Answer(
        case=case,
        estimate=main,
        devices=tuple(known),
        asked=tuple(_verdict(solve, question, main, *device) for device in devices),
        sweeps=question.sweeps,
        cells=tuple(sweep(solve, question)),
    )


def usual_devices(hardware: Hardware) -> list[Device]:
    """What every answer names: the known GPUs; for a CPU, the memory that is free here, if it can be told."""
    if hardware.device == "cuda":
        return [Device(gpu.name, gpu.memory_bytes, gpu) for gpu in GPUS]
    free = available_memory()
    return [] if free is None else [Device(HERE, free)]


def _verdict(solve: Solver, question: Question, main: Estimate, device: Device, asserted: bool) -> Verdict:
    """The verdict for one device, with advice where it isn't "fits"."""
    from lorafit.vram.advice import advise

    subject, capacity = question.subject.on(device.gpu), device.memory_bytes
    if question.trace:
        if subject == question.subject:
            known, verdict = judged_by_trace(solve.case(subject), main, capacity)
        else:
            known = traced(solve.case(subject), capacity)
            verdict = fits(known, capacity)
    else:
        known, verdict = solve.judged(subject, capacity)
    advice = () if verdict == "fits" else tuple(advise(solve, subject, capacity))
    return Verdict(device, known, verdict, advice, asserted)


def judged_by_trace(case: Case, main: Estimate, capacity: int) -> tuple[Estimate, str]:
    """The estimate and the verdict by a trace.

    A GPU's trace is made once, for the first that was asked for; a CPU's anew where memory is short.
    """
    if main.device == "cuda":
        return main, fits(main, capacity)
    return judged(lambda limit: main if limit is None else traced(case, limit), capacity)


def traced(case: Case, capacity: int | None) -> Estimate:
    """By running the real modules without data. Raises ModelError."""
    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.trace.record import estimate_by_trace

    with stage("tracing a training step"):
        return estimate_by_trace(case.setup, capacity)


def sweep(solve: Solver, question: Question) -> Iterator[Cell]:
    """Every combination of the sweeps' values, by closed form."""
    from lorafit.vram.sweep import as_typed

    if not question.sweeps:
        return
    keys = [key for key, _ in question.sweeps]
    combinations = list(itertools.product(*(values for _, values in question.sweeps)))
    for values in each(combinations, "estimating", len(combinations), "settings"):
        overrides = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        with as_typed({override: f"--sweep {override}" for override in overrides}):
            subject = question.subject.changed(*overrides)
            found = solve.estimate(subject)
            devices = (*question.asked, *question.asserted)
            verdicts = [solve.judged(subject.on(device.gpu), device.memory_bytes)[1] for device in devices]
        yield Cell(values, found, tuple(verdicts))


def failures(found: Answer) -> list[str]:
    """A line for every asserted device that it doesn't certainly fit."""
    return [_failure(one) for one in found.asked if one.asserted and one.verdict != "fits"]


def _failure(one: Verdict) -> str:
    known = one.estimate
    size = f" with {gib(one.device.memory_bytes)} GiB" if one.device.gpu else ""
    surely = "tight, not certain to fit" if one.verdict == "tight" else "does not fit"
    best = next((advice for advice in one.advice if advice.verdict == "fits"), None)
    hint = f"; {best.does} makes it {gib(best.estimate.total)} GiB: {command_line(best)}" if best else ""
    return (
        f"{surely} in {one.device.name}{size}: takes {gib(known.total)} GiB, from {gib(known.least)} to "
        f"{gib(known.most)}{hint}"
    )


def command_line(advice: Advice) -> str:
    """The options that make the change."""
    settings = [word for override in advice.overrides for word in ("--set", shlex.quote(override))]
    return " ".join([*settings, *advice.options])


# --- the parts of a question ----------------------------------------------------------------------


def subject_of(
    config: Path | None,
    model: str | None,
    method: str | None,
    overrides: Sequence[str],
    gpu: Gpu | None,
    gpus: int | None,
    sharding: str | None,
) -> Subject:
    """Check and put together what is typed. Raises UsageError."""
    if (config is None) == (model is None):
        raise UsageError("give a recipe or --model NAME" + ", not both" * (config is not None))
    if method is not None and config is not None:
        raise UsageError("--method goes with --model; a recipe says itself what is trained")
    if method is not None and method not in METHODS:
        raise UsageError(f"--method {method}: not one of {', '.join(METHODS)}")
    if gpus is not None and not 1 <= gpus <= MOST_GPUS:
        raise UsageError(f"--gpus {gpus}: has to be from 1 to {MOST_GPUS}")
    if sharding is not None and sharding not in SHARDINGS:
        raise UsageError(f"--sharding {sharding}: not one of {', '.join(SHARDINGS)}")
    method = method or "lora"
    hardware = hardware_of(gpu) if gpu else meant_hardware(recipe_of(config, model, method, overrides))
    if hardware.device == "cpu" and (gpus or sharding):
        raise UsageError(
            "--gpus, --sharding: the recipe is for a CPU, where each process takes what is estimated for one"
        )
    world = gpus or hardware.world_size
    if sharding not in (None, "none") and world == 1:
        raise UsageError(f"--sharding {sharding}: needs --gpus of 2 or more")
    if sharding == "none" and world > 1:
        raise UsageError(f"--sharding none: is for one GPU, not {world}; ddp gives each GPU the whole model")
    hardware = dataclasses.replace(hardware, world_size=world)
    return Subject(config, model, method, tuple(overrides), hardware, sharding)  # type: ignore[arg-type]


def known_tensors(facts: ModelFacts) -> ModelFacts:
    """Raises ModelError where the shapes aren't known."""
    if not facts.tensors:
        raise ModelError(
            f"{facts.name}: the tensors of a {facts.model_type} model are not known without its safetensors files"
        )
    return facts


def check_size(setup: Setup) -> None:
    """Raises UsageError for what must be a slip."""
    for name, rows in (("per_device_train_batch_size", setup.batch), ("per_device_eval_batch_size", setup.eval_batch)):
        if rows * setup.length > MOST_TOKENS:
            raise UsageError(
                f"training.{name}: {rows:,} rows of {setup.length:,} tokens at once are more than {MOST_TOKENS:,} "
                "tokens; are the sizes right?"
            )


# --- the answer as data ---------------------------------------------------------------------------


def as_dict(found: Answer) -> dict[str, Any]:
    """The answer as JSON-able values."""
    case, setup = found.case, found.case.setup
    hardware = case.plan.hardware
    lora = setup.lora or {}
    return {
        "recipe": str(case.subject.config) if case.subject.config else None,
        "overrides": list(case.subject.overrides),
        "model": {
            key: getattr(case.plan.model, key)
            for key in ("name_or_path", "model_type", "source", "parameters", "trainable_parameters")
        },
        "hardware": dataclasses.asdict(hardware),
        "setup": {
            "batch": setup.batch,
            "accumulation": setup.accumulation,
            "max_length": setup.length,
            "packing": setup.packed,
            "eval_batch": setup.eval_batch,
            "dtype": setup.dtype,
            "quantization": setup.quantization,
            "lora_r": lora.get("r"),
            "optimizer": setup.optimizer,
            "checkpointing": setup.checkpointing,
            "attention": setup.attention,
            "loss": setup.stack.loss,
            "gpus": setup.world,
            "sharding": setup.sharding,
        },
        **estimate_dict(found.estimate),
        "terms": [dataclasses.asdict(term) for term in found.estimate.terms],
        "paged": found.estimate.paged,
        "moment": found.estimate.moment,
        "notes": list(found.estimate.notes),
        "devices": [
            {"name": device.name, "memory_bytes": device.memory_bytes, "verdict": verdict}
            for device, verdict in found.devices
        ],
        "asked": [_verdict_dict(one) for one in found.asked],
        "sweep": [
            {
                "values": dict(zip((key for key, _ in found.sweeps), cell.values, strict=True)),
                **estimate_dict(cell.estimate),
                "verdicts": list(cell.verdicts),
            }
            for cell in found.cells
        ],
    }


def estimate_dict(known: Estimate) -> dict[str, Any]:
    return {
        "method": known.method,
        "allocated": known.allocated,
        "reserved": known.reserved,
        "total": known.total,
        "least": known.least,
        "most": known.most,
        "band": dataclasses.asdict(known.band) | {"status": known.band.status},
    }


def _verdict_dict(one: Verdict) -> dict[str, Any]:
    return {
        "name": one.device.name,
        "memory_bytes": one.device.memory_bytes,
        "asserted": one.asserted,
        "verdict": one.verdict,
        **estimate_dict(one.estimate),
        "notes": list(one.estimate.notes),
        "advice": [
            {
                "overrides": list(advice.overrides),
                "options": command_line(advice),
                "does": advice.does,
                "costs": advice.costs,
                "harmful": advice.harmful,
                "verdict": advice.verdict,
                **estimate_dict(advice.estimate),
            }
            for advice in one.advice
        ],
    }
