"""The hardware section: what a recipe is meant for, wherever it is read."""

from __future__ import annotations

from typing import Any

import pytest
from wording import Like

from lorafit.errors import LorafitError
from lorafit.hardware import Hardware, elsewhere, meant_device, meant_hardware
from lorafit.recipe import Recipe

CPU = Hardware("cpu", "a plain CPU", 16 << 30, None, False)
CARD = Hardware("cuda", "NVIDIA GeForce RTX 4090", 24564 << 20, (8, 9), True)


def recipe(**hardware: Any) -> Recipe:
    values: dict[str, Any] = {"model": {"name_or_path": "a/b"}, "dataset": {"train": [{"path": "rows.jsonl"}]}}
    return Recipe.of(values | ({"hardware": hardware} if hardware else {}), "here")


def test_plans_are_made_for_the_stated_gpu() -> None:
    found = meant_hardware(recipe(gpu="T4"))
    assert (found.device, found.compute_capability, found.fast_bf16) == ("cuda", (7, 5), False)
    assert meant_hardware(recipe(device="cpu")).device == "cpu"
    assert meant_hardware(recipe(vram="24GiB")).device == "cuda"
    assert meant_hardware(recipe()).device == "cuda"


def test_the_limit_is_the_smaller_of_what_is_stated() -> None:
    assert meant_device(recipe()) is None
    assert meant_device(recipe(device="cpu")) is None
    card = meant_device(recipe(gpu="RTX 4090"))
    assert card is not None
    assert (card.name, card.memory_bytes >> 30) == ("RTX 4090", 23)
    small = meant_device(recipe(gpu="RTX 4090", vram="16GiB"))
    assert small is not None
    assert (small.name, small.memory_bytes) == ("RTX 4090", 16 << 30)
    plain = meant_device(recipe(vram="80GiB"))
    assert plain is not None
    assert (plain.gpu, plain.memory_bytes) == (None, 80 << 30)


def test_a_plan_for_another_machine_is_said() -> None:
    assert elsewhere(recipe(), CPU) is None
    assert elsewhere(recipe(gpu="RTX 4090"), CARD) is None
    assert elsewhere(recipe(device="cuda"), CARD) is None
    assert elsewhere(recipe(device="cpu"), CPU) is None
    assert elsewhere(recipe(gpu="A10"), CARD) == Like("… A10 … RTX 4090")
    assert elsewhere(recipe(vram="24GiB"), CPU) == Like("… 24GiB … CPU")
    assert elsewhere(recipe(device="cpu"), CARD) == Like("… CPU … RTX 4090")


@pytest.mark.parametrize(
    ("hardware", "message"),
    [
        ({"gpu": "RTX 4099"}, "hardware.gpu: 'RTX 4099': "),
        ({"vram": "24"}, "hardware.vram: '24': "),
        ({"device": "cpu", "gpu": "T4"}, "hardware.gpu: … device: cpu"),
    ],
)
def test_mistakes(hardware: dict[str, Any], message: str) -> None:
    with pytest.raises(LorafitError) as error:
        recipe(**hardware)
    assert str(error.value) == Like(f"… {message}")
    assert error.value.exit_code == 2
