"""`lorafit explain`: every value of a recipe, where it was written, and what it was written over."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorafit.errors import UsageError
from lorafit.outcome import Outcome
from lorafit.plan import Choice
from lorafit.recipe import Recipe
from lorafit.recipe.load import may_be_null, near_key, section_at, sections
from lorafit.recipe.yaml import Located, Position, holds
from lorafit.text import brief
from lorafit.tree import KeyPath, dotted, key_path, leaves
from lorafit.written import at_keys


@dataclass(frozen=True)
class Written:
    """A value as it was written somewhere.

    Attributes:
        reference: the ${NAME} that it was read from.
        removes: whether it takes away what a parent says: by a null, or as another section in place of the parent's.
        above: whether it was not written for the value itself, but for a section that the value is in.
    """

    value: Any
    place: Position
    reference: str | None = None
    removes: bool = False
    above: bool = False


def history(recipe: Recipe, key: KeyPath) -> list[Written]:
    """What was written for a value, newest first: by `--set`, the file, its parents. Empty: the default holds."""
    found = list(_written(recipe.source, key)) if recipe.source is not None else []
    places: dict[Position, Written] = {}
    for one in found:
        places.setdefault(one.place, one)
    return list(places.values())


def in_force(key: KeyPath, written: list[Written]) -> Written | None:
    """What decides a value; None if that is the default, to which a null goes back where it is no value itself."""
    newest = written[0] if written else None
    if newest is None or newest.above or (newest.removes and not may_be_null(key)):
        return None
    return newest


def _written(node: Located, key: KeyPath) -> Iterator[Written]:
    if not key:
        yield Written(node.as_written(), node.position, node.reference, node.removes)
    elif holds(node.value, key[0]):
        yield from _written(node.value[key[0]], key[1:])
    elif node.removes or (node.earlier and node.earlier[0].value is not None):
        yield Written(None, node.position, removes=True, above=True)
    for old in node.earlier:
        yield from _written(old, key)


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
    """What was asked for, the documentation of the one field asked for, and why something isn't known."""

    values: tuple[Explained, ...]
    documentation: str | None = None
    remarks: tuple[str, ...] = ()


def explain(outcome: Outcome, asked: str | None = None) -> Explanation:
    """All values, or those of a section, or one. Raises UsageError for a key that doesn't exist."""
    recipe, choices = outcome.recipe, outcome.choices | defaults_of(outcome)
    values = leaves(recipe.resolved(), enters=lambda path: section_at(path) is not None)
    found = [_as_written(recipe, _explained(recipe, *each, choices)) for each in values]
    found += _shortened_lists(recipe)
    known = {one.key for one in found}
    found += [
        Explained(key, choice.value, "plan", reason=choice.reason)
        for key, choice in choices.items()
        if key not in known
    ]
    remarks = tuple(f"not all is known: {reason}" for reason in outcome.unknown)
    if asked is None:
        return Explanation(tuple(found), None, remarks)
    key = re.sub(r"\[(\d+)\]", r".\1", asked)
    chosen = [one for one in found if one.key == key or one.key.startswith(f"{key}.")]
    path = key_path(key)
    if not chosen:
        chosen = [_absent(path, asked, found)]
    return Explanation(tuple(chosen), _documentation(path), remarks)


def _explained(recipe: Recipe, key: KeyPath, value: Any, choices: dict[str, Choice]) -> Explained:
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


def defaults_of(outcome: Outcome) -> dict[str, Choice]:
    """What absent keys come to, where the plan has it without giving a reason."""
    recipe, training = outcome.recipe, outcome.recipe.training
    found: dict[str, Choice] = {}
    if training.num_train_epochs is None and training.max_steps is None:
        found["training.num_train_epochs"] = Choice(outcome.training.num_train_epochs, "default")
    if training.global_batch_size is None:
        reason = "rows x passes x processes" if outcome.hardware.world_size > 1 else "rows x passes"
        found["training.global_batch_size"] = Choice(outcome.rows_per_step, reason)
    if recipe.output_dir is None and outcome.plan is not None:
        found["output_dir"] = Choice(outcome.plan.output_dir, "by the recipe's file name")
    return found


def _absent(path: KeyPath, asked: str, found: Iterable[Explained]) -> Explained:
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


