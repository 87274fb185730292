"""What a recipe measures and demands after training, as far as it can be told without a model."""

from __future__ import annotations

import os

from lorafit.errors import DataError, UsageError
from lorafit.targets import near
from lorafit.validate.findings import Findings


def check_evaluation(found: Findings) -> None:
    """Note gates on sets that there are none of, and a judge that can't be asked."""
    section = found.recipe.eval
    if section.gates and section.lm_eval is None:  # a task's figures are known once it has run
        _gates(found, ["heldout", *(one.name for one in section.sets), *section.forgetting])
    if section.judge is not None:
        from lorafit.evaluate.judge.endpoint import endpoint_of
        from lorafit.evaluate.judge.types import Judge

        try:  # the key is seldom where recipes are checked
            endpoint_of(Judge(**section.judge.model_dump(exclude={"api_key_env"})))
        except UsageError as error:
            where, _, what = str(error).partition(": ")
            found.wrong(tuple(where.split(".")), UsageError(what))


def check_benchmarks(found: Findings) -> None:
    """Note task files and folders of lm-evaluation-harness that are not there."""
    section = found.recipe.eval.lm_eval
    if section is None:
        return
    for number, task in enumerate(section.tasks):
        if task.endswith((".yaml", ".yml")) and not os.path.isfile(task):
            found.wrong(("eval", "lm_eval", "tasks", number), DataError(f"{task}: no such file"))
    if section.include_path is not None and not os.path.isdir(section.include_path):
        found.wrong(("eval", "lm_eval", "include_path"), DataError(f"{section.include_path}: no such folder"))


def _gates(found: Findings, known: list[str]) -> None:
    from lorafit.evaluate.gates import parse

    for number, gate in enumerate(found.recipe.eval.gates):
        for figure in parse(gate).figures():
            name = figure.removeprefix("baseline.").split(".")[0]
            if name not in known:
                what = f"there is no set {name}{near(name, known)}"
                found.wrong(("eval", "gates", number), UsageError(f"{figure}: {what}"))
