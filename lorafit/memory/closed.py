"""The closed form: two optimizer steps on sizes alone, the loss among them; the most that is held at once, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from lorafit.hardware import RETURNED_AT_ONCE
from lorafit.memory.allocator import CachingAllocator, Heap, Replay, replay
from lorafit.memory.decoder import Decoder
from lorafit.memory.estimate import CONTEXT, DRIVER, NCCL, PROCESS, Estimate, Setup, Term, band_of
from lorafit.memory.operations import FREE, Ledger, Operations, Storage, Value, backward
from lorafit.memory.static import (
    BYTES,
    own_bytes,
    packed_bytes,
    quantized_tensors,
    share,
    state_sizes,
    trained,
    weight_terms,
    why_states,
    width_of,
)

_LLAMA = "transformers/models/llama/modeling_llama.py"
WHY = {
    "hidden states": ("a layer's input: tokens x hidden_size x {width} bytes{layers}", _LLAMA),
    "norms, in float32": ("each norm keeps its input in float32: tokens x hidden_size x 4 bytes", _LLAMA),
    "norms": ("a number for each row of a fused norm", "liger_kernel/ops/rms_norm.py"),
    "final norm": ("its input in float32: tokens x hidden_size x 4 bytes", _LLAMA),
    "queries, keys, values, attention output": (
        "what attention keeps: tokens x (2 x heads + 2 x key heads) x head_dim x {width} bytes a layer",
        "aten/native/transformers/cuda",
    ),
    "attention scores": ("eager attention: batch x heads x length x length, as computed and in float32", _LLAMA),
    "attention masks as numbers": (
        "batch x length x length x {width} bytes in each layer: torch's sdpa turns a boolean mask into numbers",
        "aten/native/transformers/attention.cpp: convert_boolean_attn_mask",
    ),
    "attention's own buffers": (
        "the backward kernel adds up the queries' gradient in float32",
        "flash_attn/flash_api.cpp: mha_bwd",
    ),
    "positions and masks": ("cosines, sines and the mask of positions", "transformers/masking_utils.py"),
    "gate, up and activation": ("three tensors of tokens x intermediate_size x {width} bytes a layer", _LLAMA),
    "tokens sorted by expert": ("a copy of each token for each of its experts", "transformers/integrations/moe.py"),
    "experts' outputs": ("one for each token and expert", "transformers/integrations/moe.py"),
    "router": ("tokens x experts", "transformers/integrations/moe.py"),
    "adapters' inputs": (
        "a copy of the layer's input for each target, dropped out and in the type of the product",
        "peft/tuners/lora/layer.py: Linear.forward",
    ),
    "adapters' outputs": ("tokens x outputs, until they are added", "peft/tuners/lora/layer.py"),
    "DoRA's whole matrices": (
        "base and update of a layer as matrices, for their norms; with dropout a copy of the weight stays",
        "peft/tuners/lora/dora.py",
    ),
    "DoRA's products": ("tokens x outputs of base and update, kept for the magnitudes", "peft/tuners/lora/dora.py"),
    "dropout masks": ("a {mask} for each number of an adapter's input", "aten/native/cuda/Dropout.cu"),
    "dequantized weight": (
        "one weight at a time in 16 bits, for products of more than 1536 rows and in the backward pass",
        "bitsandbytes/backends/cuda/ops.py",
    ),
    "8-bit input and product": ("a layer's input in 8 bits, its product in 32", "bitsandbytes/autograd/_functions.py"),
    "weights cast by autocast": ("copies of trained weights in 16 bits", "aten/autocast_mode.cpp: cached_cast"),
    "supervised positions": ("their hidden states, copied for the head", "trl/trainer/utils.py: add_fused_lm_head"),
    "tile of logits": ("at most 4096 x 32768 logits at once", "trl/kernels/chunked_logprob.py"),
    "logits": ("tokens x vocabulary, as computed and in float32", "transformers/loss/loss_utils.py"),
    "output head's gradient, in float32": ("vocabulary x hidden_size x 4 bytes", "trl/kernels/chunked_logprob.py"),
    "gradients of activations": ("what flows back through a layer at this moment", "torch's autograd engine"),
    "optimizer's temporary copies": ("one of each trained number", "torch/optim/_multi_tensor"),
    "cuBLAS workspace": ("kept for matrix products", "aten/cuda/CublasHandlePool.cpp"),
    "gathered weights": ("a layer's and the next one's, and those outside the layers", "torch/distributed/fsdp"),
    "a second layer's activations": ("held until the next layer is through, as measured FSDP runs show", ""),
    "gradients to be sent": ("DDP's buckets: a copy of the gradients", "torch/nn/parallel/distributed.py"),
    "loss": ("a number", ""),
}


def explained(name: str, size: int, setup: Setup) -> Term:
    if name == "adapter":
        count = sum(tensor.size for tensor in trained(setup))
        return Term(name, size, f"{count:,} parameters in {setup.adapter_dtype}", setup.adapter.source)
    if name == "gradients":
        return Term(name, size, "one for each trained number, in its type", "torch's autograd engine")
    if name == "optimizer states":
        return Term(name, size, why_states(setup.optimizer), "torch/optim, bitsandbytes/optim")
    text, source = WHY[name]
    kept = setup.checkpointing != "none"
    return Term(
        name,
        size,
        text.format(
            width=4 if setup.dtype == "float32" else 2,
            layers=", kept for every layer" if kept else ", added to in every layer",
            mask="byte" if setup.device == "cuda" else "number",
        ),
        source,
    )


K = TypeVar("K", bound=Hashable)
COPIES = {"adamw_torch": 1, "rmsprop": 2, "adagrad": 2, "sgd": 1}
"""Copies of every trained number that torch's updates of many tensors at once make (torch/optim: _multi_tensor_…)."""
SHORT = "At the given capacity the step runs out of memory."
HOPPER_WORKSPACE, WORKSPACE = 32 << 20, 8_519_680
"""cuBLAS keeps a workspace in torch's allocator: 8.1 MiB, 32 MiB from Hopper on (aten/cuda/CublasHandlePool.cpp)."""


