"""Other tools' YAML: as strict as a recipe's in what matters (duplicates, tags, size), as lax as theirs in scalars."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from lorafit.bounds import read_bytes
from lorafit.errors import UsageError
from lorafit.recipe import RecipeError
from lorafit.recipe.source import MAX_BYTES, Located, SourceMistakes, _compose, _Reader, parse_scalar


class _Dialect(_Reader):
    """Reads an empty value as null, and takes nothing from the environment."""

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str | int, ...]) -> Any:
        text = self._text(node, path, node.value)
        if node.style is not None:
            return text
        try:
            return parse_scalar(text)
        except ValueError:
            self.mistake(node, path, "this number is too large; quote it if it is text")
            return None


def read_peer(file: Path) -> Located:
    """The mapping in a file. Raises RecipeError with the places of what can't be read, and UsageError."""
    try:
        data = read_bytes(file)
    except OSError as error:
        raise UsageError(f"{file}: can't be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{file}: is larger than {MAX_BYTES // 1024} KiB: not a recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is not UTF-8 text") from None
    reader = _Dialect(str(file), {})
    try:
        root = reader.read(_compose(text, str(file))).located
    except SourceMistakes as error:
        raise RecipeError(error.mistakes) from None
    if reader.mistakes:
        raise RecipeError(reader.mistakes)
    if not isinstance(root.value, dict):
        raise UsageError(f"{file}: expected a mapping of keys, such as `base_model: …`")
    return root


# --- values as those tools read them: PyYAML's, and text that is a number ---------------------------


def flag(value: Any) -> bool:
    """Raises ValueError."""
    word = value.strip().lower() if isinstance(value, str) else value
    known: dict[Any, bool] = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
    if isinstance(word, str) and word in known:
        return known[word]
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise ValueError("expected true or false")


def number(value: Any) -> float:
    """Raises ValueError."""
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
    """Raises ValueError."""
    found = number(value)
    if found <= 0:
        raise ValueError("expected a number above 0")
    return found


def above_zero_or_none(value: Any) -> float | None:
    """None for 0, which is as good as nothing. Raises ValueError."""
    return above_zero(value) if number(value) else None


def whole(value: Any) -> int:
    """Raises ValueError."""
    found = number(value)
    if found != int(found):
        raise ValueError("expected a whole number")
    return int(found)


def text(value: Any) -> str:
    """Raises ValueError."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected text")
    return value


def names(value: Any) -> list[str]:
    """A list of names, or one text with commas between. Raises ValueError."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
        raise ValueError("expected a list of names")
    return parts


def count(value: Any) -> int:
    """Raises ValueError."""
    if (found := whole(value)) <= 0:
        raise ValueError("expected a whole number above 0")
    return found


def limit(value: Any) -> int | None:
    """A number of which 0 and less mean that there is none. Raises ValueError."""
    found = whole(value)
    return found if found > 0 else None


def indices(value: Any) -> list[int]:
    """Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("expected a list of whole numbers")
    return [whole(item) for item in value]


def words(value: Any) -> list[str]:
    """Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("expected a list of words")
    return [text(item) for item in value]


def mapping(value: Any) -> dict[str, Any]:
    """Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value


def data_sets(value: Any) -> list[dict[str, Any]]:
    """A list of mappings that isn't empty. Raises ValueError."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError("expected a list of data sets, such as [{path: …}]")
    return value


def file_names(value: Any) -> list[str]:
    """The files of `data_files`: one, several, or those of the split train. Raises ValueError."""
    if isinstance(value, dict):
        value = value.get("train", [])
    return [text(value)] if isinstance(value, str) else words(value or [])
