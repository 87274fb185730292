"""The layers of a recipe: a file over its parents, and `--set` over both. Of keys that exclude each other, the later
layer's stays."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lorafit.bounds import opened
from lorafit.recipe.yaml import (
    MAX_BYTES,
    MAX_DEPTH,
    Located,
    Mistake,
    Position,
    Reader,
    RecipeError,
    compose,
    once,
    read_yaml,
)
from lorafit.text import clipped
from lorafit.tree import dotted
from lorafit.written import References, value_of

MAX_FILES = 64
# --- files and extends ----------------------------------------------------------------------------


def merge(parent: Located, child: Located) -> Located:
    """Deep merge: the child wins, mappings merge, lists replace, null removes."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child.over(parent)
    merged = dict(parent.value)
    for key, value in child.value.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return replace(child, value=merged, earlier=once(*child.earlier, *parent.earlier))


def layered(earlier: Located, later: Located) -> Located:
    """Two layers of a recipe merged, of which the later one wins over its rivals in the earlier one too."""
    return merge(give_way(earlier, later), later)


@dataclass
class Draft:
    """A recipe as it was written, parents and overrides included, before it is validated.

    `complete` is False when a parent could not be read: what seems to be missing may stand there.
    """

    root: Located
    mistakes: list[Mistake]
    complete: bool


class Disk:
    """Where recipe files stand: on the disk, or, by a subclass, elsewhere."""

    def real(self, file: Path) -> str:
        """A name that is the same however the file is reached. Raises ValueError for what is no path."""
        return os.path.realpath(file)

    def shown(self, file: Path) -> str:
        """The name of a file for people."""
        return str(file)

    def exists(self, file: Path) -> bool:
        return os.path.exists(file)

    def is_file(self, file: Path) -> bool:
        return os.path.isfile(file)

    def read(self, file: Path, most: int) -> bytes:
        """The first bytes of a file. Raises OSError."""
        with opened(file) as stream:
            return stream.read(most)


def read_recipe(
    path: Path,
    overrides: Iterable[str],
    is_key: Callable[[str], bool],
    environment: Mapping[str, str] | None = None,
    store: Disk | None = None,
) -> Draft:
    """Read a recipe, everything it `extends:`, and `--set` arguments.

    Raises RecipeError when the file itself can't be read; other mistakes are in the draft.

    Args:
        is_key: whether a key may be meant to be a recipe's: of a file that has none, nothing is said but that.
    """
    files = _Files(is_key, os.environ if environment is None else environment, store or Disk())
    root = files.load(path, (), Position(files.store.shown(path)))
    if root is None:
        raise RecipeError(files.mistakes)
    root = _overridden(root, overrides, files.environment, files.mistakes)
    return Draft(root, files.mistakes, files.complete)


def draft_of(
    values: Mapping[str, Any], written: str, overrides: Iterable[str], references: References | None = None
) -> Draft:
    """A recipe from plain values instead of a file, with `--set` arguments; `written` names where they stand.

    Args:
        references: those that some of the values were read from.
    """
    mistakes: list[Mistake] = []
    root = _refer(placed(dict(values), Position(written)), references or {})
    root = _overridden(root, overrides, os.environ, mistakes)
    return Draft(root, mistakes, True)


_KEY = re.compile(r"^([a-z_]+):", re.MULTILINE)
_QUOTED = re.compile(r" '[^'\\<>]{2,}'")
"""What PyYAML quotes of a file: a single character stays."""


