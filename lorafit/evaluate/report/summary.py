"""What all reports say alike: the verdict in a sentence, and rows of figures and differences as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lorafit.evaluate.report.page.words import change, interval, quantity
from lorafit.evaluate.results import Difference, Metric, Results
from lorafit.evaluate.results import Set as SetInfo

BRIEF = {
    "task": (
        "loss",
        "perplexity",
        "token_accuracy",
        "exact_match",
        "accuracy",
        "macro_f1",
        "json_valid",
        "ended",
        "agreement",
        "judge",
    ),
    "forgetting": ("bits_per_byte", "kl"),
}
"""Metrics that a terminal and a pull request show first; others that a recipe asks for come after them."""
UNTOLD = (
    "exact_match_normalized",
    "token_f1",
    "json_match",
    "repetition",
    "length",
    "bits_per_byte",
    "loss",
    "perplexity",
)
"""Metrics that are measured anyway, and left to results.json and report.html where BRIEF does not have them."""


MOST_METRICS = 2
"""Metrics in the verdict of those that gates ask for; the tables have the others."""


def verdict(results: Results) -> str:
    """The main differences, whether they are more than noise, and the gates."""
    parts = []
    for main in _main(results):
        metric = metric_of(results, main)
        before, after = (results.figures[f"{main.set}.{main.metric}.{m}"].value for m in (main.against, main.model))
        ends = interval(main.low, main.high, metric.unit, signed=True)
        sure = "more than noise" if main.is_clear else _unclear(main)
        shown = f"{quantity(before, metric.unit)} → {quantity(after, metric.unit)}"
        count = results.figures[f"{main.set}.{main.metric}.{main.model}"].rows
        parts.append(
            f"{metric.label} of {main.model} against {main.against}: {shown}, {change(main.value, metric.unit)} "
            f"({f'95% interval {ends}; ' if ends else ''}{sure}; {count} row{'s' * (count != 1)})"
        )
    if results.gates:
        failed = len(results.failed)
        parts.append(
            f"{failed} of {len(results.gates)} gates failed" if failed else f"{len(results.gates)} gates passed"
        )
    return ". ".join(parts) or "nothing to compare"


def _unclear(one: Difference) -> str:
    """Why a difference says nothing: `is_clear` asks for more than an interval that leaves out zero."""
    has_zero = one.low is not None and one.high is not None and one.low <= 0 <= one.high
    return "within noise" if has_zero else "too few rows to tell"


def _main(results: Results) -> list[Difference]:
    """Differences of the first task set in what the gates ask for (else exact match or accuracy) and in the loss."""
    tasks = [name for name, info in results.sets.items() if info.role != "forgetting"]
    for name in tasks:
        known = {one.metric: one for one in reversed(results.differences) if one.set == name and one.value is not None}
        gated = re.compile(rf"(?<![\w.-]){re.escape(name)}\.(\w+)\.")
        asked = [metric for gate in results.gates for metric in gated.findall(gate.gate)]
        usual = [metric for metric in ("exact_match", "accuracy") if metric in known][:1]
        chosen = [metric for metric in dict.fromkeys(asked) if metric in known and metric != "loss"] or usual
        if found := [known[metric] for metric in (*chosen[:MOST_METRICS], "loss") if metric in known]:
            return found
    return []


def metric_of(results: Results, difference: Difference) -> Metric:
    return next(metric for metric in results.sets[difference.set].metrics if metric.name == difference.metric)


def brief(info: SetInfo) -> list[Metric]:
    """The metrics of a set that are shown where there is little room."""
    first = BRIEF.get(info.role, ())
    own = [metric for metric in info.metrics if metric.name not in (*first, *UNTOLD)]
    return [metric for metric in info.metrics if metric.name in first] + (own if info.role != "forgetting" else [])


@dataclass(frozen=True)
class Row:
    """A metric of all models: values and intervals by model, `–` and nothing where there is none."""

    label: str
    values: tuple[str, ...]
    intervals: tuple[str, ...]


def figure_rows(results: Results, name: str, metrics: list[Metric]) -> Iterator[Row]:
    for metric in metrics:
        found = [results.figure(name, metric.name, model) for model in results.models]
        if any(figure is not None and figure.value is not None for figure in found):
            yield Row(
                metric.label,
                tuple(quantity(figure.value if figure else None, metric.unit) for figure in found),
                tuple(interval(figure.low, figure.high, metric.unit) if figure else "" for figure in found),
            )


@dataclass(frozen=True)
class DifferenceRow:
    """A difference as text."""

    model: str
    against: str
    label: str
    value: str
    interval: str
    rows: str
    """Won, tied and lost."""
    says: str
    detectable: str


def difference_rows(results: Results, name: str, metrics: list[Metric]) -> Iterator[DifferenceRow]:
    known = {metric.name: metric for metric in metrics}
    for one in results.differences:
        metric = known.get(one.metric)
        if one.set != name or metric is None or one.value is None:
            continue
        better = one.value * (1 if metric.better != "lower" else -1) > 0
        direction = "" if metric.better is None else "better" if better else "worse"
        yield DifferenceRow(
            one.model,
            one.against,
            metric.label,
            change(one.value, metric.unit),
            interval(one.low, one.high, metric.unit, signed=True),
            f"{one.wins}/{one.ties}/{one.losses}",
            (direction or "differs") if one.is_clear else "same" if one.is_same else _unclear(one),
            quantity(one.detectable, metric.unit),
        )
