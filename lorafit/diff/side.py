"""One of two recipes that are compared: read, planned and estimated as far as that goes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from lorafit.diff.git import Revision, open_revision, run, split_revision
from lorafit.errors import DataError, ModelError, UsageError
from lorafit.hardware import Hardware, meant_device, meant_hardware
from lorafit.memory import Estimate, setup_of
from lorafit.outcome import Planned, planned
from lorafit.plan import Schedule, SourcePlan, make_schedule, validation_rows
from lorafit.plan.adapters import adapter_of
from lorafit.plan.data import counted
from lorafit.recipe import Recipe, load
from lorafit.rows.audit import Audit
from lorafit.text import first_line, printable
from lorafit.validate.check import Estimates
from lorafit.vram.answer import check_size, known_tensors
from lorafit.written import expanded

ENDLESS = 1 << 60
"""Bytes of a device that anything fits."""


@dataclass(frozen=True)
class Opened:
    """A recipe that was read.

    Attributes:
        name: as it was typed.
        stem: of its file's name.
        revision: None for a file on the disk.
    """

    name: str
    stem: str
    revision: Revision | None
    recipe: Recipe


@dataclass(frozen=True)
class Side(Opened):
    """A recipe and what it comes to.

    Attributes:
        steps: optimizer steps; None where they aren't known.
        rows: training rows; None likewise.
        epochs: passes over the rows; None likewise.
        audit: of exactly these rows, if it was made before.
        memory: None where it isn't known.
        fits: the verdict for the memory that the recipe states, if it states any.
        no_rows, no_steps, no_memory: why not.
    """

    plan: Planned
    steps: int | None
    rows: int | None
    epochs: float | None
    audit: Audit | None
    memory: Estimate | None
    fits: str | None
    no_rows: str | None
    no_steps: str | None
    no_memory: str | None

    @property
    def scale(self) -> float | None:
        """What the adapter's update is multiplied by; None for training in full."""
        return adapter_of(self.recipe).scale

    @property
    def tokens(self) -> int | None:
        """Tokens of an epoch, where an audit knows them."""
        return self.audit.training_rows.tokens if self.audit and self.audit.whole else None


def open_side(text: str) -> Opened:
    """A file, or `REV:path`. A file of that very name comes first. Raises UsageError and RecipeError."""
    parts = None if os.path.lexists(text) else split_revision(text)
    if parts is not None:
        revision, path = open_revision(text, *parts)
        return Opened(text, path.stem, revision, load(path, store=revision))
    if not os.path.exists(text):
        raise UsageError(f"{printable(text)}: there is no such file")
    return Opened(text, Path(text).stem, None, load(text))


@dataclass
class Examiner:
    """Plans and estimates sides. Data is counted once, and equal setups are estimated once."""

    hardware: Hardware | None
    """To plan for; None: what a recipe is meant for."""
    _estimates: Estimates = field(default_factory=Estimates)
    _counts: dict[tuple[str, int | None], int | None] = field(default_factory=dict)

    def examine(self, opened: Opened) -> Side:
        recipe = opened.recipe
        plan = planned(recipe, opened.stem, self.hardware or meant_hardware(recipe), count_rows=False)
        memory, fits, no_memory = self._memory(recipe, plan)
        rows, no_rows = self._rows(recipe, plan)
        schedule = _schedule(recipe, plan, rows)
        training = plan.training
        limited = training.max_steps > 0
        steps = schedule.total_steps if schedule else training.max_steps if limited else None
        epochs = None if limited else training.num_train_epochs
        if limited and schedule is not None and rows is not None:
            epochs = training.max_steps / schedule.steps_per_epoch
        return Side(
            **{item.name: getattr(opened, item.name) for item in fields(opened)},
            plan=plan,
            steps=steps,
            rows=rows,
            epochs=epochs,
            audit=Audit.from_dict(plan.plan.audit) if plan.plan and plan.plan.audit else None,
            memory=memory,
            fits=fits,
            no_rows=no_rows,
            no_steps=None
            if steps is not None
            else no_rows or "the rows are packed first, as `lorafit preview` does it",
            no_memory=no_memory,
        )

    def _memory(self, recipe: Recipe, plan: Planned) -> tuple[Estimate | None, str | None, str | None]:
        """The estimate, the verdict for the stated memory, and why there is no estimate."""
        if plan.facts is None or plan.plan is None:
            return None, None, plan.no_model or plan.refused
        device = meant_device(recipe)
        try:
            setup = setup_of(plan.plan, known_tensors(plan.facts))
            check_size(setup)
            known, verdict = self._estimates.judge(setup, device.memory_bytes if device else ENDLESS)
        except (ModelError, UsageError) as error:
            return None, None, first_line(error)
        return known, f"{verdict} ({device.name})" if device else None, None

    def _rows(self, recipe: Recipe, plan: Planned) -> tuple[int | None, str | None]:
        """The training rows, without those that validation takes, or why they aren't known."""
        if plan.plan and plan.plan.audit:
            return plan.plan.audit["training_rows"]["rows"], None
        if plan.no_rows is not None:
            return None, plan.no_rows
        if recipe.dataset.streaming:
            return None, "the rows are streamed"
        total = 0
        try:
            for source in plan.sources:
                rows = self._count(source)
                if rows is None:
                    return None, f"{source.path} is a hub data set, whose rows are counted once it is there"
                total += round(rows * source.weight)
        except (DataError, OSError) as error:
            return None, first_line(error)
        if not plan.sources:
            return None, plan.refused or plan.no_model
        fraction = recipe.dataset.validation if isinstance(recipe.dataset.validation, float) else None
        return total - validation_rows(total, fraction), None

    def _count(self, source: SourcePlan) -> int | None:
        """Raises DataError."""
        asked = source.path, source.max_rows
        if asked not in self._counts:
            self._counts[asked] = counted(source).rows
        return self._counts[asked]


def content_hash(side: Opened, path: str) -> str | None:
    """What the content of a file is told by, at the side's revision or on the disk; None if it isn't kept there."""
    file = expanded(path)
    try:
        if side.revision is not None:
            return side.revision.hash_of(Path(os.path.abspath(file)))
        if not file.is_file() or "\n" in path:
            return None
        return run("hash-object", "--stdin-paths", given=f"{os.path.abspath(file)}\n".encode()).decode().strip()
    except (UsageError, OSError, ValueError):
        return None


def _schedule(recipe: Recipe, plan: Planned, rows: int | None) -> Schedule | None:
    """The plan's, or one made from the rows alone, where these are not packed."""
    if plan.plan is not None and plan.plan.schedule is not None:
        return plan.plan.schedule
    if rows is None or recipe.training.packing:
        return None
    return make_schedule(rows, plan.training, plan.hardware.world_size)
