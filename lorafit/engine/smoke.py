"""A smoke run: plan as asked, make a tiny model, train as `lorafit train` does, look at what came of it, and golden
files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import PreTrainedTokenizerBase

from lorafit.bounds import read_text
from lorafit.console import Console
from lorafit.engine.tiny_model import (
    Replaced,
    Size,
    own_tokenizer,
    size_for,
    small_tokenizer,
    smoke_recipe,
    write_tiny_model,
)
from lorafit.engine.train import train
from lorafit.errors import GateError, Interrupted, UsageError
from lorafit.facts import ModelFacts
from lorafit.files import write_text
from lorafit.hardware import detect_cpu, meant_hardware
from lorafit.options import DEFAULT_STEPS, DEFAULT_TOLERANCE, SmokeOptions
from lorafit.outcome import Outcomes
from lorafit.plan import Plan, make_plan
from lorafit.progress import stage
from lorafit.recipe import Recipe
from lorafit.run.manifest import Start, versions
from lorafit.text import first_line
from lorafit.tree import dotted, leaves
from lorafit.written import at_keys

DATE = "2024-01-01"
"""For chat templates that write the day."""
TOUCHES_NO_RESULT = ("merge", "eval", "hardware", "output_dir")


@dataclass(frozen=True)
class Step:
    """One optimizer step; `moved` is how far all trained tensors are from where they began, as one vector's length."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    moved: float


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        tiny: the tiny model: parameters, layers, hidden_size, vocab_size.
        tokenizer: `real` or `stand-in`, with what it is and why in tokenizer_note.
        inputs: what the losses follow from, for a golden file: recipe, data and versions.
        failures: why the exit code is not 0.
        changed: what is not as it was when the golden file was recorded.
    """

    model: str
    tiny: dict[str, int]
    tokenizer: str
    tokenizer_note: str
    rows: int
    rows_per_step: int
    steps: tuple[Step, ...]
    validation_loss: float | None
    replaced: tuple[Replaced, ...]
    inputs: dict[str, Any]
    seconds: float
    failures: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    golden: str | None = None


@dataclasses.dataclass(frozen=True)
class _Tiny:
    """What was trained, and on what."""

    plan: Plan
    facts: ModelFacts
    sizes: dict[str, int]
    size: Size
    replaced: tuple[Replaced, ...]
    tokenizer: PreTrainedTokenizerBase
    stand_in: bool


def smoke(options: SmokeOptions) -> Report:
    """Run a recipe's pipeline with a tiny model, and record or check the result if asked to.

    Raises LorafitError for what is wrong with the recipe, its data, or a golden file; GateError where a loss is not
    finite or another kind of tokenizer was recorded. The report's failures are those of a run that went through.
    """
    options.check()
    golden = read_golden(options.golden_file) if options.compare else None
    began = time.monotonic()
    recipe = Recipe.load(options.config, options.overrides)
    meant = _meant(recipe, options.config)
    with _folder() as folder:
        with stage("making a tiny model"):
            tiny = _made(recipe, *meant, _steps(options, golden), folder)
        kind = "stand-in" if tiny.stand_in else "real"
        if golden is not None:
            check_tokenizer(golden, kind, options.golden_file)
        movement = Movement()
        with movement.recording():
            run = train(tiny.plan, options.config.read_bytes(), Start(), Console(stderr=True, quiet=True))
        metrics = run.metrics_until(tiny.plan.training.max_steps)
    report = Report(
        model=recipe.model.name_or_path,
        tiny=tiny.sizes,
        tokenizer=kind,
        tokenizer_note=_tokenizer_note(meant[1], tiny),
        rows=tiny.size.rows,
        rows_per_step=tiny.size.batch * tiny.size.accumulation,
        steps=tuple(_read_steps(metrics, movement)),
        validation_loss=next((entry["eval_loss"] for entry in reversed(metrics) if "eval_loss" in entry), None),
        replaced=tiny.replaced,
        inputs=_inputs(recipe, tiny),
        seconds=0.0,
        failures=tuple(_unchanged(movement, tiny.plan)),
    )
    if golden is not None:
        report = _checked(report, golden, options)
    if options.record and not report.failures:
        record(report, options.golden_file)
        report = dataclasses.replace(report, golden=str(options.golden_file))
    return dataclasses.replace(report, seconds=round(time.monotonic() - began, 1))


def _steps(options: SmokeOptions, golden: Golden | None) -> int:
    if golden is None:
        return options.steps or DEFAULT_STEPS
    if options.steps not in (None, len(golden.steps)):
        raise UsageError(f"--steps {options.steps}: {options.golden_file} has {len(golden.steps)}; leave out --steps")
    return len(golden.steps)


def _meant(recipe: Recipe, config: Path) -> tuple[Plan, ModelFacts]:
    """The plan for the real model and the hardware that the recipe is meant for, which shows its mistakes."""
    hardware = dataclasses.replace(meant_hardware(recipe), world_size=1)
    outcome = Outcomes(hardware).of(recipe, config.stem, reading="digests")
    return outcome.require_plan(), outcome.require_facts()


@contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder, which is gone afterwards whatever happens."""
    with tempfile.TemporaryDirectory(prefix="lorafit-smoke-", ignore_cleanup_errors=True) as name:
        try:
            yield Path(name)
        except Interrupted as error:
            raise Interrupted("interrupted; nothing was left behind", error.signal_number) from None


