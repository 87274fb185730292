"""The closed form: one optimizer step on sizes alone, its highest moment, and what is alive then."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from lorafit.memory.allocator import replay
from lorafit.memory.decoder import Decoder
from lorafit.memory.operations import Operations
from lorafit.memory.setup import Setup
from lorafit.memory.static import BYTES, packed_bytes, quantized_tensors, state_bytes, trained, trained_bytes, weight_terms
from lorafit.memory.tape import FREE, Ledger, Storage, Value, backward
from lorafit.memory.types import Band, Estimate, Term

TILE_ROWS, TILE_COLUMNS = 4096, 32768
"""Logits that TRL's fused head holds at once (trl/kernels/chunked_logprob.py, trl/trainer/utils.py)."""
WORKSPACE = {9: 32 << 20, 10: 32 << 20, 12: 32 << 20}
WORKSPACE_BEFORE = 8_519_680
"""cuBLAS keeps a workspace in torch's allocator: 8.1 MiB, 32 MiB from Hopper on (aten/cuda/CublasHandlePool.cpp)."""


def closed_form(setup: Setup) -> Estimate:
    ledger = step(setup)
    peak, index = highest(ledger.events)
    moment = next(name for start, name in reversed(ledger.marks) if start <= index)
    alive: dict[int, int] = {}
    for number, size in ledger.events[: index + 1]:
        if size == FREE:
            alive.pop(number, None)
        else:
            alive[number] = size
    parts: Counter[str] = Counter()
    for number, size in alive.items():
        parts[ledger.labels[number]] += size
    static = sum(term.bytes for term in weight_terms(setup))
    terms = [*weight_terms(setup)]
    rounding = parts.pop("weights", 0) - static
    terms += [Term(name, size, "") for name, size in parts.items() if size]
    reserved = replay(ledger.events).max_reserved
    return Estimate(tuple(terms), moment, reserved, "closed form", Band(0.05, 0, ""), state_bytes(setup)[1])


def highest(events: Sequence[tuple[int, int]]) -> tuple[int, int]:
    live: dict[int, int] = {}
    now = top = where = 0
    for index, (number, size) in enumerate(events):
        if size == FREE:
            now -= live.pop(number, 0)
        else:
            live[number] = size
            now += size
            if now > top:
                top, where = now, index
    return top, where


def step(setup: Setup) -> Ledger:
    """Two optimizer steps on a ledger."""
    ledger = Ledger()
    stack = setup.stack
    compute = BYTES[stack.autocast] if stack.autocast else None
    do = Operations(ledger, compute, setup.device == "cuda")
    decoder = Decoder(setup, do)
    ledger.begin("weights")
    held = [*weights(setup, ledger)]
    if setup.device == "cuda":
        held.append(Storage(ledger, WORKSPACE.get(setup.compute_capability[0], WORKSPACE_BEFORE), "cuBLAS workspace"))
    states: list[Storage] = []
    for _ in range(2):
        for number in range(min(setup.accumulation, 2)):
            ledger.begin("forward pass")
            value = loss(decoder, setup.batch)
            do.forget_casts()
            ledger.begin("backward pass")
            backward(ledger, value, ledger.new(1, 4, "loss"))
            del value
        ledger.begin("optimizer step")
        update(setup, ledger, states)
        for parameter in decoder.parameters():
            parameter.gradient = None
    if setup.eval_batch:
        ledger.begin("evaluation")
        with ledger.without_backward():
            loss(decoder, setup.eval_batch)
            do.forget_casts()
    ledger.begin("end")
    ledger.kept = (held, states)
    return ledger


def weights(setup: Setup, ledger: Ledger) -> Iterator[Storage]:
    quantized = {tensor.name for tensor in quantized_tensors(setup)}
    width = BYTES[setup.dtype]
    for tensor in setup.facts.tensors:
        wide = setup.stack.upcast == "all" or setup.stack.upcast == "norms" and "norm" in tensor.name
        size = packed_bytes(setup, tensor) if tensor.name in quantized else tensor.size * (4 if wide else width)
        yield Storage(ledger, size, "weights")
    if setup.lora is not None:
        for tensor in trained(setup):
            yield Storage(ledger, tensor.size * BYTES[tensor.dtype], "adapter")


def update(setup: Setup, ledger: Ledger, states: list[Storage]) -> None:
    from lorafit.memory.static import _state_bytes, OPTIMIZER_STATES, PAGED_SIZE

    tensors = trained(setup)
    if not states:
        count = max(OPTIMIZER_STATES[setup.optimizer], 1)
        for tensor in tensors:
            if setup.optimizer.startswith("paged") and tensor.size >= PAGED_SIZE:
                continue
            size = _state_bytes(setup.optimizer, tensor)
            states += [Storage(ledger, size // count, "optimizer states") for _ in range(count) if size]
    if setup.optimizer in ("adamw_torch", "rmsprop", "adagrad") and setup.device == "cuda":
        for matrices in (True, False):
            group = [t for t in tensors if (len(t.shape) >= 2) == matrices]
            _ = [Storage(ledger, t.size * BYTES[t.dtype], "optimizer's temporary copies") for t in group]
            del _


def loss(decoder: Decoder, batch: int) -> Value:
    """The loss of a batch as the stack computes it."""
    setup, do = decoder.setup, decoder.do
    hidden = decoder.hidden(batch)
    kind = setup.stack.loss
    if kind == "fused":
        return fused_loss(decoder, hidden)
    raise NotImplementedError(kind)


def fused_loss(decoder: Decoder, hidden: Value) -> Value:
    """TRL's head: a tile of logits at a time, of the supervised positions (trl/kernels/chunked_logprob.py)."""
    setup, do = decoder.setup, decoder.do
    size, weight = decoder.hidden_size, decoder.head
    rows = round(hidden.elements // size * setup.supervised)
    width = do.compute or hidden.width
    do.label = "supervised positions"
    elements, before = hidden.elements, hidden.width
    chosen = do.made(do.new(rows * size, hidden.width), [hidden], lambda g: [do.gradient(elements, before)])
    del hidden
    tile = min(rows, TILE_ROWS) * TILE_COLUMNS * width
    cast = TILE_COLUMNS * size * width if weight.width != width else 0
    do.ledger.borrow("tile of logits", 7 * 4 * rows, tile, cast)
    kept = chosen

    def back(g: Value) -> Sequence[Value | None]:
        result = do.gradient(rows * size, 4) if kept.needs else None
        made = do.ledger.new(weight.elements, 4, "output head's gradient in float32") if weight.trained else None
        do.ledger.borrow("tile of logits", tile, cast)
        if made is not None:
            if weight.width != 4:
                made = do.ledger.new(weight.elements, weight.width, "gradients")
            weight.accumulate(made)
        return [do.gradient(rows * size, before) if before != 4 else result]

    return do.made(do.new(rows, 4), [chosen], back)
