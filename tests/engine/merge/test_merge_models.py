"""The streaming merge against PEFT's own, by architecture and by everything an adapter can hold.

Each case makes an adapter with trained-looking values, merges it tensor by tensor, and compares with what
PEFT's merge_and_unload saves (to the byte), or with the answers of the adapter on its base.
"""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lorafit.engine.merge.edits import Combination
from lorafit.engine.merge.folder import write_config
from lorafit.engine.merge.run import check_headers
from lorafit.engine.merge.skeleton import attach, empty_model, read_config, resized
from lorafit.engine.merge.stream import Merged, stream
from lorafit.engine.merge.task import RoundTrip, Task
from lorafit.engine.merge.tensors import Store, write_index
from lorafit.engine.merge.verify import in_float32
from lorafit.errors import ModelError

VOCABULARY = 160
IDS = torch.arange(3, 60)[None]
BF16, F32 = torch.bfloat16, torch.float32
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "gpt2": {"intermediate_size": ..., "num_key_value_heads": ..., "n_inner": 128},
    "gpt_neox": {"num_key_value_heads": ...},
    "mixtral": {"num_local_experts": 5},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "intermediate_size": 64},
    # beyond the usual dozen: other names, biases, norms and fused projections
    "gemma": {"head_dim": 16},
    "phi": {},
    "starcoder2": {},
    "stablelm": {},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "falcon": {"intermediate_size": ..., "num_key_value_heads": ..., "ffn_hidden_size": 128},
    "opt": {"intermediate_size": ..., "num_key_value_heads": ..., "ffn_dim": 128, "word_embed_proj_dim": 64},
    "bloom": {"intermediate_size": ..., "num_key_value_heads": ..., "max_position_embeddings": ...},
}
EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


# --- bases and adapters ---------------------------------------------------------------------------


def make_base(
    folder: Path, kind: str = "llama", dtype: torch.dtype = BF16, shards: str = "1GB", **changes: Any
) -> Path:
    """A random model with nothing left at one or zero, as save_pretrained writes it."""
    values = COMMON | ARCHITECTURES[kind] | changes
    config = AutoConfig.for_model(kind, **{key: value for key, value in values.items() if value is not ...})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=F32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


Bases = Callable[..., Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Base models, each made once."""
    root, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def base(kind: str = "llama", dtype: torch.dtype = BF16, **changes: Any) -> Path:
        name = f"{kind}-{dtype}-{changes}"
        if name not in made:
            made[name] = make_base(root / str(len(made)), kind, dtype, **changes)
        return made[name]

    return base


def load(folder: Path, dtype: torch.dtype = F32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def train_a_little(model: torch.nn.Module, seed: int, size: float = 0.05) -> None:
    """Give every trainable parameter of an adapter a value that training could have given it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape)
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape))
            elif "lora_A" in name or "embedding_A" in name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(size * noise)


def adapt(
    base: Path, folder: Path, dtype: torch.dtype = F32, seed: int = 1, rows: int | None = None, **config: Any
) -> Path:
    """Save an adapter on a base as PEFT does.

    Args:
        rows: resize the vocabulary to.
        config: of LoraConfig; without targets, every linear layer's.
    """
    model = load(base, dtype)
    if rows is not None:
        model.resize_token_embeddings(rows)
    values = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config
    if not {"target_modules", "target_parameters"} & set(config):
        values["target_modules"] = "all-linear"
    peft = get_peft_model(model, LoraConfig(**values))
    train_a_little(peft, seed)
    peft.save_pretrained(folder, save_embedding_layers=True if rows is not None else "auto")
    return folder


# --- the two ways to merge ------------------------------------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """What the streaming merge wrote."""

    folder: Path
    task: Task
    merged: list[Merged]


def streamed(
    base: Path,
    adapter: Path | list[tuple[Path, float]],
    out: Path,
    combination: Combination | None = None,
    **options: Any,
) -> Streamed:
    """Merge one adapter, or several with their weights, tensor by tensor."""
    several = adapter if isinstance(adapter, list) else [(adapter, 1.0)]
    config, vocabulary = read_config(base), None
    attached = []
    for path, weight in several:
        rows = resized(path, config)
        if rows is not None:
            config.get_text_config().vocab_size = vocabulary = rows
        attached.append((attach(empty_model(config), path), weight))
    task = Task(Store(base), empty_model(config), attached, combination, **options)
    out.mkdir()
    done: list[int] = []
    merged = stream(task, out, done.append)
    write_index(task.shards, base, out)
    assert sum(done) == task.bytes == Store(out).bytes, "progress adds up to what is written"
    write_config(base, out, None, task.parted, vocabulary)
    check_headers(task, out)
    return Streamed(out, task, merged)


