"""Benchmarks and the judge, as an evaluation uses them: off unless the recipe has their sections."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorafit.engine.evaluate.models import Contender, Loaded
from lorafit.engine.evaluate.sets import HELD_OUT
from lorafit.errors import UsageError
from lorafit.evaluation.figures import BASE, Rows, Scores
from lorafit.evaluation.records import Records
from lorafit.evaluation.results import Answer, Metric, Sample
from lorafit.evaluation.results import Set as SetInfo
from lorafit.evaluation.statistics import Series
from lorafit.hardware import is_installed
from lorafit.progress import each

Benchmarked: TypeAlias = dict[str, list[dict[str, Any]]]
"""By model, what each task gave, as JSON-able values."""


BATCH = 16
"""Requests that the harness runs at once."""


def check_extras(section: dict[str, Any]) -> list[str]:
    """Before a model is loaded; the names of the benchmarks. Raises UsageError, DataError."""
    if section["judge"]:
        from lorafit.evaluation.judge import Judge
        from lorafit.evaluation.judge import check as check_judge

        check_judge(Judge(**section["judge"]))
    if not section["lm_eval"]:
        return []
    from lorafit.engine.evaluate.benchmarks import check

    sets = {HELD_OUT, *section["forgetting"], *(spec["name"] for spec in section["sets"])}
    names = check(_asked(section))
    for name in names:
        if name in sets:
            raise UsageError(f"eval.lm_eval.tasks: {name}: there is a set of that name; rename the task or the set")
    return names


def look_at_benchmarks(section: dict[str, Any]) -> None:
    """That the tasks are known, and bring no code that isn't trusted; their data is not loaded. Raises UsageError."""
    if section["lm_eval"] and is_installed("lm_eval"):
        from lorafit.engine.evaluate.benchmarks import look

        look(_asked(section))


def _asked(section: dict[str, Any]) -> Any:
    from lorafit.engine.evaluate.tasks import Benchmarks

    values = section["lm_eval"] | {"tasks": tuple(section["lm_eval"]["tasks"])}
    return Benchmarks(**values, trust_code=section["trust_code"], batch_size=BATCH, seed=section["seed"])


def run_benchmarks(
    loaded: Loaded,
    contender: Contender,
    tokenizer: PreTrainedTokenizerBase,
    section: dict[str, Any],
    records: Records,
) -> Benchmarked:
    """The benchmarks on one model, unless the records have them."""
    if not section["lm_eval"]:
        return {}
    found = records.whole("benchmarks", contender.name)
    if found is None:
        from lorafit.engine.evaluate.benchmarks import run

        model = loaded.use(contender.name if contender.kind == "adapter" else BASE)
        found = [_plain(task) for task in run(_asked(section), model, tokenizer)]
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
                transform = task["transforms"].get(name, "identity")
                of_model[name] = Series(made[0], made[1], transform=transform, better=better[name])
    return scores, infos


def benchmark_samples(found: Benchmarked) -> Iterator[Sample]:
    """Each document of each task, with what every model made of it."""
    for number, task in enumerate(next(iter(found.values()), [])):
        for row, first in enumerate(task["samples"]):
            asked = {model: tasks[number]["samples"][row] for model, tasks in found.items()}
            yield Sample(
                set=task["task"],
                row=row,
                place=f"{task['task']}: document {first['doc_id']}",
                prompt=first["prompt"],
                expected=first["target"],
                answers={model: _document(one) for model, one in asked.items()},
            )


def _document(one: dict[str, Any]) -> Answer:
    return Answer(
        text=one["answer"],
        scores={name: score for name, score in one["scores"].items() if score is not None and math.isfinite(score)},
    )


def benchmark_remarks(found: Benchmarked) -> list[str]:
    """The metrics that have no figure."""
    return [
        f"{task['task']}: left out: {', '.join(task['left_out'])}, which are no means over documents"
        for task in next(iter(found.values()), [])
        if task["left_out"]
    ]


def judge_answers(section: dict[str, Any], sets: list[Rows], names: list[str], records: Records) -> None:
    """Each model's answers against the base's, by the judge. Raises UsageError, DataError."""
    from lorafit.evaluation.judge import Judge, Pair, compare

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
            made = compare(asked, map(pair, chosen), done)
            for verdict in each(made, f"judging {name} on {rows.name}", len(chosen) - len(done)):
                add({"row": verdict.row, "score": verdict.score, "raw": verdict.raw})


def judge_remarks(sets: list[Rows], names: list[str], records: Records) -> list[str]:
    """How often the judge changed its mind with the order of the answers, or gave no vote."""
    from lorafit.evaluation.judge import Verdict, position_bias

    found = []
    for rows, name in itertools.product(sets, names):
        kept = [
            Verdict(one["row"], one["score"], (one["raw"][0], one["raw"][1]))
            for one in records.read(rows.name, name, "judge")
        ]
        invalid = sum(verdict.score is None for verdict in kept)
        if kept:
            found.append(
                f"{rows.name}: the judge preferred the same place in both orders for {position_bias(kept) or 0:.0%} of "
                f"the answers of {name}, and gave no vote on {invalid} of {len(kept)}"
            )
    return found