def serve(
    events: Sequence[tuple[Hashable, int]], phases: Sequence[tuple[int, str]], setup: Setup, capacity: int | None
) -> tuple[Replay, bool, tuple[str, ...]]:
    """What the allocator holds for a record; whether a device with so many bytes serves it; what to say of it.

    Short of memory, torch's allocator for CUDA gives cached blocks back and goes on: then less is reserved than without
    a limit. On a CPU `train` has the C library return blocks at once (`hardware.return_memory`); with checkpointing it
    always does, whose short-lived blocks leave holes of several times what is alive.
    """
    if setup.device == "cpu":
        least = replay(events, Heap(phases, RETURNED_AT_ONCE))
        held = replay(events, Heap(phases)) if setup.checkpointing == "none" else least
        if capacity is None or held.max_reserved + PROCESS[1] <= capacity:
            return held, True, ()
        if least.max_reserved + PROCESS[1] > capacity:
            return least, False, (SHORT,)
        return least, True, ("With the given memory every large block is returned at once, which takes time.",)
    beside = CONTEXT[1] + (NCCL[1] if setup.world > 1 else 0)
    if capacity is None:
        return replay(events), True, ()
    found = replay(events, CachingAllocator(max(round(capacity * (1 - DRIVER)) - beside, 0)))
    if not found.fits:
        return replay(events), False, (SHORT,)
    again = "At the given capacity torch gives cached memory back to go on, which takes time."
    return found, True, (again,) if found.retries else ()


def closed_form(setup: Setup, capacity: int | None = None) -> Estimate:
    """Raises ModelError if the model's layers are not known here."""
    ledger = Ledger()
    run(setup, ledger)
    index = highest(ledger.events)
    moment = next(name for start, name in reversed(ledger.marks) if start <= index)
    parts: Counter[str] = Counter()
    for number, size in alive(ledger.events[: index + 1]).items():
        parts[ledger.labels[number]] += size
    found, served, notes = serve(ledger.events, ledger.marks, setup, capacity)
    return Estimate(
        terms=tuple(terms_of(parts, setup)),
        moment=moment,
        reserved=found.settled,
        method="closed form",
        band=band_of(setup, "closed form"),
        paged=sum(size for size, paged in state_sizes(setup) if paged),
        device=setup.device,
        served=served,
        gpus=setup.world,
        notes=(*notes, *cautions(setup)),
    )


def cautions(setup: Setup) -> tuple[str, ...]:
    """What may make the step larger than both methods say."""
    config = setup.facts.text_config
    heads, keys = config.get("num_attention_heads", 1), config.get("num_key_value_heads")
    shared = keys is not None and keys < heads
    notes = []
    before_ampere = setup.device == "cuda" and setup.compute_capability < (8, 0)
    if before_ampere and setup.attention == "sdpa" and shared and not (setup.masked or setup.packed):
        notes.append(
            "GPUs before Ampere have no flash attention in torch, and its other kernel does not share keys between "
            "queries: torch may compute whole attention scores, which are not counted here."
        )
    if setup.quantization and setup.quantization.get("load_in_8bit"):
        notes.append("Outliers of 8-bit products, which depend on the data, are not counted.")
    return tuple(notes)


