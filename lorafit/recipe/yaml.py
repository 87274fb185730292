"""YAML text -> a tree of values that know where they were written, and the mistakes that are found there.

Reading is stricter than YAML asks for, since a recipe that is misread trains something else:
scalars follow YAML 1.2's core schema (`1e-4` is a number, `no` is text), duplicate keys, unknown
tags and empty sections are mistakes, and the expansion of aliases is bounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from lorafit.errors import LorafitError
from lorafit.text import clipped, printable
from lorafit.tree import KeyPath, dotted
from lorafit.written import REFERENCE, Reference, remember

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 64


@dataclass(frozen=True)
class Position:
    """Where a value was written: a file with 1-based line and column, or a `--set` argument."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        file = printable(self.file)
        return file if self.line is None else f"{file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong in a recipe; `str()` renders it as a compiler would, on one line."""

    position: Position
    path: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))

    def __str__(self) -> str:
        path = clipped(printable(self.path), 200)
        return ": ".join(part for part in (str(self.position), path, self.message) if part)


@dataclass(frozen=True)
class Located:
    """A scalar, a dict of str to Located, or a list of Located, with its position.

    `key` is the position of the key that leads here, for mistakes that are about the key.
    `removes` marks a null that was written over a value of a parent recipe, `earlier` holds the values that this one
    was written over, newest first, and `reference` is the ${NAME} that it was written as.
    """

    value: Any
    position: Position
    key: Position | None = None
    removes: bool = False
    earlier: tuple[Located, ...] = ()
    reference: str | None = None

    def each(self, change: Callable[[str | int, Located], Any]) -> Any:
        """The value, with what `change` makes of each key or index and the node there; a scalar as it is."""
        if isinstance(self.value, dict):
            return {key: change(key, child) for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [change(index, child) for index, child in enumerate(self.value)]
        return self.value

    def as_written(self) -> Any:
        """The value without positions, with references for texts of the environment."""
        if self.reference and isinstance(self.value, str):
            return self.reference
        return self.each(lambda _, child: child.as_written())

    def plain(self) -> Any:
        """The value without positions."""
        return self.each(lambda _, child: child.plain())

    def find(self, path: KeyPath) -> tuple[Located, KeyPath]:
        """The deepest node on `path` that exists, and the path to it."""
        node, done = self, 0
        for step in path:
            if not holds(node.value, step):
                break
            node, done = node.value[step], done + 1
        return node, path[:done]

    def place(self, path: KeyPath) -> Position:
        """Where what is at `path` was written; a section, and what isn't there, by the key above it."""
        node, found = self.find(path)
        by_key = found != path or isinstance(node.value, dict)
        return node.key if by_key and node.key else node.position

    def over(self, old: Located | None) -> Located:
        """This value, written over another (None: over nothing)."""
        if old is None:
            return self
        written = once(self, *self.earlier, replace(old, earlier=()), *old.earlier)
        return replace(self, removes=self.value is None, earlier=written[1:])


def once(*nodes: Located) -> tuple[Located, ...]:
    """The first node of each place: a parent may be reached in several ways."""
    places: dict[Position, Located] = {}
    for node in nodes:
        places.setdefault(node.position, node)
    return tuple(places.values())


def holds(value: Any, step: str | int) -> bool:
    """Whether a mapping has this key, or a list this index."""
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


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


# --- scalars: YAML 1.2's core schema --------------------------------------------------------------

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def parse_scalar(text: str) -> Any:
    """The value of an unquoted scalar. Raises ValueError for a whole number beyond 64 bits."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text) or _OCTAL_OR_HEX.fullmatch(text):
        number = int(text, 10 if _INT.fullmatch(text) else 0)
        if not -(2**63) <= number < 2**64:
            raise ValueError("beyond 64 bits")
        return number
    if _FLOAT.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan").replace(".I", "I").replace(".N", "N"))
    return text


_TOO_MANY = f"holds more than {MAX_NODES} values, counting what aliases repeat; this is not a recipe"


class _Loader(yaml.SafeLoader):
    """Composes nodes only, a bounded number of them; resolving scalars is `parse_scalar`'s."""

    nodes = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes += 1
        self.depth += 1
        if self.depth > MAX_DEPTH or self.nodes > 2 * MAX_NODES:  # keys are nodes too
            what = f"is nested deeper than {MAX_DEPTH} levels" if self.depth > MAX_DEPTH else _TOO_MANY
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise ComposerError(None, None, what, mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}

_STR, _MAP, _SEQ = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq"))


class _Expanded(NamedTuple):
    """A value, and its number of nodes and levels when every alias is written out."""

    located: Located
    size: int
    height: int


@dataclass
class Reader:
    """Turns the composed YAML nodes of one file into Located values."""

    file: str
    environment: Mapping[str, str]
    mistakes: list[Mistake] = field(default_factory=list)
    _done: dict[int, _Expanded] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)

    def at(self, mark: yaml.Mark) -> Position:
        return Position(self.file, mark.line + 1, mark.column + 1)

    def mistake(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self.mistakes.append(Mistake(self.at(node.start_mark), dotted(path), message))

    def fail(self, node: yaml.Node, path: KeyPath, message: str) -> NoReturn:
        self.mistake(node, path, message)
        raise RecipeError(self.mistakes)

    def read(self, node: yaml.Node, path: KeyPath = ()) -> _Expanded:
        """The value of a node. Raises RecipeError when aliases make it endless or too large."""
        if id(node) in self._done:
            return self._done[id(node)]
        if id(node) in self._open:
            self.fail(node, path, "an alias refers to what contains it")
        self._open.add(id(node))
        value: Any
        if isinstance(node, yaml.ScalarNode):
            value, size, height = self._scalar(node, path), 1, 1
        elif isinstance(node, yaml.MappingNode):
            value, size, height = self._mapping(node, path)
        else:
            value, size, height = self._sequence(node, path)
        self._limit(node, path, size)
        if height > MAX_DEPTH:
            self.fail(node, path, f"is nested deeper than {MAX_DEPTH} levels by its aliases")
        self._open.discard(id(node))
        located = Located(value, self.at(node.start_mark), reference=_reference(node))
        self._done[id(node)] = _Expanded(located, size, height)
        return self._done[id(node)]

    def _limit(self, node: yaml.Node, path: KeyPath, size: int) -> None:
        if size > MAX_NODES:
            self.fail(node, path, _TOO_MANY)

    def _tag(self, node: yaml.Node, path: KeyPath, expected: str) -> None:
        if node.tag != expected:
            tag = clipped(node.tag.replace("tag:yaml.org,2002:", "!!"), 60)
            self.mistake(node, path, f"tags such as {tag} are not read; remove it")

    def _text(self, node: yaml.Node, path: KeyPath, text: str) -> str:
        """The text with lone surrogates (from an escape such as "\\ud800", or bytes) noted and replaced."""
        self._tag(node, path, _STR)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.mistake(node, path, f"holds {printable(text[error.start])}, which is not a character")
            return text.encode(errors="replace").decode()
        return text

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = self._text(node, path, node.value)
        reference = REFERENCE.fullmatch(text) if node.style != "'" else None
        if reference:
            remember({dotted(path): Reference(text, "")})
            name, default = reference["name"], reference["default"]
            if name not in self.environment and default is None:
                hint = f"give a default: ${{{clipped(name, 60)}:-…}}"
                self.mistake(node, path, f"the environment variable {clipped(name, 60)} is not set; {hint}")
                return None
            text = self._text(node, path, self.environment.get(name) or default or "")
        elif node.style is not None:
            return text
        elif text == "":
            self.mistake(node, path, "is empty; write a value, {} for a section of defaults, or null")
            return None
        try:
            return parse_scalar(text)
        except ValueError:
            self.mistake(node, path, "this number is too large; quote it if it is text")
            return None

    def _sequence(self, node: yaml.Node, path: KeyPath) -> tuple[list[Located], int, int]:
        self._tag(node, path, _SEQ)
        items = [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        size, height = sum(item.size for item in items), max((item.height for item in items), default=0)
        return [item.located for item in items], 1 + size, 1 + height

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> tuple[dict[str, Located], int, int]:
        self._tag(node, path, _MAP)
        own: dict[str, Located] = {}
        merged: dict[str, Located] = {}
        lines: dict[str, int] = {}
        size = height = 1
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistake(key_node, path, "a key must be text")
                continue
            key = self._text(key_node, (*path, key_node.value), key_node.value)
            where = (*path, key)
            child = self.read(value_node, where)
            size, height = size + child.size, max(height, 1 + child.height)
            self._limit(node, path, size)
            if key in lines:
                self.mistake(key_node, where, f"is given twice (first in line {lines[key]}); remove one")
                continue
            lines[key] = key_node.start_mark.line + 1
            value = child.located.value
            if key != "<<" or key_node.style is not None:
                own[key] = replace(child.located, key=self.at(key_node.start_mark))
                continue
            for parent in value if isinstance(value, list) else [child.located]:
                if isinstance(parent.value, dict):
                    merged = {**parent.value, **merged}
                else:
                    self.mistake(value_node, where, "merges mappings only")
        return {**merged, **own}, size, height


def _reference(node: yaml.Node) -> str | None:
    """The text of a scalar that is read from the environment."""
    is_one = isinstance(node, yaml.ScalarNode) and node.style != "'" and REFERENCE.fullmatch(node.value)
    return node.value if is_one else None


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """What PyYAML says, with what to do about the usual ones."""
    problem, context = error.problem or "", error.context or ""
    if isinstance(error, ComposerError):
        if problem == "but found another document":
            return "a second document begins here; a recipe is one"
        if problem == "second occurrence":
            return context.partition(";")[0].replace("found duplicate anchor", "this anchor is given twice:")
        return problem
    if "cannot start any token" in problem:
        problem += "; indent with spaces" if "\\t" in problem else "; quote it"
    elif problem == "mapping values are not allowed here":
        problem += "; indent it rightly, or quote text that holds ': '"
    elif context and error.context_mark:
        problem += f" ({context} of line {error.context_mark.line + 1})"
    return f"not YAML: {problem}"


def compose(text: str, file: str) -> yaml.Node:
    """The syntax tree of the only document in a text. Raises RecipeError."""
    start = Position(file, 1, 1)
    if len(text) > MAX_BYTES:
        raise RecipeError([Mistake(start, "", f"is larger than {MAX_BYTES // 1024} KiB: not a recipe")])
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Position(file, mark.line + 1, mark.column + 1) if mark else start
        raise RecipeError([Mistake(position, "", clipped(_syntax(error), 200))]) from None
    except ReaderError as error:
        before = text[: error.position]
        position = Position(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        character = ord(text[error.position])
        raise RecipeError([Mistake(position, "", f"the character #x{character:04x} is not allowed in YAML")]) from None
    except (ValueError, OverflowError):  # chr() of an escape such as "\UFFFFFFFF"; int() of a %YAML version
        mark = loader.get_mark() if loader else None
        position = Position(file, mark.line + 1, mark.column + 1) if mark else start
        raise RecipeError([Mistake(position, "", "not YAML: this escape or number is out of range")]) from None
    if node is None:
        raise RecipeError([Mistake(start, "", "is empty")])
    return node


def read_yaml(text: str, file: str, environment: Mapping[str, str] | None = None) -> Located:
    """Parse one YAML document into Located values. Raises RecipeError."""
    reader = Reader(file, os.environ if environment is None else environment)
    located = reader.read(compose(text, file)).located
    if reader.mistakes:
        raise RecipeError(reader.mistakes)
    return located
