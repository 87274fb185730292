"""What validation finds, and how it is being looked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lorafit.errors import DataError, DoesNotFitError, LorafitError, ModelError, UsageError
from lorafit.hardware import Hardware
from lorafit.recipe import Mistake, Position, Recipe, RecipeError
from lorafit.tree import KeyPath, dotted

RULES = {2: "recipe", 3: "data", 4: "model", 5: "memory"}
"""What a fault is about, by the exit code that it has everywhere."""
PARTS = ("data", "model", "memory")
"""What can be left out of the checks."""
Kind = Literal["recipe", "part"]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        mistake: what, and where it was written.
        exit_code: of what it is about, see lorafit.errors.
    """

    mistake: Mistake
    exit_code: int

    @property
    def rule(self) -> str:
        return RULES[self.exit_code]

    def as_dict(self) -> dict[str, Any]:
        at = self.mistake.position
        where = {"file": at.file, "line": at.line, "column": at.column, "key": self.mistake.path}
        return where | {"rule": self.rule, "exit_code": self.exit_code, "message": self.mistake.message}


@dataclass(frozen=True)
class Checked:
    """A recipe that was checked.

    Attributes:
        kind: whether it is a recipe, or a part that others extend (it has no model and no dataset).
        facts: what it comes to, as far as that is known, see `check`.
        notes: what was not checked and why, and the plan's remarks.
    """

    file: str
    kind: Kind
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_ok(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "kind": self.kind,
            "ok": self.is_ok,
            "faults": [fault.as_dict() for fault in self.faults],
            "notes": list(self.notes),
            "facts": self.facts,
        }


@dataclass(frozen=True)
class Skipped:
    """A YAML file, or a link to a folder, in a folder that was searched, and why it was not checked.

    Attributes:
        is_recipe: whether it may be a recipe.
    """

    file: str
    reason: str
    is_recipe: bool

    def as_fault(self) -> Checked:
        mistake = Mistake(Position(self.file), "", f"was not checked: it {self.reason}")
        return Checked(self.file, "recipe", (Fault(mistake, UsageError.exit_code),))


@dataclass(frozen=True)
class Report:
    """Everything that was checked, and what was not."""

    checked: tuple[Checked, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Each once: a parent's fault is found in all that extend it."""
        return tuple(dict.fromkeys(fault for one in self.checked for fault in one.faults))

    @property
    def exit_code(self) -> int:
        """0, or the lowest code of what was found."""
        return min((fault.exit_code for fault in self.faults), default=0)

    def as_dict(self) -> dict[str, Any]:
        return {
            "validate_version": 2,
            "ok": not self.faults,
            "exit_code": self.exit_code,
            "recipes": [one.as_dict() for one in self.checked],
            "skipped": [dataclasses.asdict(one) for one in self.skipped],
        }


@dataclass(frozen=True)
class Options:
    """What is checked, and for which machine.

    Attributes:
        overrides: KEY=VALUE, for every recipe.
        skip: parts that are left out, of lorafit.validate.findings.PARTS.
        hardware: None: what each recipe is meant for.
        here: whether recipes are checked for this machine, so that what it lacks is a fault.
        strict: whether what can't be checked is a fault.
    """

    overrides: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    hardware: Hardware | None = None
    here: bool = False
    strict: bool = False


@dataclass
class Findings:
    """What was found in a recipe so far."""

    recipe: Recipe
    options: Options
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def wrong(self, path: KeyPath, error: LorafitError) -> None:
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

    def unchecked(self, path: KeyPath, error: LorafitError) -> None:
        """What can't be told on this machine."""
        if self.options.strict:
            self.wrong(path, error)
        else:
            self.notes.append(f"{dotted(path)}: {error}")
