"""The simulations of allocators: torch's for CUDA follows c10/cuda/CUDACachingAllocator.cpp, the C library's itself."""

from __future__ import annotations

import itertools
import json
import platform
import random
import subprocess
import sys
from typing import Any

import pytest

from lorafit.hardware import RETURNED_AT_ONCE
from lorafit.memory.allocator import CachingAllocator, Heap, OutOfMemory, replay, round_size, segment_size
from lorafit.memory.operations import FREE
from lorafit.text import MIB

# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "taken"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_multiples_of_512(asked: int, taken: int) -> None:
    assert round_size(asked) == taken
    allocator = CachingAllocator()
    allocator.allocate(asked)
    assert allocator.allocated == taken


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments(asked: int, segment: int) -> None:
    """Small requests share 2 MiB, middle ones 20 MiB, large ones get their own in steps of 2 MiB."""
    assert segment_size(asked) == segment
    allocator = CachingAllocator()
    allocator.allocate(asked)
    assert allocator.reserved == segment


def test_small_requests_share_a_segment() -> None:
    allocator = CachingAllocator()
    for _ in range(2 * MIB // 512):
        allocator.allocate(1)
    assert allocator.reserved == allocator.allocated == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved == 4 * MIB


def test_small_and_large_requests_have_pools_of_their_own() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(15 * MIB))
    allocator.allocate(MIB)
    assert allocator.reserved == 18 * MIB  # 16 MiB lie free, but not for small requests


# --- splitting and best fit -----------------------------------------------------------------------


def test_a_large_block_is_split_where_more_than_a_mebibyte_is_left() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(20 * MIB))
    whole = allocator.allocate(19 * MIB)
    assert whole.size == allocator.allocated == 20 * MIB  # exactly 1 MiB would be left: kept together
    allocator.release(whole)
    split = allocator.allocate(19 * MIB - 512)
    assert split.size == allocator.allocated == 19 * MIB - 512
    assert allocator.reserved == 20 * MIB


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    allocator = CachingAllocator()
    first, second = allocator.allocate(MIB), allocator.allocate(MIB - 512)
    assert (first.size, second.size) == (MIB, MIB - 512)
    allocator.allocate(512)
    assert allocator.reserved == allocator.allocated == 2 * MIB


def test_the_smallest_block_that_is_large_enough_serves() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (40, 12, 20, 16)]
    addresses = {block.size // MIB: block.address for block in blocks}
    for block in blocks:
        allocator.release(block)
    assert allocator.allocate(13 * MIB).address == addresses[16]
    assert allocator.allocate(13 * MIB).address == addresses[20]
    assert allocator.allocate(21 * MIB).address == addresses[40]
    assert allocator.allocate(12 * MIB).address == addresses[12]
    assert allocator.reserved == 88 * MIB


def test_of_equal_blocks_the_first_serves() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(12 * MIB) for _ in range(3)]
    for block in reversed(blocks):
        allocator.release(block)
    assert allocator.allocate(12 * MIB).address == blocks[0].address


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 0, 2)])
def test_freed_neighbours_merge(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    for index in order:
        allocator.release(blocks[index])
    assert allocator.allocate(20 * MIB).size == 20 * MIB
    assert allocator.reserved == 20 * MIB


def test_what_is_apart_does_not_merge() -> None:
    """Fragmentation: 10 MiB are free in two places, so that a request of 6 MiB needs a new segment."""
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    allocator.release(blocks[0])
    allocator.release(blocks[2])
    allocator.allocate(6 * MIB)
    assert allocator.reserved == 40 * MIB


# --- keeping and giving back ----------------------------------------------------------------------


def test_segments_are_kept_until_the_cache_is_emptied() -> None:
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(100 * MIB))
    assert (allocator.allocated, allocator.reserved) == (0, 100 * MIB)
    allocator.allocate(200 * MIB)
    assert allocator.reserved == 300 * MIB
    allocator.empty_cache()
    assert (allocator.reserved, allocator.max_reserved) == (200 * MIB, 300 * MIB)


def test_a_segment_in_part_use_is_not_given_back() -> None:
    allocator = CachingAllocator()
    live = allocator.allocate(5 * MIB)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    allocator.release(live)
    allocator.empty_cache()
    assert allocator.reserved == 0


def test_short_of_memory_cached_segments_are_given_back() -> None:
    allocator = CachingAllocator(capacity=250 * MIB)
    allocator.release(allocator.allocate(100 * MIB))
    allocator.allocate(150 * MIB)
    assert allocator.retries == 0  # exactly the capacity
    allocator.allocate(90 * MIB)  # in the cached 100 MiB
    assert allocator.retries == 0
    allocator = CachingAllocator(capacity=250 * MIB)
    allocator.release(allocator.allocate(100 * MIB))
    allocator.allocate(152 * MIB)
    assert (allocator.retries, allocator.reserved) == (1, 152 * MIB)


