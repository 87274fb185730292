"""Arithmetic of a training: how much it is, and roughly how long it takes and costs on a named GPU."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorafit.errors import LorafitError, UsageError
from lorafit.facts import ModelFacts
from lorafit.gpus import Gpu
from lorafit.memory import Setup
from lorafit.memory.static import trained
from lorafit.options import EstimateOptions
from lorafit.outcome import Outcome


class Range(NamedTuple):
    """Something that is known to lie roughly between two numbers."""

    low: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)


UTILISATION_16BIT = Range(0.25, 0.50)
"""Share of the dense peak that is reached with weights in 16 bits.

Large pretraining runs report 0.46 (PaLM, arXiv:2204.02311) and 0.38 to 0.43 (Llama 3, arXiv:2407.21783); fine-tuning
on one GPU reaches that at its best, and less with short sequences, small batches and many small adapter products.
"""
UTILISATION_4BIT = Range(0.15, 0.40)
"""Share with weights in 4 or 8 bits, which every pass that multiplies by them makes 16 bits wide anew."""


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
    checkpointing: bool = False
    head_parameters: int = 0

    @property
    def flops(self) -> float:
        """Floating point operations of the whole training; a multiplication and an addition are two.

        A causal mask halves attention, as kernels such as FlashAttention skip what is masked. What those kernels
        compute again of the scores in the backward pass isn't counted: it is part of the utilisation.
        """
        tokens = self.tokens * self.epochs
        weights = self.active_parameters + self.adapter_parameters
        trained = self.adapter_parameters + (self.active_parameters if self.trains_base else 0)
        attention = 4 * self.attention_width * self.context * self.layers * 0.5
        forward = 2 * weights + attention
        of_inputs, of_weights = 2 * weights + 2 * attention, 2 * trained
        again = forward - 2 * self.head_parameters if self.checkpointing else 0.0
        return tokens * forward + tokens * of_inputs + tokens * of_weights + tokens * again


@dataclass(frozen=True)
class Cost:
    """Rough time on the clock and money of a GPU, or of several together, at an assumed share of the peak."""

    gpu: Gpu
    utilisation: Range
    hours: Range
    tokens_per_second: Range
    money: Range | None


def cost(work: Work, gpu: Gpu, *, bits: int = 16, world_size: int = 1, price_per_hour: float | None = None) -> Cost:
    """Rough time and money of a training.

    Args:
        bits: of the base model's weights.
        world_size: GPUs that share the work.
        price_per_hour: of one GPU.

    Raises UsageError for a price that is none.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise UsageError(f"a price per hour of {price_per_hour}: has to be zero or more")
    reached = UTILISATION_4BIT if bits <= 8 else UTILISATION_16BIT
    peak = gpu.peak_tflops * 1e12 * world_size
    seconds = Range(work.flops / (peak * reached.high), work.flops / (peak * reached.low))
    hours = seconds.times(1 / 3600)
    tokens = work.tokens * work.epochs
    speed = Range(tokens / seconds.high, tokens / seconds.low) if seconds.low > 0 else Range(0, 0)
    money = None if price_per_hour is None else hours.times(world_size * price_per_hour)
    return Cost(gpu, reached, hours, speed, money)


def time_text(hours: Range) -> str:
    """Such as "2.1 to 4.3 h", in the unit that suits the longer one."""
    for unit, in_hours, below in (("s", 1 / 3600, 2 / 60), ("min", 1 / 60, 2.0), ("h", 1.0, 72.0)):
        if hours.high < below:
            return _span(hours.times(1 / in_hours), unit)
    return _span(hours.times(1 / 24), "days")


def money_text(money: Range) -> str:
    """Such as "4.20 to 8.60"; whole numbers from 1000 on."""
    if money.high < 0.005:
        return "under 0.01"
    digits = 2 if money.high < 1000 else 0
    low, high = (f"{value:,.{digits}f}" for value in (money.low, money.high))
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


_EXPERT = re.compile(r"\.experts(\.|$)")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


@dataclass(frozen=True)
class Tokens:
    """What is trained on: tokens of an epoch, how often, in rows of how many, and where that is known from."""

    per_epoch: float
    epochs: float
    row: float
    source: str


@dataclass(frozen=True)
class Spending:
    """Arithmetic, and rough time and money by GPU."""

    tokens: Tokens
    flops: float
    costs: tuple[Cost, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "rough": True,
            "tokens_per_epoch": self.tokens.per_epoch,
            "epochs": self.tokens.epochs,
            "tokens_from": self.tokens.source,
            "flops": self.flops,
            "gpus": [
                {"name": one.gpu.name} | {name: (known := getattr(one, name)) and [*known] for name in _ROUGH_FIGURES}
                for one in self.costs
            ],
        }


