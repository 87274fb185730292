"""An evaluation as a recipe asks for it: its sets, and the files that decide what it finds."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from lorafit.errors import UsageError
from lorafit.evaluation.figures import BESIDE_OTHERS, HELD_OUT, set_metrics
from lorafit.evaluation.metrics import POSSIBLE_DEFAULTS, code_files, metric_info
from lorafit.evaluation.results import Metric
from lorafit.plan.methods import method_of
from lorafit.recipe import Recipe, Source
from lorafit.recipe.schema import EvalSection, EvalSet, LmEvalSection


def sets_of(section: EvalSection) -> dict[str, EvalSet]:
    """The sets of an evaluation by name: the held-out rows, those of the recipe, and those that come with lorafit."""
    own = {one.name: one for one in section.sets}
    built_in = {name: EvalSet(name=name, role="forgetting") for name in section.forgetting}
    return {HELD_OUT: EvalSet(name=HELD_OUT)} | own | built_in


def measured(recipe: Recipe, one: EvalSet) -> tuple[Metric, ...]:
    """The metrics of a set, as far as they are known without the rows."""
    specs = one.metrics or recipe.eval.metrics or POSSIBLE_DEFAULTS
    answers = map(metric_info, specs) if one.role == "task" else None
    return set_metrics(
        one.role, answers, one.options, True, recipe.eval.judge is not None, _may_be_pairs(recipe, one), True
    )


def _may_be_pairs(recipe: Recipe, one: EvalSet) -> bool:
    """Whether rows of a set may have a chosen and a rejected answer, as far as the recipe tells."""
    sources: tuple[Source | EvalSet, ...] = (one,)
    if one.path is None:
        held_out = recipe.dataset.validation
        sources = held_out if isinstance(held_out, tuple) else recipe.dataset.train
    return any(source.format in ("auto", "preference") for source in sources)


def best_by(recipe: Recipe, asked: str) -> tuple[str, bool]:
    """What metric_for_best_model names, and whether more of it is better. Raises UsageError."""
    name, validated = asked.removeprefix("eval_"), method_of(recipe).validated
    if name in validated:
        return name, validated[name]
    known = {
        f"{of_set}.{metric.name}": metric
        for of_set, one in sets_of(recipe.eval).items()
        for metric in measured(recipe, one)
        if metric.better is not None and metric not in BESIDE_OTHERS
    }
    if name in known:
        return name, known[name].better == "higher"
    near = difflib.get_close_matches(name, [*validated, *known], 1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join([*validated, *known])}"
    beside = name.rpartition(".")[2] in [metric.name for metric in BESIDE_OTHERS]
    why = ", which compares with another model" if beside else ""
    raise UsageError(f"{asked} is no figure that can be compared from step to step{why}{hint}")


def judging_files(section: EvalSection) -> dict[str, Path]:
    """The files that decide what an evaluation finds, by path: schemas, metrics of one's own and benchmark tasks."""
    found: dict[str, Path] = {}
    for spec in (spec for specs in (section.metrics, *(one.metrics for one in section.sets)) for spec in specs or ()):
        if isinstance(spec, dict):
            found |= {path: Path(path) for name, path in spec.items() if name == "json_schema"}
        elif ":" in spec:
            found |= code_files(spec)
    return found | {str(file): file for file in task_files(section.lm_eval)}


def task_files(asked: LmEvalSection | None) -> Iterator[Path]:
    """The files of own benchmark tasks: those that are named, and all in the folders of them."""
    for place in (*asked.tasks, *filter(None, [asked.include_path])) if asked else ():
        if place.endswith((".yaml", ".yml")):
            yield Path(place)
        elif Path(place).is_dir():
            yield from sorted(
                file for file in Path(place).rglob("*") if file.is_file() and "__pycache__" not in file.parts
            )
