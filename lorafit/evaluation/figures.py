"""Records -> scores of each row -> figures with intervals, differences, samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lorafit.evaluation.metrics import AnswerMetric, Judged
from lorafit.evaluation.records import Records
from lorafit.evaluation.results import Answer, Difference, Figure, Metric, Sample, Speed
from lorafit.evaluation.results import Set as SetInfo
from lorafit.evaluation.statistics import Bootstrap, Classes, Series, difference, rows_with_value

Array = np.ndarray[Any, Any]
Scores = Series | Classes

BASE = "base"
"""The model before training, in figures."""
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
    """What is measured of a set.

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
class Question:
    """What the metrics of an answer look at."""

    prompt: str
    expected: str
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """A set, as far as its scores need it; see lorafit.engine.evaluate.sets.

    Attributes:
        sizes: (rows, 2), learned tokens and the bytes of their text.
        questions: by row, of the rows that are answered.
        options: by row: the options, their bytes, and the index of the right one (-1: none).
        fixed: the options of the whole set, if they are the same for all rows.
        against: the model that others are compared with for `agreement`; None: none.
    """

    name: str
    info: SetInfo
    count: int
    sizes: Array
    questions: Mapping[int, Question]
    options: Mapping[int, tuple[tuple[str, ...], int]]
    fixed: tuple[str, ...] | None
    answer_metrics: tuple[AnswerMetric, ...]
    main: str | None
    place: Callable[[int], str]
    shown: Callable[[int], tuple[str, str]]

    @property
    def scored_info(self) -> SetInfo:
        """The set after scoring, when it is known which metrics of the user's own are shares."""
        shares = {metric.info.name for metric in self.answer_metrics if metric.says_yes_or_no()}
        metrics = (m.model_copy(update={"unit": "share"}) if m.name in shares else m for m in self.info.metrics)
        return self.info.model_copy(update={"metrics": tuple(metrics)})


def score(rows: Rows, model: str, records: Records) -> dict[str, Scores]:
    """By metric, the scores of one model on the rows of a set."""
    found: dict[str, Scores] = {}
    found |= _of_likelihood(rows, list(records.read(rows.name, model, "likelihood")))
    divergence = list(records.read(rows.name, model, "divergence"))
    if divergence:
        found["kl"] = Series(*_spread(rows.count, divergence, "kl", "tokens"), better="lower")
    if rows.options:
        found |= _of_options(rows, records.read(rows.name, model, "options"))
    if rows.questions:
        found |= _of_answers(rows, model, records)
    judged = list(records.read(rows.name, model, "judge"))
    if judged:
        kept = [one | {"one": 1} for one in judged if one["score"] is not None]
        found["judge"] = Series(*_spread(rows.count, kept, "score", "one"), better="higher")
    return found


def _spread(count: int, records: list[dict[str, Any]], numerator: str, denominator: str) -> tuple[Array, Array]:
    made = np.zeros((2, count))
    for record in records:
        made[:, record["row"]] = record[numerator], record[denominator]
    return made[0], made[1]


def _of_likelihood(rows: Rows, records: list[dict[str, Any]]) -> dict[str, Scores]:
    nll, tokens = _spread(rows.count, records, "nll", "tokens")
    hits, _ = _spread(rows.count, records, "hits", "tokens")
    return {
        "loss": Series(nll, tokens, better="lower"),
        "perplexity": Series(nll, tokens, transform="exp", better="lower"),
        "bits_per_byte": Series(nll / math.log(2), rows.sizes[:, 1], better="lower"),
        "token_accuracy": Series(hits, tokens, better="higher"),
    }


def _of_options(rows: Rows, records: Iterator[dict[str, Any]]) -> dict[str, Scores]:
    right, per_byte, asked = np.zeros(rows.count), np.zeros(rows.count), np.zeros(rows.count)
    predicted, expected = np.full(rows.count, -1), np.full(rows.count, -1)
    for record in records:
        row, logprobs = record["row"], record["logprobs"]
        options, answer = rows.options[row]
        chosen = _chosen(logprobs)
        each = [value / max(len(option.encode()), 1) for value, option in zip(logprobs, options, strict=True)]
        predicted[row], expected[row] = chosen, answer
        if answer >= 0:
            asked[row] = 1
            right[row], per_byte[row] = chosen == answer, _chosen(each) == answer
    found: dict[str, Scores] = {
        "accuracy": Series(right, asked, better="higher"),
        "accuracy_per_byte": Series(per_byte, asked, better="higher"),
    }
    if rows.fixed:
        known = expected >= 0
        found["macro_f1"] = Classes(np.where(known, predicted, -1), expected, len(rows.fixed))
    return found


def _chosen(logprobs: list[float]) -> int:
    """The index of the most likely option; -1 if a model that overflows made one of them no number."""
    return -1 if any(map(math.isnan, logprobs)) else int(np.argmax(logprobs))


