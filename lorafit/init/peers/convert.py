"""One conversion: other tools' YAML, a rule for each key, what a tool's own code decides, and what was left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml

from lorafit.bounds import read_bytes
from lorafit.errors import UsageError
from lorafit.init.document import Document, Line
from lorafit.init.peers.read import flag
from lorafit.recipe import RecipeError
from lorafit.recipe.start import FREE
from lorafit.recipe.yaml import MAX_BYTES, Located, Reader, compose, parse_scalar
from lorafit.text import clipped, near, printable


class _Dialect(Reader):
    """Reads an empty value as null, and takes nothing from the environment."""

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str | int, ...]) -> Any:
        text = self._text(node, path, node.value)
        if node.style is not None:
            return text
        try:
            return parse_scalar(text)
        except ValueError:
            self.mistake(node, path, "this number is too large; quote it if it is text")
            return None


def read_peer(file: Path) -> Located:
    """The mapping in a file. Raises RecipeError with the places of what can't be read, and UsageError."""
    try:
        data = read_bytes(file)
    except OSError as error:
        raise UsageError(f"{file}: can't be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{file}: is larger than {MAX_BYTES // 1024} KiB: not a recipe")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is not UTF-8 text") from None
    reader = _Dialect(str(file), {})
    root = reader.read(compose(text, str(file))).located
    if reader.mistakes:
        raise RecipeError(reader.mistakes)
    if not isinstance(root.value, dict):
        raise UsageError(f"{file}: expected a mapping of keys, such as `base_model: …`")
    return root


Fate = Literal["becomes", "decides", "idle", "lost", "refused"]
"""`becomes`: the value is the recipe's. `decides`: together with other keys. `idle`: has no effect on what is learned.
`lost`: no equivalent, and listed. `refused`: no recipe is made, since it would train something else."""

_FALSE: tuple[Any, ...] = (False, "no", "false", "off")
OFF: tuple[Any, ...] = (None, "", 0, "none", [], {}, *_FALSE)


@dataclass(frozen=True)
class Rule:
    """What becomes of a key.

    Attributes:
        key: the tool's; `*` stands for anything, `datasets[].` for a data set's own.
        target: the recipe's key or keys.
        read: the value for the recipe. Raises ValueError.
        harmless: values with which a lost or refused key changes nothing, besides those that turn it off. Where true
            is one, as the tool's default, false is a choice and not "off".
        chosen: values that are a choice as well, though they look like "off".
    """

    key: str
    fate: Fate
    target: str = ""
    remark: str = ""
    read: Callable[[Any], Any] = str
    harmless: tuple[Any, ...] = ()
    chosen: tuple[Any, ...] = ()

    def is_off(self, value: Any) -> bool:
        chosen = (*self.chosen, *(_FALSE if True in self.harmless else ()))
        return _is_among(value, (*OFF, *self.harmless)) and not _is_among(value, chosen)


def _is_among(value: Any, known: Iterable[Any]) -> bool:
    """Whether a value is among others: case does not matter, and true and false are no numbers."""
    word = value.lower() if isinstance(value, str) else value
    return any(word == one and isinstance(word, bool) is isinstance(one, bool) for one in known)


Rules = tuple[Rule, ...]


def becomes(key: str, target: str, read: Callable[[Any], Any]) -> Rules:
    return (Rule(key, "becomes", target, read=read),)


def decides(keys: str, target: str, remark: str = "") -> Rules:
    """For keys with spaces between."""
    return tuple(Rule(key, "decides", target, remark) for key in keys.split())


def idle(keys: str, remark: str) -> Rules:
    return tuple(Rule(key, "idle", "", remark) for key in keys.split())


def lost(keys: str, remark: str, *harmless: Any, chosen: tuple[Any, ...] = ()) -> Rules:
    return tuple(Rule(key, "lost", "", remark, harmless=harmless, chosen=chosen) for key in keys.split())


def refused(keys: str, remark: str, *harmless: Any) -> Rules:
    return tuple(Rule(key, "refused", "", remark, harmless=harmless) for key in keys.split())


def table(*groups: Iterable[Rule]) -> Rules:
    return tuple(rule for group in groups for rule in group)


