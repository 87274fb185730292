"""What a training process holds all the time: weights, adapter, gradients and optimizer states, by shape; and each
GPU's share.

FSDP (full shard) and ZeRO-3 gather a layer's weights before it runs, the next layer's meanwhile, and keep
embeddings and output head gathered; gradients are reduced to shares layer by layer. ZeRO-1 shares the
states, ZeRO-2 the gradients too. Sources: torch/distributed/fsdp, deepspeed/runtime/zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from lorafit.facts import Tensor
from lorafit.memory.estimate import Setup, Term
from lorafit.memory.operations import Ledger, Parameter, Storage, Value
from lorafit.plan.adapters import is_skipped

if TYPE_CHECKING:
    from lorafit.memory.operations import Operations

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 64
"""Weights that share a quantization constant (bitsandbytes' default blocksize on CUDA)."""
NESTED_BLOCK = 256
"""Constants that share a second constant with double quantization."""
OPTIMIZER_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "paged_adamw_32bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adafactor": 0,
    "lion_32bit": 1,
    "paged_lion_32bit": 1,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
"""Numbers of state that an optimizer keeps for each trained number (adafactor: see `_state_bytes`)."""
STATE_BLOCK = 256
"""8-bit states that share a float32 (bitsandbytes/optim/optimizer.py: init_state)."""
MIN_8BIT_SIZE = 4096
"""Tensors smaller than this keep their 8-bit optimizer's states in float32."""
PAGED_SIZE = 100_000
"""Tensors smaller than this are not paged (bitsandbytes/optim/optimizer.py: get_state_buffer)."""


def weight_terms(setup: Setup) -> list[Term]:
    """Weights by type; quantized ones as bitsandbytes packs them."""
    dtype, facts, quantization = setup.dtype, setup.facts, setup.quantization
    if quantization is None:
        return [Term("weights", base_bytes(setup), f"{facts.parameters:,} parameters in {dtype}", "shapes")]
    quantized = quantized_tensors(setup)
    count = sum(tensor.size for tensor in quantized)
    rest = facts.parameters - count
    other = Term(
        "other weights",
        base_bytes(setup) - sum(packed_bytes(setup, tensor) for tensor in quantized),
        f"{rest:,} parameters that bitsandbytes leaves alone, in {dtype}: embeddings, norms, the output head"
        + (", experts" if facts.is_moe else ""),
        "transformers/integrations/bitsandbytes.py",
    )
    if quantization.get("load_in_8bit"):
        why = "a float32 for each output"
        packed = Term("8-bit weights", count, f"{count:,} parameters of {len(quantized)} linear layers, 1 byte each")
    else:
        double = quantization["bnb_4bit_use_double_quant"]
        why = f"for each {BLOCK} weights, {f'a byte, itself quantized by {NESTED_BLOCK}' if double else 'a float32'}"
        kind = quantization["bnb_4bit_quant_type"]
        packed = Term(
            "4-bit weights",
            sum(math.ceil(tensor.size / 2) for tensor in quantized),
            f"{count:,} parameters of {len(quantized)} linear layers in {kind}",
            "bitsandbytes/functional.py: quantize_4bit",
        )
    constants = sum(packed_bytes(setup, tensor) for tensor in quantized) - packed.bytes
    return [packed, Term("quantization constants", constants, why, "bitsandbytes/functional.py"), other]


def width_of(setup: Setup, name: str) -> int:
    """Bytes an element of a base's tensor that is not quantized."""
    upcast = setup.stack.upcast
    return 4 if upcast == "all" or (upcast == "norms" and "norm" in name) else BYTES[setup.dtype]


def base_bytes(setup: Setup) -> int:
    """All of the base's weights as they are held."""
    quantized = {tensor.name for tensor in quantized_tensors(setup)}

    def held(tensor: Tensor) -> int:
        if tensor.name in quantized:
            return packed_bytes(setup, tensor)
        return tensor.size * width_of(setup, tensor.name)

    return sum(held(tensor) for tensor in setup.facts.tensors)


def quantized_tensors(setup: Setup) -> list[Tensor]:
    if setup.quantization is None:
        return []
    skipped = setup.quantization.get("llm_int8_skip_modules") or ()
    return [tensor for module, tensor in setup.facts.quantizable.items() if not is_skipped(module, skipped)]


def packed_bytes(setup: Setup, tensor: Tensor) -> int:
    """A quantized weight with its constants."""
    assert setup.quantization is not None
    if setup.quantization.get("load_in_8bit"):
        return tensor.size + tensor.shape[0] * 4
    return math.ceil(tensor.size / 2) + constants_bytes(tensor, setup.quantization["bnb_4bit_use_double_quant"])


def trained(setup: Setup) -> list[Tensor]:
    """What is trained, with the type it is kept in: DoRA's magnitudes in float32 whatever the adapter's type."""
    adapter = setup.adapter
    dtype = setup.dtype if adapter.trains_base else setup.adapter_dtype
    return list(adapter.tensors(setup.facts, None, dtype))


def trained_bytes(setup: Setup) -> int:
    return sum(tensor.size * BYTES[tensor.dtype] for tensor in trained(setup))


def state_sizes(setup: Setup) -> list[tuple[int, bool]]:
    """Bytes of each optimizer state, and whether it is paged: in managed memory, beside torch's allocator."""
    return [state for tensor in trained(setup) for state in states_of(setup.optimizer, tensor)]


def states_of(optimizer: str, tensor: Tensor) -> list[tuple[int, bool]]:
    """Bytes of each state of one tensor, and whether it is paged."""
    count = OPTIMIZER_STATES[optimizer]
    size = _state_bytes(optimizer, tensor)
    paged = optimizer.startswith("paged") and tensor.size >= PAGED_SIZE
    if not size:
        return []
    if optimizer.endswith("8bit") and size < count * tensor.size * 4:
        scales = 4 * math.ceil(tensor.size / STATE_BLOCK)  # a float32 for each block of 8-bit states; never paged
        return [(tensor.size, paged), (scales, False)] * count
    return [(size // max(count, 1), paged)] * max(count, 1)


def constants_bytes(tensor: Tensor, double: bool) -> int:
    """Bytes of a 4-bit tensor's constants (bitsandbytes/functional.py: quantize_4bit).

    The 16-entry code book is float32; with double quantization there are also a 256-entry code
    book and an offset.
    """
    blocks = math.ceil(tensor.size / BLOCK)
    code = 16 * 4
    if not double:
        return blocks * 4 + code
    return blocks + math.ceil(blocks / NESTED_BLOCK) * 4 + 256 * 4 + 4 + code


def _state_bytes(optimizer: str, tensor: Tensor) -> int:
    """Bytes that an optimizer keeps for a tensor, without its step counters.

    torch's optimizers keep their states in the tensor's type, bitsandbytes' in float32 or in 8 bits
    with a float32 for each block (embeddings in float32: transformers/trainer.py: create_optimizer).
    Adafactor keeps the sums of a matrix's rows and columns, and whole vectors, in float32.
    """
    states = OPTIMIZER_STATES[optimizer]
    if optimizer == "adafactor":
        *rows, columns = tensor.shape or (1,)
        return 4 * ((prod(rows) + prod(rows[:-1]) * columns) if rows else columns)
    if optimizer.endswith("8bit") and tensor.size >= MIN_8BIT_SIZE and "embed" not in tensor.name:
        return states * (tensor.size + 4 * math.ceil(tensor.size / STATE_BLOCK))
    return states * tensor.size * (4 if optimizer.endswith("bit") else BYTES[tensor.dtype])


def why_states(optimizer: str) -> str:
    states = OPTIMIZER_STATES[optimizer]
    if optimizer == "adafactor":
        return "adafactor: a row and a column for each matrix, float32"
    if not states:
        return f"{optimizer}: no state"
    kept = f"{optimizer}: {states} state{'s' * (states > 1)} for each trained number"
    if optimizer.endswith("8bit"):
        return f"{kept}, 8 bits each; small tensors in float32"
    return f"{kept}, in {'float32' if optimizer.endswith('32bit') else 'its type'}"


WEIGHTS_SHARDED = ("fsdp", "fsdp_offload", "zero3")
GRADIENTS_SHARDED = (*WEIGHTS_SHARDED, "zero2")
STATES_SHARDED = (*GRADIENTS_SHARDED, "zero1")
GATHERED_LAYERS = 2
"""The one that runs and the one that is fetched meanwhile."""


def share(setup: Setup, size: int, kind: str) -> int:
    """One process's part of a tensor of weights or states, in bytes."""
    if kind == "weights" and setup.sharding == "fsdp_offload":
        return 0
    sharded = setup.sharding in (WEIGHTS_SHARDED if kind == "weights" else STATES_SHARDED)
    return -(-size // setup.world) if sharded else size


def own_bytes(setup: Setup) -> list[int]:
    """DDP's buckets: a copy of the trained gradients, to be sent (torch/nn/parallel/distributed.py)."""
    return [trained_bytes(setup)] if setup.sharding == "ddp" and setup.world > 1 else []


class Shards:
    """Gathering and reducing around each layer."""

    def __init__(self, setup: Setup, operations: Operations) -> None:
        self.setup, self.do = setup, operations
        self.lingering: Storage | None = None
        layers: dict[str, int] = {}
        rest = 0
        quantized = {tensor.name for tensor in quantized_tensors(setup)}
        held = [
            (t.name, packed_bytes(setup, t) if t.name in quantized else t.size * BYTES[setup.dtype])
            for t in setup.facts.tensors
        ]
        held += [(t.name, t.size * BYTES[t.dtype]) for t in trained(setup)] if not setup.adapter.trains_base else []
        width = BYTES[setup.stack.autocast] if setup.stack.autocast else BYTES[setup.dtype]
        for name, size in held:
            cast = size if name in quantized else size * min(width, BYTES[setup.dtype]) // BYTES[setup.dtype]
            parts = name.split(".")
            index = next((parts[i + 1] for i, part in enumerate(parts) if part in ("layers", "h")), None)
            if index is None:
                rest += cast
            else:
                layers[index] = layers.get(index, 0) + cast
        gathers = setup.sharding in WEIGHTS_SHARDED
        self.layer_bytes = max(layers.values()) if gathers else 0
        self.root_bytes = rest if gathers else 0
        operations.casts = not gathers  # gathered weights are in the type of the product already

    def root(self, ledger: Ledger) -> Storage:
        """Embeddings, the last norm and the output head, gathered for a forward and a backward pass."""
        return Storage(ledger, self.root_bytes, "gathered weights")

    def around(self, x: Value, layer: dict[str, Any], run: Callable[[Value], Value]) -> Value:
        """Run a layer with its weights gathered, in both directions."""
        ledger, do = self.do.ledger, self.do
        size = GATHERED_LAYERS * self.layer_bytes
        held: list[Storage] = []
        before = ledger.now

        def finish(g: Value) -> Sequence[Value | None]:
            held.clear()
            self._reduce(layer)
            if size:
                self.lingering = None
                self.lingering = Storage(ledger, ledger.top - before - size, "a second layer's activations")
            return [g.view()]

        def start(g: Value) -> Sequence[Value | None]:
            ledger.top = ledger.now
            held.append(Storage(ledger, size, "gathered weights"))
            return [g.view()]

        x = do.made(x.view(), [x], finish)
        gathered = Storage(ledger, size, "gathered weights")
        y = run(x)
        del gathered
        return do.made(y.view(), [y], start)

    def _reduce(self, layer: dict[str, Any]) -> None:
        """Whole gradients of a layer become this process's share."""
        for part in layer.values():
            for parameter in vars(part).values() if hasattr(part, "weight") else part:
                if isinstance(parameter, Parameter) and parameter.gradient is not None:
                    size = int(parameter.gradient.bytes)
                    parameter.gradient = None
                    if parameter.shard is None and self.setup.sharding != "fsdp_offload":
                        parameter.shard = Storage(self.do.ledger, -(-size // self.setup.world), "gradients")
