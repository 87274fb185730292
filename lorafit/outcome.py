"""What a recipe comes to, as far as the files that are here can tell."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.errors import DataError, ModelError
from lorafit.facts import ModelFacts, read_facts
from lorafit.hardware import Hardware
from lorafit.plan import Choice, Plan, SourcePlan, Training, make_plan
from lorafit.plan.data import plan_sources
from lorafit.plan.model import choose_dtype
from lorafit.plan.resolve import examine
from lorafit.plan.training import training_kwargs
from lorafit.plan.values import Context
from lorafit.recipe import Recipe, RecipeError
from lorafit.rows import data_files, is_local
from lorafit.text import first_line

MOST_BYTES = 32 << 20
"""Of data files: larger ones are not read through, which would take more than a moment."""


@dataclass(frozen=True)
class Planned:
    """A plan, or what is known without one.

    Attributes:
        choices: resolved values by their key, with their reasons.
        plan: None without the model, or where it can't be carried out.
        facts: None where the model isn't known.
        training: known without the model.
        sources: of training rows.
        no_model: why the model isn't known.
        no_rows: why the rows weren't counted.
        refused: why there is no plan although the model is known.
    """

    hardware: Hardware
    choices: dict[str, Choice]
    plan: Plan | None
    facts: ModelFacts | None
    training: Training
    sources: tuple[SourcePlan, ...] = ()
    no_model: str | None = None
    no_rows: str | None = None
    refused: str | None = None

    @property
    def rows_per_step(self) -> int:
        return self.training.rows_per_step(self.hardware.world_size)

    @property
    def unknown(self) -> list[str]:
        """Why something isn't known, a sentence each."""
        return [reason for reason in (self.no_model, self.no_rows, self.refused) if reason]


def planned(recipe: Recipe, name: str, hardware: Hardware, count_rows: bool = True) -> Planned:
    """Plan a recipe without failing.

    Args:
        name: of the run directory, if the recipe names none.
        count_rows: whether data files are read through for the number of steps, where no audit knows it.
    """
    try:
        facts = read_facts(recipe.model.name_or_path, recipe.model.revision)
    except ModelError as error:
        return _without_model(recipe, hardware, first_line(error))
    large = _too_large(recipe)
    if large is None:
        try:
            plan = make_plan(recipe, facts, hardware, name, count_rows=count_rows)
            return Planned(hardware, plan.choices, plan, facts, plan.training, plan.data.train)
        except (RecipeError, DataError):
            pass  # said below, where the rest is planned as well
    context = Context(recipe, facts, hardware)
    half = examine(context, name, "formats")
    refused = _several([mistake.message for mistake in context.mistakes])
    faults = _several([str(fault) for _, fault in context.faults])
    training = half.training if half else _training(context)
    sources = half.data.train if half else ()
    return Planned(hardware, context.choices, half, facts, training, sources, None, faults or large, refused)


def _without_model(recipe: Recipe, hardware: Hardware, reason: str) -> Planned:
    """What follows from the recipe, the machine and the rows alone."""
    facts = ModelFacts(recipe.model.name_or_path, "hub", "nothing", {}, ())
    context = Context(recipe, facts, hardware)
    training = _training(context)
    sources, _ = plan_sources(context, "formats")
    no_rows = _several([str(fault) for _, fault in context.faults]) or _too_large(recipe)
    return Planned(hardware, context.choices, None, None, training, tuple(sources), reason, no_rows)


def _training(context: Context) -> Training:
    return Training.of(training_kwargs(context, choose_dtype(context), bool(context.recipe.dataset.validation)))


def _too_large(recipe: Recipe) -> str | None:
    """Why the rows are not counted; None if they can be."""
    dataset = recipe.dataset
    if dataset.streaming:
        return None
    validation = dataset.validation if isinstance(dataset.validation, tuple) else ()
    total = 0
    for source in (*dataset.train, *validation):
        try:
            total += sum(file.stat().st_size for file in data_files(source.path)) if is_local(source.path) else 0
        except (DataError, OSError):
            continue  # the plan says it
    size = f"{total / (1 << 20):,.0f} MiB of data files"
    return f"{size} are not read through here; `lorafit train --dry-run` counts them" if total > MOST_BYTES else None


def _several(messages: list[str]) -> str | None:
    """The first of several messages, and how many there are."""
    unique = list(dict.fromkeys(messages))
    if not unique:
        return None
    more = f" (and {len(unique) - 1} more)" if len(unique) > 1 else ""
    return f"{first_line(unique[0])}{more}"
