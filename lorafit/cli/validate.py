"""`lorafit validate`."""

from __future__ import annotations

import contextlib

import typer

from lorafit.cli.signature import command
from lorafit.errors import UsageError
from lorafit.options import ValidateOptions
from lorafit.written import verbatim


@command
def validate(options: ValidateOptions) -> None:
    from lorafit.validate.check import DeepCheck
    from lorafit.validate.check import validate as run_validate
    from lorafit.validate.findings import FORMATS

    format = options.format or ("json" if options.as_json else "text")
    if format not in FORMATS:
        raise UsageError(f"--format {format}: not one of {', '.join(FORMATS)}")
    check: DeepCheck | None = None
    if options.deep:
        from lorafit.engine.preview import check_deep as check
    report = run_validate(options, check)
    text = FORMATS[format](report)
    with verbatim() if format in ("json", "sarif") else contextlib.nullcontext():  # hidden in the values already
        typer.echo(text)
    if report.exit_code:
        raise typer.Exit(report.exit_code)
