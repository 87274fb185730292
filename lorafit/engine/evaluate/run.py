"""`lorafit eval`, step by step."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lorafit.bounds import read_json
from lorafit.engine import hush_progress
from lorafit.engine.data.prepare import Prepared
from lorafit.engine.evaluate import benchmarks
from lorafit.engine.evaluate.benchmarks import Benchmarked
from lorafit.engine.evaluate.measure import (
    judge_answers,
    judge_remarks,
    measure,
    metrics_of,
    samples_of,
    score,
    speeds,
    with_metrics,
)
from lorafit.engine.evaluate.models import Comparison, LoadedModel, NamedModel, groups, loaded, opened
from lorafit.engine.evaluate.sets import EvalRows, option_rows, read_sets, rejected_rows
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import GateError, Interrupted, UsageError
from lorafit.evaluation.figures import (
    HELD_OUT,
    LIKELIHOOD,
    LOSS,
    OF_OPTIONS,
    OF_PAIRS,
    Scores,
    expected_figures,
    figures_of,
    own_models,
    value_of,
)
from lorafit.evaluation.gates import (
    BASELINE,
    Demand,
    check_comparable,
    judge,
    load_results,
    no_figure,
    no_longer_measured,
    parse,
    regression_gates,
)
from lorafit.evaluation.report.html import Training, write_reports
from lorafit.evaluation.results import Difference, Figure, Gate, Model, Records, Results
from lorafit.files import claim, file_digest, writing
from lorafit.judge import endpoint_of
from lorafit.options import EvalOptions
from lorafit.plan import Plan
from lorafit.plan.evaluation import task_files
from lorafit.progress import each, stage
from lorafit.recipe.schema import EvalSection
from lorafit.run.directory import RunDir, located
from lorafit.run.manifest import versions
from lorafit.written import as_written


@dataclass(frozen=True)
class Work:
    """An evaluation that was checked and can be run.

    Attributes:
        sets: by name.
        demands: gates, and where each was written.
    """

    comparison: Comparison
    sets: dict[str, EvalRows]
    demands: list[tuple[Demand, str]]
    baseline: Results | None
    remarks: list[str]


def evaluate(options: EvalOptions) -> tuple[Results, Path]:
    """Run models on rows, and write results.json, samples.jsonl and the reports into the run's eval/, or elsewhere.

    Returns what was found, and the folder. A gate that failed is in the results: what to make of it is the caller's.
    Raises UsageError, DataError, ModelError, DoesNotFitError, and Interrupted with what was done kept.
    """
    hush_progress()
    options.check()
    with opened(options) as comparison, writing(destination := options.destination(comparison.run)):
        claim(destination, "evaluation", "an evaluation", _needed(options, comparison))
        with stage("preparing rows"):
            work = prepare(options, comparison)
        records = Records(destination.with_name(f".{destination.name}.work"), _key(work), options.resume)
        try:
            found = run_models(work, records)
        except (KeyboardInterrupt, Interrupted) as error:
            number = error.signal_number if isinstance(error, Interrupted) else 2
            raise Interrupted("interrupted; what was measured is kept: go on with --resume", number) from None
        scores = {
            name: {model: score(rows, model, comparison.main, records) for model in comparison.names}
            for name, rows in work.sets.items()
        }
        results = assemble(work, records, scores, found, options)
        of_sets = (one for name, rows in work.sets.items() for one in samples_of(rows, scores[name], records))
        samples = itertools.chain(of_sets, benchmarks.benchmark_samples(found))
        with stage("writing reports"):
            results = write_reports(destination, results, samples, _training(comparison.run), comparison.references)
        records.discard()
    return results, destination


def _training(run: RunDir) -> Training:
    merge = run.merged / "merge_report.json"
    report = read_json(merge) if merge.is_file() else None
    return Training(run.metrics_until(sys.maxsize), run.load_manifest().get("memory"), report)


def _needed(options: EvalOptions, comparison: Comparison) -> Iterator[Path]:
    """Files and folders that an evaluation reads, which its output must not replace."""
    yield from (comparison.run.path, options.path)
    yield from (located(model.path) for model in comparison.models)
    data = comparison.plan.data
    yield from (located(source.path) for source in (*data.train, *data.validation) if source.hub is None)
    yield from filter(None, (options.data, *(one.path and Path(one.path) for one in comparison.section.sets)))


def prepare(options: EvalOptions, comparison: Comparison) -> Work:
    """Everything that can be wrong, before a model is loaded."""
    section, plan, main, names = comparison.section, comparison.plan, comparison.main, comparison.names
    remarks = list(comparison.remarks)
    demands = [*_demands(section), *((_from_command_line(text), "--fail-under") for text in options.fail_under)]
    baseline = load_results(options.baseline) if options.baseline else None
    if section.judge is not None:
        endpoint_of(section.judge)
    tasks = benchmarks.check(section)
    tokenizer = load_tokenizer(plan, comparison.run.result)
    read = read_sets(plan, section, tokenizer, options.data, remarks)
    sets = {rows.name: with_metrics(rows, section, plan, main, names, remarks) for rows in read}
    for name, rows in sets.items():
        if strange := sum(one.expected < 0 for one in rows.options.values()):
            remarks.append(
                f"{name}: the answers of {strange} of {len(rows.options)} rows are none of the options, so these don't "
                "count"
            )
    models = {model.name: model.kind for model in comparison.models}
    known = list(expected_figures({name: rows.metrics for name, rows in sets.items()}, models, main))
    check_demands(demands, known, tasks, baseline)
    infos = {name: rows.info for name, rows in sets.items()} if baseline else {}
    if baseline and (gone := dict(no_longer_measured(known, infos, tasks, baseline))):
        raise GateError("\n".join(f"--baseline: {line}" for line in gone.values()))
    if baseline and not tasks:
        check_comparable(known, baseline)
    return Work(comparison, sets, demands, baseline, remarks)


def rehearse(plan: Plan, tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> None:
    """Read what a plan's evaluation will, before anything is trained: its sets' rows, its gates, its benchmarks.

    Neither a model nor the code of a metric is loaded. Raises UsageError and DataError, as `evaluate` would.
    """
    section = EvalSection.model_validate(plan.eval)
    demands = _demands(section)
    named = {figure.removeprefix(BASELINE).split(".")[0] for demand, _ in demands for figure in demand.figures()}
    models = own_models(not plan.adapter.trains_base, plan.start_from is not None)
    read = {*named, *(one.name for one in section.sets)}
    if prepared.validation is None:
        read -= {HELD_OUT}
    metrics = {}
    for rows in read_sets(plan, section, tokenizer, None, [], read, prepared):
        rows = dataclasses.replace(rows, rejected=rejected_rows(rows, plan, []))
        metrics[rows.name] = metrics_of(rows, section, True, section.judge is not None, True)
        for _ in option_rows(rows, plan) if rows.spec.options else ():
            pass
    known = list(expected_figures(metrics, models, list(models)[1]))
    for demand, where in demands:
        for name in (name.removeprefix(BASELINE) for name in demand.figures()):
            of_set, _, model = name.split(".")
            if of_set in metrics and model in models and name not in known:
                raise UsageError(f"{where}: {no_figure(name, known)}")
    benchmarks.look(section)


def figure_of_steps(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, prepared: Prepared
) -> Callable[[LoadedModel], float] | None:
    """What measures a model in training by the plan's metric_for_best_model; None for one that the validation finds.

    Raises UsageError for a metric that the rows don't have, and DataError; the made function GateError for no value.
    """
    of_set, _, metric = plan.training.metric_for_best_model.partition(".")
    if not metric:
        return None
    section = EvalSection.model_validate(plan.eval)
    (read,) = read_sets(plan, section, tokenizer, None, [], {of_set}, prepared)
    rows = with_metrics(read, section, plan, None, [], [])
    if metric not in (known := [one.name for one in rows.metrics]):
        raise UsageError(
            f"training.metric_for_best_model: of {of_set} there is no {metric}; there are {', '.join(known)}"
        )
    kinds = [
        (LIKELIHOOD, ("likelihood",)),
        (OF_PAIRS, ("likelihood", "rejected")),
        (OF_OPTIONS, ("options",)),
    ]
    needed = next((kind for some, kind in kinds if metric in [one.name for one in some]), ("answers",))

    def figure(model: LoadedModel) -> float:
        with tempfile.TemporaryDirectory(prefix="lorafit-") as folder:
            records = Records(Path(folder) / "records", {}, resume=False)
            most = rows.spec.max_new_tokens or section.max_new_tokens
            measure(model, "trained", rows, most, records, only=needed)
            value = value_of(score(rows, "trained", None, records)[metric])
        if value is None:
            raise GateError(f"{of_set}.{metric} has no value, so no step can be the best by it; choose another metric")
        return value

    return figure


def _demands(section: EvalSection) -> list[tuple[Demand, str]]:
    return [(parse(text), f"eval.gates.{number}") for number, text in enumerate(section.gates)]


def check_demands(
    demands: Iterable[tuple[Demand, str]], known: Sequence[str], tasks: Collection[str], baseline: Results | None
) -> None:
    """Raises UsageError for a figure that there won't be. What is measured of a task is known once it has run."""
    for demand, where in demands:
        models = {name.rpartition(".")[2] for name in known}
        parts = ((name, name.split(".")) for name in demand.figures())
        of_tasks = [name for name, (task, *_, model) in parts if task in tasks and model in models]
        demand.check(where, [*known, *of_tasks], baseline)


