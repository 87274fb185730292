"""The recording itself: a short model's passes in segments, the ways to compute the loss, and the optimizer's step."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Adafactor
from transformers.modeling_layers import GradientCheckpointingLayer

from lorafit import facts
from lorafit.engine.loss import score, spread
from lorafit.engine.trace.log import Recorder, template_of
from lorafit.engine.trace.standins import Autocast, Made, run_kernel
from lorafit.memory.closed import liger_rows
from lorafit.memory.estimate import Setup
from lorafit.memory.static import states_of

Groups = list[dict[str, Any]]


def make_optimizer(
    name: str, groups: Groups, device: str, tensors: Mapping[int, facts.Tensor] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that transformers makes for a name (transformers/trainer_optimizer.py).

    `tensors` describe the parameters, by their ids, to optimizers whose update is one kernel.
    """
    foreach = device == "cuda"  # torch's default there; a CPU updates one tensor after the other
    if name in _TORCHS:
        return _TORCHS[name](groups, foreach=foreach)
    if name == "adafactor":
        return Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
    return _Kept(groups, name, tensors or {})


_TORCHS: dict[str, Any] = {
    "adamw_torch": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


class _Kept(torch.optim.Optimizer):
    """An optimizer whose update is one kernel: only its states take memory.

    Paged states are in managed memory, which torch's allocator does not count.
    """

    def __init__(self, groups: Groups, name: str, tensors: Mapping[int, facts.Tensor]) -> None:
        super().__init__(groups, {})
        self.name, self.tensors = name, tensors

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if parameter not in self.state:
                self.state[parameter] = dict(enumerate(self._made(parameter)))

    def _made(self, parameter: torch.Tensor) -> Iterable[torch.Tensor]:
        for size, paged in states_of(self.name, self.tensors[id(parameter)]):
            if not paged:
                yield parameter.new_empty(size, dtype=torch.uint8)
        if self.name == "adamw_torch_fused":
            yield parameter.new_zeros((), dtype=torch.float32)


Tensor = torch.Tensor
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
"""Where a parameter's name has its layer."""


def record_weights(model: nn.Module, recorder: Recorder, setup: Setup) -> None:
    """Every parameter, buffer and quantization constant as allocated, layer by layer, then the adapter's."""
    adapter: list[tuple[int | None, Tensor]] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found = LAYER.search(name)
        layer = int(found[1]) if found else None
        if setup.adapter.owns(name):
            adapter.append((layer, tensor))
            continue
        recorder.begin("weights", layer)
        recorder.see(tensor)
        state = getattr(tensor, "quant_state", None)
        for constant in _constants(state):
            recorder.see(constant)
    for layer, tensor in adapter:
        recorder.begin("adapter", layer)
        recorder.see(tensor)


def _constants(state: Any) -> list[Tensor]:
    """A 4-bit weight's constants; the code books and the offset too."""
    if state is None:
        return []
    found = [state.absmax, state.code]
    if state.nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    return found


def record_pass(model: nn.Module, setup: Setup, recorder: Recorder, autocast: Autocast, number: int) -> None:
    """One forward and backward pass; gradients are added to those of the passes before."""
    recorder.begin(f"forward {number}")
    with autocast.enabled():
        loss, kept = compute_loss(model, setup)
    recorder.begin(f"backward {number}")
    with autocast.recomputing():
        loss.backward()
    del kept


def record_evaluation(model: nn.Module, setup: Setup, recorder: Recorder, autocast: Autocast) -> None:
    """One forward pass of an evaluation's batch. `setup` is the evaluation's: its rows and its mask."""
    recorder.begin("evaluation")
    model.eval()
    with torch.no_grad(), autocast.enabled():
        compute_loss(model, setup)
    model.train()


def mark_layers(layers: list[nn.Module], recorder: Recorder) -> None:
    """Begin a segment at each decoder layer, forward and backward.

    In the backward pass a layer begins when the gradient of its output is known. What follows the last layer in
    either direction gets a phase of its own, called "head" and "embeddings".
    """

    def wrap(layer: nn.Module, index: int) -> None:
        forward = layer.forward

        def marked(*args: Any, **kwargs: Any) -> Any:
            phase = recorder.phase
            recorder.begin(phase, index)
            hidden = args[0] if args else kwargs["hidden_states"]
            backward = phase.replace("forward", "backward")
            if index == 0 and hidden.requires_grad:
                hidden.register_hook(lambda _: recorder.begin(backward + " embeddings"))
            result = forward(*args, **kwargs)
            hidden = result if isinstance(result, torch.Tensor) else result[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: recorder.begin(backward, index))
            if index == len(layers) - 1:
                recorder.begin(phase + " head")
            return result

        layer.forward = marked

    for index, layer in enumerate(layers):
        wrap(layer, index)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, empty if transformers' base class for layers is not found."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module and isinstance(module[0], GradientCheckpointingLayer):
            return list(module)
    return []


def record_optimizer(model: nn.Module, setup: Setup, recorder: Recorder, layers: int | None) -> None:
    """Clipping and two steps of the optimizer on all parameters of the whole model.

    `layers` is the whole model's depth; None if `model` is the whole.
    """
    trained = _trained(model, layers)
    parameters = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for _, shape, dtype in trained]
    tensors = {
        id(parameter): facts.Tensor(name, tuple(shape), str(dtype).removeprefix("torch."))
        for parameter, (name, shape, dtype) in zip(parameters, trained, strict=True)
    }
    gradients = [torch.empty_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    recorder.begin("known")
    for tensor in (*parameters, *gradients):
        recorder.see(tensor)
    with recorder:
        recorder.begin("states")  # some optimizers make them at once
        optimizer = make_optimizer(setup.optimizer, decay_groups(parameters), setup.device, tensors)
        for number in (1, 2):
            recorder.begin(f"clipping {number}")
            if setup.stack.clip_gradients:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            recorder.begin(f"optimizer {number}")
            optimizer.step()
        recorder.begin("after")


def decay_groups(parameters: list[nn.Parameter]) -> Groups:
    """Matrices with weight decay, vectors without, as transformers' Trainer groups them."""
    groups: Groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trained(model: nn.Module, layers: int | None) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Names, shapes and types of the trained parameters in the model's order, the middle layer's repeated."""
    before: list[tuple[str, torch.Size, torch.dtype]] = []
    after: list[tuple[str, torch.Size, torch.dtype]] = []
    found: dict[int, list[tuple[str, torch.Size, torch.dtype]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            match = LAYER.search(name)
            part = found.setdefault(int(match[1]), []) if match else after if found else before
            part.append((name, parameter.shape, parameter.dtype))
    order = sorted(found) if layers is None else [template_of(index, layers) for index in range(layers)]
    return [*before, *(parameter for index in order for parameter in found.get(index, [])), *after]


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
        loss = run_kernel(_fused_linear, hidden.view(-1, hidden.shape[-1]), head.weight)
        return loss, out if stack.keep_outputs else None
    hidden = out.last_hidden_state
    fused = "cross_entropy" in stack.kernels
    if stack.loss == "logits_upcast":
        logits = head(hidden).float()
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
    chosen = run_kernel(functools.partial(_first_rows, count), hidden)
    chosen_targets = targets.reshape(-1)[:count].clone()
    scores = score(chosen, head.weight, getattr(head, "bias", None), chosen_targets)
    log_probs, *_ = (spread(values, mask) for values in scores)
    loss = -log_probs.sum() / mask.sum().clamp(min=1)
    return (-log_probs).sum() / torch.as_tensor(mask.sum()).clamp(min=1) + 0 * loss.detach()


def _first_rows(count: int, hidden: Tensor) -> Made:
    """hidden[mask]: the chosen rows, and their positions for the backward pass."""
    shape = hidden.shape
    positions = tuple(hidden.new_empty(count, dtype=torch.long) for _ in range(2))
    return hidden.new_empty((count, shape[-1])), positions, lambda gradient, *_: (gradient.new_zeros(shape),)


def _integers(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.long, device="meta")


def _shifted(logits: Tensor, labels: Tensor, fused: bool) -> Tensor:
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()
    return _cross_entropy(shifted, labels, fused)


def _cross_entropy(shifted: Tensor, labels: Tensor, fused: bool) -> Tensor:
    targets = labels[..., 1:].contiguous().view(-1)
    flat = shifted.view(-1, shifted.shape[-1])
    return run_kernel(_in_place, flat) if fused else functional.cross_entropy(flat, targets)


def _in_place(logits: Tensor) -> Made:
    """A fused cross entropy that turns the logits into their gradient where they are (Unsloth, foak)."""
    lse = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return logits.new_empty((), dtype=torch.float32), (logits, lse), lambda _, logits, lse: (logits,)


def _fused_linear(hidden: Tensor, weight: Tensor) -> Made:
    """Liger's fused linear cross entropy: gradients are made chunk by chunk in the forward pass.

    Source: liger_kernel/ops/fused_linear_cross_entropy.py.
    """
    tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.empty_like(weight) if weight.requires_grad else None
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    logits = hidden.new_empty((liger_rows(tokens, width, vocabulary), vocabulary))
    chunk = logits.new_empty((logits.shape[0], width))
    del logits, chunk
    return losses.sum(), (grad_hidden, grad_weight), lambda _, *gradients: gradients
