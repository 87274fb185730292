"""torch's caching allocator for CUDA, simulated: what it reserves for a record of allocations.

Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.x with its default settings (no max_split_size,
no expandable_segments, no roundup_power2_divisions). One stream.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from lorafit.memory.tape import FREE

MIB = 1 << 20
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
        self.retries = 0
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


def replay(events: Iterable[tuple[Hashable, int]], capacity: int | None = None, points: int = 2000) -> Replay:
    """Serve a record of (storage, bytes), FREE in place of the bytes for its end.

    Args:
        capacity: bytes that the driver can give; None: without end.
        points: about how many the timeline has.
    """
    events = list(events)
    allocator = CachingAllocator(capacity)
    blocks: dict[Hashable, _Block] = {}
    timeline: list[tuple[int, int, int]] = []
    stride = max(1, len(events) // points)
    highest = (0, 0, 0)
    fits, index = True, 0
    for index, (storage, size) in enumerate(events):
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
