"""An evaluation as text, for a terminal and for a pull request, and its gates as JUnit XML; numbers and tables of
all reports."""

from __future__ import annotations

import itertools
import json
import math
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from lorafit.console import Console, print_line, print_table, table
from lorafit.evaluation.results import Difference, Figure, Metric, Results, Sample
from lorafit.text import GIB, MIB, markdown, markdown_table

BRIEF = {
    "task": (
        *("loss", "perplexity", "token_accuracy", "exact_match", "accuracy", "macro_f1"),
        *("json_valid", "ended", "agreement", "judge"),
    ),
    "forgetting": ("bits_per_byte", "kl"),
}
"""Metrics that a terminal and a pull request show first; others that a recipe asks for come after them."""
UNTOLD = (
    *("exact_match_normalized", "token_f1", "json_match", "repetition", "length"),
    *("bits_per_byte", "loss", "perplexity"),
)
"""Metrics that are measured anyway, and left to results.json and report.html where BRIEF does not have them."""


State = Literal["better", "worse", "same", "unclear", "higher", "lower"]
MOST_METRICS = 2
"""Metrics in the verdict of those that gates ask for; the tables have the others."""


def verdict(results: Results) -> str:
    """The main differences, whether they are more than noise, and the gates."""
    parts = []
    for row in _main(results):
        one, metric = row.difference, row.metric
        before, after = (results.figures[f"{one.set}.{one.metric}.{model}"] for model in (one.against, one.model))
        sure = "more than noise" if one.is_clear else _unclear(one)
        shown = f"{quantity(before.value, metric.unit)} → {quantity(after.value, metric.unit)}"
        rows = f"{after.rows} row{'s' * (after.rows != 1)}"
        parts.append(
            f"{metric.label} of {one.model} against {one.against}: {shown}, {row.value} "
            f"({f'95% interval {row.interval}; ' if row.interval else ''}{sure}; {rows})"
        )
    if results.gates:
        failed = len(results.failed)
        parts.append(
            f"{failed} of {len(results.gates)} gates failed" if failed else f"{len(results.gates)} gates passed"
        )
    return ". ".join(parts) or "nothing to compare"


def _unclear(one: Difference) -> str:
    """Why a difference says nothing: `is_clear` asks for more than an interval that leaves out zero."""
    has_zero = one.low is not None and one.high is not None and one.low <= 0 <= one.high
    return "within noise" if has_zero else "too few rows to tell"


def _main(results: Results) -> list[DifferenceRow]:
    """Differences of the first task set in what the gates ask for (else exact match or accuracy) and in the loss."""
    for name in (name for name, info in results.sets.items() if info.role != "forgetting"):
        known = {row.metric.name: row for row in reversed(_differing(results, name))}
        gated = re.compile(rf"(?<![\w.-]){re.escape(name)}\.(\w+)\.")
        asked = [metric for gate in results.gates for metric in gated.findall(gate.gate)]
        usual = [metric for metric in ("exact_match", "accuracy") if metric in known][:1]
        chosen = [metric for metric in dict.fromkeys(asked) if metric in known and metric != "loss"] or usual
        if found := [known[metric] for metric in (*chosen[:MOST_METRICS], "loss") if metric in known]:
            return found
    return []


def _differing(results: Results, name: str) -> list[DifferenceRow]:
    return [row for row in difference_rows(results, name) if row.difference.value is not None]


def brief(results: Results, name: str) -> tuple[list[FigureRow], list[DifferenceRow]]:
    """The rows of a set's tables that are shown where there is little room."""
    info = results.sets[name]
    first = BRIEF.get(info.role, ())
    left_out = {metric.name for metric in info.metrics if metric.name in UNTOLD or info.role == "forgetting"}
    figures = [row for row in figure_rows(results, name) if row.has_value]
    differences = _differing(results, name)

    def is_shown(metric: str) -> bool:
        return metric in first or metric not in left_out

    return (
        sorted((row for row in figures if is_shown(row.metric.name)), key=lambda row: row.metric.name not in first),
        [row for row in differences if is_shown(row.metric.name)],
    )


def state_of(difference: Difference, metric: Metric) -> State:
    """How a difference is read."""
    if not difference.is_clear or not difference.value:
        return "same" if difference.is_same else "unclear"
    if metric.better is None:
        return "higher" if difference.value > 0 else "lower"
    return "better" if (difference.value > 0) == (metric.better == "higher") else "worse"


