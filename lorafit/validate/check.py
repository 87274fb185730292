"""The story of `lorafit validate`: find recipes, and check each as far as files, names and arithmetic can tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lorafit.errors import DataError, DoesNotFitError, MissingError, ModelError, UsageError
from lorafit.facts import ModelFacts, UnreachableError, read_facts
from lorafit.hardware import meant_device, meant_hardware, missing_packages
from lorafit.memory import Estimate, Setup, estimate, judged, setup_of
from lorafit.plan import Plan
from lorafit.plan.resolve import examine
from lorafit.plan.values import Context
from lorafit.progress import each
from lorafit.recipe import KeyPath, Recipe, RecipeError
from lorafit.rows import Row
from lorafit.run.directory import RunDir, located
from lorafit.text import gib, near
from lorafit.validate.contents import check_contents, first_rows, place_of_fault
from lorafit.validate.evaluation import check_evaluation
from lorafit.validate.find import find
from lorafit.validate.findings import PARTS, Checked, Fault, Findings, Options, Report


@dataclass
class Estimates:
    """Estimates by closed form. Recipes that differ in nothing that takes memory share one."""

    _known: dict[str, tuple[Estimate, str]] = field(default_factory=dict)

    def judge(self, setup: Setup, capacity: int) -> tuple[Estimate, str]:
        """The estimate and the verdict. Raises ModelError where only a trace can tell."""
        bare = dataclasses.replace(setup, facts=dataclasses.replace(setup.facts, config={}, tensors=(), tokenizer=None))
        key = f"{capacity} {bare}"
        if key not in self._known:
            self._known[key] = judged(lambda limit: estimate(setup, limit), capacity)
        return self._known[key]


def check_fit(found: Findings, plan: Plan, facts: ModelFacts, estimates: Estimates) -> None:
    """Note the sizes of the model and the adapter, and a fault if the stated memory is too small."""
    found.facts |= {
        "model": plan.model.name_or_path,
        "parameters": plan.model.parameters,
        "trainable_parameters": plan.trainable_parameters,
        "rows_per_step": plan.rows_per_step,
    }
    stated = found.recipe.hardware
    if stated is None or meant_device(found.recipe) is None or "memory" in found.options.skip:
        return
    path = ("hardware", "gpu" if stated.vram is None else "vram")
    if not facts.tensors:
        found.unchecked(
            path, ModelError(f"memory was not checked: the tensors of {facts.name} are not known without its files")
        )
        return
    try:
        _judge(found, setup_of(plan, facts), path, estimates)
    except ModelError as error:
        found.unchecked(path, error)


def _judge(found: Findings, setup: Setup, path: KeyPath, estimates: Estimates) -> None:
    """Raises ModelError where only a trace can tell."""
    device = meant_device(found.recipe)
    assert device is not None
    known, verdict = estimates.judge(setup, device.memory_bytes)
    found.facts |= {"peak_memory_bytes": known.total, "device": device.name, "fits": verdict}
    size = f"takes {gib(known.total)} GiB, from {gib(known.least)} to {gib(known.most)}"
    where = f"{device.name} ({gib(device.memory_bytes)} GiB)"
    if verdict == "does not fit":
        hint = "`lorafit estimate-vram` says what makes it smaller"
        found.wrong(path, DoesNotFitError(f"{size}, and does not fit in {where}; {hint}"))
    elif verdict == "tight":
        found.unchecked(path, DoesNotFitError(f"not certain to fit in {where}: {size}"))


@dataclass
class Checker:
    """Checks recipes one after the other, and looks once at what they share."""

    options: Options
    _estimates: Estimates = field(default_factory=Estimates)
    _facts: dict[tuple[str, str | None], ModelFacts | ModelError] = field(default_factory=dict)
    _rows: dict[tuple[str, int], tuple[Row, ...] | DataError] = field(default_factory=dict)

    def check(self, file: str) -> Checked:
        """Everything that is wrong with a recipe."""
        try:
            recipe = Recipe.load(file, self.options.overrides)
        except RecipeError as error:
            return _unreadable(file, error)
        found = Findings(recipe, self.options)
        plan, facts = self._planned(found, file)
        for path, message in missing_packages(recipe):
            note = found.wrong if self.options.here else found.unchecked
            note(path, MissingError(message))
        check_evaluation(found)
        if "data" not in self.options.skip:
            check_contents(found, self.rows)
        if plan is not None and facts is not None:
            check_fit(found, plan, facts, self._estimates)
            if self.options.deep and not found.faults:
                from lorafit.engine.deep import check_deep

                check_deep(found, file)
        return Checked(file, "recipe", tuple(dict.fromkeys(found.faults)), tuple(found.notes), found.facts)

    def rows(self, path: str, most: int) -> tuple[Row, ...]:
        """The first rows of a local source. Raises DataError."""
        if (path, most) not in self._rows:
            try:
                self._rows[path, most] = first_rows(path, most)
            except DataError as error:
                self._rows[path, most] = error
        found = self._rows[path, most]
        if isinstance(found, DataError):
            raise found
        return found

    def _planned(self, found: Findings, file: str) -> tuple[Plan | None, ModelFacts | None]:
        """The plan, if nothing stands against it, and what is known of the model."""
        recipe = found.recipe
        facts = None
        if "model" not in self.options.skip:
            try:
                facts = self._model(recipe)
            except UnreachableError as error:
                found.unchecked(("model", "name_or_path"), ModelError(f"the model was not checked: {error}"))
            except ModelError as error:
                found.wrong(("model", "name_or_path"), error)
        hardware = self.options.hardware or meant_hardware(recipe)
        context = Context(recipe, facts or ModelFacts(recipe.model.name_or_path, "hub", "nothing", {}, ()), hardware)
        try:
            plan = examine(context, Path(file).stem, "nothing" if "data" in self.options.skip else "formats")
        except ModelError as error:  # a chat template without an end
            found.wrong(("model", "name_or_path"), error)
            return None, None
        for mistake in context.mistakes:
            if facts is not None or not mistake.path.startswith("lora."):  # modules can't be told without the model
                found.faults.append(Fault(mistake, RecipeError.exit_code))
        try:
            RunDir(located(recipe.output_dir or f"runs/{Path(file).stem}")).refuse_others()
        except UsageError as error:
            found.wrong(("output_dir",), UsageError(str(error)))
        if facts is not None:
            found.notes += context.remarks
        for path, unreadable in context.faults:
            found.wrong(place_of_fault(found, path, unreadable, self.rows), unreadable)
        return plan, facts

    def _model(self, recipe: Recipe) -> ModelFacts:
        """Raises ModelError."""
        asked = recipe.model.name_or_path, recipe.model.revision
        if asked not in self._facts:
            try:
                self._facts[asked] = read_facts(*asked)
            except ModelError as error:
                self._facts[asked] = error
        found = self._facts[asked]
        if isinstance(found, ModelError):
            raise found
        return found


def _unreadable(file: str, error: RecipeError) -> Checked:
    """A recipe with mistakes, or a part of recipes, which may do without a model and data."""
    missing = {one.path for one in error.mistakes if one.message.startswith("is missing")}
    is_part = missing >= {"model", "dataset"}
    mistakes = [one for one in error.mistakes if not (is_part and one.path in ("model", "dataset"))]
    return Checked(file, "part" if is_part else "recipe", tuple(Fault(one, error.exit_code) for one in mistakes))


def validate(paths: Iterable[str], options: Options) -> Report:
    """Check every recipe that the paths name. Raises UsageError for a path without recipes, or an unknown part."""
    for part in options.skip:
        if part not in PARTS:
            raise UsageError(f"--skip {part}: no such part{near(part, PARTS)}")
    found = find(paths)
    checker = Checker(options)
    wrong = [one for one in found.skipped if one.is_recipe and options.strict]
    checked = [*map(checker.check, each(found.recipes, "validating", len(found.recipes), "recipes"))]
    checked += (one.as_fault() for one in wrong)
    return Report(tuple(checked), tuple(one for one in found.skipped if one not in wrong))
