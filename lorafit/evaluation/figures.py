"""The figures of an evaluation: what is measured of a set, and scores as figures with paired bootstrap intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from lorafit.evaluation.results import Better, Difference, Figure, Metric

Array = np.ndarray[Any, Any]

BASE = "base"
"""The model before training, in figures."""
START = "start"
"""The adapter that a training started from."""
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
PREFERRED = Metric(name="preference_accuracy", label="chosen more likely than rejected", unit="share", better="higher")
MARGIN = Metric(name="preference_margin", label="margin of the chosen answer", unit="nats", better="higher")
CHOSEN = Metric(name="chosen_logp", label="log-likelihood of the chosen answer", unit="nats", better="higher")
REJECTED = Metric(name="rejected_logp", label="log-likelihood of the rejected answer", unit="nats", better=None)
REWARDED = Metric(name="reward_accuracy", label="margin larger than the base's", unit="share", better="higher")
ENDED = Metric(name="ended", label="ended by itself", unit="share", better="higher")
LENGTH = Metric(name="length", label="length of the answer", unit="tokens", better=None)
AGREEMENT = Metric(name="agreement", label="same answer", unit="share", better="higher")
JUDGE = Metric(name="judge", label="preferred by the judge", unit="share", better="higher")

LIKELIHOOD = (LOSS, PERPLEXITY, BITS, TOKENS_RIGHT)
OF_OPTIONS = (ACCURACY, ACCURACY_NORM, MACRO_F1)
OF_PAIRS = (PREFERRED, MARGIN, CHOSEN, REJECTED)
BESIDE_OTHERS = (KL, REWARDED, AGREEMENT, JUDGE)
"""Metrics that compare with another model."""
OWN = (*LIKELIHOOD, KL, *OF_OPTIONS, *OF_PAIRS, REWARDED, ENDED, LENGTH, AGREEMENT, JUDGE)
"""Metrics that are not of an answer's text alone."""


def set_metrics(
    role: str, answers: Iterable[Metric] | None, options: Any, compared: bool, judged: bool, pairs: bool, based: bool
) -> tuple[Metric, ...]:
    """The metrics that are measured of a set.

    Args:
        answers: metrics of generated answers; None: none is generated.
        options: of the set: a list that is the same for all rows, or their column's name.
        compared: whether there is a model to compare the result's answers with, besides the base.
        judged: whether a judge compares answers with the base's.
        pairs: whether rows have an answer that is chosen and one that is rejected.
        based: whether the base is among the models.
    """
    found = [*LIKELIHOOD]
    if role == "forgetting":
        found.append(KL)
    elif pairs:
        found += [*OF_PAIRS, *([REWARDED] if based else [])]
    if answers is None:
        return tuple(found)
    if options:
        found += [ACCURACY, ACCURACY_NORM, *([MACRO_F1] if not isinstance(options, str) else [])]
    return (*found, *answers, ENDED, LENGTH, *([AGREEMENT] if compared else []), *([JUDGE] if judged else []))


def own_models(has_adapter: bool, has_start: bool) -> dict[str, str]:
    """The kinds of a run's own models by name: base, result, and those of an adapter that there may be.

    Args:
        has_start: whether the training started from an adapter.
    """
    if not has_adapter:
        return {BASE: BASE, "trained": "trained"}
    return {BASE: BASE, "adapter": "adapter"} | ({START: "adapter"} if has_start else {}) | {"merged": "merged"}


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
            beside_base = metric in (JUDGE, REWARDED) and model == BASE
            not_its_own = (metric == AGREEMENT and model in (BASE, main)) or beside_base
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
    differences = []
    for (model, against), metric in itertools.product(pairs, metrics):
        a, b = (metric, model), (metric, against)
        if a in series and b in series:
            one = difference(name, metric, model, against, series[a], series[b], drawn[a], drawn[b])
            differences.append(one)
    return SetFigures(figures, differences, resamples)


def _length(scores: Scores) -> int:
    return len(scores.predicted) if isinstance(scores, Classes) else len(scores.numerator)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


RESAMPLES = 10_000
_CHUNK_CELLS = 4_000_000
"""Counts of a chunk of resamples, rows times resamples, that are held at once."""
_POWER = 1.959964 + 0.841621
"""Standard errors that an effect must have to be seen at 95% with a probability of 80%."""
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Series:
    """One metric of one model on the rows of one set: sum(numerator) / sum(denominator), then `transform`.

    Both are (rows,) float64, and 0 where a row has no such value.
    """

    numerator: Array
    denominator: Array
    transform: Literal["identity", "exp"] = "identity"
    better: Better = None


@dataclass(frozen=True)
class Classes:
    """Predicted and expected classes of the rows, for macro-F1: (rows,) integers below `count`, -1 for none."""

    predicted: Array
    expected: Array
    count: int
    better: Better = "higher"


Scores = Series | Classes


