"""`lorafit train`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.exits import print_json, warn
from lorafit.cli.signature import command
from lorafit.errors import UsageError
from lorafit.options import Option, RecipeOptions
from lorafit.progress import talk
from lorafit.written import verbatim

if TYPE_CHECKING:
    from lorafit.plan import Plan
    from lorafit.recipe import Recipe


@dataclass(frozen=True)
class TrainOptions(RecipeOptions):
    dry_run: Annotated[bool, Option("Show the plan; load no weights.")] = False
    resume: Annotated[bool, Option("Go on from the last checkpoint.")] = False
    overwrite: Annotated[bool, Option("Start anew; the old run is kept until the new one is done.")] = False
    locked: Annotated[bool, Option("Refuse any drift from the recipe's lock; load the locked commits.")] = False

    def check(self) -> None:
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other")


@command
def train(options: TrainOptions) -> None:
    from lorafit.recipe import Recipe
    from lorafit.validate.contents import refuse

    written, recipe = bytes_of(options.config), Recipe.load(options.config, options.overrides)
    plan, lock = planned(recipe, options)
    for line in refuse(recipe, options.resume):
        warn(line)
    if options.dry_run:
        show_plan(plan, options.as_json)
        return
    if not written or bytes_of(options.config) != written:
        raise UsageError(
            f"{options.config}: has changed while it was read, or is no file; a run keeps its recipe as it was read"
        )
    from lorafit.run.directory import RunDir, located

    is_first = os.environ.get("RANK", "0") == "0"
    if is_first:
        RunDir(located(plan.output_dir)).refuse_busy()

    from lorafit.engine.train import train as run_training
    from lorafit.run.manifest import Start

    for remark in plan.remarks:
        warn(remark)
    start = Start(options.resume, options.overwrite, lock, recipe=str(options.config))
    run = run_training(plan, written, start, talk())
    result = run.load_manifest().get("result", {}) | {"run": str(run.path), "result": str(run.result)}
    if is_first:
        with verbatim():
            print_json(result) if options.as_json else typer.echo(f"{result['result']}")


def bytes_of(config: Path) -> bytes:
    """What is in a recipe's file; nothing where it is none."""
    from lorafit.bounds import read_bytes
    from lorafit.recipe.yaml import MAX_BYTES

    try:
        return read_bytes(config, MAX_BYTES)
    except (OSError, ValueError):  # making the plan says why
        return b""


def planned(recipe: Recipe, options: TrainOptions) -> tuple[Plan, str | None]:
    """The plan; with --locked for the locked commits, and the lock. Raises DriftError."""
    from lorafit.lock import held_lock, pinned
    from lorafit.plan import dated, plan_recipe

    if not options.locked:
        return plan_recipe(recipe, options.config, count_rows=options.dry_run), None
    lock = held_lock(options.config, recipe)
    plan = plan_recipe(pinned(recipe, lock), options.config, count_rows=options.dry_run)
    return dated(plan, lock.date or plan.data.date), lock.text


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print a plan, and say what speaks against it. Raises DataError for data that would be refused."""
    from lorafit.run.memory import foresee, shortage
    from lorafit.run.summary import print_plan

    print_json(json.loads(plan.to_json())) if as_json else print_plan(plan)
    if plan.hardware.device != "cuda":
        foreseen = foresee(plan)
        short = shortage(foreseen)
        line = short.line if short else foreseen.reason and f"memory: {foreseen.reason}"
        if line:
            warn(line)
    if plan.audit:
        from lorafit.rows.audit import Audit, gate

        gate(Audit.from_dict(plan.audit), plan.data.audit)
