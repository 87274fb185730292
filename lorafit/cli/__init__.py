"""The command line: parse, call, print. The only place that prints results or exits.

A command's module is named by it, and imported when the command runs or its own help is asked for. Heavy modules are
imported inside the commands.
"""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorafit.cli.complete import COMPLETE, answer
from lorafit.written import guard_streams

COMMANDS = {
    "Write a recipe": {
        "init": "Write a first recipe, with settings that fit; or convert another tool's.",
        "explain": "Show every value of a recipe, who set it where, and what it was set over.",
        "diff": "Compare two recipes by meaning, and say what follows from the change; exits with 7 if they differ.",
        "schema": "Print the recipe's JSON Schema (2020-12).",
    },
    "Check it": {
        "validate": "Check recipes: keys, values, target modules, data, memory. Every fault at its line, in a moment.",
        "estimate-vram": "Estimate a recipe's memory from tensor shapes, without weights or a GPU, and say where it "
        "fits.",
        "preview": "Show the data as the model will see it, and audit it; exits with 3 if training would be refused.",
        "smoke": "Run a recipe's whole pipeline for a few steps with a tiny random model, on the CPU.",
        "lock": "Write beside a recipe what it comes to: values, commits, hashes, versions; or check it.",
    },
    "Train": {
        "train": "Train as a recipe says, into its run directory.",
        "verify": "Compute a run's hashes once more, and see that it trains again as it did.",
    },
    "Judge what came of it": {
        "eval": "Compare base, adapter and merged model on the same rows, with intervals, gates and reports.",
        "bench": "Measure how fast base, adapter, merged and quantized model answer, and how much memory each takes.",
    },
    "Use it": {
        "merge": "Merge an adapter into its base, prove the result, and save it as a model that transformers loads "
        "alone.",
        "push": "Upload an adapter or a model with its card to a hub, private by default, and prove that it is there.",
        "chat": "Talk to a model in the terminal, and switch between base and adapters on the fly.",
    },
}
"""What each command does, by what it is for, in the order in which a recipe goes through them."""


class Commands(TyperGroup):
    """The commands, listed by what they are for, each imported when it is needed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names = {name: about for group in COMMANDS.values() for name, about in group.items()}
        self.commands = {name: TyperCommand(name, help=about) for name, about in names.items()}

    def get_command(self, ctx: Any, name: str) -> Any:
        listed = self.commands.get(name)
        if listed is None:
            return None
        module = name.replace("-", "_")
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(name, help=listed.help)(getattr(importlib.import_module(f"lorafit.cli.{module}"), module))
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        widest = max(map(len, self.commands))
        room = formatter.width - 6 - widest
        for title, group in COMMANDS.items():
            with formatter.section(title):
                rows = [(name.ljust(widest), self.commands[name].get_short_help_str(room)) for name in group]
                formatter.write_dl(rows)


app = typer.Typer(
    name="lorafit",
    cls=Commands,
    help="Fine-tune a language model from one YAML recipe, and know that it is true.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
