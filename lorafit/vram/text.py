"""Memory estimates, sweeps and calibrations as people read them."""

from __future__ import annotations

from rich.markup import escape

from lorafit.console import Console, print_line, print_table, table
from lorafit.gpus import Device
from lorafit.memory import Term
from lorafit.run.memory import Calibration
from lorafit.text import MIB, gib
from lorafit.vram.answer import HERE, Answer, Cell, Verdict
from lorafit.vram.cost import UNKNOWN, Spending, flops_text, money_text, time_text

STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}
SMALL = 0.01
"""Share of what is allocated below which a part is told of with others."""
MANY = 12
"""Runs from which on a band, which is their 95th percentile, leaves one of them out (scripts/validate_vram.py)."""
MARKS = {"fits": "✓", "tight": "~", "does not fit": "✗"}


def print_answer(found: Answer, list_gpus: bool = False, console: Console | None = None) -> None:
    """The answer in a line, and what it comes from: terms, range, devices, advice, sweep and cost, on stdout."""
    console = console or Console()
    print_line(console, _answer(found), "bold")
    print_line(console, _setting(found))
    _print_terms(found, console)
    _print_range(found, console)
    for note in found.estimate.notes:
        print_line(console, note, "yellow")
    if list_gpus and found.estimate.device == "cuda":
        _print_devices(found, console)
    for one in found.asked:
        if one.verdict != "fits" or one.estimate != found.estimate:
            _print_verdict(one, found.estimate.notes, console)
    if found.cells:
        _print_sweep(found, console)
    if found.asks_cost:
        _print_spending(found.spending, found.price, console)


def _print_spending(found: Spending | None, price: float | None, console: Console) -> None:
    """Arithmetic, time and money."""
    if found is None:
        print_line(console, f"Time and cost: {UNKNOWN}.", "yellow")
        return
    tokens = found.tokens
    times = f" x {tokens.epochs:.4g} epochs" if tokens.epochs != 1 else ""
    known = f"{tokens.per_epoch:,.0f} tokens{times} ({tokens.source}), {flops_text(found.flops)}"
    print_line(console, f"Arithmetic, roughly: {known}")
    for one in found.costs:
        used = f"at {one.utilisation.low:.0%} to {one.utilisation.high:.0%} of its peak"
        money = f", {money_text(one.money)} at {price:g} an hour and GPU" if one.money else ""
        print_line(console, f"On {one.gpu.name}, roughly: {time_text(one.hours)}{money} ({used})")


def print_calibration(found: Calibration, console: Console | None = None) -> None:
    """Runs, predicted and measured, on stdout."""
    console = console or Console()
    if found.rows:
        runs = table("run", "device", "peak", "predicted GiB", "measured GiB", "error", right=(3, 4, 5))
        for row in found.rows:
            numbers = (gib(row.predicted), gib(row.measured), f"{row.error:+.1%}")
            runs.add_row(escape(row.run), escape(row.device), row.quantity, *numbers)
        print_table(console, runs)
    for quantity, one in found.summary().items():
        print_line(
            console,
            f"{quantity}: {one['runs']:.0f} run{'s' * (one['runs'] != 1)}, median error {one['median_error']:.1%}, "
            f"largest {one['largest_error']:.1%}, bias {one['bias']:+.1%}",
        )
    for run, reason in found.skipped:
        print_line(console, f"{run}: {reason}", "yellow")


def _setting(found: Answer) -> str:
    plan, setup = found.found.require_plan(), found.found.setup
    kind = setup.adapter.title
    if setup.quantization is not None:
        kind += ", base in 8 bits" if setup.quantization.get("load_in_8bit") else ", base in 4 bits"
    several = f" on each of {setup.world} GPUs ({setup.sharding})" if setup.world > 1 else ""
    packed = " packed" if setup.packed else ""
    rows = f"{setup.batch} x {setup.length:,}{packed} tokens at once"
    return f"{plan.model.name_or_path}: {kind}, {setup.dtype}, {rows}, {setup.optimizer}{several}"


def _answer(found: Answer) -> str:
    """What it takes, and whether the devices that it is for have that."""
    known = found.estimate
    where = "in memory" if known.device == "cpu" else "on each GPU" if known.gpus > 1 else "on the GPU"
    total = f"{gib(known.total)} GiB {where}, from {gib(known.least)} to {gib(known.most)}"
    devices = [(one.device, one.verdict) for one in found.asked]
    if not devices and known.device == "cuda":
        return f"{total} (--list-gpus: where it fits)"
    judged = (
        f"{'is tight' if verdict == 'tight' else verdict} in {_named(one)}" for one, verdict in devices or found.devices
    )
    return "; ".join((total, *judged))


def _named(device: Device) -> str:
    free = " free" * (device.gpu is None and device.name == HERE)
    return f"{device.name} ({gib(device.memory_bytes)} GiB{free})"