def _says(row: DifferenceRow) -> str:
    state = state_of(row.difference, row.metric)
    return _unclear(row.difference) if state == "unclear" else "differs" if state in ("higher", "lower") else state


def _cells(row: DifferenceRow) -> tuple[str, ...]:
    """The cells of a row: models, metric, difference, interval, rows won, tied and lost, reading, detectable."""
    one = row.difference
    won, least = f"{one.wins}/{one.ties}/{one.losses}", quantity(one.detectable, row.metric.unit)
    return (f"{one.model} − {one.against}", row.metric.label, row.value, row.interval, won, _says(row), least)


MOST_TEXT = 300
"""Characters of a name, a path or a sentence."""
MOST_BYTES = 36_000
"""Size of what stands before the settings; a comment on a pull request may have 65,536 characters."""
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
        gates = [
            (_safe(gate.gate), "✅ passed" if gate.passed else "❌ **failed**", _safe(gate.sentence))
            for gate in results.gates[:100]
        ]
        lines += [*markdown_table(("gate", "", "figures"), gates), ""]
    for name, info in results.sets.items():
        answered = f", {info.answered} answered" if info.answered else ""
        lines += [f"### {_safe(name)}", "", f"{info.rows} rows{answered}: {_safe(info.source)}", ""]
        if info.role == "forgetting":
            lines += [_FORGETTING, ""]
        rows, differing = brief(results, name)
        figures = [
            (
                _safe(row.metric.label),
                *(f"{v} ({i})" if i else v for v, i in zip(row.values, row.intervals, strict=True)),
            )
            for row in rows
        ]
        lines += [*markdown_table(("", *map(_safe, results.models)), figures), ""]
        differences = [map(_safe, _cells(row)) for row in differing]
        if differences:
            head = ("difference", "", "value", "95% interval", "won/tied/lost", "", "detectable")
            lines += [*markdown_table(head, differences), ""]
    lines += [f"- {_safe(remark)}" for remark in results.remarks]
    lines = _bounded(lines)
    about = {"run": results.run, "created": results.created, "versions": results.versions, "hardware": results.hardware}
    text = json.dumps(about | {"settings": results.settings}, indent=1, ensure_ascii=True).replace("```", "` ` `")
    lines += ["", "<details><summary>Versions, hardware and settings</summary>", ""]
    lines += ["```json", text[:MOST_SETTINGS], "```", "", "</details>"]
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode() + "\n"


def _bounded(lines: list[str]) -> list[str]:
    """The lines that MOST_BYTES have room for; a table may lose its last rows, and a line says so."""
    ends = itertools.accumulate(len(line.encode("utf-8", "backslashreplace")) + 1 for line in lines)
    kept = sum(end <= MOST_BYTES for end in ends)
    return lines if kept == len(lines) else [*lines[:kept], "", "The rest is in results.json and report.html."]


def _safe(text: str, most: int = MOST_TEXT) -> str:
    return markdown(str(visible(text)), most)


def print_results(results: Results, samples: list[Sample], console: Console | None = None) -> None:
    """Figures, differences and gates on stdout, and the answers to some rows."""
    console = console or Console()
    for name, info in results.sets.items():
        answered = f", {info.answered} answered" if info.answered and info.answered != info.rows else ""
        role = "" if info.role == "task" else f" · {info.role}"
        _say(console, f"{name}{role}: {info.rows} rows{answered} ({info.source})", style="bold")
        figures, differing = brief(results, name)
        print_table(console, *_figures(results, figures))
        shown = dict.fromkeys(row.pair for row in differing)
        for model, against in shown:
            if against == results.first and any(one == model and other != results.first for one, other in shown):
                continue  # what differs from the run's own result is of more interest; the reports have both
            cells = [_cells(row) for row in differing if row.pair == (model, against)]
            print_table(console, *_differences(cells))
    for speed in results.speed:
        _say(
            console,
            f"{speed.model}, {speed.set}: {speed.tokens_per_second:,.1f} tokens/s; an answer after "
            f"{speed.latency_median:.2f} s in its batch (95%: {speed.latency_p95:.2f} s)",
        )
    for remark in results.remarks:
        _say(console, remark, style="yellow")
    for gate in results.gates:
        mark, style = ("✓ passed", "green") if gate.passed else ("✗ FAILED", "bold red")
        _say(console, f"{mark}  {gate.gate}", style=style)
        _say(console, f"          {gate.sentence}")
    _say(console, verdict(results), style="bold")
    for sample in samples:
        _print_sample(sample, console)


