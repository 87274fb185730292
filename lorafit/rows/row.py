"""A row, its place in messages, and values as short text for them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorafit.errors import DataError
from lorafit.text import printable

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
    """A row that can't be learned, which an audit counts.

    Attributes:
        rule: the audit's rule that it breaks.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def brief(value: Any, limit: int = 40) -> str:
    """A value as short text on one line that any terminal can show."""
    try:
        text = printable(json.dumps(value, ensure_ascii=False, default=str))
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def names(columns: Iterable[str]) -> str:
    shown = [brief(name).strip('"') for name in columns]
    return ", ".join(shown[:20]) + (", …" if len(shown) > 20 else "")
