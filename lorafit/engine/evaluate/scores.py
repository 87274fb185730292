"""Records -> scores of each row, samples and speeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lorafit.engine.evaluate.sets import EvalRows
from lorafit.evaluation.figures import AGREEMENT, BASE, ENDED, LENGTH, Array, Scores
from lorafit.evaluation.metrics.metric import Judged
from lorafit.evaluation.records import Records
from lorafit.evaluation.results import Answer, Sample, Speed
from lorafit.evaluation.statistics import Classes, Series


def score(rows: EvalRows, model: str, main: str | None, records: Records) -> dict[str, Scores]:
    """By metric, the scores of one model on the rows of a set.

    Args:
        main: the model whose answers those of others are compared with; None: none.
    """

    def read(kind: str) -> list[dict[str, Any]]:
        return list(records.read(rows.name, model, kind))

    found = _of_likelihood(rows, read("likelihood"))
    if divergence := read("divergence"):
        found["kl"] = Series(*_spread(rows, divergence, "kl", "tokens"), better="lower")
    if rows.options:
        found |= _of_options(rows, read("options"))
    if rows.asked:
        found |= _of_answers(rows, model, main, records)
    if judged := read("judge"):
        kept = [one | {"one": 1} for one in judged if one["score"] is not None]
        found["judge"] = Series(*_spread(rows, kept, "score", "one"), better="higher")
    return found


def _spread(rows: EvalRows, records: list[dict[str, Any]], numerator: str, denominator: str) -> tuple[Array, Array]:
    made = np.zeros((2, len(rows)))
    for record in records:
        made[:, record["row"]] = record[numerator], record[denominator]
    return made[0], made[1]


def _of_likelihood(rows: EvalRows, records: list[dict[str, Any]]) -> dict[str, Scores]:
    nll, tokens = _spread(rows, records, "nll", "tokens")
    hits, _ = _spread(rows, records, "hits", "tokens")
    return {
        "loss": Series(nll, tokens, better="lower"),
        "perplexity": Series(nll, tokens, transform="exp", better="lower"),
        "bits_per_byte": Series(nll / math.log(2), rows.sizes[:, 1], better="lower"),
        "token_accuracy": Series(hits, tokens, better="higher"),
    }


def _of_options(rows: EvalRows, records: Iterable[dict[str, Any]]) -> dict[str, Scores]:
    right, per_byte, asked = np.zeros((3, len(rows)))
    predicted, expected = np.full((2, len(rows)), -1)
    for record in records:
        row, logprobs = record["row"], record["logprobs"]
        of_row = rows.options[row]
        chosen = _chosen(logprobs)
        each = [value / max(len(option.encode()), 1) for value, option in zip(logprobs, of_row.options, strict=True)]
        predicted[row], expected[row] = chosen, of_row.expected
        if of_row.expected >= 0:
            asked[row] = 1
            right[row], per_byte[row] = chosen == of_row.expected, _chosen(each) == of_row.expected
    found: dict[str, Scores] = {
        "accuracy": Series(right, asked, better="higher"),
        "accuracy_per_byte": Series(per_byte, asked, better="higher"),
    }
    if isinstance(rows.spec.options, tuple):
        found["macro_f1"] = Classes(np.where(expected >= 0, predicted, -1), expected, len(rows.spec.options))
    return found


def _chosen(logprobs: list[float]) -> int:
    """The index of the most likely option; -1 if a model that overflows made one of them no number."""
    return -1 if any(map(math.isnan, logprobs)) else int(np.argmax(logprobs))


def _of_answers(rows: EvalRows, model: str, main: str | None, records: Records) -> dict[str, Scores]:
    of_main = records.by_row(rows.name, main, "answers") if main and model not in (main, BASE) else None
    metrics = [*(metric.info for metric in rows.scorers), ENDED, LENGTH, *([AGREEMENT] if of_main else [])]
    values = {metric.name: np.zeros((2, len(rows))) for metric in metrics}
    for record in records.read(rows.name, model, "answers"):
        row = record["row"]
        scores = answer_scores(rows, row, record["text"]) | {"ended": record["ended"], "length": record["tokens"]}
        if of_main and (other := of_main.get(row)) is not None:
            scores["agreement"] = other["text"] == record["text"]
        for name, value in scores.items():
            if value is not None:
                values[name][:, row] = value, 1
    return {
        metric.name: Series(values[metric.name][0], values[metric.name][1], better=metric.better) for metric in metrics
    }


def answer_scores(rows: EvalRows, row: int, text: str) -> dict[str, float | None]:
    """By metric, the score of one answer."""
    question = rows.question(row)
    judged = Judged(answer=text, expected=question.expected, prompt=question.shown, row=rows.raw.get(row, {}))
    return {metric.info.name: metric.score(judged) for metric in rows.scorers}


def samples_of(rows: EvalRows, models: list[str], records: Records) -> Iterator[Sample]:
    """A set's rows with what every model made of them, in order."""
    kinds = ("likelihood", "divergence", "options", "answers", "judge")
    kept = {(model, kind): records.by_row(rows.name, model, kind) for model in models for kind in kinds}
    for row in range(len(rows)):
        prompt, expected = rows.shown(row)
        answers = {model: _answer(rows, row, {kind: kept[model, kind].get(row) for kind in kinds}) for model in models}
        yield Sample(set=rows.name, row=row, place=rows.place(row), prompt=prompt, expected=expected, answers=answers)


def _answer(rows: EvalRows, row: int, found: dict[str, dict[str, Any] | None]) -> Answer:
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
        asked, number = rows.options[row], _chosen(one["logprobs"])
        chosen = asked.options[number] if number >= 0 else None
        if asked.expected >= 0:
            scores["accuracy"] = float(number == asked.expected)
    if one := found["answers"]:
        text, ended = one["text"], one["ended"]
        scores |= {name: value for name, value in answer_scores(rows, row, text).items() if value is not None}
        scores["length"] = one["tokens"]
    if (one := found["judge"]) and one["score"] is not None:
        scores["judge"] = one["score"]
    finite = {name: value for name, value in scores.items() if math.isfinite(value)}
    return Answer(text=text, ended=ended, chosen=chosen, scores=finite)


def speeds(rows: EvalRows, models: list[str], records: Records) -> list[Speed]:
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
