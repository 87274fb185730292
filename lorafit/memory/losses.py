"""The ways in which a stack computes the loss, as operations on sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorafit.memory.decoder import Decoder
from lorafit.memory.operations import Operations
from lorafit.memory.tape import Value

TILE_ROWS, TILE_COLUMNS = 4096, 32768
"""Logits that TRL's fused head holds at once (trl/kernels/chunked_logprob.py, trl/trainer/utils.py)."""
CHUNK_BYTES = 256 << 20
"""Logits in float32 that lorafit's own head for CPUs holds at once (lorafit/engine/loss.py)."""
LOGITS = "logits"


def loss_of(decoder: Decoder, batch: int) -> tuple[Value, object]:
    """The loss of a batch, and what the training loop holds until the backward pass is over."""
    kind = decoder.setup.stack.loss
    if kind == "fused":
        return _fused(decoder, decoder.hidden(batch)), None
    if kind == "compact":
        return _compact(decoder, decoder.hidden(batch)), None
    if kind == "liger":
        return _liger(decoder, decoder.hidden(batch)), None
    return _whole(decoder, batch)


def _chosen(decoder: Decoder, hidden: Value) -> Value:
    """The supervised positions, copied."""
    do, length = decoder.do, decoder.setup.length
    rows = hidden.elements // decoder.hidden_size
    rows = round((rows - rows // length) * decoder.setup.supervised)
    do.label = "supervised positions"
    elements, width = hidden.elements, hidden.width
    return do.made(do.new(rows * decoder.hidden_size, width), [hidden], lambda g: [do.gradient(elements, width)])


def _fused(decoder: Decoder, hidden: Value) -> Value:
    """TRL's head: a tile of logits at a time, of the supervised positions; never all of them."""
    do, size, weight = decoder.do, decoder.hidden_size, decoder.head
    chosen = _chosen(decoder, hidden)
    del hidden
    rows, before = chosen.elements // size, chosen.width
    width = do.compute or before
    tile = min(rows, TILE_ROWS) * TILE_COLUMNS * width
    cast = min(TILE_COLUMNS, decoder.vocabulary) * size * width if weight.width != width else 0
    statistics = do.ledger.new(7 * rows, 4, "tile of logits")
    do.ledger.borrow("tile of logits", tile, cast)
    del statistics

    def back(g: Value) -> Sequence[Value | None]:
        result = do.gradient(rows * size, 4) if chosen.needs else None
        made = do.ledger.new(weight.elements, 4, "output head's gradient, in float32") if weight.trained else None
        buffer = do.ledger.new(1, tile + cast, "tile of logits")
        if made is not None:
            weight.accumulate(made if weight.width == 4 else do.ledger.new(weight.elements, weight.width, "gradients"))
        result = do.gradient(rows * size, before) if before != 4 and result else result
        del buffer
        return [result]

    return do.made(do.new(rows, 4), [chosen], back)


def _compact(decoder: Decoder, hidden: Value) -> Value:
    """lorafit's head for CPUs: the logits of the supervised positions, in chunks that are computed again."""
    do, size = decoder.do, decoder.hidden_size
    chosen = _chosen(decoder, hidden)
    del hidden
    rows = chosen.elements // size
    most = max(1, CHUNK_BYTES // (4 * decoder.vocabulary))
    if rows <= most:
        return _score(decoder, chosen)
    parts = []
    for start in range(0, rows, most):
        part = do.slice(chosen, min(most, rows - start) * size)
        parts.append(do.checkpoint(lambda value: _score(decoder, value), part, decoder.head.trained))
    total = do.new(rows, 4)
    return do.made(total, parts, lambda g: [g.view() for _ in parts])


def _score(decoder: Decoder, chosen: Value) -> Value:
    """Logits in float32, their log-softmax, and three numbers of each row."""
    do = decoder.do
    do.label = LOGITS
    logits = do.to(_head(decoder, chosen), 4)
    log_p = do.function_of_result(logits)
    rows = chosen.elements // decoder.hidden_size
    do.ledger.borrow(LOGITS, log_p.bytes, log_p.bytes)  # the entropy: exp(log_p) * log_p
    return _gathered(do, log_p, rows)


def _head(decoder: Decoder, hidden: Value) -> Value:
    return decoder.do.linear(hidden, decoder.head, decoder.vocabulary, decoder.hidden_size)


def _gathered(do: Operations, log_p: Value, rows: int) -> Value:
    """The labels' entries; the gradient is as large as the whole."""
    elements, width = log_p.elements, log_p.width
    return do.made(do.new(rows, 4), [log_p], lambda g: [do.gradient(elements, width)])


def _liger(decoder: Decoder, hidden: Value) -> Value:
    """Liger's head: gradients chunk by chunk in the forward pass (ops/fused_linear_cross_entropy.py)."""
    do, size, vocabulary = decoder.do, decoder.hidden_size, decoder.vocabulary
    x = do.copied(hidden)
    del hidden
    rows = x.elements // size
    chunk = liger_rows(rows, size, vocabulary)
    do.label = "gradients of activations"
    ready = do.new(x.elements, x.width) if x.needs else None
    weight = decoder.head
    made = do.ledger.new(weight.elements, weight.width, "gradients") if weight.trained else None
    do.ledger.borrow(LOGITS, chunk * vocabulary * x.width, chunk * size * x.width)

    def back(g: Value) -> Sequence[Value | None]:
        if made is not None:
            weight.accumulate(made)
        return [ready]

    return do.made(do.new(rows, 4), [x], back)


def liger_rows(rows: int, size: int, vocabulary: int) -> int:
    """Rows of a chunk: as many chunks as the vocabulary is wider than the hidden state, their rows a power of two."""
    return min(1 << math.ceil(math.log2(max(1, math.ceil(rows / math.ceil(vocabulary / size))))), rows)


def _whole(decoder: Decoder, batch: int) -> tuple[Value, object]:
    """Whole logits: transformers' losses by version (loss/loss_utils.py: ForCausalLMLoss; before: each model's own)."""
    do, stack = decoder.do, decoder.setup.stack
    hidden = decoder.hidden(batch)
    do.label = LOGITS
    logits = _head(decoder, hidden)
    if decoder.traits.soft_caps and stack.loss == "logits":
        logits = do.scale(do.function_of_result(do.scale(logits)))
    if stack.loss == "logits_upcast":
        logits = do.to(logits, 4)
        loss = _cross_entropy(decoder, _shifted(decoder, logits, batch))
    elif stack.loss == "logits_shifted":
        wide = do.to(logits, 4)
        loss = _cross_entropy(decoder, _shifted(decoder, wide, batch))
        del wide
        if stack.autocast:
            do.ledger.borrow(LOGITS, logits.elements * 4)  # accelerate: convert_outputs_to_fp32
    else:
        loss = _cross_entropy(decoder, do.to(logits, 4))
    return loss, (hidden, logits) if stack.keep_outputs else None


def _shifted(decoder: Decoder, logits: Value, batch: int) -> Value:
    """All but the last position of each row: a copy, but of a single row a view."""
    do, batch = decoder.do, 1 if decoder.setup.packed else batch
    last = batch * decoder.vocabulary
    part = do.slice(logits, logits.elements - last)
    return part if batch == 1 else do.copied(part)


def _cross_entropy(decoder: Decoder, logits: Value) -> Value:
    do = decoder.do
    rows = logits.elements // decoder.vocabulary
    if "cross_entropy" in decoder.setup.stack.kernels:  # turns the logits into their gradient where they are
        return do.made(do.new(rows, 4), [logits], lambda g: [logits.view()])
    return _gathered(do, do.function_of_result(logits), rows)