def by_peft(base: Path, adapter: Path, out: Path, dtype: torch.dtype = BF16) -> Path:
    """Merge as PEFT's documentation has it."""
    model = PeftModel.from_pretrained(load(base, dtype), adapter).merge_and_unload()
    model.to(BF16).save_pretrained(out)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def assert_a_step_apart(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor, share: float) -> None:
    """At most one bfloat16 step between two merged weights, and no more than a share of them apart.

    The step is that of the largest number in the sum (8 bits of mantissa): on embeddings and experts PEFT
    rounds the delta to bfloat16, adds it and rounds again, where the sum is to be rounded once.
    """
    assert ours.shape == theirs.shape == base.shape
    assert ours.dtype == theirs.dtype == BF16
    largest = torch.stack([ours.float().abs(), theirs.float().abs(), base.float().abs()]).amax(0)
    step = 2.0 ** (torch.floor(torch.log2(largest)) - 7)
    assert ((ours.float() - theirs.float()).abs() <= step).all()
    assert (ours != theirs).float().mean() <= share


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def assert_answers(base: Path, adapter: Path, merged: Path, rows: int | None = None, ids: torch.Tensor = IDS) -> None:
    """The merged folder, loaded by transformers alone, answers as the adapter on its base does (float32)."""
    on_base = load(base)
    plain = logits(on_base, ids % VOCABULARY)
    if rows is not None:
        on_base.resize_token_embeddings(rows)
    expected = logits(PeftModel.from_pretrained(on_base, adapter), ids)
    model, info = AutoModelForCausalLM.from_pretrained(merged, dtype=F32, output_loading_info=True)
    assert not info["missing_keys"], info["missing_keys"]
    found = logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    both = min(expected.shape[-1], VOCABULARY)
    assert (expected[..., :both] - plain[..., :both]).abs().max() > 1e-2, (
        "the adapter changes nothing, so this shows nothing"
    )


# --- against PEFT, to the byte --------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_merged_weights_are_pefts_to_the_byte(architecture: str, kind: str, bases: Bases, tmp_path: Path) -> None:
    base = bases(architecture)
    targets = {"target_modules": ATTENTION} if architecture in EXPERTS else {}
    adapter = adapt(base, tmp_path / "adapter", BF16, **KINDS[kind], **targets)
    ours = streamed(base, adapter, tmp_path / "ours")
    found, expected, before = weights(ours.folder), weights(by_peft(base, adapter, tmp_path / "peft")), weights(base)
    assert found.keys() == expected.keys() == before.keys()
    assert [key for key in expected if not same_bytes(found[key], expected[key])] == []
    changed = {key for key in before if not same_bytes(found[key], before[key])}
    written = {key for job in ours.task.jobs for key in job.writes}
    assert changed == written, "every target is merged, and nothing else is touched"
    assert len(changed) == len(ours.merged) >= 4 * (2 if architecture != "phi3" else 1)
    assert not ours.task.unknown
    assert not ours.task.untied


@pytest.mark.parametrize("kind", ["lora", "rslora"])  # PEFT has no DoRA on bare parameters
@pytest.mark.parametrize("architecture", EXPERTS)
def test_merged_experts_are_pefts_to_one_step(architecture: str, kind: str, bases: Bases, tmp_path: Path) -> None:
    base = bases(architecture)
    adapter = adapt(
        base, tmp_path / "adapter", BF16, target_modules=ATTENTION, target_parameters=FUSED, lora_dropout=0.0,
        **KINDS[kind],
    )  # fmt: skip
    ours = streamed(base, adapter, tmp_path / "ours")
    found, before = weights(ours.folder), weights(base)
    expected = weights(by_peft(base, adapter, tmp_path / "peft"))
    assert found.keys() == expected.keys() == before.keys()
    touched = 0
    for key, tensor in found.items():
        if ".experts." in key and "bias" not in key:
            assert_a_step_apart(tensor, expected[key], before[key], share=0.4)
            assert not same_bytes(tensor, before[key])
            touched += 1
        else:
            assert same_bytes(tensor, expected[key]), key
    assert touched == {"mixtral": 2 * 5 * 3, "qwen3_moe": 2 * 4 * 3, "gpt_oss": 2 * 2}[architecture]
    # PEFT on a float32 base, rounded once at the end, is what both should be
    exact = weights(by_peft(base, adapter, tmp_path / "exact", F32))
    assert [key for key in exact if not same_bytes(found[key], exact[key])] == []


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt_neox"])
def test_merged_embeddings_are_pefts_in_float32(architecture: str, kind: str, bases: Bases, tmp_path: Path) -> None:
    """On a 16-bit base PEFT keeps the embeddings' adapter in 16 bits, and its delta; in float32 it gives our bytes."""
    base = bases(architecture)
    name = {"gpt_neox": "embed_in"}.get(architecture, "embed_tokens")
    adapter = adapt(base, tmp_path / "adapter", BF16, target_modules=[name], **KINDS[kind])
    ours = weights(streamed(base, adapter, tmp_path / "ours").folder)
    theirs, before = weights(by_peft(base, adapter, tmp_path / "peft")), weights(base)
    exact = weights(by_peft(base, adapter, tmp_path / "exact", F32))
    for key, tensor in ours.items():
        if name in key:
            assert same_bytes(tensor, exact[key])
            assert not same_bytes(tensor, before[key])
        else:
            assert same_bytes(tensor, theirs[key])
            assert same_bytes(tensor, before[key])


