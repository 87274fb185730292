"""A record of which storages live when, and a short model's record extended to all layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lorafit.memory.operations import FREE


@dataclass
class Segment:
    """What happened in one part of a step: allocations (positive) and frees of storages, in order.

    Attributes:
        phase: forward, backward …
        layer: None outside the decoder's layers.
        events: (storage, bytes); FREE in place of the bytes where it ends.
    """

    phase: str
    layer: int | None
    events: list[tuple[int, int]] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Sees every storage that operations make, and its end.

    Under this mode, on `meta` tensors, nothing is computed and nothing allocated; the order of events is the one
    of a real run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._live: dict[int, tuple[int, Any]] = {}  # by the address of the storage's C++ object
        self._count = 0
        self.begin("build")

    def begin(self, phase: str, layer: int | None = None) -> None:
        """Start a segment: what follows belongs to it."""
        self.segments.append(Segment(phase, layer))

    @property
    def phase(self) -> str:
        return self.segments[-1].phase

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.see(value)
        return result

    def see(self, tensor: torch.Tensor) -> int:
        """The number of the tensor's storage; a new one is recorded as allocated."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if known is not None:
            return known[0]
        self._count += 1
        number = self._count
        self._live[key] = (number, weakref.ref(storage, lambda _: self._end(key, number)))
        self._event(number, storage.nbytes())
        return number

    def hidden(self, *sizes: int) -> None:
        """Buffers that a kernel takes for its own and gives back at once."""
        numbers = []
        for size in sizes:
            self._count += 1
            numbers.append(self._count)
            self._event(self._count, size)
        for number in reversed(numbers):
            self._event(number, FREE)

    def keep(self, size: int) -> None:
        """A buffer that is never given back."""
        self._count += 1
        self._event(self._count, size)

    def _end(self, key: int, number: int) -> None:
        if self._live.get(key, (0,))[0] == number:
            del self._live[key]
            self._event(number, FREE)

    def _event(self, number: int, size: int) -> None:
        self.segments[-1].events.append((number, size))


class NotPeriodic(Exception):
    """The middle layers of the short model differ, so that it can't be laid out."""


SHORT = 5
"""Layers of the short model: the first, the second, one that stands for all between, the last but one, the last."""

Key = tuple[str, int | None]
Event = tuple[Any, int]


def lay_out(segments: list[Segment], layers: int) -> dict[str, list[Event]]:
    """The segments of a model with `layers` layers from those of one with SHORT, by phase: the middle one repeated.

    A phase's layers are in the order in which they were recorded. Storages are renamed to (phase, layer, ordinal).
    Raises NotPeriodic if what the second, third and fourth layer allocate is not the same, or if a layer refers to
    others than its neighbours.
    """
    parts: dict[Key, list[tuple[int, int]]] = {}
    for segment in segments:
        parts.setdefault((segment.phase, segment.layer), []).extend(segment.events)
    origin: dict[int, tuple[str, int | None, int]] = {}
    for (phase, layer), events in parts.items():
        made = [number for number, size in events if size != FREE]
        origin |= {number: (phase, layer, ordinal) for ordinal, number in enumerate(made)}
    full = layers == SHORT or all(layer is None for _, layer in parts)
    if not full:
        _check_periodic(parts, origin)
    result: dict[str, list[Event]] = {}
    for phase in dict.fromkeys(phase for phase, _ in parts):
        found = [layer for name, layer in parts if name == phase]
        result[phase] = []
        if None in found:
            result[phase] += _outside(parts[phase, None], origin, layers)
        indices = [layer for layer in found if layer is not None]
        order = range(layers) if indices == sorted(indices) else range(layers - 1, -1, -1)
        for index in order if indices else ():
            template = template_of(index, layers)
            result[phase] += _shifted(parts.get((phase, template), []), origin, index - template)
    return result


def template_of(layer: int, layers: int) -> int:
    """The layer of the short model that stands for one of the whole."""
    from_end = layers - 1 - layer
    return min(layer, 2) if from_end >= 2 else SHORT - 1 - from_end


def _shifted(
    events: list[tuple[int, int]], origin: dict[int, tuple[str, int | None, int]], shift: int
) -> Iterator[Event]:
    for number, size in events:
        if number in origin:
            phase, layer, ordinal = origin[number]
            yield (phase, None if layer is None else layer + shift, ordinal), size


def _outside(
    events: list[tuple[int, int]], origin: dict[int, tuple[str, int | None, int]], layers: int
) -> Iterator[Event]:
    """Outside the layers, what happens to the middle layer's storages happens to those of all that it stands for."""
    for number, size in events:
        if number not in origin:
            continue
        phase, layer, ordinal = origin[number]
        if layer is None:
            yield (phase, None, ordinal), size
        else:
            for index in range(layers):
                if template_of(index, layers) == layer:
                    yield (phase, index, ordinal), size


def _check_periodic(parts: dict[Key, list[tuple[int, int]]], origin: dict[int, tuple[str, int | None, int]]) -> None:
    for phase in {phase for phase, layer in parts if layer is not None}:
        sizes = [[size for _, size in parts.get((phase, layer), []) if size != FREE] for layer in (1, 2, 3)]
        if not sizes[0] == sizes[1] == sizes[2]:
            raise NotPeriodic(phase)
        for layer in range(SHORT):
            for number, _ in parts.get((phase, layer), []):
                other = origin.get(number, ("", None, 0))[1]
                if other is not None and abs(other - layer) > 1:
                    raise NotPeriodic(phase)
