"""Located values -> a Recipe, or every mistake at once in a RecipeError."""

from __future__ import annotations

import copy
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lorafit.errors import LorafitError
from lorafit.recipe.checks import cross_check
from lorafit.recipe.schema import Recipe
from lorafit.recipe.source import (
    Located,
    Mistake,
    Position,
    SourceMistakes,
    apply_overrides,
    dotted,
    read_with_parents,
)

KeyPath = tuple[str | int, ...]

_ALIASES = {
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "max_seq_length": "training.max_length",
    "sequence_len": "training.max_length",
    "cutoff_len": "training.max_length",
    "sample_packing": "training.packing",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "optimizer": "training.optim",
    "warmup": "training.warmup_ratio",
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "datasets": "dataset.train",
    "val_set_size": "dataset.validation",
}
"""What other tools and habit call some fields, for the hint only."""


class RecipeError(LorafitError):
    """Everything that is wrong in a recipe, one line each.

    Attributes:
        mistakes: in the order of the files' lines.
    """

    exit_code = 2

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        unique = {str(mistake): mistake for mistake in mistakes}
        self.mistakes = tuple(
            sorted(unique.values(), key=lambda m: (m.position.file, m.position.line or 0, m.position.column or 0))
        )
        super().__init__("\n".join(map(str, self.mistakes)))


def load(
    path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> Recipe:
    """Read a recipe file with its parents and `--set` overrides. Raises RecipeError."""
    try:
        root, _ = read_with_parents(Path(path), environment)
        root = apply_overrides(root, tuple(overrides))
    except SourceMistakes as error:
        raise RecipeError(error.mistakes) from None
    except OSError as error:  # such as a path with a NUL character or too many links
        raise RecipeError([Mistake(Position(str(path)), "", f"can't be read: {error}")]) from None
    except ValueError as error:
        raise RecipeError([Mistake(Position(repr(str(path))), "", f"is not a path: {error}")]) from None
    return validate(root)


def validate(root: Located) -> Recipe:
    """Validate located values. Raises RecipeError with every mistake, cross-field ones included."""
    data = root.plain()
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        grouped = _group(error, data)
        mistakes = [_to_mistake(root, path, errors) for path, errors in grouped.items()]
        # The rest of the recipe is still checked: without the wrong values, as far as that goes.
        for path in sorted(grouped, key=len, reverse=True):
            _repair(data, path)
        try:
            remaining = Recipe.model_validate(data)
        except ValidationError:
            remaining = None
        if remaining is not None:
            wrong = {path[:-1] for path in grouped} | set(grouped)
            mistakes += [
                locate(root, path, message) for path, message in cross_check(remaining) if path not in wrong
            ]
        raise RecipeError(mistakes) from None
    mistakes = [locate(root, path, message) for path, message in cross_check(recipe)]
    if mistakes:
        raise RecipeError(mistakes)
    recipe.remember_source(root)
    return recipe


def locate(root: Located, path: KeyPath, message: str, *, at_key: bool = False) -> Mistake:
    """A mistake about the value at `path`, at the position of the deepest part that was written."""
    node, found = root.find(path)
    position = node.key if (at_key or found != path) and node.key else node.position
    return Mistake(position, dotted(path), message)


# --- pydantic's errors, in our words --------------------------------------------------------------


def _group(error: ValidationError, data: Any) -> dict[KeyPath, list[Any]]:
    """Errors by the path of the value they are about.

    Pydantic names the branches of a union in `loc`; only steps that exist in the data (or, at the
    end, the missing key) belong to the path. When a branch got further into the value than others
    (a list of sources, of which one is wrong), only the furthest is what was meant.
    """
    grouped: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False, include_context=True):
        path: list[str | int] = []
        current = data
        for position, step in enumerate(item["loc"]):
            last = position == len(item["loc"]) - 1
            if isinstance(current, dict) and step in current:
                current = current[step]
            elif isinstance(current, list) and isinstance(step, int) and step < len(current):
                current = current[step]
            elif not (last and item["type"] == "missing"):
                continue
            path.append(step)
        grouped.setdefault(tuple(path), []).append(item)
    return {
        path: errors
        for path, errors in grouped.items()
        if any(e["type"] in ("missing", "extra_forbidden") for e in errors)
        or not any(other != path and other[: len(path)] == path for other in grouped)
    }


