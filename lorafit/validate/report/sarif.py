"""SARIF 2.1.0, which code scanning reads: https://docs.oasis-open.org/sarif/sarif/v2.1.0/"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from lorafit import __version__
from lorafit.errors import EXIT_CODES
from lorafit.recipe import Position
from lorafit.validate.report.place import shown_file
from lorafit.validate.types import RULES, Fault, Report

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
