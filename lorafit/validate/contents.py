"""What a recipe names, checked as far as files tell: the first rows of its data, and metrics, gates, benchmarks and
the judge."""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from lorafit.errors import DataError, LorafitError, MissingError, UsageError
from lorafit.evaluation.figures import HELD_OUT, expected_figures, own_models
from lorafit.evaluation.gates import BASELINE, no_figure, parse
from lorafit.evaluation.metrics import JSON_DEFAULTS, MetricSpec, check_metric
from lorafit.hardware import is_installed, missing_packages
from lorafit.judge import endpoint_of
from lorafit.options import RESERVED
from lorafit.plan.evaluation import measured, sets_of
from lorafit.recipe import Recipe, Source
from lorafit.recipe.schema import EvalSet
from lorafit.rows import Row, data_files, detect_format, is_local, read_rows, to_example
from lorafit.rows.cells import Fault as RowFault
from lorafit.rows.cells import Shape, options_in
from lorafit.tree import KeyPath, dotted
from lorafit.validate.findings import Findings

FIRST_ROWS = 20
"""Rows of each file that are read."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
Rows = Callable[[str, int], tuple[Row, ...]]
"""The first rows of a local source. Raises DataError."""


def first_rows(path: str, most: int) -> tuple[Row, ...]:
    """The first rows of a local source. Raises DataError."""
    return tuple(itertools.islice(read_rows(path), most))


def check_contents(found: Findings, rows: Rows) -> None:
    """Note the first row of each source that can't be used, and files that are missing."""
    faulty = {fault.mistake.path.rpartition(".")[0] for fault in found.faults if fault.exit_code == DataError.exit_code}
    for path, file, source in _named(found.recipe):
        if dotted(path) in faulty:
            continue
        if not is_local(file):
            _check_hub(found, (*path, "path"), file)
            continue
        try:
            _check_rows(dotted(path), file, source, rows, dict(found.recipe.dataset.audit))
        except DataError as error:
            found.wrong(place_of_fault(found, (*path, "path"), error, rows), error)


def place_of_fault(found: Findings, path: KeyPath, error: DataError, rows: Rows) -> KeyPath:
    """Where what is wrong with a source's rows was most likely written: a column's name or template, the format, or
    the path."""
    source = next((source for place, _, source in _named(found.recipe) if place == path[:-1]), None)
    if source is None:
        return path
    place = path[:-1]
    if error.where:
        return (*place, *error.where)
    try:
        fields = rows(source.path or "", 1)[0].fields
    except (DataError, IndexError):
        return path
    for column, name in source.columns.items():
        if name not in fields and name.split(".")[0] not in fields:
            return (*place, "columns", column)
    return (*place, "format") if source.format != "auto" else path


def _named(recipe: Recipe) -> Iterator[tuple[KeyPath, str, Source | EvalSet]]:
    """The rows that a recipe names: where, the path, and all that is said of them."""
    dataset = recipe.dataset
    validation = dataset.validation if isinstance(dataset.validation, tuple) else ()
    for name, sources in (("train", dataset.train), ("validation", validation)):
        for number, source in enumerate(sources):
            yield ("dataset", name, number), source.path, source
    for number, one in enumerate(recipe.eval.sets):
        if one.path is not None:
            yield ("eval", "sets", number), one.path, one


def _check_rows(key: str, path: str, source: Source | EvalSet, rows: Rows, limits: dict[str, float | None]) -> None:
    """Raises DataError for the first row of a file that can't be read as its format wants it."""
    template = dict(source.template) if isinstance(source.template, dict) else source.template
    left, format = source.max_rows, source.format
    for file in data_files(path):
        first = rows(str(file), min(FIRST_ROWS, left or FIRST_ROWS))
        if first and format == "auto":
            format, _ = detect_format(first[0], source.columns, template, key)
        for row in first:
            try:
                to_example(row, Shape(format, source.columns, template, key))  # type: ignore[arg-type]
            except RowFault as error:
                if limits.get(error.rule) == 0:
                    raise DataError(f"{error} (dataset.audit.{error.rule} lets none pass)") from None
            if isinstance(source, EvalSet) and isinstance(source.options, str):
                options_in(row, source.options)
        if left is not None:
            return  # later files may not be reached
    if format == "auto":
        raise DataError(f"{path}: there are no rows")


def _check_hub(found: Findings, path: KeyPath, name: str) -> None:
    """What isn't here may be on the hub, if it can be a name there."""
    if not _HUB_NAME.fullmatch(name):
        found.wrong(path, DataError(f"{name}: no such file or folder (looked in {Path.cwd()})"))
        return
    what = f"{name} is not here, so it is a hub data set, read when training begins"
    found.unchecked(path, DataError(f"was not checked: {what}"))