def _of_answers(rows: Rows, model: str, records: Records) -> dict[str, Scores]:
    of_main = (
        records.by_row(rows.name, rows.main, "answers") if rows.main and model not in (rows.main, "base") else None
    )
    names = [metric.info.name for metric in rows.answer_metrics]
    values = {name: np.zeros((2, rows.count)) for name in (*names, "ended", "length", "agreement")}

    def put(name: str, row: int, value: float | None) -> None:
        if value is not None:
            values[name][:, row] = value, 1

    for record in records.read(rows.name, model, "answers"):
        row = record["row"]
        for name, value in answer_scores(rows, row, record["text"]).items():
            put(name, row, value)
        put("ended", row, record["ended"])
        put("length", row, record["tokens"])
        other = of_main.get(row) if of_main else None
        if other is not None:
            put("agreement", row, other["text"] == record["text"])
    better = {metric.info.name: metric.info.better for metric in (*rows.answer_metrics,)} | {
        metric.name: metric.better for metric in (ENDED, LENGTH, AGREEMENT)
    }
    found: dict[str, Scores] = {
        name: Series(made[0], made[1], better=better[name])
        for name, made in values.items()
        if name != "agreement" or of_main
    }
    return found


def answer_scores(rows: Rows, row: int, text: str) -> dict[str, float | None]:
    """By metric, the score of one answer."""
    question = rows.questions[row]
    judged = Judged(answer=text, expected=question.expected, prompt=question.prompt, row=question.raw)
    return {metric.info.name: metric.score(judged) for metric in rows.answer_metrics}


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
    drawn = bootstrap.resample_all(series)
    figures, resamples = {}, {}
    for (metric, model), value in series.items():
        key = f"{name}.{metric}.{model}"
        low, high = bootstrap.interval(drawn[metric, model])
        figures[key] = Figure(value=_finite(bootstrap.value(value)), low=low, high=high, rows=rows_with_value(value))
        resamples[key] = drawn[metric, model]
    pairs = [
        (model, against)
        for index, model in enumerate(scores)
        for against in dict.fromkeys((next(iter(scores)), main))
        if against in scores and model != against and index and model != next(iter(scores))
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


def samples_of(rows: Rows, models: list[str], records: Records) -> Iterator[Sample]:
    """A set's rows with what every model made of them, in order."""
    kinds = ("likelihood", "divergence", "options", "answers", "judge")
    kept = {(model, kind): records.by_row(rows.name, model, kind) for model in models for kind in kinds}
    for row in range(rows.count):
        prompt, expected = rows.shown(row)
        answers = {model: _answer(rows, row, {kind: kept[model, kind].get(row) for kind in kinds}) for model in models}
        yield Sample(set=rows.name, row=row, place=rows.place(row), prompt=prompt, expected=expected, answers=answers)


def _answer(rows: Rows, row: int, found: dict[str, dict[str, Any] | None]) -> Answer:
    scores: dict[str, float] = {}
    text = ended = chosen = None
    if one := found["likelihood"]:
        if one["tokens"]:
            scores |= {"loss": one["nll"] / one["tokens"], "token_accuracy": one["hits"] / one["tokens"]}
        if rows.sizes[row, 1]:
            scores["bits_per_byte"] = one["nll"] / math.log(2) / float(rows.sizes[row, 1])
    if (one := found["divergence"]) and one["tokens"]:
        scores["kl"] = one["kl"] / one["tokens"]
    if one := found["options"]:
        options, answer = rows.options[row]
        number = _chosen(one["logprobs"])
        chosen = options[number] if number >= 0 else None
        if answer >= 0:
            scores["accuracy"] = float(number == answer)
    if one := found["answers"]:
        text, ended = one["text"], one["ended"]
        scores |= {name: value for name, value in answer_scores(rows, row, text).items() if value is not None}
        scores["length"] = one["tokens"]
    if (one := found["judge"]) and one["score"] is not None:
        scores["judge"] = one["score"]
    finite = {name: value for name, value in scores.items() if math.isfinite(value)}
    return Answer(text=text, ended=ended, chosen=chosen, scores=finite)


def speeds(rows: Rows, models: list[str], records: Records) -> list[Speed]:
    """How fast each model answered a set's questions; left out where a kill took the time of some of them along."""
    found = []
    for model in models:
        made = list(records.read(rows.name, model, "answers"))
        spent = records.seconds(model, rows.name, "answers")
        if made and spent > 0 and records.timed(rows.name, model, "answers") == len(made):
            latency = np.array([record["seconds"] for record in made])
            found.append(
                Speed(
                    model=model,
                    set=rows.name,
                    tokens_per_second=sum(record["tokens"] for record in made) / spent,
                    latency_median=float(np.median(latency)),
                    latency_p95=float(np.quantile(latency, 0.95)),
                )
            )
    return found
