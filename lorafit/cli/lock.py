"""`lorafit lock`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.options import Option, RecipeOptions


@dataclass(frozen=True)
class LockOptions(RecipeOptions):
    compare: Annotated[bool, Option("Write nothing; exit with 7 if anything drifted.", "--check")] = False


@command
def lock(options: LockOptions) -> None:
    from lorafit.lock import check_lock, lock_path, write_lock

    path = lock_path(options.config)
    if options.compare:
        found = check_lock(options.config, options.overrides)
        report = {"lock": str(path), "sha256": found.sha256, "drift": []}
        print_json(report) if options.as_json else typer.echo(f"{path}: nothing drifted")
        return
    path, written, changed = write_lock(options.config, options.overrides)
    if options.as_json:
        print_json({"lock": str(path), "sha256": written.sha256, "changed": changed})
        return
    for line in changed:
        typer.echo(line, err=True)
    typer.echo(str(path))
