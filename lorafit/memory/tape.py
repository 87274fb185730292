"""Tensors that have a size and nothing else, and a backward pass over them.

What a training step allocates follows from which tensors are alive at once. Operations here make
values of the right sizes, keep for the backward pass what torch's keep, and let go of the rest when
nothing refers to them any more, as torch does; Python counts the references. The backward pass runs
the operations in the opposite order and adds gradients as torch's engine does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

FREE = -1


class Ledger:
    """The record of allocations: (storage, bytes), FREE in place of the bytes where one ends.

    Attributes:
        labels: what each storage is, by number.
        marks: (index of the first event, name) of each phase.
        recording: whether operations are kept for a backward pass.
        now, top: bytes alive, and the most since `top` was last set.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.labels: list[str] = []
        self.marks: list[tuple[int, str]] = []
        self.recording = True
        self.now = self.top = 0
        self._nodes = 0

    def begin(self, phase: str) -> None:
        self.marks.append((len(self.events), phase))

    def new(self, elements: int, width: float, label: str) -> Value:
        """A value of so many elements, each so many bytes wide."""
        return Value(Storage(self, round(elements * width), label), elements, width)

    def borrow(self, label: str, *sizes: float) -> None:
        """Buffers that an operation takes and gives back before it ends."""
        _ = [Storage(self, round(size), label) for size in sizes if size]

    def node(self, parents: Sequence[Value | None], back: Back) -> Node | None:
        """An operation of the backward pass; None if nothing needs a gradient."""
        if not self.recording or not any(parent is not None and parent.needs for parent in parents):
            return None
        self._nodes += 1
        edges = [parent.node if parent is not None and parent.needs else None for parent in parents]
        return Node(self._nodes, edges, back)

    @contextmanager
    def without_backward(self) -> Iterator[None]:
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before


class Storage:
    """Allocated memory; given back when the last value that uses it is gone."""

    __slots__ = ("bytes", "ledger", "number", "users")

    def __init__(self, ledger: Ledger, size: int, label: str) -> None:
        self.ledger, self.number, self.bytes, self.users = ledger, len(ledger.labels), size, 0
        ledger.labels.append(label)
        ledger.now += size
        ledger.top = max(ledger.top, ledger.now)
        ledger.events.append((self.number, size))

    def __del__(self) -> None:
        self.ledger.now -= self.bytes
        self.ledger.events.append((self.number, FREE))


class Value:
    """A tensor's size, where it lies, and the operation that made it.

    Attributes:
        width: bytes an element.
        needs: whether a gradient flows to it.
    """

    __slots__ = ("elements", "node", "storage", "width")

    def __init__(self, storage: Storage, elements: int, width: float, node: Node | None = None) -> None:
        self.storage, self.elements, self.width, self.node = storage, elements, width, node
        storage.users += 1

    def __del__(self) -> None:
        self.storage.users -= 1

    @property
    def needs(self) -> bool:
        return self.node is not None

    @property
    def bytes(self) -> float:
        return self.elements * self.width

    def view(self) -> Value:
        return Value(self.storage, self.elements, self.width, self.node)


class Parameter:
    """A weight: its gradient is kept when the backward pass has made it, or this process's share of it."""

    def __init__(self, elements: int, width: float, trained: bool) -> None:
        self.elements, self.width, self.trained = elements, width, trained
        self.gradient: Value | None = None
        self.waiting: Value | None = None
        self.shard: Storage | None = None
        self.uses = 1

    def accumulate(self, gradient: Value) -> None:
        """Add a gradient. Of a weight with two uses, the first waits for the second and both for their sum."""
        if self.uses > 1:
            if self.waiting is None:
                self.waiting = gradient.view()
                return
            gradient = gradient.storage.ledger.new(gradient.elements, gradient.width, "gradients")
        self.waiting = None
        if self.gradient is None:
            self.gradient = gradient.view()

    def forget(self) -> None:
        self.gradient = None
        self.shard = None


Back = Callable[[Value], Sequence[Value | None]]


class Node:
    """An operation in the backward pass: from its output's gradient to those of its inputs."""

    __slots__ = ("back", "edges", "number")

    def __init__(self, number: int, edges: list[Node | None], back: Back) -> None:
        self.number, self.edges, self.back = number, edges, back


def leaf(ledger: Ledger, value: Value, receive: Callable[[Value], None]) -> Value:
    """A value as the start of a graph of its own; its gradient goes to `receive`."""

    def back(gradient: Value) -> Sequence[Value | None]:
        receive(gradient)
        return ()

    ledger._nodes += 1
    return Value(value.storage, value.elements, value.width, Node(ledger._nodes, [], back))


def backward(ledger: Ledger, value: Value, gradient: Value) -> None:
    """Run the backward pass from a value. Each operation lets go of what it kept once it has run."""
    if value.node is None:
        return
    waiting: dict[int, tuple[Node, list[Value]]] = {value.node.number: (value.node, [gradient])}
    order = [-value.node.number]
    del value, gradient
    while order:
        node, held = waiting.pop(-heapq.heappop(order))
        back, edges = node.back, node.edges
        node.back = _spent
        result = list(back(held.pop()))
        del back, node, held
        for edge, made in zip(edges, result, strict=True):
            if edge is None or made is None:
                continue
            if edge.number not in waiting:
                waiting[edge.number] = (edge, [made])
                heapq.heappush(order, -edge.number)
            else:
                _add(ledger, waiting[edge.number][1], made)
        result.clear()
        made = None
        del edges


def _add(ledger: Ledger, held: list[Value], more: Value) -> None:
    """Add to a waiting gradient: in place if nothing else uses its storage, else into a new one."""
    if held[0].storage.users > 1:
        held[0] = ledger.new(held[0].elements, held[0].width, "gradients of activations")


def _spent(_: Value) -> Any:
    raise RuntimeError("an operation's backward pass runs once")
