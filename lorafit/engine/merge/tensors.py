"""The tensors of a model folder, read one by one, and the same layout for what is written.

A tensor is known by its key, type, shape and place. Reading is plain reading into memory of our own: mapped
files would count as resident, and stay so. Writing goes past the page cache, beside the computing: filling the cache
with gigabytes that nobody reads soon costs more than the disk does (where this was measured, 0.4 GB/s through the cache
and 2.4 GB/s past it). Where the file system doesn't allow it (O_DIRECT), files are written as usual.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from lorafit.errors import ModelError
from lorafit.facts import Shard, Tensor, by_name, read_shard, weight_files

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by safetensors' names. Others can be copied, not computed with."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
_BITS = dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8)
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "U16": 16, "U32": 32, "U64": 64}


class Store:
    """The tensors of a folder of safetensors files. Raises ModelError for files that are not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_files(folder)
        if odd := next((file for file in files if file.parent != folder), None):
            raise ModelError(f"{odd}: the weights must be in the model's folder itself, not below or beside it")
        self.shards = tuple(map(_checked, files))
        self.tensors = by_name(self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    def read(self, tensor: Tensor, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or some of its rows, in its stored type."""
        if tensor.dtype not in DTYPES:
            raise ModelError(f"{tensor.file}: {tensor.name} is of type {tensor.dtype}, which can't be added to")
        shape, begin, size = tensor.shape, tensor.begin, tensor.bytes
        if rows is not None:
            begin += rows.start * tensor.row_bytes
            size = (rows.stop - rows.start) * tensor.row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        made = torch.empty(size, dtype=torch.uint8)
        read_into(tensor.file, begin, made)
        return made.view(DTYPES[tensor.dtype]).view(shape)


def _checked(file: Path) -> Shard:
    """A shard with its tensors in order of place, each as long as its type and shape say."""
    shard = read_shard(file)
    for tensor in shard.tensors:
        bits = bits_of(tensor.dtype)
        if bits is None or tensor.begin < len(shard.header) or 8 * tensor.bytes != tensor.size * bits:
            raise ModelError(
                f"{file}: not a whole safetensors file: {tensor.name} is no {tensor.dtype} of {tensor.shape}"
            )
    return replace(shard, tensors=tuple(sorted(shard.tensors, key=lambda tensor: (tensor.begin, tensor.name))))


def read_into(file: Path, begin: int, buffer: torch.Tensor) -> None:
    """Fill a tensor of bytes from a place in a file. Raises ModelError if the file ends before."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + (1 << 30)]], begin + done)
            if not count:
                raise ModelError(f"{file}: ends in the middle of a tensor; was it changed just now?")
            done += count
    finally:
        os.close(descriptor)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """(bytes,) of a tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Change:
    """What becomes of a stored tensor: another type or shape."""

    dtype: str
    shape: tuple[int, ...]


def new_shards(
    store: Store, changes: Mapping[str, Change | None], added: Mapping[str, Mapping[str, Change]]
) -> tuple[Shard, ...]:
    """The layout of the output: that of the store, byte for byte, but for what changes.

    Args:
        changes: by key; None for a tensor that is left out.
        added: new tensors by the shard that they go to, behind its own.
    """
    made = []
    for shard in store.shards:
        entries = [
            (tensor.name, changes.get(tensor.name, Change(tensor.dtype, tensor.shape))) for tensor in shard.tensors
        ]
        kept = [(key, change) for key, change in entries if change is not None]
        kept += added.get(shard.name, {}).items()
        if [(t.name, t.dtype, t.shape) for t in shard.tensors] == [(k, c.dtype, c.shape) for k, c in kept]:
            made.append(shard)
        elif kept:
            made.append(_new_shard(shard.name, kept, _metadata(shard.header)))
    return tuple(made)


def _metadata(header: bytes) -> dict[str, str]:
    found = json.loads(header[8:]).get("__metadata__")
    return found if isinstance(found, dict) else {"format": "pt"}


def _new_shard(name: str, entries: Iterable[tuple[str, Change]], metadata: dict[str, str]) -> Shard:
    places: dict[str, Any] = {"__metadata__": metadata}
    begin, sizes = 0, []
    for key, change in entries:
        size = prod(change.shape) * (bits_of(change.dtype) or 0) // 8
        places[key] = {"dtype": change.dtype, "shape": list(change.shape), "data_offsets": [begin, begin + size]}
        sizes.append((key, change, begin, size))
        begin += size
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    tensors = tuple(
        Tensor(key, c.shape, c.dtype, Path(name), len(header) + at, len(header) + at + size)
        for key, c, at, size in sizes
    )
    return Shard(name, header, tensors, len(header) + begin)


def bits_of(dtype: str) -> int | None:
    """Bits of one number of a type by safetensors' name; None for one that isn't known."""
    return DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _BITS.get(dtype)


def write_index(shards: tuple[Shard, ...], source: Path, folder: Path) -> None:
    """model.safetensors.index.json where there is more than the one file, with the true total size in bytes."""
    index = "model.safetensors.index.json"
    if len(shards) == 1 and shards[0].name == "model.safetensors":
        return
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    metadata: dict[str, Any] = {}
    if (source / index).is_file():
        found = json.loads((source / index).read_text(encoding="utf-8")).get("metadata")
        metadata = found if isinstance(found, dict) else {}
    metadata["total_size"] = sum(tensor.bytes for tensor in tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(tensor.size for tensor in tensors)
    places = {tensor.name: tensor.file.name for tensor in tensors}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
    (folder / index).write_text(text, encoding="utf-8")


# --- writing ---------------------------------------------------------------------------------------

ALIGNED = 4096
"""What places and lengths are multiples of, for O_DIRECT."""
PIECE = 8 << 20
"""Bytes that are copied and written at a time."""


class Writer:
    """Files of known size whose parts are written in any order, by a thread of its own.

    `write` and `copy` return at once unless one piece of work is waiting already, so that no more than two
    tensors are held. Errors of the thread are raised by the next call, and by `close`.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...], on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._files = {shard.name: _File(folder / shard.name, shard.size) for shard in shards}
        self._stage = torch.frombuffer(mmap.mmap(-1, PIECE + ALIGNED), dtype=torch.uint8)
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="lorafit-writer", daemon=True)
        self._thread.start()
        for shard in shards:
            self.write(shard.name, 0, torch.frombuffer(bytearray(shard.header), dtype=torch.uint8))

    def write(self, name: str, begin: int, data: torch.Tensor) -> None:
        """(bytes,) to a place in a file. The tensor must not be changed afterwards."""
        self._put(name, begin, len(data), lambda at, stage: stage.copy_(data[at : at + len(stage)]))

    def copy(self, source: Path, begin: int, name: str, to: int, size: int) -> None:
        """Copy bytes of another file."""
        self._put(name, to, size, lambda at, stage: read_into(source, begin + at, stage))

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

    def _put(self, name: str, begin: int, size: int, fill: Callable[[int, torch.Tensor], object]) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(lambda: self._write(name, begin, size, fill))

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

    def _write(self, name: str, begin: int, size: int, fill: Callable[[int, torch.Tensor], object]) -> None:
        """Fill an aligned buffer, piece by piece, so that a block of it is a block of the file, and write that.

        `fill` is told how many bytes are done already.
        """
        for done in range(0, size, PIECE):
            phase = (begin + done) % ALIGNED
            stage = self._stage[phase : phase + min(PIECE, size - done)]
            fill(done, stage)
            self._files[name].write(stage, begin + done)
            self._on_progress(len(stage))


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
        """Bytes whose address has the same remainder by ALIGNED as their place."""
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        first = min(-begin % ALIGNED, len(view))
        last = first + (len(view) - first) // ALIGNED * ALIGNED
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
