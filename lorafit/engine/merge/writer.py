"""Writing large files past the page cache, beside the computing.

Filling the page cache with gigabytes that nobody reads soon costs more than the disk does: on the machine this was
measured on, 0.4 GB/s through the cache and 2.4 GB/s past it. Where the file system doesn't allow it
(O_DIRECT), files are written as usual.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from lorafit.engine.merge.tensors import read_into
from lorafit.facts import Shard

BLOCK = 4096
"""What places and lengths are multiples of, for O_DIRECT."""
STAGE = 8 << 20
"""Bytes that are copied and written at a time."""


class Writer:
    """Files of known size whose parts are written in any order, by a thread of its own.

    `write` and `copy` return at once unless one piece of work is waiting already, so that no more than two
    tensors are held. Errors of the thread are raised by the next call, and by `close`.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...], on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._files = {shard.name: _File(folder / shard.name, shard.size) for shard in shards}
        self._stage = torch.frombuffer(mmap.mmap(-1, STAGE + BLOCK), dtype=torch.uint8)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="lorafit-writer", daemon=True)
        self._thread.start()
        for shard in shards:
            self.write(shard.name, 0, torch.frombuffer(bytearray(shard.header), dtype=torch.uint8))

    def write(self, name: str, begin: int, data: torch.Tensor) -> None:
        """(bytes,) to a place in a file. The tensor must not be changed afterwards."""
        self._put(lambda: self._write(name, begin, data))

    def copy(self, source: Path, begin: int, name: str, to: int, size: int) -> None:
        """Copy bytes of another file."""
        self._put(lambda: self._copy(source, begin, name, to, size))

    def close(self) -> None:
        """Wait until all is on the disk."""
        self._stop()
        if self._error is not None:
            raise self._error
        for file in self._files.values():
            file.close(sync=True)

    def abandon(self) -> None:
        self._error = self._error or InterruptedError()
        self._stop()
        for file in self._files.values():
            file.close(sync=False)

    def _put(self, work: Callable[[], None]) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(work)

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if self._error is None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - raised again where the work was asked for
                    self._error = error
            del work

    def _write(self, name: str, begin: int, data: torch.Tensor) -> None:
        for done in range(0, len(data), STAGE):
            part = data[done : done + STAGE]
            self._through_stage(name, begin + done, len(part), lambda stage, part=part: stage.copy_(part))  # type: ignore[misc]

    def _copy(self, source: Path, begin: int, name: str, to: int, size: int) -> None:
        for done in range(0, size, STAGE):
            length = min(STAGE, size - done)
            self._through_stage(name, to + done, length, lambda stage, at=begin + done: read_into(source, at, stage))  # type: ignore[misc]

    def _through_stage(self, name: str, begin: int, size: int, fill: Callable[[torch.Tensor], object]) -> None:
        """Fill an aligned buffer so that a block of it is a block of the file, and write it."""
        phase = begin % BLOCK
        stage = self._stage[phase : phase + size]
        fill(stage)
        self._files[name].write(stage, begin)
        self._on_progress(size)


class _File:
    """A file that is written past the page cache, but for blocks that are shared by two writes."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._direct: int | None = None
        try:
            self._reserve(size)
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                os.close(self._plain)
                raise

    def _reserve(self, size: int) -> None:
        """Ask for the space now, so that a full disk is known at once."""
        if not size:
            return
        try:
            os.posix_fallocate(self._plain, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            os.ftruncate(self._plain, size)

    def write(self, data: torch.Tensor, begin: int) -> None:
        """Bytes whose address has the same remainder by BLOCK as their place."""
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        first = min(-begin % BLOCK, len(view))
        last = first + (len(view) - first) // BLOCK * BLOCK
        if self._direct is not None and last > first:
            try:
                self._all(self._direct, view[first:last], begin + first)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                os.close(self._direct)  # a file system that takes the flag and not the writes
                self._direct = None
            else:
                self._all(self._plain, view[:first], begin)
                self._all(self._plain, view[last:], begin + last)
                return
        self._all(self._plain, view, begin)

    @staticmethod
    def _all(descriptor: int, view: memoryview, begin: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], begin + done)

    def close(self, sync: bool) -> None:
        try:
            if sync:
                os.fsync(self._plain)
        finally:
            os.close(self._plain)
            if self._direct is not None:
                os.close(self._direct)
