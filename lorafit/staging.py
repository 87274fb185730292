"""Files and folders that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorafit.errors import DoesNotFitError

FULL_BELOW = 1 << 20
"""Free bytes below which a failed write is blamed on the disk."""


def partial_of(destination: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return destination.with_name(f".{destination.name}.partial")


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` that becomes it when the block ends well, else is removed.

    What stands at the destination is replaced, at the very end. What a killed process left beside
    it is removed first. Raises DoesNotFitError when the disk is full.
    """
    partial = partial_of(destination)
    discard(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync(partial)
        discard(destination)
        partial.rename(destination)
    except BaseException as error:
        # Libraries report a full disk in their own ways, so the disk itself is asked.
        full = isinstance(error, Exception) and shutil.disk_usage(partial.parent).free < FULL_BELOW
        discard(partial)
        if full:
            raise DoesNotFitError(f"{destination}: the disk is full; nothing was left half written") from error
        raise


def sync(folder: Path) -> None:
    """Flush a folder's files to the disk, so that a rename never outruns them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def discard(path: Path) -> None:
    """Remove a folder so that it is never seen half removed: rename first. And what a killed removal left."""
    doomed = path.with_name(f".{path.name}.removing")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.exists():
        path.rename(doomed)
        shutil.rmtree(doomed)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
