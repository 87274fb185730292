"""A benchmark as tables, for the terminal and for documents."""

from __future__ import annotations

from typing import TypeAlias

from rich.markup import escape

from lorafit.bench.report import PHASES, BenchReport, Median, Phase
from lorafit.console import Console
from lorafit.tables import print_line, print_table, table


def as_markdown(report: BenchReport) -> str:
    """The report as a section of a document."""
    parts = [f"# Speed of {report.run}", ""]
    for header, rows in _tables(report):
        left = "|".join("---:" if number else "---" for _, number in header)
        parts += [f"| {' | '.join(name for name, _ in header)} |", f"|{left}|"]
        parts += [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows] + [""]
    parts += [f"- {line}" for line in _notes(report)]
    return "\n".join(parts) + "\n"


def print_bench(report: BenchReport, console: Console | None = None) -> None:
    """The report as tables on stdout."""
    console = console or Console()
    for header, rows in _tables(report):
        numbers = [index for index, (_, number) in enumerate(header) if number]
        shown = table(*(name for name, _ in header), right=numbers)
        for column in shown.columns:
            column.no_wrap = True
        for row in rows:
            shown.add_row(*(escape(cell) for cell in row))
        print_table(console, shown)
    remarks = set(report.remarks)
    for line in _notes(report):
        print_line(console, line, "yellow" if line in remarks else "")


Columns: TypeAlias = list[tuple[str, bool]]
"""Names, and whether what is below is numbers."""


def _tables(report: BenchReport) -> list[tuple[Columns, list[list[str]]]]:
    return [*(_speed(report, phase) for phase in PHASES), _memory(report)]


def _speed(report: BenchReport, phase: Phase) -> tuple[Columns, list[list[str]]]:
    found = {(one.model, one.prompt_tokens, one.batch): one for one in report.ratios if one.phase == phase}
    against = next((one.against for one in found.values()), None)
    header: Columns = [("prompt", True), ("batch", True), ("model", False), (f"{phase}, tokens/s", True)]
    if against:
        header.append((f"/ {against}", True))
    shapes = list(dict.fromkeys((one.prompt_tokens, one.batch) for one in report.timings))
    rows = []
    for one in sorted(report.timings, key=lambda one: shapes.index((one.prompt_tokens, one.batch))):
        speed = one.prefill if phase == "prefill" else one.decode
        row = [
            str(one.prompt_tokens),
            str(one.batch),
            one.model,
            _shown(speed, _figures(speed.value), len(one.prefill_seconds)),
        ]
        ratio = found.get((one.model, one.prompt_tokens, one.batch))
        rows.append(row + ([_shown(ratio.ratio, 2, len(one.prefill_seconds)) if ratio else "1"] if against else []))
    return header, rows


def _memory(report: BenchReport) -> tuple[Columns, list[list[str]]]:
    header: Columns = [
        ("model", False),
        ("weights", False),
        ("tensors, MiB", True),
        ("KV cache, bytes/token", True),
    ]
    peaks: dict[str, int] = {}
    for one in report.timings:
        if one.peak_bytes is not None:
            peaks[one.model] = max(peaks.get(one.model, 0), one.peak_bytes)
    if peaks:
        header.append(("peak, MiB", True))
    rows = []
    for name, model in report.models.items():
        kind = f"{model.quantization}, the rest {model.dtype}" if model.quantization else model.dtype
        row = [name, kind, f"{model.tensor_bytes / 2**20:,.1f}", f"{model.cache_bytes_per_token:,.0f}"]
        rows.append(row + ([f"{peaks[name] / 2**20:,.1f}"] if peaks else []))
    return header, rows


def _notes(report: BenchReport) -> list[str]:
    hardware, settings = report.hardware, report.settings
    threads = f", {_count(hardware['threads'], 'thread')}" if hardware["device"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return [
        f"{hardware['name']} ({hardware['device']}{threads} of {_count(hardware['cores'], 'core')}); {versions}",
        f"{_medians(settings['rounds'])}; "
        f"{settings['new_tokens']} greedy steps after each prompt; seed {settings['seed']}.",
        *report.remarks,
    ]


def _shown(found: Median, digits: int, rounds: int) -> str:
    value = f"{found.value:,.{digits}f}"
    return value if rounds == 1 else f"{value} [{found.low:,.{digits}f}, {found.high:,.{digits}f}]"


def _medians(rounds: int) -> str:
    return (
        "One round, so there are no intervals"
        if rounds == 1
        else f"Medians of {rounds} rounds with 95% bootstrap intervals"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _figures(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 2


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|")
