"""What may be written and shown: references to the environment instead of their values, `~` instead of the home folder,
and no control characters.

A recipe's `${NAME}` is read from the environment for the work. What is written keeps the reference, with the value's
SHA-256 where it must be held to, and is read back through the environment of the day. Only text counts: a number, or
one of a field's own words such as `bfloat16`, is no secret, and a record without it would be worth nothing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

from lorafit.errors import UsageError

REFERENCE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")
T = TypeVar("T")

_SECRET_NAME = re.compile(r"(^|_)(TOKEN|(API|ACCESS)?KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
"""Variables whose values are shown by nobody, whether a recipe names them or not."""
_PASSWORD = re.compile(
    r"(://)[^/@\s'\"]+(?=@)|([?&][\w-]*(?:token|key|sig|signature|password|secret)=)[^&\s'\"]+", re.IGNORECASE
)
"""User and password in a URL, and what signs it."""
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control characters but for line breaks and tabs, marks of direction, separators, tags."""
_verbatim = False
_read: set[str] = set()
"""The references that this process has read."""


@dataclass(frozen=True)
class Reference:
    """A `${NAME}` as it was written, and the SHA-256 of the value that it had."""

    text: str
    sha256: str

    @staticmethod
    def of(text: str, value: str) -> Reference:
        import hashlib  # which --help does without

        return Reference(text, hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest())


References = Mapping[str, Reference]
"""References by the dotted key in the recipe."""


def value_of(reference: str) -> str | None:
    """What the environment holds for `${NAME}`; None if nothing."""
    match = REFERENCE.fullmatch(reference)
    return os.environ.get(match["name"]) if match else None


# --- writing and reading back ---------------------------------------------------------------------


def at_keys(values: T, references: References, key: str = "") -> T:
    """Values of a recipe, below a dotted key, with each reference where it was written."""
    return _each(values, lambda text, where: references[where].text if where in references else text, key)


def as_written(value: T, references: References) -> T:
    """Text, or nested values, for a file: no value of a reference, and `~` for the home folder.

    The name of the run directory, which bears it, is no secret.
    """
    swaps = _swaps(one.text for key, one in references.items() if key != "output_dir")
    return _each(value, lambda text, _: from_home(_swapped(text, swaps)), keys=True)


def read_back(value: T, references: References) -> T:
    """What `as_written` and `at_keys` gave, with the values of today; a reference that has none stays."""
    swaps = [(one.text, found) for one in references.values() if (found := value_of(one.text)) is not None]
    return _each(value, lambda text, _: _swapped(text, swaps), keys=True) if swaps else value


def expanded(path: str | Path) -> Path:
    """A path with `~` and `${NAME}` as this machine has them. Raises UsageError for a variable that is not set."""
    found = Path(os.path.expanduser(path))
    if "${" not in str(path) or os.path.lexists(found):
        return found
    for match in REFERENCE.finditer(str(path)):
        if match["name"] not in os.environ:
            raise UsageError(_unset(str(path), match["name"]))
    return Path(os.path.expanduser(REFERENCE.sub(lambda match: os.environ[match["name"]], str(path))))


def require(references: References, section: str = "") -> None:
    """See that the environment still holds what a recipe, or a section of it, takes from it. Raises UsageError."""
    lost = [
        _unset(f"{key}: {one.text}", match["name"])
        for key, one in references.items()
        if key.startswith(section) and value_of(one.text) is None and (match := REFERENCE.match(one.text))
    ]
    if lost:
        raise UsageError("\n".join(lost))


def _unset(what: str, name: str) -> str:
    return f"{what}: the environment variable {name} is not set, from which the recipe takes it"


def from_home(text: str) -> str:
    """Text with `~` for the home folder."""
    home = os.path.expanduser("~").rstrip("/")
    if not home.startswith("/"):
        return text
    places, pattern = _homes(home)
    return pattern.sub("~", text) if any(place in text for place in places) else text


@functools.lru_cache
def _homes(home: str) -> tuple[tuple[str, ...], re.Pattern[str]]:
    places = tuple(dict.fromkeys((home, os.path.realpath(home))))
    either = "|".join(map(re.escape, places))
    return places, re.compile(rf"(?:(?<![\w.~/-])|(?<=://))(?:{either})(?![\w.-])")


def _each(value: T, change: Callable[[str, str], str], key: str = "", keys: bool = False) -> T:
    """Nested values with all texts changed; with `keys`, those of mappings too."""
    below = f"{key}." if key else ""
    changed: Any = value
    if isinstance(value, str):
        changed = change(value, key)
    elif isinstance(value, dict):
        changed = {
            change(name, "") if keys and isinstance(name, str) else name: _each(child, change, f"{below}{name}", keys)
            for name, child in value.items()
        }
    elif isinstance(value, list | tuple):
        changed = type(value)(_each(child, change, f"{below}{index}", keys) for index, child in enumerate(value))
    return cast(T, changed)