def _print_terms(found: Answer, console: Console) -> None:
    known = found.estimate
    allocated = max(known.allocated, 1)
    terms = sorted((term for term in known.terms if term.bytes), key=lambda term: -term.bytes)
    small = [term for term in terms if term.bytes < SMALL * allocated]
    if len(small) > 1:
        names = ", ".join(term.name for term in small)
        terms = [*terms[: -len(small)], Term("the rest", sum(term.bytes for term in small), names)]
    rows = table("part", "GiB", "share", "why", right=(1, 2))
    for term in terms:
        rows.add_row(escape(term.name), gib(term.bytes), f"{term.bytes / allocated:.1%}", escape(term.why))
    rows.add_section()
    rows.add_row("allocated", gib(known.allocated), "100.0%", escape(f"at the peak: {known.moment}"))
    holder = "torch's allocator" if known.device == "cuda" else "the C library"
    rows.add_row("reserved", gib(known.reserved), "", f"what {holder} holds, fragmentation included")
    least, usual, most = known.beside
    beside = "CUDA context" + " and NCCL" * (known.gpus > 1) if known.device == "cuda" else "Python and libraries"
    rows.add_row(
        "in all", gib(known.total), "", f"with {usual // MIB} MiB ({least // MIB} to {most // MIB}) of {beside}"
    )
    print_table(console, rows)


def _print_range(found: Answer, console: Console) -> None:
    known = found.estimate
    band, runs = f"Range: reserved ± {known.band.error:.0%}", known.band.rows
    if runs:
        share = "all" if runs < MANY else "95% of"
        print_line(console, f"{band}, within which were {share} {runs} measured runs {known.band.features}")
    else:
        print_line(console, f"{band}, an assumption: {known.band.features}", "yellow")
    if known.paged:
        print_line(
            console, f"Also {gib(known.paged)} GiB of paged optimizer states, in main memory when the GPU is full"
        )


def _print_devices(found: Answer, console: Console) -> None:
    """The known GPUs, grouped by verdict."""
    rows = table("", "", head=False)
    for verdict, style in STYLES.items():
        if names := [device.name for device, answer in found.devices if answer == verdict]:
            rows.add_row(f"{MARKS[verdict]} {verdict}", escape(", ".join(names)), style=style)
    print_table(console, rows)


def _print_verdict(one: Verdict, shown: tuple[str, ...], console: Console) -> None:
    known = one.estimate
    size = f" ({gib(one.device.memory_bytes)} GiB)" if one.device.gpu else ""
    print_line(
        console,
        f"{one.device.name}{size}: {one.verdict}, with {gib(known.total)} GiB "
        f"({gib(known.least)} to {gib(known.most)})",
        STYLES[one.verdict],
    )
    for note in one.estimate.notes:
        if note not in shown:
            print_line(console, f"  {note}", "yellow")
    if one.verdict == "fits":
        return
    if not one.advice:
        print_line(console, "No change that lorafit knows of lowers it.", "yellow")
        return
    for advice in one.advice:
        change = advice.change
        harm = "HARMFUL: " * change.harmful
        total = f"{MARKS[advice.verdict]} {gib(advice.estimate.total):>6} GiB, {advice.verdict}"
        print_line(console, f"  {total}: {change.does} ({harm}{change.costs})", STYLES[advice.verdict])
        print_line(console, f"      {change.options}")


def _print_sweep(found: Answer, console: Console) -> None:
    """One sweep as a row, two as a grid, more as a list."""
    sweeps = found.sweeps
    if len(sweeps) == 1:
        (key, values), rows = sweeps[0], [("total GiB", found.cells)]
    elif len(sweeps) == 2:
        (down, names), (across, values) = sweeps
        key, width = f"{down} \\ {across}", len(values)
        rows = [(name, found.cells[i * width : (i + 1) * width]) for i, name in enumerate(names)]
    else:
        cells = table(*(escape(key) for key, _ in sweeps), "total GiB")
        for cell in found.cells:
            cells.add_row(*map(escape, cell.values), _cell(cell))
        print_table(console, cells)
        _print_legend(found, console)
        return
    grid = table(escape(key), *map(escape, values), right=range(1, len(values) + 1))
    for name, found_cells in rows:
        grid.add_row(escape(name), *map(_cell, found_cells))
    print_table(console, grid)
    _print_legend(found, console)


def _cell(cell: Cell) -> str:
    marks = "".join(f"[{STYLES[verdict]}]{MARKS[verdict]}[/]" for verdict in cell.verdicts)
    return f"{gib(cell.estimate.total)} {marks}".rstrip()


def _print_legend(found: Answer, console: Console) -> None:
    names = ", ".join(one.device.name for one in found.asked)
    marked = f"; {' '.join(f'{mark} {verdict}' for verdict, mark in MARKS.items())} ({names})" if names else ""
    where = "on the GPU" if found.estimate.device == "cuda" else "in memory"
    print_line(console, f"total GiB {where}{marked}")