def find(rules: Rules, key: str) -> Rule | None:
    """The rule of a key: its own, or that of a pattern."""
    own = next((rule for rule in rules if rule.key == key), None)
    return own or next((rule for rule in rules if "*" in rule.key and fnmatchcase(key, rule.key)), None)


Kind = Literal["axolotl", "llamafactory", "trl"]
T = TypeVar("T")
NO_ADAPTER = "has no effect without an adapter"
NO_EFFECT = "no effect on what is learned"
AS_BY_DEFAULT = "as lorafit does it anyway"
TURNED_OFF, EMPTY = "off", "empty, so it is as by default"


@dataclass(frozen=True)
class Note:
    """Something of the other recipe that is not in this one."""

    line: int | None
    key: str
    message: str


@dataclass
class Conversion:
    """A conversion on its way.

    Attributes:
        lines: the recipe's values, by dotted key.
        notes: what has no equivalent.
        fates: what became of every key, in words; of `datasets.0.path` and its like too.
        beside: files that the recipe names, to be written beside it.
    """

    title: str
    file: Path
    output: Path
    source: Mapping[str, Located]
    rules: Rules
    lines: dict[str, Line] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    fates: dict[str, str] = field(default_factory=dict)
    beside: dict[Path, str] = field(default_factory=dict)

    def get(self, key: str, read: Callable[[Any], T], default: T) -> T:
        """The value of a key as it is read; the default where it isn't given, or null."""
        value = self.plain(key)
        return default if value is None else self.read(key, read, value)

    def on(self, key: str) -> bool:
        """Whether a switch is on; it is off where it isn't given."""
        return self.get(key, flag, False)

    def plain(self, key: str) -> Any:
        return self.source[key].plain() if key in self.source else None

    def given(self, key: str) -> bool:
        return self.plain(key) is not None

    def read(self, key: str, read: Callable[[Any], T], value: Any) -> T:
        try:
            return read(value)
        except ValueError as error:
            self.refuse(key, f"{error}, got {clipped(repr(value), 60)}")

    def put(self, target: str, value: Any, why: str = "") -> None:
        """Set a value of the recipe; where it comes from stands beside it."""
        self.lines[target] = Line(value, why)

    def why(self, key: str) -> str:
        """Where a value comes from that a key decides: the key, or the tool's default."""
        return key if self.given(key) else f"{self.title}'s default"

    def choose(self, target: str, key: str, read: Callable[[Any], T], default: T) -> None:
        """Set a value that a key gives, or the tool's default."""
        self.put(target, self.get(key, read, default), self.why(key))

    def default(self, target: str, value: Any) -> None:
        """Set the value that the tool has where nothing is said."""
        if target not in self.lines:
            self.put(target, value, f"{self.title}'s default")

    def defaults(self, **training: Any) -> None:
        """Set values of the training section that the tool has where nothing is said."""
        for name, value in training.items():
            self.default(f"training.{name}", value)

    def no_effect(self, *keys: str, why: str) -> None:
        """Say of the keys that are given that they change nothing of what is learned."""
        for key in keys:
            if self.given(key):
                self.fates[key] = f"{NO_EFFECT}: {why}"

    def value(self, target: str) -> Any:
        return self.lines[target].value if target in self.lines else None

    def note(self, key: str, message: str, fate: str | None = None) -> None:
        """List something that has no equivalent."""
        self.notes.append(Note(self.line_of(key), key, message))
        self.fates[key] = fate or message

    def line_of(self, path: str) -> int | None:
        node: Located | None = None
        value: Any = dict(self.source)
        for step in path.split("."):
            if isinstance(value, list) and step.isdecimal() and int(step) < len(value):
                node = value[int(step)]
            elif isinstance(value, dict) and step in value:
                node = value[step]
            else:
                break
            value = node.value
        if node is None:
            return None
        return (node.key or node.position).line

    def refuse(self, key: str, message: str) -> NoReturn:
        line = self.line_of(key)
        place = f"{self.file}:{line}" if line else str(self.file)
        raise UsageError(f"{printable(place)}: {printable(key)}: {printable(message)}")

    def apply(self, only: str = "", index: int | None = None, values: Mapping[str, Located] | None = None) -> None:
        """Let the table say what becomes of every key, or of the keys of one data set in a list called `only`."""
        for key, located in (self.source if values is None else values).items():
            path = key if values is None else f"{only}.{index}.{key}"
            rule = find(self.rules, key if values is None else f"{only}[].{key}")
            self.fates[path] = self._apply(path, rule, located.plain(), f"{only}[]." * (values is not None) + key)

    def _apply(self, path: str, rule: Rule | None, value: Any, key: str) -> str:
        if rule is None:
            prefix = key.rpartition(".")[0]
            known = [own.key.rpartition(".")[2] for own in self.rules if own.key.rpartition(".")[0] == prefix]
            hint = near(key.rpartition(".")[2], known)  # of hundreds of keys, only those that are alike
            message = f"unknown key of {self.title}{hint if hint.startswith('; did') else ''}"
            self.notes.append(Note(self.line_of(path), path, message))
            return message
        if rule.fate == "becomes":
            if value is None:
                return EMPTY
            self.put(rule.target, self.read(path, rule.read, value), key)
            return rule.target
        if rule.fate in ("decides", "idle"):
            return rule.target or f"{NO_EFFECT}{f': {rule.remark}' if rule.remark else ''}"
        if rule.is_off(value):
            return TURNED_OFF
        if rule.fate == "refused":
            self.refuse(path, rule.remark)
        message = f"no equivalent ({rule.remark})" if rule.remark else "no equivalent"
        self.notes.append(Note(self.line_of(path), path, message))
        return message

    def without_adapter(self, why: str = NO_ADAPTER, kept: tuple[str, ...] = ()) -> None:
        """Take out what is said of an adapter, but for the keys that are kept: it has no effect."""
        for key in [key for key in self.lines if key.startswith("lora.") and key.partition(".")[2] not in kept]:
            del self.lines[key]
        for key, fate in self.fates.items():
            if fate.startswith("lora.") and fate.partition(".")[2] not in kept:
                self.fates[key] = why

    def settle(self) -> None:
        """Where a key's value is what lorafit does anyway, so that nothing was written for it, say so.

        An adapter that goes on brings its own values.
        """
        if "start_from" in self.lines:
            self.without_adapter(f"{NO_EFFECT}: the adapter goes on as it is", FREE)
        for key, fate in self.fates.items():
            rule = find(self.rules, re.sub(r"^(test_)?datasets\.\d+\.", "datasets[].", key))
            if rule is None or rule.fate != "decides" or fate != rule.target:
                continue
            if not any(line.startswith(target) for target in fate.split(", ") for line in self.lines):
                self.fates[key] = f"{AS_BY_DEFAULT} ({fate})"

    def said(self) -> tuple[str, ...]:
        """The notes as lines, by place."""
        ordered = sorted(self.notes, key=lambda note: note.line or 10**9)
        return tuple(
            printable(f"{self.file}{f':{note.line}' if note.line else ''}: {note.key}: {note.message}")
            for note in ordered
        )

    def idle(self) -> tuple[str, ...]:
        """The keys for which nothing had to be written, with the reason, as lines by place."""
        reasons = (NO_ADAPTER, NO_EFFECT, AS_BY_DEFAULT, TURNED_OFF, EMPTY)
        listed = {note.key for note in self.notes}
        found = [(self.line_of(key), key, fate) for key, fate in self.fates.items() if fate.startswith(reasons)]
        given = sorted((line, key, fate) for line, key, fate in found if line is not None and key not in listed)
        return tuple(printable(f"{self.file}:{line}: {key}: {fate}") for line, key, fate in given)

    def document(self) -> Document:
        head = (f"Converted from {self.title}'s {printable(self.file.name)} by `lorafit init --from`.",)
        notes = self.said()
        foot = ("Not converted:", *(f"  {note}" for note in notes)) if notes else ()
        idle = self.idle()
        foot += ("Nothing had to be written for:", *(f"  {line}" for line in idle)) if idle else ()
        lines = {
            key: Line(line.value, "" if line.comment == key.rpartition(".")[2] else line.comment)
            for key, line in self.lines.items()
        }
        return Document(lines, head, foot)
