"""A row, its place in messages, and its cells under the names that a format uses; what is said of a missing column."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jinja2

from lorafit.bounds import Environment, within
from lorafit.errors import DataError
from lorafit.text import clipped, first_line, printable

TEXT_KINDS = (".jsonl", ".json", ".csv")
KINDS = (*TEXT_KINDS, ".parquet")
COMPRESSIONS = (".gz", ".zst")


def kind_of(file: str) -> str:
    """A data file's suffix without that of its compression; empty for any other name."""
    stem, suffix = os.path.splitext(file)
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
        return suffix if suffix in TEXT_KINDS else ""
    return suffix if suffix in KINDS else ""


@dataclass(frozen=True)
class Row:
    """One row as it is in a file or a hub data set.

    Text is decoded with `surrogateescape`: bytes that aren't UTF-8 are found when a cell is used.

    Attributes:
        number: of the line where the file has lines, of the row elsewhere; from 1.
    """

    file: str
    number: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        return place_of(self.file, self.number)


def place_of(file: str, number: int) -> str:
    """`file:line`, or `file: row N` where there are no lines (JSON lists, parquet, the hub)."""
    return f"{file}:{number}" if kind_of(file) in (".jsonl", ".csv") else f"{file}: row {number}"


class Fault(DataError):
    """A row that can't be learned, which an audit counts by the rule that it breaks."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def brief(value: Any, limit: int = 40) -> str:
    """A value as short text on one line that any terminal can show."""
    try:
        text = printable(json.dumps(value, ensure_ascii=False, default=str))
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return clipped(text, limit)


def names(columns: Iterable[str]) -> str:
    shown = [brief(name).strip('"') for name in columns]
    return ", ".join(shown[:20]) + (", …" if len(shown) > 20 else "")


Format = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text", "preference", "unpaired_preference"]
MISSING: Any = object()
_LISTS = ("messages", "conversations", "tools", "history")
_TEXT_OR_TURNS = ("prompt", "completion", "chosen", "rejected")


@dataclass(frozen=True)
class Shape:
    """How a source's rows are read.

    Attributes:
        columns: the file's names (or dotted paths into nested values) by the format's.
        template: Jinja that makes the column `text`, or columns by name.
        key: where the recipe has the source, for messages.
    """

    format: Format
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | Mapping[str, str] | None = None
    key: str = "dataset.train.0"


class Cells:
    """Access to a row's cells, with errors that name the place and the column."""

    def __init__(
        self, row: Row, columns: Mapping[str, str], template: str | Mapping[str, str] | None, key: str
    ) -> None:
        self.row = row
        self.place = row.place
        self.columns = columns
        self.key = key
        self.made = _render(row, template, key) if template is not None else {}

    def get(self, name: str) -> Any:
        """An optional cell, None if it isn't there; one that is mapped by name has to be there."""
        value = self._find(name)
        if value is MISSING:
            return self.need(name) if name in self.columns else None
        return value

    def has(self, name: str) -> bool:
        return self._find(name) is not MISSING

    def need(self, name: str) -> Any:
        value = self._find(name)
        if value is MISSING:
            raise DataError(
                f"{self.place}: {self.name(name)} is missing (columns: {names(self.row.fields)}); "
                f"map it with {self.key}.columns",
                ("columns", name) if name in self.columns else (),
            )
        return value

    def name(self, name: str) -> str:
        """A column's name for messages, as the file has it."""
        return repr(name if name in self.made else self.columns.get(name, name))

    def _find(self, name: str) -> Any:
        if name in self.made:
            return self.made[name]
        value = _lookup(self.row.fields, self.columns.get(name, name), nested=name in self.columns)
        # Arrow fills up nested objects of different shapes with nulls; JSON has only nulls that are meant.
        return value if value is MISSING or kind_of(self.row.file) in TEXT_KINDS else without_nulls(value)

    def text(self, name: str) -> str:
        return self.as_text(self.need(name), self.name(name))

    def optional_text(self, name: str) -> str:
        value = self.get(name)
        return "" if value is None else self.as_text(value, self.name(name))

    def answer(self, name: str) -> str:
        """A text to be learned, which must not be null or empty."""
        if self.need(name) is None:
            raise self.no_answer(self.name(name), "null")
        text = self.text(name)
        if not text.strip():
            raise self.no_answer(self.name(name), "empty")
        return text

    def no_answer(self, what: str, how: str) -> Fault:
        return Fault("empty_answers", f"{self.place}: {what} is {how}, so there is nothing to learn")

    def as_text(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise self.wrong(what, "must be text", value)
        self.check_utf8(value, what)
        return value

    def check_utf8(self, value: Any, what: str) -> None:
        """Raises Fault for text at any depth that can't be written as UTF-8."""
        if isinstance(value, str):
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    code = ord(value[error.start])
                    wrong = f"byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else f"half a pair, \\u{code:04x},"
                    place = f"{wrong} at character {error.start + 1}"
                    raise Fault("not_utf8", f"{self.place}: {what} is not UTF-8 ({place})") from None
        elif isinstance(value, dict):
            for key, item in value.items():
                self.check_utf8(key, what)
                self.check_utf8(item, what)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.check_utf8(item, what)

    def wrong(self, what: str, problem: str, value: Any) -> DataError:
        return DataError(f"{self.place}: {what} {problem}, got {brief(value)}")

    def json(self, text: str, what: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise DataError(f"{self.place}: {what} is not JSON: {brief(text)}") from None

    def learned(self) -> bool:
        """Whether the row's own `train` and `weight` leave it to be learned."""
        return all(self.flag(self.get(name), name, self.name(name)) for name in ("train", "weight"))

    def flag(self, value: Any, kind: str, what: str) -> bool:
        """Whether `train`, `training` or `weight` says yes; null is as good as absent."""
        if value is None:
            return True
        flag = as_bool(value)
        if flag is None:
            allowed = "0 and 1" if kind == "weight" else "true and false"
            raise self.wrong(
                what,
                f"says whether something is learned, so it takes only {allowed} (rename it if it is not that)",
                value,
            )
        return flag


def as_bool(value: Any) -> bool | None:
    """True and false as JSON, numbers and CSV have them; None for anything else."""
    if isinstance(value, str):
        return {"0": False, "1": True, "false": False, "true": True}.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _lookup(fields: Mapping[str, Any], name: str, nested: bool) -> Any:
    if name in fields or not nested:
        return fields.get(name, MISSING)
    value: Any = fields
    for part in name.split("."):
        if isinstance(value, dict):
            value = value.get(part, MISSING)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# --- templates ------------------------------------------------------------------------------------


def check_template(template: str | Mapping[str, str]) -> None:
    """Raises ValueError with the reason, one line, for a template that isn't Jinja."""
    for column, source in _by_column(template).items():
        with within(ValueError, f"{column}: the template"):
            try:
                _compiled(source)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"{column}: line {error.lineno}: {first_line(error.message)}") from None
            except Exception as error:  # noqa: BLE001 - a number of 5000 digits, brackets 2000 deep, 30 loops in each other
                raise ValueError(f"{column}: can't be compiled: {first_line(error)}") from None


def _by_column(template: str | Mapping[str, str]) -> Mapping[str, str]:
    return {"text": template} if isinstance(template, str) else template


def _printed(value: Any) -> Any:
    if value is None:  # would be the text "None"
        raise jinja2.TemplateRuntimeError("a value is null; write {{ … or '' }} if it may be")
    return value


def _tojson(value: Any, indent: int | None = None) -> str:
    # `default=str` raises the right error for a name that is undefined
    return json.dumps(value, ensure_ascii=False, indent=indent, default=str)


@functools.cache
def _environment() -> Environment:
    environment = Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_printed)
    environment.filters["tojson"] = _tojson
    return environment


