"""`lorafit schema`."""

from __future__ import annotations

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.options.fields import Options


@command
def schema(_: Options) -> None:
    from lorafit.recipe.docs import json_schema

    print_json(json_schema())
