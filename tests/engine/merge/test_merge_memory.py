"""A merge needs memory for a tensor, not for a model."""

from __future__ import annotations

import io
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from lorafit.engine.merge.run import merge
from lorafit.options import MergeOptions

SLACK = 48 << 20
"""Bytes for what is not tensors: modules, buffers of the writer, the C library's heap."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 105 million parameters in bfloat16; its largest matrices have 12.6 and 25 million."""
    folder = tmp_path_factory.mktemp("memory") / "base"
    shape: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 1,
        "vocab_size": 12288,
    }
    make_model(folder, num_attention_heads=16, num_key_value_heads=16, **shape)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def measured(adapter: Path, output: Path, base: Path, answer: Any) -> None:

    torch.set_num_threads(2)
    before, over, peaks = anonymous(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(0.002):
            peaks.append(anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    merge(MergeOptions(adapter, output=output, base=str(base), verify="weights"), Console(file=io.StringIO()))
    over.set()
    thread.join()
    answer.put(max(peaks) - before)


@pytest.mark.parametrize(
    "kind",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "dora", "embeddings", "saved head"],
)
def test_the_peak_is_the_adapter_and_four_copies_of_a_tensor(kind: dict[str, Any], base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | kind
    peft = get_peft_model(model, LoraConfig(**config))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.02)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapted = [p for n, p in model.named_parameters() if "base_layer.weight" in n or "original_module.weight" in n]
    largest = max(p.numel() for p in adapted)
    held = sum(p.numel() * 4 for n, p in peft.named_parameters() if "lora_" in n or "modules_to_save" in n)
    del model, peft
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorafit.engine.merge.run"])
    answer = context.Queue()
    process = context.Process(target=measured, args=(tmp_path / "adapter", tmp_path / "merged", base, answer))
    process.start()
    peak = answer.get(timeout=120)
    process.join()
    assert peak < held + 4 * 4 * largest + SLACK
    assert peak < 105e6 * 4, "less than the model in float32"