def _from_command_line(text: str) -> Demand:
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"--fail-under: {error}") from None


def run_models(work: Work, records: Records) -> Benchmarked:
    """Every model on every set, each base loaded once; the benchmarks by model."""
    section, found = work.comparison.section, Benchmarked()
    for group in groups(work.comparison.models):
        with loaded(group) as models:
            for model in group:
                running = models.use_model(model)
                base = models.base if model.kind == "adapter" else None
                for rows in work.sets.values():
                    most = rows.spec.max_new_tokens or section.max_new_tokens
                    with torch.inference_mode():
                        measure(running, model.name, rows, most, records, base)
                tokenizer = next(iter(work.sets.values())).tokenizer
                found |= benchmarks.run_recorded(models, model, tokenizer, section, records)
    if section.judge is not None:
        judge_answers(section.judge, work.sets.values(), work.comparison.names, records)
    return found


def assemble(
    work: Work,
    records: Records,
    scores: dict[str, dict[str, dict[str, Scores]]],
    found: Benchmarked,
    options: EvalOptions,
) -> Results:
    """Figures, differences and gates from the scores by set, model and metric."""
    comparison, names = work.comparison, work.comparison.names
    infos = {name: rows.info for name, rows in work.sets.items()}
    of_tasks, task_infos = benchmarks.benchmark_scores(found, names)
    figures: dict[str, Figure] = {}
    differences: list[Difference] = []
    resamples: dict[str, np.ndarray[Any, Any]] = {}
    every = scores | of_tasks
    for number, (name, of_set) in enumerate(each(every.items(), "computing intervals", len(every), "sets")):
        made = figures_of(name, of_set, comparison.section.seed + number, comparison.main)
        figures |= made.figures
        differences += made.differences
        resamples |= made.resamples
    remarks = [*work.remarks, *_alike(differences, figures), *benchmarks.benchmark_remarks(found)]
    remarks += judge_remarks(work.sets.values(), names, records)
    values = {name: figure.value for name, figure in figures.items()}
    gates = [judge(demand, where, values, resamples.get, work.baseline) for demand, where in work.demands]
    results = Results(
        run=str(comparison.run.path),
        name=comparison.plan.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        hardware=dataclasses.asdict(comparison.plan.hardware),
        settings={
            "decoding": "greedy",
            "data": str(options.data) if options.data else None,
            "eval": comparison.section.model_dump(mode="json"),
        },
        models={model.name: _model(model, records) for model in comparison.models},
        sets=infos | task_infos,
        figures=figures,
        differences=tuple(differences),
        gates=(*gates, *_not_finite(figures)),
        speed=tuple(speed for rows in work.sets.values() for speed in speeds(rows, names, records)),
        baseline=str(options.baseline) if options.baseline else None,
        remarks=tuple(remarks),
    )
    if work.baseline is None:
        return results
    return results.model_copy(update={"gates": (*results.gates, *regression_gates(results, work.baseline))})


