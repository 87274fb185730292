"""`lorafit validate`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated

import typer

from lorafit.cli.signature import command
from lorafit.errors import UsageError
from lorafit.options import Argument, ForGpu, Here, JsonOptions, Option, Overrides, hardware_for
from lorafit.written import verbatim


@dataclass(frozen=True)
class ValidateOptions(JsonOptions):
    paths: Annotated[tuple[str, ...], Argument("Recipes, folders of them, or patterns.", "PATH", "recipes")]
    overrides: Overrides = ()
    deep: Annotated[bool, Option("Tokenize and audit all data as well; loads torch, but no weights.")] = False
    skip: Annotated[
        tuple[str, ...], Option("Leave a part out, such as data that is elsewhere.", "data|model|memory")
    ] = ()
    gpu: ForGpu = None
    here: Here = False
    strict: Annotated[bool, Option("What can't be checked is a fault.")] = False
    format: Annotated[str | None, Option("text, json, github, junit or sarif.  [default: text]", "FORMAT")] = None

    def check(self) -> None:
        if self.as_json and self.format not in (None, "json"):
            raise UsageError(f"--json and --format {self.format} exclude each other")


@command
def validate(options: ValidateOptions) -> None:
    from lorafit.validate.findings import FORMATS

    format = options.format or ("json" if options.as_json else "text")
    if format not in FORMATS:
        raise UsageError(f"--format {format}: not one of {', '.join(FORMATS)}")
    hardware = hardware_for(options.gpu, options.here)
    from lorafit.validate.check import DeepCheck
    from lorafit.validate.check import validate as run_validate
    from lorafit.validate.findings import Options

    check: DeepCheck | None = None
    if options.deep:
        from lorafit.engine.preview import check_deep as check
    asked = Options(options.overrides, options.skip, hardware, options.here, options.strict)
    report = run_validate(options.paths, asked, check)
    text = FORMATS[format](report)
    with verbatim() if format in ("json", "sarif") else contextlib.nullcontext():  # hidden in the values already
        typer.echo(text)
    if report.exit_code:
        raise typer.Exit(report.exit_code)
