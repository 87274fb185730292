"""`lorafit train` and `lorafit preview`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.common import AsJson, Config, Overrides, fail, make_plan, reporting, show
from lorafit.errors import DataError
from lorafit.progress import talk
from lorafit.written import hidden_in, verbatim

if TYPE_CHECKING:
    from lorafit.plan import Plan
    from lorafit.recipe import Recipe


@reporting
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; load no weights.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; the old run is kept until the new one is done.")
    ] = False,
    locked: Annotated[
        bool, typer.Option("--locked", help="Refuse any drift from the recipe's lock; load the locked commits.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train as a recipe says, into its run directory."""
    if resume and overwrite:
        fail("--resume and --overwrite exclude each other", 2)
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe

    written, recipe = bytes_of(config), Recipe.load(config, overrides or ())
    lock: str | None = None
    if locked:
        plan, lock = plan_locked(recipe, config, dry_run)
    else:
        plan = plan_recipe(recipe, config, count_rows=dry_run)
    from lorafit.validate.evaluation import refuse

    for line in refuse(recipe, resume):
        talk().print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if dry_run:
        from lorafit.run.summary import print_plan
        from lorafit.vram.calibrate import foresee, shortage

        show(json.loads(plan.to_json())) if as_json else print_plan(plan)
        if plan.hardware.device == "cpu":
            foreseen = foresee(plan)
            short = shortage(foreseen)
            short_of = short.line if short else foreseen.reason and f"memory: {foreseen.reason}"
            if short_of:
                talk().print(short_of, style="yellow", highlight=False, markup=False, soft_wrap=True)
        if plan.audit:
            from lorafit.rows.audit import Audit, gate

            gate(Audit.from_dict(plan.audit), plan.data.audit)
        return
    if not written or bytes_of(config) != written:
        fail(f"{config}: has changed while it was read, or is no file; a run keeps its recipe as it was read", 2)
    from lorafit.run.directory import RunDir, located

    if os.environ.get("RANK", "0") == "0":
        RunDir(located(plan.output_dir)).refuse_busy()
    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.train import Start
    from lorafit.engine.train import train as run_training

    console = talk()
    for remark in plan.remarks:
        console.print(remark, style="yellow", highlight=False, soft_wrap=True)
    run = run_training(plan, written, Start(resume, overwrite, lock, recipe=str(config)), console)
    result = run.load_manifest().get("result", {}) | {"run": str(run.path), "result": str(run.result)}
    if os.environ.get("RANK", "0") != "0":
        return
    with verbatim():
        show(result) if as_json else typer.echo(f"{result['result']}")


def bytes_of(config: Path) -> bytes:
    """What is in a recipe's file; nothing where it is none."""
    from lorafit.bounds import read_bytes
    from lorafit.recipe.source import MAX_BYTES

    try:
        return read_bytes(config, MAX_BYTES)
    except (OSError, ValueError):  # making the plan says why
        return b""


def plan_locked(recipe: Recipe, config: Path, count_rows: bool) -> tuple[Plan, str]:
    """The plan with the locked commits, and the lock. Raises DriftError."""
    from lorafit.lock import held_lock, pinned
    from lorafit.plan import dated, plan_recipe

    lock = held_lock(config, recipe)
    plan = plan_recipe(pinned(recipe, lock), config, count_rows=count_rows)
    return dated(plan, lock.date or plan.data.date), lock.text


@reporting
def preview(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="Rows to show, from the first.")] = 3,
    row: Annotated[
        list[int] | None, typer.Option("--row", min=1, help="Show this row of the training rows (from 1); repeatable.")
    ] = None,
    validation: Annotated[bool, typer.Option("--validation", help="Show validation rows instead.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Show the token ids as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the data as the model will see it, and audit it; exits with 3 if training would be refused."""
    plan = make_plan(config, overrides)
    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.preview import preview as run_preview
    from lorafit.run.summary import print_preview

    report = run_preview(plan, row or list(range(1, rows + 1)), bool(row), validation, ids)
    seen = [row["segments"] for row in report["rows"]]  # which are what the model sees, whatever they hold
    report = hidden_in(report)
    for one, segments in zip(report["rows"], seen, strict=True):
        one["segments"] = segments
    with verbatim():
        show(report) if as_json else print_preview(report)
    if report["breaches"]:
        fail("\n".join(report["breaches"]), DataError.exit_code)
