"""What reports are made of: numbers, times and foreign text as people read them, and the rows of tables."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from markupsafe import Markup

from lorafit.evaluation.results import Difference, Figure, Metric, Results
from lorafit.text import GIB, MIB

NONE = "–"

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that a reader can't see, or that change how what follows is read."""
NAMED = {0: "NUL", 7: "BEL", 8: "BS", 13: "CR", 27: "ESC", 127: "DEL"}
KEPT = "\n\t\u200c\u200d"
"""The last two join letters of some scripts, and emoji."""


def quantity(value: float | None, unit: str) -> str:
    """A value in its unit: shares as percent, losses with four decimals."""
    if value is None or not math.isfinite(value):
        return NONE
    if unit == "share":
        return _minus(f"{100 * value:.1f}%")
    if unit in ("nats", "bits"):
        return number(value, 4)
    if unit == "tokens":
        return _minus(f"{value:,.1f}")
    if unit == "seconds":
        return _minus(f"{value:,.2f} s")
    return number(value, 4 if abs(value) < 10 else 2 if abs(value) < 100 else 1)


def number(value: float | None, decimals: int) -> str:
    """A number with so many decimals; in powers of ten where that would leave nothing of it."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and abs(value) < 0.5 * 10**-decimals:
        return _minus(f"{value:.1e}")
    return _minus(f"{value:,.{decimals}f}")


def change(value: float | None, unit: str) -> str:
    """A difference, with its sign; that of shares in points."""
    if value is None or not math.isfinite(value):
        return NONE
    text = size(abs(value), unit)
    zero = not any(digit in text for digit in "123456789")
    return text if zero else f"{'+' if value > 0 else '−'}{text}"


def size(value: float | None, unit: str) -> str:
    """A difference without a sign."""
    if unit == "share" and value is not None and math.isfinite(value):
        return f"{100 * value:.1f} points"
    return quantity(value, unit)


def interval(low: float | None, high: float | None, unit: str, *, signed: bool = False) -> str:
    """`low to high`, or nothing where there is none."""
    if low is None or high is None:
        return ""
    ends = [change(end, unit) if signed else quantity(end, unit) for end in (low, high)]
    return " to ".join(ends).replace(" points to ", " to ")


def in_bytes(value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return NONE
    return f"{value / GIB:.2f} GiB" if abs(value) >= GIB else f"{value / MIB:,.1f} MiB"


def moment(text: str) -> str:
    """An ISO time for people; as it is if it is none."""
    try:
        return datetime.fromisoformat(text).strftime("%d %B %Y, %H:%M %Z").lstrip("0")
    except ValueError:
        return text


def count(number_of: int, one: str, many: str | None = None) -> str:
    return f"{number_of:,} {one if number_of == 1 else many or one + 's'}"


def visible(text: Any) -> Any:
    """Text whose control characters, lone surrogates and marks of direction can be seen: `⟨NUL⟩`, `⟨U+202E⟩`.

    Plain text, so that it may go into attributes and titles too; whatever is not text stays what it is.
    """
    if isinstance(text, Markup) or not isinstance(text, str) or not any(map(_is_hidden, text)):
        return text
    return "".join(_mark(character) if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    return not character.isprintable() and character not in KEPT and unicodedata.category(character) in HIDDEN


def _mark(character: str) -> str:
    code = ord(character)
    return f"⟨{NAMED.get(code) or f'U+{code:04X}'}⟩"


def _minus(text: str) -> str:
    return (
        text.replace("-", "−", 1) if text.startswith("-") and any(c in "123456789" for c in text) else text.lstrip("-")
    )


@dataclass(frozen=True)
class FigureRow:
    """A metric of all models; None where a model does not have it."""

    metric: Metric
    figures: tuple[Figure | None, ...]

    @property
    def has_value(self) -> bool:
        return any(figure is not None and figure.value is not None for figure in self.figures)

    @property
    def values(self) -> list[str]:
        return [quantity(figure.value if figure else None, self.metric.unit) for figure in self.figures]

    @property
    def intervals(self) -> list[str]:
        return [interval(figure.low, figure.high, self.metric.unit) if figure else "" for figure in self.figures]


def figure_rows(results: Results, name: str) -> Iterator[FigureRow]:
    """A set's figures, in the order of its metrics."""
    for metric in results.sets[name].metrics:
        yield FigureRow(metric, tuple(results.figure(name, metric.name, model) for model in results.models))


@dataclass(frozen=True)
class DifferenceRow:
    """A metric of one model against another."""

    difference: Difference
    metric: Metric

    @property
    def pair(self) -> tuple[str, str]:
        return self.difference.model, self.difference.against

    @property
    def value(self) -> str:
        return change(self.difference.value, self.metric.unit)

    @property
    def interval(self) -> str:
        return interval(self.difference.low, self.difference.high, self.metric.unit, signed=True)


def difference_rows(results: Results, name: str) -> Iterator[DifferenceRow]:
    """A set's differences, in the order of the results."""
    metrics = {metric.name: metric for metric in results.sets[name].metrics}
    for one in results.differences:
        if one.set == name and one.metric in metrics:
            yield DifferenceRow(one, metrics[one.metric])
