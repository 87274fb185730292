"""Where tables, progress and remarks are shown: rich's console, to which no text gives orders of its own."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from lorafit.written import shown


class Console(RichConsole):
    """A console that shows control characters, and hides what lorafit.written does."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text, talk=self.stderr))
