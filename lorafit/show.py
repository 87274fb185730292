"""Plans, audits and evaluations as people read them."""

from __future__ import annotations

import itertools
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lorafit.audit import RULES, Audit, Limits, findings
from lorafit.console import Console
from lorafit.plan import Plan

_HARMLESS = "\n\t\u00a0\u3000\u200c\u200d"
"""Line breaks, spaces, and what joins letters and emoji."""


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The plan as a table on stdout."""
    console = console or Console()
    plan = plan.as_written()
    model, hardware = plan.model, plan.hardware
    parameters, trainable = model["parameters"], model["trainable_parameters"]
    share = f" ({trainable / parameters:.2%})" if parameters else ""
    lines = [
        ("run", plan.output_dir),
        ("model", f"{model['name_or_path']} ({model['model_type']}, from {model['source']})"),
        ("machine", f"{hardware.name} ({hardware.device})" + f" x {hardware.world_size}" * (hardware.world_size > 1)),
        ("parameters", f"{parameters:,}" if parameters else "not known before the model loads"),
        ("trained", f"{trainable:,}{share}" if trainable else "not known before the model loads"),
    ]
    for name, sources in (("train", plan.data.train), ("validation", plan.data.validation)):
        for source in sources:
            rows = "rows not counted" if source.rows is None else f"{source.rows} rows"
            lines.append((name, f"{source.path} ({source.format or 'format known after download'}, {rows})"))
    if plan.data.validation_fraction is not None:
        lines.append(("validation", f"{plan.data.validation_fraction:.0%} of the training rows"))
    if plan.schedule:
        s = plan.schedule
        every = f", evaluated every {s.eval_steps}" if s.eval_steps else ""
        saved = f", saved every {s.save_steps}" if s.save_steps else ""
        lines.append(("steps", f"{s.total_steps} ({s.steps_per_epoch} an epoch){every}{saved}"))
    overview = Table(box=None, show_header=False, pad_edge=False)
    overview.add_column(style="bold")
    overview.add_column(overflow="fold")
    for key, value in lines:
        overview.add_row(key, escape(str(value)))
    console.print(overview)
    choices = _table("resolved", "value", "because")
    for key, choice in plan.choices.items():
        value = ", ".join(map(str, choice.value)) if isinstance(choice.value, list) else str(choice.value)
        choices.add_row(key, escape(value), escape(choice.reason))
    console.print(choices)
    if plan.audit:
        print_audit(Audit.from_dict(plan.audit), plan.data.audit, console)
    else:
        console.print("The data has not been audited yet: `lorafit preview` does it, and so does training, first.")
    for remark in plan.remarks:
        console.print(escape(remark), style="yellow")


def print_audit(audit: Audit, limits: Limits, console: Console | None = None) -> None:
    """What was counted of each source, and what was found wrong, with the limits."""
    console = console or Console()
    table = _table("data", "rows", "used", "tokens", "learned", "longest", "left out")
    for column in table.columns[1:6]:
        column.justify = "right"
    parts = (("", audit.train), ("validation: ", audit.validation))
    for name, source in ((name, source) for name, sources in parts for source in sources):
        dropped = ", ".join(f"{count} {reason}" for reason, count in source.dropped.items())
        share = f"{source.supervised_tokens / source.tokens:.0%}" if source.tokens else ""
        numbers = (source.read, source.rows, source.tokens)
        table.add_row(
            Text(_printable(name + source.path)),
            *(f"{n:,}" for n in numbers),
            share,
            f"{source.longest:,}",
            Text(_printable(dropped)),
        )
    console.print(table)
    print_findings(audit, limits, console)


def print_findings(audit: Audit, limits: Limits, console: Console) -> None:
    """What was found wrong, a line each, and the rows that are left."""
    for one in findings(audit, limits):
        limit = "no limit" if one.limit is None else f"limit {one.limit:.4g}"
        line = f"{one} {RULES[one.rule]} ({limit}); the first: {one.finding.first}"
        console.print(Text(_printable(line), style="red" if one.is_breach else "yellow"), soft_wrap=True)
    for source in (*audit.train, *audit.validation):
        if source.reasoning or source.empty_reasoning:
            none = source.read - source.reasoning - source.empty_reasoning
            line = (
                f"{source.path}: {source.reasoning:,} rows have reasoning, {none:,} none; before the answers of "
                f"{source.empty_reasoning:,} the chat template writes an empty block of it"
            )
            console.print(Text(_printable(line)), soft_wrap=True)
    part, held_out = audit.training_rows, audit.validation_rows
    packs = f" in {part.packs:,} packed rows" if part.packs is not None else ""
    others = f"; {held_out.rows:,} validation rows" if held_out else ""
    first = "" if audit.whole else "the first "
    console.print(
        f"{first}{part.rows:,} training rows{packs}, {part.tokens:,} tokens, {part.supervised_tokens:,} of them learned"
        f"{others}; answers found by: {audit.masks}",
        highlight=False,
        soft_wrap=True,
    )


def print_preview(report: dict[str, Any], console: Console | None = None) -> None:
    """Rows by loss mask, lengths, packing and the audit on stdout."""
    console = console or Console()
    plain = console.color_system is None or console.no_color
    legend = (
        "learned text stands in ⟦ ⟧" if plain else "[green]learned[/green], [dim]context[/dim], [cyan]control[/cyan]"
    )
    for row in report["rows"]:
        title = (
            f"{row['place'] or report['part']} · row {row['number']}: {row['tokens']} tokens, {row['learned']} learned"
        )
        console.print(Text(_printable(title), style="bold"), soft_wrap=True)
        text = Text()
        for learned, segments in itertools.groupby(row["segments"], key=lambda segment: segment["learned"]):
            text.append("⟦" * (plain and learned))
            for segment in segments:
                style = ("bold green", "green") if learned else ("cyan", "dim")
                text.append(_printable(segment["text"]), style[not segment["special"]])
            text.append("⟧" * (plain and learned))
        console.print(text, soft_wrap=True)
        if "input_ids" in row:
            console.print(
                f"ids    {row['input_ids']}", f"labels {row['labels']}", sep="\n", highlight=False, soft_wrap=True
            )
        console.print()
    if report["rows"]:
        console.print(f"({legend})", highlight=False)
    _print_lengths(report, console)
    print_audit(Audit.from_dict(report["audit"]), report["limits"], console)
    for remark in report["remarks"]:
        console.print(escape(remark), style="yellow", highlight=False, soft_wrap=True)


def _print_lengths(report: dict[str, Any], console: Console) -> None:
    found, packing = report["lengths"], report["packing"]
    if found:
        most = max(bar["rows"] for bar in found["histogram"])
        table = _table("tokens up to", "rows", "")
        table.columns[0].justify = table.columns[1].justify = "right"
        for bar in found["histogram"]:
            table.add_row(f"{bar['up_to']:,}", f"{bar['rows']:,}", "█" * round(40 * bar["rows"] / most))
        console.print(table)
        quantiles = (f"{name} {found[key]:,}" for name, key in (("median", "median"), ("90%", "p90"), ("99%", "p99")))
        console.print(f"{', '.join(quantiles)}, longest {found['longest']:,} tokens", highlight=False)
    if packing:
        made = "makes" if packing["on"] else "would make"
        console.print(
            f"packing {made} {packing['packed_rows']:,} rows of {packing['rows']:,}, {packing['efficiency']:.0%} full; "
            f"unpacked batches hold {packing['efficiency_without']:.0%} tokens, the rest is padding",
            highlight=False,
            soft_wrap=True,
        )


def _printable(text: str) -> str:
    """Text without the characters by which data could command a terminal."""
    return "".join(c if c.isprintable() or c in _HARMLESS else ascii(c)[1:-1] for c in text)


def print_evaluation(report: dict[str, Any], show_rows: int, console: Console | None = None) -> None:
    """Base and adapter side by side on stdout."""
    console = console or Console()
    table = _table("", *report["models"])
    for name, label in (
        ("loss", "loss"),
        ("perplexity", "perplexity"),
        ("token_accuracy", "token accuracy"),
        ("exact_match", "exact match"),
    ):
        cells = [scores.get(name) for scores in report["models"].values()]
        if any(cell is not None for cell in cells):
            percent = name in ("exact_match", "token_accuracy")
            table.add_row(label, *("" if c is None else f"{c:.1%}" if percent else f"{c:.4f}" for c in cells))
    console.print(table)
    console.print(
        f"{report['rows']} held-out rows; exact match on {report['generated']} of them, greedy.", highlight=False
    )
    for sample in report["samples"][:show_rows]:
        console.print()
        console.print(f"[bold]prompt[/bold]    {escape(sample['prompt'])}", highlight=False)
        console.print(f"[bold]expected[/bold]  {escape(sample['expected'])}", highlight=False)
        for name, answer in sample["answers"].items():
            mark = "[green]=[/green]" if answer == sample["expected"] else "[red]≠[/red]"
            console.print(f"[bold]{name:9}[/bold] {mark} {escape(answer)}", highlight=False)
