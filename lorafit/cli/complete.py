"""What a shell completes: recipes, runs, keys of the recipe with their values, GPUs.

Typer speaks the shells' protocols; this gives the candidates. A completion that fails says nothing: its output would
land in the line that is being typed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Candidates: TypeAlias = list[str | tuple[str, str]]
"""Values, or values with a help text."""

COMPLETE = "_LORAFIT_COMPLETE"
_KEY_BEFORE = "_LORAFIT_KEY"
"""The key of which bash completes the value: it takes `=` for a word of its own."""
_MOST_READ = 64 * 1024
_RECIPE = re.compile(rb"^(model|extends)\s*:", re.MULTILINE)
_UNSAFE = re.compile(r"([^\w@%+=:,./~-])")


def quietly(candidates: Callable[[str], Candidates]) -> Callable[[str], Candidates]:
    """No candidates where something goes wrong."""

    @functools.wraps(candidates)
    def guarded(incomplete: str) -> Candidates:
        try:
            return candidates(incomplete)
        except Exception:  # noqa: BLE001 - whatever it is, the line that is typed is not the place to say it
            return []

    return guarded


# --- files ----------------------------------------------------------------------------------------


@quietly
def recipes(incomplete: str) -> Candidates:
    """Recipe files, and folders on the way to them."""
    return list(_paths(incomplete, _is_recipe))


@quietly
def runs(incomplete: str) -> Candidates:
    """Run directories, and folders on the way to them; at first those below runs/."""
    found = list(_paths(incomplete, _is_run))
    if not incomplete:
        found += [path for path in _paths("runs/", _is_run) if path not in found]
    return list(found)


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """What is wanted and begins so, and folders. A single folder is entered: shells put a space behind it."""
    typed, _, begin = incomplete.rpartition("/")
    typed += "/" if "/" in incomplete else ""
    found = []
    for path in sorted(Path(typed or ".").expanduser().iterdir()):
        if not path.name.startswith(begin) or (path.name.startswith((".", "__")) and not begin):
            continue
        if wanted(path):
            found.append(typed + path.name)
        elif path.is_dir():
            found.append(f"{typed}{path.name}/")
    if len(found) == 1 and found[0].endswith("/"):
        return _paths(found[0], wanted) or found
    return found


def _is_recipe(path: Path) -> bool:
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return _RECIPE.search(stream.read(_MOST_READ)) is not None
    except OSError:
        return False


def _is_run(path: Path) -> bool:
    return (path / "plan.json").is_file()


# --- keys of the recipe ---------------------------------------------------------------------------


@quietly
def keys(incomplete: str) -> Candidates:
    """Keys of the recipe with what they mean; after `key=`, its values."""
    before = os.environ.get(_KEY_BEFORE)
    if before:
        return [value for value in _values(before) if value.startswith(incomplete)]
    key, sign, begin = incomplete.partition("=")
    if sign:
        return [f"{key}={value}" for value in _values(key) if value.startswith(begin)]
    found: list[tuple[str, str]] = []
    for name, field in _fields(incomplete):
        if name.startswith(incomplete):
            found.append((f"{name}=", _first_sentence(field.description)))
    if len(found) == 1:  # with more than one candidate, shells put no space behind what they have in common
        name, meaning = found[0]
        return [found[0], *((f"{name}{value}", meaning) for value in _values(name[:-1]))]
    return list(found)


def _fields(typed: str) -> Iterator[tuple[str, Any]]:
    """Every key that holds a value, with pydantic's field; items of lists have the number that is typed, else 0."""
    from lorafit.recipe.load import section_at, sections

    numbers = iter(re.findall(r"\.(\d+)\.", typed))
    number = next(numbers, "0")
    for path, section in sections():
        shown: tuple[str, ...] = ()
        for depth, step in enumerate(path):
            parent = section_at(path[:depth])
            listed = parent is not None and _is_list(parent.model_fields[step].annotation)
            shown = (*shown, step, number) if listed else (*shown, step)
        for name, field in section.model_fields.items():
            if section_at((*path, name)) is None or _has_values(field.annotation):
                yield ".".join((*shown, name)), field


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in _parts(annotation))


def _has_values(annotation: Any) -> bool:
    return any(part in (str, int, float, bool) for part in _parts(annotation))


def _parts(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _parts(part)
    elif origin is typing.Annotated:
        yield from _parts(typing.get_args(annotation)[0])
    else:
        yield annotation


def _values(key: str) -> list[str]:
    """The choices of a key's field, or else its default."""
    field = next((field for name, field in _fields(key) if name == key), None)
    if field is None:
        return []
    found: dict[str, None] = {}
    for part in _parts(field.annotation):
        if typing.get_origin(part) is typing.Literal:
            found |= {str(choice): None for choice in typing.get_args(part)}
        elif part is bool:
            found |= {"true": None, "false": None}
        elif part is type(None):
            found["null"] = None
    default = field.default
    if isinstance(default, int | float) and not isinstance(default, bool):
        found = {str(default): None} | found
    return list(found)


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=[.:;])\s", " ".join((text or "").split()), maxsplit=1)[0].rstrip(".:;")


# --- GPUs -----------------------------------------------------------------------------------------


@quietly
def gpus(incomplete: str) -> Candidates:
    """Names of known GPUs, however they are capitalized."""
    from lorafit.gpus import GPUS

    return [gpu.name for gpu in GPUS if gpu.name.startswith(incomplete)]


# --- the protocol ---------------------------------------------------------------------------------


def answer(app: Callable[[], Any]) -> None:
    """Answer a shell, silently where something goes wrong, and exit."""
    asked = os.environ.get(COMPLETE, "")
    quoted = False
    if asked == "complete_bash":
        with contextlib.suppress(Exception):
            changed, quoted = bash_words(os.environ)
            os.environ |= changed
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            app()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except Exception:  # noqa: BLE001 - as above
            code = 1
    text = said.getvalue()
    if asked == "complete_bash" and not quoted:
        text = "".join(_UNSAFE.sub(r"\\\1", line) + "\n" for line in text.splitlines())
    sys.stdout.write(text)
    sys.exit(code)


def bash_words(environment: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """What to change of bash's words, one a line, where a key and its `=` are words of their own.

    Returns also whether the word that is completed began with a quote, in which bash wants no backslashes.
    """
    words = environment["COMP_WORDS"].split("\n")
    at = int(environment["COMP_CWORD"])
    current = words[at] if at < len(words) else ""
    before = words[:at]
    key = None
    if current == "=" and before:
        *before, key = before
        current = ""
    elif len(before) > 1 and before[-1] == "=":
        *before, key, _ = before
    changed = {}
    if key is not None and before and before[-1] == "--set":
        changed = {"COMP_WORDS": "\n".join((*before, current)), "COMP_CWORD": str(len(before)), _KEY_BEFORE: key}
    return changed, current.startswith(("'", '"'))
