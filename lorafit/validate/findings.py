"""What validation finds, and its report: for people, and for what shows it in a CI."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lorafit import __version__
from lorafit.errors import EXIT_CODES, DataError, DoesNotFitError, LorafitError, ModelError, UsageError
from lorafit.recipe import Mistake, Position, Recipe, RecipeError
from lorafit.text import gib, printable
from lorafit.tree import KeyPath, dotted
from lorafit.written import hidden_in

RULES = {2: "recipe", 3: "data", 4: "model", 5: "memory"}
"""What a fault is about, by the exit code that it has everywhere."""
PARTS = ("data", "model", "memory")
"""What can be left out of the checks."""
Kind = Literal["recipe", "part"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, where it was written, and the exit code of what it is about."""

    mistake: Mistake
    exit_code: int

    @property
    def rule(self) -> str:
        return RULES[self.exit_code]

    @property
    def message(self) -> str:
        """What is wrong, after the key."""
        return f"{self.mistake.path}: " * bool(self.mistake.path) + self.mistake.message

    def as_dict(self) -> dict[str, Any]:
        at = self.mistake.position
        where = {"file": at.file, "line": at.line, "column": at.column, "key": self.mistake.path}
        return where | {"rule": self.rule, "exit_code": self.exit_code, "message": self.mistake.message}


@dataclass(frozen=True)
class Checked:
    """A recipe that was checked.

    Attributes:
        kind: whether it is a recipe, or a part that others extend (it has no model and no dataset).
        facts: what it comes to, as far as that is known, see `check`.
        notes: what was not checked and why, and the plan's remarks.
    """

    file: str
    kind: Kind
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "kind": self.kind,
            "ok": self.is_ok,
            "faults": [fault.as_dict() for fault in self.faults],
            "notes": list(self.notes),
            "facts": self.facts,
        }


@dataclass(frozen=True)
class Skipped:
    """A YAML file, or a link to a folder, that was found and not checked; why, and whether it may be a recipe."""

    file: str
    reason: str
    is_recipe: bool

    def as_fault(self) -> Checked:
        mistake = Mistake(Position(self.file), "", f"was not checked: it {self.reason}")
        return Checked(self.file, "recipe", (Fault(mistake, UsageError.exit_code),))


