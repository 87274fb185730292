"""Memory of a training run, by arithmetic on real tensor shapes. No torch.

So far: weights, quantization constants, adapter, gradients and optimizer states. Activations, the
loss and what CUDA itself takes are not in yet, so the sum is a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.facts import ModelFacts, Tensor
from lorafit.plan import Plan

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 64
"""Weights that share a quantization constant (bitsandbytes' default blocksize on CUDA)."""
NESTED_BLOCK = 256
"""Constants that share a second constant with double quantization."""
OPTIMIZER_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "adafactor": 0,
    "lion_32bit": 4,
    "paged_lion_32bit": 4,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "ademamix_8bit": 3,
    "paged_ademamix_8bit": 3,
    "rmsprop": 4,
    "adagrad": 4,
    "sgd": 0,
}
"""Bytes of state per trained parameter: float32 moments, or 8-bit ones (whose constants, 1/64 of
them, and small tensors kept in 32 bits are left out)."""


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
    trained = plan.trainable_parameters
    adapter = plan.lora_kwargs is not None
    weight_bytes = BYTES[dtype]
    terms = list(_weights(plan, facts, weight_bytes))
    if adapter:
        size = BYTES[plan.adapter_dtype]
        terms.append(Term("adapter", trained * size, f"{trained:,} parameters in {plan.adapter_dtype}"))
        terms.append(Term("gradients", trained * size, "one for each adapter parameter, in its type"))
    else:
        terms.append(Term("gradients", trained * weight_bytes, f"one for each parameter, in {dtype}"))
    optimizer = plan.training_kwargs["optim"]
    each = OPTIMIZER_BYTES[optimizer]
    if optimizer == "adafactor":
        terms.append(
            Term("optimizer", _factored(plan, facts), "adafactor: a row and a column for each matrix, float32")
        )
    else:
        terms.append(Term("optimizer", trained * each, f"{optimizer}: {each} bytes of state a parameter"))
    missing = ("activations", "the loss and its logits", "the CUDA context", "the allocator's slack")
    return MemoryEstimate(tuple(terms), missing)


def _weights(plan: Plan, facts: ModelFacts, weight_bytes: int) -> list[Term]:
    """Weights by type; quantized ones as bitsandbytes packs them."""
    dtype = plan.model_kwargs["dtype"]
    quantization = plan.quantization_kwargs
    if quantization is None:
        return [Term("weights", facts.parameters * weight_bytes, f"{facts.parameters:,} parameters in {dtype}")]
    skipped = quantization.get("llm_int8_skip_modules") or []
    quantized = [
        tensor
        for module, tensor in facts.linear.items()
        if not any(module == name or module.endswith(f".{name}") for name in skipped)
    ]
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
            f"for each {BLOCK} weights, {'a byte, itself quantized by ' + str(NESTED_BLOCK) if double else 'a float32'}",
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


def _factored(plan: Plan, facts: ModelFacts) -> int:
    """Adafactor's state: for a matrix of n x m, n + m float32; for a vector, its size."""
    if plan.lora_kwargs is None:
        return sum(4 * (sum(t.shape) if len(t.shape) > 1 else t.size) for t in facts.tensors)
    r = plan.lora_kwargs["r"]
    names = plan.lora_kwargs["target_modules"]
    adapted = [t for m, t in facts.linear.items() if any(m == name or m.endswith(f".{name}") for name in names)]
    return sum(4 * (sum(tensor.shape) + 2 * r) for tensor in adapted)
