"""What the page says, made of an evaluation's results: rows of tables, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lorafit.evaluate.report.page.charts import Bar, State, bar, extent, state_of
from lorafit.evaluate.report.page.words import change, count, in_bytes, interval, number, quantity, size
from lorafit.evaluate.results import Difference, Metric, Results
from lorafit.evaluate.results import Set as SetInfo

MOST_KEYS = 4
"""Differences in the head of the page."""
UNTOLD = ("token_accuracy", "ended", "repetition", "agreement")
"""Shares that say little alone."""


@dataclass(frozen=True)
class Key:
    """A main difference, for the head of the page."""

    label: str
    against: str
    before: str
    after: str
    change: str
    interval: str
    rows: str
    state: State


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str
    rows: str
    is_best: bool


@dataclass(frozen=True)
class FigureRow:
    label: str
    name: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class DifferenceRow:
    label: str
    bar: Bar | None
    value: str
    interval: str
    state: str
    wins: int
    ties: int
    losses: int
    detectable: str


@dataclass(frozen=True)
class Pair:
    model: str
    against: str
    rows: tuple[DifferenceRow, ...]


@dataclass(frozen=True)
class SetContent:
    name: str
    role: str
    source: str
    rows: str
    figures: tuple[FigureRow, ...]
    pairs: tuple[Pair, ...]


def sets_of(results: Results) -> list[SetContent]:
    return [_set(results, name, info) for name, info in results.sets.items()]


def _set(results: Results, name: str, info: SetInfo) -> SetContent:
    answered = "all answered" if info.answered == info.rows else f"{info.answered:,} of them answered"
    rows = f"{count(info.rows, 'row')}, {answered}" if info.answered else count(info.rows, "row")
    figures = tuple(_figure_row(results, name, info, metric) for metric in info.metrics)
    return SetContent(name, info.role, info.source, rows, figures, tuple(_pairs(results, name, info)))


def _figure_row(results: Results, name: str, info: SetInfo, metric: Metric) -> FigureRow:
    figures = [results.figure(name, metric.name, model) for model in results.models]
    values = [figure.value for figure in figures if figure is not None and figure.value is not None]
    shown = [quantity(value, metric.unit) for value in values]
    best = quantity((max if metric.better == "higher" else min)(values), metric.unit) if values else ""
    # By what is shown: of two figures that read alike, none is marked as the better one.
    told_apart = metric.better is not None and len(set(shown)) > 1
    cells = tuple(
        Cell(
            quantity(figure.value, metric.unit),
            interval(figure.low, figure.high, metric.unit),
            "" if figure.rows in (info.rows, info.answered) else count(figure.rows, "row"),
            told_apart and figure.value is not None and quantity(figure.value, metric.unit) == best,
        )
        if figure
        else Cell(quantity(None, metric.unit), "", "", False)
        for figure in figures
    )
    note = {"higher": "higher is better", "lower": "lower is better", None: ""}[metric.better]
    unit = metric.unit if metric.unit in ("nats", "bits", "tokens") else ""
    return FigureRow(metric.label, metric.name, ", ".join(part for part in (unit, note) if part), cells)


def _pairs(results: Results, name: str, info: SetInfo) -> Iterator[Pair]:
    metrics = {metric.name: metric for metric in info.metrics}
    differences = [one for one in results.differences if one.set == name and one.metric in metrics]
    extents = {metric: extent(one for one in differences if one.metric == metric) for metric in metrics}
    for model, against in dict.fromkeys((one.model, one.against) for one in differences):
        found = {one.metric: one for one in differences if (one.model, one.against) == (model, against)}
        rows = (_difference_row(found[key], metrics[key], extents[key]) for key in metrics if key in found)
        yield Pair(model, against, tuple(rows))


def _difference_row(one: Difference, metric: Metric, most: float) -> DifferenceRow:
    return DifferenceRow(
        metric.label,
        bar(one, metric, most),
        change(one.value, metric.unit),
        interval(one.low, one.high, metric.unit, signed=True),
        state_of(one, metric),
        one.wins,
        one.ties,
        one.losses,
        size(one.detectable, metric.unit),
    )


def verdict(results: Results) -> str:
    failed, gates = len(results.failed), len(results.gates)
    if not gates:
        return "No gates were set"
    if failed:
        return f"{failed} of {count(gates, 'gate')} failed"
    return "The gate passed" if gates == 1 else f"All {gates} gates passed"


def keys(results: Results) -> list[Key]:
    """The main difference of every set, against the first model, which is the base; those of tasks first."""
    models = list(results.models)
    found = []
    for role in ("task", "benchmark", "forgetting"):
        for name, info in results.sets.items():
            key = _key(results, name, info, models) if info.role == role else None
            if key:
                found.append(key)
    return found[:MOST_KEYS]


def _key(results: Results, name: str, info: SetInfo, models: list[str]) -> Key | None:
    here = [one for one in results.differences if one.set == name and one.value is not None]
    pair = next(((one.model, one.against) for one in here if models and one.against == models[0]), None)
    pair = pair or next(((one.model, one.against) for one in here), None)
    by_metric = {one.metric: one for one in here if (one.model, one.against) == pair}
    telling = sorted((metric for metric in info.metrics if metric.better and metric.name in by_metric), key=_telling)
    if not telling:
        return None
    metric, one = telling[0], by_metric[telling[0].name]
    before, after = (results.figure(name, metric.name, model) for model in (one.against, one.model))
    return Key(
        label=f"{name}: {metric.label}",
        against=f"{one.model} against {one.against}",
        before=quantity(before.value if before else None, metric.unit),
        after=quantity(after.value if after else None, metric.unit),
        change=change(one.value, metric.unit),
        interval=interval(one.low, one.high, metric.unit, signed=True),
        rows=count(one.wins + one.ties + one.losses, "row"),
        state=state_of(one, metric),
    )


def _telling(metric: Metric) -> bool:
    """False for shares of right answers, which say more to people than likelihoods; they sort first."""
    return metric.unit != "share" or metric.better != "higher" or metric.name in UNTOLD


def memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, how much, note) of a manifest's `memory`."""
    predicted, measured = memory.get("predicted") or {}, memory.get("measured") or {}
    rows = [
        (f"predicted, {kind}", in_bytes(predicted[kind]), str(predicted.get("method", "")))
        for kind in predicted
        if _is_number(predicted[kind])
    ]
    for kind, value in measured.items():
        # On the CPU the whole process is measured, with libraries that the prediction leaves out.
        basis = predicted.get(kind)
        note = f"{100 * (value / basis - 1):+.1f}% of the predicted" if _is_number(basis) and basis else ""
        rows.append((f"measured, {kind}", in_bytes(value), note.replace("-", "−")))
    if _is_number(memory.get("baseline")):
        rows.append(("before the training", in_bytes(memory["baseline"]), "what the process held already"))
    return rows


