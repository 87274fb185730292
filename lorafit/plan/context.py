"""A plan in the making: what it is made from, and what was found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from lorafit.errors import DataError
from lorafit.facts import ModelFacts
from lorafit.hardware import Hardware
from lorafit.plan.types import Choice
from lorafit.recipe import Mistake, Recipe

T = TypeVar("T")
Path = tuple[str | int, ...]
"""Where a value stands in the recipe."""


@dataclass
class Context:
    """What every decision may look at, and where it is noted.

    Attributes:
        choices: every resolved value by its key in the recipe, with its reason, in order.
        mistakes: what the recipe asks for and this model or machine can't carry out.
        faults: sources whose rows can't be read, by their place in the recipe.
        remarks: what the user should know, a sentence each.
    """

    recipe: Recipe
    facts: ModelFacts
    hardware: Hardware
    choices: dict[str, Choice] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    faults: list[tuple[Path, DataError]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.hardware.device == "cuda"

    def choose(self, key: str, value: T, reason: str) -> T:
        self.choices[key] = Choice(value, reason)
        return value

    def wrong(self, path: Path, message: str) -> None:
        self.mistakes.append(self.recipe.mistake(path, message))
