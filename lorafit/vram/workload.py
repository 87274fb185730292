"""A case's arithmetic: how many tokens it trains on, and what they cost on a named GPU. Rough, and said to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.errors import LorafitError, UsageError
from lorafit.facts import ModelFacts
from lorafit.memory.static import trained
from lorafit.plan import make_plan
from lorafit.vram.answer import Case
from lorafit.vram.cost import Cost, Flops, Range, Work, cost, flops
from lorafit.vram.gpus import Gpu

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
    """Rough time and money, by GPU."""

    tokens: Tokens
    flops: Flops
    costs: tuple[tuple[Gpu, Cost], ...]


UNKNOWN = "the number of tokens is not known: give --tokens N (of one epoch), or let `lorafit preview` count them once"


def spending(case: Case, given: int | None, gpus: Sequence[Gpu], price: float | None) -> Spending | None:
    """None where the number of tokens isn't known. Raises UsageError."""
    if given is not None and not 0 < given < 10**16:
        raise UsageError(f"--tokens {given}: has to be above 0, and below 10^16")
    tokens = tokens_of(case, given)
    if tokens is None:
        return None
    work = work_of(case, tokens)
    quantization = case.setup.quantization
    bits = 16 if quantization is None else 8 if quantization.get("load_in_8bit") else 4
    costs = ((gpu, cost(work, gpu, bits=bits, world_size=case.setup.world, price_per_hour=price)) for gpu in gpus)
    return Spending(tokens, flops(work), tuple(costs))


def tokens_of(case: Case, given: int | None) -> Tokens | None:
    """From what is given, the audited data, or the number of steps, in this order."""
    setup, kwargs = case.setup, case.plan.training_kwargs
    epochs = kwargs["num_train_epochs"]
    if given is not None:
        if kwargs["max_steps"] > 0:
            most = kwargs["max_steps"] * setup.batch * setup.accumulation * setup.world * setup.length
            return Tokens(min(given, most), 1, min(setup.length, given), "max_steps, of the --tokens given")
        return Tokens(given, epochs, min(setup.length, given), "--tokens")
    audited = _audited(case)
    if audited is not None:
        return audited
    if kwargs["max_steps"] > 0:
        rows = kwargs["max_steps"] * setup.batch * setup.accumulation * setup.world
        return Tokens(rows * setup.length, 1, setup.length, "max_steps, as if every row had max_length tokens")
    return None


def _audited(case: Case) -> Tokens | None:
    """Of data that was audited before, exactly as the recipe has it; data that isn't here is not known."""
    if case.subject.config is None:
        return None
    try:
        plan = make_plan(case.recipe, case.facts, case.plan.hardware, count_rows=False)
    except LorafitError:
        return None
    if plan.audit is None or plan.schedule is None:
        return None
    part = plan.audit["training_rows"]
    epochs = plan.training_kwargs["num_train_epochs"]
    if plan.training_kwargs["max_steps"] > 0:
        epochs = plan.schedule.total_steps / plan.schedule.steps_per_epoch
    return Tokens(part["tokens"], epochs, part["tokens"] / max(part["rows"], 1), "the audited data, without padding")


def work_of(case: Case, tokens: Tokens) -> Work:
    facts, setup = case.facts, case.setup
    config = facts.text_config
    heads = _positive(config, "num_attention_heads", "n_head") or 1
    hidden = _positive(config, "hidden_size", "n_embd") or 0
    window = _positive(config, "sliding_window")
    head = head_parameters(facts)
    return Work(
        active_parameters=active_parameters(facts),
        adapter_parameters=sum(tensor.size for tensor in trained(setup)) if setup.lora is not None else 0,
        trains_base=setup.lora is None,
        tokens=tokens.per_epoch,
        layers=facts.layers or 0,
        attention_width=heads * (_positive(config, "head_dim") or hidden // heads),
        context=min(tokens.row, window or tokens.row, setup.length),
        epochs=tokens.epochs,
        checkpointing=setup.checkpointing != "none",
        head_parameters=head,
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
    """Of the output head, which may be the embedding."""
    heads = [tensor.size for tensor in facts.tensors if _HEAD.search(tensor.name)]
    return heads[0] if heads else max((t.size for t in facts.tensors if _EMBEDDING.search(t.name)), default=0)


def as_dict(found: Spending) -> dict[str, Any]:
    return {
        "rough": True,
        "tokens_per_epoch": found.tokens.per_epoch,
        "epochs": found.tokens.epochs,
        "tokens_from": found.tokens.source,
        "flops": found.flops.total,
        "gpus": [
            {
                "name": gpu.name,
                "hours": _pair(one.hours),
                "tokens_per_second": _pair(one.tokens_per_second),
                "utilisation": _pair(one.utilisation),
                "money": _pair(one.money) if one.money else None,
            }
            for gpu, one in found.costs
        ],
    }


def _pair(values: Range) -> list[float]:
    return [values.low, values.high]


def _positive(config: dict[str, Any], *keys: str) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0), None)