def refuse(recipe: Recipe, is_begun: bool) -> list[str]:
    """See that, besides its plan, nothing stands against a training or the evaluation after it, as files tell.

    Of a run that is begun, only what this machine lacks is looked for. Returns what it lacks for the evaluation alone,
    a sentence each. Raises RecipeError, DataError.
    """
    found, lacking = Findings(recipe), Findings(recipe)
    for path, message in missing_packages(recipe):
        lacking.wrong(path, MissingError(message))
    if not is_begun:
        check_evaluation(found)
    notes = [*found.notes]
    if not is_begun:
        check_contents(found, first_rows)
    if found.faults or lacking.faults:
        raise found.refusal(lacking.faults)
    return notes


def check_evaluation(found: Findings) -> None:
    """Note metrics, gates, benchmarks and a judge that an evaluation would refuse. No code of a metric is run."""
    section = found.recipe.eval
    for path, specs in _metrics(found.recipe):
        for number, spec in enumerate(specs):
            _try(found, (*path, number), functools.partial(check_metric, spec))
    for number, gate in enumerate(section.gates):
        path = ("eval", "gates", number)
        _try(found, path, functools.partial(_check_gate, found, path, gate))
    if section.lm_eval is not None:
        _check_benchmarks(found)
    if section.judge is not None:
        _check_judge(found)


def _try(found: Findings, path: KeyPath, check: Callable[[], None]) -> None:
    try:
        check()
    except MissingError as error:
        found.unchecked(path, error)
    except LorafitError as error:
        found.wrong(path, error)


def _metrics(recipe: Recipe) -> Iterator[tuple[KeyPath, tuple[MetricSpec, ...]]]:
    """Every list of metrics, and where it stands."""
    yield ("eval", "metrics"), recipe.eval.metrics or ()
    for number, one in enumerate(recipe.eval.sets):
        yield ("eval", "sets", number, "metrics"), one.metrics or ()


def _check_gate(found: Findings, path: KeyPath, text: str) -> None:
    """Raises UsageError for a figure that no evaluation by this recipe has."""
    recipe, section = found.recipe, found.recipe.eval
    sets, models = sets_of(section), own_models(not recipe.trains_base, recipe.start_from is not None)
    metrics = {name: measured(recipe, one) for name, one in sets.items()}
    for name in parse(text).figures():
        figure = name.removeprefix(BASELINE)
        of_set, _, model = figure.split(".")
        is_other = model not in RESERVED and not difflib.get_close_matches(model, models, 1, 0.7)
        if section.lm_eval is not None and of_set not in sets:
            meant = difflib.get_close_matches(of_set, [*sets, *section.lm_eval.tasks], 1, 0.8)
            if (not meant or meant[0] in section.lm_eval.tasks) and (model in models or is_other):
                continue  # a task's figures are known once it has run
        asked = models | ({model: "adapter"} if is_other else {})
        known = list(expected_figures(metrics, asked, list(models)[1]))
        if figure not in known:
            raise UsageError(no_figure(figure, known))
        by_default = not (sets[of_set].metrics or section.metrics) if of_set in sets else False
        if by_default and figure.split(".")[1] in JSON_DEFAULTS:
            found.notes.append(f"{dotted(path)}: {figure}: is there if every expected answer is JSON")
        if model == "merged":
            found.notes.append(f"{dotted(path)}: {figure}: there is merged once the run is merged")
        if is_other:
            found.unchecked(path, UsageError(f"{figure}: there is {model} where eval is given --adapter {model}=PATH"))
        if of_set == HELD_OUT and sets[HELD_OUT].path is None and recipe.dataset.validation is None:
            what = "the recipe holds no rows out of training, so there are heldout ones where eval is given --data"
            found.unchecked(path, UsageError(f"{figure}: {what}"))


def _check_judge(found: Findings) -> None:
    """Note what can't be asked, and a key that is not here."""
    judge = found.recipe.eval.judge
    assert judge is not None
    for asked in (judge.model_copy(update={"api_key_env": None}), judge):
        try:
            endpoint_of(asked)
        except MissingError as error:  # the key is seldom where recipes are checked, and checks nothing
            if not found.strict:
                found.notes.append(str(error))
        except UsageError as error:
            where, _, what = str(error).partition(": ")
            found.wrong(tuple(where.split(".")), UsageError(what))
            return


def _check_benchmarks(found: Findings) -> None:
    """Note task files and folders of lm-evaluation-harness that are not there, or the harness itself."""
    section = found.recipe.eval.lm_eval
    assert section is not None
    sets = sets_of(found.recipe.eval)
    for number, task in enumerate(section.tasks):
        path = ("eval", "lm_eval", "tasks", number)
        if task.endswith((".yaml", ".yml")) and not os.path.isfile(os.path.expanduser(task)):
            found.wrong(path, UsageError(f"there is no file {task}"))
        elif task in sets:
            found.wrong(path, UsageError(f"there is a set of the name {task}; rename the task or the set"))
    if section.include_path is not None and not os.path.isdir(os.path.expanduser(section.include_path)):
        found.wrong(("eval", "lm_eval", "include_path"), UsageError(f"there is no folder {section.include_path}"))
    if not is_installed("lm_eval"):
        what = "lm-evaluation-harness is not installed: pip install 'lorafit[lm-eval]'"
        found.unchecked(("eval", "lm_eval"), MissingError(what))
