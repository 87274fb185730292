"""Metrics, gates, benchmarks and the judge of a recipe, checked as far as files tell: what `lorafit eval` refuses."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable, Iterator

from lorafit.errors import LorafitError, MissingError, UsageError
from lorafit.evaluation.figures import HELD_OUT, expected_figures, own_models, set_metrics
from lorafit.evaluation.gates import BASELINE, no_figure, parse
from lorafit.evaluation.metrics.known import JSON_DEFAULTS, POSSIBLE_DEFAULTS, MetricSpec, check_metric, metric_info
from lorafit.evaluation.results import Metric
from lorafit.hardware import is_installed, missing_packages
from lorafit.judge import endpoint_of
from lorafit.options.evaluate import RESERVED
from lorafit.plan.evaluation import sets_of
from lorafit.recipe import Recipe
from lorafit.recipe.schema import EvalSet
from lorafit.tree import KeyPath, dotted
from lorafit.validate.contents import check_contents, first_rows
from lorafit.validate.findings import Findings, Options


def refuse(recipe: Recipe, is_begun: bool) -> list[str]:
    """See that, besides its plan, nothing stands against a training or the evaluation after it, as files tell.

    Of a run that is begun, only what this machine lacks is looked for. Returns what it lacks for the evaluation alone,
    a sentence each. Raises RecipeError, DataError.
    """
    found, lacking = Findings(recipe, Options()), Findings(recipe, Options())
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
    sets, models = sets_of(section), own_models(not recipe.trains_base)
    metrics = {name: set_metrics(*_measured(recipe, one)) for name, one in sets.items()}
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


def _measured(recipe: Recipe, one: EvalSet) -> tuple[str, Iterator[Metric] | None, object, bool, bool]:
    """The arguments of `set_metrics`, as far as they are known without the rows."""
    specs = one.metrics or recipe.eval.metrics or POSSIBLE_DEFAULTS
    answers = map(metric_info, specs) if one.role == "task" else None
    return one.role, answers, one.options, True, recipe.eval.judge is not None


def _check_judge(found: Findings) -> None:
    """Note what can't be asked, and a key that is not here."""
    judge = found.recipe.eval.judge
    assert judge is not None
    for asked in (judge.model_copy(update={"api_key_env": None}), judge):
        try:
            endpoint_of(asked)
        except MissingError as error:  # the key is seldom where recipes are checked, and checks nothing
            if not found.options.strict:
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
