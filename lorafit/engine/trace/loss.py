"""The ways in which a stack computes the loss: what they hold differs by tens of gigabytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorafit.engine.loss import score
from lorafit.memory.losses import liger_rows
from lorafit.memory.setup import Setup

Tensor = torch.Tensor


def compute_loss(model: Any, setup: Setup) -> tuple[Tensor, Any]:
    """The loss of a batch of full rows as the stack computes it, and what its training loop keeps meanwhile."""
    rows = setup.batch
    shape = (1, rows * setup.length) if setup.packed else (rows, setup.length)
    inputs: dict[str, Any] = {"input_ids": _integers(shape)}
    if setup.packed:
        inputs["position_ids"] = _integers(shape)
    elif setup.masked:
        inputs["attention_mask"] = _integers(shape)
    labels = _integers(shape)
    stack = setup.stack
    if stack.loss == "fused":
        out = model(**inputs, labels=labels, fused_lm_head=True)
        per_token = -out.log_probs
        loss = per_token.sum() / torch.as_tensor(out.label_mask.sum()).clamp(min=1)
        return loss, out if stack.keep_outputs else None
    if stack.loss == "logits":
        out = model(**inputs, labels=labels)
        return out.loss, out if stack.keep_outputs else None
    if stack.loss == "compact":
        return _compact(model, inputs, labels, setup), None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    out = base.base_model(**inputs)
    head = base.get_output_embeddings()
    if stack.loss == "liger":
        hidden = out.last_hidden_state[:, :-1].contiguous()
        loss = _FusedLinear.apply(hidden.view(-1, hidden.shape[-1]), head.weight)
        return loss, out if stack.keep_outputs else None
    hidden = out.last_hidden_state
    fused = "cross_entropy" in stack.kernels
    if stack.loss == "logits_upcast":
        logits = _upcast_head(hidden, head)
        loss = _cross_entropy(logits[..., :-1, :].contiguous(), labels, fused)
        return loss, (out, logits) if stack.keep_outputs else None
    logits = head(hidden)
    loss = _shifted(logits, labels, fused)
    if stack.autocast and not stack.keep_outputs:
        logits.float()  # accelerate: convert_outputs_to_fp32
    return loss, (out, logits) if stack.keep_outputs else None


def _compact(model: Any, inputs: dict[str, Any], labels: Tensor, setup: Setup) -> Tensor:
    """lorafit's own head for CPUs (lorafit/engine/loss.py): supervised positions only. Which ones depends on values, so
    that here the first ones are taken."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    mask = targets != -100
    count = round(mask.numel() * setup.supervised)
    head = base.get_output_embeddings()
    chosen, chosen_targets = _Chosen.apply(hidden, count), targets.reshape(-1)[:count].clone()
    scores = score(chosen, head.weight, getattr(head, "bias", None), chosen_targets)
    spread = [values.new_zeros(mask.shape).masked_scatter(mask, values) for values in scores]
    log_probs = spread[0]
    loss = -log_probs.sum() / mask.sum().clamp(min=1)
    return (-log_probs).sum() / torch.as_tensor(mask.sum()).clamp(min=1) + 0 * loss.detach()


class _Chosen(torch.autograd.Function):
    """hidden[mask]: the chosen rows, and their positions for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, count: int) -> Tensor:
        positions = [hidden.new_empty(count, dtype=torch.long) for _ in range(2)]
        ctx.save_for_backward(*positions)
        ctx.shape = hidden.shape
        return hidden.new_empty((count, hidden.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape), None


def _integers(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.long, device="meta")


def _upcast_head(hidden: Tensor, head: nn.Module) -> Tensor:
    logits: Tensor = head(hidden)
    return logits.float()


def _shifted(logits: Tensor, labels: Tensor, fused: bool) -> Tensor:
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()
    return _cross_entropy(shifted, labels, fused)


def _cross_entropy(shifted: Tensor, labels: Tensor, fused: bool) -> Tensor:
    targets = labels[..., 1:].contiguous().view(-1)
    flat = shifted.view(-1, shifted.shape[-1])
    if fused:
        loss: Tensor = _InPlace.apply(flat)
        return loss
    return functional.cross_entropy(flat, targets)


class _InPlace(torch.autograd.Function):
    """A fused cross entropy that turns the logits into their gradient where they are (Unsloth, foak)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        lse = logits.new_empty(logits.shape[0], dtype=torch.float32)
        ctx.save_for_backward(logits, lse)
        return logits.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        logits, _ = ctx.saved_tensors
        result: Tensor = logits
        return result


class _FusedLinear(torch.autograd.Function):
    """Liger's fused linear cross entropy: gradients are made chunk by chunk in the forward pass.

    Source: liger_kernel/ops/fused_linear_cross_entropy.py.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        tokens, width = hidden.shape
        vocabulary = weight.shape[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.empty_like(weight) if weight.requires_grad else None
        losses = hidden.new_empty(tokens, dtype=torch.float32)
        logits = hidden.new_empty((liger_rows(tokens, width, vocabulary), vocabulary))
        chunk = logits.new_empty((logits.shape[0], width))
        del logits, chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden, grad_weight
