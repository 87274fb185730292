"""Nested values: dotted keys, single values, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

KeyPath = tuple[str | int, ...]
"""Where a value stands, such as ("dataset", "train", 0, "path")."""
Items = Callable[[tuple[Any, ...], Any, Any], tuple[Any, Any]]
"""Two values at a key, as mappings where their items are to be compared one by one."""


def dotted(path: Iterable[Hashable]) -> str:
    """`("dataset", "train", 0, "path")` -> `dataset.train.0.path`."""
    return ".".join(map(str, path))


def key_path(key: str) -> KeyPath:
    """`dataset.train.0.path` -> `("dataset", "train", 0, "path")`."""
    return tuple(int(step) if step.isdecimal() else step for step in key.split("."))


def leaves(
    value: Any, path: KeyPath = (), enters: Callable[[KeyPath], bool] = lambda _: True
) -> Iterator[tuple[KeyPath, Any]]:
    """Every single value, with its key. What is empty is one, and a list at a key that `enters` refuses."""
    if isinstance(value, dict) and value:
        for name, child in value.items():
            yield from leaves(child, (*path, name), enters)
    elif isinstance(value, list) and value and enters(path):
        for index, child in enumerate(value):
            yield from leaves(child, (*path, index), enters)
    else:
        yield path, value


def by_index(_: tuple[Any, ...], before: Any, after: Any) -> tuple[Any, Any]:
    """Lists of the same length item by item; others as wholes."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return dict(enumerate(before)), dict(enumerate(after))
    return before, after


def differences(
    before: Any, after: Any, path: tuple[Any, ...] = (), items: Items = by_index, absent: Any = None
) -> Iterator[tuple[tuple[Any, ...], Any, Any]]:
    """The keys at which two values differ, as deep as both are mappings, each with what they have there.

    Args:
        items: how lists are compared.
        absent: stands for what is not there.
    """
    before, after = items(path, before, after)
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys((*before, *after)):
            yield from differences(before.get(name, absent), after.get(name, absent), (*path, name), items, absent)
    elif before != after or isinstance(before, bool) != isinstance(after, bool):
        yield path, before, after
