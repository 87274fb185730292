"""An explanation for people and for programs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import textwrap
from collections.abc import Iterator
from typing import Any

from lorafit.errors import printable
from lorafit.explain.make import Explained, Explanation
from lorafit.explain.values import Written
from lorafit.recipe.source import Position

WIDEST_KEY, WIDEST_VALUE = 30, 24
"""Columns of keys and of values; what is longer pushes the rest to the next line."""
MOST = 300
"""Characters of a value in a table."""


def brief(value: Any) -> str:
    """A value as YAML would have it, on one line."""
    if isinstance(value, str):
        plain = value.isprintable() and value != "" and value == value.strip()
        text = value if plain else json.dumps(value, ensure_ascii=False)
    elif isinstance(value, dict) and value:
        text = f"{{{', '.join(f'{key}: {brief(item)}' for key, item in value.items())}}}"
    elif isinstance(value, list) and value:
        text = f"[{', '.join(map(brief, value))}]"
    elif isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    else:
        text = json.dumps(value, ensure_ascii=False)
    text = printable(text)
    return text if len(text) <= MOST else f"{text[: MOST - 1]}…"


def text(found: Explanation, width: int | None = None) -> str:
    """A table by section; lines longer than `width` are wrapped (None: not)."""
    lines: list[str] = []
    for section, values in itertools.groupby(_ordered(found.values), key=_section):
        rows = list(values)
        lines += [*([""] if lines else []), section, *_table(rows, section, width)]
    if found.documentation:
        lines += ["", *_folded(found.documentation, width)]
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
        "key": one.key,
        "value": one.value,
        "origin": one.origin,
        "asked": one.asked,
        "reason": one.reason,
        **(_written_dict(one.written) if one.written else {"place": None, "reference": None}),
        "overridden": [{"value": old.value, "removed": old.removes, **_written_dict(old)} for old in one.earlier],
    }


def _written_dict(one: Written) -> dict[str, Any]:
    return {"place": str(one.place), "reference": one.reference}


_TOP, _RESOLVED = "recipe", "resolved beside"
_PLAIN = ("output_dir",)


def _section(one: Explained) -> str:
    head, dot, _ = one.key.partition(".")
    if one.origin == "plan" and not dot and head not in _PLAIN:
        return _RESOLVED
    parts = one.key.split(".")
    numbered = next((n for n, part in enumerate(parts) if part.isdecimal()), None)
    if numbered is not None:
        return ".".join(parts[: numbered + 1])
    return ".".join(parts[:-1]) if dot else _TOP


def _ordered(values: tuple[Explained, ...]) -> list[Explained]:
    """The values of a section together, sections in the recipe's order, what is no key of it last."""
    order = list(dict.fromkeys(map(_section, values)))
    order.sort(key=lambda name: (name == _RESOLVED, name == _TOP))
    return sorted(values, key=lambda one: order.index(_section(one)))


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
    folded = _folded(rest, width - left) or [""]
    yield f"{head}  {folded[0]}".rstrip()
    for line in folded[1:]:
        yield " " * left + line


def _folded(text: str, width: int | None) -> list[str]:
    """Lines, folded between words: a key or a path stays whole."""
    return [text] if width is None else textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _origin(one: Explained) -> str:
    where = _place(one.written) if one.written else "default"
    if one.origin != "plan":
        return (
            where if one.reason is None or one.asked is not None or one.value is not None else f"{where}: {one.reason}"
        )
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
