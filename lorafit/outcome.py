"""What a recipe comes to, as far as files can tell: facts, plan, rows, steps and memory, or the reason why not.

One `Outcomes` serves a command. It reads a model's facts once, counts a source's rows once and estimates equal setups
once, for all recipes and variants of recipes that it is asked about:

    outcomes = Outcomes()
    found = outcomes.of(recipe, "name-of-the-run")         # reads nothing yet

What commands for people take, which go on where something is missing, is None there, with a reason beside it:

    found.facts, found.no_model        found.plan, found.refused        found.rows, found.no_rows
    found.steps, found.no_steps        found.peak, found.fits, found.no_peak

What commands take that can't go on raises instead:

    found.require_facts(), found.require_plan(), found.setup, found.estimate(capacity), found.judged(capacity)

Everything is made when it is first asked for, and kept: hold on to an outcome, and make one for each variant. For
memory alone, `reading="nothing"` leaves the data files closed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from lorafit.errors import DataError, LorafitError, ModelError, UsageError
from lorafit.facts import ModelFacts, read_facts
from lorafit.hardware import Hardware, meant_device, meant_hardware
from lorafit.memory import Estimate, Setup, Sharding, check_size, estimate, judged, known_tensors, setup_of
from lorafit.plan import Choice, Plan, Schedule, SourcePlan, Training, make_schedule, validation_rows
from lorafit.plan.data import Reading, counted, plan_sources
from lorafit.plan.model import choose_dtype
from lorafit.plan.resolve import examine, training_kwargs, with_steps
from lorafit.plan.values import Context
from lorafit.recipe import Recipe, RecipeError
from lorafit.rows import data_files, is_local
from lorafit.rows.audit import Audit
from lorafit.text import first_line

MOST_BYTES = 32 << 20
"""Size of data files above which they are not read through: that would take more than a moment."""


@dataclass(eq=False)
class Outcomes:
    """Outcomes of recipes, and what they share.

    Attributes:
        hardware: to plan for; None: what each recipe is meant for.
        looks_up: whether models are looked up; else none is known.
    """

    hardware: Hardware | None = None
    looks_up: bool = True
    _facts: dict[tuple[str, str | None], ModelFacts | ModelError] = field(default_factory=dict)
    _counts: dict[tuple[str, int | None], int | None] = field(default_factory=dict)
    _estimates: dict[tuple[int, str, int | None], tuple[Setup, Estimate]] = field(default_factory=dict)

    def of(
        self,
        recipe: Recipe,
        name: str,
        hardware: Hardware | None = None,
        *,
        reading: Reading | None = None,
        count_rows: bool = False,
        sharding: Sharding | None = None,
    ) -> Outcome:
        """The outcome of a recipe, of which nothing is read yet.

        Args:
            name: of the run directory, if the recipe names none.
            hardware: to plan for, instead of this object's.
            reading: how far data files are read; None: "digests", or "formats" where they are large.
            count_rows: whether the plan's rows are counted for the number of steps, where no audit knows it.
            sharding: over several GPUs; None: what their number makes usual.
        """
        hardware = hardware or self.hardware or meant_hardware(recipe)
        return Outcome(recipe, name, hardware, self, reading, count_rows, sharding)

    def facts(self, name: str, revision: str | None) -> ModelFacts:
        """What is known of a model. Raises ModelError, of its kind UnreachableError where that says nothing of it."""
        if not self.looks_up:
            raise ModelError(f"{name}: is not looked up")
        if (name, revision) not in self._facts:
            try:
                self._facts[name, revision] = read_facts(name, revision)
            except ModelError as error:
                self._facts[name, revision] = error
        found = self._facts[name, revision]
        if isinstance(found, ModelError):
            raise found
        return found

    def count(self, source: SourcePlan) -> int | None:
        """Rows of a source; None for one on the hub. Raises DataError."""
        asked = source.path, source.max_rows
        if asked not in self._counts:
            self._counts[asked] = counted(source).rows
        return self._counts[asked]

    def estimate(self, setup: Setup, capacity: int | None = None) -> Estimate:
        """Estimate by closed form. Raises ModelError where only a trace can tell."""
        key = id(setup.facts), repr(dataclasses.replace(setup, facts=unknown_facts(""))), capacity
        if key not in self._estimates:
            self._estimates[key] = setup, estimate(setup, capacity)
        return self._estimates[key][1]

    def judged(self, setup: Setup, capacity: int) -> tuple[Estimate, str]:
        """The estimate and the verdict for a capacity. Raises ModelError where only a trace can tell."""
        return judged(lambda limit: self.estimate(setup, limit), capacity)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one recipe comes to on one machine, see this module's documentation and `Outcomes.of`."""

    recipe: Recipe
    name: str
    hardware: Hardware
    shared: Outcomes = field(repr=False)
    reading: Reading | None = None
    count_rows: bool = False
    sharding: Sharding | None = None

    def require_facts(self) -> ModelFacts:
        """Raises ModelError."""
        return self.shared.facts(self.recipe.model.name_or_path, self.recipe.model.revision)

    @cached_property
    def no_model(self) -> ModelError | None:
        """Why the model isn't known; an UnreachableError says nothing about the model."""
        try:
            self.require_facts()
        except ModelError as error:
            return error
        return None

    @property
    def facts(self) -> ModelFacts | None:
        return None if self.no_model else self.require_facts()

    @cached_property
    def examined(self) -> tuple[Context, Plan | None]:
        """Choices, mistakes, faults and remarks, and the plan without steps, if there are no mistakes.

        Where the model isn't known, that is for one of which nothing is. Raises ModelError for a chat template of the
        model's that can't be used.
        """
        context = self._context()
        reading = self.reading or ("formats" if self._too_large else "digests")
        return context, examine(context, self.name, reading)

    def _context(self) -> Context:
        return Context(self.recipe, self.facts or unknown_facts(self.recipe.model.name_or_path), self.hardware)

    @cached_property
    def _without_model(self) -> tuple[Context, Training, tuple[SourcePlan, ...]]:
        """What follows from the recipe, the machine and the rows alone: choices, the training, sources."""
        context = self._context()
        kwargs = training_kwargs(context, choose_dtype(context), bool(self.recipe.dataset.validation))
        sources, _ = plan_sources(context, "formats")
        return context, Training.of(kwargs), tuple(sources)

    def require_plan(self) -> Plan:
        """Raises ModelError, RecipeError with every choice that can't be carried out, DataError and UsageError."""
        if isinstance(self._made, LorafitError):
            raise self._made
        return self._made

    @cached_property
    def _made(self) -> Plan | LorafitError:
        try:
            return self._make()
        except LorafitError as error:
            return error

    @cached_property
    def slip(self) -> UsageError | None:
        """Why its steps or sizes can't be meant, such as a warm-up as long as the run; None where nothing says so."""
        try:
            self.require_plan()
            _ = self.setup
        except UsageError as error:
            return error
        except LorafitError:  # told by `refused`, or `no_model`
            return None
        return None

    def _make(self) -> Plan:
        self.require_facts()
        context, half = self.examined
        if half is None:
            raise RecipeError(context.mistakes)
        if context.faults:
            raise DataError("\n".join(str(error) for _, error in context.faults))
        is_read = self.reading == "digests" or (self.reading is None and not self._too_large)
        return with_steps(half, self.count_rows) if is_read else half

    @cached_property
    def plan(self) -> Plan | None:
        """None without the model, or where it can't be carried out; without steps where rows can't be read."""
        if self.facts is None:
            return None
        try:
            return self.require_plan()
        except (RecipeError, DataError, UsageError):
            return self.examined[1]

    @property
    def refused(self) -> str | None:
        """Why there is no plan although the model is known."""
        return None if self.facts is None else _several(one.message for one in self.examined[0].mistakes)

    @property
    def choices(self) -> dict[str, Choice]:
        """Resolved values by their key, with their reasons."""
        if self.plan is not None:
            return self.plan.choices
        return (self._without_model[0] if self.facts is None else self.examined[0]).choices

    @property
    def training(self) -> Training:
        """Values of the training; they are known without the model."""
        return self.plan.training if self.plan is not None else self._without_model[1]

    @property
    def sources(self) -> tuple[SourcePlan, ...]:
        """Sources of training rows; none where the plan is refused."""
        if self.plan is not None:
            return self.plan.data.train
        return self._without_model[2] if self.facts is None else ()

    @property
    def rows_per_step(self) -> int:
        return self.training.rows_per_step(self.hardware.world_size)

    @property
    def audit(self) -> Audit | None:
        """The audit of exactly these rows, if it was made before."""
        return Audit.from_dict(self.plan.audit) if self.plan and self.plan.audit else None

    # --- rows and steps ---------------------------------------------------------------------------

    @cached_property
    def _too_large(self) -> str | None:
        """Why data files are not read through, unless that is asked for; None if they can be."""
        dataset = self.recipe.dataset
        if dataset.streaming or self.reading is not None:
            return None
        validation = dataset.validation if isinstance(dataset.validation, tuple) else ()
        total = 0
        for source in (*dataset.train, *validation):
            try:
                total += sum(file.stat().st_size for file in data_files(source.path)) if is_local(source.path) else 0
            except (DataError, OSError):
                continue  # the plan says it
        size = f"{total / (1 << 20):,.0f} MiB of data files"
        if total <= MOST_BYTES:
            return None
        return f"{size} are not read through here; `lorafit train --dry-run` counts them"

    @property
    def unread(self) -> str | None:
        """Why rows were not read: a source's first can't be, or they are too many."""
        context = self._without_model[0] if self.facts is None else self.examined[0]
        return _several(str(fault) for _, fault in context.faults) or self._too_large

    @property
    def unknown(self) -> list[str]:
        """Why something isn't known, a sentence each."""
        no_model = first_line(self.no_model) if self.no_model else None
        return [reason for reason in (no_model, self.unread, self.refused) if reason]

    @cached_property
    def _counted(self) -> tuple[int | None, str | None]:
        if self.audit is not None:
            return self.audit.training_rows.rows, None
        if self.unread is not None:
            return None, self.unread
        if self.recipe.dataset.streaming:
            return None, "the rows are streamed"
        total = 0
        try:
            for source in self.sources:
                rows = self.shared.count(source)
                if rows is None:
                    return None, f"{source.path} is a hub data set, whose rows are counted once it is there"
                total += round(rows * source.weight)
        except (DataError, OSError) as error:
            return None, first_line(error)
        if not self.sources:
            return None, next(iter(self.unknown), None)
        fraction = self.recipe.dataset.validation if isinstance(self.recipe.dataset.validation, float) else None
        return total - validation_rows(total, fraction), None

    @property
    def rows(self) -> int | None:
        """Training rows, without those that validation takes."""
        return self._counted[0]

    @property
    def no_rows(self) -> str | None:
        return self._counted[1]

    @cached_property
    def schedule(self) -> Schedule | None:
        """The plan's, or one made from the rows alone, where these are not packed."""
        if self.plan is not None and self.plan.schedule is not None:
            return self.plan.schedule
        if self.rows is None or self.recipe.training.packing:
            return None
        return make_schedule(self.rows, self.training, self.hardware.world_size)

    @property
    def steps(self) -> int | None:
        """Optimizer steps."""
        limit = self.training.max_steps
        return self.schedule.total_steps if self.schedule else limit if limit > 0 else None

    @property
    def no_steps(self) -> str | None:
        if self.steps is not None:
            return None
        return self.no_rows or "the rows are packed first, as `lorafit preview` does it"

    @property
    def epochs(self) -> float | None:
        """Passes over the rows."""
        if self.training.max_steps <= 0:
            return self.training.num_train_epochs
        if self.schedule is None or self.rows is None:
            return None
        return float(self.training.max_steps / self.schedule.steps_per_epoch)

    # --- memory -----------------------------------------------------------------------------------

    @cached_property
    def setup(self) -> Setup:
        """One process's training step. Raises ModelError, RecipeError and UsageError."""
        facts = known_tensors(self.require_facts())
        if self.plan is None:
            raise RecipeError(self.examined[0].mistakes)
        setup = setup_of(self.plan, facts, self.sharding)
        check_size(setup)
        return setup

    def estimate(self, capacity: int | None = None) -> Estimate:
        """Estimate by closed form. Raises what `setup` raises, and ModelError where only a trace can tell."""
        return self.shared.estimate(self.setup, capacity)

    def judged(self, capacity: int) -> tuple[Estimate, str]:
        """The estimate and the verdict for a capacity. Raises the same."""
        return self.shared.judged(self.setup, capacity)

    @cached_property
    def _peak(self) -> tuple[Estimate | None, str | None, str | None]:
        if self.plan is None:
            return None, None, first_line(self.no_model) if self.no_model else self.refused
        device = meant_device(self.recipe)
        try:
            if device is None:
                return self.estimate(), None, None
            known, verdict = self.judged(device.memory_bytes)
        except (ModelError, UsageError) as error:
            return None, None, first_line(error)
        return known, f"{verdict} ({device.name})", None

    @property
    def peak(self) -> Estimate | None:
        """Memory at its peak; for what the recipe states, where it states any."""
        return self._peak[0]

    @property
    def fits(self) -> str | None:
        """The verdict for the memory that the recipe states, if it states any."""
        return self._peak[1]

    @property
    def no_peak(self) -> str | None:
        return self._peak[2]


def unknown_facts(name: str) -> ModelFacts:
    """Facts of a model of which nothing is known."""
    return ModelFacts(name, "hub", "nothing", {}, ())


def _several(messages: Iterable[str]) -> str | None:
    """The first of several messages, and how many there are."""
    unique = list(dict.fromkeys(messages))
    if not unique:
        return None
    more = f" (and {len(unique) - 1} more)" if len(unique) > 1 else ""
    return f"{first_line(unique[0])}{more}"