def _print_sample(sample: Sample, console: Console) -> None:
    width = max(map(len, ("expected", *sample.answers)))
    lines = [("prompt", "", sample.prompt), ("expected", "", sample.expected)]
    for name, answer in sample.answers.items():
        if answer.text is not None or answer.chosen is not None:
            text = answer.text if answer.text is not None else str(answer.chosen)
            lines.append((name, "=" if text == sample.expected else "≠", text))
    console.print()
    for name, mark, text in lines:
        line = Text(f"{name:{width}} ", style="bold")
        line.append(f"{mark:1} ", style="green" if mark == "=" else "red")
        line.append(visible(text), style="not bold")
        console.print(line, soft_wrap=True)


def _figures(results: Results, rows: list[FigureRow]) -> Iterator[Table]:
    """Tables with intervals, without them, and with a line for each model."""
    for with_ends in (True, False):
        form = _table("", *results.models)
        for row in rows:
            cells = zip(row.values, row.intervals, strict=True)
            shown = [f"{value}  ({ends})" if with_ends and ends else value for value, ends in cells]
            form.add_row(row.metric.label, *map(Text, shown))
        yield form
    for with_ends in (True, False):
        form = _table("", "value", *["95% interval"] * with_ends)
        for row in rows:
            for model, value, ends in zip(results.models, row.values, row.intervals, strict=True):
                form.add_row(Text(f"{row.metric.label}, {model}"), *map(Text, (value, *[ends] * with_ends)))
        yield form


def _differences(rows: list[tuple[str, ...]]) -> Iterator[Table]:
    """Tables of fewer and fewer columns: what was found stays longest."""
    columns = ("difference", "95% interval", "won/tied/lost", "detectable")
    for kept in range(len(columns), 0, -1):
        form = _table(rows[0][0], *columns[:kept], "")
        for _, label, value, ends, won, said, detectable in rows:
            form.add_row(*map(Text, (label, *(value, ends, won, detectable)[:kept], said)))
        yield form


def _table(*columns: str) -> Table:
    made = table(*map(Text, columns))
    for column in made.columns[1:]:
        column.no_wrap = True
    return made


def _say(console: Console, text: str, style: str = "") -> None:
    print_line(console, visible(text), style)


_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 does not allow."""


def as_junit(results: Results) -> str:
    """A test suite with a case for each gate, and the figures as properties."""
    suite = ElementTree.Element(
        "testsuite",
        name=_text(f"lorafit eval {results.name}"),
        tests=str(len(results.gates)),
        failures=str(len(results.failed)),
        errors="0",
        timestamp=_text(results.created),
        time=f"{sum(model.seconds for model in results.models.values()):.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, figure in results.figures.items():
        ElementTree.SubElement(properties, "property", name=_text(name), value=str(figure.value))
    for gate in results.gates:
        case = ElementTree.SubElement(suite, "testcase", classname=_text(gate.where), name=_text(gate.gate))
        if gate.passed:
            ElementTree.SubElement(case, "system-out").text = _text(gate.sentence)
        else:
            failure = ElementTree.SubElement(case, "failure", message=_text(gate.sentence), type="gate")
            failure.text = _text(f"{gate.gate}: {gate.sentence}")
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _text(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)


NONE = "–"

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that a reader can't see, or that change how what follows is read."""
NAMED = {0: "NUL", 7: "BEL", 8: "BS", 13: "CR", 27: "ESC", 127: "DEL"}
KEPT = "\n\t\u200c\u200d"
"""The last two join letters of some scripts, and emoji."""


def quantity(value: float | None, unit: str) -> str:
    """A value in its unit: shares as percent, losses with four decimals."""
    if value is None or not math.isfinite(value):
        return NONE
    if unit == "share":
        return _minus(f"{100 * value:.1f}%")
    if unit in ("nats", "bits"):
        return number(value, 4)
    if unit == "tokens":
        return _minus(f"{value:,.1f}")
    if unit == "seconds":
        return _minus(f"{value:,.2f} s")
    return number(value, 4 if abs(value) < 10 else 2 if abs(value) < 100 else 1)


