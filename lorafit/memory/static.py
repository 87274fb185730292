"""Memory of a training run, by arithmetic on real tensor shapes. No torch.

So far: weights, quantization constants, adapter, gradients and optimizer states. Activations, the
loss and what CUDA itself takes are not in yet, so the sum is a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import prod

from lorafit.facts import ModelFacts, Tensor
from lorafit.plan import Plan
from lorafit.recipe import LoraSection
from lorafit.targets import MAGNITUDE, find_targets, is_skipped, trained_tensors

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


@dataclass(frozen=True)
class Term:
    """One part of the memory: bytes, and why."""

    name: str
    bytes: int
    why: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The parts of a training run's memory on one device.

    Attributes:
        terms: what is counted.
        missing: what is not.
    """

    terms: tuple[Term, ...]
    missing: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(term.bytes for term in self.terms)


def estimate_memory(plan: Plan, facts: ModelFacts) -> MemoryEstimate:
    """The static memory of a plan on one device. Needs facts with tensors."""
    dtype = plan.model_kwargs["dtype"]
    optimizer = plan.training_kwargs["optim"]
    terms = _weights(plan, facts)
    tensors = _trained(plan, facts)
    count = sum(tensor.size for tensor in tensors)
    size = sum(tensor.size * BYTES[tensor.dtype] for tensor in tensors)
    if plan.lora_kwargs is None:
        terms.append(Term("gradients", size, f"one for each parameter, in {dtype}"))
    else:
        terms.append(Term("adapter", size, f"{count:,} parameters in {plan.adapter_dtype}"))
        terms.append(Term("gradients", size, "one for each adapter parameter, in its type"))
    states = sum(_state_bytes(optimizer, tensor) for tensor in tensors)
    terms.append(Term("optimizer", states, _why_states(optimizer)))
    missing = ("activations", "the loss and its logits", "the CUDA context", "the allocator's slack")
    return MemoryEstimate(tuple(terms), missing)


def _trained(plan: Plan, facts: ModelFacts) -> list[Tensor]:
    """What is trained, with the type it is kept in: magnitudes of DoRA in float32 whatever the adapter's type."""
    if plan.lora_kwargs is None:
        return [replace(tensor, dtype=plan.model_kwargs["dtype"]) for tensor in facts.tensors]
    lora = LoraSection.model_validate(plan.recipe["lora"])
    tensors = trained_tensors(lora, find_targets(lora, facts), facts)
    return [replace(t, dtype="float32" if MAGNITUDE in t.name else plan.adapter_dtype) for t in tensors]


def _weights(plan: Plan, facts: ModelFacts) -> list[Term]:
    """Weights by type; quantized ones as bitsandbytes packs them."""
    dtype = plan.model_kwargs["dtype"]
    weight_bytes = BYTES[dtype]
    quantization = plan.quantization_kwargs
    if quantization is None:
        return [Term("weights", facts.parameters * weight_bytes, f"{facts.parameters:,} parameters in {dtype}")]
    skipped = quantization["llm_int8_skip_modules"] or ()
    quantized = [tensor for module, tensor in facts.quantizable.items() if not is_skipped(module, skipped)]
    count = sum(tensor.size for tensor in quantized)
    rest = facts.parameters - count
    other = Term(
        "other weights", rest * weight_bytes, f"{rest:,} parameters in {dtype}: embeddings, norms, the output head"
    )
    if quantization.get("load_in_8bit"):
        constants = sum(tensor.shape[0] for tensor in quantized) * 4
        return [
            Term("8-bit weights", count, f"{count:,} parameters of {len(quantized)} linear layers, 1 byte each"),
            Term("quantization constants", constants, "a float32 for each output"),
            other,
        ]
    double = quantization["bnb_4bit_use_double_quant"]
    kind = quantization["bnb_4bit_quant_type"]
    return [
        Term(
            "4-bit weights",
            sum(math.ceil(tensor.size / 2) for tensor in quantized),
            f"{count:,} parameters of {len(quantized)} linear layers in {kind}",
        ),
        Term(
            "quantization constants",
            sum(_constants(tensor, double) for tensor in quantized),
            f"for each {BLOCK} weights, {f'a byte, itself quantized by {NESTED_BLOCK}' if double else 'a float32'}",
        ),
        other,
    ]


def _constants(tensor: Tensor, double: bool) -> int:
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


def _why_states(optimizer: str) -> str:
    states = OPTIMIZER_STATES[optimizer]
    if optimizer == "adafactor":
        return "adafactor: a row and a column for each matrix, float32"
    if not states:
        return f"{optimizer}: no state"
    kept = f"{optimizer}: {states} state{'s' * (states > 1)} for each trained number"
    if optimizer.endswith("8bit"):
        return f"{kept}, 8 bits each; small tensors in float32"
    return f"{kept}, in {'float32' if optimizer.endswith('32bit') else 'its type'}"
