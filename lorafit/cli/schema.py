"""`lorafit schema`: the JSON Schema of a recipe, made from the fields and their docstrings."""

from __future__ import annotations

import json
from typing import Any

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.options import Options


@command
def schema(_: Options) -> None:
    print_json(json_schema())


EXTENDS = (
    "Recipes to start from: a path or a list of paths, relative to this file. Mappings are merged, the child wins, "
    "lists replace, null removes."
)


def json_schema() -> dict[str, Any]:
    """A closed JSON Schema (2020-12) of a recipe file, for editors.

    A file may leave to its parents what a whole recipe needs, so nothing is required here; `lorafit`
    itself checks that a recipe is complete.
    """
    from lorafit.recipe.schema import Recipe

    schema = Recipe.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
        part.pop("title", None)
        for name, value in part.get("properties", {}).items():
            part["properties"][name] = _with_environment(value)
    schema["properties"] = {
        "extends": {
            "description": EXTENDS,
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        **schema["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorafit recipe",
        **schema,
    }


_ENVIRONMENT = {"type": "string", "pattern": r"^\$\{[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?\}$"}


def _with_environment(value: dict[str, Any]) -> dict[str, Any]:
    """Let a value also be a reference to the environment; sections stay as they are."""
    value = {key: item for key, item in value.items() if key != "title"}
    text = json.dumps(value)
    if '"$ref"' in text:
        return value
    described: dict[str, Any] = {key: value.pop(key) for key in ("description", "default") if key in value}
    choices = value["anyOf"] if set(value) == {"anyOf"} else [value]
    return {**described, "anyOf": [*choices, _ENVIRONMENT]}
