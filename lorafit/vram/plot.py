"""A picture of a memory estimate: its parts against what a GPU has, and memory over a step. Needs matplotlib."""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import UsageError
from lorafit.files import claim_file, write_bytes
from lorafit.text import GIB, clipped, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MADE_BY = "lorafit estimate-vram"
"""A mark in the metadata of every picture, by which it may be drawn anew."""
FORMATS = (".png", ".svg")
WIDTH = 9.0
"""Inches."""
COLUMNS = 1600
"""Points of a timeline that are drawn at most: more than it has pixels."""
LANES = 3
"""Rows of phase labels above a timeline."""

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""Told apart by the colour-blind (Okabe and Ito 2008, "Color Universal Design")."""
HATCHES = ("", "//", "..", "xx")
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lorafit",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "path.simplify": False,
}


def stacked_bar(
    terms: Sequence[tuple[str, int]],
    title: str,
    capacity: Sequence[tuple[str, int]],
    file: Path,
    timeline: Sequence[tuple[float, int, int]] = (),
    phases: Sequence[tuple[float, str]] = (),
) -> None:
    """Draw the parts of memory on top of each other, and memory over time below if a timeline is given.

    Args:
        terms: parts and their bytes, the lowest of the stack first. Empty ones are left out.
        capacity: names and bytes of what it has to fit into, drawn as lines.
        file: .png or .svg; replaced whole, or left as it was.
        timeline: places on the x axis in order (such as indices of events), bytes allocated, bytes reserved.
        phases: where on the x axis each phase begins, and its name.

    Raises UsageError for another kind of file, a folder that isn't there, and without matplotlib.
    """
    check(file)
    import matplotlib
    from matplotlib.figure import Figure

    shown = [(printable(name), size) for name, size in terms if size > 0]
    lines = [(printable(name), size) for name, size in capacity]
    kind = file.suffix.lower()[1:]
    key = 0.2 * (-(-len(shown) // 2)) + 0.1
    top = 1.75 + key
    height = top + (3.05 if timeline else 0.0)
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(SETTINGS)
        figure = Figure(figsize=(WIDTH, height), dpi=150)
        left, width = 0.075, 0.895
        bar = figure.add_axes((left, 1 - 1.2 / height, width, 0.5 / height))
        _draw_bar(bar, shown, lines)
        figure.text(left, 1 - 0.14 / height, clipped(printable(title), 80), weight="bold", size=11, va="top")
        if shown:
            patches = bar.patches[: len(shown)]
            names = [f"{clipped(name, 38)}  {_gib(size)}" for name, size in shown]
            place = (left, 1 - 1.68 / height)
            bar.legend(
                patches, names, loc="upper left", bbox_to_anchor=place, bbox_transform=figure.transFigure,
                ncols=2, frameon=False, borderaxespad=0, handlelength=1.4, columnspacing=3,
            )  # fmt: skip
        if timeline:
            over = figure.add_axes((left, 0.45 / height, width, 2.1 / height))
            _draw_timeline(over, timeline, phases, lines)
        data = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None, "Creator": MADE_BY} if kind == "svg" else {"Software": MADE_BY}
        figure.savefig(data, format=kind, metadata=metadata)
    try:
        write_bytes(file, data.getvalue())
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"{file}: {error.strerror}") from None
        raise


def check(file: Path) -> None:
    """Raises UsageError for what no picture can be written to, which can be asked before any work."""
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"{file}: a picture is written as {' or '.join(FORMATS)}")
    claim_file(file, MADE_BY)
    if not file.parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        if error.name and not error.name.startswith("matplotlib"):
            raise UsageError(f"matplotlib can't be imported ({error}); install lorafit[plot]") from None
        raise UsageError("pictures need matplotlib; install lorafit[plot]") from None


def thin(
    timeline: Sequence[tuple[float, int, int]], columns: int = COLUMNS
) -> tuple[list[float], list[int], list[int]]:
    """A timeline in at most so many points: in each column, the highest of each series."""
    xs: list[float] = []
    allocated: list[int] = []
    reserved: list[int] = []
    if not timeline:
        return xs, allocated, reserved
    start, span = timeline[0][0], timeline[-1][0] - timeline[0][0]
    last = None
    for x, now, held in timeline:
        column = min(columns - 1, int((x - start) / span * columns)) if span > 0 else 0
        if len(timeline) > columns and column == last:
            allocated[-1], reserved[-1] = max(allocated[-1], now), max(reserved[-1], held)
            continue
        last = column
        xs.append(x)
        allocated.append(now)
        reserved.append(held)
    return xs, allocated, reserved


def _draw_bar(axes: Axes, terms: list[tuple[str, int]], capacity: list[tuple[str, int]]) -> None:
    total = 0
    for index, (_, size) in enumerate(terms):
        hatch = HATCHES[index // len(COLORS) % len(HATCHES)]
        axes.barh(0, size / GIB, left=total / GIB, height=1, facecolor=COLORS[index % len(COLORS)], hatch=hatch,
                  edgecolor="white", linewidth=0.8)  # fmt: skip
        total += size
    most = max([total, *(size for _, size in capacity)], default=0) / GIB or 1.0
    axes.set_xlim(0, most * 1.12)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_formatter("{x:g} GiB")
    axes.text(total / GIB + most * 0.006, 0, _gib(total), va="center", weight="bold", zorder=4,
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85})  # fmt: skip
    for size in dict.fromkeys(size for _, size in capacity):
        axes.axvline(size / GIB, color="black", linewidth=1.4, linestyle=(0, (4, 2)), zorder=3)
    labels = [(size / GIB, f"{clipped(name, 40)}: {_gib(size)}") for name, size in sorted(capacity, key=lambda c: c[1])]
    for x, label, lane, align in _placed(labels, 0, most * 1.12, lanes=2):
        axes.annotate(label, (x, 0.5), (0, 3 + 11 * lane), textcoords="offset points", ha=align, size=8)


def _draw_timeline(
    axes: Axes,
    timeline: Sequence[tuple[float, int, int]],
    phases: Sequence[tuple[float, str]],
    capacity: list[tuple[str, int]],
) -> None:
    xs, *series = thin(timeline)
    allocated, reserved = ([size / GIB for size in sizes] for sizes in series)
    where, peak, _ = max(timeline, key=lambda point: point[1])
    most, held = peak / GIB, max(reserved)
    end = xs[-1] if xs[-1] > xs[0] else xs[0] + 1
    axes.fill_between(xs, allocated, step="post", color="#56B4E9", linewidth=0, alpha=0.55)
    axes.step(xs, allocated, where="post", color="#0072B2", linewidth=1.0, label="allocated")
    axes.step(xs, reserved, where="post", color="#D55E00", linewidth=1.4, label="reserved")
    axes.plot([where], [most], "o", color="#0072B2", markersize=4)
    highest = max(held, most) or 1.0
    for name, size in sorted(capacity, key=lambda line: line[1]):
        if size / GIB <= 1.6 * highest:
            axes.axhline(size / GIB, color="black", linewidth=1.2, linestyle=(0, (4, 2)))
            axes.annotate(clipped(name, 40), (1, size / GIB), (-2, 2), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", size=8)  # fmt: skip
            highest = max(highest, size / GIB)
    axes.set_xlim(xs[0], end)
    axes.set_ylim(0, highest * 1.12)
    axes.set_ylabel("GiB")
    late = where > xs[0] + 0.75 * (end - xs[0])
    axes.annotate(f"peak {_gib(peak)}", (where, most), (-7 if late else 7, -12),
                  textcoords="offset points", ha="right" if late else "left", size=8, color="#003F66",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8})  # fmt: skip
    inside = [(x, printable(name)) for x, name in phases if xs[0] <= x <= end]
    for x, _ in inside:
        axes.axvline(x, color="#777777", linewidth=0.7, linestyle=":")
    for x, label, lane, align in _placed(inside, xs[0], end, lanes=LANES):
        axes.annotate(label, (x, 1), (0, 3 + 10 * lane), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha=align, size=7.5, color="#333333")  # fmt: skip
    axes.legend(loc="upper right", bbox_to_anchor=(1, -0.09), ncols=2, frameon=False, borderaxespad=0)


def _placed(
    labels: Sequence[tuple[float, str]], start: float, end: float, lanes: int
) -> Iterator[tuple[float, str, int, str]]:
    """Each label's place, text, row above the axes and alignment; one that would cover others is left out."""
    per_char = 0.062 / (WIDTH * 0.895) * (end - start)
    taken: list[list[tuple[float, float]]] = [[] for _ in range(lanes)]
    for x, label in labels:
        width = per_char * len(label)
        align = "left" if x + width <= end else "right"
        low, high = (x, x + width) if align == "left" else (x - width, x)
        for lane, spans in enumerate(taken):
            if all(high + per_char <= other or low >= till + per_char for other, till in spans):
                spans.append((low, high))
                yield x, label, lane, align
                break


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size / (1 << 20):.2f} MiB"