def _alike(differences: list[Difference], figures: dict[str, Figure]) -> Iterator[str]:
    """A remark on intervals without width, where there are some."""
    if alike := [one for one in differences if one.low is not None and one.low == one.high and one.value]:
        rows = min(figures[f"{one.set}.{one.metric}.{one.model}"].rows for one in alike)
        yield (
            "an interval without width means that no row differs from the others, not that none ever will: of "
            f"{rows} rows alike, up to {1 - 0.05 ** (1 / rows):.1%} of further ones may be otherwise"
        )


def _not_finite(figures: dict[str, Figure]) -> Iterator[Gate]:
    """A failed gate for each loss that is no finite number."""
    for name, figure in figures.items():
        if figure.value is None and figure.rows and name.split(".")[1] == LOSS.name:
            yield Gate(gate=f"{name} is finite", where="eval", passed=False, sentence=f"{name} is no finite number")


def _model(model: NamedModel, records: Records) -> Model:
    return Model(
        kind=model.kind,
        path=model.path,
        sha256=model.sha256,
        quantization=model.quantization,
        dtype=model.plan.dtype,
        seconds=round(records.seconds(model.name), 3),
    )


def _digest(rows: EvalRows) -> str:
    """SHA-256 of the rejected answers of a set."""
    found = hashlib.sha256()
    for row, one in rows.rejected.items():
        found.update(np.int64(row).tobytes() + one.input_ids.tobytes() + one.labels.tobytes())
    return found.hexdigest()


def _key(work: Work) -> dict[str, Any]:
    """Everything that the records depend on, as it may be written."""
    comparison = work.comparison
    section, references = comparison.section, comparison.references
    written = section.model_dump(mode="json")
    models = comparison.models
    key = {
        "run": str(comparison.run.path.resolve()),
        "models": {one.name: [one.kind, one.path, one.sha256, one.quantization, one.loads] for one in models},
        "rows": {name: [rows.digest, rows.asked] for name, rows in work.sets.items()},
        "options": {name: [one.options for one in rows.options.values()] for name, rows in work.sets.items()},
        "rejected": {name: _digest(rows) for name, rows in work.sets.items()},
        "max_new_tokens": [section.max_new_tokens, {n: rows.spec.max_new_tokens for n, rows in work.sets.items()}],
        "seed": section.seed,
        "lm_eval": written["lm_eval"],
        "tasks": {str(file): file_digest(file) for file in task_files(section.lm_eval) if file.is_file()},
        "judge": written["judge"],
        "device": comparison.plan.hardware.device,
        "versions": versions(),
    }
    values = {name: one.sha256 for name, one in references.items() if name.startswith("eval.")}
    return as_written(key, references) | {"references": values}
