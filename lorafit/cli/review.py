"""`lorafit explain` and `lorafit diff`."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated

import typer

from lorafit.cli.common import AsJson, Config, Overrides, fail, reporting, show, talk
from lorafit.cli.complete import gpus, recipes
from lorafit.errors import DriftError, UsageError


@reporting
def explain(
    config: Config,
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="A section, such as training, or a value, such as lora.r.")
    ] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="Plan for this GPU, not what the recipe is meant for.", autocompletion=gpus
        ),
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="Plan for this machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every value of a recipe, who set it where, and what it was set over."""
    if gpu is not None and here:
        fail("--gpu and --here exclude each other", UsageError.exit_code)
    from lorafit.explain.make import explain as run_explain
    from lorafit.explain.planned import planned
    from lorafit.explain.show import as_dict, text
    from lorafit.hardware import detect
    from lorafit.plan.meant import hardware_of, meant_hardware
    from lorafit.recipe import Recipe
    from lorafit.vram.gpus import find_gpu

    recipe = Recipe.load(config, overrides or ())
    hardware = hardware_of(find_gpu(gpu)) if gpu is not None else detect() if here else meant_hardware(recipe)
    found = run_explain(recipe, planned(recipe, config.stem, hardware), key)
    for remark in found.remarks:
        talk().print(remark, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        show(as_dict(found))
    else:
        typer.echo(text(found, _width()))


def _width() -> int | None:
    """Columns of the terminal; None where nobody sees them."""
    seen = sys.stdout.isatty() or "COLUMNS" in os.environ
    return max(shutil.get_terminal_size().columns, 60) if seen else None


@reporting
def diff(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="A B",
            help="Two recipes, each a file, or REV:path from git, as main:a.yaml; or with --against, any.",
            autocompletion=recipes,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="REV", help="Compare recipes, folders or patterns with those of a revision."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="Plan for this GPU, not what each recipe is meant for.", autocompletion=gpus
        ),
    ] = None,
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="text, markdown or json.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Compare two recipes by meaning, and say what follows from the change; exits with 7 if they differ."""
    from lorafit.difference.show import FORMATS

    if format not in FORMATS:
        fail(f"--format {format}: not one of {', '.join(FORMATS)}", UsageError.exit_code)
    if against is None and len(paths) != 2:
        fail(
            f"expected two recipes, got {len(paths)}; to compare with a revision, give --against", UsageError.exit_code
        )
    from lorafit.difference.make import difference
    from lorafit.difference.many import compare_all, shown
    from lorafit.plan.meant import hardware_of
    from lorafit.vram.gpus import find_gpu

    hardware = hardware_of(find_gpu(gpu)) if gpu is not None else None
    if against is not None:
        many = compare_all(against, paths, hardware)
        typer.echo(shown(many, "json" if as_json else format))
        if many.differs:
            raise typer.Exit(DriftError.exit_code)
        return
    found = difference(paths[0], paths[1], hardware)
    typer.echo(FORMATS["json" if as_json else format](found).rstrip("\n"))
    if found.changes:
        raise typer.Exit(DriftError.exit_code)
