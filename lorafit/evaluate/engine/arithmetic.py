"""A model made ready to be measured, and the arithmetic in which it is."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from lorafit.loss import settle_head
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
