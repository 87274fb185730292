"""A merged model answers as the adapter does, loads alone, and is whole or absent."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RecipeMaker, Train, as_planned, make_model
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.errors import GateError, UsageError
from lorafit.merge import merge

IDS = torch.arange(3, 40)[None]
QUIET = Console(file=io.StringIO())


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}])
def test_merged_logits_are_the_adapters(lora: dict[str, Any], recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe(lora=lora))
    destination = merge(run.path, None, QUIET)
    assert destination == run.merged
    adapter = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    merged = AutoModelForCausalLM.from_pretrained(destination)
    assert not list(destination.glob("adapter*"))
    torch.testing.assert_close(logits(merged), logits(adapter), rtol=1e-4, atol=1e-5)
    assert (logits(merged) - logits(adapter.unload())).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(destination)
    assert tokenizer.chat_template
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((destination / "merge_report.json").read_text())["base_weights"] == "original"


def test_a_quantized_run_is_merged_into_the_unquantized_base(recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe(quantization={"load_in_4bit": True}))
    said = io.StringIO()
    merged = AutoModelForCausalLM.from_pretrained(merge(run.path, None, Console(file=said)))
    assert "quantized base" in said.getvalue()
    assert not hasattr(merged.config, "quantization_config")
    adapter = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    torch.testing.assert_close(logits(merged), logits(adapter), rtol=1e-4, atol=1e-5)


def test_a_tied_head_that_was_trained_is_refused_rather_than_merged_wrongly(
    recipe: RecipeMaker, train: Train, tmp_path: Path
) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    run = train(recipe(model={"name_or_path": str(tied)}, lora={"modules_to_save": ["embed_tokens"]}))
    try:
        destination = merge(run.path, None, QUIET)
    except GateError:
        assert not run.merged.exists()
        assert not list(run.path.glob(".*"))
    else:  # then it must be right
        adapter = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(destination)), logits(adapter), rtol=1e-3, atol=1e-4
        )


def test_a_wrong_merge_is_not_kept(recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    run = train(recipe())
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(GateError, match="it was not kept"):
        merge(run.path, None, QUIET)
    assert not run.merged.exists()


def test_refusals(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    full = train(recipe("full", lora=..., training={"learning_rate": 1e-3}))
    with pytest.raises(UsageError, match="nothing to merge"):
        merge(full.path, None, QUIET)
    with pytest.raises(UsageError, match="no such run"):
        merge(tmp_path / "nowhere", None, QUIET)
    with pytest.raises(UsageError, match="not a run directory"):
        merge(tmp_path, None, QUIET)
    run = train(recipe())
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="is not a merged model"):
        merge(run.path, mine, QUIET)
    assert merge(run.path, tmp_path / "a b" / "merged", QUIET).is_dir()
    assert merge(run.path, tmp_path / "a b" / "merged", QUIET).is_dir(), "merging again replaces"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_to_16_bits_is_no_wrong_merge(
    dtype: str, recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a model of many layers makes much of it. (float16 can't be trained on a CPU.)"""
    deep = make_model(tmp_path / "deep", num_hidden_layers=24, initializer_range=0.2)
    run = train(recipe(model={"name_or_path": str(deep), "dtype": "bfloat16"}, training={"max_steps": 2}))
    as_planned(run, model_kwargs={"dtype": dtype})
    destination = merge(run.path, None, QUIET)
    merged = AutoModelForCausalLM.from_pretrained(destination)
    assert merged.dtype == getattr(torch, dtype)
    report = json.loads((destination / "merge_report.json").read_text())
    assert report["logit_difference"] <= report["allowed"]
    assert report["logit_change_by_rounding"] > report["allowed"], "rounding must be told apart from a wrong merge"


def test_an_adapter_that_rounding_loses_is_reported(recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe(model={"dtype": "bfloat16"}, training={"learning_rate": 1e-6}))
    said = io.StringIO()
    merge(run.path, None, Console(file=said))
    assert "partly lost in the merged model" in said.getvalue()


def test_a_run_with_flash_attention_is_merged_on_the_cpu(recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe())
    as_planned(run, model_kwargs={"attn_implementation": "flash_attention_2"})
    assert merge(run.path, None, QUIET).is_dir()


def test_a_saved_model_that_loads_differently_is_not_kept(
    recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the difference is smaller than what rounding makes. The model's own code is trusted as in training."""
    run = train(recipe(model={"dtype": "bfloat16", "trust_remote_code": True}))
    trusted = []
    original = AutoModelForCausalLM.from_pretrained

    def lossy(name: str, **kwargs: Any) -> Any:
        trusted.append(kwargs["trust_remote_code"])
        model = original(name, **kwargs)
        model.lm_head.weight.data[5:20] *= 1.01
        return model

    with monkeypatch.context() as patch:
        patch.setattr("lorafit.merge.AutoModelForCausalLM.from_pretrained", lossy)
        with pytest.raises(GateError, match="loaded again") as caught:
            merge(run.path, None, QUIET)
    assert trusted[-1] is True
    assert "tied" not in str(caught.value)
    assert not run.merged.exists()
