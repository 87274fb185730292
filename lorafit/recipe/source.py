"""YAML text -> a tree of values that know where they were written.

Reading is stricter than YAML asks for, since a recipe that is misread trains something else:
scalars follow YAML 1.2's core schema (`1e-4` is a number, `no` is text), duplicate keys, unknown
tags and empty sections are mistakes, and the expansion of aliases is bounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 64
MAX_FILES = 64


@dataclass(frozen=True)
class Position:
    """Where a value was written: a file with 1-based line and column, or a `--set` argument."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong in a recipe; `str()` renders it as a compiler would."""

    position: Position
    path: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.position), self.path, self.message) if part)


@dataclass(frozen=True)
class Located:
    """A scalar, a dict of str to Located, or a list of Located, with its position.

    `key` is the position of the key that leads here, for mistakes that are about the key.
    """

    value: Any
    position: Position
    key: Position | None = None

    def children(self) -> Iterator[tuple[str | int, Located]]:
        if isinstance(self.value, dict):
            yield from self.value.items()
        elif isinstance(self.value, list):
            yield from enumerate(self.value)

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def find(self, path: tuple[str | int, ...]) -> tuple[Located, tuple[str | int, ...]]:
        """The deepest node on `path` that exists, and the path to it."""
        node, done = self, 0
        for step in path:
            child = dict(node.children()).get(step)
            if child is None:
                break
            node, done = child, done + 1
        return node, path[:done]


class SourceMistakes(Exception):
    """Mistakes found while reading; the loader collects them into a RecipeError."""

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = mistakes


def dotted(path: tuple[str | int, ...]) -> str:
    """`("dataset", "train", 0, "path")` -> `dataset.train.0.path`."""
    return ".".join(map(str, path))


# --- scalars: YAML 1.2's core schema --------------------------------------------------------------

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_ENVIRONMENT = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


