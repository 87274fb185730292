"""Two sides with their changes, and the words that warnings about them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafit.difference.compare import Change
from lorafit.difference.side import Side
from lorafit.explain.show import brief
from lorafit.recipe import Recipe


@dataclass(frozen=True)
class Warned:
    """A sentence, and the key that it is about."""

    key: str
    text: str


@dataclass(frozen=True)
class Pair:
    """Two recipes and their changes."""

    before: Side
    after: Side
    changes: list[Change]

    def changed(self, path: str) -> list[Change]:
        """The changes of a key, or of anything below it."""
        return [one for one in self.changes if one.path == path or one.path.startswith(f"{path}.")]

    def steps(self) -> str:
        """How the number of steps changes, as an end of a sentence; empty where that is not known, or the same."""
        before, after = self.before.steps, self.after.steps
        return f": {before:,} optimizer steps become {after:,}" if before and after and before != after else ""


def is_on(recipe: Recipe, key: str) -> bool:
    """Whether a switch, which may stand in an absent section, is on."""
    found: Any = recipe
    for step in key.split("."):
        found = getattr(found, step, None)
    return found is True


def quantized(side: Side) -> str:
    """How the base is kept, for a sentence."""
    section = side.recipe.quantization
    if section is None:
        return "not quantized"
    return f"quantized to 4 bits ({section.bnb_4bit_quant_type})" if section.load_in_4bit else "quantized to 8 bits"


def trained(pair: Pair) -> str:
    """How the number of trained parameters changes, as an end of a sentence; empty where it doesn't."""
    plans = [side.plan.plan for side in (pair.before, pair.after)]
    counts = [plan.trainable_parameters if plan else 0 for plan in plans]
    return f", {counts[0]:,} trained parameters become {counts[1]:,}" if all(counts) and counts[0] != counts[1] else ""


def values(change: Change) -> str:
    """The values of a change, for a sentence."""
    return f"{_value(change.before)} to {_value(change.after)}"


def _value(value: Any) -> str:
    return "none" if value is None else brief(value)


def times(ratio: float) -> str:
    return f"x{ratio:.3g}"


def listed(names: list[str]) -> str:
    shown = names[:3] + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
    return ", ".join(shown)