@pytest.mark.parametrize("architecture", EXPERTS)
def test_merged_experts_answer_as_the_adapter_does(architecture: str, bases: Bases, tmp_path: Path) -> None:
    base = bases(architecture, F32)
    adapter = adapt(base, tmp_path / "adapter", target_modules=ATTENTION, target_parameters=FUSED, lora_dropout=0.0)
    assert_answers(base, adapter, streamed(base, adapter, tmp_path / "ours").folder)


# --- some rows at a time --------------------------------------------------------------------------

IN_CHUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "dora": ("llama", {"use_dora": True}),
    "columns": ("gpt2", {}),  # PEFT's Conv1D: not by rows, and never wrong
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings-dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "modules-to-save": ("llama", {"modules_to_save": ["lm_head"]}),
    "experts": ("mixtral", {"target_modules": ATTENTION, "target_parameters": FUSED, "lora_dropout": 0.0}),
    "experts-in-one-tensor": (
        "gpt_oss",
        {"target_modules": ATTENTION, "target_parameters": FUSED, "lora_dropout": 0.0},
    ),
}


@pytest.mark.parametrize("limit", [2 << 10, 10_000])
@pytest.mark.parametrize("case", list(IN_CHUNKS))
def test_rows_at_a_time_give_the_same_bytes(
    case: str, limit: int, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, lora = IN_CHUNKS[case]
    base = bases(architecture)
    adapter = adapt(base, tmp_path / "adapter", BF16, **lora)
    whole = streamed(base, adapter, tmp_path / "whole")
    assert all(list(job.chunks()) == [None] for job in whole.task.jobs)
    monkeypatch.setattr("lorafit.engine.merge.task.CHUNK", limit)
    monkeypatch.setattr("lorafit.engine.merge.task.SMALL", limit)
    parts = streamed(base, adapter, tmp_path / "parts")
    by_job = {job.parameter: [rows for rows in job.chunks() if rows] for job in parts.task.jobs}
    if case not in ("columns", "embeddings-dora"):
        assert any(len(rows) > 1 for rows in by_job.values())
    for job in parts.task.jobs:
        rows = by_job[job.parameter]
        if rows:
            assert [row for chunk in rows for row in range(chunk.start, chunk.stop)] == list(range(job.shape[0]))
        if "experts" in job.parameter:
            assert [chunk.stop - chunk.start for chunk in rows] == ([2, 3] if architecture == "mixtral" else [2, 2])
    one, other = weights(whole.folder), weights(parts.folder)
    assert one.keys() == other.keys()
    for key in one:
        if "embed" in key and case.startswith("embeddings"):  # columns of A: sums can have another order
            assert_a_step_apart(one[key], other[key], weights(base)[key], share=0.01)
        else:
            assert same_bytes(one[key], other[key]), key
    for mine, its in zip(whole.merged, parts.merged, strict=True):
        assert mine.parameter == its.parameter
        assert mine.relative == pytest.approx(its.relative, rel=1e-5), "the report does not depend on the chunks"


@pytest.mark.parametrize("case", ["lora", "experts", "embeddings"])
def test_combining_rows_at_a_time_gives_the_same_bytes(
    case: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, lora = IN_CHUNKS[case]
    base = bases(architecture)
    adapters = [
        (adapt(base, tmp_path / name, BF16, seed, r=rank, **lora), weight)
        for seed, (name, rank, weight) in enumerate([("a", 4, 1.0), ("b", 2, -0.5)], 1)
    ]
    whole = weights(streamed(base, adapters, tmp_path / "whole").folder)
    monkeypatch.setattr("lorafit.engine.merge.task.CHUNK", 2 << 10)
    monkeypatch.setattr("lorafit.engine.merge.task.SMALL", 2 << 10)
    parts = weights(streamed(base, adapters, tmp_path / "parts").folder)
    assert [key for key in whole if not same_bytes(whole[key], parts[key])] == []


# --- what an adapter can hold ---------------------------------------------------------------------

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 32, ".*o_proj": 1}},
    ),
    "patterns-rslora": ("qwen3", {"rank_pattern": {"^model.layers.0.*": 3}, "use_rslora": True}),
    "one-layer": ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}),
    "excluded": ("llama", {"exclude_modules": ["lm_head", "k_proj"]}),
    "bias-all": ("qwen2", {"bias": "all"}),
    "bias-lora-only": ("qwen2", {"bias": "lora_only"}),
    "bias-all-gpt2": ("gpt2", {"bias": "all"}),
    "bias-lora-only-gpt2": ("gpt2", {"bias": "lora_only"}),
    "lora-bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embeddings": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "both": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["input_layernorm", "norm"]}),
    "norms-with-bias": ("gpt2", {"modules_to_save": ["ln_f", "ln_1"]}),
    "lora-on-head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "lora-on-embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora-on-embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "lora-on-both": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tokens": ("llama", {"trainable_token_indices": [3, 7, 150]}),
    "tokens-by-name": ("gemma2", {"trainable_token_indices": {"embed_tokens": [3, 9]}}),
    "scaled-embeddings": ("gemma3_text", {"target_modules": ["embed_tokens", "q_proj"]}),
    "everything": (
        "qwen2",
        {"use_dora": True, "bias": "lora_only", "modules_to_save": ["lm_head"], "trainable_token_indices": [4]},
    ),
}


