"""Running the models on the sets, into records; and the scores, samples and speeds that come of these."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from lorafit.engine.data.render import special_tokens
from lorafit.engine.evaluate.batches import end_tokens, generate
from lorafit.engine.evaluate.likelihood import RowLikelihood, choices, divergences, likelihoods
from lorafit.engine.evaluate.models import LoadedModel
from lorafit.engine.evaluate.sets import EvalRows, Prompts, option_rows, raw_rows, rejected_rows, said
from lorafit.evaluation.answers import Judged
from lorafit.evaluation.figures import (
    ACCURACY,
    AGREEMENT,
    BASE,
    BITS,
    ENDED,
    JUDGE,
    KL,
    LENGTH,
    LOSS,
    MARGIN,
    TOKENS_RIGHT,
    Array,
    Classes,
    Scores,
    Series,
    set_metrics,
)
from lorafit.evaluation.metrics import MetricSpec, default_metrics, make_metrics, metric_info
from lorafit.evaluation.results import Answer, Better, Metric, Records, Sample, Speed
from lorafit.judge import Pair, Verdict, compare, position_bias
from lorafit.plan import Plan
from lorafit.progress import each
from lorafit.recipe.schema import EvalSection, JudgeSection

Done = frozenset[int]
"""Rows whose records are there."""


def metrics_of(rows: EvalRows, section: EvalSection, compared: bool, judged: bool, based: bool) -> tuple[Metric, ...]:
    """The metrics that are measured of a set; the user's own code is not run. See `set_metrics`. Raises UsageError."""
    answers = map(metric_info, _specs(rows, section)) if rows.asked else None
    return set_metrics(rows.spec.role, answers, rows.spec.options, compared, judged, bool(rows.rejected), based)


def _specs(rows: EvalRows, section: EvalSection) -> tuple[MetricSpec, ...]:
    asked = rows.spec.metrics or section.metrics
    return tuple(asked or default_metrics(rows.question(row).expected for row in rows.asked))


def with_metrics(
    rows: EvalRows, section: EvalSection, plan: Plan, main: str | None, names: list[str], remarks: list[str]
) -> EvalRows:
    """A set with its options, its rejected answers and its metrics, for the models of these names.

    Raises DataError for options that are none, UsageError for a metric that there is none of.
    """
    options = {one.row: one for one in option_rows(rows, plan)} if rows.spec.options else {}
    rows = dataclasses.replace(rows, rejected=rejected_rows(rows, plan, remarks))
    specs = _specs(rows, section) if rows.asked else ()
    own = any(isinstance(spec, str) and ":" in spec for spec in specs)
    compared = main is not None and bool(set(names) - {BASE, main})
    return dataclasses.replace(
        rows,
        options=options,
        metrics=metrics_of(rows, section, compared, section.judge is not None and BASE in names, BASE in names),
        scorers=make_metrics(specs),
        raw={index: row.fields for index, row, _ in raw_rows(rows, rows.asked)} if own else {},
    )


def measure(
    running: LoadedModel,
    model: str,
    rows: EvalRows,
    max_new_tokens: int,
    records: Records,
    base: Callable[[], AbstractContextManager[None]] | None = None,
    only: Collection[str] = ("likelihood", "rejected", "options", "answers"),
) -> None:
    """Everything about one model on one set that is not in the records yet.

    Args:
        model: its name in the records.
        base: within it, `running` is the base, with which it is compared on texts that it might forget; None: is not.
        only: the kinds of records that are wanted.
    """
    name, pad = (rows.name, model), rows.tokenizer.pad_token_id

    def keep(kind: str, total: int, made: Callable[[Done], Iterable[dict[str, Any]]]) -> None:
        done = records.done(*name, kind)
        if len(done) < total:
            making = made(done)
            with records.writer(*name, kind) as add:
                for one in each(making, f"{kind} of {model} on {rows.name}", total - len(done)):
                    add(one)

    def divergence(done: Done) -> Iterator[dict[str, Any]]:
        assert base is not None
        with records.writer(*name, "likelihood", timed=False) as add:
            for one in divergences(base, running, rows.rows, pad, done):
                add(_likelihood(one))
                yield {"row": one.row, "kl": one.kl, "tokens": one.tokens}

    if "likelihood" in only:
        if rows.spec.role == "forgetting" and base is not None:
            keep("divergence", len(rows), divergence)
        else:
            keep("likelihood", len(rows), lambda done: map(_likelihood, likelihoods(running, rows.rows, pad, done)))
    if "rejected" in only:
        keep("rejected", len(rows.rejected), lambda done: _rejected(running, rows, pad, done))
    if "options" in only:
        keep("options", len(rows.options), lambda done: _options(running, rows, pad, done))
    if "answers" in only:
        keep("answers", len(rows.asked), lambda done: _answers(running, rows, max_new_tokens, done))


