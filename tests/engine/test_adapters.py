"""Every adapter that the schema offers trains, and what it saves loads with plain PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeMaker, Train
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorafit.engine import train as train_module
from lorafit.engine.model import keep_gradients
from lorafit.files import damage

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"lora": {"use_rslora": True}},
    "dora": {"lora": {"use_dora": True}},
    "gaussian": {"lora": {"init_lora_weights": "gaussian"}},
    "orthogonal": {"lora": {"init_lora_weights": "orthogonal"}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "pissa_niter": {"lora": {"init_lora_weights": "pissa_niter_4"}},
    "olora": {"lora": {"init_lora_weights": "olora"}},
    "eva": {"lora": {"init_lora_weights": "eva"}},
    "loraplus": {"lora": {"loraplus_lr_ratio": 16}},
    "neftune": {"training": {"neftune_noise_alpha": 5}},
    "ranks": {"lora": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 2}}},
    "modules_to_save": {"lora": {"modules_to_save": ["lm_head"]}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "packing": {"training": {"packing": True}},
    "nf4": {"quantization": NF4},
    "fp4": {"quantization": NF4 | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}},
    "int8": {"quantization": {"load_in_8bit": True}},
    "qdora": {"quantization": NF4, "lora": {"use_dora": True}},
}


@pytest.fixture
def trained_logits(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Catches the logits of the model in memory when a run is saved."""
    caught: dict[str, torch.Tensor] = {}
    save = train_module.save_result

    def catch(trainer: Any, *args: Any) -> None:
        trainer.model.eval()
        with torch.no_grad():
            caught["logits"] = trainer.model(input_ids=torch.arange(3, 40)[None]).logits
        save(trainer, *args)

    monkeypatch.setattr(train_module, "save_result", catch)
    return caught


@pytest.mark.parametrize("method", METHODS)
def test_trains_and_loads_with_plain_peft(
    method: str, recipe: RecipeMaker, train: Train, trained_logits: dict[str, torch.Tensor], tiny_model: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in load_file(tiny_model / "model.safetensors").items()}
    sections = METHODS[method]
    run = train(recipe(**sections), "training.max_steps=16")
    assert not run.start.is_dir() or not damage(run.start), "PEFT wrote there"

    quantization = sections.get("quantization")
    if quantization is None:
        loaded = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    else:
        config = BitsAndBytesConfig(**{"bnb_4bit_use_double_quant": True} | quantization)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, device_map={"": "cpu"})
        keep_gradients(base)  # the arithmetic of the training; else some CPUs compute in bfloat16
        loaded = PeftModel.from_pretrained(base, run.adapter)
    loaded.eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(3, 40)[None]).logits
        with loaded.disable_adapter():
            untrained = loaded(input_ids=torch.arange(3, 40)[None]).logits
    torch.testing.assert_close(logits, trained_logits["logits"], rtol=1e-3, atol=1e-3)
    assert (logits - untrained).abs().max() > 1e-3, "the adapter does nothing"
    after = load_file(tiny_model / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before), "the base moved"
    losses = [entry["loss"] for entry in run.metrics_until(10**9) if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_full_training_saves_a_whole_model(
    recipe: RecipeMaker, train: Train, trained_logits: dict[str, torch.Tensor]
) -> None:
    run = train(recipe(lora=..., training={"learning_rate": 1e-3}))
    assert not run.adapter.exists()
    loaded = AutoModelForCausalLM.from_pretrained(run.model)
    with torch.no_grad():
        logits = loaded(input_ids=torch.arange(3, 40)[None]).logits
    torch.testing.assert_close(logits, trained_logits["logits"], rtol=1e-5, atol=1e-5)


def test_an_evaluation_between_steps_changes_no_weight_of_a_4_bit_run(recipe: RecipeMaker, train: Train) -> None:
    """On some CPUs bitsandbytes' layers, once run outside of training, let no gradient through."""
    quantization = {"load_in_4bit": True}
    rows = {"validation": 0.2}
    training = {"eval_strategy": "steps", "load_best_model_at_end": False, "save_strategy": "no"}
    weights = []
    for every in (1, 100):
        path = recipe(
            f"every-{every}", quantization=quantization, dataset=rows, training=training | {"eval_steps": every}
        )
        run = train(path)
        weights.append(load_file(run.adapter / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
