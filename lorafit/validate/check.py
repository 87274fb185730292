"""The story of `lorafit validate`: find recipes, and check each as far as files, names and arithmetic can tell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from lorafit.errors import DoesNotFitError, MissingError, ModelError, UsageError
from lorafit.facts import UnreachableError
from lorafit.hardware import meant_device, missing_packages
from lorafit.memory import setup_of
from lorafit.outcome import Outcome, Outcomes
from lorafit.plan import Plan
from lorafit.progress import each
from lorafit.recipe import Recipe, RecipeError
from lorafit.run.directory import RunDir, located
from lorafit.text import gib, near
from lorafit.validate.contents import check_contents, first_rows, place_of_fault
from lorafit.validate.evaluation import check_evaluation
from lorafit.validate.find import find
from lorafit.validate.findings import PARTS, Checked, Fault, Findings, Options, Report

DeepCheck = Callable[[Findings, str], None]
"""A check of a recipe's whole data that loads torch: findings so far, and the recipe's file."""


class Checker:
    """Checks recipes one after the other, and looks once at what they share."""

    def __init__(self, options: Options, deep: DeepCheck | None = None) -> None:
        self._options = options
        self._deep = deep
        self._outcomes = Outcomes(options.hardware, looks_up="model" not in options.skip)
        self._rows = functools.cache(first_rows)

    def check(self, file: str) -> Checked:
        """Everything that is wrong with a recipe."""
        options = self._options
        try:
            recipe = Recipe.load(file, options.overrides)
        except RecipeError as error:
            return _unreadable(file, error)
        found = Findings(recipe, options)
        reads_data = "data" not in options.skip
        outcome = self._outcomes.of(recipe, Path(file).stem, reading="formats" if reads_data else "nothing")
        plan = self._plan(found, outcome)
        for path, message in missing_packages(recipe):
            note = found.wrong if options.here else found.unchecked
            note(path, MissingError(message))
        check_evaluation(found)
        if reads_data:
            check_contents(found, self._rows)
        if plan is not None:
            self._fit(found, outcome, plan)
            if self._deep is not None and not found.faults:
                self._deep(found, file)
        return Checked(file, "recipe", tuple(dict.fromkeys(found.faults)), tuple(found.notes), found.facts)

    def _plan(self, found: Findings, outcome: Outcome) -> Plan | None:
        """The plan for a known model, if nothing stands against it."""
        at_model = ("model", "name_or_path")
        if isinstance(outcome.no_model, UnreachableError):
            found.unchecked(at_model, ModelError(f"the model was not checked: {outcome.no_model}"))
        elif outcome.no_model is not None and "model" not in self._options.skip:
            found.wrong(at_model, outcome.no_model)
        try:
            context, _ = outcome.examined
        except ModelError as error:  # a chat template without an end
            found.wrong(at_model, error)
            return None
        for mistake in context.mistakes:
            if outcome.facts is not None or not mistake.path.startswith("lora."):  # modules are the model's
                found.faults.append(Fault(mistake, RecipeError.exit_code))
        try:
            RunDir(located(found.recipe.output_dir or f"runs/{outcome.name}")).refuse_others()
        except UsageError as error:
            found.wrong(("output_dir",), UsageError(str(error)))
        if outcome.facts is not None:
            found.notes += context.remarks
        for path, unreadable in context.faults:
            found.wrong(place_of_fault(found, path, unreadable, self._rows), unreadable)
        return outcome.plan

    def _fit(self, found: Findings, outcome: Outcome, plan: Plan) -> None:
        """Note the sizes of the model and the adapter, and a fault if the stated memory is too small."""
        found.facts |= {
            "model": plan.model.name_or_path,
            "parameters": plan.model.parameters,
            "trainable_parameters": plan.trainable_parameters,
            "rows_per_step": plan.rows_per_step,
        }
        stated, device, facts = found.recipe.hardware, meant_device(found.recipe), outcome.require_facts()
        if stated is None or device is None or "memory" in self._options.skip:
            return
        path = ("hardware", "gpu" if stated.vram is None else "vram")
        try:
            if not facts.tensors:
                what = f"the tensors of {facts.name} are not known without its files"
                raise ModelError(f"memory was not checked: {what}")
            known, verdict = self._outcomes.judged(setup_of(plan, facts), device.memory_bytes)
        except ModelError as error:
            found.unchecked(path, error)
            return
        found.facts |= {"peak_memory_bytes": known.total, "device": device.name, "fits": verdict}
        size = f"takes {gib(known.total)} GiB, from {gib(known.least)} to {gib(known.most)}"
        where = f"{device.name} ({gib(device.memory_bytes)} GiB)"
        if verdict == "does not fit":
            hint = "`lorafit estimate-vram` says what makes it smaller"
            found.wrong(path, DoesNotFitError(f"{size}, and does not fit in {where}; {hint}"))
        elif verdict == "tight":
            found.unchecked(path, DoesNotFitError(f"not certain to fit in {where}: {size}"))


def _unreadable(file: str, error: RecipeError) -> Checked:
    """A recipe with mistakes, or a part of recipes, which may do without a model and data."""
    missing = {one.path for one in error.mistakes if one.message.startswith("is missing")}
    is_part = missing >= {"model", "dataset"}
    mistakes = [one for one in error.mistakes if not (is_part and one.path in ("model", "dataset"))]
    return Checked(file, "part" if is_part else "recipe", tuple(Fault(one, error.exit_code) for one in mistakes))


def validate(paths: Iterable[str], options: Options, deep: DeepCheck | None = None) -> Report:
    """Check every recipe that the paths name. Raises UsageError for a path without recipes, or an unknown part."""
    for part in options.skip:
        if part not in PARTS:
            raise UsageError(f"--skip {part}: no such part{near(part, PARTS)}")
    found = find(paths)
    checker = Checker(options, deep)
    wrong = [one for one in found.skipped if one.is_recipe and options.strict]
    checked = [*map(checker.check, each(found.recipes, "validating", len(found.recipes), "recipes"))]
    checked += (one.as_fault() for one in wrong)
    return Report(tuple(checked), tuple(one for one in found.skipped if one not in wrong))