def test_a_request_that_never_fits() -> None:
    allocator = CachingAllocator(capacity=250 * MIB)
    allocator.allocate(150 * MIB)
    with pytest.raises(OutOfMemory, match="do not fit") as caught:
        allocator.allocate(102 * MIB)
    assert caught.value.requested == 102 * MIB
    assert allocator.allocated == 150 * MIB
    allocator.allocate(100 * MIB)  # others still do


# --- records --------------------------------------------------------------------------------------


def test_replay() -> None:
    events = [(1, 100 * MIB), (2, 50 * MIB), (1, FREE), (3, 60 * MIB), (2, FREE)]
    found = replay(events)
    assert (found.max_allocated, found.max_reserved) == (150 * MIB, 150 * MIB)
    assert found.fits
    assert found.retries == 0


def test_replay_without_enough_memory() -> None:
    events = [(1, 100 * MIB), (1, FREE), (2, 120 * MIB), (2, FREE), (3, 200 * MIB)]
    assert replay(events).max_reserved == 420 * MIB
    enough = replay(events, CachingAllocator(200 * MIB))
    assert enough.fits
    assert (enough.retries, enough.max_reserved) == (2, 200 * MIB)
    assert not replay(events, CachingAllocator(198 * MIB)).fits


def test_replay_passes_over_what_takes_nothing() -> None:
    """Empty tensors, and ends of what began before the record."""
    assert replay([(7, FREE), (1, 0), (1, FREE), (2, 512)]).max_allocated == 512


@pytest.mark.parametrize("points", [10, 2000])
def test_the_timeline_has_the_highest_point(points: int) -> None:
    draw = random.Random(5)
    events: list[tuple[int, int]] = []
    for number in range(3000):
        events.append((number, draw.randint(1, 40 * MIB)))
        if number > 20:
            events.append((number - draw.randint(0, 20), FREE))
    found = replay(events, points=points)
    timeline = found.timeline
    assert [index for index, *_ in timeline] == sorted(index for index, *_ in timeline)
    assert max(allocated for _, allocated, _ in timeline) == found.max_allocated
    assert all(allocated <= reserved for _, allocated, reserved in timeline)
    assert len(timeline) <= 4 * points


# --- against rules written down again -------------------------------------------------------------


class Plain:
    """The allocator's rules on lists of [offset, size, live], without any index: slow and short."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.segments: list[tuple[bool, list[list[int]]]] = []
        self.retries = 0

    @property
    def reserved(self) -> int:
        return sum(sum(size for _, size, _ in parts) for _, parts in self.segments)

    @property
    def allocated(self) -> int:
        return sum(size for _, parts in self.segments for _, size, live in parts if live)

    def allocate(self, size: int) -> tuple[int, int] | None:
        size = (size + 511) // 512 * 512
        small = size <= MIB
        fitting = [
            (part[1], number, part[0])
            for number, (kind, parts) in enumerate(self.segments)
            if kind == small
            for part in parts
            if not part[2] and part[1] >= size
        ]
        if not fitting:
            whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            if self.reserved + whole > self.capacity:
                self.retries += 1
                for _, parts in self.segments:
                    if len(parts) == 1 and not parts[0][2]:
                        parts.clear()
                if self.reserved + whole > self.capacity:
                    return None
            self.segments.append((small, [[0, whole, 0]]))
            fitting = [(whole, len(self.segments) - 1, 0)]
        found, number, offset = min(fitting)
        parts = self.segments[number][1]
        index = next(i for i, part in enumerate(parts) if part[0] == offset)
        if found - size >= 512 if small else found - size > MIB:
            parts[index : index + 1] = [[offset, size, 1], [offset + size, found - size, 0]]
        else:
            parts[index][2] = 1
        return number, offset

    def release(self, where: tuple[int, int]) -> None:
        parts = self.segments[where[0]][1]
        next(part for part in parts if part[0] == where[1])[2] = 0
        index = 0
        while index + 1 < len(parts):
            first, second = parts[index : index + 2]
            if first[2] or second[2]:
                index += 1
            else:
                parts[index : index + 2] = [[first[0], first[1] + second[1], 0]]


def sizes(draw: random.Random) -> int:
    kind = draw.random()
    if kind < 0.4:
        return draw.randint(1, MIB)
    return draw.randint(MIB, 10 * MIB) if kind < 0.8 else draw.randint(10 * MIB, 60 * MIB)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("capacity", [300 * MIB, 1 << 40])
def test_random_programs(seed: int, capacity: int) -> None:
    """As the plain rules have it at every step; live blocks don't overlap; in the end nothing is left."""
    draw = random.Random(seed)
    allocator, plain = CachingAllocator(capacity), Plain(capacity)
    live: list[tuple[Any, tuple[int, int]]] = []
    refused = 0
    for _ in range(800):
        if live and draw.random() < 0.47:
            block, where = live.pop(draw.randrange(len(live)))
            allocator.release(block)
            plain.release(where)
        else:
            size = sizes(draw)
            expected = plain.allocate(size)
            if expected is None:
                refused += 1
                with pytest.raises(OutOfMemory):
                    allocator.allocate(size)
            else:
                live.append((allocator.allocate(size), expected))
        assert (allocator.allocated, allocator.reserved) == (plain.allocated, plain.reserved)
        assert allocator.retries == plain.retries
        assert allocator.allocated <= allocator.reserved <= capacity
        ranges = sorted((block.address, block.address + block.size) for block, _ in live)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
        assert allocator.allocated == sum(block.size for block, _ in live)
    assert (refused > 0) == (capacity < 1 << 40)
    for block, _ in live:
        allocator.release(block)
    assert allocator.allocated == 0
    assert allocator.reserved == plain.reserved
    allocator.empty_cache()
    assert allocator.reserved == 0
    assert allocator.max_allocated <= allocator.max_reserved


