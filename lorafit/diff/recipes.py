"""The two recipes of a comparison, from files or a revision of git, and what differs between their values."""

from __future__ import annotations

import difflib
import errno
import os
import posixpath
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorafit.errors import UsageError
from lorafit.outcome import Outcome, Outcomes
from lorafit.plan.adapters import ADAPTERS
from lorafit.recipe import Recipe, load
from lorafit.recipe.layers import Disk
from lorafit.recipe.load import section_at
from lorafit.text import first_line, printable
from lorafit.tree import differences, dotted
from lorafit.written import expanded


@dataclass(frozen=True)
class Opened:
    """A recipe that was read, by the name that was typed; from the disk where it has no revision."""

    name: str
    revision: Revision | None
    outcome: Outcome

    @property
    def recipe(self) -> Recipe:
        return self.outcome.recipe

    def content_hash(self, path: str) -> str | None:
        """What the content of a file is told by, at the revision or on the disk; None if it isn't kept there."""
        file = expanded(path)
        try:
            if self.revision is not None:
                return self.revision.hash_of(Path(os.path.abspath(file)))
            if not file.is_file() or "\n" in path:
                return None
            return run("hash-object", "--stdin-paths", given=f"{os.path.abspath(file)}\n".encode()).decode().strip()
        except (UsageError, OSError, ValueError):
            return None


def open_recipe(text: str, outcomes: Outcomes) -> Opened:
    """A file, or `REV:path`. A file of that very name comes first. Raises UsageError and RecipeError."""
    parts = None if os.path.lexists(text) else split_revision(text)
    if parts is not None:
        revision, path = open_revision(text, *parts)
        return Opened(text, revision, outcomes.of(load(path, store=revision), path.stem))
    if not os.path.exists(text):
        raise UsageError(f"{printable(text)}: there is no such file")
    return Opened(text, None, outcomes.of(load(text), Path(text).stem))


Kind = Literal["changed", "added", "removed"]
UNORDERED = {
    *(f"{adapter.name}.{key}" for adapter in ADAPTERS for key in adapter.unordered),
    "quantization.llm_int8_skip_modules",
    "training.report_to",
    "eval.gates",
    "eval.forgetting",
    "eval.lm_eval.tasks",
}
"""Lists of which the order means nothing."""
_NAMED_BY = {"dataset.train": ("path", "name", "split"), "dataset.validation": ("path", "name", "split")}


@dataclass(frozen=True)
class Change:
    """A value that differs.

    Attributes:
        key: dotted; an item of a list by its name, such as dataset.train[data/a.jsonl].weight.
        path: the key without items, such as dataset.train.weight.
        before, after: as the recipes say; None also where there is nothing.
        meant_before, meant_after: what that comes to, where it is another value (such as that of auto).
    """

    key: str
    path: str
    before: Any
    after: Any
    kind: Kind = "changed"
    meant_before: Any = None
    meant_after: Any = None


