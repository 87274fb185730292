"""Every value of a recipe with its origin."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorafit.errors import UsageError
from lorafit.explain.planned import Planned
from lorafit.explain.values import Key, Written, flatten, history, in_force
from lorafit.plan import Choice
from lorafit.recipe import Recipe
from lorafit.recipe.load import near_key, section_at, sections
from lorafit.recipe.source import dotted
from lorafit.written import at_keys

Origin = Literal["default", "file", "--set", "plan"]


@dataclass(frozen=True)
class Explained:
    """A value and where it comes from.

    Attributes:
        key: dotted.
        value: what holds.
        asked: what the recipe says, if the plan made something else of it, such as "auto".
        origin: who decided `value`.
        written: what decides in the recipe; None: the default.
        earlier: what that was written over, newest first.
        reason: the plan's.
    """

    key: str
    value: Any
    origin: Origin
    asked: Any = None
    written: Written | None = None
    earlier: tuple[Written, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What was asked for.

    Attributes:
        documentation: of the one field that was asked for.
        remarks: why something isn't known, a sentence each.
    """

    values: tuple[Explained, ...]
    documentation: str | None = None
    remarks: tuple[str, ...] = ()


def explain(recipe: Recipe, plan: Planned, asked: str | None = None) -> Explanation:
    """All values, or those of a section, or one. Raises UsageError for a key that doesn't exist."""
    choices = plan.choices | defaults_of(recipe, plan)
    found = [_as_written(recipe, _explained(recipe, *each, choices)) for each in flatten(recipe.resolved())]
    found += _shortened_lists(recipe)
    known = {one.key for one in found}
    found += [
        Explained(key, choice.value, "plan", reason=choice.reason)
        for key, choice in choices.items()
        if key not in known
    ]
    remarks = tuple(f"not all is known: {reason}" for reason in plan.unknown)
    if asked is None:
        return Explanation(tuple(found), None, remarks)
    key = re.sub(r"\[(\d+)\]", r".\1", asked)
    chosen = [one for one in found if one.key == key or one.key.startswith(f"{key}.")]
    path = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
    if not chosen:
        chosen = [_absent(path, asked, found)]
    return Explanation(tuple(chosen), _documentation(path), remarks)


def _explained(recipe: Recipe, key: Key, value: Any, choices: dict[str, Choice]) -> Explained:
    written = history(recipe, key)
    newest = in_force(key, written)
    earlier = tuple(written[1:] if newest is not None else written)
    name = dotted(key)
    choice = choices.get(name)
    if choice is not None and choice.value != value:
        return Explained(name, choice.value, "plan", value, newest, earlier, choice.reason)
    origin: Origin = "default"
    if newest is not None:
        origin = "--set" if newest.place.line is None and newest.place.file.startswith("--set ") else "file"
    return Explained(name, value, origin, None, newest, earlier, choice.reason if choice else None)


def _as_written(recipe: Recipe, one: Explained) -> Explained:
    """The value with references where they were written."""
    value, asked = (at_keys(each, recipe.references, one.key) for each in (one.value, one.asked))
    return replace(one, value=value if one.asked is None else one.value, asked=asked)


def _shortened_lists(recipe: Recipe) -> list[Explained]:
    """Lists of sources that replace another list, as wholes: what is no longer in them has no value of its own."""
    found = []
    for path, _ in sections():
        node, reached = recipe.source.find(path) if recipe.source else (None, ())
        if node is not None and reached == path and isinstance(node.value, list):
            written = history(recipe, path)
            if any(isinstance(one.value, list) and len(one.value) > len(node.value) for one in written[1:]):
                found.append(Explained(dotted(path), node.as_written(), "file", None, written[0], tuple(written[1:])))
    return found


def defaults_of(recipe: Recipe, plan: Planned) -> dict[str, Choice]:
    """What absent keys come to, where the plan has it without giving a reason."""
    training, kwargs = recipe.training, plan.training_kwargs
    found: dict[str, Choice] = {}
    if training.num_train_epochs is None and training.max_steps is None:
        found["training.num_train_epochs"] = Choice(kwargs["num_train_epochs"], "default")
    if training.global_batch_size is None:
        reason = "rows x passes x processes" if plan.hardware.world_size > 1 else "rows x passes"
        found["training.global_batch_size"] = Choice(plan.rows_per_step, reason)
    if recipe.output_dir is None and plan.plan is not None:
        found["output_dir"] = Choice(plan.plan.output_dir, "by the recipe's file name")
    return found


def _absent(path: Key, asked: str, found: Iterable[Explained]) -> Explained:
    """What holds for a key that the schema has and the recipe has no value for. Raises UsageError for any other."""
    names = [one.key for one in found]
    section = section_at(path[:-1])
    parents = [one for one in found if dotted(path).startswith(f"{one.key}.")]
    if section is not None and path[-1] in section.model_fields and parents:
        parent = parents[-1]
        reason = f"{parent.key} is absent" if parent.value is None else f"{parent.key} is {parent.value}"
        return Explained(dotted(path), None, parent.origin, None, parent.written, parent.earlier, reason)
    if section is not None and path[-1] in section.model_fields:
        shorter = dotted(path[: next((n for n, step in enumerate(path) if isinstance(step, int)), len(path))])
        raise UsageError(f"{asked}: the recipe has no such item; there are {_items(shorter, names)}")
    meant = dotted(near_key(path))
    hint = (
        f"did you mean '{meant}'?" if meant else f"there are {', '.join(dict.fromkeys(n.split('.')[0] for n in names))}"
    )
    raise UsageError(f"{asked}: no key of a recipe; {hint}")


def _items(key: str, names: Iterable[str]) -> str:
    steps = {name.removeprefix(f"{key}.").split(".")[0] for name in names if name.startswith(f"{key}.")}
    return ", ".join(f"{key}.{step}" for step in sorted(steps) if step.isdecimal()) or "none"


def _documentation(path: Key) -> str | None:
    section = section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None or not field.description:
        return None
    return " ".join(field.description.split())
