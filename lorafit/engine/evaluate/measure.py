"""Running the models on the sets, into records: likelihoods, options, answers, and what a judge says of these."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from lorafit.engine.data.render import special_tokens
from lorafit.engine.evaluate.greedy import end_tokens, generate
from lorafit.engine.evaluate.likelihood import RowLikelihood, choices, divergences, likelihoods
from lorafit.engine.evaluate.models import Loaded, NamedModel
from lorafit.engine.evaluate.sets import EvalRows, Prompts, option_rows, raw_rows, said
from lorafit.evaluation.figures import BASE, set_metrics
from lorafit.evaluation.metrics.known import MetricSpec, default_metrics, make_metrics, metric_info
from lorafit.evaluation.records import Records
from lorafit.evaluation.results import Metric
from lorafit.judge import Pair, Verdict, compare, position_bias
from lorafit.plan import Plan
from lorafit.progress import each
from lorafit.recipe.schema import EvalSection, JudgeSection

Done = frozenset[int]
"""Rows whose records are there."""


def metrics_of(rows: EvalRows, section: EvalSection, compared: bool, judged: bool) -> tuple[Metric, ...]:
    """What is measured of a set, without a word of the user's own code. See `set_metrics`. Raises UsageError."""
    answers = map(metric_info, _specs(rows, section)) if rows.asked else None
    return set_metrics(rows.spec.role, answers, rows.spec.options, compared, judged)


def _specs(rows: EvalRows, section: EvalSection) -> tuple[MetricSpec, ...]:
    asked = rows.spec.metrics or section.metrics
    return tuple(asked or default_metrics(rows.question(row).expected for row in rows.asked))


def with_metrics(rows: EvalRows, section: EvalSection, plan: Plan, main: str | None, names: list[str]) -> EvalRows:
    """A set with its options and metrics, for the models of these names.

    Raises DataError for options that are none, UsageError for a metric that there is none of.
    """
    options = {one.row: one for one in option_rows(rows, plan)} if rows.spec.options else {}
    specs = _specs(rows, section) if rows.asked else ()
    own = any(isinstance(spec, str) and ":" in spec for spec in specs)
    compared = main is not None and bool(set(names) - {BASE, main})
    return dataclasses.replace(
        rows,
        options=options,
        metrics=metrics_of(rows, section, compared, section.judge is not None and BASE in names),
        scorers=make_metrics(specs),
        raw={index: row.fields for index, row, _ in raw_rows(rows)} if own else {},
    )


def measure(loaded: Loaded, model: NamedModel, rows: EvalRows, max_new_tokens: int, records: Records) -> None:
    """Everything about one model on one set that is not in the records yet."""
    running = loaded.use_model(model)
    name, pad = (rows.name, model.name), rows.tokenizer.pad_token_id

    def keep(kind: str, total: int, made: Callable[[Done], Iterable[dict[str, Any]]]) -> None:
        done = records.done(*name, kind)
        if len(done) < total:
            making = made(done)
            with records.writer(*name, kind) as add:
                for one in each(making, f"{kind} of {model.name} on {rows.name}", total - len(done)):
                    add(one)

    def divergence(done: Done) -> Iterator[dict[str, Any]]:
        with records.writer(*name, "likelihood", timed=False) as add:
            for one in divergences(loaded.base, running, rows.rows, pad, done):
                add(_likelihood(one))
                yield {"row": one.row, "kl": one.kl, "tokens": one.tokens}

    with torch.inference_mode():
        if rows.spec.role == "forgetting" and model.kind == "adapter":
            keep("divergence", len(rows), divergence)
        else:
            keep("likelihood", len(rows), lambda done: map(_likelihood, likelihoods(running, rows.rows, pad, done)))
        keep("options", len(rows.options), lambda done: _options(running, rows, pad, done))
        keep("answers", len(rows.asked), lambda done: _answers(running, rows, max_new_tokens, done))


def _likelihood(one: RowLikelihood) -> dict[str, Any]:
    return {"row": one.row, "nll": one.nll, "tokens": one.tokens, "hits": one.hits}


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
