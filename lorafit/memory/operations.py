"""Operations as torch does them, on tensors that have a size and nothing else: what each makes, keeps and needs.

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


Function = Callable[[Value], Value]


class Operations:
    """Operations on a ledger, in the arithmetic of a setup.

    Attributes:
        compute: bytes an element that autocast computes matrix products in; None without autocast.
        label: what values made from here on are called.
        training: whether dropout drops.
        casts: whether autocast finds weights in another type.
        caching: whether 16-bit copies of weights are kept until the forward pass ends.
    """

    def __init__(self, ledger: Ledger, compute: int | None, cuda: bool) -> None:
        self.ledger, self.compute, self.cuda = ledger, compute, cuda
        self.label = ""
        self.caching = self.training = self.casts = True
        self._casts: dict[int, Value] = {}

    # --- values ---------------------------------------------------------------------------------

    def new(self, elements: int, width: float) -> Value:
        return self.ledger.new(elements, width, self.label)

    def gradient(self, elements: int, width: float) -> Value:
        return self.ledger.new(elements, width, "gradients of activations")

    def like(self, x: Value) -> Value:
        return self.gradient(x.elements, x.width)

    def made(self, y: Value, parents: Sequence[Value | None], back: Back) -> Value:
        y.node = self.ledger.node(parents, back)
        return y

    def of(self, x: Value, y: Value) -> Value:
        """`y` as made of `x`, of which nothing but the size is kept: the gradient is a new tensor of that size."""
        elements, width = x.elements, x.width
        return self.made(y, [x], lambda g: [self.gradient(elements, width)])

    def keeping(self, kept: Value, x: Value, y: Value) -> Value:
        """`y` as made of `x` element by element; something is kept for the backward pass."""

        def back(g: Value) -> Sequence[Value | None]:
            _ = kept
            return [self.like(g)]

        return self.made(y, [x], back)

    # --- element by element ---------------------------------------------------------------------

    def to(self, x: Value, width: float) -> Value:
        return x if x.width == width else self.of(x, self.new(x.elements, width))

    def scale(self, x: Value) -> Value:
        """Times a number; negation; adding a number."""
        return self.made(self.new(x.elements, x.width), [x], lambda g: [self.like(g)])

    def copied(self, x: Value) -> Value:
        """A copy; adding something without a gradient: the gradient passes as it is."""
        return self.made(self.new(x.elements, x.width), [x], lambda g: [g.view()])

    def slice(self, x: Value, elements: int) -> Value:
        """A part: a view. Its gradient is a whole tensor of zeros around the part's (slice_backward)."""
        return self.of(x, Value(x.storage, elements, x.width))

    def add(self, a: Value, b: Value) -> Value:
        width = max(a.width, b.width)
        widths = a.width, b.width

        def back(g: Value) -> Sequence[Value | None]:
            return [g.view() if g.width == w else self.gradient(g.elements, w) for w in widths]

        return self.made(self.new(max(a.elements, b.elements), width), [a, b], back)

    def times(self, a: Value, b: Value) -> Value:
        """A product; the other factor is kept where one needs a gradient."""
        y = self.new(max(a.elements, b.elements), max(a.width, b.width))
        keeps_a, keeps_b = (a if b.needs else None), (b if a.needs else None)
        sizes = (a.elements, a.width) if a.needs else None, (b.elements, b.width) if b.needs else None
        a_needs, b_needs = a.needs, b.needs

        def back(g: Value) -> Sequence[Value | None]:
            _ = keeps_a, keeps_b
            result = [self.like(g) if a_needs else None, self.like(g) if b_needs else None]
            for index, size in enumerate(sizes):
                if size and size[0] < g.elements:
                    result[index] = self.gradient(*size)  # summed over the rest
            return result

        return self.made(y, [a, b], back)

    def times_weight(self, x: Value, weight: Parameter) -> Value:
        """A product with a vector of weights, such as a norm's."""
        kept = x if weight.trained else None
        parents = [x if x.needs else Anchor() if weight.trained else None]

        def back(g: Value) -> Sequence[Value | None]:
            result = self.like(g)
            if weight.trained:
                _ = kept
                whole = self.like(g)
                weight.accumulate(self.gradient(weight.elements, weight.width))
                del whole
            return [result]

        return self.made(self.new(x.elements, max(x.width, weight.width)), parents, back)

    def function(self, x: Value) -> Value:
        """An activation function: its input is kept."""
        return self.keeping(x, x, self.new(x.elements, x.width))

    def function_of_result(self, x: Value) -> Value:
        """tanh, exp: the result is kept."""
        y = self.new(x.elements, x.width)
        return self.keeping(y.view(), x, y)

    def square(self, x: Value) -> Value:
        def back(g: Value) -> Sequence[Value | None]:
            power = self.like(x)
            twice = self.like(x)
            del power
            return [self.like(g)] if twice else []

        return self.made(self.new(x.elements, x.width), [x], back)

    def mean(self, x: Value, size: int) -> Value:
        return self.of(x, self.new(x.elements // size, x.width))

    def dropout(self, x: Value) -> Value:
        """CUDA keeps a mask of a byte each (aten/native/cuda/Dropout.cu), a CPU one of the input's width."""
        mask = self.ledger.new(x.elements, 1 if self.cuda else x.width, "dropout masks")
        return self.keeping(mask, x, self.new(x.elements, x.width))

    # --- products -------------------------------------------------------------------------------

    def linear(self, x: Value, weight: Parameter, out: int, inputs: int) -> Value:
        """x times a matrix. The input is kept if the matrix is trained."""
        given = x
        x = self.to(x, self.compute) if self.compute else x
        cast = self.weight(weight)
        rows = x.elements // inputs
        width = x.width
        y = self.new(rows * out, width)
        del given
        kept = x if weight.trained else None
        parents = [x if x.needs else Anchor() if weight.trained else None]
        flows = x.needs

        def back(g: Value) -> Sequence[Value | None]:
            result = None
            if flows:
                result = self.gradient(rows * inputs, width)
            if weight.trained:
                _ = kept, cast
                made = self.ledger.new(weight.elements, width, "gradients")
                if width != weight.width:
                    made = self.ledger.new(weight.elements, weight.width, "gradients")
                weight.accumulate(made)
            return [result]

        return self.made(y, parents, back)

    def weight(self, parameter: Parameter) -> Value | None:
        """The copy of a weight in which autocast computes, if it makes one (aten/autocast_mode.cpp: cached_cast)."""
        if self.compute is None or parameter.width == self.compute or not self.casts:
            return None
        key = id(parameter)
        if key not in self._casts:
            value = self.ledger.new(parameter.elements, self.compute, "weights cast by autocast")
            if not (self.caching and parameter.trained and parameter.width == 4):
                return value
            self._casts[key] = value
        return self._casts[key].view()

    def forget_casts(self) -> None:
        self._casts.clear()

    # --- structure ------------------------------------------------------------------------------

    def checkpoint(self, function: Function, x: Value, trains: bool) -> Value:
        """Keep only the input, and run the function again in the backward pass (torch.utils.checkpoint)."""
        with self.ledger.without_backward():
            y = function(x.view())
        parents = [x if x.needs else Anchor() if trains else None]

        def back(g: Value) -> Sequence[Value | None]:
            received: list[Value] = []
            label, caching, self.caching = self.label, self.caching, False
            start = leaf(self.ledger, x, received.append)
            again = function(start)
            self.caching, self.label = caching, label
            del start
            backward(self.ledger, again, g)
            return [received[0] if received else None]

        return self.made(y, parents, back)


class Anchor(Value):
    """Stands for an input without a gradient where a weight's is wanted."""

    __slots__ = ()

    def __init__(self) -> None:
        self.node = Node(0, [], lambda _: ())

    def __del__(self) -> None:
        pass
