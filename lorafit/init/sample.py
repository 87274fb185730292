"""A look at the data: its format, how many rows there are, and how long they may be."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from lorafit.errors import DataError
from lorafit.rows import Fault, Format, Row, Shape, detect_format, is_local, read_rows, to_example

FIRST_ROWS = 200
MOST_ROWS = 50_000
"""Rows that are counted; beyond it only their being many matters."""
BYTES_A_TOKEN = 3
"""Fewer than most tokenizers put into one, so that rows are rather thought too long than too short."""
TOKENS_A_TURN = 8
"""What a chat template adds around a turn."""


@dataclass(frozen=True)
class Sample:
    """What was seen of a data set.

    Attributes:
        format: None where the rows aren't here.
        why: how the format is known.
        rows: their number; MOST_ROWS for as many or more, None where they aren't here.
        longest: rough tokens of the longest of the first rows.
        average: rough tokens of a row.
        faulty: what is wrong with the first row that can't be learned, of those that were looked at.
    """

    format: Format | None
    why: str
    rows: int | None = None
    longest: int | None = None
    average: float | None = None
    faulty: str | None = None


def look(path: str) -> Sample:
    """What a source's rows are like. Raises DataError for rows that can't be read."""
    if not is_local(path):
        return Sample(None, "on the hub: not looked at")
    rows = read_rows(path)
    first = list(itertools.islice(rows, FIRST_ROWS))
    if not first:
        raise DataError(f"{path}: there are no rows")
    format, why = detect_format(first[0], {})
    lengths, faults = [], []
    for row in first:
        try:
            lengths.append(_tokens(row, Shape(format)))
        except Fault as error:
            faults.append(str(error))
    lengths = lengths or [0]
    count = len(first) + sum(1 for _ in itertools.islice(rows, MOST_ROWS - len(first)))
    return Sample(format, why, count, max(lengths), sum(lengths) / len(lengths), next(iter(faults), None))


def _tokens(row: Row, shape: Shape) -> int:
    """Raises DataError, and Fault for a row that the audit would leave out or refuse."""
    example = to_example(row, shape)
    said = [*(message["content"] for message in example.messages), example.prompt, example.completion, example.text]
    size = sum(map(_bytes, said)) + _bytes(str(example.tools) if example.tools else None)
    return size // BYTES_A_TOKEN + TOKENS_A_TURN * (len(example.messages) + 1)


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogateescape"))
    if isinstance(value, (list, dict)):
        return len(str(value))
    return 0