def _documentation(path: KeyPath) -> str | None:
    section = section_at(path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None or not field.description:
        return None
    return " ".join(field.description.split())


WIDEST_KEY, WIDEST_VALUE = 30, 24
"""Columns of keys and of values; what is longer pushes the rest to the next line."""


def text(found: Explanation, width: int | None = None) -> str:
    """A table by section; lines longer than `width` are wrapped (None: not)."""
    rows: dict[str, list[Explained]] = {}
    for one in found.values:
        rows.setdefault(_section(one), []).append(one)
    lines: list[str] = []
    for section in sorted(rows, key=lambda name: (name == _RESOLVED, name == _TOP)):
        lines += [*([""] if lines else []), section, *_table(rows[section], section, width)]
    if found.documentation:
        lines += ["", *(_folded(found.documentation, width) if width else [found.documentation])]
    return "\n".join(lines)


def as_dict(found: Explanation) -> dict[str, Any]:
    """JSON-able values, as `--json` prints them."""
    return {
        "values": [_value_dict(one) for one in found.values],
        "documentation": found.documentation,
        "remarks": list(found.remarks),
    }


def _value_dict(one: Explained) -> dict[str, Any]:
    return {
        **{name: getattr(one, name) for name in ("key", "value", "origin", "asked", "reason")},
        **(_written_dict(one.written) if one.written else {"place": None, "reference": None}),
        "overridden": [{"value": old.value, "removed": old.removes, **_written_dict(old)} for old in one.earlier],
    }


def _written_dict(one: Written) -> dict[str, Any]:
    return {"place": str(one.place), "reference": one.reference}


_TOP, _RESOLVED = "recipe", "resolved beside"
_PLAIN = ("output_dir",)


def _section(one: Explained) -> str:
    path = key_path(one.key)
    if len(path) == 1:
        return _RESOLVED if one.origin == "plan" and one.key not in _PLAIN else _TOP
    numbered = next((n for n, step in enumerate(path) if isinstance(step, int)), len(path) - 2)
    return dotted(path[: numbered + 1])


def _table(rows: list[Explained], section: str, width: int | None) -> Iterator[str]:
    keys = [one.key.removeprefix(f"{section}.") for one in rows]
    shown = [brief(one.value) for one in rows]
    first = min(max(map(len, keys)), WIDEST_KEY)
    second = min(max(map(len, shown)), WIDEST_VALUE)
    indent = " " * (first + 4)
    for key, value, one in zip(keys, shown, rows, strict=True):
        head = f"  {key:<{first}}  {value:<{second}}"
        if width is None or (len(key) <= first and len(value) <= second):
            yield from _aligned(head, _origin(one), width)
        else:
            yield from _aligned(f"  {key:<{first}} ", value, width)
            yield from _aligned(f"{indent}{'':<{second}}", _origin(one), width)
        for old in one.earlier:
            was = "was removed" if old.removes else f"was {brief(old.value)}"
            yield from _aligned(f"{indent}{was:<{second}}", _place(old), width)


def _aligned(head: str, rest: str, width: int | None) -> Iterator[str]:
    """A head and what stands beside it, folded in its own column."""
    if width is None or len(head) + 2 + len(rest) <= width:
        yield f"{head}  {rest}".rstrip()
        return
    left = len(head) + 2
    if width - left < min(max(24, *map(len, rest.split())), width - 10):
        yield head.rstrip()
        head, left = " " * 8, 10
    yield from (_folded(rest, width, f"{head}  ", " " * left) or [head.rstrip()])


def _folded(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    """Lines after indents, folded between words: a key or a path stays whole."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _origin(one: Explained) -> str:
    where = _place(one.written) if one.written else "default"
    if one.origin != "plan":
        absent = one.reason is not None and one.asked is None and one.value is None
        return f"{where}: {one.reason}" if absent else where
    if one.asked is None and one.written is None:
        return one.reason or ""
    return f"{brief(one.asked)} ({where}): {one.reason}"


def _place(one: Written) -> str:
    return f"{_short(one.place)}" + (f" from {one.reference}" if one.reference else "")


def _short(place: Position) -> Position:
    """The place by the shortest name of its file: without `configs/../`, where that is the same."""
    name = os.path.normpath(place.file)
    with contextlib.suppress(OSError, ValueError):
        if os.path.samefile(name, place.file):
            return dataclasses.replace(place, file=name)
    return place
