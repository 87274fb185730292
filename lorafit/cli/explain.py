"""`lorafit explain`."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from lorafit.cli.exits import print_json, warn
from lorafit.cli.signature import command
from lorafit.options import Argument, ForGpu, Here, RecipeOptions, hardware_for


@dataclass(frozen=True)
class ExplainOptions(RecipeOptions):
    key: Annotated[str | None, Argument("A section, such as training, or a value, such as lora.r.", "[KEY]")] = None
    gpu: ForGpu = None
    here: Here = False


@command
def explain(options: ExplainOptions) -> None:
    asked = hardware_for(options.gpu, options.here)
    from lorafit.explain import as_dict, text
    from lorafit.explain import explain as run_explain
    from lorafit.outcome import Outcomes
    from lorafit.recipe import Recipe

    recipe = Recipe.load(options.config, options.overrides)
    found = run_explain(Outcomes(asked).of(recipe, options.config.stem, count_rows=True), options.key)
    for line in found.remarks:
        warn(line)
    if options.as_json:
        print_json(as_dict(found))
    else:
        typer.echo(text(found, _width()))


def _width() -> int | None:
    """Columns of the terminal; None where nobody sees them."""
    seen = sys.stdout.isatty() or "COLUMNS" in os.environ
    return max(shutil.get_terminal_size().columns, 60) if seen else None
