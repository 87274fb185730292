"""Benchmarks and the judge, as an evaluation uses them: off unless the recipe has their sections."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lorafit.evaluate.assemble import Rows, Scores
from lorafit.evaluate.contenders import BASE, Contender, Loaded
from lorafit.evaluate.records import Records
from lorafit.evaluate.results import Metric
from lorafit.evaluate.results import Set as SetInfo
from lorafit.evaluate.statistics import Series

Benchmarked: TypeAlias = dict[str, list[dict[str, Any]]]
"""By model, what each task gave, as JSON-able values."""


def check_benchmarks(section: dict[str, Any]) -> None:
    """Before a model is loaded. Raises UsageError, DataError."""
    if section["lm_eval"]:
        from lorafit.evaluate.benchmarks import check

        check(_asked(section))


def _asked(section: dict[str, Any]) -> Any:
    from lorafit.evaluate.benchmarks import Benchmarks

    values = section["lm_eval"] | {"tasks": tuple(section["lm_eval"]["tasks"]), "seed": section["seed"]}
    return Benchmarks(**values)


def run_benchmarks(
    loaded: Loaded,
    contender: Contender,
    tokenizer: PreTrainedTokenizerBase,
    section: dict[str, Any],
    records: Records,
    console: Console,
) -> Benchmarked:
    """The benchmarks on one model, unless the records have them."""
    if not section["lm_eval"]:
        return {}
    found = records.whole("benchmarks", contender.name)
    if found is None:
        from lorafit.evaluate.benchmarks import run

        model = loaded.use(contender.name if contender.kind == "adapter" else BASE)
        found = [_plain(task) for task in run(_asked(section), model, tokenizer, console)]
        records.write(found, "benchmarks", contender.name)
    return {contender.name: found}


def _plain(task: Any) -> dict[str, Any]:
    values = dataclasses.asdict(dataclasses.replace(task, infos=()))
    return values | {"infos": [info.model_dump() for info in task.infos]}


def benchmark_scores(
    found: Benchmarked, names: list[str]
) -> tuple[dict[str, dict[str, dict[str, Scores]]], dict[str, SetInfo]]:
    """Each task as a set: its scores by model and metric, and what it is."""
    scores: dict[str, dict[str, dict[str, Scores]]] = {}
    infos: dict[str, SetInfo] = {}
    for model in names:
        for task in found.get(model, []):
            metrics = tuple(Metric(**info) for info in task["infos"])
            better = {metric.name: metric.better for metric in metrics}
            infos[task["task"]] = SetInfo(
                role="benchmark",
                source=f"lm-evaluation-harness: {task['task']}",
                rows=task["rows"],
                answered=0,
                metrics=metrics,
            )
            of_model = scores.setdefault(task["task"], {}).setdefault(model, {})
            for name, values in task["metrics"].items():
                made = np.zeros((2, task["rows"]))
                for index, numerator, denominator in values:
                    made[:, index] = numerator, denominator
                of_model[name] = Series(made[0], made[1], better=better[name])
    return scores, infos


def judge_answers(
    section: dict[str, Any], sets: list[Rows], names: list[str], records: Records, console: Console
) -> None:
    """Each model's answers against the base's, by the judge. Raises UsageError, DataError."""
    from lorafit.evaluate.judge import Judge, Pair, compare

    asked = Judge(**section)
    for rows, name in itertools.product(sets, names):
        if name == BASE or BASE not in names or not rows.questions:
            continue
        mine, its = records.by_row(rows.name, name, "answers"), records.by_row(rows.name, BASE, "answers")

        def pair(row: int, rows: Rows = rows, mine: Any = mine, its: Any = its) -> Pair:
            question = rows.questions[row]
            return Pair(row, question.prompt, question.expected, mine.get(row)["text"], its.get(row)["text"])

        done = records.done(rows.name, name, "judge")
        chosen = list(itertools.islice(rows.questions, asked.rows))
        with records.writer(rows.name, name, "judge") as add:
            for verdict in compare(asked, map(pair, chosen), done):
                add({"row": verdict.row, "score": verdict.score, "raw": verdict.raw})
