"""`lorafit eval`: the story."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorafit.engine.data.prepare import Prepared
from lorafit.engine.evaluate.measure import measure, metrics_of, scored_rows
from lorafit.engine.evaluate.models import Contender, Lineup, groups, line_up, loaded
from lorafit.engine.evaluate.optional import (
    Benchmarked,
    benchmark_remarks,
    benchmark_samples,
    benchmark_scores,
    check_extras,
    judge_answers,
    judge_remarks,
    look_at_benchmarks,
    run_benchmarks,
)
from lorafit.engine.evaluate.sets import HELD_OUT, EvalRows, OptionRow, option_rows, read_sets
from lorafit.engine.quiet import hush_progress
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import GateError, Interrupted, UsageError
from lorafit.evaluation.figures import BASE, LOSS, Rows, expected_figures, figures_of, samples_of, score, speeds
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
from lorafit.evaluation.inputs import task_files
from lorafit.evaluation.records import Records
from lorafit.evaluation.report.write import write_reports
from lorafit.evaluation.results import Difference, Figure, Gate, Model, Results
from lorafit.files import claim, file_digest, writing
from lorafit.options.evaluate import Options
from lorafit.plan import Plan
from lorafit.progress import each, stage
from lorafit.run.directory import located
from lorafit.run.manifest import versions
from lorafit.written import as_written


@dataclass(frozen=True)
class Work:
    """What an evaluation needs, all of it checked.

    Attributes:
        main: the model that is the run's result; others are compared with it, besides the base.
        sets: rows as the models see them, by name.
        scored: the same as their scores need them.
        options: of each set, its rows as choices.
        demands: gates, and where each was written.
    """

    lineup: Lineup
    main: str | None
    sets: dict[str, EvalRows]
    scored: dict[str, Rows]
    options: dict[str, list[OptionRow]]
    demands: list[tuple[Demand, str]]
    baseline: Results | None
    remarks: list[str]

    @property
    def contenders(self) -> list[Contender]:
        return self.lineup.contenders

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.contenders]


def evaluate(options: Options) -> tuple[Results, Path]:
    """Run models on rows, and write results.json, samples.jsonl and the reports into the run's eval/, or elsewhere.

    Returns what was found, and the folder. A gate that failed is in the results: what to make of it is the caller's.
    Raises UsageError, DataError, ModelError, DoesNotFitError, and Interrupted with what was done kept.
    """
    hush_progress()
    options.check()
    with line_up(options) as lineup, writing(destination := options.destination(lineup.run)):
        claim(destination, "evaluation", "an evaluation", _needed(options, lineup))
        with stage("preparing rows"):
            work = prepare(options, lineup)
        records = Records(destination.with_name(f".{destination.name}.work"), _key(work), options.resume)
        try:
            benchmarks = run_models(work, records)
        except (KeyboardInterrupt, Interrupted) as error:
            number = error.signal_number if isinstance(error, Interrupted) else 2
            raise Interrupted("interrupted; what was measured is kept: go on with --resume", number) from None
        results = assemble(work, records, benchmarks, options)
        of_sets = (sample for rows in work.scored.values() for sample in samples_of(rows, work.names, records))
        samples = itertools.chain(of_sets, benchmark_samples(benchmarks))
        with stage("writing reports"):
            results = write_reports(destination, results, samples, lineup.run, lineup.references)
        records.discard()
    return results, destination


def _needed(options: Options, lineup: Lineup) -> Iterator[Path]:
    """What an evaluation reads, which its output must not replace."""
    yield from (lineup.run.path, options.path)
    yield from (located(contender.path) for contender in lineup.contenders)
    data = lineup.plan.data
    yield from (located(source.path) for source in (*data.train, *data.validation) if source.hub is None)
    yield from filter(None, (options.data, *(one["path"] and Path(one["path"]) for one in lineup.section["sets"])))


def prepare(options: Options, lineup: Lineup) -> Work:
    """Everything that can be wrong, before a model is loaded."""
    section, plan = lineup.section, lineup.plan
    remarks = list(lineup.remarks)
    demands = [(parse(text), f"eval.gates.{number}") for number, text in enumerate(section["gates"])]
    demands += [(_from_command_line(text), "--fail-under") for text in options.fail_under]
    baseline = load_results(options.baseline) if options.baseline else None
    tasks = check_extras(section)
    tokenizer = load_tokenizer(plan, lineup.run.result)
    main = next((c.name for c in lineup.contenders if c.kind in ("adapter", "trained")), None)
    sets = {rows.name: rows for rows in read_sets(plan, section, tokenizer, options.data, remarks)}
    choices = {name: list(option_rows(rows, plan)) if rows.spec["options"] else [] for name, rows in sets.items()}
    names = [contender.name for contender in lineup.contenders]
    scored = {name: scored_rows(rows, section, choices[name], main, names) for name, rows in sets.items()}
    for name, rows in choices.items():
        if strange := sum(row.expected < 0 for row in rows):
            remarks.append(
                f"{name}: the answers of {strange} of {len(rows)} rows are none of the options, so these don't count"
            )
    infos = {name: rows.info for name, rows in scored.items()}
    models = {contender.name: contender.kind for contender in lineup.contenders}
    known = list(expected_figures({name: info.metrics for name, info in infos.items()}, models, main))
    check_demands(demands, known, tasks, baseline)
    if baseline and (gone := dict(no_longer_measured(known, infos, tasks, baseline))):
        raise GateError("\n".join(f"--baseline: {line}" for line in gone.values()))
    if baseline and not tasks:
        check_comparable(known, baseline)
    return Work(lineup, main, sets, scored, choices, demands, baseline, remarks)


def rehearse(plan: Plan, tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> None:
    """Read what a plan's evaluation will, before anything is trained: its sets' rows, its gates, its benchmarks.

    Neither a model nor the code of a metric is loaded. Raises UsageError and DataError, as `evaluate` would.
    """
    section = plan.eval
    demands = [(parse(text), f"eval.gates.{number}") for number, text in enumerate(section["gates"])]
    named = {figure.removeprefix(BASELINE).split(".")[0] for demand, _ in demands for figure in demand.figures()}
    own = plan.adapter.result
    models = {name: name for name in (BASE, own, *([] if own == "trained" else ["merged"]))}
    read = {*named, *(spec["name"] for spec in section["sets"])}
    if prepared.validation is None:
        read -= {HELD_OUT}
    metrics = {}
    for rows in read_sets(plan, section, tokenizer, None, [], read, prepared):
        metrics[rows.name] = metrics_of(rows, section, True)
        for _ in option_rows(rows, plan) if rows.spec["options"] else ():
            pass
    known = list(expected_figures(metrics, models, own))
    for demand, where in demands:
        for name in (name.removeprefix(BASELINE) for name in demand.figures()):
            of_set, _, model = name.split(".")
            if of_set in metrics and model in models and name not in known:
                raise UsageError(f"{where}: {no_figure(name, known)}")
    look_at_benchmarks(section)


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
    section, benchmarks = work.lineup.section, Benchmarked()
    for group in groups(work.contenders):
        with loaded(group) as models:
            for contender in group:
                for name, rows in work.sets.items():
                    longest = rows.spec["max_new_tokens"] or section["max_new_tokens"]
                    measure(models, contender, rows, work.options[name], longest, records)
                tokenizer = next(iter(work.sets.values())).tokenizer
                benchmarks |= run_benchmarks(models, contender, tokenizer, section, records)
    if section["judge"]:
        judge_answers(section["judge"], list(work.scored.values()), work.names, records)
    return benchmarks


def assemble(work: Work, records: Records, benchmarks: Benchmarked, options: Options) -> Results:
    """Figures, differences and gates from the records."""
    section = work.lineup.section
    of_sets = {name: {model: score(rows, model, records) for model in work.names} for name, rows in work.scored.items()}
    infos = {name: rows.scored_info for name, rows in work.scored.items()}
    of_tasks, task_infos = benchmark_scores(benchmarks, work.names)
    figures: dict[str, Figure] = {}
    differences: list[Difference] = []
    resamples: dict[str, np.ndarray[Any, Any]] = {}
    every = of_sets | of_tasks
    for number, (name, scores) in enumerate(each(every.items(), "computing intervals", len(every), "sets")):
        found = figures_of(name, scores, section["seed"] + number, work.main)
        figures |= found.figures
        differences += found.differences
        resamples |= found.resamples
    if alike := [one for one in differences if one.low is not None and one.low == one.high and one.value]:
        rows = min(figures[f"{one.set}.{one.metric}.{one.model}"].rows for one in alike)
        work.remarks.append(
            "an interval without width means that no row differs from the others, not that none ever will: of "
            f"{rows} rows alike, up to {1 - 0.05 ** (1 / rows):.1%} of further ones may be otherwise"
        )
    work.remarks.extend(benchmark_remarks(benchmarks))
    work.remarks.extend(judge_remarks(list(work.scored.values()), work.names, records))
    values = {name: figure.value for name, figure in figures.items()}
    gates = [judge(demand, where, values, resamples.get, work.baseline) for demand, where in work.demands]
    gates += [
        Gate(gate=f"{name} is finite", where="eval", passed=False, sentence=f"{name} is no finite number")
        for name, figure in figures.items()
        if figure.value is None and figure.rows and name.split(".")[1] == LOSS.name
    ]
    run, plan = work.lineup.run, work.lineup.plan
    results = Results(
        run=str(run.path),
        name=plan.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
        hardware=dataclasses.asdict(plan.hardware),
        settings={
            "decoding": "greedy",
            "data": str(options.data) if options.data else None,
            "eval": section,
        },
        models={contender.name: _model(contender, records) for contender in work.contenders},
        sets=infos | task_infos,
        figures=figures,
        differences=tuple(differences),
        gates=tuple(gates),
        speed=tuple(speed for rows in work.scored.values() for speed in speeds(rows, work.names, records)),
        baseline=str(options.baseline) if options.baseline else None,
        remarks=tuple(work.remarks),
    )
    if work.baseline is None:
        return results
    return results.model_copy(update={"gates": (*gates, *regression_gates(results, work.baseline))})


def _model(contender: Contender, records: Records) -> Model:
    return Model(
        kind=contender.kind,
        path=contender.path,
        sha256=contender.sha256,
        quantization=contender.quantization,
        dtype=contender.plan.dtype,
        seconds=round(records.seconds(contender.name), 3),
    )


def _key(work: Work) -> dict[str, Any]:
    """What the records depend on, as it may be kept."""
    plan, section, references = work.lineup.plan, work.lineup.section, work.lineup.references
    models = {c.name: [c.kind, c.path, c.sha256, c.quantization, c.loads] for c in work.contenders}
    key = {
        "run": str(work.lineup.run.path.resolve()),
        "models": models,
        "rows": {name: [rows.digest, rows.questions] for name, rows in work.sets.items()},
        "options": {name: [row.options for row in rows] for name, rows in work.options.items()},
        "max_new_tokens": [
            section["max_new_tokens"],
            {n: rows.spec["max_new_tokens"] for n, rows in work.sets.items()},
        ],
        "seed": section["seed"],
        "lm_eval": section["lm_eval"],
        "tasks": {str(file): file_digest(file) for file in _task_files(section["lm_eval"])},
        "judge": section["judge"],
        "device": plan.hardware.device,
        "versions": versions(),
    }
    values = {name: one.sha256 for name, one in references.items() if name.startswith("eval.")}
    return as_written(key, references) | {"references": values}


def _task_files(section: dict[str, Any] | None) -> Iterator[Path]:
    files = task_files(section["tasks"], section["include_path"]) if section else iter(())
    return (file for file in files if file.is_file())
