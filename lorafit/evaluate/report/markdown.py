"""An evaluation for a pull request: report.md."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable

from lorafit.evaluate.report.page.words import visible
from lorafit.evaluate.report.summary import brief, difference_rows, figure_rows, verdict
from lorafit.evaluate.results import Results

MOST_TEXT = 300
"""Characters of a name, a path or a sentence."""
MOST_BYTES = 36_000
"""Of what stands before the settings; a comment on a pull request may have 65,536 characters."""
MOST_SETTINGS = 20_000
"""Characters of the settings."""
_FORGETTING = (
    "Text that has nothing to do with the task: what the model predicts worse than before, it forgot. KL is how far "
    "its predictions are from the base's."
)


def as_markdown(results: Results) -> str:
    """The report, of bounded size; everything that comes from names and data is escaped."""
    lines = [f"## Evaluation of {_safe(results.name)}", "", f"**{_safe(verdict(results), 2000)}**", ""]
    if results.gates:
        rows = [
            ("✅ passed" if gate.passed else "❌ **failed**", f"{_safe(gate.gate)}", _safe(gate.sentence))
            for gate in results.gates[:100]
        ]
        lines += [*_markdown_table(("gate", "", "figures"), [(gate, mark, text) for mark, gate, text in rows]), ""]
    for name, info in results.sets.items():
        answered = f", {info.answered} answered" if info.answered else ""
        lines += [f"### {_safe(name)}", "", f"{info.rows} rows{answered}: {_safe(info.source)}", ""]
        if info.role == "forgetting":
            lines += [_FORGETTING, ""]
        metrics = brief(info)
        figures = [
            (_safe(row.label), *(f"{v} ({i})" if i else v for v, i in zip(row.values, row.intervals, strict=True)))
            for row in figure_rows(results, name, metrics)
        ]
        lines += [*_markdown_table(("", *map(_safe, results.models)), figures), ""]
        differences = [
            tuple(
                map(
                    _safe,
                    (
                        f"{one.model} − {one.against}",
                        one.label,
                        one.value,
                        one.interval,
                        one.rows,
                        one.says,
                        one.detectable,
                    ),
                )
            )
            for one in difference_rows(results, name, metrics)
        ]
        if differences:
            head = ("difference", "", "value", "95% interval", "won/tied/lost", "", "detectable")
            lines += [*_markdown_table(head, differences), ""]
    lines += [f"- {_safe(remark)}" for remark in results.remarks]
    lines = _bounded(lines)
    about = {"run": results.run, "created": results.created, "versions": results.versions, "hardware": results.hardware}
    text = json.dumps(about | {"settings": results.settings}, indent=1, ensure_ascii=True).replace("```", "` ` `")
    lines += [
        "",
        "<details><summary>Versions, hardware and settings</summary>",
        "",
        "```json",
        text[:MOST_SETTINGS],
        "```",
        "",
    ]
    lines += ["</details>"]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode() + "\n"


def _bounded(lines: list[str]) -> list[str]:
    """The lines that MOST_BYTES have room for; a table may lose its last rows, and a line says so."""
    ends = itertools.accumulate(len(line.encode("utf-8", "backslashreplace")) + 1 for line in lines)
    kept = sum(end <= MOST_BYTES for end in ends)
    return lines if kept == len(lines) else [*lines[:kept], "", "The rest is in results.json and report.html."]


def _markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    columns = list(head)
    made = [columns, ["---"] * len(columns), *map(list, rows)]
    return [f"| {' | '.join(row)} |" for row in made]


def _safe(text: str, most: int = MOST_TEXT) -> str:
    """Text that is nothing but text in a cell of a table."""
    text = " ".join(str(visible(text)).split())
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#@!])", r"\\\1", text)