def _likelihood(one: RowLikelihood) -> dict[str, Any]:
    return {"row": one.row, "nll": one.nll, "tokens": one.tokens, "hits": one.hits}


def _rejected(model: Any, rows: EvalRows, pad: int, done: Done) -> Iterator[dict[str, Any]]:
    left = [row for row in rows.rejected if row not in done]
    tokens = [
        {"input_ids": list(one.input_ids), "labels": list(one.labels)} for one in map(rows.rejected.get, left) if one
    ]
    for made in likelihoods(model, tokens, pad):
        yield _likelihood(made) | {"row": left[made.row]}


def _options(model: Any, rows: EvalRows, pad: int, done: Done) -> Iterator[dict[str, Any]]:
    left = [one for row, one in rows.options.items() if row not in done]
    for made in choices(model, [one.choice for one in left], pad):
        yield {"row": left[made.row].row, "logprobs": made.logprobs}


def _answers(model: Any, rows: EvalRows, max_new_tokens: int, done: Done) -> Iterator[dict[str, Any]]:
    special = set(special_tokens(rows.tokenizer).values())
    lengths, ends = [], set()
    for question in map(rows.question, rows.asked):
        lengths.append(question.length)
        ends |= {question.end} & special
    made = generate(
        model,
        Prompts(rows),
        end_tokens(model, rows.tokenizer, ends),
        rows.tokenizer.pad_token_id,
        max_new_tokens,
        {number for number, row in enumerate(rows.asked) if row in done},
        lengths,
    )
    return (
        {
            "row": (row := rows.asked[one.row]),
            "text": said(one.ids, rows.question(row).prompt, rows.tokenizer),
            "tokens": len(one.ids) + one.ended,
            "ended": one.ended,
            "seconds": one.seconds,
        }
        for one in made
    )


def judge_answers(asked: JudgeSection, sets: Iterable[EvalRows], names: list[str], records: Records) -> None:
    """Each model's answers against the base's, by the judge. Raises UsageError, ModelError."""
    for rows, name in itertools.product(sets, names if BASE in names else ()):
        if name == BASE or not rows.asked:
            continue
        mine, its = (records.by_row(rows.name, model, "answers") for model in (name, BASE))

        def pair(row: int, rows: EvalRows = rows, mine: Any = mine, its: Any = its) -> Pair:
            question = rows.question(row)
            return Pair(row, question.shown, question.expected, mine.get(row)["text"], its.get(row)["text"])

        done = records.done(rows.name, name, "judge")
        chosen = rows.asked[: asked.rows]
        with records.writer(rows.name, name, "judge") as add:
            made = compare(asked, map(pair, chosen), done)
            for verdict in each(made, f"judging {name} on {rows.name}", len(chosen) - len(done)):
                add({"row": verdict.row, "score": verdict.score, "raw": verdict.raw})


def judge_remarks(sets: Iterable[EvalRows], names: list[str], records: Records) -> Iterator[str]:
    """How often the judge changed its mind with the order of the answers, or gave no vote."""
    for rows, name in itertools.product(sets, names):
        kept = [
            Verdict(one["row"], one["score"], (one["raw"][0], one["raw"][1]))
            for one in records.read(rows.name, name, "judge")
        ]
        if kept:
            yield (
                f"{rows.name}: the judge preferred the same place in both orders for {position_bias(kept) or 0:.0%} of "
                f"the answers of {name}, and gave no vote on {sum(one.score is None for one in kept)} of {len(kept)}"
            )


