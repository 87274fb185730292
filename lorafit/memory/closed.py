"""The closed form: two optimizer steps on sizes alone, their highest moment, and what is alive then.

Every size is a product of the model's dimensions, the batch and bytes an element; see `decoder`,
`losses` and `static` for each, with its source. No torch, and a tenth of a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from lorafit.hardware import RETURNED_AT_ONCE
from lorafit.memory.allocator import CachingAllocator, Heap, Replay, replay
from lorafit.memory.decoder import Decoder
from lorafit.memory.losses import loss_of
from lorafit.memory.operations import Operations
from lorafit.memory.setup import Setup
from lorafit.memory.sharding import own_bytes, share
from lorafit.memory.static import (
    BYTES,
    packed_bytes,
    quantized_tensors,
    state_sizes,
    trained,
    weight_terms,
    width_of,
)
from lorafit.memory.tape import FREE, Ledger, Storage, backward
from lorafit.memory.types import CONTEXT, DRIVER, NCCL, PROCESS, Estimate, Term
from lorafit.memory.validated import band_of
from lorafit.memory.why import explained

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
        size = HOPPER_WORKSPACE if setup.compute_capability >= (9, 0) else WORKSPACE
        held.append(Storage(ledger, size, "cuBLAS workspace"))
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
    if setup.lora is not None:
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