@dataclass(frozen=True)
class Report:
    """Everything that was checked, and what was not."""

    checked: tuple[Checked, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Each once: a parent's fault is found in all that extend it."""
        return tuple(dict.fromkeys(fault for one in self.checked for fault in one.faults))

    @property
    def exit_code(self) -> int:
        """0, or the lowest code of what was found."""
        return min((fault.exit_code for fault in self.faults), default=0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "validate_version": 2,
            "ok": not self.faults,
            "exit_code": self.exit_code,
            "recipes": [one.as_dict() for one in self.checked],
            "skipped": [dataclasses.asdict(one) for one in self.skipped],
        }


@dataclass
class Findings:
    """What was found in a recipe so far; if it is strict, what can't be checked is a fault."""

    recipe: Recipe
    strict: bool = False
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def wrong(self, path: KeyPath, error: LorafitError) -> None:
        """A fault for each line of an error, at a place in the recipe."""
        for line in str(error).splitlines():
            self.faults.append(Fault(self.recipe.mistake(path, line), error.exit_code))

    def refusal(self, beside: Iterable[Fault] = ()) -> LorafitError:
        """All faults as one error, of the lowest exit code among them; if there are none, of those beside them."""
        every = [*self.faults, *beside]
        code = min(fault.exit_code for fault in self.faults or every)
        if code == RecipeError.exit_code:
            return RecipeError(fault.mistake for fault in every)
        kinds = {kind.exit_code: kind for kind in (DataError, ModelError, DoesNotFitError)}
        return kinds.get(code, UsageError)("\n".join(str(fault.mistake) for fault in every))

    def unchecked(self, path: KeyPath, error: LorafitError) -> None:
        """What can't be told on this machine."""
        if self.strict:
            self.wrong(path, error)
        else:
            self.notes.append(f"{dotted(path)}: {error}")


def shown_file(at: Position) -> str | None:
    """The file without detours, relative to the working directory if it is below it; None for a `--set` argument."""
    if at.line is None and at.file.startswith("--set "):
        return None
    file = Path(os.path.normpath(at.file))
    return (file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file).as_posix()


def text(report: Report) -> str:
    return "\n".join([*_lines(report), _last(report)])


def _lines(report: Report) -> Iterator[str]:
    seen = set()
    for one in report.checked:
        yield f"{'ok  ' if one.is_ok else 'FAIL'} {printable(one.file)}{_about(one)}"
        for fault in one.faults:
            again = fault in seen
            seen.add(fault)
            yield f"     {fault.mistake.position}: (as above)" if again else f"     {fault.mistake}"
        for note in one.notes:
            yield f"     note: {printable(note)}"
    for left_out in report.skipped:
        yield f"skip {printable(left_out.file)}: {left_out.reason}"


def _about(one: Checked) -> str:
    if one.kind == "part":
        return "  a part: others extend it" if one.is_ok else ""
    if not one.is_ok or not one.facts.get("parameters"):
        return ""
    parameters, trained = one.facts["parameters"], one.facts["trainable_parameters"]
    parts = [one.facts["model"], f"{parameters / 1e6:,.0f} M parameters, {trained / 1e6:,.2f} M trained"]
    if "fits" in one.facts:
        parts.append(f"{gib(one.facts['peak_memory_bytes'])} GiB: {one.facts['fits']} in {one.facts['device']}")
    return "  " + "; ".join(parts)


def _last(report: Report) -> str:
    count, wrong = len(report.checked), sum(not one.is_ok for one in report.checked)
    files = f"{count} file{'s' * (count != 1)}"
    faults = len(report.faults)
    return f"{files}: {faults} fault{'s' * (faults != 1)} in {wrong}" if wrong else f"{files}: no faults"


def github(report: Report) -> str:
    """The commands, and then the report for people, which the log shows."""
    return "\n".join([*_commands(report), text(report)])


def _commands(report: Report) -> Iterator[str]:
    for fault in report.faults:
        yield _command("error", fault.mistake.position, f"lorafit: {fault.rule}", fault.message)
    for one in report.checked:
        for note in one.notes:
            yield _command("notice", Position(one.file), "lorafit", note)


def _command(kind: str, at: Position, title: str, message: str) -> str:
    places = {"file": shown_file(at), "line": at.line, "col": at.column, "title": title}
    properties = ",".join(f"{name}={_property(str(value))}" for name, value in places.items() if value is not None)
    return f"::{kind} {properties}::{_data(message)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def junit(report: Report) -> str:
    wrong = [one for one in report.checked if not one.is_ok]
    suite = Element(
        "testsuite", name="lorafit validate", tests=str(len(report.checked)), failures=str(len(wrong)), errors="0"
    )
    for one in report.checked:
        case = SubElement(suite, "testcase", classname="lorafit.validate", name=printable(one.file))
        if not one.is_ok:
            lines = "\n".join(str(fault.mistake) for fault in one.faults)
            first = one.faults[0]
            SubElement(case, "failure", type=first.rule, message=str(first.mistake)).text = lines
        if one.notes:
            SubElement(case, "system-out").text = "\n".join(map(printable, one.notes))
    indent(suite)
    return tostring(suite, encoding="unicode", xml_declaration=True)


SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif(report: Report) -> dict[str, Any]:
    """A log with one run, each fault a result."""
    rules = [{"id": rule, "shortDescription": {"text": EXIT_CODES[code]}} for code, rule in RULES.items()]
    driver = {"name": "lorafit", "version": __version__, "rules": rules}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": [_result(fault) for fault in report.faults]}],
    }


def _result(fault: Fault) -> dict[str, Any]:
    places = [{"physicalLocation": place} for place in _physical(fault.mistake.position)]
    return {"ruleId": fault.rule, "level": "error", "message": {"text": fault.message}, "locations": places}


def _physical(at: Position) -> Iterator[dict[str, Any]]:
    file = shown_file(at)
    if file is None:
        return
    place: dict[str, Any] = {"artifactLocation": {"uri": quote(file)}}
    if at.line is not None:
        place["region"] = {"startLine": at.line, "startColumn": at.column}
    yield place


FORMATS: dict[str, Callable[[Report], str]] = {
    "text": text,
    "json": lambda report: json.dumps(hidden_in(report.as_dict()), indent=2, ensure_ascii=False),
    "github": github,
    "junit": junit,
    "sarif": lambda report: json.dumps(hidden_in(sarif(report)), indent=2, ensure_ascii=False),
}
