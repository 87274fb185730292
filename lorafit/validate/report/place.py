"""Where a fault is shown, by what shows files of a repository."""

from __future__ import annotations

import os
from pathlib import Path

from lorafit.recipe import Position


def shown_file(at: Position) -> str | None:
    """The file without detours, relative to the working directory if it is below it; None for a `--set` argument."""
    if at.line is None and at.file.startswith("--set "):
        return None
    file = Path(os.path.normpath(at.file))
    return (file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file).as_posix()