def _made(recipe: Recipe, meant: Plan, facts: ModelFacts, steps: int, folder: Path) -> _Tiny:
    """The tiny model and the plan to train it."""
    own = own_tokenizer(facts, recipe.model.revision)
    tokenizer = own or small_tokenizer(meant.data.chat_template)
    tiny, sizes = write_tiny_model(facts, tokenizer, recipe, folder / "model")
    size = size_for(meant, tiny, steps)
    changed, replaced = smoke_recipe(recipe, meant, facts, tiny, steps, size, str(folder / "run"), own is None)
    plan = make_plan(changed, tiny, detect_cpu(), "smoke", count_rows=False)
    if plan.data.date is not None:
        plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, date=DATE))
    return _Tiny(plan, tiny, sizes, size, replaced, tokenizer, own is None)


# --- what came of it ------------------------------------------------------------------------------


def _read_steps(metrics: list[dict[str, Any]], movement: Movement) -> Iterator[Step]:
    seen = 0
    entries = [entry for entry in metrics if "loss" in entry]
    for entry, moved in zip(entries, movement.moved, strict=True):
        tokens = int(entry.get("num_tokens", seen))
        step = Step(
            entry["step"], entry["loss"], entry["grad_norm"], entry["learning_rate"], tokens - seen, round(moved, 9)
        )
        if not all(map(math.isfinite, (step.loss, step.grad_norm, step.moved))):
            raise GateError(f"step {step.step}: loss {step.loss}, gradient norm {step.grad_norm}: not finite")
        seen = tokens
        yield step


def _unchanged(movement: Movement, plan: Plan) -> Iterator[str]:
    """What was to be trained and never moved. In full training, only the language model's part is."""
    still = [
        (name.removeprefix("base_model.model."), reached)
        for name, reached in movement.still()
        if not plan.adapter.trains_base or not any(part in name for part in ("vision", "visual", "audio"))
    ]
    for reached, why in (
        (False, "no gradient ever reached it"),
        (True, "its updates are too small to change it; is training.learning_rate meant to be so low?"),
    ):
        names = [name for name, was in still if was is reached]
        if names:
            yield f"{named(names)}: did not change in training: {why}"


def _checked(report: Report, golden: Golden, options: SmokeOptions) -> Report:
    now = golden_of(report)
    tolerance = options.tolerance if options.tolerance is not None else DEFAULT_TOLERANCE
    changed = changes(golden, now)
    why = (
        f"; changed since the recording: {named(changed)}" if changed else "; nothing that it follows from has changed"
    )
    failures = [f"{options.golden_file}: {line}{why}" for line in differences(golden, now, tolerance)]
    return dataclasses.replace(
        report, failures=(*report.failures, *failures), changed=tuple(changed), golden=str(options.golden_file)
    )


def _tokenizer_note(facts: ModelFacts, tiny: _Tiny) -> str:
    if not tiny.stand_in:
        return "the model's own"
    return (
        f"A STAND-IN: the tokenizer of {facts.name} can't be had here ({facts.source}), so the rows were rendered and "
        "tokenized with another one; download it for a check of the template"
    )


