"""A recipe's values, each with the line where it was written -> a Recipe, or every mistake at once."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import re
import types
import typing
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lorafit.recipe.layers import Disk, Draft, read_recipe
from lorafit.recipe.rules import cross_check
from lorafit.recipe.schema import Recipe
from lorafit.recipe.start import on_its_start
from lorafit.recipe.yaml import Located, Mistake, RecipeError, holds
from lorafit.text import clipped
from lorafit.tree import KeyPath, dotted
from lorafit.written import Reference, remember, value_of

MAX_SUGGESTIONS = 100
"""Unknown keys that get a suggestion; finding one takes a while, and no recipe has so many."""

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


_ELSEWHERE = {
    "resume_from_checkpoint": "goes on from the last checkpoint with `lorafit train --resume`, which needs no path",
    "bf16": "is decided by model.dtype",
    "fp16": "is decided by model.dtype",
    "deepspeed": "is the launcher's: `accelerate launch` or torchrun",
    "fsdp": "is the launcher's: `accelerate launch` or torchrun",
    "hub_token": "does not belong in a file; the hub's client reads HF_TOKEN",
    "wandb_project": "is an environment variable of the tracker, see training.report_to",
}
"""What other tools have as keys and lorafit elsewhere, for the hint only."""


def load(
    path: str | Path,
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
    store: Disk | None = None,
) -> Recipe:
    """Read a recipe file with its parents and `--set` overrides, from the disk or another store. Raises RecipeError."""
    return validate(on_its_start(read_recipe(Path(path), overrides, _is_key, environment, store)))


def validate(draft: Draft) -> Recipe:
    """Make a recipe of what was read. Raises RecipeError with every mistake, cross-field ones included."""
    root = draft.root
    references = dict(_references(root))
    remember(references)
    data = _without_removed(root)
    wrong: dict[KeyPath, list[Any]] = {}
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        wrong = _group(error, data)
        # The rest of the recipe is still checked: without the wrong values, as far as that goes.
        for path in sorted(wrong, key=len, reverse=True):
            _repair(data, path)
        with contextlib.suppress(ValidationError):
            recipe = Recipe.model_validate(data)
    unknown = [path for path, errors in wrong.items() if errors[0]["type"] == "extra_forbidden"]
    meant = {path: near_key(path) for path in unknown[:MAX_SUGGESTIONS]}
    mistakes = list(draft.mistakes)
    mistakes += _schema_mistakes(draft, wrong, meant)
    if recipe is not None and draft.complete:
        doubtful = {_name(path) for path in (*wrong, *meant.values()) if path}
        doubtful |= {mistake.path.rpartition(".")[2] for mistake in draft.mistakes}
        mistakes += _broken_rules(root, recipe, doubtful)
    if mistakes or recipe is None:
        raise RecipeError(mistakes)
    recipe.remember_source(root, references)
    if recipe.eval.judge and recipe.eval.judge.api_key_env:
        remember({"": Reference(f"${{{recipe.eval.judge.api_key_env}}}", "")})
    return recipe


def _schema_mistakes(draft: Draft, wrong: dict[KeyPath, list[Any]], meant: dict[KeyPath, KeyPath]) -> Iterator[Mistake]:
    """The mistakes in single values and keys, without those that follow from another one."""
    unreadable = {mistake.position for mistake in draft.mistakes}
    for path, errors in wrong.items():
        kind = errors[0]["type"]
        if kind == "extra_forbidden":
            yield locate(draft.root, path, _unknown_key(path, meant.get(path, ())), at_key=True)
        elif kind == "missing":
            if draft.complete and path not in meant.values():
                yield locate(draft.root, path, f"is missing{_what_it_is(path)}")
        else:
            mistake = _wrong_value(draft.root, path, errors)
            if mistake.position not in unreadable:
                yield mistake


def _broken_rules(root: Located, recipe: Recipe, doubtful: Container[str]) -> Iterator[Mistake]:
    """The broken cross-field rules, but for those that look at a field that is wrong in itself.

    A rule's path and message name the fields that it looks at.
    """
    for path, message in cross_check(recipe):
        if not any(name in doubtful for name in (_name(path), *re.findall(r"\w+", message))):
            yield locate(root, path, message)


def _references(node: Located, path: KeyPath = ()) -> Iterator[tuple[str, Reference]]:
    """The texts that were read from the environment, but for those that are a field's own words."""
    if isinstance(node.value, dict | list):
        for step, child in node.value.items() if isinstance(node.value, dict) else enumerate(node.value):
            yield from _references(child, (*path, step))
    elif isinstance(node.value, str) and node.reference and value_of(node.reference) == node.value:
        section = section_at(path[:-1])
        field = section.model_fields.get(_name(path)) if section else None
        if field is None or node.value not in _words(field.annotation):
            yield dotted(path), Reference.of(node.reference, node.value)


def _words(annotation: Any) -> Iterator[Any]:
    """The values that the literals in a type name."""
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    else:
        for part in typing.get_args(annotation):
            yield from _words(part)


def _name(path: KeyPath) -> str:
    """The last key on a path: `train` for dataset.train.0."""
    return next((step for step in reversed(path) if isinstance(step, str)), "")