@dataclass
class _Files:
    """Recipe files, each read once."""

    is_key: Callable[[str], bool]
    environment: Mapping[str, str]
    store: Disk = field(default_factory=Disk)
    mistakes: list[Mistake] = field(default_factory=list)
    complete: bool = True
    _read: dict[str, Located | None] = field(default_factory=dict)

    def load(self, file: Path, trail: tuple[str, ...], named_at: Position) -> Located | None:
        """A file merged over its parents; None, with the mistakes noted, if it can't be read.

        `trail` holds the files on the way here, `named_at` is where this one was asked for.
        """
        try:
            real = self._identify(file, trail, named_at)
            if real not in self._read:
                self._read[real] = None
                self._read[real] = self._with_parents(file, self._content(file), (*trail, real))
            return self._read[real]
        except RecipeError as error:
            self._unreadable(*error.mistakes)
            return None

    def _unreadable(self, *mistakes: Mistake) -> None:
        self.complete = False
        self.mistakes += mistakes

    def _identify(self, file: Path, trail: tuple[str, ...], named_at: Position) -> str:
        """The real path of a file that may be read."""
        wrong = None
        try:
            real = self.store.real(file)
        except ValueError as error:  # such as a NUL character
            raise RecipeError([Mistake(named_at, "extends" if trail else "", f"is not a path: {error}")]) from None
        if not trail:
            return real
        if real in trail:
            circle = " -> ".join(_readable(part) for part in (*trail[trail.index(real) :], real))
            wrong = f"goes in a circle: {clipped(circle, 300)}"
        elif not self.store.is_file(file):
            shown = clipped(self.store.shown(file), 200)
            wrong = f"{shown} {'is not a file' if self.store.exists(file) else 'does not exist'}"
        elif real not in self._read and len(self._read) >= MAX_FILES:
            wrong = f"needs more than {MAX_FILES} files"
        if wrong:
            raise RecipeError([Mistake(named_at, "extends", wrong)])
        return real

    def _content(self, file: Path) -> Located:
        shown = self.store.shown(file)
        start = Position(shown)
        try:
            data = self.store.read(file, MAX_BYTES + 1)
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            before = data[: error.start]
            place = Position(shown, before.count(b"\n") + 1, error.start - before.rfind(b"\n"))
            raise RecipeError([Mistake(place, "", "is not UTF-8 text")]) from None
        except IsADirectoryError:
            raise RecipeError([Mistake(start, "", not_a_folder(file))]) from None
        except OSError as error:
            raise RecipeError([Mistake(start, "", f"can't be read: {error.strerror or error}")]) from None
        if len(data) > MAX_BYTES:
            raise RecipeError([Mistake(start, "", f"is larger than {MAX_BYTES // 1024} KiB: not a recipe")])
        reader = Reader(shown, self.environment)
        try:
            node = compose(text, shown)
        except RecipeError as error:
            if any(self.is_key(key) for key in _KEY.findall(text)):
                raise
            raise RecipeError(replace(one, message=_QUOTED.sub("", one.message)) for one in error.mistakes) from None
        if not isinstance(node, yaml.MappingNode):
            reader.fail(node, (), "a recipe is a mapping of sections, such as `model:`")
        if node.value and not any(isinstance(key, yaml.ScalarNode) and self.is_key(key.value) for key, _ in node.value):
            reader.fail(node, (), "is no recipe: none of its keys is a section, such as `model:`")
        located = reader.read(node).located
        self.mistakes += reader.mistakes
        return located

    def _with_parents(self, file: Path, own: Located, trail: tuple[str, ...]) -> Located:
        content = dict(own.value)
        extends = content.pop("extends", None)
        merged = Located(content, own.position)
        if extends is None:
            return merged
        base: Located | None = None
        for name in extends.value if isinstance(extends.value, list) else [extends]:
            if not isinstance(name.value, str) or not name.value:
                self._unreadable(Mistake(name.position, "extends", "expected a path or a list of paths"))
                continue
            parent = self.load(file.parent / name.value, trail, name.position)
            if parent is not None:
                base = parent if base is None else layered(base, parent)
        return merged if base is None else layered(base, merged)


def not_a_folder(folder: Path) -> str:
    """What to give instead of a folder."""
    recipe = folder / "recipe.yaml"
    if (folder / "plan.json").is_file():
        return f"is a run directory; give the recipe that it was trained from, such as the copy in it, {recipe}"
    found = sorted(file.name for file in folder.glob("*.y*ml"))[:3]
    return "is a folder; give a recipe, a YAML file" + (f" such as {folder / found[0]}" if found else "")


