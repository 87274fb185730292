"""An evaluation as a terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table
from rich.text import Text

from lorafit.console import Console
from lorafit.evaluate.report.page.words import visible
from lorafit.evaluate.report.summary import DifferenceRow, Row, brief, difference_rows, figure_rows, verdict
from lorafit.evaluate.results import Results, Sample
from lorafit.tables import print_line, print_table, table


def print_results(results: Results, samples: list[Sample], console: Console | None = None) -> None:
    """Figures, differences and gates on stdout, and the answers to some rows."""
    console = console or Console()
    for name, info in results.sets.items():
        answered = f", {info.answered} answered" if info.answered and info.answered != info.rows else ""
        role = "" if info.role == "task" else f" · {info.role}"
        _say(console, f"{name}{role}: {info.rows} rows{answered} ({info.source})", style="bold")
        metrics = brief(info)
        print_table(console, *_figures(results, list(figure_rows(results, name, metrics))))
        rows = list(difference_rows(results, name, metrics))
        for pair in dict.fromkeys((one.model, one.against) for one in rows):
            if pair[1] == results.first and pair[0] in {one.model for one in rows if one.against != results.first}:
                continue  # what differs from the run's own result is of more interest; the reports have both
            own = [one for one in rows if (one.model, one.against) == pair]
            print_table(console, *_differences(f"{pair[0]} − {pair[1]}", own))
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


def _figures(results: Results, rows: list[Row]) -> Iterator[Table]:
    """With intervals, without them, and with a line for each model."""
    for with_ends in (True, False):
        form = _table("", *results.models)
        for row in rows:
            cells = zip(row.values, row.intervals, strict=True)
            shown = [f"{value}  ({ends})" if with_ends and ends else value for value, ends in cells]
            form.add_row(row.label, *map(Text, shown))
        yield form
    for with_ends in (True, False):
        form = _table("", "value", *["95% interval"] * with_ends)
        for row in rows:
            for model, value, ends in zip(results.models, row.values, row.intervals, strict=True):
                form.add_row(Text(f"{row.label}, {model}"), *map(Text, (value, *[ends] * with_ends)))
        yield form


def _differences(title: str, rows: list[DifferenceRow]) -> Iterator[Table]:
    """With fewer and fewer columns: what was found stays longest."""
    columns = {
        "": [one.says for one in rows],
        "difference": [one.value for one in rows],
        "95% interval": [one.interval for one in rows],
        "won/tied/lost": [one.rows for one in rows],
        "detectable": [one.detectable for one in rows],
    }
    for kept in range(len(columns), 1, -1):
        names = [*list(columns)[1:kept], ""]
        form = _table(title, *names)
        for index, one in enumerate(rows):
            form.add_row(Text(one.label), *(Text(columns[name][index]) for name in names))
        yield form


def _table(*columns: str) -> Table:
    made = table(*map(Text, columns))
    for column in made.columns[1:]:
        column.no_wrap = True
    return made


def _say(console: Console, text: str, style: str = "") -> None:
    print_line(console, visible(text), style)