def parse_scalar(text: str) -> Any:
    """The value of an unquoted scalar. Raises ValueError for a number that Python can't hold."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL_OR_HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan").replace(".I", "I").replace(".N", "N"))
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes only; resolving scalars is `parse_scalar`'s, so the only tags are explicit."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_STR, _MAP, _SEQ = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq"))


@dataclass
class _Reader:
    """Turns composed YAML nodes of one file into Located values."""

    file: str
    environment: Mapping[str, str]
    mistakes: list[Mistake] = field(default_factory=list)
    _done: dict[int, tuple[yaml.Node, Located, int]] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)

    def at(self, mark: yaml.Mark) -> Position:
        return Position(self.file, mark.line + 1, mark.column + 1)

    def mistake(self, node: yaml.Node, path: tuple[str | int, ...], message: str) -> None:
        self.mistakes.append(Mistake(self.at(node.start_mark), dotted(path), message))

    def read(self, node: yaml.Node, path: tuple[str | int, ...] = ()) -> tuple[Located, int]:
        """The value of a node, and its size in nodes when every alias is written out."""
        if id(node) in self._done:
            return self._done[id(node)][1:]
        if id(node) in self._open:
            raise SourceMistakes(
                Mistake(self.at(node.start_mark), dotted(path), "an alias refers to what contains it")
            )
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            value, size = self._mapping(node, path)
        elif isinstance(node, yaml.SequenceNode):
            value, size = self._sequence(node, path)
        else:
            value, size = self._scalar(node, path), 1
        if size > MAX_NODES:
            raise SourceMistakes(
                Mistake(
                    self.at(node.start_mark),
                    dotted(path),
                    f"aliases expand to more than {MAX_NODES} values; write out what you mean",
                )
            )
        self._open.discard(id(node))
        located = Located(value, self.at(node.start_mark))
        self._done[id(node)] = (node, located, size)
        return located, size

    def _tag(self, node: yaml.Node, path: tuple[str | int, ...], expected: str) -> None:
        if node.tag != expected:
            self.mistake(node, path, f"tags such as {_short_tag(node.tag)} are not read; remove it")

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str | int, ...]) -> Any:
        self._tag(node, path, _STR)
        text: str = node.value
        plain = node.style is None
        reference = _ENVIRONMENT.fullmatch(text) if node.style != "'" else None
        if reference:
            name, default = reference["name"], reference["default"]
            text = self.environment.get(name) or (default if default is not None else "")
            if name not in self.environment and default is None:
                self.mistake(
                    node, path, f"the environment variable {name} is not set; give a default: ${{{name}:-…}}"
                )
                return None
            plain = True
        if not plain:
            return text
        if text == "" and not reference:
            self.mistake(node, path, "is empty; write a value, {} for a section of defaults, or null")
            return None
        try:
            return parse_scalar(text)
        except ValueError:
            self.mistake(node, path, "this number is too long")
            return None

    def _sequence(self, node: yaml.SequenceNode, path: tuple[str | int, ...]) -> tuple[list[Located], int]:
        self._tag(node, path, _SEQ)
        items = [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        return [located for located, _ in items], 1 + sum(size for _, size in items)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> tuple[dict[str, Located], int]:
        self._tag(node, path, _MAP)
        own: dict[str, Located] = {}
        merged: dict[str, Located] = {}
        total = 1
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistake(key_node, path, "a key must be text")
                continue
            key = key_node.value
            child, size = self.read(value_node, (*path, key))
            total += size
            child = Located(child.value, child.position, self.at(key_node.start_mark))
            if key == "<<" and key_node.style is None:
                for parent in child.value if isinstance(child.value, list) else [child]:
                    if isinstance(parent.value, dict):
                        merged = {**parent.value, **merged}
                    else:
                        self.mistake(value_node, path, "'<<' merges mappings only")
            elif key in own:
                first = own[key].key
                line = first.line if first else "?"
                self.mistake(key_node, (*path, key), f"is given twice (first in line {line}); remove one")
            else:
                own[key] = child
        return {**merged, **own}, total


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!") if tag.startswith("tag:") else tag


def _too_deep(node: yaml.Node) -> bool:
    """Whether a node nests deeper than MAX_DEPTH (walked without recursion; aliases once)."""
    seen: dict[int, int] = {}
    stack = [(node, 1)]
    while stack:
        current, depth = stack.pop()
        if depth > MAX_DEPTH:
            return True
        if seen.get(id(current), 0) >= depth:
            continue
        seen[id(current)] = depth
        if isinstance(current, yaml.MappingNode):
            stack += [(part, depth + 1) for pair in current.value for part in pair]
        elif isinstance(current, yaml.SequenceNode):
            stack += [(part, depth + 1) for part in current.value]
    return False


def read_yaml(text: str, file: str, environment: Mapping[str, str] | None = None) -> Located:
    """Parse one YAML document into Located values. Raises SourceMistakes."""
    start = Position(file, 1, 1)
    if len(text) > MAX_BYTES:
        raise SourceMistakes(Mistake(start, "", f"is larger than {MAX_BYTES // 1024} KiB: not a recipe"))
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Position(file, mark.line + 1, mark.column + 1) if mark else start
        raise SourceMistakes(Mistake(position, "", f"not YAML: {error.problem or error.context}")) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        position = Position(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise SourceMistakes(
            Mistake(position, "", f"the character #x{ord(str(error.character)[:1] or '?'):04x} is not allowed in YAML")
            if isinstance(error.character, str)
            else Mistake(position, "", f"the character #x{error.character:04x} is not allowed in YAML")
        ) from None
    except (RecursionError, ValueError, OverflowError):
        raise SourceMistakes(Mistake(start, "", "is nested too deeply or holds an invalid escape")) from None
    if node is None:
        raise SourceMistakes(Mistake(start, "", "is empty"))
    reader = _Reader(file, os.environ if environment is None else environment)
    if _too_deep(node):
        raise SourceMistakes(Mistake(start, "", f"is nested deeper than {MAX_DEPTH} levels (or contains itself)"))
    located, _ = reader.read(node)
    if reader.mistakes:
        raise SourceMistakes(*reader.mistakes)
    return located


def read_file(path: Path, environment: Mapping[str, str] | None = None) -> Located:
    """Read a recipe file. Raises SourceMistakes, also for a file that can't be read."""
    start = Position(str(path))
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SourceMistakes(Mistake(start, "", f"is larger than {MAX_BYTES // 1024} KiB: not a recipe"))
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceMistakes(Mistake(start, "", f"is not UTF-8 text (byte {error.start})")) from None
    except OSError as error:
        raise SourceMistakes(Mistake(start, "", f"can't be read: {error.strerror or error}")) from None
    located = read_yaml(text, str(path), environment)
    if not isinstance(located.value, dict):
        raise SourceMistakes(Mistake(located.position, "", "a recipe is a mapping of sections, such as `model:`"))
    return located