class Bootstrap:
    """Resamples of the rows of a set: the same ones for all that is asked of it, so that differences are paired."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def resampled(self, series: Mapping[K, Series | Classes]) -> dict[K, Array]:
        """(RESAMPLES,) values of each; nan where a resample has no row with a value.

        All are nan where fewer than two rows have one: resamples of a single row say nothing of how rows differ.
        """
        columns = {key: _sums(one) for key, one in series.items()}
        if not columns:
            return {}
        stacked = np.concatenate(list(columns.values()), axis=1)
        made = np.concatenate([counts @ stacked for counts in self._counts()])
        found, place = {}, 0
        for key, part in columns.items():
            values = _combined(series[key], made[:, place : place + part.shape[1]])
            found[key] = values if rows_with_value(series[key]) > 1 else np.full_like(values, np.nan)
            place += part.shape[1]
        return found

    def _counts(self) -> Iterator[Array]:
        """How often each row is in each resample: (some resamples, rows) at a time."""
        random = np.random.default_rng(self.seed)
        if not self.rows:
            yield np.zeros((RESAMPLES, 0))
            return
        step = max(min(_CHUNK_CELLS // self.rows, RESAMPLES), 1)
        for start in range(0, RESAMPLES, step):
            size = min(step, RESAMPLES - start)
            drawn = random.integers(self.rows, size=(size, self.rows))
            drawn += np.arange(size)[:, None] * self.rows
            yield np.bincount(drawn.ravel(), minlength=size * self.rows).reshape(size, self.rows).astype(np.float64)


def value_of(series: Series | Classes) -> float | None:
    """The value on the rows themselves; None where no row has one."""
    found = _combined(series, _sums(series).sum(axis=0, keepdims=True))[0]
    return None if math.isnan(found) else float(found)


def interval(values: Array) -> tuple[float | None, float | None]:
    """The ends of the 95% interval of resampled values, by percentiles; None where nothing is defined."""
    if not np.isfinite(values).any():
        return None, None
    low, high = np.nanpercentile(np.where(np.isinf(values), np.nan, values), [2.5, 97.5])
    return float(low), float(high)


def rows_with_value(series: Series | Classes) -> int:
    if isinstance(series, Classes):
        return int((series.expected >= 0).sum())
    return int((series.denominator > 0).sum())


def _sums(series: Series | Classes) -> Array:
    """(rows, columns): what is added up over rows."""
    if isinstance(series, Series):
        return np.stack([series.numerator, series.denominator], axis=1)
    classes = np.arange(series.count)
    predicted = series.predicted[:, None] == classes
    expected = series.expected[:, None] == classes
    return np.concatenate([predicted & expected, predicted, expected], axis=1).astype(np.float64)


def _combined(series: Series | Classes, sums: Array) -> Array:
    """(resamples,) values of (resamples, columns) sums."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if isinstance(series, Series):
            found = np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)
            return np.exp(found) if series.transform == "exp" else found
        both, predicted, expected = np.split(sums, 3, axis=1)
        occurs = (predicted + expected) > 0
        f1 = np.where(occurs, 2 * both / np.maximum(predicted + expected, 1e-12), 0.0)
        return np.where(occurs.any(axis=1), f1.sum(axis=1) / np.maximum(occurs.sum(axis=1), 1), np.nan)


def difference(
    set: str,
    metric: str,
    model: str,
    against: str,
    a: Series | Classes,
    b: Series | Classes,
    resampled_a: Array,
    resampled_b: Array,
) -> Difference:
    """`model` (a) minus `against` (b).

    `detectable` is 2.8 standard errors of the difference, as its resamples have it: what is seen with a probability of
    80% at a level of 95%. Where no resample differs from another, it is the smallest share of differing rows of which
    as many rows would have shown one with that probability: 1 - 0.2 ** (1 / rows).
    """
    one, other = value_of(a), value_of(b)
    value = None if one is None or other is None else one - other
    with np.errstate(invalid="ignore"):
        gap = resampled_a - resampled_b
    low, high = interval(gap)
    mine, its = _by_row(a), _by_row(b)
    both = ~(np.isnan(mine) | np.isnan(its))
    change = (mine - its)[both] * (-1 if a.better == "lower" else 1)
    finite = gap[np.isfinite(gap)]
    error = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    count = int(both.sum())
    rounding = 1e-12 * float(np.abs(resampled_a[np.isfinite(gap)]).max(initial=0))
    detectable = _POWER * error if error > rounding else (1 - 0.2 ** (1 / count) if count else None)
    return Difference(
        set=set,
        metric=metric,
        model=model,
        against=against,
        value=_finite(value),
        low=low,
        high=high,
        wins=int((change > 0).sum()),
        ties=int((change == 0).sum()),
        losses=int((change < 0).sum()),
        detectable=detectable,
    )


def _by_row(series: Series | Classes) -> Array:
    """(rows,) values, nan where a row has none; of classes, whether the row is right."""
    if isinstance(series, Classes):
        return np.where(series.expected >= 0, series.predicted == series.expected, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(series.denominator > 0, series.numerator / series.denominator, np.nan)
