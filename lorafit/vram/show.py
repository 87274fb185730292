"""Memory estimates, sweeps and calibrations as people read them."""

from __future__ import annotations

from rich import box
from rich.markup import escape
from rich.table import Table

from lorafit.console import Console
from lorafit.memory import MIB
from lorafit.vram.answer import Answer, Cell, Verdict, command_line, gib
from lorafit.vram.ask import Reply
from lorafit.vram.calibrate import Calibration
from lorafit.vram.cost import flops_text, money_text, time_text
from lorafit.vram.workload import UNKNOWN, Spending

STYLES = {"fits": "green", "tight": "yellow", "does not fit": "red"}
MARKS = {"fits": "✓", "tight": "~", "does not fit": "✗"}


def print_reply(reply: Reply, console: Console | None = None) -> None:
    """Everything that was asked, on stdout."""
    console = console or Console()
    print_answer(reply.answer, console)
    if reply.asks_cost:
        print_spending(reply.spending, reply.price, console)


def print_answer(found: Answer, console: Console | None = None) -> None:
    """Terms, total, devices, advice and sweep on stdout."""
    console = console or Console()
    _line(console, _headline(found), "bold")
    _print_terms(found, console)
    _print_total(found, console)
    for note in found.estimate.notes:
        _line(console, note, "yellow")
    _print_devices(found, console)
    for one in found.asked:
        _print_verdict(one, found.estimate.notes, console)
    if found.cells:
        _print_sweep(found, console)


def print_spending(found: Spending | None, price: float | None, console: Console | None = None) -> None:
    """Arithmetic, time and money on stdout."""
    console = console or Console()
    if found is None:
        _line(console, f"Time and cost: {UNKNOWN}.", "yellow")
        return
    tokens = found.tokens
    times = f" x {tokens.epochs:.4g} epochs" if tokens.epochs != 1 else ""
    known = f"{tokens.per_epoch:,.0f} tokens{times} ({tokens.source}), {flops_text(found.flops.total)}"
    _line(console, f"Arithmetic, roughly: {known}")
    for gpu, one in found.costs:
        used = f"at {one.utilisation.low:.0%} to {one.utilisation.high:.0%} of its peak"
        money = f", {money_text(one.money, '')} at {price:g} an hour and GPU" if one.money else ""
        _line(console, f"On {gpu.name}, roughly: {time_text(one.hours)}{money} ({used})")


def print_calibration(found: Calibration, console: Console | None = None) -> None:
    """Runs, predicted and measured, on stdout."""
    console = console or Console()
    if found.rows:
        table = _table("run", "device", "peak", "predicted GiB", "measured GiB", "error")
        for column in table.columns[3:]:
            column.justify = "right"
        for row in found.rows:
            numbers = (gib(row.predicted), gib(row.measured), f"{row.error:+.1%}")
            table.add_row(escape(row.run), escape(row.device), row.quantity, *numbers)
        console.print(table)
    for quantity, one in found.summary().items():
        _line(
            console,
            f"{quantity}: {one['runs']:.0f} run{'s' * (one['runs'] != 1)}, median error {one['median_error']:.1%}, "
            f"largest {one['largest_error']:.1%}, bias {one['bias']:+.1%}",
        )
    for run, reason in found.skipped:
        _line(console, f"{run}: {reason}", "yellow")


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(escape(text), style=style, highlight=False, soft_wrap=True)


def _headline(found: Answer) -> str:
    case, setup = found.case, found.case.setup
    kind = "full training" if setup.lora is None else f"LoRA r={setup.lora.get('r')}"
    if setup.quantization is not None:
        kind += ", base in 8 bits" if setup.quantization.get("load_in_8bit") else ", base in 4 bits"
    several = f" on each of {setup.world} GPUs ({setup.sharding})" if setup.world > 1 else ""
    packed = " packed" if setup.packed else ""
    rows = f"{setup.batch} x {setup.length:,}{packed} tokens at once"
    return f"{case.plan.model['name_or_path']}: {kind}, {setup.dtype}, {rows}, {setup.optimizer}{several}"


