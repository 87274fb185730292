"""Workflow commands of GitHub Actions, which become annotations on the lines of a pull request.

https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions
"""

from __future__ import annotations

from collections.abc import Iterator

from lorafit.recipe import Position
from lorafit.validate.report.place import shown_file
from lorafit.validate.report.text import text
from lorafit.validate.types import Report


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
