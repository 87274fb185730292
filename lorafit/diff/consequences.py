"""What follows from a change of a recipe: sizes, memory, steps, and what `auto` makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lorafit.diff.side import Side
from lorafit.diff.values import Change
from lorafit.text import printable

Unit = Literal["count", "bytes", "number", "text"]
_NO_VALUES = {"steps"}


@dataclass(frozen=True)
class Consequence:
    """A figure before and after; None where it isn't known."""

    name: str
    before: Any
    after: Any
    unit: Unit = "count"

    @property
    def change(self) -> float | None:
        """Relative, such as 0.5 for half as much again; None where that says nothing."""
        if self.unit == "text" or self.before is None or self.after is None or not self.before:
            return None
        return float(self.after) / float(self.before) - 1


@dataclass(frozen=True)
class Follower:
    """A value that the recipe leaves open and that changed with others."""

    key: str
    before: Any
    after: Any
    reason: str


def consequences(before: Side, after: Side) -> list[Consequence]:
    """The figures of both sides; those that neither has are left out."""
    both = [Consequence(name, old, new, unit) for name, old, new, unit in _figures(before, after)]
    return [one for one in both if one.before is not None or one.after is not None]


def followers(before: Side, after: Side, changes: list[Change]) -> list[Follower]:
    """The plan's choices that differ although the recipe's own value is the same."""
    changed = {change.key for change in changes}
    old, new = before.plan.choices, after.plan.choices
    return [
        Follower(key, old[key].value, new[key].value, new[key].reason)
        for key in new
        if key in old and key not in changed and key not in _NO_VALUES and old[key].value != new[key].value
    ]


def unknowns(before: Side, after: Side) -> list[str]:
    """Why figures are missing, a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    if (before.tokens is None) != (after.tokens is None):
        reasons["tokens: `lorafit preview` counts them"] = [
            side.name for side in (before, after) if side.tokens is None
        ]
    for side in (before, after):
        for what, reason in _missing(side):
            reasons.setdefault(f"{what}: {reason}", []).append(side.name)
    return [
        f"Not known{'' if len(names) == 2 else f' for {printable(names[0])}'}: {reason}."
        for reason, names in reasons.items()
    ]


def _missing(side: Side) -> Iterator[tuple[str, str]]:
    model = side.plan.no_model or side.plan.refused
    if model:
        yield "trained parameters and memory", model.rstrip(".")
    elif side.no_memory:
        yield "memory", side.no_memory.rstrip(".")
    if side.no_steps and side.no_steps == side.no_rows:
        yield "rows and steps", side.no_steps.rstrip(".")
    elif side.no_rows or side.no_steps:
        yield "rows" if side.no_rows else "steps", (side.no_rows or side.no_steps or "").rstrip(".")


def _figures(before: Side, after: Side) -> Iterator[tuple[str, Any, Any, Unit]]:
    def of_plan(side: Side, key: str) -> int | None:
        plan = side.plan.plan
        return getattr(plan.model, key) or None if plan else None

    on_gpu = {before.plan.hardware.device, after.plan.hardware.device} == {"cuda"}
    yield "parameters", of_plan(before, "parameters"), of_plan(after, "parameters"), "count"
    trained = "trainable_parameters"
    yield "trained parameters", of_plan(before, trained), of_plan(after, trained), "count"
    yield "scale of the update", before.scale, after.scale, "number"
    name = "peak GPU memory" if on_gpu else "peak memory"
    yield name, before.memory and before.memory.total, after.memory and after.memory.total, "bytes"
    if before.fits or after.fits:
        yield "in the stated memory", _fits(before), _fits(after), "text"
    yield "rows per step", before.plan.rows_per_step, after.plan.rows_per_step, "count"
    yield "training rows", before.rows, after.rows, "count"
    yield "tokens of an epoch", before.tokens, after.tokens, "count"
    yield "passes over the rows", _rounded(before.epochs), _rounded(after.epochs), "number"
    yield "optimizer steps", before.steps, after.steps, "count"
    if before.plan.hardware != after.plan.hardware:
        yield "planned for", before.plan.hardware.name, after.plan.hardware.name, "text"


def _fits(side: Side) -> str | None:
    stated = side.recipe.hardware
    return side.fits or (None if stated and (stated.gpu or stated.vram) else "none is stated")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
