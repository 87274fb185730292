"""`lorafit validate`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from lorafit.cli.common import AsJson, ForGpu, Here, Overrides, fail, hardware_for, reporting
from lorafit.cli.complete import recipes
from lorafit.errors import UsageError
from lorafit.written import verbatim


@reporting
def validate(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Recipes, folders of them, or patterns.", autocompletion=recipes)
    ],
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Tokenize and audit all data as well; loads torch, but no weights.")
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="data|model|memory", help="Leave a part out, such as data that is elsewhere."),
    ] = None,
    gpu: ForGpu = None,
    here: Here = False,
    strict: Annotated[bool, typer.Option("--strict", help="What can't be checked is a fault.")] = False,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="text, json, github, junit or sarif.  [default: text]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check recipes: keys, values, target modules, data, memory. Every fault at its line, in a moment."""
    from lorafit.validate.reports import FORMATS

    if as_json and format not in (None, "json"):
        fail(f"--json and --format {format} exclude each other", UsageError.exit_code)
    format = format or ("json" if as_json else "text")
    if format not in FORMATS:
        fail(f"--format {format}: not one of {', '.join(FORMATS)}", UsageError.exit_code)
    hardware = hardware_for(gpu, here)
    from lorafit.validate.check import DeepCheck
    from lorafit.validate.check import validate as run_validate
    from lorafit.validate.findings import Options

    check: DeepCheck | None = None
    if deep:
        from lorafit.engine.quiet import hush

        hush()
        from lorafit.engine.deep import check_deep as check
    options = Options(tuple(overrides or ()), tuple(skip or ()), hardware, here, strict)
    report = run_validate(paths, options, check)
    text = FORMATS[format](report)
    with verbatim() if format in ("json", "sarif") else contextlib.nullcontext():  # hidden in the values already
        typer.echo(text)
    if report.exit_code:
        raise typer.Exit(report.exit_code)