def _print_terms(found: Answer, console: Console) -> None:
    known = found.estimate
    allocated = max(known.allocated, 1)
    table = _table("part", "GiB", "share", "why")
    table.columns[1].justify = table.columns[2].justify = "right"
    table.columns[0].min_width = 20
    for term in sorted(known.terms, key=lambda term: -term.bytes):
        if term.bytes:
            table.add_row(escape(term.name), gib(term.bytes), f"{term.bytes / allocated:.1%}", escape(term.why))
    table.add_section()
    table.add_row("allocated", gib(known.allocated), "100.0%", escape(f"at the peak: {known.moment}"))
    holder = "torch's allocator" if known.device == "cuda" else "the C library"
    table.add_row("reserved", gib(known.reserved), "", f"what {holder} holds, fragmentation included")
    console.print(table)


def _print_total(found: Answer, console: Console) -> None:
    known = found.estimate
    where, what = "On the GPU", "CUDA context" + " and NCCL" * (known.gpus > 1)
    if known.device == "cpu":
        where, what = "In memory", "Python and libraries"
    least, _, most = known.beside
    _line(
        console,
        f"{where}: {gib(known.total)} GiB, from {gib(known.least)} to {gib(known.most)} GiB "
        f"(reserved ± {known.band.error:.0%}, and {least // MIB} to {most // MIB} MiB of {what})",
        "bold",
    )
    features = f": {known.band.features}" if known.band.features else ""
    _line(console, f"Error band by {known.method}: {known.band.status}{features}")
    if known.paged:
        _line(console, f"Also {gib(known.paged)} GiB of paged optimizer states, in main memory when the GPU is full")


def _print_devices(found: Answer, console: Console) -> None:
    """The known GPUs, or this machine's memory, grouped by verdict."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for verdict, style in STYLES.items():
        names = [
            device.name if device.gpu else f"{device.name}, {gib(device.memory_bytes)} GiB free"
            for device, answer in found.devices
            if answer == verdict
        ]
        if names:
            table.add_row(f"{MARKS[verdict]} {verdict}", escape(", ".join(names)), style=style)
    if found.devices:
        console.print(table)


def _print_verdict(one: Verdict, shown: tuple[str, ...], console: Console) -> None:
    known = one.estimate
    size = f" ({gib(one.device.memory_bytes)} GiB)" if one.device.gpu else ""
    _line(
        console,
        f"{one.device.name}{size}: {one.verdict}, with {gib(known.total)} GiB "
        f"({gib(known.least)} to {gib(known.most)})",
        STYLES[one.verdict],
    )
    for note in one.estimate.notes:
        if note not in shown:
            _line(console, f"  {note}", "yellow")
    if one.verdict == "fits":
        return
    if not one.advice:
        _line(console, "No change that lorafit knows of lowers it.", "yellow")
        return
    for advice in one.advice:
        harm = "HARMFUL: " * advice.harmful
        total = f"{MARKS[advice.verdict]} {gib(advice.estimate.total):>6} GiB, {advice.verdict}"
        _line(console, f"  {total}: {advice.does} ({harm}{advice.costs})", STYLES[advice.verdict])
        _line(console, f"      {command_line(advice)}")


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
        table = _table(*(escape(key) for key, _ in sweeps), "total GiB")
        for cell in found.cells:
            table.add_row(*map(escape, cell.values), _cell(cell))
        console.print(table)
        _print_legend(found, console)
        return
    table = _table(escape(key), *map(escape, values))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in rows:
        table.add_row(escape(name), *map(_cell, cells))
    console.print(table)
    _print_legend(found, console)


def _cell(cell: Cell) -> str:
    marks = "".join(f"[{STYLES[verdict]}]{MARKS[verdict]}[/]" for verdict in cell.verdicts)
    return f"{gib(cell.estimate.total)} {marks}".rstrip()


def _print_legend(found: Answer, console: Console) -> None:
    names = ", ".join(one.device.name for one in found.asked)
    marked = f"; {' '.join(f'{mark} {verdict}' for verdict, mark in MARKS.items())} ({names})" if names else ""
    where = "on the GPU" if found.estimate.device == "cuda" else "in memory"
    _line(console, f"total GiB {where}{marked}")