def _without_removed(node: Located, path: KeyPath = ()) -> Any:
    """The plain values without what a null took away from a parent, unless null is a value of that field."""
    if isinstance(node.value, dict):
        return {
            key: _without_removed(child, (*path, key))
            for key, child in node.value.items()
            if not child.removes or may_be_null((*path, key))
        }
    return node.each(lambda step, child: _without_removed(child, (*path, step)))


def may_be_null(path: KeyPath) -> bool:
    """Whether null is a value of that field."""
    section = section_at(path[:-1])
    field = section.model_fields.get(_name(path)) if section else None
    return field is not None and type(None) in typing.get_args(field.annotation)


def locate(root: Located, path: KeyPath, message: str, *, at_key: bool = False) -> Mistake:
    """A mistake about the value at `path`, at the position of the deepest part that was written."""
    key = root.find(path)[0].key if at_key else None
    return Mistake(key or root.place(path), dotted(path), message)


# --- pydantic's errors, in our words --------------------------------------------------------------


def _group(error: ValidationError, data: Any) -> dict[KeyPath, list[Any]]:
    """Errors by the path of the value they are about.

    Pydantic names the branches of a union in `loc`; only steps that exist in the data (or, at the
    end, the missing key) belong to the path. When a branch got further into the value than others
    (a list of sources, of which one is wrong), only the furthest is what was meant.
    """
    grouped: dict[KeyPath, list[Any]] = {}
    outer: set[KeyPath] = set()
    for item in error.errors(include_url=False, include_context=True):
        path: list[str | int] = []
        current = data
        for position, step in enumerate(item["loc"]):
            last = position == len(item["loc"]) - 1
            if holds(current, step) and current is not item["input"]:
                current = current[step]
            elif not (last and item["type"] == "missing"):
                continue
            path.append(step)
        grouped.setdefault(tuple(path), []).append(item)
        outer |= {tuple(path[:length]) for length in range(len(path))}
    return {
        path: errors
        for path, errors in grouped.items()
        if errors[0]["type"] in ("missing", "extra_forbidden") or path not in outer
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
        if not holds(data, step):
            return
        data = data[step]
    if path and isinstance(data, dict):
        data.pop(path[-1], None)
        if path[-1] in _STAND_INS:
            data[path[-1]] = copy.deepcopy(_STAND_INS[str(path[-1])])


def _wrong_value(root: Located, path: KeyPath, errors: list[Any]) -> Mistake:
    node, _ = root.find(path)
    expected = dict.fromkeys(_expectation(item) for item in errors)
    message = f"expected {' or '.join(expected)}, got {node.reference or _brief(node.as_written())}"
    if isinstance(node.value, str) and not node.reference:
        choices = [choice for text in expected if " | " in text for choice in text.split(" | ")]
        near = _nearest(node.value, choices)
        message += f"; did you mean '{near}'?" if near else ""
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
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
}
"""Messages by pydantic's name of an error, with its context."""


def _expectation(item: Any) -> str:
    context = item.get("ctx", {})
    kind = item["type"]
    if kind in _EXPECTATIONS:
        return _EXPECTATIONS[kind].format(**context)
    if kind == "literal_error":
        return str(context["expected"]).replace(" or ", ", ").replace(", ", " | ").replace("'", "")
    if kind == "string_pattern_mismatch":
        return str(context["pattern"]).strip("^$()").replace("|", " | ").replace("[0-9]+", "N")
    return str(item["msg"]).removeprefix("Value error, ")


def _brief(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return clipped(repr(value), 60)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that starts like this one, or is spelt much like it."""
    known = list(known)
    longer = [other for other in known if len(word) > 2 and other.startswith(word)]
    return next(iter(longer or difflib.get_close_matches(word, known, n=1, cutoff=0.6)), None)


def _known_keys(section: KeyPath) -> list[str]:
    model = section_at(section)
    return [*(model.model_fields if model else ()), *(() if section else ("extends",))]


def near_key(path: KeyPath) -> KeyPath:
    """The key that was probably meant by an unknown one; empty if there is none near."""
    parent, key = path[:-1], str(path[-1])
    if key in _ELSEWHERE:
        return ()
    elsewhere = [(*where, key) for where, section in sections() if key in section.model_fields]
    if elsewhere:
        return elsewhere[0]
    nested = tuple(_ALIASES.get(key, key).split("."))
    if nested[-1] in _known_keys(nested[:-1]):
        return nested
    near = _nearest(key, _known_keys(parent))
    return (*parent, near) if near else ()


def _is_key(name: str) -> bool:
    """Whether a key may be meant to be one at the top of a recipe."""
    return name in _known_keys(()) or name in _ELSEWHERE or bool(near_key((name,)))


def _unknown_key(path: KeyPath, meant: KeyPath) -> str:
    if not meant and path[-1] in _ELSEWHERE:
        return f"unknown key; this {_ELSEWHERE[str(path[-1])]}"
    if not meant:
        return f"unknown key; known keys: {', '.join(_known_keys(path[:-1]))}"
    if path[-1] == dotted(meant):
        return f"unknown key; a dot does not nest: write {meant[0]}: {{{dotted(meant[1:])}: …}}"
    same_section = meant[:-1] == path[:-1]
    return f"unknown key; did you mean '{meant[-1] if same_section else dotted(meant)}'?"


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
