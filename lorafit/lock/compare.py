"""Two states of a recipe, compared by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lorafit.lock.file import Lock
from lorafit.recipe.source import shorten


def drift(locked: Lock, now: Lock) -> list[str]:
    """A line for everything that is no longer as it was locked; empty if nothing drifted."""
    one, two = locked.content, now.content
    return [
        *_values(one["recipe"]["values"], two["recipe"]["values"]),
        *_references(one["recipe"], two["recipe"]),
        *_changed_model(one["model"], two["model"]),
        *_changed_files("tokenizer ", one["tokenizer"], two["tokenizer"]),
        *_template(one["chat_template"], two["chat_template"]),
        *_changed_data(one["data"], two["data"]),
        *_changed_files("eval: ", one["judging"], two["judging"]),
        *(f"{name}: locked {before}, now {after}" for name, before, after in _pairs(one["versions"], two["versions"])),
    ]


def _pairs(one: dict[str, Any], two: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs, by name; what is missing on a side is shown as such."""
    for name in sorted(one.keys() | two.keys()):
        before, after = one.get(name, "none"), two.get(name, "none")
        if before != after:
            yield name, before, after


def _values(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """By dotted key, down to single values and the items of lists of the same length."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        before, after = ({str(n): item for n, item in enumerate(items)} for items in (before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            yield from _values(before.get(name), after.get(name), f"{path}.{name}" if path else name)
    elif before != after:
        yield f"{path}: locked {_shown(before)}, now {_shown(after)}"


def _references(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    """The values that are still taken from the environment, and are others there now."""
    before, after = one.get("references", {}), two["references"]
    for key in sorted(before.keys() & after.keys()):
        if before[key]["sha256"] != after[key]["sha256"]:
            yield f"{key}: what it takes from the environment is not what was locked"


def _shown(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False))


def _changed_model(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    if one.get("name") != two.get("name"):
        return  # the recipe's values say so
    if one.get("commit") != two.get("commit"):
        yield f"model: locked commit {one.get('commit')}, now {two.get('commit')}"
    yield from _changed_files("model: ", one.get("files") or {}, two.get("files") or {})


def _changed_files(what: str, one: dict[str, str], two: dict[str, str]) -> Iterator[str]:
    for name, before, after in _pairs(one, two):
        how = "is gone" if after == "none" else "is new" if before == "none" else "its bytes changed"
        yield f"{what}{name}: {how}"


def _template(before: str | None, after: str | None) -> Iterator[str]:
    if before and after and before != after:
        yield "chat template: its text changed"


def _changed_data(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    for name in one:
        if name not in two:
            continue  # the recipe's values say so
        if one[name].get("commit") != two[name].get("commit"):
            yield f"{name}: locked commit {one[name].get('commit')}, now {two[name].get('commit')}"
        yield from _changed_files("", one[name].get("files") or {}, two[name].get("files") or {})
