"""What a training process holds all the time: weights, adapter, gradients and optimizer states, by shape."""

from __future__ import annotations

import math
from math import prod

from lorafit.facts import Tensor
from lorafit.memory.estimate import Term
from lorafit.memory.setup import Setup
from lorafit.plan.adapters import is_skipped

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
