"""Methods of training, and what everybody but a method's own module in `lorafit.engine` has to know of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorafit.recipe import Recipe
from lorafit.rows import Format
from lorafit.rows.audit import RULES


@dataclass(frozen=True)
class Method:
    """A method of training.

    Attributes:
        name: of its module in lorafit.engine.methods.
        title: as its users know it.
        reads: the formats of rows that it learns from, each with what of a row is not learned, if anything.
        columns: of a tokenized row, those that its trainer takes.
        sequences: how many sequences a row puts through the model at once.
        rules: the audit's rules that its rows are held to.
        validated: what its validation finds, by TRL's names, and whether more of it is better.
    """

    name: str
    title: str
    reads: Mapping[Format, str]
    columns: tuple[str, ...]
    sequences: int
    rules: tuple[str, ...]
    validated: Mapping[str, bool]


SFT = Method(
    name="sft",
    title="supervised fine-tuning",
    reads={
        "alpaca": "",
        "messages": "",
        "sharegpt": "",
        "prompt_completion": "",
        "text": "",
        "preference": "of each pair the chosen answer is learned; `preference: {}` learns from both",
        "unpaired_preference": "the rows whose label is false are left out",
    },
    columns=("input_ids", "labels"),
    sequences=1,
    rules=tuple(RULES),
    validated={"loss": False, "mean_token_accuracy": True},
)


DPO = Method(
    name="dpo",
    title="direct preference optimization",
    reads={"preference": ""},
    columns=("input_ids", "labels", "rejected_ids", "rejected_labels"),
    sequences=2,
    rules=tuple(RULES),
    validated={"loss": False, "rewards/accuracies": True, "rewards/margins": True},
)


METHODS = {method.name: method for method in (SFT, DPO)}


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe asks for."""
    return SFT if recipe.preference is None else METHODS[recipe.preference.method]
