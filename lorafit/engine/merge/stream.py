"""The merge, tensor by tensor: read, add in float32, round once, write at the same place.

What the adapter doesn't touch is copied byte for byte. While one tensor is computed, the one before is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafit.engine.merge.edits import SAMPLED, LayerEdit, Replacement
from lorafit.engine.merge.task import Job, Task
from lorafit.engine.merge.tensors import DTYPES, Writer, as_bytes
from lorafit.errors import GateError
from lorafit.facts import Shard, Tensor

BLOCK = 1 << 18
"""Elements that norms are computed of at a time, so that they stay in the cache."""
OFF = 1e-5
"""How far sampled rows may be off the adapter's definition, relative to their norm: float32 sums of other order."""


@dataclass(frozen=True)
class Merged:
    """What a merge did to one parameter.

    Attributes:
        relative: Frobenius norm of the change over that of the base's weight.
        kept: how much of the change rounding to the stored type has left, in the sampled rows: the projection
            of what was written on what was computed. 1: all of it; 0: none.
        off: the largest relative difference of sampled rows from the adapter's definition.
    """

    parameter: str
    relative: float
    kept: float
    off: float


def stream(task: Task, folder: Path, on_progress: Callable[[int], None]) -> list[Merged]:
    """Write the merged weights into a folder.

    Returns what was changed. Raises GateError where an adapter changes nothing, or makes numbers that are not finite.
    """
    _return_large_blocks()
    places = {tensor.name: tensor for shard in task.shards for tensor in shard.tensors}
    due: dict[str, list[Job]] = {}
    for job in task.jobs:
        due.setdefault(job.at, []).append(job)
    computed = {key for job in task.jobs for key in job.writes}
    found: list[Merged] = []
    writer = Writer(folder, task.shards, on_progress)
    try:
        with torch.no_grad(), contextlib.closing(_read_ahead(_in_order(task, due))) as weights:
            for shard in task.store.shards:
                for begin, to, size in _copied(shard, places, computed):
                    writer.copy(task.store.folder / shard.name, begin, shard.name, to, size)
                for tensor in shard.tensors:
                    found += [_do(job, weights, places, writer) for job in due.get(tensor.name, ())]
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    return [merged for merged, job in zip(found, _in_order(task, due), strict=True) if job.edits]


def _in_order(task: Task, due: dict[str, list[Job]]) -> list[Job]:
    return [job for shard in task.store.shards for tensor in shard.tensors for job in due.get(tensor.name, ())]


def _copied(shard: Shard, places: dict[str, Tensor], computed: set[str]) -> Iterator[tuple[int, int, int]]:
    """Runs of bytes that are copied: where they begin, where they go, and how many."""
    begin = to = size = 0
    for tensor in shard.tensors:
        place = places.get(tensor.name)
        if place is None or tensor.name in computed:
            continue
        if size and begin + size == tensor.begin and to + size == place.begin:
            size += tensor.bytes
            continue
        if size:
            yield begin, to, size
        begin, to, size = tensor.begin, place.begin, tensor.bytes
    if size:
        yield begin, to, size


def _read_ahead(jobs: list[Job]) -> Generator[torch.Tensor, None, None]:
    """The jobs' weights, chunk by chunk, each read by a thread while the one before is computed."""

    def chunk(job: Job, whole: Callable[[], torch.Tensor | None], rows: slice | None) -> torch.Tensor:
        weight = whole()
        if weight is None:
            return job.read(rows)
        return weight if rows is None else weight[rows]

    def reads() -> Iterator[Callable[[], torch.Tensor]]:
        for job in jobs:
            whole = functools.cache(job.whole)
            yield from (functools.partial(chunk, job, whole, rows) for rows in job.chunks())

    with ThreadPoolExecutor(1, "lorafit-reader") as pool:
        ahead: Future[torch.Tensor] | None = None
        for read in reads():
            following = pool.submit(read)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


def _do(job: Job, weights: Iterator[torch.Tensor], places: dict[str, Tensor], writer: Writer) -> Merged:
    """Compute one parameter and have it written."""
    measured = _Measured(job)
    dtype = DTYPES[places[job.writes[0]].dtype]
    for rows in job.chunks():
        raw = next(weights)
        after = _edited(job, raw, rows, measured)
        out = after.to(dtype)
        if dtype == torch.float16 and not out.isfinite().all() and after.isfinite().all():
            raise GateError(
                f"{job.parameter}: has numbers up to {float(after.abs().max()):.3g}, beyond float16; use --dtype "
                "bfloat16 or float32"
            )
        if job.edits and job.task.check:
            measured.add(raw, after, out, rows)
        del raw, after
        for place, begin, data in job.pieces(out, rows, places):
            writer.write(place.file.name, place.begin + begin, as_bytes(data))
        del out
    return measured.result()


