"""Watching an optimizer: what it trains, how far that moves, and what never does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Watch:
    """What happened to the trained tensors.

    Attributes:
        moved: after each step, the distance of all of them from where they began.
    """

    def __init__(self) -> None:
        self.moved: list[float] = []
        self._names: dict[int, str] = {}
        self._start: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._reached: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Watch every optimizer of this process until the block ends."""
        hooks = [
            register_module_forward_pre_hook(self._learn_names),
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def still(self) -> list[tuple[str, bool]]:
        """The tensors that are as they began, each with whether a gradient ever reached it."""
        return [
            (
                self._names.get(id(parameter), f"a tensor of shape {tuple(parameter.shape)}"),
                id(parameter) in self._reached,
            )
            for parameter, start in self._start
            if torch.equal(parameter.detach(), start)
        ]

    def _learn_names(self, module: nn.Module, _: Any) -> None:
        if not module.training or self._start:
            return
        named = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        if len(named) > len(self._names):  # the outermost module comes first
            self._names = named

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if not self._start:
            self._start = [(p, p.detach().clone()) for p in trained]
        self._reached |= {id(p) for p in trained if p.grad is not None and bool(p.grad.any())}

    def _after(self, *_: Any) -> None:
        squares = ((p.detach().double() - start.double()).square().sum().item() for p, start in self._start)
        self.moved.append(math.sqrt(sum(squares)))