_STAND_INS: dict[str, Any] = {
    "name_or_path": "?",
    "path": "?",
    "train": [{"path": "?"}],
    "model": {"name_or_path": "?"},
    "dataset": {"train": [{"path": "?"}]},
}
"""Values for required keys that are wrong or missing, so that the rest can still be checked."""


def _repair(data: Any, path: KeyPath) -> None:
    """Take a wrong value out of the data (with its whole list, if it stands in one)."""
    while path and isinstance(path[-1], int):
        path = path[:-1]
    for step in path[:-1]:
        if isinstance(data, dict) and step in data:
            data = data[step]
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        else:
            return
    if path and isinstance(data, dict):
        data.pop(path[-1], None)
        if path[-1] in _STAND_INS:
            data[path[-1]] = copy.deepcopy(_STAND_INS[str(path[-1])])


def _to_mistake(root: Located, path: KeyPath, errors: list[Any]) -> Mistake:
    kind = errors[0]["type"]
    if kind == "extra_forbidden":
        return locate(root, path, _unknown_key(path), at_key=True)
    if kind == "missing":
        return locate(root, path, f"is missing{_what_it_is(path)}")
    node, _ = root.find(path)
    expected = list(dict.fromkeys(_expectation(item) for item in errors))
    got = _shorten(node.plain())
    message = f"expected {' or '.join(expected)}, got {got}"
    if isinstance(node.value, str):
        choices = [c for item in errors if item["type"] == "literal_error" for c in _choices(item)]
        message += _suggest(node.value, choices)
    return locate(root, path, message)


_EXPECTATIONS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that isn't empty",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "a list that isn't empty",
    "dict_type": "a mapping",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
    "none_required": "null",
}


def _expectation(item: Any) -> str:
    context = item.get("ctx", {})
    kind = item["type"]
    if kind in _EXPECTATIONS:
        return _EXPECTATIONS[kind]
    if kind == "literal_error":
        return " | ".join(_choices(item))
    if kind == "greater_than":
        return f"a number above {context['gt']:g}"
    if kind == "greater_than_equal":
        return f"a number of at least {context['ge']:g}"
    if kind == "less_than":
        return f"a number below {context['lt']:g}"
    if kind == "less_than_equal":
        return f"a number of at most {context['le']:g}"
    if kind == "string_pattern_mismatch":
        return context["pattern"].strip("^$()").replace("|", " | ").replace("[0-9]+", "N")
    return str(item["msg"])


def _choices(item: Any) -> list[str]:
    return [part.strip("'") for part in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _shorten(value: Any, limit: int = 60) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def _unknown_key(path: KeyPath) -> str:
    parent, key = path[:-1], str(path[-1])
    model = section_at(parent)
    known = list(model.model_fields) if model else []
    if not parent:
        known.append("extends")
    elsewhere = [dotted((*where, key)) for where, section in sections() if key in section.model_fields]
    target = elsewhere[0] if elsewhere else _ALIASES.get(key)
    if target:
        return f"unknown key; did you mean '{target}'?"
    return f"unknown key{_suggest(key, known) or '; known keys: ' + ', '.join(known)}"


def _what_it_is(path: KeyPath) -> str:
    model = section_at(path[:-1])
    field = model.model_fields.get(str(path[-1])) if model else None
    if field is None or field.description is None:
        return ""
    return f" ({' '.join(field.description.split()).partition('. ')[0].rstrip('.')})"


@functools.cache
def sections() -> list[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every section of the recipe with its path, `dataset.train` for a source."""
    found: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), Recipe)]
    for where, section in found:
        for name, info in section.model_fields.items():
            nested = _nested_model(info.annotation)
            if nested is not None:
                found.append(((*where, name), nested))
    return found


def section_at(path: KeyPath) -> type[BaseModel] | None:
    names = tuple(step for step in path if isinstance(step, str))
    return dict(sections()).get(names)


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        for part in typing.get_args(annotation):
            nested = _nested_model(part)
            if nested is not None:
                return nested
    return None
