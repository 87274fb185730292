"""A recipe as it is written: lines by dotted key, with comments, as YAML that lorafit's own reader reads back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.recipe import Recipe
from lorafit.recipe.layers import Draft
from lorafit.recipe.load import section_at, validate
from lorafit.recipe.start import on_its_start
from lorafit.recipe.yaml import parse_scalar, read_yaml
from lorafit.text import printable

_PLAIN = re.compile(r"[A-Za-z0-9_./~^$()\\][A-Za-z0-9_./~<>@=+*^$()\\ -]*")
_REFERENCE = re.compile(r"\$\{.*\}", re.DOTALL)
_ESCAPES = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


@dataclass(frozen=True)
class Line:
    """A value of the recipe, with a comment."""

    value: Any
    comment: str = ""


@dataclass(frozen=True)
class Document:
    """A recipe to be written: lines by dotted key, in the order of the recipe's sections, between comments."""

    lines: Mapping[str, Line]
    head: tuple[str, ...] = ()
    foot: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """The recipe as YAML."""
        parts = [*map(_comment, self.head)]
        for section in Recipe.model_fields:
            own = {key: line for key, line in self.lines.items() if key.split(".")[0] == section}
            if section in own:
                parts += _entry(section, own[section])
            elif own:
                parts.append(f"{section}:")
                for key, line in sorted(own.items(), key=_place_of_key):
                    parts += [f"  {text}" for text in _entry(key.split(".", 1)[1], line)]
        return "\n".join([*parts, *([""] if self.foot else []), *map(_comment, self.foot), ""])


def _place_of_key(entry: tuple[str, Line]) -> int:
    """Where the section has the key."""
    section, name = entry[0].split(".", 1)
    model = section_at((section,))
    return list(model.model_fields).index(name) if model and name in model.model_fields else 0


def recipe_of(text: str, file: Path | str) -> Recipe:
    """The recipe that a text is. Raises RecipeError, with places in `file`."""
    return validate(on_its_start(Draft(read_yaml(text, str(file), {}), [], True)))


def _comment(text: str) -> str:
    return f"# {printable(text)}".rstrip()


def _entry(key: str, line: Line) -> list[str]:
    """The lines of a key with its value, and of what is in that."""
    value, remark = line.value, f" {_comment(line.comment)}" if line.comment else ""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        items = [_entries(item) for item in value]
        inside = [f"{'  ' if number else '- '}{text}" for item in items for number, text in enumerate(item)]
    elif isinstance(value, dict) and value:
        inside = _entries(value)
    else:
        return [f"{key}: {scalar(value)}{remark}"]
    return [f"{key}:{remark}", *(f"  {text}" for text in inside)]


def _entries(values: Mapping[str, Any]) -> list[str]:
    pairs = ((_text(name), part if isinstance(part, Line) else Line(part)) for name, part in values.items())
    return [text for name, line in pairs for text in _entry(name, line)]


def scalar(value: Any) -> str:
    """A value on one line, as lorafit's own reader reads it back."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(scalar, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(key))}: {scalar(item)}" for key, item in value.items()) + "}"
    return _text(value) if isinstance(value, str) else str(value)


def _number(value: float) -> str:
    """A number as short as it can be: 2e-4 rather than 0.0002."""
    mantissa, _, exponent = f"{value:e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    short = f"{mantissa}e{int(exponent)}"
    return short if float(short) == value and abs(value) < 0.001 and value else repr(value).removesuffix(".0")


def _text(value: str) -> str:
    if _PLAIN.fullmatch(value) and not value.endswith(" ") and isinstance(_read(value), str):
        return value
    if _REFERENCE.fullmatch(value):  # single quotes keep it from being read from the environment
        return "'" + value.replace("'", "''") + "'"
    return '"' + "".join(map(_escaped, value)) + '"'


def _read(text: str) -> Any:
    try:
        return None if text in ("yes", "no", "on", "off") else parse_scalar(text)  # text, but not for other readers
    except ValueError:
        return None


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
