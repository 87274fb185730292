"""The allocators that torch uses, simulated: what they hold for a record of allocations.

On a GPU torch's own: c10/cuda/CUDACachingAllocator.cpp of torch 2.x with its default settings (no max_split_size,
no expandable_segments, no roundup_power2_divisions), one stream. On a CPU the C library's: malloc/malloc.c of glibc
2.36, which torch asks for blocks at multiples of 64 bytes (c10/core/impl/alloc_cpu.cpp: posix_memalign).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.memory.operations import FREE
from lorafit.text import MIB

MIN_BLOCK = 512
SMALL = MIB
"""Requests up to this share small segments."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE = 10 * MIB
"""Requests from this on get a segment of their own size."""
ROUND_LARGE = 2 * MIB


class OutOfMemory(Exception):
    """A request that can't be served. `reserved` and `allocated` are bytes at that moment."""

    def __init__(self, requested: int, reserved: int, allocated: int) -> None:
        super().__init__(f"{requested} bytes do not fit beside {reserved} reserved ({allocated} allocated)")
        self.requested = requested


def round_size(size: int) -> int:
    """Bytes that a request takes: multiples of 512."""
    return max(MIN_BLOCK, -(-size // MIN_BLOCK) * MIN_BLOCK)


def segment_size(size: int) -> int:
    """Bytes asked of the driver for a (rounded) request."""
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // ROUND_LARGE) * ROUND_LARGE


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """Blocks by best fit, split and merged, in segments that are kept until memory is short.

    Attributes:
        allocated, reserved: bytes now; max_allocated, max_reserved: at most so far.
        settled: bytes reserved at most since cached memory was last given back.
        retries: how often cached segments were given back to the driver to serve a request.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = 0
        self.max_allocated = self.max_reserved = self.settled = 0
        self.retries = self.event = 0
        self._next_address = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, address), sorted
        self._blocks: dict[int, _Block] = {}  # free ones by address

    def allocate(self, size: int) -> _Block:
        """A block for a request in bytes. Raises OutOfMemory."""
        size = round_size(size)
        small = size <= SMALL
        block = self._best(size, small) or self._new_segment(size, small)
        rest = block.size - size
        if rest >= MIN_BLOCK if small else rest > SMALL:
            remaining = _Block(block.address + size, rest, small, True, block, block.after)
            if block.after:
                block.after.before = remaining
            block.after = remaining
            block.size = size
            self._put(remaining)
        self.allocated += block.size
        self.max_allocated = max(self.max_allocated, self.allocated)
        return block

    def release(self, block: _Block) -> None:
        self.allocated -= block.size
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._take(neighbour)
                first, second = (neighbour, block) if neighbour is block.before else (block, neighbour)
                first.size += second.size
                first.after = second.after
                if second.after:
                    second.after.before = first
                block = first
        block.free = True
        self._put(block)

    def empty_cache(self) -> None:
        """Give every segment without a live block back to the driver."""
        for block in [b for b in self._blocks.values() if b.before is None and b.after is None]:
            self._take(block)
            self.reserved -= block.size

    def _best(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        index = bisect_left(pool, (size, -1))
        if index == len(pool):
            return None
        block = self._blocks[pool[index][1]]
        self._take(block)
        block.free = False
        return block

    def _new_segment(self, size: int, small: bool) -> _Block:
        wanted = segment_size(size)
        if self.capacity is not None and self.reserved + wanted > self.capacity:
            self.empty_cache()
            self.retries += 1
            self.settled = self.reserved
            if self.reserved + wanted > self.capacity:
                raise OutOfMemory(size, self.reserved, self.allocated)
        self.reserved += wanted
        self.max_reserved = max(self.max_reserved, self.reserved)
        self.settled = max(self.settled, self.reserved)
        block = _Block(self._next_address, wanted, small)
        self._next_address += wanted + 1
        return block

    def _put(self, block: _Block) -> None:
        insort(self._free[block.small], (block.size, block.address))
        self._blocks[block.address] = block

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect_left(pool, (block.size, block.address))]
        del self._blocks[block.address]


HEADER, ALIGNMENT, SMALLEST, PAGE = 8, 64, 32, 4096
"""Bytes of a chunk's header, torch's alignment, the smallest chunk, a page."""
RETURNED, MOST_RETURNED = 128 << 10, 32 << 20
"""Blocks from the first size on are mapped one by one, and returned when freed; as such are freed the bound rises to
their size, up to the second (mallopt(3): M_MMAP_THRESHOLD). So much is also taken, and left, at the heap's end."""


@dataclass(eq=False, slots=True)
class _Chunk:
    address: int
    size: int
    mapped: bool = False


class Heap:
    """glibc's malloc, as one thread sees it: chunks by best fit, split and merged, in one heap that grows at its top.

    A block at a multiple of 64 is cut out of a larger chunk, so a freed one is too small for the next request of its
    size (sourceware bug 14581), unless it has merged with a free neighbour. In a forward pass neighbours don't merge:
    autograd's records take the few bytes that were cut off between them, and live until the backward pass has come to
    them. So holes stay, and the heap grows.

    Attributes:
        event: index of the event that is served.
        reserved: bytes resident now: the heap up to its highest block, and what is mapped beside it.
        settled, retries: as of the other allocator; nothing is given back here.
    """

    def __init__(self, phases: Sequence[tuple[int, str]] = (), returns: int | None = None) -> None:
        """`phases` are (index of the first event, name). `returns`: a fixed bound in place of RETURNED and its rise."""
        self.allocated = self.reserved = 0
        self.max_allocated = self.max_reserved = 0
        self.event = self.retries = 0
        self._phases, self._phase, self._held = list(phases), 0, 0
        self._bound, self._fixed, self._trim = returns or RETURNED, returns is not None, RETURNED
        self._top = self._end = self._touched = self._mapped = 0
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._sizes: dict[int, int] = {}  # of free chunks, by address
        self._starts: dict[int, int] = {}  # of free chunks, by the address behind them
        self._taken: list[_Chunk] = []  # by autograd's records, oldest first

    @property
    def settled(self) -> int:
        return self.max_reserved

    def allocate(self, size: int) -> _Chunk:
        self._enter()
        wanted = max(SMALLEST, _up(size + HEADER, 16))
        chunk = self._chunk(wanted + ALIGNMENT + SMALLEST + 16)
        if not chunk.mapped:
            self._align(chunk, wanted)
            self._touched = max(self._touched, chunk.address + chunk.size)
        self.allocated += chunk.size
        self.max_allocated = max(self.max_allocated, self.allocated)
        self._count()
        return chunk

    def release(self, chunk: _Chunk) -> None:
        self._enter()
        self.allocated -= chunk.size
        if chunk.mapped:
            self._mapped -= chunk.size
            if not self._fixed and self._bound < chunk.size <= MOST_RETURNED:
                self._bound, self._trim = chunk.size, 2 * chunk.size
        else:
            self._give(chunk.address, chunk.size)
        self._count()

    def _enter(self) -> None:
        """Have the backward pass give back what the forward pass's records took, the latest first."""
        phases = self._phases
        while self._phase + 1 < len(phases) and self.event >= phases[self._phase + 1][0]:
            self._phase += 1
            self._held = len(self._taken)
        if self._taken and phases[self._phase][1].startswith("backward"):
            start = phases[self._phase][0]
            end = phases[self._phase + 1][0] if self._phase + 1 < len(phases) else self.event + 1
            keep = self._held - self._held * (self.event + 1 - start) // max(end - start, 1)
            while len(self._taken) > keep:
                lead = self._taken.pop()
                self._give(lead.address, lead.size)

    def _align(self, chunk: _Chunk, wanted: int) -> None:
        """Cut off what stands before the next multiple of 64 and behind the block."""
        lead = -(chunk.address + 2 * HEADER) % ALIGNMENT
        lead += ALIGNMENT * (0 < lead < SMALLEST)
        before = chunk.address
        chunk.address, chunk.size = before + lead, chunk.size - lead
        if lead and self._phases and self._phases[self._phase][1].startswith("forward"):
            self._taken.append(_Chunk(before, lead))
        elif lead:
            self._give(before, lead)
        if chunk.size > wanted + SMALLEST:
            rest, chunk.size = chunk.size - wanted, wanted
            self._give(chunk.address + wanted, rest)

    def _chunk(self, size: int) -> _Chunk:
        index = bisect_left(self._free, (size, -1))
        if index < len(self._free):
            found, address = self._free[index]
            self._take(address)
            if found - size >= SMALLEST:
                self._put(address + size, found - size)
                found = size
            return _Chunk(address, found)
        if self._end - self._top < size + SMALLEST:
            if size >= self._bound:
                pages = _up(size + 16, PAGE)
                self._mapped += pages
                return _Chunk(0, pages, mapped=True)
            self._end = _up(self._top + size + SMALLEST + RETURNED, PAGE)
        self._top += size
        return _Chunk(self._top - size, size)

    def _give(self, address: int, size: int) -> None:
        """A free chunk, merged with its neighbours; the heap's end is cut off where enough is free."""
        if address in self._starts:
            before = self._starts[address]
            size, address = size + self._take(before), before
        if address + size in self._sizes:
            size += self._take(address + size)
        if address + size != self._top:
            self._put(address, size)
            return
        self._top = address
        if self._end - self._top >= self._trim:
            self._end = min(self._end, _up(self._top + RETURNED, PAGE))
            self._touched = min(self._touched, self._end)

    def _put(self, address: int, size: int) -> None:
        insort(self._free, (size, address))
        self._sizes[address] = size
        self._starts[address + size] = address

    def _take(self, address: int) -> int:
        size = self._sizes.pop(address)
        del self._starts[address + size]
        del self._free[bisect_left(self._free, (size, address))]
        return size

    def _count(self) -> None:
        self.reserved = self._touched + self._mapped
        self.max_reserved = max(self.max_reserved, self.reserved)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Replay:
    """Peaks of a record, in bytes.

    Attributes:
        settled: reserved at most once cached memory was last given back: what later steps show.
        timeline: (event, allocated, reserved), one for each new highest or lowest point of a stretch of events.
        fits: whether every request was served within the capacity.
    """

    max_allocated: int
    max_reserved: int
    settled: int
    retries: int
    fits: bool
    timeline: tuple[tuple[int, int, int], ...]


def replay(
    events: Iterable[tuple[Hashable, int]], allocator: CachingAllocator | Heap | None = None, points: int = 2000
) -> Replay:
    """Serve a record of (storage, bytes), FREE in place of the bytes for its end.

    Args:
        allocator: that serves it, an unused one. Default: torch's for CUDA, without a limit.
        points: about how many the timeline has.
    """
    events = list(events)
    allocator = allocator or CachingAllocator()
    blocks: dict[Hashable, Any] = {}
    timeline: list[tuple[int, int, int]] = []
    stride = max(1, len(events) // points)
    highest = (0, 0, 0)
    fits, index = True, 0
    for index, (storage, size) in enumerate(events):
        allocator.event = index
        if size == FREE:
            block = blocks.pop(storage, None)
            if block is not None:
                allocator.release(block)
        elif size > 0:
            try:
                blocks[storage] = allocator.allocate(size)
            except OutOfMemory:
                fits = False
                break
        if allocator.allocated >= highest[1]:
            highest = (index, allocator.allocated, allocator.reserved)
        if index % stride == stride - 1:
            timeline += [highest, (index, allocator.allocated, allocator.reserved)]
            highest = (index, 0, 0)
    timeline += [highest, (min(index, len(events) - 1), allocator.allocated, allocator.reserved)] if events else []
    return Replay(
        allocator.max_allocated,
        allocator.max_reserved,
        allocator.settled,
        allocator.retries,
        fits,
        tuple(timeline),
    )
