"""The output head on supervised positions only, for devices where TRL scores every position.

TRL's fused head selects the supervised positions where Triton runs (GPUs); on a CPU it projects and
scores all of them, masked ones included (trl/trainer/utils.py: `compact`). Answers are often a
quarter of a row, and the head is a third of a small model's step, so this is worth an override.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from lorafit.errors import ModelError

CHUNK_BYTES = 256 * 1024 * 1024
"""Logits held at once, in bytes of float32. More positions are taken in chunks and recomputed."""


def settle_head(model: PreTrainedModel, mean_logits: bool = False) -> None:
    """Choose between the heads on a model that has TRL's: only one that scores as the model itself is used.

    Call it in the mode and the arithmetic in which the model is used. Raises ModelError if TRL's head does not know
    this model.

    Args:
        mean_logits: whether the output has them, which the losses of pairs log.
    """
    if not _scores_as_itself(model):
        raise ModelError(
            f"the loss of {model.config.model_type} models would be wrong: TRL computes it from the weights of the "
            "output head, and this head does more with them; another model is needed"
        )
    if applies_to(model):
        trls = model.forward
        score_supervised_positions(model, mean_logits)
        if not _scores_as_itself(model):
            model.forward = trls


@torch.no_grad()
def _scores_as_itself(model: PreTrainedModel) -> bool:
    """Whether the fused head gives the log-probabilities of the model's own logits, up to rounding, on a short row."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, 16), generator=draw).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.random.fork_rng():  # the same dropout in both
        torch.manual_seed(0)
        logits = model(**inputs).logits[0, :-1].float()
        torch.manual_seed(0)
        fused = model(**inputs, labels=ids, fused_lm_head=True).log_probs[0]
    own = functional.log_softmax(logits, dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
    # A 16-bit type rounds a logit by up to 1/256 of it; float32 by less than 1e-6, or 1e-3 where a GPU uses TF32.
    rounded = model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
    allowed = (2e-2 if rounded else 2e-3) * logits.abs().max()
    return bool((fused - own).abs().max() <= allowed)


def applies_to(model: PreTrainedModel) -> bool:
    """Whether `score_supervised_positions` computes what the model's own head computes.

    Not for heads with a scale or a soft cap, nor for mixtures of experts with a balancing loss:
    these keep TRL's path.
    """
    config = model.config.get_text_config()
    scales = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    plain = all(getattr(config, name, None) is None for name in scales)
    return plain and not hasattr(config, "output_router_logits") and next(model.parameters()).device.type == "cpu"


def score_supervised_positions(model: PreTrainedModel, mean_logits: bool = False) -> None:
    """Replace TRL's fused head on `model` (call after SFTTrainer is made).

    `model(..., labels=labels, fused_lm_head=True)` returns the same FusedCausalLMOutput: per-token
    fields of shape (batch, length - 1), zero where the label is -100. Other calls are untouched.
    """
    with_trl_head = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or kwargs.get("shift_labels") is not None:
            return with_trl_head(*args, fused_lm_head=fused_lm_head, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        num_items = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels != -100
        head = self.get_output_embeddings()
        scores = score(hidden[mask], head.weight, getattr(head, "bias", None), labels[mask], mean_logits)
        log_probs, entropy, is_top1, *means = (spread(values, mask) for values in scores)
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items),
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            mean_logits=means[0] if means else None,
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)


def row_sums(output: FusedCausalLMOutput, row_of: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, 4): learned tokens, negative log-likelihood, entropy (both in nats) and top-1 hits of each row.

    In float64, but on an Apple GPU, which has none. The entropy is 0 where the head was made without it.

    Args:
        row_of: (1, length) the row of each token, where rows stand one after the other in a single one.
    """
    entropy = torch.zeros_like(output.log_probs) if output.entropy is None else output.entropy
    each = torch.stack([output.label_mask, -output.log_probs, entropy, output.is_top1], -1)
    each = each.float() if each.device.type == "mps" else each.double()
    if row_of is None:
        return each.sum(1)
    sums = each.new_zeros(int(row_of.max()) + 1, 4)
    return sums.index_add_(0, row_of[0, 1:].long(), each[0])


def spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(supervised,) -> (batch, length - 1); differentiable also when nothing is supervised."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def score(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    mean_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Log-probability, entropy, top-1 hit and, if it is asked for, mean logit of each label. All (supervised,)."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    if len(labels) <= rows:
        return _score_chunk(hidden, weight, bias, labels, mean_logits)
    parts = [
        checkpoint(
            _score_chunk, hidden[i : i + rows], weight, bias, labels[i : i + rows], mean_logits, use_reentrant=False
        )
        for i in range(0, len(labels), rows)
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _score_chunk(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, mean_logits: bool
) -> tuple[torch.Tensor, ...]:
    logits = functional.linear(hidden, weight, bias).float()
    log_p = functional.log_softmax(logits, dim=-1)
    log_probs = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
        is_top1 = log_p.argmax(-1) == labels
        means = [logits.mean(-1)] if mean_logits else []
    return (log_probs, entropy, is_top1, *means)