def number(value: float | None, decimals: int) -> str:
    """A number with so many decimals; in powers of ten where that would leave nothing of it."""
    if value is None or not math.isfinite(value):
        return NONE
    if value and abs(value) < 0.5 * 10**-decimals:
        return _minus(f"{value:.1e}")
    return _minus(f"{value:,.{decimals}f}")


def change(value: float | None, unit: str) -> str:
    """A difference, with its sign; that of shares in points."""
    if value is None or not math.isfinite(value):
        return NONE
    text = size(abs(value), unit)
    zero = not any(digit in text for digit in "123456789")
    return text if zero else f"{'+' if value > 0 else '−'}{text}"


def size(value: float | None, unit: str) -> str:
    """A difference without a sign."""
    if unit == "share" and value is not None and math.isfinite(value):
        return f"{100 * value:.1f} points"
    return quantity(value, unit)


def interval(low: float | None, high: float | None, unit: str, *, signed: bool = False) -> str:
    """`low to high`, or nothing where there is none."""
    if low is None or high is None:
        return ""
    ends = [change(end, unit) if signed else quantity(end, unit) for end in (low, high)]
    return " to ".join(ends).replace(" points to ", " to ")


def in_bytes(value: Any) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return NONE
    return f"{value / GIB:.2f} GiB" if abs(value) >= GIB else f"{value / MIB:,.1f} MiB"


def moment(text: str) -> str:
    """An ISO time for people; as it is if it is none."""
    try:
        return datetime.fromisoformat(text).strftime("%d %B %Y, %H:%M %Z").lstrip("0")
    except ValueError:
        return text


def count(number_of: int, one: str, many: str | None = None) -> str:
    return f"{number_of:,} {one if number_of == 1 else many or one + 's'}"


def visible(text: Any) -> Any:
    """Text whose control characters, lone surrogates and marks of direction can be seen: `⟨NUL⟩`, `⟨U+202E⟩`.

    Plain text, so that it may go into attributes and titles too; whatever is not text stays what it is.
    """
    if isinstance(text, Markup) or not isinstance(text, str) or not any(map(_is_hidden, text)):
        return text
    return "".join(_mark(character) if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    return not character.isprintable() and character not in KEPT and unicodedata.category(character) in HIDDEN


def _mark(character: str) -> str:
    code = ord(character)
    return f"⟨{NAMED.get(code) or f'U+{code:04X}'}⟩"


def _minus(text: str) -> str:
    return (
        text.replace("-", "−", 1) if text.startswith("-") and any(c in "123456789" for c in text) else text.lstrip("-")
    )


@dataclass(frozen=True)
class FigureRow:
    """A metric of all models; None where a model does not have it."""

    metric: Metric
    figures: tuple[Figure | None, ...]

    @property
    def has_value(self) -> bool:
        return any(figure is not None and figure.value is not None for figure in self.figures)

    @property
    def values(self) -> list[str]:
        return [quantity(figure.value if figure else None, self.metric.unit) for figure in self.figures]

    @property
    def intervals(self) -> list[str]:
        return [interval(figure.low, figure.high, self.metric.unit) if figure else "" for figure in self.figures]


def figure_rows(results: Results, name: str) -> Iterator[FigureRow]:
    """A set's figures, in the order of its metrics."""
    for metric in results.sets[name].metrics:
        yield FigureRow(metric, tuple(results.figure(name, metric.name, model) for model in results.models))


@dataclass(frozen=True)
class DifferenceRow:
    """A metric of one model against another."""

    difference: Difference
    metric: Metric

    @property
    def pair(self) -> tuple[str, str]:
        return self.difference.model, self.difference.against

    @property
    def value(self) -> str:
        return change(self.difference.value, self.metric.unit)

    @property
    def interval(self) -> str:
        return interval(self.difference.low, self.difference.high, self.metric.unit, signed=True)


def difference_rows(results: Results, name: str) -> Iterator[DifferenceRow]:
    """A set's differences, in the order of the results."""
    metrics = {metric.name: metric for metric in results.sets[name].metrics}
    for one in results.differences:
        if one.set == name and one.metric in metrics:
            yield DifferenceRow(one, metrics[one.metric])