# --- extends and --set ----------------------------------------------------------------------------


def merge(parent: Located, child: Located) -> Located:
    """Deep merge: the child wins, mappings merge, lists replace, null removes."""
    if not (isinstance(parent.value, dict) and isinstance(child.value, dict)):
        return child
    merged = dict(parent.value)
    for key, value in child.value.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return Located(merged, child.position, child.key)


def read_with_parents(path: Path, environment: Mapping[str, str] | None = None) -> tuple[Located, list[Path]]:
    """Read a recipe and everything it `extends:`, merged. Also returns the files, parents first."""
    files: list[Path] = []
    cache: dict[Path, Located] = {}

    def load(file: Path, trail: tuple[Path, ...], named_at: Position | None) -> Located:
        real = file.resolve()
        if real in trail:
            circle = " -> ".join(str(_readable(part)) for part in (*trail[trail.index(real) :], real))
            raise SourceMistakes(Mistake(named_at or Position(str(file)), "extends", f"goes in a circle: {circle}"))
        if real in cache:
            return cache[real]
        if len(cache) + len(trail) >= MAX_FILES:
            raise SourceMistakes(
                Mistake(named_at or Position(str(file)), "extends", f"more than {MAX_FILES} files")
            )
        if named_at is not None and not file.is_file():
            raise SourceMistakes(Mistake(named_at, "extends", f"{file} does not exist"))
        own = read_file(file, environment)
        content = dict(own.value)
        extends = content.pop("extends", None)
        merged = Located(content, own.position)
        if extends is not None:
            names = extends.value if isinstance(extends.value, list) else [extends]
            base: Located | None = None
            for name in names:
                if not isinstance(name.value, str):
                    raise SourceMistakes(Mistake(name.position, "extends", "expected a path or a list of paths"))
                parent = load(file.parent / name.value, (*trail, real), name.position)
                base = parent if base is None else merge(base, parent)
            if base is not None:
                merged = merge(base, merged)
        cache[real] = merged
        files.append(file)
        return merged

    return load(path, (), None), files


def _readable(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def apply_overrides(root: Located, overrides: tuple[str, ...]) -> Located:
    """Apply `--set a.b=value` arguments in order; values are read as YAML. Raises SourceMistakes."""
    for argument in overrides:
        name, equals, text = argument.partition("=")
        position = Position(f"--set {argument}")
        if not equals or not name.strip():
            raise SourceMistakes(Mistake(position, "", "expected key=value, such as training.learning_rate=1e-4"))
        steps = tuple(name.strip().split("."))
        try:
            value = read_yaml(text, position.file).plain()
        except SourceMistakes as error:
            raise SourceMistakes(
                *(Mistake(position, dotted(steps), mistake.message) for mistake in error.mistakes)
            ) from None
        root = _override(root, steps, _locate(value, position), position, ())
    return root


def _locate(value: Any, position: Position) -> Located:
    """Give every node of a plain value the same position."""
    if isinstance(value, dict):
        value = {key: _locate(child, position) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_locate(child, position) for child in value]
    return Located(value, position, position)


def _override(
    node: Located, steps: tuple[str, ...], new: Located, position: Position, trail: tuple[str, ...]
) -> Located:
    if not steps:
        return new
    step, rest = steps[0], steps[1:]
    if isinstance(node.value, list):
        if not (step.isdecimal() and int(step) < len(node.value)):
            raise SourceMistakes(
                Mistake(position, dotted((*trail, step)), f"{dotted(trail)} is a list of {len(node.value)}; give an index")
            )
        items = list(node.value)
        items[int(step)] = _override(items[int(step)], rest, new, position, (*trail, step))
        return Located(items, node.position, node.key)
    if node.value is not None and not isinstance(node.value, dict):
        raise SourceMistakes(
            Mistake(position, dotted((*trail, step)), f"{dotted(trail)} is a single value and has no keys")
        )
    content = dict(node.value or {})
    child = content.get(step, Located(None, position, position))
    content[step] = _override(child, rest, new, position, (*trail, step))
    return Located(content, node.position, node.key)