@pytest.mark.parametrize("case", list(SHAPES))
def test_the_merged_model_answers_as_the_adapter_does(case: str, bases: Bases, tmp_path: Path) -> None:
    architecture, lora = SHAPES[case]
    base = bases(architecture, F32)
    adapter = adapt(base, tmp_path / "adapter", **lora)
    ours = streamed(base, adapter, tmp_path / "ours")
    assert_answers(base, adapter, ours.folder)
    before, after = weights(base), weights(ours.folder)
    changed = {key for key in before if not same_bytes(before[key], after[key])}
    if case == "bias-all":
        assert {key for key in before if key.endswith("bias")} <= changed
    if case == "bias-lora-only":
        assert {key for key in before if key.endswith("_proj.bias")} <= changed
    if case == "lora-bias":
        assert sum(key.endswith(".bias") for key in changed) == 2 * 3
    if case == "one-layer":
        assert len(changed) == 2
        assert all(".layers.1." in key for key in changed)
    if case == "tokens":
        rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
        assert rows.nonzero().flatten().tolist() == [3, 7, 150]


def test_a_lora_bias_without_a_bias_to_add_it_to_is_refused(bases: Bases, tmp_path: Path) -> None:
    from lorafit.errors import ModelError

    base = bases("llama", F32)
    adapter = adapt(base, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="lora_bias"):
        streamed(base, adapter, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


# --- tied embeddings ------------------------------------------------------------------------------

TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "linear": ({}, False),
    "tokens": ({"trainable_token_indices": [3, 7]}, False),
    "head": ({"modules_to_save": ["lm_head"]}, True),
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, True),
    "both-apart": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "kept-tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "lora-on-embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "dora-on-embeddings": ({"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, True),
    "lora-on-head": ({"target_modules": ["lm_head", "q_proj"]}, True),
    "lora-on-both": ({"target_modules": ["embed_tokens", "lm_head"]}, True),
}
"""Adapters on a model with tied embeddings, and whether the two must part."""


@pytest.mark.parametrize("stored", ["once", "twice"])
@pytest.mark.parametrize("case", list(TIED))
def test_tied_embeddings_part_only_where_the_adapter_parts_them(
    case: str, stored: str, bases: Bases, tmp_path: Path
) -> None:
    lora, parts = TIED[case]
    base = bases("llama", F32, tie_word_embeddings=True)
    if stored == "twice":  # as some checkpoints on the hub have it
        base = copied(
            base, tmp_path / "base", lambda tensors: tensors | {"lm_head.weight": tensors[EMBEDDINGS].clone()}
        )
    adapter = adapt(base, tmp_path / "adapter", **lora)
    ours = streamed(base, adapter, tmp_path / "ours")
    assert_answers(base, adapter, ours.folder)
    found = weights(ours.folder)
    if stored == "once":
        assert set(ours.task.untied) == ({"lm_head.weight"} if parts else set())
        assert found.keys() == weights(base).keys() | ({"lm_head.weight"} if parts else set())
    else:
        assert found.keys() == weights(base).keys()
        assert torch.equal(found["lm_head.weight"], found[EMBEDDINGS]) is not parts
    config = json.loads((ours.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is not parts


EMBEDDINGS = "model.embed_tokens.weight"


def copied(base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A base whose checkpoint is not as save_pretrained writes it today."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    save_file(change(weights(base)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_tied_embeddings_of_several_adapters(bases: Bases, tmp_path: Path) -> None:
    """One adapter parts what the other keeps tied: the other's tokens change both tensors."""
    base = bases("llama", F32, tie_word_embeddings=True)
    parting = adapt(base, tmp_path / "one", target_modules=["embed_tokens"])
    tokens = adapt(base, tmp_path / "two", trainable_token_indices=[3, 7], target_modules=["q_proj"])
    found = weights(streamed(base, [(parting, 1.0), (tokens, 1.0)], tmp_path / "ours").folder)
    before = weights(base)[EMBEDDINGS]
    alone = weights(streamed(base, tokens, tmp_path / "alone").folder)[EMBEDDINGS]
    head = found["lm_head.weight"]
    torch.testing.assert_close(head, alone, rtol=0, atol=1e-6)
    assert torch.equal((head != before).any(1).nonzero().flatten(), torch.tensor([3, 7]))
    by_lora = weights(streamed(base, parting, tmp_path / "lora").folder)[EMBEDDINGS]
    torch.testing.assert_close(found[EMBEDDINGS], by_lora + alone - before, rtol=0, atol=1e-5)


# --- a vocabulary that grew -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [VOCABULARY + 8, VOCABULARY - 8])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["saved", "lora", "beside"],
)
def test_a_resized_vocabulary_comes_with_the_adapter(
    lora: dict[str, Any], tied: bool, rows: int, bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama", F32, tie_word_embeddings=tied)
    adapter = adapt(base, tmp_path / "adapter", rows=rows, **lora)
    assert resized(adapter, read_config(base)) == rows
    if not tied and "embed_tokens" in lora.get("target_modules", ()):  # PEFT doesn't save the head then
        with pytest.raises(ModelError, match=r"lm_head.weight has the shape"):
            streamed(base, adapter, tmp_path / "ours")
        return
    ours = streamed(base, adapter, tmp_path / "ours")
    last = torch.tensor([[3, 5, rows - 1, rows - 4, 9]])
    assert_answers(base, adapter, ours.folder, rows, last)
    assert len(weights(ours.folder)[EMBEDDINGS]) == rows
    assert json.loads((ours.folder / "config.json").read_text())["vocab_size"] == rows


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_shards_keep_their_layout(architecture: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", architecture, shards="50KB")
    lora = {"target_modules": ATTENTION} if architecture == "mixtral" else {}
    adapter = adapt(base, tmp_path / "adapter", BF16, **lora)
    ours = streamed(base, adapter, tmp_path / "ours").folder
    before, after = sorted(base.glob("*.safetensors")), sorted(ours.glob("*.safetensors"))
    assert [file.name for file in before] == [file.name for file in after]
    assert len(before) >= 3
    for one, other in zip(before, after, strict=True):
        assert one.stat().st_size == other.stat().st_size
        length = 8 + int.from_bytes(one.read_bytes()[:8], "little")
        assert one.read_bytes()[:length] == other.read_bytes()[:length], "the very same header"
    old, new = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (base, ours))
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(ours).values())
    assert new["metadata"] == old["metadata"]
    expected = weights(by_peft(base, adapter, tmp_path / "peft"))
    assert all(same_bytes(tensor, expected[key]) for key, tensor in weights(ours).items())


def test_untying_in_shards_adds_one_tensor_and_counts_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=F32, shards="100KB", tie_word_embeddings=True)
    adapter = adapt(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    ours = streamed(base, adapter, tmp_path / "ours").folder
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == index["weight_map"][EMBEDDINGS]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(ours).values())
    assert_answers(base, adapter, ours)


def test_gpt2_without_its_prefix(bases: Bases, tmp_path: Path) -> None:
    base = copied(
        bases("gpt2", F32),
        tmp_path / "base",
        lambda tensors: {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()},
    )
    assert "h.0.attn.c_attn.weight" in weights(base)
    adapter = adapt(base, tmp_path / "adapter")
    ours = streamed(base, adapter, tmp_path / "ours")
    assert weights(ours.folder).keys() == weights(base).keys()
    assert len(ours.merged) == 2 * 4
    assert_answers(base, adapter, ours.folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_unknown_tensors_are_kept(architecture: str, bases: Bases, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "future.counter": torch.arange(3),
        "future.eight_bits": torch.rand(3, 5).to(torch.float8_e4m3fn),
        "future.odd": torch.rand(3).to(BF16),
    }
    base = copied(bases(architecture), tmp_path / "base", lambda tensors: tensors | extra)
    lora = {"target_modules": ATTENTION} if architecture == "mixtral" else {}
    ours = streamed(base, adapt(base, tmp_path / "adapter", BF16, **lora), tmp_path / "ours")
    found = weights(ours.folder)
    assert sorted(ours.task.unknown) == sorted(extra)
    assert all(same_bytes(found[key], tensor) for key, tensor in extra.items())


@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_another_type_is_one_rounding(dtype: torch.dtype, bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = adapt(base, tmp_path / "adapter", BF16)
    ours = weights(streamed(base, adapter, tmp_path / "ours", dtype=dtype).folder)
    exact = PeftModel.from_pretrained(load(base, F32), adapter).merge_and_unload().to(dtype).state_dict()
    assert all(same_bytes(tensor, exact[key]) for key, tensor in ours.items())
    assert ours.keys() == exact.keys()


# --- bitsandbytes ---------------------------------------------------------------------------------

FOUR_BIT = [
    {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    for kind in ("nf4", "fp4")
    for double in (True, False)
]
FOUR_BIT_NAMES = ["nf4-double", "nf4", "fp4-double", "fp4"]


def quantized(base: Path, kwargs: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**kwargs), dtype=dtype, device_map={"": "cpu"}
    )


def dequantized(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The numbers that the layers of a 4-bit model stand for, by parameter."""
    import bitsandbytes as bnb

    return {
        f"{name}.weight": bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])
@pytest.mark.parametrize("kwargs", FOUR_BIT, ids=FOUR_BIT_NAMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "gemma2"])
def test_the_round_trip_is_what_a_4_bit_model_holds(
    architecture: str, kwargs: dict[str, Any], dtype: torch.dtype, bases: Bases
) -> None:
    base = bases(architecture)
    trip = RoundTrip(read_config(base), kwargs, dtype)
    expected = dequantized(quantized(base, kwargs, dtype))
    assert trip.parameters == expected.keys(), "transformers' own choice of layers (never the head)"
    plain = load(base, BF16).state_dict()
    for name, theirs in expected.items():
        ours = trip(name, plain[name])
        # transformers keeps GPT-2's layers the way bitsandbytes wants them: turned
        assert torch.equal(ours.T if architecture == "gpt2" else ours, theirs), name
        assert ours.dtype == theirs.dtype == dtype
        assert not torch.equal(ours.float(), plain[name].float())
    other = next(name for name in plain if name not in trip.parameters)
    assert torch.equal(trip(other, plain[other]), plain[other].to(dtype))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_round_trip_is_what_an_8_bit_model_holds(architecture: str, bases: Bases) -> None:
    import bitsandbytes as bnb

    base = bases(architecture)
    kwargs = {"load_in_8bit": True}
    trip = RoundTrip(read_config(base), kwargs, BF16)
    layers = {
        f"{name}.weight": module
        for name, module in quantized(base, kwargs, BF16).named_modules()
        if isinstance(module, bnb.nn.Linear8bitLt)
    }
    assert trip.parameters == layers.keys()
    plain = load(base, BF16).state_dict()
    for name, layer in layers.items():
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        theirs = bnb.functional.int8_vectorwise_dequant(layer.weight.data, scales).to(BF16)
        ours = trip(name, plain[name])
        assert torch.equal(ours.T if architecture == "gpt2" else ours, theirs), name


@pytest.mark.parametrize("kwargs", FOUR_BIT, ids=FOUR_BIT_NAMES)
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_merge_into_the_round_trip_answers_as_the_4_bit_model(
    lora: dict[str, Any], kwargs: dict[str, Any], bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama", F32)
    adapter = adapt(base, tmp_path / "adapter", **lora)
    trip = RoundTrip(read_config(base), kwargs, F32)
    ours = streamed(base, adapter, tmp_path / "ours", round_trip=trip)
    model = PeftModel.from_pretrained(in_float32(quantized(base, kwargs, F32)), adapter)
    torch.testing.assert_close(logits(load(ours.folder)), logits(model), rtol=1e-3, atol=1e-4)
    assert (logits(load(ours.folder)) - logits(load(base))).abs().max() > 0.05


@pytest.mark.parametrize("kwargs", FOUR_BIT, ids=FOUR_BIT_NAMES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_base_stored_in_4_bits_becomes_a_plain_one(
    architecture: str, kwargs: dict[str, Any], bases: Bases, tmp_path: Path
) -> None:
    packed = quantized(bases(architecture), kwargs, BF16)
    packed.save_pretrained(tmp_path / "base")
    assert any("quant_state" in key for key in weights(tmp_path / "base"))
    adapter = adapt(bases(architecture), tmp_path / "adapter", BF16)
    ours = streamed(tmp_path / "base", adapter, tmp_path / "ours")
    plain, found = weights(bases(architecture)), weights(ours.folder)
    assert found.keys() == plain.keys(), "no states, scales or maps are left"
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in plain.items()}
    held = dequantized(packed)
    with_adapter = PeftModel.from_pretrained(load(bases(architecture), F32), adapter)
    for name, module in with_adapter.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            weight = held[f"{name}.weight"]
            weight = weight.T if architecture == "gpt2" else weight
            expected = (weight.float() + module.get_delta_weight("default")).to(BF16)
            assert same_bytes(found[f"{name}.weight"], expected), name
    assert "quantization_config" not in json.loads((ours.folder / "config.json").read_text())
    load(ours.folder)


def test_a_base_stored_in_8_bits_becomes_a_plain_one(bases: Bases, tmp_path: Path) -> None:
    quantized(bases("llama"), {"load_in_8bit": True}, BF16).save_pretrained(tmp_path / "base")
    assert any(key.endswith("SCB") for key in weights(tmp_path / "base"))
    adapter = adapt(bases("llama"), tmp_path / "adapter", BF16)
    ours = streamed(tmp_path / "base", adapter, tmp_path / "ours")
    found, exact = weights(ours.folder), weights(by_peft(bases("llama"), adapter, tmp_path / "exact", F32))
    assert found.keys() == exact.keys()
    for key, tensor in found.items():
        assert torch.linalg.vector_norm(tensor.float() - exact[key].float()) < 0.02 * exact[key].float().norm()


# --- several adapters -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, bases: Bases) -> tuple[Path, Path, Path]:
    """A base, and two adapters of different ranks, scales and targets."""
    folder, base = tmp_path_factory.mktemp("two"), bases("llama", F32)
    one = adapt(base, folder / "a", seed=1, r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    other = adapt(base, folder / "b", seed=2, r=2, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"])
    return base, one, other


def both(base: Path, one: Path, other: Path, factors: tuple[float, float]) -> PeftModel:
    """Two adapters at work at the same time, each times its factor."""
    model = PeftModel.from_pretrained(load(base), one, adapter_name="a")
    model.load_adapter(other, "b")
    model.base_model.set_adapter(["a", "b"])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, factor in zip("ab", factors, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= factor
    return model


@pytest.mark.parametrize("factors", [(1.0, 0.3), (1.0, -1.0), (0.5, 0.5)])
def test_combined_adapters_answer_as_both_at_work(
    factors: tuple[float, float], two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, other = two
    ours = streamed(base, [(one, factors[0]), (other, factors[1])], tmp_path / "ours")
    assert len(ours.merged) == 2 * 5
    found = logits(load(ours.folder))
    torch.testing.assert_close(found, logits(both(base, one, other, factors)), rtol=1e-4, atol=1e-4)
    assert (found - logits(both(base, one, other, (factors[0], 0.0)))).abs().max() > 1e-2
    assert (found - logits(both(base, one, other, (0.0, factors[1])))).abs().max() > 1e-2


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_pefts_linear_combination_is_another_thing(lora: dict[str, Any], bases: Bases, tmp_path: Path) -> None:
    """add_weighted_adapter adds up A and B each on its own, so that cross terms of the adapters appear."""
    base = bases("llama", F32)
    one, other = (
        adapt(base, tmp_path / name, seed=seed, target_modules=["q_proj", "v_proj"], **lora)
        for seed, name in enumerate("ab", 1)
    )
    ours = streamed(base, [(one, 1.0), (other, 0.3)], tmp_path / "ours")
    model = both(base, one, other, (1.0, 1.0))
    model.add_weighted_adapter(["a", "b"], [1.0, 0.3], "sum", combination_type="linear")
    found, before = weights(ours.folder), weights(base)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            delta = found[f"{name}.weight"] - before[f"{name}.weight"]
            exact = module.get_delta_weight("a") + 0.3 * module.get_delta_weight("b")
            torch.testing.assert_close(delta, exact.detach(), rtol=1e-4, atol=1e-6)
            theirs = module.get_delta_weight("sum").detach()
            assert torch.linalg.vector_norm(theirs - delta) > 0.3 * torch.linalg.vector_norm(delta)
    # PEFT's `cat` is exact, where it can be had: the ranks add up, and the scale must not depend on the rank
    if not lora:
        model.add_weighted_adapter(["a", "b"], [1.0, 0.3], "cat", combination_type="cat")
        model.base_model.set_adapter("cat")
        torch.testing.assert_close(logits(load(ours.folder)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.3, 0.7])
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_voting_and_pruning_are_pefts_on_the_full_deltas(
    method: Any, density: float, two: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, other = two
    factors, seed = (1.0, 0.4), 5
    state = torch.get_rng_state()
    ours = streamed(base, [(one, 1.0), (other, 0.4)], tmp_path / "ours", Combination(method, density, seed))
    assert torch.equal(torch.get_rng_state(), state), "what is dropped leaves no trace in the random state"
    again = streamed(base, [(one, 1.0), (other, 0.4)], tmp_path / "again", Combination(method, density, seed))
    model = both(base, one, other, (1.0, 1.0))
    found, before, repeated = weights(ours.folder), weights(base), weights(again.folder)
    shared = 0
    for name, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        key = f"{name}.weight"
        names = [adapter for adapter in "ab" if adapter in module.scaling]
        deltas = [module.get_delta_weight(adapter).detach() for adapter in names]
        torch.manual_seed(zlib.crc32(f"{seed} {key}".encode()))
        chosen = torch.tensor([factors["ab".index(adapter)] for adapter in names])
        expected = getattr(merge_utils, method)(deltas, chosen, density)
        torch.testing.assert_close(found[key], before[key] + expected, rtol=0, atol=1e-6)
        assert torch.equal(found[key], repeated[key])
        kept = (found[key] != before[key]).float().mean()
        assert kept < 1 - (1 - density) ** len(names) + 0.05, "the rest was pruned"
        shared += len(names) == 2
    assert shared == 2
    if method.startswith("dare"):
        another = streamed(base, [(one, 1.0), (other, 0.4)], tmp_path / "b", Combination(method, density, seed + 1))
        assert not torch.equal(weights(another.folder)[key], found[key])


def test_keeping_everything_is_linear(two: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, other = two
    several = [(one, 1.0), (other, 0.4)]
    linear = weights(streamed(base, several, tmp_path / "linear").folder)
    pruned = weights(streamed(base, several, tmp_path / "pruned", Combination("magnitude_prune", 1.0)).folder)
    for key, tensor in linear.items():
        torch.testing.assert_close(tensor, pruned[key], rtol=1e-6, atol=1e-7)


def test_dora_and_lora_together(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama", F32)
    targets = ["q_proj", "down_proj"]
    dora = adapt(base, tmp_path / "a", seed=1, use_dora=True, target_modules=targets)
    lora = adapt(base, tmp_path / "b", seed=2, r=2, target_modules=[*targets, "embed_tokens"])
    ours = streamed(base, [(dora, 1.0), (lora, 0.5)], tmp_path / "ours")
    # DoRA's change is what it makes of the base's own weight; LoRA's is added to that
    alone = weights(streamed(base, dora, tmp_path / "dora").folder)
    other = weights(streamed(base, lora, tmp_path / "lora").folder)
    before, found = weights(base), weights(ours.folder)
    for key, tensor in found.items():
        expected = before[key] + (alone[key] - before[key]) + 0.5 * (other[key] - before[key])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        logits(load(ours.folder)), logits(both(base, dora, lora, (1.0, 0.5))), rtol=1e-4, atol=1e-4
    )


def test_one_adapter_at_half_its_strength(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama", F32)
    adapter = adapt(base, tmp_path / "adapter")
    ours = streamed(base, [(adapter, 0.5)], tmp_path / "ours")
    model = PeftModel.from_pretrained(load(base), adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 0.5
    torch.testing.assert_close(logits(load(ours.folder)), logits(model), rtol=1e-4, atol=1e-4)
    full = streamed(base, adapter, tmp_path / "full")
    for half, whole in zip(ours.merged, full.merged, strict=True):
        assert math.isclose(half.relative, whole.relative / 2, rel_tol=1e-4)
