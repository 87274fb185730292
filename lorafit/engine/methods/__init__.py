"""Methods of training, each a module: how rows become tokens, the trainer, and what must hold before the first step."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorafit.engine.data.encode import TokenRow
from lorafit.engine.data.render import Renderer
from lorafit.plan.values import DataPlan, Plan
from lorafit.rows import Row, Shape
from lorafit.rows.audit import SourceAudit
from lorafit.run.directory import RunDir

if TYPE_CHECKING:
    from lorafit.engine.data.prepare import Prepared


class Method(Protocol):
    """What a method's module has. Light, but for what its functions import."""

    def encode(
        self, rows: Iterable[Row], shape: Shape, plan: DataPlan, renderer: Renderer, audit: SourceAudit
    ) -> Iterator[list[TokenRow]]:
        """Tokens with labels of a source's rows, in batches, counted in `audit`."""

    def build(self, plan: Plan, run: RunDir, data: Prepared, tokenizer: Any) -> Any:
        """The trainer, with model, adapter and data in place. Raises ModelError, DoesNotFitError."""

    def check(self, trainer: Any, plan: Plan) -> None:
        """See that the model learns from rows as the plan says. Raises ModelError."""


def module_of(name: str) -> Method:
    """The module of a method, by its description's name."""
    return cast(Method, importlib.import_module(f"{__name__}.{name}"))
