"""An evaluation as a recipe asks for it: its sets, and the files that decide what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorafit.evaluation.figures import HELD_OUT
from lorafit.evaluation.metrics import code_files
from lorafit.recipe.schema import EvalSection, EvalSet, LmEvalSection


def sets_of(section: EvalSection) -> dict[str, EvalSet]:
    """The sets of an evaluation by name: the held-out rows, those of the recipe, and those that come with lorafit."""
    own = {one.name: one for one in section.sets}
    built_in = {name: EvalSet(name=name, role="forgetting") for name in section.forgetting}
    return {HELD_OUT: EvalSet(name=HELD_OUT)} | own | built_in


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