@functools.lru_cache(maxsize=256)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def options_in(row: Row, asked: str) -> list[str]:
    """The options that a column, or the path to a nested one, lists. Raises DataError where it holds none."""
    value: Any = row.fields
    for part in asked.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) for item in value):
        what = "must be a list of two or more texts, the options of the row"
        raise DataError(f"{row.place}: {asked!r} {what}", ("options",))
    return list(value)


def _render(row: Row, template: str | Mapping[str, str], key: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for column, source in _by_column(template).items():
        place = f"{row.place}: {key}.template ({column}): "
        failed = partial(DataError, where=("template", column))
        with within(failed, f"{place}it"):
            try:
                text = _compiled(source).render({**row.fields, "row": row.fields})
            except Exception as error:  # noqa: BLE001 - a template may fail in any way
                raise failed(f"{place}{first_line(error)}") from None
        made[column] = _parsed(column, text)
    return made


def _parsed(column: str, text: str) -> Any:
    """Text that a template made, as turns or a list where the column holds such and the text is one."""
    if column not in (*_LISTS, *_TEXT_OR_TURNS) or not text.lstrip().startswith(("[", "{")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if column in _LISTS or is_turns(value) else text


SPEAKERS = ("role", "from", "speaker")
CONTENTS = ("content", "value", "text")
"""What a turn calls who says it, and what is said."""


def is_turns(value: Any) -> bool:
    """Whether a value is one turn of a conversation or a list of them (JSON may also be an answer's text)."""
    turns = value if isinstance(value, list) else [value]
    return bool(turns) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def is_turn(value: Mapping[str, Any]) -> bool:
    """Whether a mapping says who says what."""
    return not value.keys().isdisjoint(SPEAKERS) and not value.keys().isdisjoint(CONTENTS)
