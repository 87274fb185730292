"""Paths that only a CUDA GPU takes. Not run where there is none; see CONTRIBUTING.md."""

from __future__ import annotations

import pytest
import torch
from conftest import RecipeMaker, Train

from lorafit.errors import DoesNotFitError, Interrupted
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


def test_nf4_of_a_gpu_is_that_of_a_cpu() -> None:
    from bitsandbytes import functional

    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = []
    for device in ("cpu", "cuda"):
        packed, state = functional.quantize_4bit(weight.to(device), quant_type="nf4", compress_statistics=True)
        made.append(functional.dequantize_4bit(packed, state).float().cpu())
    assert (made[0] - made[1]).abs().max() < 0.2 * weight.float().std()


def test_a_run_goes_on_in_smaller_passes(recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_train import stop_at

    path = recipe(model={"dtype": "auto"}, training={"max_steps": 8, "save_strategy": "no"})
    stop_at(4, monkeypatch)
    with pytest.raises(Interrupted):
        train(path)
    monkeypatch.undo()
    passes = ("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4")
    run = train(path, *passes, resume=True)
    assert [entry["step"] for entry in run.metrics_until(99) if "loss" in entry] == list(range(1, 9))


def test_out_of_memory_says_what_was_foreseen_and_what_to_change(recipe: RecipeMaker, train: Train) -> None:
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(DoesNotFitError, match=r"GiB were .* foreseen.*"):
            train(recipe(model={"dtype": "auto"}, training={"per_device_train_batch_size": 4096, "max_length": 128}))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
