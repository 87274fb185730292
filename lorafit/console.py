"""Where tables, progress and remarks are shown: rich's console, to which no text gives orders of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, cast

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
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
