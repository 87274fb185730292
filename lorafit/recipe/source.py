"""YAML text -> a tree of values that know where they were written.

Reading is stricter than YAML asks for, since a recipe that is misread trains something else:
scalars follow YAML 1.2's core schema (`1e-4` is a number, `no` is text), duplicate keys, unknown
tags and empty sections are mistakes, and the expansion of aliases is bounded.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

from lorafit.bounds import opened
from lorafit.text import printable
from lorafit.tree import dotted
from lorafit.written import REFERENCE, Reference, References, remember, value_of

MAX_BYTES = 256 * 1024
MAX_NODES = 10_000
MAX_DEPTH = 64
MAX_FILES = 64


def shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


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
        path = shorten(printable(self.path), 200)
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

    def as_written(self) -> Any:
        """The same, with references for texts of the environment."""
        if isinstance(self.value, dict):
            return {key: child.as_written() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.as_written() for child in self.value]
        return self.reference if self.reference and isinstance(self.value, str) else self.value

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
            if not holds(node.value, step):
                break
            node, done = node.value[step], done + 1
        return node, path[:done]

    def place(self, path: tuple[str | int, ...]) -> Position:
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


class SourceMistakes(Exception):
    """Mistakes that leave nothing to go on with; `lorafit.recipe.load` turns them into a RecipeError."""

    def __init__(self, *mistakes: Mistake) -> None:
        super().__init__("\n".join(map(str, mistakes)))
        self.mistakes = mistakes


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
class _Reader:
    """Turns the composed YAML nodes of one file into Located values."""

    file: str
    environment: Mapping[str, str]
    mistakes: list[Mistake] = field(default_factory=list)
    _done: dict[int, _Expanded] = field(default_factory=dict)
    _open: set[int] = field(default_factory=set)

    def at(self, mark: yaml.Mark) -> Position:
        return Position(self.file, mark.line + 1, mark.column + 1)

    def mistake(self, node: yaml.Node, path: tuple[str | int, ...], message: str) -> None:
        self.mistakes.append(Mistake(self.at(node.start_mark), dotted(path), message))

    def fail(self, node: yaml.Node, path: tuple[str | int, ...], message: str) -> NoReturn:
        self.mistake(node, path, message)
        raise SourceMistakes(*self.mistakes)

    def read(self, node: yaml.Node, path: tuple[str | int, ...] = ()) -> _Expanded:
        """The value of a node. Raises SourceMistakes when aliases make it endless or too large."""
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

    def _limit(self, node: yaml.Node, path: tuple[str | int, ...], size: int) -> None:
        if size > MAX_NODES:
            self.fail(node, path, _TOO_MANY)

    def _tag(self, node: yaml.Node, path: tuple[str | int, ...], expected: str) -> None:
        if node.tag != expected:
            tag = shorten(node.tag.replace("tag:yaml.org,2002:", "!!"))
            self.mistake(node, path, f"tags such as {tag} are not read; remove it")

    def _text(self, node: yaml.Node, path: tuple[str | int, ...], text: str) -> str:
        """The text with lone surrogates (from an escape such as "\\ud800", or bytes) noted and replaced."""
        self._tag(node, path, _STR)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            self.mistake(node, path, f"holds {printable(text[error.start])}, which is not a character")
            return text.encode(errors="replace").decode()
        return text

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str | int, ...]) -> Any:
        text = self._text(node, path, node.value)
        reference = REFERENCE.fullmatch(text) if node.style != "'" else None
        if reference:
            remember({dotted(path): Reference(text, "")})
            name, default = reference["name"], reference["default"]
            if name not in self.environment and default is None:
                hint = f"give a default: ${{{shorten(name)}:-…}}"
                self.mistake(node, path, f"the environment variable {shorten(name)} is not set; {hint}")
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

    def _sequence(self, node: yaml.Node, path: tuple[str | int, ...]) -> tuple[list[Located], int, int]:
        self._tag(node, path, _SEQ)
        items = [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        size, height = sum(item.size for item in items), max((item.height for item in items), default=0)
        return [item.located for item in items], 1 + size, 1 + height

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> tuple[dict[str, Located], int, int]:
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


def _compose(text: str, file: str) -> yaml.Node:
    """The syntax tree of the only document in a text. Raises SourceMistakes."""
    start = Position(file, 1, 1)
    if len(text) > MAX_BYTES:
        raise SourceMistakes(Mistake(start, "", f"is larger than {MAX_BYTES // 1024} KiB: not a recipe"))
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Position(file, mark.line + 1, mark.column + 1) if mark else start
        raise SourceMistakes(Mistake(position, "", shorten(_syntax(error), 200))) from None
    except ReaderError as error:
        before = text[: error.position]
        position = Position(file, before.count("\n") + 1, len(before) - before.rfind("\n"))
        character = ord(text[error.position])
        raise SourceMistakes(Mistake(position, "", f"the character #x{character:04x} is not allowed in YAML")) from None
    except (ValueError, OverflowError):  # chr() of an escape such as "\UFFFFFFFF"; int() of a %YAML version
        mark = loader.get_mark() if loader else None
        position = Position(file, mark.line + 1, mark.column + 1) if mark else start
        raise SourceMistakes(Mistake(position, "", "not YAML: this escape or number is out of range")) from None
    if node is None:
        raise SourceMistakes(Mistake(start, "", "is empty"))
    return node


def read_yaml(text: str, file: str, environment: Mapping[str, str] | None = None) -> Located:
    """Parse one YAML document into Located values. Raises SourceMistakes."""
    reader = _Reader(file, os.environ if environment is None else environment)
    located = reader.read(_compose(text, file)).located
    if reader.mistakes:
        raise SourceMistakes(*reader.mistakes)
    return located


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
    from lorafit.recipe.rivals import give_way

    return merge(give_way(earlier, later), later)


@dataclass
class Draft:
    """A recipe as it was written, parents and overrides included, before it is validated.

    `complete` is False when a parent could not be read: what seems to be missing may stand there.
    """

    root: Located
    mistakes: list[Mistake]
    complete: bool


class Store(Protocol):
    """Where recipe files stand, such as on the disk."""

    def real(self, file: Path) -> str:
        """A name that is the same however the file is reached. Raises ValueError for what is no path."""

    def shown(self, file: Path) -> str:
        """The name of a file for people."""

    def exists(self, file: Path) -> bool: ...

    def is_file(self, file: Path) -> bool: ...

    def read(self, file: Path, most: int) -> bytes:
        """The first bytes of a file. Raises OSError."""


class Disk:
    """The files that are there."""

    def real(self, file: Path) -> str:
        return os.path.realpath(file)

    def shown(self, file: Path) -> str:
        return str(file)

    def exists(self, file: Path) -> bool:
        return os.path.exists(file)

    def is_file(self, file: Path) -> bool:
        return os.path.isfile(file)

    def read(self, file: Path, most: int) -> bytes:
        with opened(file) as stream:
            return stream.read(most)


def read_recipe(
    path: Path,
    overrides: Iterable[str],
    is_key: Callable[[str], bool],
    environment: Mapping[str, str] | None = None,
    store: Store | None = None,
) -> Draft:
    """Read a recipe, everything it `extends:`, and `--set` arguments.

    Raises SourceMistakes when the file itself can't be read; other mistakes are in the draft.

    Args:
        is_key: whether a key may be meant to be a recipe's: of a file that has none, nothing is said but that.
    """
    files = _Files(is_key, os.environ if environment is None else environment, store or Disk())
    root = files.load(path, (), Position(files.store.shown(path)))
    if root is None:
        raise SourceMistakes(*files.mistakes)
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
    root = _refer(_locate(dict(values), Position(written)), references or {})
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
    store: Store = field(default_factory=Disk)
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
        except SourceMistakes as error:
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
            raise SourceMistakes(Mistake(named_at, "extends" if trail else "", f"is not a path: {error}")) from None
        if not trail:
            return real
        if real in trail:
            circle = " -> ".join(_readable(part) for part in (*trail[trail.index(real) :], real))
            wrong = f"goes in a circle: {shorten(circle, 300)}"
        elif not self.store.is_file(file):
            shown = shorten(self.store.shown(file), 200)
            wrong = f"{shown} {'is not a file' if self.store.exists(file) else 'does not exist'}"
        elif real not in self._read and len(self._read) >= MAX_FILES:
            wrong = f"needs more than {MAX_FILES} files"
        if wrong:
            raise SourceMistakes(Mistake(named_at, "extends", wrong))
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
            raise SourceMistakes(Mistake(place, "", "is not UTF-8 text")) from None
        except IsADirectoryError:
            raise SourceMistakes(Mistake(start, "", not_a_folder(file))) from None
        except OSError as error:
            raise SourceMistakes(Mistake(start, "", f"can't be read: {error.strerror or error}")) from None
        if len(data) > MAX_BYTES:
            raise SourceMistakes(Mistake(start, "", f"is larger than {MAX_BYTES // 1024} KiB: not a recipe"))
        reader = _Reader(shown, self.environment)
        try:
            node = _compose(text, shown)
        except SourceMistakes as error:
            if any(self.is_key(key) for key in _KEY.findall(text)):
                raise
            raise SourceMistakes(
                *(replace(one, message=_QUOTED.sub("", one.message)) for one in error.mistakes)
            ) from None
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
    from lorafit.recipe.rivals import give_way

    layer = Located({}, root.position)
    given = tuple(arguments)
    for argument in given:
        with contextlib.suppress(SourceMistakes):
            layer = _apply_override(layer, argument, environment)
    root = give_way(root, layer)
    for argument in given:
        try:
            root = _apply_override(root, argument, environment)
        except SourceMistakes as error:
            mistakes += error.mistakes
    return root


def _apply_override(root: Located, argument: str, environment: Mapping[str, str]) -> Located:
    """Apply one `--set a.b=value` argument; the value is read as YAML. Raises SourceMistakes."""
    name, equals, text = argument.partition("=")
    position = Position(f"--set {shorten(argument)}")
    steps = tuple(step.strip() for step in name.split("."))
    if not equals or not all(steps) or len(steps) > MAX_DEPTH:
        raise SourceMistakes(Mistake(position, "", "expected key=value, such as training.learning_rate=1e-4"))
    if steps[0] == "extends":
        raise SourceMistakes(Mistake(position, "extends", "can't be set; write it in the file"))
    try:
        value = read_yaml(text, position.file, environment)
    except SourceMistakes as error:
        raise SourceMistakes(*(Mistake(position, dotted(steps), m.message) for m in error.mistakes)) from None
    return _override(root, steps, _moved(value, position), position, ())


def _locate(value: Any, position: Position) -> Located:
    """Give every node of a plain value the same position."""
    if isinstance(value, dict):
        value = {key: _locate(child, position) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_locate(child, position) for child in value]
    return Located(value, position, position)


def _moved(node: Located, position: Position) -> Located:
    """A value with every node at one position."""
    value = node.value
    if isinstance(value, dict):
        value = {key: _moved(child, position) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_moved(child, position) for child in value]
    return Located(value, position, position, reference=node.reference)


def _refer(node: Located, references: References, key: str = "") -> Located:
    """Values with the references that they were read from, as far as they still are what is there."""
    if isinstance(node.value, dict | list):
        items = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        below = {name: _refer(child, references, f"{key}.{name}" if key else str(name)) for name, child in items}
        return replace(node, value=below if isinstance(node.value, dict) else [*below.values()])
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
            raise SourceMistakes(Mistake(position, dotted((*trail, step)), what))
        items[int(step)] = _override(items[int(step)], rest, new, position, (*trail, step))
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        what = f"{dotted(trail)} is a single value and has no keys"
        raise SourceMistakes(Mistake(position, dotted((*trail, step)), what))
    content = dict(node.value or {})
    if rest:
        child = content.get(step, Located(None, position, position))
        content[step] = _override(child, rest, new, position, (*trail, step))
    else:
        content[step] = new.over(content.get(step))
    kept = (replace(node, earlier=()), *node.earlier) if node.removes else node.earlier
    return replace(node, value=content, removes=False, earlier=kept)