def _readable(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


# --- --set ----------------------------------------------------------------------------------------


def _overridden(
    root: Located, arguments: Iterable[str], environment: Mapping[str, str], mistakes: list[Mistake]
) -> Located:
    """The recipe with all `--set` arguments, which are one layer; what is wrong with them is added to the mistakes."""
    layer = Located({}, root.position)
    given = tuple(arguments)
    for argument in given:
        with contextlib.suppress(RecipeError):
            layer = _apply_override(layer, argument, environment)
    root = give_way(root, layer)
    for argument in given:
        try:
            root = _apply_override(root, argument, environment)
        except RecipeError as error:
            mistakes += error.mistakes
    return root


def _apply_override(root: Located, argument: str, environment: Mapping[str, str]) -> Located:
    """Apply one `--set a.b=value` argument; the value is read as YAML. Raises RecipeError."""
    name, equals, text = argument.partition("=")
    position = Position(f"--set {clipped(argument, 60)}")
    steps = tuple(step.strip() for step in name.split("."))
    if not equals or not all(steps) or len(steps) > MAX_DEPTH:
        raise RecipeError([Mistake(position, "", "expected key=value, such as training.learning_rate=1e-4")])
    if steps[0] == "extends":
        raise RecipeError([Mistake(position, "extends", "can't be set; write it in the file")])
    try:
        value = read_yaml(text, position.file, environment)
    except RecipeError as error:
        raise RecipeError(Mistake(position, dotted(steps), m.message) for m in error.mistakes) from None
    return _override(root, steps, placed(value, position), position, ())


def placed(value: Any, position: Position) -> Located:
    """A value, plain or located, with every node at one position."""
    node = value if isinstance(value, Located) else Located(value, position)
    below = node.each(lambda _, child: placed(child, position))
    return Located(below, position, position, reference=node.reference)


def _refer(node: Located, references: References, key: str = "") -> Located:
    """Values with the references that they were read from, as far as they still are what is there."""
    if isinstance(node.value, dict | list):
        return replace(
            node,
            value=node.each(lambda step, child: _refer(child, references, f"{key}.{step}" if key else str(step))),
        )
    known = references.get(key)
    return replace(node, reference=known.text) if known and value_of(known.text) == node.value else node


def _override(
    node: Located, steps: tuple[str, ...], new: Located, position: Position, trail: tuple[str, ...]
) -> Located:
    if not steps:
        return new.over(node)
    step, rest = steps[0], steps[1:]
    if isinstance(node.value, list):
        items = list(node.value)
        if step not in map(str, range(len(items))):
            what = f"{dotted(trail)} is a list of {len(items)}; give an index, from 0"
            raise RecipeError([Mistake(position, dotted((*trail, step)), what)])
        items[int(step)] = _override(items[int(step)], rest, new, position, (*trail, step))
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        what = f"{dotted(trail)} is a single value and has no keys"
        raise RecipeError([Mistake(position, dotted((*trail, step)), what)])
    content = dict(node.value or {})
    if rest:
        child = content.get(step, Located(None, position, position))
        content[step] = _override(child, rest, new, position, (*trail, step))
    else:
        content[step] = new.over(content.get(step))
    kept = (replace(node, earlier=()), *node.earlier) if node.removes else node.earlier
    return replace(node, value=content, removes=False, earlier=kept)


# --- rivals: keys that exclude each other ---

_PAIRS = (
    ("training.max_steps", "training.num_train_epochs"),
    ("training.warmup_steps", "training.warmup_ratio"),
    ("training.global_batch_size", "training.gradient_accumulation_steps"),
    ("training.lr_scheduler_kwargs.min_lr", "training.lr_scheduler_kwargs.min_lr_rate"),
    ("quantization.load_in_4bit", "quantization.load_in_8bit"),
)
OF_4_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_Path = tuple[str, ...]


def _rivals() -> Iterator[tuple[_Path, _Path, tuple[object, ...] | None]]:
    """A key, another that it takes the place of, and the values with which it does so (None: any that turns it on)."""
    for one, other in _PAIRS:
        yield _path(one), _path(other), None
        yield _path(other), _path(one), None
    for name in OF_4_BITS:
        yield ("quantization", "load_in_8bit"), ("quantization", name), None
    yield ("quantization", "load_in_4bit"), ("quantization", "llm_int8_threshold"), None
    for name in ("gpu", "vram"):
        yield ("hardware", "device"), ("hardware", name), ("cpu", "mps")
        yield ("hardware", name), ("hardware", "device"), None
    for what in ("eval", "save"):
        strategy, steps, per_epoch = (
            ("training", name) for name in (f"{what}_strategy", f"{what}_steps", f"{what}s_per_epoch")
        )
        yield strategy, steps, ("no", "epoch", "auto")
        yield strategy, per_epoch, ("no", "steps")
        yield per_epoch, steps, None
        yield per_epoch, strategy, None


def _path(key: str) -> _Path:
    return tuple(key.split("."))


def give_way(earlier: Located, later: Located) -> Located:
    """The earlier layer without what rivals of the later one displace: as if a null had been written over it there."""
    for winner, loser, values in _rivals():
        new, old = _at(later, winner), _at(earlier, loser)
        if new is None or old is None or _at(later, loser) is not None:
            continue
        before = _at(earlier, winner)
        if values is None and before is not None and not _is_off(before.value):
            continue  # both in one layer, which is a mistake; or they go together
        wins = new.value in values if values else not _is_off(new.value)
        if wins and not _is_off(old.value):
            earlier = _removed(earlier, loser, new.key or new.position)
    return earlier


def _is_off(value: object) -> bool:
    return value is None or value is False or value == "auto"


def _at(node: Located, path: _Path) -> Located | None:
    found, reached = node.find(path)
    return found if reached == path else None


def _removed(node: Located, path: _Path, where: Position) -> Located:
    if not path:
        return Located(None, where, where).over(node)
    return replace(node, value={**node.value, path[0]: _removed(node.value[path[0]], path[1:], where)})


def displaced(root: Located) -> Iterator[str]:
    """What gave way, to what, in words."""
    for winner, loser, _ in _rivals():
        new, old = _at(root, winner), _at(root, loser)
        if new is None or old is None or not old.removes or old.position != (new.key or new.position):
            continue
        was = next((one for one in old.earlier if one.value is not None), None)
        if was is not None:
            place = f"{dotted(winner)} ({new.position})"
            yield f"{dotted(loser)}: {was.value} ({was.position}) gives way to {place}, which is set later."
