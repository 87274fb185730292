"""What is typed after --sweep: KEY=V1,V2,…"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence

from lorafit.errors import UsageError
from lorafit.recipe import RecipeError, Source
from lorafit.recipe.load import sections
from lorafit.recipe.yaml import shorten
from lorafit.text import printable

SHORT_NAMES = {"batch": "training.per_device_train_batch_size"}
MOST_CELLS = 400


def parse_sweeps(arguments: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Keys as in recipes, each with its values. Raises UsageError."""
    sweeps = tuple(_parse(argument) for argument in arguments)
    keys = [key for key, _ in sweeps]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"--sweep {key}: is given twice; put its values into one: {key}=1,2")
    cells = 1
    for _, values in sweeps:
        cells *= len(values)
    if cells > MOST_CELLS:
        raise UsageError(f"--sweep: makes {cells:,} combinations; at most {MOST_CELLS} are estimated")
    return sweeps


def _parse(argument: str) -> tuple[str, tuple[str, ...]]:
    name, equals, text = argument.partition("=")
    values = tuple(value.strip() for value in _split(text))
    if not equals or not name.strip() or not all(values):
        raise UsageError(f"--sweep {printable(argument)}: expected KEY=V1,V2, such as max_length=1024,2048")
    return _key(name.strip()), tuple(dict.fromkeys(values))


def _split(text: str) -> Iterator[str]:
    """The parts between commas that stand outside of brackets."""
    depth, part = 0, ""
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth <= 0:
            yield part
            part = ""
        else:
            part += c
    yield part


def _key(name: str) -> str:
    """A key of the recipe, from its whole path, or its last part where that is the only one of its name."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if name.partition(".")[0] == "hardware":
        raise UsageError(f"--sweep {printable(name)}: an answer is for one machine; give --gpu, or --set hardware.…")
    known = _keys()
    paths = known.get(name.rpartition(".")[2], [])
    if name in paths:
        return name
    if "." not in name and len(paths) == 1:
        return paths[0]
    if "." not in name and paths:
        raise UsageError(f"--sweep {printable(name)}: could be {' or '.join(paths)}; give the whole key")
    if any(name.startswith(f"{path}.") for found in known.values() for path in found):
        return name  # into a list or a mapping
    near = difflib.get_close_matches(name, [*SHORT_NAMES, *known, *(p for found in known.values() for p in found)], n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"--sweep {printable(name)}: no such key in a recipe{hint}")


@functools.cache
def _keys() -> dict[str, list[str]]:
    """The recipe's keys by their last part."""
    found: dict[str, list[str]] = {}
    for where, section in sections():
        if section is Source:  # in lists: addressed by an index
            continue
        for name in section.model_fields:
            found.setdefault(name, []).append(".".join((*where, name)))
    return found


@contextlib.contextmanager
def as_typed(typed: Mapping[str, str]) -> Iterator[None]:
    """Let mistakes in overrides be said of the options that made them, not of --set."""
    places = {f"--set {shorten(override)}": option for override, option in typed.items()}
    try:
        yield
    except RecipeError as error:
        mistakes = []
        for mistake in error.mistakes:
            position = mistake.position
            position = dataclasses.replace(position, file=places.get(position.file, position.file))
            mistakes.append(dataclasses.replace(mistake, position=position))
        raise RecipeError(mistakes) from None
