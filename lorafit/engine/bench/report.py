"""What a benchmark found: types, medians with intervals, and tables for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from rich.markup import escape

from lorafit.console import Console, print_line, print_table, table

RESAMPLES = 10_000
Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Median:
    """The rounds' median, with the ends of its 95% bootstrap interval (percentile method; rounds are drawn again)."""

    value: float
    low: float
    high: float


def median(values: Sequence[float], seed: int) -> Median:
    """The median of the rounds' values."""
    rounds = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(rounds), (RESAMPLES, len(rounds)))
    low, high = np.quantile(np.median(rounds[drawn], axis=1), (0.025, 0.975))
    return Median(float(np.median(rounds)), float(low), float(high))


@dataclass(frozen=True)
class BenchModel:
    """A model that was measured.

    Attributes:
        kind: base, adapter, trained, merged or quantized.
        dtype: of the weights that are not quantized.
        quantization: such as nf4; None where no weights are quantized.
        tensor_bytes: parameters and buffers as they are held while the model runs, quantized ones as stored with
            their scales; an adapter's with those of its base.
        cache_bytes_per_token: tensors of the KV cache, for each token of each row, of the longest shape.
    """

    kind: str
    path: str
    dtype: str
    quantization: str | None
    tensor_bytes: int
    cache_bytes_per_token: float


@dataclass(frozen=True)
class Timing:
    """One model on one shape.

    Attributes:
        prefill_seconds: of each round: the pass over the prompts.
        decode_seconds: of each round: all steps together.
        prefill: prompt tokens of all rows in a second.
        decode: new tokens of all rows in a second.
        peak_bytes: on CUDA: `tensor_bytes` and the most that was allocated above the weights; None on a CPU.
    """

    model: str
    prompt_tokens: int
    batch: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    prefill: Median
    decode: Median
    peak_bytes: int | None


@dataclass(frozen=True)
class Ratio:
    """Speed of `model` over that of `against` on one shape: the median of the rounds' ratios."""

    model: str
    against: str
    phase: Phase
    prompt_tokens: int
    batch: int
    ratio: Median


def timing(
    model: str,
    tokens: tuple[int, int, int],
    seconds: Sequence[tuple[float, float]],
    peak_bytes: int | None,
    seed: int,
) -> Timing:
    """Tokens in a second from the times of the rounds.

    Args:
        tokens: of a prompt, rows of a batch, new tokens of a row.
        seconds: of each round, prefill and decode.
    """
    prompt, batch, new = tokens
    prefill, decode = zip(*seconds, strict=True)
    return Timing(
        model,
        prompt,
        batch,
        prefill,
        decode,
        median([prompt * batch / one for one in prefill], seed),
        median([new * batch / one for one in decode], seed),
        peak_bytes,
    )


def ratios(timings: Sequence[Timing], against: str, seed: int) -> list[Ratio]:
    """Every model against one of them, shape by shape, paired by round."""
    found = []
    reference = {(one.prompt_tokens, one.batch): one for one in timings if one.model == against}
    for one in timings:
        if one.model == against:
            continue
        other = reference[one.prompt_tokens, one.batch]
        for phase, mine, its in (
            (PHASES[0], one.prefill_seconds, other.prefill_seconds),
            (PHASES[1], one.decode_seconds, other.decode_seconds),
        ):
            values = [b / a for a, b in zip(mine, its, strict=True)]
            found.append(Ratio(one.model, against, phase, one.prompt_tokens, one.batch, median(values, seed)))
    return found


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark found.

    Attributes:
        hardware: device, its name, threads, cores.
        settings: what was asked for, and `token_digests`: sha256 of each shape's token ids.
        load: the system's load average (1 minute) at the start and the end.
        remarks: what a reader should know, a sentence each.
    """

    run: str
    created: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    settings: dict[str, Any]
    models: dict[str, BenchModel]
    timings: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    load: tuple[float, float]
    remarks: tuple[str, ...]
    bench_version: int = 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"bench_version": self.bench_version, **asdict(self)}


def as_markdown(report: BenchReport) -> str:
    """The report as a section of a document."""
    parts, bar = [f"# Speed of {report.run}", ""], "\\|"
    for header, rows in _tables(report):
        left = "|".join("---:" if number else "---" for _, number in header)
        parts += [f"| {' | '.join(name for name, _ in header)} |", f"|{left}|"]
        parts += [f"| {' | '.join(cell.replace('|', bar) for cell in row)} |" for row in rows] + [""]
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
        digits, rounds = 0 if speed.value >= 100 else 1 if speed.value >= 10 else 2, len(one.prefill_seconds)
        row = [str(one.prompt_tokens), str(one.batch), one.model, _shown(speed, digits, rounds)]
        ratio = found.get((one.model, one.prompt_tokens, one.batch))
        rows.append(row + ([_shown(ratio.ratio, 2, rounds) if ratio else "1"] if against else []))
    return header, rows


def _memory(report: BenchReport) -> tuple[Columns, list[list[str]]]:
    header: Columns = [("model", False), ("weights", False), ("tensors, MiB", True), ("KV cache, bytes/token", True)]
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
    medians = f"Medians of {settings['rounds']} rounds with 95% bootstrap intervals"
    if settings["rounds"] == 1:
        medians = "One round, so there are no intervals"
    return [
        f"{hardware['name']} ({hardware['device']}{threads} of {_count(hardware['cores'], 'core')}); {versions}",
        f"{medians}; {settings['new_tokens']} greedy steps after each prompt; seed {settings['seed']}.",
        *report.remarks,
    ]


def _shown(found: Median, digits: int, rounds: int) -> str:
    value = f"{found.value:,.{digits}f}"
    return value if rounds == 1 else f"{value} [{found.low:,.{digits}f}, {found.high:,.{digits}f}]"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
