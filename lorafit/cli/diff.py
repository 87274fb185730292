"""`lorafit diff`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from lorafit.cli.signature import command
from lorafit.errors import DriftError, UsageError
from lorafit.options import Argument, ForGpu, JsonOptions, Option, hardware_for


@dataclass(frozen=True)
class DiffOptions(JsonOptions):
    paths: Annotated[
        tuple[str, ...],
        Argument(
            "Two recipes, each a file, or REV:path from git, as main:a.yaml; or with --against, any.", "A B", "recipes"
        ),
    ]
    against: Annotated[str | None, Option("Compare recipes, folders or patterns with those of a revision.", "REV")] = (
        None
    )
    gpu: ForGpu = None
    format: Annotated[str, Option("text, markdown or json.", "FORMAT")] = "text"


@command
def diff(options: DiffOptions) -> None:
    from lorafit.diff.text import FORMATS, shown

    paths, format = options.paths, options.format
    if format not in FORMATS:
        raise UsageError(f"--format {format}: not one of {', '.join(FORMATS)}")
    if options.against is None and len(paths) != 2:
        raise UsageError(f"expected two recipes, got {len(paths)}; to compare with a revision, give --against")
    from lorafit.diff.consequences import Difference, Many, compare_all, difference

    hardware = hardware_for(options.gpu)
    found: Difference | Many
    if options.against is not None:
        found = compare_all(options.against, paths, hardware)
    else:
        found = difference(paths[0], paths[1], hardware)
    typer.echo(shown(found, "json" if options.as_json else format))
    if found.differs:
        raise typer.Exit(DriftError.exit_code)