def terms_of(parts: Counter[str], setup: Setup) -> Iterator[Term]:
    """The parts as terms: the weights, then the largest first."""
    if parts["weights"]:
        whole = weight_terms(setup)
        total = sum(term.bytes for term in whole)
        for term in whole:
            yield replace(term, bytes=term.bytes * parts["weights"] // total)
    for name, size in sorted(parts.items(), key=lambda part: -part[1]):
        if name != "weights" and size:
            yield explained(name, size, setup)


def highest(events: Sequence[tuple[Hashable, int]]) -> int:
    """The index of the event at which most is allocated."""
    live: dict[Hashable, int] = {}
    now = top = where = 0
    for index, (number, size) in enumerate(events):
        if size == FREE:
            now -= live.pop(number, 0)
        else:
            live[number] = size
            now += size
            if now > top:
                top, where = now, index
    return where


def alive(events: Iterable[tuple[K, int]]) -> dict[K, int]:
    """Storages and their bytes after some events."""
    live: dict[K, int] = {}
    for number, size in events:
        if size == FREE:
            live.pop(number, None)
        else:
            live[number] = size
    return live


def run(setup: Setup, ledger: Ledger) -> None:
    """Two optimizer steps, and an evaluation if there is one."""
    compute = BYTES[setup.stack.autocast] if setup.stack.autocast else None
    do = Operations(ledger, compute, setup.device == "cuda")
    decoder = Decoder(setup, do)
    ledger.begin("loading")
    held = [*weights(setup, ledger), *(Storage(ledger, size, "gradients to be sent") for size in own_bytes(setup))]
    if setup.device == "cuda":
        held.append(Storage(ledger, workspace(setup), "cuBLAS workspace"))
    states: list[Storage] = []
    if setup.optimizer == "adagrad":  # makes its states at once
        states += made_states(setup, ledger)
    for _ in range(2):
        for _ in range(min(setup.accumulation, 2)):
            one_pass(decoder, setup.batch)
        ledger.begin("optimizer's step")
        update(setup, ledger, states)
        for parameter in decoder.parameters:
            parameter.forget()
    if setup.eval_batch:
        ledger.begin("evaluation")
        do.training = False
        with ledger.without_backward():
            loss_of(decoder, setup.eval_batch)
            do.forget_casts()
    ledger.begin("end")


def workspace(setup: Setup) -> int:
    """Bytes that cuBLAS keeps on the GPU of a setup."""
    return HOPPER_WORKSPACE if setup.compute_capability >= (9, 0) else WORKSPACE


def one_pass(decoder: Decoder, batch: int) -> None:
    ledger = decoder.do.ledger
    ledger.begin("forward pass")
    root = decoder.shards.root(ledger) if decoder.shards else None
    loss, kept = loss_of(decoder, batch)
    decoder.do.forget_casts()
    ledger.begin("backward pass")
    backward(ledger, loss, ledger.new(1, 4, "loss"))
    del kept, root
    if decoder.shards:
        decoder.shards.lingering = None


def weights(setup: Setup, ledger: Ledger) -> Iterator[Storage]:
    """The base's tensors, packed ones with their constants, and the adapter's."""
    quantized = {tensor.name for tensor in quantized_tensors(setup)}
    per_byte = 1 if (setup.quantization or {}).get("load_in_8bit") else 2
    for tensor in setup.facts.tensors:
        size = tensor.size * width_of(setup, tensor.name)
        if tensor.name in quantized:
            size = -(-tensor.size // per_byte)
            yield Storage(ledger, share(setup, packed_bytes(setup, tensor) - size, "weights"), "weights")
        yield Storage(ledger, share(setup, size, "weights"), "weights")
    if not setup.adapter.trains_base:
        for tensor in trained(setup):
            yield Storage(ledger, share(setup, tensor.size * BYTES[tensor.dtype], "weights"), "adapter")


def made_states(setup: Setup, ledger: Ledger) -> Iterator[Storage]:
    for size, paged in state_sizes(setup):
        if not paged and setup.sharding != "fsdp_offload":
            yield Storage(ledger, share(setup, size, "states"), "optimizer states")


def update(setup: Setup, ledger: Ledger, states: list[Storage]) -> None:
    """The optimizer's states, made in the first step, and the copies that torch's updates of many tensors make."""
    if not states:
        states += made_states(setup, ledger)
    if setup.sharding == "fsdp_offload":  # on the CPU
        return
    if setup.optimizer == "adafactor":  # a tensor after the other, in float32 (transformers/optimization.py)
        largest = max(trained(setup), key=lambda tensor: tensor.size)
        ledger.borrow("optimizer's temporary copies", largest.size * (8 if BYTES[largest.dtype] == 4 else 16))
    for matrices in (True, False) if setup.device == "cuda" else ():  # with weight decay and without: two groups
        group = [tensor for tensor in trained(setup) if (len(tensor.shape) >= 2) == matrices]
        made = [
            Storage(ledger, share(setup, t.size * BYTES[t.dtype], "states"), "optimizer's temporary copies")
            for t in group * COPIES.get(setup.optimizer, 0)
        ]
        del made


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
    return do.of(hidden, do.new(rows * decoder.hidden_size, hidden.width))


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
    return do.of(log_p, do.new(rows, 4))  # the labels' entries; the gradient is as large as the whole


def _head(decoder: Decoder, hidden: Value) -> Value:
    return decoder.do.linear(hidden, decoder.head, decoder.vocabulary, decoder.hidden_size)


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
    return do.of(do.function_of_result(logits), do.new(rows, 4))
