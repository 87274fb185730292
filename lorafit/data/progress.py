"""A bar for tokenizing, on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorafit.console import Console
from lorafit.data.encode import TokenRow
from lorafit.plan.types import SourcePlan


def counted(batches: Iterable[list[TokenRow]], source: SourcePlan, console: Console | None) -> Iterator[list[TokenRow]]:
    """The same batches, shown as they go by."""
    if console is None or not console.is_terminal:
        yield from batches
        return
    columns = TextColumn("tokenizing {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(source.path, total=source.rows)
        for batch in batches:
            yield batch
            progress.advance(task, len(batch))
