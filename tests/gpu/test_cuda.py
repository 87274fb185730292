"""Paths that only a CUDA GPU takes. Not run where there is none; see CONTRIBUTING.md."""

from __future__ import annotations

import pytest
import torch
from conftest import RecipeMaker, Train

from lorafit.hardware import detect

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_the_gpu_is_found_without_torch() -> None:
    hardware = detect()
    assert hardware.device == "cuda"
    assert hardware.compute_capability == torch.cuda.get_device_capability(0)


@pytest.mark.parametrize("quantization", [..., {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_training_with_the_automatic_choices(quantization: object, recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe(model={"dtype": "auto"}, quantization=quantization, training={"max_steps": 12}))
    losses = [entry["loss"] for entry in run.metrics_until(99) if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert run.load_manifest()["memory"]["measured"]["allocated"] > 0


def test_loftq(recipe: RecipeMaker, train: Train) -> None:
    lora = {"init_lora_weights": "loftq", "r": 4, "lora_alpha": 4}
    assert train(recipe(quantization={"load_in_4bit": True}, lora=lora)).adapter.is_dir()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_packed_rows_are_isolated(attention: str, recipe: RecipeMaker, train: Train) -> None:
    """Training with packing proves it on the model before the first step, with the kernel that it uses."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    run = train(recipe(model={"dtype": "auto", "attn_implementation": attention}, training={"packing": True}))
    assert run.adapter.is_dir()
