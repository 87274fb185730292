"""Optimizers on meta tensors: torch's and transformers' own, and what bitsandbytes' kernels keep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import Adafactor

from lorafit.memory.static import MIN_8BIT_SIZE, OPTIMIZER_STATES, PAGED_SIZE, STATE_BLOCK

Groups = list[dict[str, Any]]


def make_optimizer(
    name: str, groups: Groups, device: str, embeddings: frozenset[int] = frozenset()
) -> torch.optim.Optimizer:
    """The optimizer that transformers makes for a name (transformers/trainer_optimizer.py).

    `embeddings` are the ids of parameters whose states stay in float32 (transformers/trainer.py: create_optimizer).
    """
    foreach = device == "cuda"  # torch's default there; a CPU updates one tensor after the other
    if name == "adamw_torch":
        return torch.optim.AdamW(groups, foreach=foreach)
    if name == "adamw_torch_fused":
        return _Kept(groups, states=2, like_parameter=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1e-3, foreach=foreach)
    if name == "adagrad":
        return torch.optim.Adagrad(groups, foreach=foreach)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, foreach=foreach)
    if name == "adafactor":
        return Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
    eight_bit, paged = name.endswith("8bit"), name.startswith("paged")
    return _Kept(groups, OPTIMIZER_STATES[name], eight_bit=eight_bit, paged=paged, embeddings=embeddings)


class _Kept(torch.optim.Optimizer):
    """An optimizer whose update is one kernel: only its states take memory.

    Paged states are in managed memory, which torch's allocator does not count.
    """

    def __init__(
        self,
        groups: Groups,
        states: int,
        like_parameter: bool = False,
        eight_bit: bool = False,
        paged: bool = False,
        embeddings: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(groups, {})
        self.states, self.like_parameter, self.eight_bit, self.paged = states, like_parameter, eight_bit, paged
        self.embeddings = embeddings

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self._parameters():
            if parameter not in self.state:
                self.state[parameter] = dict(enumerate(self._made(parameter)))

    def _parameters(self) -> Iterable[torch.Tensor]:
        return (p for group in self.param_groups for p in group["params"] if p.grad is not None)

    def _made(self, parameter: torch.Tensor) -> Iterable[torch.Tensor]:
        paged = self.paged and parameter.numel() >= PAGED_SIZE
        for _ in range(self.states):
            if self.like_parameter:
                yield torch.zeros_like(parameter)
            elif self.eight_bit and parameter.numel() >= MIN_8BIT_SIZE and id(parameter) not in self.embeddings:
                if not paged:
                    yield torch.zeros_like(parameter, dtype=torch.uint8)
                yield parameter.new_zeros(math.ceil(parameter.numel() / STATE_BLOCK), dtype=torch.float32)
            elif not paged:
                yield torch.zeros_like(parameter, dtype=torch.float32)
        if self.like_parameter:
            yield parameter.new_zeros((), dtype=torch.float32)
