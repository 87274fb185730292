"""Golden files: what a smoke run gave once, and whether it still does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.bounds import read_text
from lorafit.errors import GateError, UsageError
from lorafit.files import write_text
from lorafit.options.smoke import Report, Step
from lorafit.text import first_line

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
    """What of the results is not as recorded: the first step that differs, or else the validation loss."""
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
