"""What a shell completes: recipes, runs, keys of the recipe with their values, GPUs.

Typer speaks the shells' protocols; this gives the candidates. A completion that fails says nothing: its output would
land in the line that is being typed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

Candidates: TypeAlias = list[str | tuple[str, str]]
"""Values, or values with a help text."""

COMPLETE = "_LORAFIT_COMPLETE"
_MOST_READ = 64 * 1024
_RECIPE = re.compile(rb"^(model|extends)\s*:", re.MULTILINE)
_UNSAFE = re.compile(r"([^\w@%+=:,./~-])")
_PLAIN = {"string", "number", "integer", "boolean"}


def recipes(incomplete: str) -> Candidates:
    """Recipe files, and folders on the way to them."""
    return list(_paths(incomplete, _is_recipe))


def runs(incomplete: str) -> Candidates:
    """Run directories, and folders on the way to them; at first those below runs/."""
    found = _paths(incomplete, _is_run)
    more = _paths("runs/", _is_run) if not incomplete and Path("runs").is_dir() else []
    return list(dict.fromkeys([*found, *more]))


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """What is wanted and begins so, and folders. A single folder is entered: shells put a space behind it."""
    typed, slash, begin = incomplete.rpartition("/")
    found = []
    for path in sorted(Path(typed + slash or ".").expanduser().iterdir()):
        if not path.name.startswith(begin) or (path.name.startswith((".", "__")) and not begin):
            continue
        if wanted(path):
            found.append(typed + slash + path.name)
        elif path.is_dir():
            found.append(f"{typed}{slash}{path.name}/")
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


def gpus(incomplete: str) -> Candidates:
    """Names of known GPUs."""
    from lorafit.gpus import GPUS

    return [gpu.name for gpu in GPUS if gpu.name.startswith(incomplete)]


def keys(incomplete: str) -> Candidates:
    """Keys of the recipe with what they mean; after `key=`, its values."""
    fields = dict(_fields(incomplete))
    key, sign, begin = incomplete.partition("=")
    if sign:
        return [f"{key}={value}" for value in _values(fields.get(key, {})) if value.startswith(begin)]
    found = {name: _meaning(field) for name, field in fields.items() if name.startswith(incomplete)}
    made: Candidates = [(f"{name}=", meaning) for name, meaning in found.items()]
    if len(found) == 1:  # with more than one candidate, shells put no space behind what they have in common
        [(name, meaning)] = found.items()
        made += [(f"{name}={value}", meaning) for value in _values(fields[name])]
    return made


def _fields(typed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that holds a value, with its JSON schema; items of lists have the number that is typed, else 0."""
    from lorafit.cli.schema import json_schema

    schema = json_schema()
    number = next(iter(re.findall(r"\.(\d+)\.", typed)), "0")
    open_sections = [("", schema)]
    for where, section in open_sections:
        for name, field in section["properties"].items():
            nested = False
            for form in _forms(field):
                listed = "items" in form
                reference = (form["items"] if listed else form).get("$ref")
                if reference:
                    nested = True
                    below = f"{where}{name}.{number}." if listed else f"{where}{name}."
                    open_sections.append((below, schema["$defs"][reference.rpartition("/")[2]]))
            holds_value = not nested or any(form.get("type") in _PLAIN for form in _forms(field))
            if holds_value and name != "extends":
                yield where + name, field


def _forms(field: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a field, but for a reference to the environment."""
    return [form for form in field.get("anyOf", [field]) if "pattern" not in form]


def _values(field: dict[str, Any]) -> list[str]:
    """The default of a number, and the choices of a field."""
    default = field.get("default")
    is_number = isinstance(default, int | float) and not isinstance(default, bool)
    found = {str(default): None} if is_number else {}
    for form in _forms(field):
        constant = [form["const"]] if "const" in form else []
        of_type = {"boolean": ["true", "false"], "null": ["null"]}.get(form.get("type", ""), [])
        found |= dict.fromkeys(map(str, [*form.get("enum", constant), *of_type]))
    return list(found)


def _meaning(field: dict[str, Any]) -> str:
    """The first sentence of a field's description."""
    text = " ".join(field.get("description", "").split())
    return re.split(r"(?<=[.:;])\s", text, maxsplit=1)[0].rstrip(".:;")


def answer(app: Callable[[], Any]) -> None:
    """Answer a shell, silently where something goes wrong, and exit."""
    said, code = io.StringIO(), 1
    candidate: Callable[[str], str] = str
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            if os.environ[COMPLETE] == "complete_bash":
                candidate = _bash_words()
            app()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except Exception:  # noqa: BLE001 - whatever it is, the line that is typed is not the place to say it
            said.truncate(0)
    sys.stdout.write("".join(f"{candidate(line)}\n" for line in said.getvalue().splitlines()))
    sys.exit(code)


def _bash_words() -> Callable[[str], str]:
    """Join a key and its value in bash's words, where `=` is a word of its own.

    Returns what makes a candidate of an answer: as bash would type it, with backslashes but in quotes.
    """
    words = os.environ["COMP_WORDS"].split("\n")[: int(os.environ["COMP_CWORD"]) + 1]
    quoted = words[-1].startswith(("'", '"'))
    before, value = (words[:-1], "") if words[-1] == "=" else (words[:-2], words[-1])
    key = ""
    if before and "=" in words[-2:]:
        key = f"{before.pop()}="
        words = [*before, key + value]
        os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(before))}

    def candidate(text: str) -> str:
        text = text.removeprefix(key)
        return text if quoted else _UNSAFE.sub(r"\\\1", text)

    return candidate