def _inputs(recipe: Recipe, tiny: _Tiny) -> dict[str, Any]:
    """What the losses follow from, without paths of this machine."""
    values = at_keys(recipe.resolved(), recipe.references)
    resolved = {key: value for key, value in values.items() if key not in TOUCHES_NO_RESULT}
    given = at_keys(recipe.model_dump(mode="json", exclude_defaults=True), recipe.references)
    flat = dict(_flat({key: value for key, value in given.items() if key in resolved}))
    template = tiny.tokenizer.chat_template
    parts = [tiny.tokenizer.backend_tokenizer.to_str(), str(tiny.tokenizer.special_tokens_map)]
    plan = tiny.plan.data
    return {
        "recipe": {**flat, RESOLVED: _digest(json.dumps(dict(_flat(resolved)), sort_keys=True))},
        "replaced": {one.key: str(one.used) for one in tiny.replaced},
        "data": {source.key: source.sha256 for source in (*plan.train, *plan.validation)},
        "tokenizer": {
            "vocabulary": _digest("\0".join(parts)),
            "chat template": _digest(str(plan.chat_template or template)),
        },
        "model": tiny.sizes | {"architecture": tiny.facts.model_type},
        "versions": versions(),
    }


def _flat(value: Any) -> Iterator[tuple[str, Any]]:
    """The single values by dotted key, without this machine's folders."""
    for key, leaf in leaves(value):
        away = isinstance(leaf, str) and (Path(leaf).is_absolute() or leaf.startswith("~"))
        yield dotted(key), Path(leaf).name if away else leaf


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Movement:
    """What happened to the trained tensors.

    Attributes:
        moved: after each step, the distance of all of them from where they began.
    """

    def __init__(self) -> None:
        self.moved: list[float] = []
        self._names: dict[int, str] = {}
        self._start: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._reached: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[Movement]:
        """Movement every optimizer of this process until the block ends."""
        hooks = [
            register_module_forward_pre_hook(self._learn_names),
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def still(self) -> list[tuple[str, bool]]:
        """The tensors that are as they began, each with whether a gradient ever reached it."""
        return [
            (
                self._names.get(id(parameter), f"a tensor of shape {tuple(parameter.shape)}"),
                id(parameter) in self._reached,
            )
            for parameter, start in self._start
            if torch.equal(parameter.detach(), start)
        ]

    def _learn_names(self, module: nn.Module, _: Any) -> None:
        if not module.training or self._start:
            return
        named = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        if len(named) > len(self._names):  # the outermost module comes first
            self._names = named

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if not self._start:
            self._start = [(p, p.detach().clone()) for p in trained]
        self._reached |= {id(p) for p in trained if p.grad is not None and bool(p.grad.any())}

    def _after(self, *_: Any) -> None:
        squares = ((p.detach().double() - start.double()).square().sum().item() for p, start in self._start)
        self.moved.append(math.sqrt(sum(squares)))


FORMAT = 1
EXACT = 1e-9
"""Relative difference of two learning rates that are the same."""
RESOLVED = "sha256 with all defaults"
_MOST_NAMED = 8


@dataclass(frozen=True)
class Golden:
    """A recording.

    Attributes:
        inputs: what the losses follow from: `recipe`, `data`, `replaced`, `tokenizer` and `versions`, each a dict.
    """

    tokenizer: str
    steps: tuple[Step, ...]
    validation_loss: float | None
    inputs: dict[str, Any]

    def to_json(self) -> str:
        content = {"lorafit_golden": FORMAT, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def golden_of(report: Report) -> Golden:
    return Golden(report.tokenizer, report.steps, report.validation_loss, report.inputs)


def record(report: Report, file: Path) -> None:
    """Write a run to a golden file. Raises UsageError."""
    try:
        write_text(file, golden_of(report).to_json())
    except OSError as error:
        raise UsageError(f"{file}: can't be written: {error.strerror}") from None


def read_golden(file: Path) -> Golden:
    """Raises UsageError for what is no golden file."""
    try:
        content = json.loads(read_text(file))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such golden file; make it with --record") from None
    except OSError as error:
        raise UsageError(f"{file}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is broken ({first_line(error)}); make it anew with --record") from None
    if not isinstance(content, dict) or "lorafit_golden" not in content:
        raise UsageError(f"{file}: is no golden file of `lorafit smoke`; make one with --record")
    if content["lorafit_golden"] != FORMAT:
        raise UsageError(
            f"{file}: has format {content['lorafit_golden']!r}, and this lorafit reads {FORMAT}; make it anew with "
            "--record"
        )
    try:
        steps = tuple(_step(values) for values in content["steps"])
        validation = content["validation_loss"]
        golden = Golden(
            str(content["tokenizer"]),
            steps,
            None if validation is None else _number(validation),
            {name: dict(values) for name, values in content["inputs"].items()},
        )
        if not steps or [step.step for step in steps] != list(range(1, len(steps) + 1)):
            raise ValueError("its steps are not numbered from 1")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{file}: is broken ({first_line(error)}); make it anew with --record") from None
    return golden


def _number(value: Any) -> float:
    """Raises ValueError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _step(values: Any) -> Step:
    step = Step(**values)
    for number in dataclasses.astuple(step):
        _number(number)
    return step


def check_tokenizer(golden: Golden, tokenizer: str, file: Path) -> None:
    """Raises GateError for a recording with the other kind of tokenizer."""
    if golden.tokenizer != tokenizer:
        names = {"real": "the model's own tokenizer", "stand-in": "a stand-in for the tokenizer"}
        raise GateError(
            f"{file}: was recorded with {names.get(golden.tokenizer, golden.tokenizer)}, and this run has "
            f"{names[tokenizer]}; record it where both have the same"
        )


def differences(golden: Golden, now: Golden, tolerance: float) -> list[str]:
    """The result that is not as recorded: the first step that differs, or else the validation loss."""
    for before, after in zip(golden.steps, now.steps, strict=False):
        found = list(_differs(before, after, tolerance))
        if found:
            return [f"step {before.step}: {'; '.join(found)}"]
    if len(golden.steps) != len(now.steps):
        return [f"{len(now.steps)} steps were run, and {len(golden.steps)} are recorded"]
    before_loss, after_loss = golden.validation_loss, now.validation_loss
    if (before_loss is None) != (after_loss is None):
        return [f"validation loss: {after_loss}, recorded {before_loss}"]
    if before_loss is not None and after_loss is not None and _relative(before_loss, after_loss) > tolerance:
        return [_said("validation loss", before_loss, after_loss, tolerance)]
    return []


def _differs(before: Step, after: Step, tolerance: float) -> Iterator[str]:
    if before.tokens != after.tokens:
        yield f"{after.tokens} tokens, recorded {before.tokens}"
    limits = {"learning_rate": EXACT, "loss": tolerance, "grad_norm": tolerance, "moved": tolerance}
    for name, limit in limits.items():
        old, new = getattr(before, name), getattr(after, name)
        if _relative(old, new) > limit:
            label = {"moved": "distance that the weights moved"}.get(name, name.replace("_", " "))
            yield _said(label, old, new, limit)


def _relative(one: float, other: float) -> float:
    most = max(abs(one), abs(other))
    return abs(one - other) / most if most else 0.0


def _said(what: str, before: float, after: float, limit: float) -> str:
    return f"{what} {after:.6g}, recorded {before:.6g} (off by {_relative(before, after):.1e}, allowed {limit:g})"


def changes(golden: Golden, now: Golden) -> list[str]:
    """What the results follow from and is not as it was when they were recorded, such as a value of the recipe."""
    found = []
    for part in sorted({*golden.inputs, *now.inputs}):
        before, after = golden.inputs.get(part, {}), now.inputs.get(part, {})
        keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        if part == "recipe" and len(keys) > 1:
            keys.remove(RESOLVED)
        found += [_change(part, key, before.get(key), after.get(key)) for key in keys]
    return found


def _change(part: str, key: str, before: Any, after: Any) -> str:
    if part in ("data", "tokenizer"):
        return f"{part} {key} has changed"
    if key == RESOLVED:
        return "a default of the recipe's fields has changed"
    return f"{'' if part == 'recipe' else f'{part} '}{key} {_brief(before)} -> {_brief(after)}"


def _brief(value: Any) -> str:
    return "default" if value is None else str(value)


def named(found: list[str]) -> str:
    more = len(found) - _MOST_NAMED
    return ", ".join(found[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
