"""`lorafit validate`, step by step: the recipes that paths name, and what files, names and arithmetic tell of each."""

from __future__ import annotations

import functools
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lorafit.bounds import expand, opened
from lorafit.errors import DoesNotFitError, MissingError, ModelError, UsageError
from lorafit.facts import UnreachableError
from lorafit.hardware import Hardware, meant_device, missing_packages
from lorafit.options import ValidateOptions
from lorafit.outcome import Outcome, Outcomes
from lorafit.plan import Plan
from lorafit.plan.adapters import adapter_of
from lorafit.progress import each
from lorafit.recipe import Recipe, RecipeError
from lorafit.recipe.layers import not_a_folder
from lorafit.recipe.yaml import MAX_BYTES
from lorafit.run.directory import RunDir, located
from lorafit.text import gib, near
from lorafit.tree import key_path
from lorafit.validate.contents import check_contents, check_evaluation, first_rows, place_of_fault
from lorafit.validate.findings import PARTS, Checked, Fault, Findings, Report, Skipped

ENDINGS = (".yaml", ".yml")
NOT_SEARCHED = ("node_modules", "__pycache__", "venv")
NO_FILE = "is no file"
MOST_LOOKED_AT = 10_000
"""Files behind a link that are looked at for recipes; where there are more, there may be some."""
FILE_KEYS = {"extends", "<<", *Recipe.model_fields}


@dataclass(frozen=True)
class Found:
    """Recipes in order, each once, and what folders and patterns hold besides."""

    recipes: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def find(paths: Iterable[str]) -> Found:
    """What the paths name. A file is taken as it is; a folder is searched. Raises UsageError where there is nothing."""
    recipes: dict[str, str] = {}
    left_out: dict[str, Skipped] = {}
    for path in paths:
        if os.path.isdir(path):
            inside = list(_inside(path))
        elif not os.path.exists(path) and glob.has_magic(path):
            inside = [
                one
                for match in sorted(expand(path, UsageError))
                for one in (_inside(match) if os.path.isdir(match) else [(match, None)] * _is_yaml(match))
            ]
        else:
            recipes.setdefault(_identity(path), path)
            continue
        chosen = 0
        for file, reason in inside:
            is_recipe = os.path.isdir(file) or _is_recipe(file, reason is None)
            if is_recipe and reason is None:
                recipes.setdefault(_identity(file), file)
                chosen += 1
            elif is_recipe or reason in (None, NO_FILE):
                why = Skipped(file, reason or "has none of a recipe's keys", is_recipe)
                left_out.setdefault(_identity(file), why)
        if not chosen and os.path.isfile(os.path.join(path, "plan.json")):
            raise UsageError(f"{path}: {not_a_folder(Path(path))}")
        if not chosen:
            raise UsageError(f"{path}: there are no recipes ({len(inside)} YAML files)")
    return Found(tuple(recipes.values()), tuple(one for key, one in left_out.items() if key not in recipes))


