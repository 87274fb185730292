"""How much arithmetic a training is, and roughly how long it takes and costs.

The arithmetic is counted, the time is not: it is the arithmetic over a GPU's peak, at a range of utilisations that
people have seen. Rough numbers to plan with, for one kind of GPU, without loading, evaluation and saving.

Sources: 2 operations for each weight and token forward, twice that backward, from Kaplan et al. 2020
(arXiv:2001.08361, section 2.1); attention from PaLM (arXiv:2204.02311, appendix B), whose 12 x layers x heads x
head_dim x context is forward and backward of the 4 here; recomputation, which is one more forward pass of the layers,
from Korthikanti et al. 2022 (arXiv:2205.05198, appendix A). That frozen weights need no gradient of their own, only
one for their inputs, leaves 4 of the 6 operations (as in LoRA, arXiv:2106.09685).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.errors import UsageError
from lorafit.vram.gpus import Gpu


@dataclass(frozen=True)
class Range:
    """Something that is known to lie roughly between two numbers."""

    low: float
    high: float

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)


UTILISATION_16BIT = Range(0.25, 0.50)
"""Of the dense peak, weights in 16 bits.

Large pretraining runs report 0.46 (PaLM, arXiv:2204.02311) and 0.38 to 0.43 (Llama 3, arXiv:2407.21783); fine-tuning
on one GPU reaches that at its best, and less with short sequences, small batches and many small adapter products.
"""
UTILISATION_4BIT = Range(0.15, 0.40)
"""The same for weights in 4 or 8 bits, each of which is made 16 bits wide anew in every pass that multiplies by it."""


@dataclass(frozen=True)
class Work:
    """What a training computes.

    Attributes:
        active_parameters: weights of the base model that one token is multiplied by: no embedding that is only looked
            up in, and of experts those that a token goes to (with the shared ones).
        adapter_parameters: weights of adapters that one token is multiplied by.
        trains_base: whether the base model's weights are trained.
        tokens: in one epoch, of all processes together, with padding if there is any.
        layers: those with attention.
        attention_width: heads x head_dim, of the queries.
        context: tokens of the sequence that attention is over, padding and neighbours in a pack included where they
            are computed; the window's size for sliding windows; a mean where lengths differ.
        checkpointing: whether layers are computed again in the backward pass.
        head_parameters: those of active_parameters outside of the layers (the output head), never computed again.
    """

    active_parameters: int
    adapter_parameters: int
    trains_base: bool
    tokens: float
    layers: int
    attention_width: int
    context: float
    epochs: float = 1
    causal: bool = True
    checkpointing: bool = False
    head_parameters: int = 0


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a whole training, by what they are for; a multiplication and an addition are two."""

    forward: float
    backward_inputs: float
    backward_weights: float
    recompute: float

    @property
    def total(self) -> float:
        return self.forward + self.backward_inputs + self.backward_weights + self.recompute


@dataclass(frozen=True)
class Cost:
    """Rough time and money.

    Attributes:
        hours: on the clock.
        tokens_per_second: of all GPUs together.
        money: of all GPUs together, in the price's currency; None without a price.
        utilisation: of the peak, assumed.
    """

    flops: Flops
    utilisation: Range
    hours: Range
    tokens_per_second: Range
    money: Range | None


def flops(work: Work) -> Flops:
    """Operations of the whole training.

    A causal mask halves attention, as kernels such as FlashAttention skip what is masked. What those kernels compute
    again of the scores in the backward pass isn't counted: it is part of the utilisation.
    """
    tokens = work.tokens * work.epochs
    weights = work.active_parameters + work.adapter_parameters
    trained = work.adapter_parameters + (work.active_parameters if work.trains_base else 0)
    attention = 4 * work.attention_width * work.context * work.layers * (0.5 if work.causal else 1)
    forward = 2 * weights + attention
    return Flops(
        forward=tokens * forward,
        backward_inputs=tokens * (2 * weights + 2 * attention),
        backward_weights=tokens * 2 * trained,
        recompute=tokens * (forward - 2 * work.head_parameters) if work.checkpointing else 0.0,
    )


def utilisation(bits: int) -> Range:
    """The part of a GPU's peak that trainings reach, for weights of so many bits."""
    return UTILISATION_4BIT if bits <= 8 else UTILISATION_16BIT


def cost(
    work: Work,
    gpu: Gpu,
    *,
    bits: int = 16,
    world_size: int = 1,
    price_per_hour: float | None = None,
    reached: Range | None = None,
) -> Cost:
    """Rough time and money of a training.

    Args:
        bits: of the base model's weights.
        world_size: GPUs that share the work.
        price_per_hour: of one GPU.
        reached: the part of the peak that is reached, where it is known better.

    Raises UsageError for a price that is none.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise UsageError(f"a price per hour of {price_per_hour}: has to be zero or more")
    reached = reached or utilisation(bits)
    done = flops(work)
    peak = gpu.peak_tflops * 1e12 * world_size
    seconds = Range(done.total / (peak * reached.high), done.total / (peak * reached.low))
    hours = seconds * (1 / 3600)
    tokens = work.tokens * work.epochs
    speed = Range(tokens / seconds.high, tokens / seconds.low) if seconds.low > 0 else Range(0, 0)
    money = None if price_per_hour is None else hours * (world_size * price_per_hour)
    return Cost(done, reached, hours, speed, money)


def time_text(hours: Range) -> str:
    """Such as "2.1 to 4.3 h", in the unit that suits the longer one."""
    for unit, in_hours, below in (("s", 1 / 3600, 2 / 60), ("min", 1 / 60, 2.0), ("h", 1.0, 72.0)):
        if hours.high < below:
            return _span(hours * (1 / in_hours), unit)
    return _span(hours * (1 / 24), "days")


def money_text(money: Range, currency: str = "$") -> str:
    """Such as "$4.20 to $8.60"; whole numbers from 1000 on."""
    if money.high < 0.005:
        return f"under {currency}0.01"
    digits = 2 if money.high < 1000 else 0
    low, high = (f"{currency}{value:,.{digits}f}" for value in (money.low, money.high))
    return low if low == high else f"{low} to {high}"


def flops_text(operations: float) -> str:
    """Such as "1.2 EFLOP": 10^18 operations."""
    for name, size in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if operations >= size:
            return f"{_number(operations / size)} {name}"
    return f"{_number(operations / 1e9)} GFLOP"


def _span(values: Range, unit: str) -> str:
    low, high = _number(values.low), _number(values.high)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"
