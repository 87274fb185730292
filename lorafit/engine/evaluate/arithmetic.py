"""A model made ready to be measured, the arithmetic in which it is, and the cache that it keeps."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from trl.trainer.utils import add_fused_lm_head

from lorafit.engine.loss import settle_head
from lorafit.plan import Plan


def ready(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """On the device it was trained on, with the head that the training used, so that losses mean the same."""
    if getattr(model, "hf_quantizer", None) is None:  # else it is there already
        model.to(plan.hardware.device)
    model.config.use_cache = True
    model.eval()
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    with autocast(model):
        settle_head(model)
    return model


def autocast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """As in training: 16-bit weights with float32 adapters meet in 16-bit arithmetic."""
    dtype = model.dtype
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


def bare(model: Any) -> PreTrainedModel:
    """The transformers model, with the adapters in it where there are some."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.no_grad()
def has_plain_cache(model: Any) -> bool:
    """Whether all that a model keeps of a prompt is keys and values of every position: rows can be copied and dropped.

    It must also take positions and the number of logits wanted.
    """
    if not {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"} <= _takes(model):
        return False
    cache = new_cache(model)
    with autocast(model):
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        kept: Any = getattr(model(input_ids=ids, past_key_values=cache, use_cache=True), "past_key_values", None)
    return (
        type(kept) is DynamicCache
        and kept.get_seq_length() == 2
        and all(type(layer) is DynamicLayer for layer in kept.layers)
    )


@torch.no_grad()
def ignores_padding(model: Any) -> bool:
    """Whether padding before a prompt changes nothing, which is not so for everything recurrent: it is tried."""
    ids = torch.arange(3, 9, device=model.device)
    wide, mask = torch.cat([ids.new_zeros(4), ids])[None], torch.tensor([[0] * 4 + [1] * 6], device=model.device)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if "position_ids" in _takes(model) else {}
    with autocast(model):
        alone = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -1].float()
        after = model(input_ids=wide, attention_mask=mask, **positions).logits[0, -1].float()
    return bool((alone - after).abs().max() <= (1e-3 if is_exact(model) else 5e-2) * alone.abs().max())


def is_exact(model: Any) -> bool:
    """Whether results differ by float32 rounding only, however they are put into batches."""
    return model.dtype == torch.float32 and not getattr(model, "is_quantized", False)


def _takes(model: Any) -> set[str]:
    return set(inspect.signature(type(bare(model)).forward).parameters)