def _identity(file: str) -> str:
    """One name for all ways to write a path. A link in another folder is another recipe: its parents are others."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name)


def _is_yaml(file: str) -> bool:
    return file.lower().endswith(ENDINGS) and (
        os.path.isfile(file) or not os.path.exists(file)
    )  # a broken link is for the check


def _inside(folder: str) -> Iterator[tuple[str, str | None]]:
    """The YAML files below a folder and the links to other folders, each with the reason why it is not checked."""
    reasons: dict[str, str | None] = {os.path.normpath(folder): None}
    unread: list[OSError] = []
    for where, folders, files in os.walk(folder, onerror=unread.append):
        where = os.path.normpath(where)
        reason, is_run = reasons[where], {"plan.json", "recipe.yaml"} <= set(files)
        for name in sorted(folders):
            path = os.path.normpath(os.path.join(where, name))
            if os.path.islink(path) and _leads_to_recipes(path, folder):
                yield path, reason or "is a link to a folder, which is not followed"
            hidden = "is in a hidden folder" if name.startswith(".") else None
            reasons[path] = reason or hidden or (f"is in a folder {name}" if name in NOT_SEARCHED else None)
        folders.sort()
        for name in sorted(files):
            file = os.path.join(where, name)
            if not file.lower().endswith(ENDINGS):
                continue
            if not _is_yaml(file):
                yield file, reason or NO_FILE
                continue
            own = (
                "is hidden" if name.startswith(".") else "is a run's copy" if is_run and name == "recipe.yaml" else None
            )
            yield file, reason or own
    for error in unread:
        yield os.path.normpath(str(error.filename)), f"can't be read: {error.strerror}"


def _leads_to_recipes(link: str, folder: str) -> bool:
    """Whether a link leads out of the folder that is searched, to where there may be recipes."""
    target = os.path.realpath(link)
    if target.startswith(os.path.join(os.path.realpath(folder), "")):
        return False
    inside = (os.path.join(where, name) for where, _, files in os.walk(target) for name in files)
    looked_at = list(itertools.islice(inside, MOST_LOOKED_AT))
    found = (file for file in looked_at if file.lower().endswith(ENDINGS) and _is_recipe(file, False))
    return len(looked_at) == MOST_LOOKED_AT or next(found, None) is not None


def _is_recipe(file: str, doubtful: bool) -> bool:
    """Whether a YAML file has one of a recipe's keys at its top; `doubtful` for one that can't be read so."""
    try:
        with opened(Path(file)) as stream:
            text = stream.read(MAX_BYTES + 1)
        keys = [] if len(text) > MAX_BYTES else list(_top_keys(text.decode("utf-8-sig")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return doubtful
    return not FILE_KEYS.isdisjoint(keys) or (doubtful and (len(text) > MAX_BYTES or None in keys))


def _top_keys(text: str) -> Iterator[str | None]:
    """The keys of the documents in a text; None for one that is no text, and for a document without keys."""
    depth, is_key = 0, False
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.NodeEvent) and depth == 0 and not isinstance(event, yaml.MappingStartEvent):
            yield None
        if depth == 1 and isinstance(event, yaml.NodeEvent):
            is_key = not is_key
            if is_key and isinstance(event, yaml.ScalarEvent):
                yield event.value
            elif is_key:
                yield None
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)


DeepCheck = Callable[[Findings, str, Hardware], None]
"""A check of a recipe's whole data that loads torch: findings so far, the recipe's file, and the machine."""


class Checker:
    """Checks recipes one after the other, and looks once at what they share."""

    def __init__(self, options: ValidateOptions, deep: DeepCheck | None = None) -> None:
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
        found = Findings(recipe, options.strict)
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
                self._deep(found, file, outcome.hardware)
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
        adapter = f"{adapter_of(found.recipe).name}."
        for mistake in context.mistakes:
            if outcome.facts is not None or not mistake.path.startswith(adapter):  # modules are the model's
                found.faults.append(Fault(mistake, RecipeError.exit_code))
        try:
            RunDir(located(found.recipe.output_dir or f"runs/{outcome.name}")).refuse_others()
        except UsageError as error:
            found.wrong(("output_dir",), UsageError(str(error)))
        if outcome.facts is not None:
            found.notes += context.remarks
        for path, unreadable in context.faults:
            found.wrong(place_of_fault(found, path, unreadable, self._rows), unreadable)
        if outcome.slip is not None:
            key, _, what = str(outcome.slip).partition(": ")
            found.wrong(key_path(key), UsageError(what))
        return outcome.plan

    def _fit(self, found: Findings, outcome: Outcome, plan: Plan) -> None:
        """Note the sizes of the model and the adapter, and a fault if the stated memory is too small."""
        found.facts |= {
            "model": plan.model.name_or_path,
            "parameters": plan.model.parameters,
            "trainable_parameters": plan.trainable_parameters,
            "rows_per_step": plan.rows_per_step,
        }
        stated, device = found.recipe.hardware, meant_device(found.recipe)
        if stated is None or device is None or "memory" in self._options.skip:
            return
        path = ("hardware", "gpu" if stated.vram is None else "vram")
        try:
            known, verdict = outcome.judged(device.memory_bytes)
        except ModelError as error:
            found.unchecked(path, ModelError(f"memory was not checked: {error}"))
            return
        except UsageError:  # told above
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


def validate(options: ValidateOptions, deep: DeepCheck | None = None) -> Report:
    """Check every recipe that the paths name. Raises UsageError for a path without recipes, or an unknown part."""
    checker = Checker(options, deep)
    for part in options.skip:
        if part not in PARTS:
            raise UsageError(f"--skip {part}: no such part{near(part, PARTS)}")
    found = find(options.paths)
    wrong = [one for one in found.skipped if one.is_recipe and options.strict]
    checked = [*map(checker.check, each(found.recipes, "validating", len(found.recipes), "recipes"))]
    checked += (one.as_fault() for one in wrong)
    return Report(tuple(checked), tuple(one for one in found.skipped if one not in wrong))
