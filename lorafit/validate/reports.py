"""A validation's report: for people, and for what shows it in a CI."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lorafit import __version__
from lorafit.errors import EXIT_CODES
from lorafit.recipe import Position
from lorafit.text import gib, printable
from lorafit.validate.findings import RULES, Checked, Fault, Report
from lorafit.written import hidden_in


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
        key = fault.mistake.path
        yield _command(
            "error", fault.mistake.position, f"lorafit: {fault.rule}", f"{key}: " * bool(key) + fault.mistake.message
        )
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
    key = fault.mistake.path
    message = f"{key}: " * bool(key) + fault.mistake.message
    places = [{"physicalLocation": place} for place in _physical(fault.mistake.position)]
    return {"ruleId": fault.rule, "level": "error", "message": {"text": message}, "locations": places}


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
