"""What a metric of answers is given, and what it is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafit.errors import MissingError
from lorafit.evaluation.results import Metric

PairScore = Callable[[str, str], float | None]
"""(answer, expected) -> score; None: the row has no such value."""


@dataclass(frozen=True)
class Judged:
    """An answer to score.

    Attributes:
        row: as it was read from the file; may be empty.
    """

    answer: str
    expected: str
    prompt: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerMetric:
    """A metric with its argument.

    Attributes:
        score: of one answer; None: the row has no such value.
        says_yes_or_no: whether all scores so far were true or false, which makes the figure a share of the rows.
    """

    info: Metric
    score: Callable[[Judged], float | None]
    says_yes_or_no: Callable[[], bool] = lambda: False


def load_extra(module: str, metric: str) -> Any:
    """A module of the extra `eval`. Raises MissingError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise MissingError(f"the metric {metric} needs the package {package}: pip install 'lorafit[eval]'") from None
