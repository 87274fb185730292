"""The operations of a decoder as torch does them: what each makes, keeps and needs for its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorafit.memory.tape import Ledger, Node, Parameter, Value, backward, leaf

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

    def made(self, y: Value, parents: Sequence[Value | None], back: Callable[[Value], Sequence[Value | None]]) -> Value:
        y.node = self.ledger.node(parents, back)
        return y

    # --- element by element ---------------------------------------------------------------------

    def to(self, x: Value, width: float) -> Value:
        if x.width == width:
            return x
        elements, before = x.elements, x.width
        return self.made(self.new(elements, width), [x], lambda g: [self.gradient(elements, before)])

    def scale(self, x: Value) -> Value:
        """Times a number; negation; adding a number."""
        return self.made(self.new(x.elements, x.width), [x], lambda g: [self.like(g)])

    def copied(self, x: Value) -> Value:
        """A copy; adding something without a gradient: the gradient passes as it is."""
        return self.made(self.new(x.elements, x.width), [x], lambda g: [g.view()])

    def slice(self, x: Value, elements: int) -> Value:
        """A part: a view. Its gradient is a whole tensor of zeros around the part's (slice_backward)."""
        whole, width = x.elements, x.width
        return self.made(Value(x.storage, elements, width), [x], lambda g: [self.gradient(whole, width)])

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

        def back(g: Value) -> Sequence[Value | None]:
            _ = x
            return [self.like(g)]

        return self.made(self.new(x.elements, x.width), [x], back)

    def function_of_result(self, x: Value) -> Value:
        """tanh, exp: the result is kept."""
        y = self.new(x.elements, x.width)
        kept = y.view()

        def back(g: Value) -> Sequence[Value | None]:
            _ = kept
            return [self.like(g)]

        return self.made(y, [x], back)

    def square(self, x: Value) -> Value:
        def back(g: Value) -> Sequence[Value | None]:
            power = self.like(x)
            twice = self.like(x)
            del power
            return [self.like(g)] if twice else []

        return self.made(self.new(x.elements, x.width), [x], back)

    def mean(self, x: Value, size: int) -> Value:
        elements, width = x.elements, x.width
        return self.made(self.new(elements // size, width), [x], lambda g: [self.gradient(elements, width)])

    def dropout(self, x: Value) -> Value:
        """CUDA keeps a mask of a byte each (aten/native/cuda/Dropout.cu), a CPU one of the input's width."""
        mask = self.ledger.new(x.elements, 1 if self.cuda else x.width, "dropout masks")

        def back(g: Value) -> Sequence[Value | None]:
            _ = mask
            return [self.like(g)]

        return self.made(self.new(x.elements, x.width), [x], back)

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
