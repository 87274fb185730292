"""The figures of an evaluation: what is measured of a set, and scores as figures with intervals and differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorafit.evaluation.results import Difference, Figure, Metric
from lorafit.evaluation.statistics import Bootstrap, Classes, Series, difference, interval, rows_with_value, value_of

Array = np.ndarray[Any, Any]
Scores = Series | Classes

BASE = "base"
"""The model before training, in figures."""
HELD_OUT = "heldout"
"""The set of the rows that a run keeps out of training."""
LOSS = Metric(name="loss", label="loss", unit="nats", better="lower")
PERPLEXITY = Metric(name="perplexity", label="perplexity", unit="number", better="lower")
BITS = Metric(name="bits_per_byte", label="bits per byte", unit="bits", better="lower")
TOKENS_RIGHT = Metric(name="token_accuracy", label="token accuracy", unit="share", better="higher")
KL = Metric(name="kl", label="KL from the base", unit="nats", better="lower")
ACCURACY = Metric(name="accuracy", label="accuracy", unit="share", better="higher")
ACCURACY_NORM = Metric(
    name="accuracy_per_byte", label="accuracy, by likelihood per byte", unit="share", better="higher"
)
MACRO_F1 = Metric(name="macro_f1", label="macro-F1", unit="share", better="higher")
ENDED = Metric(name="ended", label="ended by itself", unit="share", better="higher")
LENGTH = Metric(name="length", label="length of the answer", unit="tokens", better=None)
AGREEMENT = Metric(name="agreement", label="same answer", unit="share", better="higher")
JUDGE = Metric(name="judge", label="preferred by the judge", unit="share", better="higher")

LIKELIHOOD = (LOSS, PERPLEXITY, BITS, TOKENS_RIGHT)
OWN = (*LIKELIHOOD, KL, ACCURACY, ACCURACY_NORM, MACRO_F1, ENDED, LENGTH, AGREEMENT, JUDGE)
"""Metrics that are not of an answer's text alone."""


def set_metrics(
    role: str, answers: Iterable[Metric] | None, options: Any, compared: bool, judged: bool
) -> tuple[Metric, ...]:
    """The metrics that are measured of a set.

    Args:
        answers: metrics of generated answers; None: none is generated.
        options: of the set: a list that is the same for all rows, or their column's name.
        compared: whether there is a model to compare the result's answers with, besides the base.
        judged: whether a judge compares answers with the base's.
    """
    found = [*LIKELIHOOD]
    if role == "forgetting":
        found.append(KL)
    if answers is None:
        return tuple(found)
    if options:
        found += [ACCURACY, ACCURACY_NORM, *([MACRO_F1] if not isinstance(options, str) else [])]
    return (*found, *answers, ENDED, LENGTH, *([AGREEMENT] if compared else []), *([JUDGE] if judged else []))


def own_models(has_adapter: bool) -> dict[str, str]:
    """The kinds of a run's own models by name: the base, the result, and the merged model if there may be one."""
    names = (BASE, "adapter", "merged") if has_adapter else (BASE, "trained")
    return {name: name for name in names}


def expected_figures(
    sets: Mapping[str, Iterable[Metric]], models: Mapping[str, str], main: str | None
) -> Iterator[str]:
    """The names of all figures that there will be.

    Args:
        sets: what is measured of each.
        models: their kinds, by name.
        main: the model that is the run's result.
    """
    for (name, metrics), (model, kind) in itertools.product(sets.items(), models.items()):
        for metric in metrics:
            not_its_own = (metric == AGREEMENT and model in (BASE, main)) or (metric == JUDGE and model == BASE)
            if not (not_its_own or (metric == KL and kind != "adapter")):
                yield f"{name}.{metric.name}.{model}"


@dataclass(frozen=True)
class SetFigures:
    """The figures of a set, and what their intervals are made from."""

    figures: dict[str, Figure]
    differences: list[Difference]
    resamples: dict[str, Array]


def figures_of(name: str, scores: dict[str, dict[str, Scores]], seed: int, main: str | None) -> SetFigures:
    """Figures and differences of a set.

    Args:
        scores: by model and metric, models in order.
        main: what other models than the base are compared with besides the base.
    """
    series = {(metric, model): value for model, of in scores.items() for metric, value in of.items()}
    if not series:
        return SetFigures({}, [], {})
    bootstrap = Bootstrap(_length(next(iter(series.values()))), seed)
    drawn = bootstrap.resampled(series)
    figures, resamples = {}, {}
    for (metric, model), value in series.items():
        key = f"{name}.{metric}.{model}"
        low, high = interval(drawn[metric, model])
        figures[key] = Figure(value=_finite(value_of(value)), low=low, high=high, rows=rows_with_value(value))
        resamples[key] = drawn[metric, model]
    first, *others = scores
    pairs = [
        (model, against)
        for model in others
        for against in dict.fromkeys((first, main))
        if against in scores and model != against
    ]
    metrics = dict.fromkeys(metric for metric, _ in series)
    differences = [
        difference(
            name,
            metric,
            model,
            against,
            series[metric, model],
            series[metric, against],
            drawn[metric, model],
            drawn[metric, against],
        )
        for model, against in pairs
        for metric in metrics
        if (metric, model) in series and (metric, against) in series
    ]
    return SetFigures(figures, differences, resamples)


def _length(scores: Scores) -> int:
    return len(scores.predicted) if isinstance(scores, Classes) else len(scores.numerator)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