ABSENT, ORDER = object(), object()
"""What stands for a value that is not there, and for the order of a list beside its items."""


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The changes between two recipes' resolved values, in the recipe's order."""
    found = (_change(*each) for each in differences(before, after, items=_items, absent=ABSENT))
    return [one for one in found if one.path not in UNORDERED or _sorted(one.before) != _sorted(one.after)]


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _change(steps: tuple[Any, ...], before: Any, after: Any) -> Change:
    key = ""
    for step in steps:
        if isinstance(step, str):
            key += f".{step}" if key else step
        else:
            key += " (order)" if step is ORDER else f"[{step[0]}]"
    kind: Kind = "changed"
    if before is ABSENT or (before is None and after is not ABSENT):
        kind = "added"
    elif after is ABSENT or after is None:
        kind = "removed"
    if steps[-1] is ORDER:
        before, after = ([name[0] for name in names] for names in (before, after))
    old, new = (None if value is ABSENT else value for value in (before, after))
    return Change(key, dotted(step for step in steps if isinstance(step, str)), old, new, kind)


def _items(steps: tuple[Any, ...], before: Any, after: Any) -> tuple[Any, Any]:
    """Lists of sections by what names their items; one that is left of each list makes a pair, too."""
    path = tuple(step for step in steps if isinstance(step, str))
    are_sections = isinstance(before, list) and isinstance(after, list) and section_at(path) is not None
    if not are_sections or steps[-1] is ORDER:
        return before, after
    by = _NAMED_BY.get(dotted(path), ("name",))
    old, new = _named(before, by), _named(after, by)
    removed, added = [name for name in old if name not in new], [name for name in new if name not in old]
    if len(removed) == len(added) == 1:
        old = {added[0] if name in removed else name: item for name, item in old.items()}
        removed = []
    first = {name: old[name] for name in (*removed, *(name for name in new if name in old))}
    first |= {name: ABSENT for name in new if name not in old}
    if dotted(path) in _NAMED_BY and [name for name in old if name in new] != [name for name in new if name in old]:
        return first | {ORDER: [*_named(before, by)]}, new | {ORDER: [*new]}
    return first, new


def _named(items: list[Any], by: tuple[str, ...]) -> dict[Any, Any]:
    """Items by their names, those of the same name numbered."""
    names = [tuple(item[field] for field in by) for item in items]
    return {(*name, names[:number].count(name)): items[number] for number, name in enumerate(names)}


TIMEOUT = 30
"""Seconds for one call of git."""
INDEX = ""
"""The revision of `:path`: what is staged."""


def split_revision(text: str) -> tuple[str, str] | None:
    """`REV:path` in its parts, as git parts it: at the first colon outside braces. None without a colon."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if character == ":" and depth <= 0:
            return text[:place], text[place + 1 :]
    return None


@dataclass(frozen=True)
class Entry:
    """What stands at a path: a blob (a file), a tree (a folder), "missing", or what else it is."""

    kind: str
    hash: str = ""
    size: int = 0


@dataclass
class Revision(Disk):
    """The files of one revision. What is named outside of the repository is read from the disk.

    Attributes:
        name: as it was typed; it stands before paths in messages.
        tree: its tree's hash, so that the revision is looked up once; INDEX for what is staged.
        top: the repository's root; None for a bare one.
    """

    name: str
    tree: str
    top: Path | None
    _disk: Disk = field(default_factory=Disk)
    _known: dict[str, Entry] = field(default_factory=dict)

    def real(self, file: Path) -> str:
        inside = self._inside(file)
        return self._disk.real(file) if inside is None else f"{self.name}:{inside}"

    def shown(self, file: Path) -> str:
        inside = self._inside(file)
        return str(file) if inside is None else f"{self.name}:{inside}"

    def exists(self, file: Path) -> bool:
        inside = self._inside(file)
        return self._disk.exists(file) if inside is None else self._entry(inside).kind != "missing"

    def is_file(self, file: Path) -> bool:
        inside = self._inside(file)
        return self._disk.is_file(file) if inside is None else self._entry(inside).kind == "blob"

    def read(self, file: Path, most: int) -> bytes:
        inside = self._inside(file)
        if inside is None:
            return self._disk.read(file, most)
        entry = self._entry(inside)
        if entry.kind != "blob":
            raise OSError(errno.ENOENT, f"is {entry.kind}")
        if entry.size > most:
            raise OSError(errno.EFBIG, f"has {entry.size} bytes, more than a recipe may have")
        return run("cat-file", "--batch", given=f"{entry.hash}\n".encode()).partition(b"\n")[2][: entry.size]

    def hash_of(self, file: Path) -> str | None:
        """What the content of a file is told by; None if the revision doesn't have it."""
        inside = self._inside(file)
        entry = None if inside is None else self._entry(inside)
        return entry.hash if entry and entry.kind == "blob" else None

    def files(self) -> list[str]:
        """The paths of all files, from the root."""
        if self.tree == INDEX:
            return _lines(run("ls-files", "-z", "--full-name", ":/"))
        return _lines(run("ls-tree", "-r", "-z", "--name-only", "--full-tree", self.tree))

    def _inside(self, file: Path) -> str | None:
        """The path from the repository's root; None for what is outside."""
        path = file.as_posix()
        if file.is_absolute():
            if self.top is None or not file.is_relative_to(self.top):
                return None
            path = file.relative_to(self.top).as_posix()
        path = posixpath.normpath(path)
        return None if path == ".." or path.startswith("../") else path

    def _entry(self, inside: str) -> Entry:
        if inside not in self._known:
            self._known[inside] = self._look(inside)
        return self._known[inside]

    def _look(self, inside: str) -> Entry:
        if "\n" in inside or "\0" in inside:
            return Entry("missing")
        # The name goes through stdin, where nothing is an option. What is staged has no links to follow.
        follow = [] if self.tree == INDEX else ["--follow-symlinks"]
        given = f"{self.tree}:{inside}\n".encode("utf-8", "surrogateescape")
        words = run("cat-file", "--batch-check", *follow, given=given).partition(b"\n")[0].split()
        if words[0] == b"symlink":
            return Entry("a link out of the repository")
        if len(words) != 3 or words[1] not in (b"blob", b"tree"):
            return Entry("missing")
        return Entry(words[1].decode(), words[0].decode(), int(words[2]))


