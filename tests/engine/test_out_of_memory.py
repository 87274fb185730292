"""What is said when memory runs out, on a GPU that is told of here: what was more than foreseen, and what would do."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import torch
from conftest import RecipeMaker

from lorafit.engine.memory import Meter, explained_out_of_memory
from lorafit.errors import DoesNotFitError
from lorafit.facts import read_facts
from lorafit.hardware import Hardware
from lorafit.memory.static import base_bytes, trained_bytes
from lorafit.plan import Plan, make_plan
from lorafit.recipe import Recipe
from lorafit.run.memory import Foreseen, foresee
from lorafit.text import GIB, gib

MODEL = "meta-llama/Llama-3.2-1B"
AMPERE = Hardware("cuda", "NVIDIA A100-SXM4-80GB", 80 << 30, (8, 0), True)


class Card(Meter):
    """A meter of a GPU that isn't there."""

    allocated = 0

    def measured(self) -> dict[str, int]:
        return {"allocated": self.allocated, "reserved": self.allocated}


def card(held: int, peak: int) -> Card:
    made = Card("cuda", 0, True, held)
    made.allocated = peak
    return made


@pytest.fixture
def planned(recipe: RecipeMaker) -> tuple[Plan, Foreseen]:
    """A plan of a known model, for a GPU with more memory than its training takes."""
    training = {"per_device_train_batch_size": 8, "max_length": 2048, "gradient_checkpointing": False}
    asked = Recipe.load(recipe(model={"name_or_path": MODEL, "dtype": "bfloat16"}, training=training))
    plan = make_plan(asked, read_facts(MODEL), AMPERE, read_data=False)
    return plan, foresee(plan)


def told(plan: Plan, foreseen: Foreseen, meter: Meter, asked: str = "2.00 MiB") -> str:
    with pytest.raises(DoesNotFitError) as caught, explained_out_of_memory(plan, foreseen, meter):
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {asked}. GPU 0 has a total of 1 GiB.")
    return str(caught.value)


def test_a_step_that_takes_more_than_foreseen(planned: tuple[Plan, Foreseen]) -> None:
    plan, foreseen = planned
    known, setup = foreseen.estimate, foreseen.setup
    assert known is not None
    assert setup is not None
    held = base_bytes(setup) + trained_bytes(setup)
    said = told(plan, foreseen, card(held, known.allocated + GIB), "1.00 GiB")
    assert f"{gib(known.allocated + 2 * GIB)} GiB were needed where {gib(known.allocated)}" in said
    assert "a step adds" in said


def test_weights_that_take_more_than_foreseen(planned: tuple[Plan, Foreseen]) -> None:
    plan, foreseen = planned
    assert foreseen.estimate is not None
    assert f"it is the weights, of {gib(300 * GIB)} GiB" in told(plan, foreseen, card(300 * GIB, 400 * GIB))


def test_a_card_that_others_use(planned: tuple[Plan, Foreseen]) -> None:
    plan, foreseen = planned
    assert "taken by others" in told(plan, foreseen, card(1, 2))


def test_the_change_that_would_do(planned: tuple[Plan, Foreseen]) -> None:
    """It is one that can be made while the run goes on, and with it the estimate fits."""
    plan, foreseen = planned
    assert foreseen.estimate is not None
    small = dataclasses.replace(plan, hardware=dataclasses.replace(AMPERE, memory_bytes=foreseen.estimate.total - GIB))
    said = told(small, foreseen, card(1, 2))
    assert f"{gib(foreseen.estimate.total)} GiB were foreseen" in said
    assert "--resume" in said
    words = shlex.split(said.partition("(--")[2].partition(")")[0])
    overrides = [word for word in words if "=" in word]
    changed = Recipe.restored(plan.recipe, "here", overrides)
    again = make_plan(changed, read_facts(MODEL), AMPERE, read_data=False)
    less = foresee(again).estimate
    assert less is not None
    assert less.total < foreseen.estimate.total
    assert again.decides() == plan.decides(), "what is learned is the same"


def test_nothing_known_of_the_memory(planned: tuple[Plan, Foreseen]) -> None:
    plan, _ = planned
    said = told(plan, Foreseen(reason="no shapes"), card(1, 2))
    assert "per_device_train_batch_size" in said