def _edited(job: Job, raw: torch.Tensor, rows: slice | None, measured: _Measured) -> torch.Tensor:
    """The weight, float32, with what the adapters do to it."""
    value = raw.to(torch.float32, copy=True)
    if not job.edits:
        return value
    if job.task.alone:
        for edit in job.all_edits:
            value = edit.apply(value, rows)
        return value
    return value.add_(_combined(job, value, rows, measured))


def combined_delta(job: Job) -> torch.Tensor:
    """What all adapters together add to a parameter, whole, float32. Raises GateError for an adapter without effect."""
    measured = _Measured(job)
    with torch.no_grad():
        weight = job.whole()
        delta = _combined(job, (job.read(None) if weight is None else weight).float(), None, measured)
    measured.of_change = float(torch.linalg.vector_norm(delta)) ** 2
    measured.result()
    return delta


def _combined(job: Job, value: torch.Tensor, rows: slice | None, measured: _Measured) -> torch.Tensor:
    deltas = []
    for index, (_, several) in enumerate(job.edits):
        if len(several) == 1:
            delta = several[0].delta(value, rows)
        else:
            after = value.clone()
            for edit in several:
                after = edit.apply(after, rows)
            delta = after.sub_(value)
        measured.see(index, delta)
        deltas.append(delta)
    return job.task.combination(job.parameter, deltas, [weight for weight, _ in job.edits])


class _Measured:
    """What a job changes, summed up over its chunks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.of_base = self.of_change = self.off = 0.0
        self.along, self.length = 0.0, 0.0
        self.each = [0.0] * len(job.edits)

    def see(self, index: int, delta: torch.Tensor) -> None:
        """The delta of one of several adapters."""
        self.each[index] += float(torch.linalg.vector_norm(delta)) ** 2

    def add(self, raw: torch.Tensor, after: torch.Tensor, out: torch.Tensor, rows: slice | None) -> None:
        if raw.shape != after.shape:  # a vocabulary of another size, brought along whole
            self.of_change += float(torch.linalg.vector_norm(after)) ** 2
            return
        for one, other in zip(raw.view(-1).split(BLOCK), after.view(-1).split(BLOCK), strict=True):
            before = one.float()
            change = other - before
            self.of_base += float(before.dot(before))
            self.of_change += float(change.dot(change))
        chosen = torch.linspace(0, len(raw) - 1, min(len(raw), SAMPLED)).long()
        base = raw[chosen].float()
        computed, written = after[chosen] - base, out[chosen].float() - base
        self.along += float((computed * written).sum())
        self.length += float((computed * computed).sum())
        last = self.job.edits[0][1][-1]
        if self.job.task.alone and isinstance(last, LayerEdit):
            brought = [edit for edit in self.job.edits[0][1] if isinstance(edit, Replacement)]
            self.off = max(self.off, last.gap(brought[0].apply(raw, rows) if brought else raw, after, rows))

    def result(self) -> Merged:
        """Raises GateError."""
        name, check = self.job.parameter, self.job.task.check and bool(self.job.edits)
        if not check:
            return Merged(name, 0.0, 1.0, 0.0)
        sums = self.each if not self.job.task.alone else [self.of_change]
        if not all(map(math.isfinite, (*sums, self.of_change))):
            raise GateError(f"{name}: the merged weight holds numbers that are not finite; the adapter is broken")
        for total, (_, several) in zip(sums, self.job.edits, strict=True):
            if total == 0 and any(edit.must_change for edit in several):
                raise GateError(
                    f"{name}: the adapter changes nothing here, so it is untrained or broken; nothing was kept"
                )
        if not self.off <= OFF:
            raise GateError(
                f"{name}: the merged rows are {self.off:.2g} off the adapter's definition; please report it"
            )
        relative = math.sqrt(self.of_change / self.of_base) if self.of_base else math.inf
        return Merged(name, relative, self.along / self.length if self.length else 1.0, self.off)


def _return_large_blocks() -> None:
    """Have the C library give large blocks back to the system at once, instead of keeping ever larger heaps."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


_M_MMAP_THRESHOLD = -3