def open_tree(revision: str) -> Revision:
    """A revision of the repository that the working directory is in. Raises UsageError."""
    top = Path(_text(run("rev-parse", "--show-toplevel")))
    return Revision(revision, _tree(revision, printable(revision)), top)


def open_revision(text: str, revision: str, path: str) -> tuple[Revision, Path]:
    """The revision and the path in it of `REV:path`, as typed in `text`.

    A path is taken from the repository's root, or with `./` or `../` from the working directory; one that isn't
    there from the root, but is from the working directory, is meant so. Raises UsageError.
    """
    shown = printable(text)
    if not path or "\n" in text or "\0" in text:
        raise UsageError(f"{shown}: expected REV:path, such as main:configs/llama3-qlora.yaml")
    try:
        prefix = _text(run("rev-parse", "--show-prefix"))
    except UsageError as error:
        raise UsageError(f"{shown}: no such file; and as REV:path: {error}") from None
    try:
        top = Path(_text(run("rev-parse", "--show-toplevel")))
    except UsageError:
        top = None
    opened = Revision(revision, _tree(revision, shown), top)
    from_here = posixpath.normpath(posixpath.join(prefix, path))
    dotted = path.startswith(("./", "../"))
    candidates = [from_here] if dotted else [posixpath.normpath(path), from_here]
    for candidate in candidates:
        if candidate.startswith(("../", "/")):
            raise UsageError(f"{shown}: {candidate} is outside of the repository")
        if opened.is_file(Path(candidate)):
            return opened, Path(candidate)
    near = difflib.get_close_matches(candidates[0], opened.files(), n=1, cutoff=0.6)
    hint = f"; did you mean '{printable(f'{revision}:{near[0]}')}'?" if near else ""
    what = "is no file" if opened.exists(Path(candidates[0])) else "is not"
    where = f"in {printable(revision)}" if revision else "in the index"
    raise UsageError(f"{shown}: {printable(candidates[0])} {what} {where}{hint}")


def run(*arguments: str, given: bytes = b"") -> bytes:
    """What git prints. Raises UsageError, with git's own first line."""
    environment = os.environ | {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(["git", *arguments], input=given, capture_output=True, env=environment, timeout=TIMEOUT)
    except FileNotFoundError:
        raise UsageError("git is not installed, and REV:path is read with it") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"git did not answer within {TIMEOUT} seconds") from None
    if done.returncode:
        raise UsageError(f"git: {first_line(done.stderr.decode(errors='replace')).removeprefix('fatal: ')}")
    return done.stdout


def _tree(revision: str, shown: str) -> str:
    """The hash of a revision's tree. Raises UsageError."""
    if revision == INDEX:
        return INDEX
    out = run("cat-file", "--batch-check", given=f"{revision}^{{tree}}\n".encode("utf-8", "surrogateescape"))
    words = out.split()
    if len(words) != 3 or words[1] != b"tree":
        hint = "a clone of a CI may have to fetch it first, as with fetch-depth: 0"
        raise UsageError(f"{shown}: there is no revision '{printable(revision)}' in this repository; {hint}")
    return words[0].decode()


def _text(out: bytes) -> str:
    return out.decode("utf-8", "surrogateescape").removesuffix("\n")


def _lines(out: bytes) -> list[str]:
    return [part.decode("utf-8", "surrogateescape") for part in out.split(b"\0") if part]