MERGE_FIGURES = (
    ("kl", "mean KL from the adapter", "max_kl", "at most"),
    ("kl_max", "largest KL of a token", None, ""),
    ("top1", "same most likely token", "min_top1", "at least"),
    ("loss", "loss", None, ""),
    ("loss_increase", "loss above the adapter's", "max_loss_increase", "at most"),
    ("logit_difference", "largest difference of a logit", "max_logit_difference", "at most"),
)


def merge_rows(merge: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(figure, value, limit) of a merge report's verification."""
    verification = merge.get("verification") or {}
    figures, limits = verification.get("figures") or {}, verification.get("limits") or {}
    rows = []
    for name, label, limit, word in MERGE_FIGURES:
        if _is_number(figures.get(name)):
            unit = "share" if name == "top1" else "nats"
            demanded = limits.get(limit) if limit else None
            shown = f"{word} {quantity(demanded, unit)}" if _is_number(demanded) else ""
            rows.append((label, quantity(figures[name], unit), shown))
    return rows


def merge_facts(merge: Mapping[str, Any]) -> list[tuple[str, str]]:
    targets = merge.get("targets") or []
    method, base = merge.get("method") or {}, merge.get("base_weights") or {}
    changes = [target.get("relative") for target in targets if _is_number(target.get("relative"))]
    verification = merge.get("verification") or {}
    facts = [
        ("base weights", f"{base.get('used')}: {base.get('reason')}" if base.get("used") else ""),
        ("method", f"{method.get('used')}: {method.get('reason')}" if method.get("used") else ""),
        ("matrices merged", f"{merge['merged']:,}" if _is_number(merge.get("merged")) else ""),
        ("relative change of a matrix", f"{number(min(changes), 4)} to {number(max(changes), 4)}" if changes else ""),
        ("type and size", f"{merge.get('dtype')}, {in_bytes(merge.get('bytes'))}" if merge.get("dtype") else ""),
        ("checked on", str(verification.get("rows") or "")),
    ]
    return [(name, value) for name, value in facts if value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
