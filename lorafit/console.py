"""Where tables, progress and remarks are shown: a console to which no text gives orders, tables, and sentences."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, cast

from rich import box
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from lorafit.written import Guarded, shown


class Console(RichConsole):
    """A console that shows control characters, and hides what lorafit.written does."""

    @property
    def file(self) -> IO[str]:
        file = super().file
        return cast(IO[str], file.styled) if isinstance(file, Guarded) else file

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, Text):
            renderable = self._guarded(renderable)  # before it is wrapped
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text, talk=self.stderr))

    def _guarded(self, text: Text) -> Text:
        plain = shown(text.plain, talk=self.stderr)
        if plain == text.plain:
            return text
        kept = {"justify": text.justify, "overflow": text.overflow, "no_wrap": text.no_wrap, "end": text.end}
        return Text(plain, text.style, **kept)  # type: ignore[arg-type]


_UNLIMITED = 1 << 20
"""Columns."""


def table(*columns: str | Text, right: Iterable[int] = (), head: bool = True) -> Table:
    """An empty table; columns are on the left but for those numbered by `right`."""
    made = Table(box=box.SIMPLE_HEAD if head else None, show_header=head, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number in right else "left", overflow="fold")
    return made


def print_line(console: Console, text: str | Text, style: str = "") -> None:
    """A sentence, folded between words where it is wider than the terminal; a longer word is left to the terminal."""
    line = Text(text) if isinstance(text, str) else text
    fits = Measurement.get(console, console.options.update(max_width=_UNLIMITED), line).minimum <= console.width
    console.print(line, style=style, highlight=False, soft_wrap=not (console.is_terminal and fits))


def print_table(console: Console, *forms: Table) -> None:
    """The first form of a table that a terminal has room for, or the last one with lines folded between words.

    Where even its longest words have no room side by side, each cell gets a line. What is no terminal, such as a pipe
    or the log of a CI, has room for everything.
    """
    for form in forms:
        widths = [_widths(console, form, column) for column in form.columns]
        width = _width(console, form)
        if not console.is_terminal:
            form.width = width
            with console.capture() as captured:
                console.print(form, crop=False, soft_wrap=True)
            for line in captured.get().splitlines():
                console.print(Text(line.rstrip()), soft_wrap=True)
            return
        if width <= console.width:
            console.print(form)
            return
    room = console.width - width + sum(most for _, most in widths)
    if sum(least for least, _ in widths) > room:
        _print_cells(console, form)
        return
    _fit(form, widths, room)
    console.print(form)


def _fit(form: Table, widths: list[tuple[int, int]], room: int) -> None:
    """Give each column its longest word, and what is left to those that want it, the most modest first."""
    left, spare = len(widths), room - sum(least for least, _ in widths)
    for column, (least, most) in sorted(zip(form.columns, widths, strict=True), key=lambda one: one[1][1] - one[1][0]):
        column.width = min(most, least + spare // left)
        left, spare = left - 1, spare - (column.width - least)


def _width(console: Console, form: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=_UNLIMITED), form).maximum


def _widths(console: Console, form: Table, column: Column) -> tuple[int, int]:
    """The least and the most columns that a table's column can use: its longest word, and its longest line."""
    cells = [*([column.header] if form.show_header else []), *column.cells]
    found = [Measurement.get(console, console.options.update(max_width=_UNLIMITED), cell) for cell in cells]
    most = max((one.maximum for one in found), default=0)
    return (most if column.no_wrap else max((one.minimum for one in found), default=0)), most


def _print_cells(console: Console, form: Table) -> None:
    """Each row as lines, one for a cell with its column's name; all on one line where columns have no names."""
    for row in zip(*(column.cells for column in form.columns), strict=True):
        cells = [_text(console, cell) for cell in row]
        if not form.show_header:
            print_line(console, Text("  ").join(cells))
            continue
        for number, (column, cell) in enumerate(zip(form.columns, cells, strict=True)):
            name = _text(console, column.header)
            if cell.plain:
                print_line(console, Text("  ").join([Text()] * (number > 0) + [name] * bool(name.plain) + [cell]))
    console.print()


def _text(console: Console, cell: object) -> Text:
    return cell if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)
