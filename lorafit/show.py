"""Plans, estimates and evaluations as people read them."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorafit.memory import MemoryEstimate
from lorafit.plan import Plan

GIB = 1 << 30


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """The plan as a table on stdout."""
    console = console or Console()
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
            rows = "?" if source.rows is None else source.rows
            lines.append((name, f"{source.path} ({source.format or 'format known after download'}, {rows} rows)"))
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
    for remark in plan.remarks:
        console.print(escape(remark), style="yellow")


def print_memory(plan: Plan, estimate: MemoryEstimate, console: Console | None = None) -> None:
    """The terms as a table on stdout, and what is missing."""
    console = console or Console()
    table = _table("part", "GiB", "because")
    table.columns[1].justify = "right"
    for term in estimate.terms:
        table.add_row(term.name, f"{term.bytes / GIB:.3f}", escape(term.why))
    table.add_section()
    table.add_row("sum, a lower bound", f"{estimate.bytes / GIB:.3f}", escape(f"{plan.model['name_or_path']}"))
    console.print(table)
    console.print(f"Not in yet: {', '.join(estimate.missing)}.", style="yellow")


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
