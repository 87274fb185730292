"""The command line: parse, call, print. The only place that prints results or exits.

Heavy modules are imported inside the commands that need them.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from lorafit.cli.checking import validate
from lorafit.cli.common import reporting, show
from lorafit.cli.complete import COMPLETE, answer
from lorafit.cli.evaluation import bench, chat, evaluate
from lorafit.cli.locking import lock, verify
from lorafit.cli.memory import estimate_vram
from lorafit.cli.merging import merge
from lorafit.cli.review import diff, explain
from lorafit.cli.smoking import smoke
from lorafit.cli.starting import init
from lorafit.cli.training import preview, train
from lorafit.written import guard_streams

app = typer.Typer(
    name="lorafit",
    help="Fine-tune a language model from one YAML recipe, and know that it is true.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(init)
app.command()(validate)
app.command()(explain)
app.command()(diff)
app.command()(lock)
app.command()(smoke)
app.command("estimate-vram")(estimate_vram)
app.command()(preview)
app.command()(train)
app.command()(verify)
app.command("eval")(evaluate)
app.command()(merge)
app.command()(chat)
app.command()(bench)


@app.command()
@reporting
def schema() -> None:
    """Print the recipe's JSON Schema (2020-12)."""
    from lorafit.recipe.docs import json_schema

    show(json_schema())


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from lorafit import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    if COMPLETE in os.environ:
        answer(app)
    guard_streams()
    app()
