"""`lorafit preview`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import DataError
from lorafit.options import Option, RecipeOptions
from lorafit.written import hidden_in, verbatim


@dataclass(frozen=True)
class PreviewOptions(RecipeOptions):
    rows: Annotated[int, Option("Rows to show, from the first.", "--rows -n", min=0)] = 3
    row: Annotated[tuple[int, ...], Option("Show this row of the training rows (from 1); repeatable.", min=1)] = ()
    validation: Annotated[bool, Option("Show validation rows instead.")] = False
    ids: Annotated[bool, Option("Show the token ids as well.")] = False


@command
def preview(options: PreviewOptions) -> None:
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe

    plan = plan_recipe(Recipe.load(options.config, options.overrides), options.config, count_rows=False)

    from lorafit.engine.preview import preview as run_preview
    from lorafit.run.summary import print_preview

    numbers = list(options.row or range(1, options.rows + 1))
    report = run_preview(plan, numbers, bool(options.row), options.validation, options.ids)
    seen = report["rows"]  # whose segments are what the model sees, whatever they hold
    report = hidden_in(report)
    for shown, row in zip(report["rows"], seen, strict=True):
        shown |= {name: row[name] for name in ("segments", "rejected") if name in row}
    with verbatim():
        print_json(report) if options.as_json else print_preview(report)
    if report["breaches"]:
        raise DataError("\n".join(report["breaches"]))
