"""`lorafit explain` and `lorafit diff`."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated

import typer

from lorafit.cli.common import AsJson, Config, ForGpu, Here, Overrides, fail, hardware_for, reporting, show
from lorafit.cli.complete import recipes
from lorafit.errors import DriftError, UsageError
from lorafit.progress import talk


@reporting
def explain(
    config: Config,
    key: Annotated[
        str | None, typer.Argument(metavar="[KEY]", help="A section, such as training, or a value, such as lora.r.")
    ] = None,
    overrides: Overrides = None,
    gpu: ForGpu = None,
    here: Here = False,
    as_json: AsJson = False,
) -> None:
    """Show every value of a recipe, who set it where, and what it was set over."""
    asked = hardware_for(gpu, here)
    from lorafit.explain import as_dict, text
    from lorafit.explain import explain as run_explain
    from lorafit.outcome import Outcomes
    from lorafit.recipe import Recipe

    recipe = Recipe.load(config, overrides or ())
    found = run_explain(Outcomes(asked).of(recipe, config.stem, count_rows=True), key)
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
    gpu: ForGpu = None,
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="text, markdown or json.")] = "text",
    as_json: AsJson = False,
) -> None:
    """Compare two recipes by meaning, and say what follows from the change; exits with 7 if they differ."""
    from lorafit.diff.text import FORMATS

    if format not in FORMATS:
        fail(f"--format {format}: not one of {', '.join(FORMATS)}", UsageError.exit_code)
    if against is None and len(paths) != 2:
        fail(
            f"expected two recipes, got {len(paths)}; to compare with a revision, give --against", UsageError.exit_code
        )
    from lorafit.diff.consequences import difference
    from lorafit.diff.pull_request import compare_all, shown

    hardware = hardware_for(gpu)
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
