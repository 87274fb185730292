"""Values as other tools read them: PyYAML's, and text that is a number. Each raises ValueError."""

from __future__ import annotations

import math
from typing import Any


def flag(value: Any) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    known: dict[Any, bool] = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
    if isinstance(word, str) and word in known:
        return known[word]
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError("expected true or false")


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("expected a number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError("expected a number") from None
    if not math.isfinite(found):
        raise ValueError("expected a finite number")
    return found


def above_zero(value: Any) -> float:
    found = number(value)
    if found <= 0:
        raise ValueError("expected a number above 0")
    return found


def above_zero_or_none(value: Any) -> float | None:
    """None for 0, which is as good as nothing."""
    return above_zero(value) if number(value) else None


def whole(value: Any) -> int:
    found = number(value)
    if found != int(found):
        raise ValueError("expected a whole number")
    return int(found)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected text")
    return value


def names(value: Any) -> list[str]:
    """A list of names, or one text with commas between."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
        raise ValueError("expected a list of names")
    return parts


def count(value: Any) -> int:
    if (found := whole(value)) <= 0:
        raise ValueError("expected a whole number above 0")
    return found


def limit(value: Any) -> int | None:
    """A number of which 0 and less mean that there is none."""
    found = whole(value)
    return found if found > 0 else None


def indices(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("expected a list of whole numbers")
    return [whole(item) for item in value]


def words(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise ValueError("expected a list of words")
    return [text(item) for item in value]


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value


def data_sets(value: Any) -> list[dict[str, Any]]:
    """A list of mappings that isn't empty."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError("expected a list of data sets, such as [{path: …}]")
    return value


def file_names(value: Any) -> list[str]:
    """The files of `data_files`: one, several, or those of the split train."""
    if isinstance(value, dict):
        value = value.get("train", [])
    return [text(value)] if isinstance(value, str) else words(value or [])
