"""Charts as coordinates, which the template draws: learning curves and bars of differences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorafit.evaluation.report.text import State, change, count, state_of
from lorafit.evaluation.results import Difference, Metric

MOST_POINTS = 600
"""Points of a curve; longer ones keep the lowest and the highest value of every stretch."""
LOG_FROM = 50.0
"""Ratio of the highest to the lowest value from which an axis is logarithmic."""

BAR_WIDTH, BAR_HEIGHT, BAR_HALF = 240, 22, 112

Points = list[tuple[float, float]]
Name = Literal["train", "validation"]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A line of a chart: its path, and the points themselves where they are few."""

    name: Name
    path: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Panel:
    """A chart of fields of metrics.jsonl."""

    id: str
    title: str
    train: str
    validation: str | None = None
    width: int = 440
    height: int = 220
    may_be_log: bool = False


@dataclass(frozen=True)
class Chart:
    """A panel with its curves, between the edges of the plot."""

    panel: Panel
    title: str
    summary: str
    left: int
    top: int
    right: float
    bottom: float
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    curves: tuple[Curve, ...]


PANELS = (
    Panel("loss", "Loss", "loss", "eval_loss", 920, 320, may_be_log=True),
    Panel("accuracy", "Token accuracy", "mean_token_accuracy", "eval_mean_token_accuracy"),
    Panel("entropy", "Entropy", "entropy", "eval_entropy"),
    Panel("learning-rate", "Learning rate", "learning_rate"),
    Panel("grad-norm", "Gradient norm", "grad_norm"),
)


def learning_curves(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts of a run's metrics.jsonl that there are numbers for."""
    charts = []
    for panel in PANELS:
        series: dict[Name, Points] = {
            "train": _series(lines, panel.train),
            "validation": _series(lines, panel.validation),
        }
        found = {name: points for name, points in series.items() if points}
        if sum(map(len, found.values())) > 1:
            charts.append(_chart(panel, found))
    return charts


def _series(lines: Iterable[Mapping[str, Any]], field: str | None) -> Points:
    """The values of a field by step; the last of a step counts."""
    pairs: list[tuple[Any, Any]] = [(line.get("step"), line.get(field)) for line in lines if field]
    found = {step: value for step, value in pairs if is_number(step) and is_number(value)}
    return sorted((float(step), float(value)) for step, value in found.items())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _chart(panel: Panel, series: Mapping[Name, Points]) -> Chart:
    values = [value for points in series.values() for _, value in points]
    steps = [step for points in series.values() for step, _ in points]
    is_log = panel.may_be_log and min(values) > 0 and max(values) / min(values) >= LOG_FROM
    up = _log_ticks(min(values), max(values)) if is_log else _ticks(min(values), max(values))
    left, top, right, bottom = 64, 12, panel.width - 16.0, panel.height - 40.0
    scale = math.log10 if is_log else float
    low, high = scale(min(up[0], *values)), scale(max(up[-1], *values))
    first, last = min(0.0, *steps), max(steps) or 1.0

    def x(step: float) -> float:
        return round(left + (right - left) * (step - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (scale(value) - low) / (high - low), 1)

    curves = []
    for name, points in series.items():
        places = tuple((x(step), y(value)) for step, value in _thinned(points))
        path = "M" + "L".join(f"{across:g},{height:g}" for across, height in places)
        curves.append(Curve(name, path, places if name == "validation" and len(places) <= 60 else ()))
    return Chart(
        panel=panel,
        title=f"{panel.title}, logarithmic scale" if is_log else panel.title,
        summary=_summary(series),
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        across=tuple(Tick(x(step), f"{step:,.0f}") for step in _ticks(first, last) if step <= last and step % 1 == 0),
        up=tuple(Tick(y(value), f"{value:.4g}") for value in up),
        curves=tuple(curves),
    )


def _summary(series: Mapping[Name, Points]) -> str:
    parts = []
    for name, points in series.items():
        (first, began), (last, ended) = points[0], points[-1]
        at = f"{name} from {began:.4g} at step {first:.0f} to {ended:.4g} at step {last:.0f}"
        parts.append(at if len(points) > 1 else f"{name} {ended:.4g} at step {last:.0f}")
    return "; ".join(parts).capitalize() + "."


def _thinned(points: Points) -> Points:
    if len(points) <= MOST_POINTS:
        return points
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept |= {min(part, key=lambda index: points[index][1]), max(part, key=lambda index: points[index][1])}
    return [points[index] for index in sorted(kept)]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    span = high - low or abs(high) or 1.0
    step = next(
        factor * magnitude
        for magnitude in (10.0 ** math.floor(math.log10(span / about)),)
        for factor in (1, 2, 5, 10)
        if span / (factor * magnitude) <= about
    )
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(start, max(end, start + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(start, end + 1, max(1, math.ceil((end - start) / 6)))]


@dataclass(frozen=True)
class Bar:
    """A difference on a scale of its metric. Right of the middle is better, or higher where neither is.

    Attributes:
        at, low, high: across; low and high are None where there is no interval.
        band: half the width of what these rows could not have shown.
    """

    at: float
    low: float | None
    high: float | None
    band: float
    state: State
    description: str


def extent(differences: Iterable[Difference]) -> float:
    """The largest value or end of an interval of a metric's differences; their bars share a scale."""
    ends = [abs(end) for one in differences for end in (one.value, one.low, one.high) if end is not None]
    return max((end for end in ends if math.isfinite(end)), default=0.0) or 1.0


def bar(difference: Difference, metric: Metric, most: float) -> Bar | None:
    """The bar of a difference whose metric's extent is `most`; None where there is no value."""
    if difference.value is None or not math.isfinite(difference.value):
        return None
    sign = -1 if metric.better == "lower" else 1

    def x(value: float) -> float:
        return round(BAR_WIDTH / 2 + sign * BAR_HALF * value / most, 1)

    low, high = (None if end is None or not math.isfinite(end) else x(end) for end in (difference.low, difference.high))
    ends = sorted(end for end in (low, high) if end is not None)
    band = min((difference.detectable or 0.0) / most, 1.05) * BAR_HALF
    state = state_of(difference, metric)
    rows = count(difference.wins + difference.ties + difference.losses, "row")
    return Bar(
        at=x(difference.value),
        low=ends[0] if len(ends) == 2 else None,
        high=ends[1] if len(ends) == 2 else None,
        band=round(band, 1),
        state=state,
        description=(
            f"{metric.label}: {difference.model} minus {difference.against} is "
            f"{change(difference.value, metric.unit)}, {state}, on {rows}"
        ),
    )
