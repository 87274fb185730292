"""Tiny models, tokenizers and data, built here: the tests need no network and no downloads."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lorafit-tests-")
os.fsync = lambda _: None  # nothing here has to outlive a power cut, and a disk takes its time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model first: no file takes longer, and another process runs the others meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What was imported is put aside: each training collects garbage, and would look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = (
    "the cat sat on a mat and saw one two three four red green blue dogs; say yes or no: hello there! "
    "user assistant system"
)


def make_tokenizer(
    folder: Path, template: str | None = CHATML, pad: str | None = "<|endoftext|>", **special: str
) -> Path:
    """A small byte-level tokenizer with ChatML's special tokens, saved to a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([WORDS] * 4, trainer)
    tokens = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)
    if pad is not None:
        tokenizer.pad_token = pad
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def make_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Llama of 2 layers (about 60 thousand parameters) with a tokenizer, saved to a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 128,  # 4-bit kernels on a CPU want multiples of 64
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**values | changes)).save_pretrained(folder)
    return make_tokenizer(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """24 short conversations of different lengths."""
    words = WORDS.split()
    data = [conversation(" ".join(words[i : i + 2 + i % 4]), " ".join(words[-i - 3 :][: 1 + i % 3])) for i in range(24)]
    return write_jsonl(tmp_path / "rows.jsonl", data)


RecipeMaker = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, rows: Path) -> RecipeMaker:
    """Write a small recipe that trains in a moment; keyword arguments are merged into its sections."""

    def make(name: str = "recipe", **sections: Any) -> Path:
        content: dict[str, Any] = {
            "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
            "dataset": {"train": [{"path": str(rows)}]},
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-2,
                "max_length": 128,
            },
            "output_dir": str(tmp_path / "runs" / name),
        }
        for section, values in sections.items():
            if isinstance(values, dict) and isinstance(content.get(section), dict):
                content[section] = {k: v for k, v in (content[section] | values).items() if v is not ...}
            elif values is ...:
                content.pop(section, None)
            else:
                content[section] = values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    return make


Train = Callable[..., Any]


@pytest.fixture
def train() -> Train:
    """Train a recipe file in this process; returns the RunDir."""
    from rich.console import Console

    from lorafit.engine.train import train as run_training
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe
    from lorafit.run.manifest import Start

    def go(path: Path, *overrides: str, resume: bool = False, overwrite: bool = False) -> Any:
        plan = plan_recipe(Recipe.load(path, overrides), path)
        return run_training(plan, path.read_bytes(), Start(resume, overwrite), Console(stderr=True))

    return go


def resealed(run: Any) -> None:
    """Record a finished run's files as they are now: as if the run had written them so."""
    from lorafit.files import seal
    from lorafit.run.manifest import hashes

    seal(run.result, run.result.name)
    run.write_manifest(run.read_manifest() | {"files": hashes(run, run.result, run.result.name)})


def as_planned(run: Any, **changes: Any) -> None:
    """Change a run's stored plan: as if it had been made on another machine."""
    plan = json.loads(run.plan_file.read_text())
    for name, value in changes.items():
        plan[name] = plan[name] | value
    run.plan_file.write_text(json.dumps(plan))
    if run.result is not None:
        resealed(run)
