"""A recipe as a list of values, each with everything that was ever written for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorafit.recipe import Recipe
from lorafit.recipe.load import may_be_null, section_at
from lorafit.recipe.source import Located, Position, holds

Key = tuple[str | int, ...]
"""Where a value stands, such as ("dataset", "train", 0, "path")."""


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


def flatten(values: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Every value below `key`: sections, mappings and lists of sections are gone into, other lists are values."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from flatten(value, (*key, name))
    elif isinstance(values, list) and values and section_at(key) is not None:
        for index, value in enumerate(values):
            yield from flatten(value, (*key, index))
    else:
        yield key, values


def history(recipe: Recipe, key: Key) -> list[Written]:
    """What was written for a value, newest first: by `--set`, the file, its parents. Empty: the default holds."""
    found = list(_written(recipe.source, key)) if recipe.source is not None else []
    places: dict[Position, Written] = {}
    for one in found:
        places.setdefault(one.place, one)
    return list(places.values())


def in_force(key: Key, written: list[Written]) -> Written | None:
    """What decides a value; None if that is the default, to which a null goes back where it is no value itself."""
    newest = written[0] if written else None
    if newest is None or newest.above or (newest.removes and not may_be_null(key)):
        return None
    return newest


def _written(node: Located, key: Key) -> Iterator[Written]:
    if not key:
        yield Written(node.as_written(), node.position, node.reference, node.removes)
    elif holds(node.value, key[0]):
        yield from _written(node.value[key[0]], key[1:])
    elif node.removes or (node.earlier and node.earlier[0].value is not None):
        yield Written(None, node.position, removes=True, above=True)
    for old in node.earlier:
        yield from _written(old, key)
