"""Kinds of adapters, each a module: what PEFT is told, what must hold, and how the adapter starts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from peft import PeftConfig

from lorafit.plan import Plan, adapters
from lorafit.run.directory import RunDir


class Adapter(Protocol):
    """What a kind of adapter's module has."""

    def config(self, arguments: Mapping[str, Any], start: bool = True) -> PeftConfig:
        """PEFT's configuration of the arguments that its description gives, with or without the start asked for."""

    def put_on(self, plan: Plan, modules: Iterable[str]) -> AbstractContextManager[None]:
        """Check that the base has what the adapter is for, and hold while PEFT puts it there. Raises ModelError."""

    def start(self, trainer: Any, plan: Plan, run: RunDir) -> None:
        """Bring the adapter, which is on the trainer's model, to its start."""

    def cast(self, model: torch.nn.Module, dtype: str) -> None:
        """Bring what is trained to its type."""

    def optimizer(self, plan: Plan) -> Callable[[Any], torch.optim.Optimizer] | None:
        """What makes a trainer's optimizer, where the adapter wants another than transformers'."""


def module_of(described: adapters.Adapter) -> Adapter | None:
    """The module of a kind of adapter, by its description's name; None for training in full."""
    return None if described.trains_base else cast(Adapter, importlib.import_module(f"{__name__}.{described.name}"))
