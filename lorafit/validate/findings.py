"""What is being found in a recipe, and how it is being looked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorafit.errors import DataError, DoesNotFitError, LorafitError, ModelError, UsageError
from lorafit.hardware import Hardware
from lorafit.plan.context import Path
from lorafit.recipe import Recipe, RecipeError
from lorafit.recipe.source import dotted
from lorafit.validate.types import Fault


@dataclass(frozen=True)
class Options:
    """What is checked, and for which machine.

    Attributes:
        overrides: KEY=VALUE, for every recipe.
        skip: parts that are left out, of lorafit.validate.types.PARTS.
        hardware: None: what each recipe is meant for.
        here: whether recipes are checked for this machine, so that what it lacks is a fault.
        strict: whether what can't be checked is a fault.
        deep: whether the data is tokenized and audited, which takes torch and its time.
    """

    overrides: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    hardware: Hardware | None = None
    here: bool = False
    strict: bool = False
    deep: bool = False


@dataclass
class Findings:
    """What was found in a recipe so far."""

    recipe: Recipe
    options: Options
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def wrong(self, path: Path, error: LorafitError) -> None:
        """A fault for each line of an error, at a place in the recipe."""
        for line in str(error).splitlines():
            self.faults.append(Fault(self.recipe.mistake(path, line), error.exit_code))

    def refusal(self, beside: Iterable[Fault] = ()) -> LorafitError:
        """All faults as one error, of the lowest exit code among them; if there are none, of those beside them."""
        every = [*self.faults, *beside]
        code = min(fault.exit_code for fault in self.faults or every)
        if code == RecipeError.exit_code:
            return RecipeError(fault.mistake for fault in every)
        kinds = {kind.exit_code: kind for kind in (DataError, ModelError, DoesNotFitError)}
        return kinds.get(code, UsageError)("\n".join(str(fault.mistake) for fault in every))

    def unchecked(self, path: Path, error: LorafitError) -> None:
        """What can't be told on this machine."""
        if self.options.strict:
            self.wrong(path, error)
        else:
            self.notes.append(f"{dotted(path)}: {error}")