def _swaps(references: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """What to write for which text, the longest first."""
    return _swaps_of(tuple((text, value_of(text) or "") for text in references))


@functools.lru_cache(maxsize=8)
def _swaps_of(values: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for text, value in values:
        match = REFERENCE.fullmatch(text)
        for part in _parts(value, match is not None and _is_secret(match["name"])):
            for spelt in (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1]):
                found.setdefault(spelt, text)
    return tuple(sorted(found.items(), key=lambda item: -len(item[0])))


@functools.lru_cache(maxsize=1024)
def _is_secret(variable: str) -> bool:
    return _SECRET_NAME.search(variable) is not None


def _parts(value: str, is_secret: bool) -> Iterator[str]:
    """A value, and what of it may stand alone: the host and the path of a URL. Words such as `question` may not."""
    if re.fullmatch(r"[\d.,eE+-]+", value):
        return  # a number, of which there are many
    is_path = len(value) >= 4 and re.search(r"[/:@\\]", value)
    if is_path or len(value) >= 20 or (len(value) >= 6 and (is_secret or re.search(r"[^a-z_]", value))):
        yield value
    if "://" in value:
        host, _, path = value.partition("://")[2].partition("/")
        yield from (part for part in (host, host.partition("@")[0], f"/{path.rstrip('/')}") if len(part) >= 6)


def _swapped(text: str, swaps: Iterable[tuple[str, str]]) -> str:
    for before, after in swaps:
        if before in text:
            start, end = (r"(?<!\w)", r"(?!\w)") if len(before) < 12 else ("", "")  # it may be a part of other words
            if before.startswith(("/", "~", ".")):  # a path is no part of another name: of a/b in a/b-c
                end = r"(?![\w-]|\.\w)"
            text = re.sub(f"{start}{re.escape(before)}{end}", after.replace("\\", r"\\"), text)
    return text


# --- showing --------------------------------------------------------------------------------------


def remember(references: References) -> None:
    """Have the values of references shown as the references, from now on; not where a run is, which scripts read."""
    _read.update(one.text for key, one in references.items() if key != "output_dir")


def hidden(text: str) -> str:
    """Text for people: no value of a reference or of a variable that holds a key, and no password of a URL."""
    keys = (name for name in os.environ if _is_secret(name))
    held = (f"${{{name}}}" for name in keys if not os.environ[name].startswith(("/", "~", ".")))  # a file of keys
    text = _swapped(text, _swaps((*_read, *held)))
    return _PASSWORD.sub(lambda match: f"{match[1] or match[2]}…", text) if "://" in text or "=" in text else text


def hidden_in(value: T) -> T:
    """Nested values for a program, with `hidden` texts; numbers are no secrets."""
    return value if _verbatim else _each(value, lambda text, _: hidden(text), keys=True)


def visible(text: str) -> str:
    """Text whose control characters can be seen, and do nothing to a terminal; JSON stays the same JSON."""
    return _HIDDEN.sub(_escape, text)


@contextlib.contextmanager
def verbatim() -> Iterator[None]:
    """What is printed in the block is data: rows, and paths for scripts. Only control characters are escaped."""
    global _verbatim
    before, _verbatim = _verbatim, True
    try:
        yield
    finally:
        _verbatim = before


def shown(text: str, talk: bool) -> str:
    """Text as a user may see it; in talk, as on stderr, the home folder is `~`, and in data a path stays what it is."""
    if _verbatim and not talk:
        return visible(text)
    text = visible(hidden(text))
    return from_home(text) if talk else text


def _escape(match: re.Match[str]) -> str:
    data = match[0].encode("utf-16-be")
    return "".join(f"\\u{data[at : at + 2].hex()}" for at in range(0, len(data), 2))


class Guarded:
    """A stream to the user, on which nothing is shown that must not be. It has no bytes below, which would go by."""

    def __init__(self, stream: TextIO, talk: bool) -> None:
        self._stream = stream
        self._talk = talk

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._stream.write(shown(text, self._talk))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    @property
    def styled(self) -> TextIO | Guarded:
        """Where lorafit.console writes: on a terminal its styles go by, as it guards what they are around."""
        return self._stream if self._stream.isatty() else self


def guard_streams() -> None:
    """Guard stdout and stderr; what a terminal can't show is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed, as by cron
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Guarded):
            setattr(sys, name, Guarded(stream, talk=name == "stderr"))
