"""Kinds of adapters, each a module: what PEFT is told, what must hold, and how the adapter starts."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from peft import PeftConfig

from lorafit.engine.adapters import lora
from lorafit.plan import Plan
from lorafit.plan.adapters import Lora
from lorafit.run.directory import RunDir


class Adapter(Protocol):
    """What a kind of adapter's module has."""

    def config(self, plan: Plan) -> PeftConfig:
        """PEFT's configuration."""

    def put_on(self, plan: Plan, modules: Iterable[str]) -> AbstractContextManager[None]:
        """Check that the base has what the adapter is for, and hold while PEFT puts it there. Raises ModelError."""

    def start(self, trainer: Any, plan: Plan, run: RunDir) -> None:
        """Bring the adapter, which is on the trainer's model, to its start."""


ADAPTERS: dict[type, Adapter] = {Lora: lora}
"""Adapters by the name of their description in lorafit.plan.adapters."""


def adapter_of(plan: Plan) -> Adapter | None:
    """The kind of adapter that a plan trains; None for training in full."""
    return None if plan.adapter.trains_base else ADAPTERS[type(plan.adapter)]