_ROUGH_FIGURES = ("hours", "tokens_per_second", "utilisation", "money")
UNKNOWN = "the number of tokens is not known: give --tokens N (of one epoch), or let `lorafit preview` count them once"


def spending(found: Outcome, asked: EstimateOptions, gpus: Sequence[Gpu]) -> Spending | None:
    """None where the number of tokens isn't known. Raises UsageError."""
    if asked.tokens is not None and not 0 < asked.tokens < 10**16:
        raise UsageError(f"--tokens {asked.tokens}: has to be above 0, and below 10^16")
    tokens = _tokens(found, asked)
    if tokens is None:
        return None
    setup = found.setup
    work = work_of(setup, tokens)
    bits = 16 if setup.quantization is None else 8 if setup.quantization.get("load_in_8bit") else 4
    costs = (cost(work, gpu, bits=bits, world_size=setup.world, price_per_hour=asked.price) for gpu in gpus)
    return Spending(tokens, work.flops, tuple(costs))


def _tokens(found: Outcome, asked: EstimateOptions) -> Tokens | None:
    """From what is given, the audited data, or the number of steps, in this order."""
    setup, training, given = found.setup, found.require_plan().training, asked.tokens
    rows = training.max_steps * setup.batch * setup.accumulation * setup.world
    if given is not None:
        row = min(setup.length, given)
        if rows > 0:
            return Tokens(min(given, rows * setup.length), 1, row, "max_steps, of the --tokens given")
        return Tokens(given, training.num_train_epochs, row, "--tokens")
    if asked.config is not None and (audited := _audited(found)) is not None:
        return audited
    if rows > 0:
        return Tokens(rows * setup.length, 1, setup.length, "max_steps, as if every row had max_length tokens")
    return None


def _audited(found: Outcome) -> Tokens | None:
    """Tokens of data that was audited before, exactly as the recipe has it; None for data that isn't here."""
    try:
        plan = found.shared.of(found.recipe, found.name, found.hardware, reading="digests").require_plan()
    except LorafitError:
        return None
    if plan.audit is None or plan.schedule is None:
        return None
    part = plan.audit["training_rows"]
    epochs = plan.training.num_train_epochs
    if plan.training.max_steps > 0:
        epochs = plan.schedule.total_steps / plan.schedule.steps_per_epoch
    return Tokens(part["tokens"], epochs, part["tokens"] / max(part["rows"], 1), "the audited data, without padding")


def work_of(setup: Setup, tokens: Tokens) -> Work:
    facts = setup.facts
    config = facts.text_config
    heads = _positive(config, "num_attention_heads", "n_head") or 1
    hidden = _positive(config, "hidden_size", "n_embd") or 0
    window = _positive(config, "sliding_window")
    return Work(
        active_parameters=active_parameters(facts),
        adapter_parameters=sum(tensor.size for tensor in trained(setup)) if not setup.adapter.trains_base else 0,
        trains_base=setup.adapter.trains_base,
        tokens=tokens.per_epoch,
        layers=facts.layers or 0,
        attention_width=heads * (_positive(config, "head_dim") or hidden // heads),
        context=min(tokens.row, window or tokens.row, setup.length),
        epochs=tokens.epochs,
        checkpointing=setup.checkpointing != "none",
        head_parameters=head_parameters(facts),
    )


def active_parameters(facts: ModelFacts) -> int:
    """The weights that one token is multiplied by: of experts its own, of embeddings only a tied output head."""
    config = facts.text_config
    experts = _positive(config, "num_local_experts", "num_experts", "n_routed_experts") or 1
    chosen = _positive(config, "num_experts_per_tok", "num_experts_per_token") or experts
    total = 0.0
    for tensor in facts.tensors:
        if _EMBEDDING.search(tensor.name) or _HEAD.search(tensor.name):
            continue
        total += tensor.size * (chosen / experts if _EXPERT.search(tensor.name) else 1)
    return round(total) + head_parameters(facts)


def head_parameters(facts: ModelFacts) -> int:
    """Parameters of the output head, which may be the embedding."""
    heads = [tensor.size for tensor in facts.tensors if _HEAD.search(tensor.name)]
    return heads[0] if heads else max((t.size for t in facts.tensors if _EMBEDDING.search(t.name)), default=0)


def _positive(config: dict[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