def score(rows: EvalRows, model: str, main: str | None, records: Records) -> dict[str, Scores]:
    """Scores by metric, of one model on the rows of a set.

    Args:
        main: the model whose answers those of others are compared with; None: none.
    """

    def read(kind: str) -> list[dict[str, Any]]:
        return list(records.read(rows.name, model, kind))

    found = _of_likelihood(rows, read("likelihood"))
    if rows.rejected:
        found |= _of_pairs(rows, model, records)
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


def _of_pairs(rows: EvalRows, model: str, records: Records) -> dict[str, Scores]:
    """What a model makes of the chosen answer beside the rejected one, both summed over their tokens."""
    mine, its = _margins(rows, model, records), _margins(rows, BASE, records)
    counted = np.isfinite(mine[0])
    each = dict(zip(("chosen_logp", "rejected_logp", "preference_margin"), np.where(counted, mine, 0.0), strict=True))
    each["preference_accuracy"] = np.where(counted, mine[2] > 0, 0.0)
    better: dict[str, Better] = {"rejected_logp": None}
    found: dict[str, Scores] = {
        name: Series(values, counted.astype(float), better=better.get(name, "higher")) for name, values in each.items()
    }
    if model != BASE and np.isfinite(its[0]).any():
        both = counted & np.isfinite(its[0])
        found["reward_accuracy"] = Series(np.where(both, mine[2] > its[2], 0.0), both.astype(float), better="higher")
    return found


def _margins(rows: EvalRows, model: str, records: Records) -> Array:
    """(3, rows): log-likelihoods of the chosen and of the rejected answer, and their difference; nan without a pair."""
    found = np.full((3, len(rows)), np.nan)
    for place, kind in enumerate(("likelihood", "rejected")):
        for record in records.read(rows.name, model, kind):
            if record["row"] in rows.rejected:
                found[place, record["row"]] = -record["nll"]
    found[2] = found[0] - found[1]
    found[:, np.isnan(found[2])] = np.nan
    return found


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
        row, text, question = record["row"], record["text"], rows.question(record["row"])
        judged = Judged(answer=text, expected=question.expected, prompt=question.shown, row=rows.raw.get(row, {}))
        scores = {metric.info.name: metric.score(judged) for metric in rows.scorers}
        scores |= {"ended": record["ended"], "length": record["tokens"]}
        if of_main and (other := of_main.get(row)) is not None:
            scores["agreement"] = other["text"] == text
        for name, value in scores.items():
            if value is not None:
                values[name][:, row] = value, 1
    return {
        metric.name: Series(values[metric.name][0], values[metric.name][1], better=metric.better) for metric in metrics
    }


def finite(scores: Mapping[str, float | None]) -> dict[str, float]:
    """The scores of a row that there are."""
    return {name: value for name, value in scores.items() if value is not None and math.isfinite(value)}


def samples_of(rows: EvalRows, scores: Mapping[str, Mapping[str, Scores]], records: Records) -> Iterator[Sample]:
    """A set's rows with what every model made of them, in order. `scores` are those of `score`, by model."""
    kept = {
        (model, kind): records.by_row(rows.name, model, kind) for model in scores for kind in ("options", "answers")
    }
    own = (metric.info for metric in rows.scorers)
    shown = [metric.name for metric in (LOSS, TOKENS_RIGHT, BITS, KL, ACCURACY, MARGIN, *own, LENGTH, JUDGE)]

    def answer(model: str, row: int) -> Answer:
        text = ended = chosen = None
        if one := kept[model, "options"].get(row):
            number = _chosen(one["logprobs"])
            chosen = rows.options[row].options[number] if number >= 0 else None
        if one := kept[model, "answers"].get(row):
            text, ended = one["text"], one["ended"]
        series = {name: made for name in shown if isinstance(made := scores[model].get(name), Series)}
        values = {n: float(s.numerator[row] / s.denominator[row]) for n, s in series.items() if s.denominator[row]}
        return Answer(text=text, ended=ended, chosen=chosen, scores=finite(values))

    for row in range(len(rows)):
        prompt, expected = rows.shown(row)
        answers = {model: answer(model, row) for model in scores}
        yield Sample(set=rows.name, row=row, place=rows.place(row), prompt=prompt, expected=expected, answers=answers)


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
