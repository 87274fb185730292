"""What validation finds, which all reports are made from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lorafit.errors import UsageError
from lorafit.recipe import Mistake, Position

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