# --- the C library's, on a CPU ----------------------------------------------------------------------


PHASES = ((0, "forward pass"), (40, "backward pass"), (100, "end"))


def test_a_hole_does_not_serve_its_size_again() -> None:
    """A block at a multiple of 64 is cut out of more than its size (sourceware bug 14581)."""
    heap = Heap()
    heap.release(heap.allocate(16 * MIB))  # from here on, blocks of up to 16 MiB come from the heap
    blocks = [heap.allocate(2 * MIB) for _ in range(20)]
    before = heap.reserved
    for block in blocks[::2]:
        heap.release(block)
    for _ in blocks[::2]:
        heap.allocate(2 * MIB)
    assert heap.reserved - before == pytest.approx(20 * MIB, rel=0.1)


def test_neighbours_merge_but_not_in_a_forward_pass() -> None:
    """There, autograd's records lie between them."""

    def more(phases: tuple[tuple[int, str], ...]) -> int:
        heap = Heap(phases)
        heap.release(heap.allocate(16 * MIB))
        for block in [heap.allocate(2 * MIB) for _ in range(20)]:
            heap.release(block)
        before = heap.max_reserved
        for _ in range(10):
            heap.allocate(3 * MIB)
        return heap.max_reserved - before

    assert more(()) == 0
    assert more(PHASES) > 20 * MIB


def test_the_backward_pass_gives_back_what_the_forward_pass_held() -> None:
    heap = Heap(PHASES)
    heap.release(heap.allocate(16 * MIB))
    blocks = [heap.allocate(2 * MIB) for _ in range(40)]
    for block in blocks[::2]:
        heap.release(block)
    heap.event = 99
    for block in blocks[1::2]:
        heap.release(block)
    top = heap.max_reserved
    for _ in range(39):
        heap.allocate(2 * MIB)
    assert heap.max_reserved == top


def test_large_blocks_are_returned_at_once_if_asked() -> None:
    heap = Heap(PHASES, returns=MIB)
    blocks = [heap.allocate(size * MIB) for size in (1, 5, 30)]
    assert heap.reserved == pytest.approx(36 * MIB, rel=0.001)
    for block in blocks:
        heap.release(block)
    assert heap.reserved == 0
    assert heap.max_reserved == pytest.approx(36 * MIB, rel=0.001)


RESIDENT = """
import ctypes, json, sys
from lorafit.hardware import return_memory
if sys.argv[1:]:
    assert return_memory()
libc = ctypes.CDLL("libc.so.6")
libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))
events = json.load(sys.stdin)
before = top = resident()
blocks, pointer = {}, ctypes.c_void_p()
for number, size in events:
    if size < 0:
        libc.free(blocks.pop(number))
        continue
    assert libc.posix_memalign(ctypes.byref(pointer), 64, size) == 0
    ctypes.memset(pointer, 1, size)
    blocks[number] = pointer.value
    top = max(top, resident())
print(top - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("returns", [None, RETURNED_AT_ONCE])
def test_the_heap_holds_what_this_machines_c_library_holds(seed: int, returns: int | None) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(64 << 10, 6 * MIB) for _ in range(12)]
    events: list[tuple[int, int]] = []
    live: list[int] = []
    for number in range(1500):
        events.append((number, draw.choice(sizes)))
        live.append(number)
        while len(live) > 60 + 40 * (number // 100 % 2):
            events.append((live.pop(draw.randrange(len(live))), FREE))
    command = [sys.executable, "-c", RESIDENT, *(["returns"] if returns else [])]
    done = subprocess.run(command, input=json.dumps(events), capture_output=True, text=True, check=True)
    found = replay(events, Heap(returns=returns))
    assert found.max_reserved == pytest.approx(int(done.stdout), rel=0.05)
    alive = replay(events, Heap(returns=1)).max_reserved
    assert found.max_reserved / alive > (1.0 if returns else 1.05)
