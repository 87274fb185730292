"""Packed rows do not see each other, begin at position 0, and teach what the same rows teach unpacked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS, RecipeMaker, conversation, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, MambaConfig, OPTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from wording import Like

import lorafit.engine.trainer
from lorafit.engine.data.encode import IGNORED
from lorafit.engine.data.prepare import prepare
from lorafit.engine.methods.sft import build as build_trainer
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.engine.trainer import Trainer, check_isolation
from lorafit.errors import ModelError
from lorafit.families import family_of
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe
from lorafit.run.directory import RunDir

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2", "gpt2"]
COLLATE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


def build(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    config: Any = GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4)
    if family != "gpt2":
        config = AutoConfig.for_model(family, **SIZES)
        if family.startswith("gemma"):
            config.head_dim, config.sliding_window = 16, 8  # some layers see less than a row
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def as_trainer(model: Any, collate: Any = COLLATE) -> Any:
    """What `check_isolation` needs of a trainer."""
    return SimpleNamespace(model=model, data_collator=collate, compute_loss_context_manager=contextlib.nullcontext)


@pytest.fixture
def packed_rows(recipe: RecipeMaker, tmp_path: Path) -> Any:
    """The packed and the plain rows of the same recipe."""
    words = WORDS.split()
    data = [
        conversation(" ".join(words[n % 9 : n % 9 + 2 + n % 7]), f"{words[n % 20]} {n} " * (1 + n % 4))
        for n in range(40)
    ]
    file = write_jsonl(tmp_path / "packed.jsonl", data)

    def go(**training: Any) -> Any:
        path = recipe(dataset={"train": [{"path": str(file)}]}, training={"max_length": 128, **training})
        plan = plan_recipe(Recipe.load(path), path, count_rows=False)
        return prepare(plan.data, load_tokenizer(plan)), plan

    return go


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, kind) for family in FAMILIES for kind in ("sdpa", "eager") if kind == "eager" or family_of(family).sdpa],
)
def test_logits_of_a_packed_row_are_those_of_the_row_alone(family: str, attention: str, packed_rows: Any) -> None:
    packed = packed_rows(packing=True)[0].train
    plain = {tuple(row["input_ids"]): row["labels"] for row in packed_rows()[0].train}
    model = build(family, attention)
    check_isolation(as_trainer(model))
    for chosen in ([packed[0]], list(packed.select(range(3)))):  # one packed row a batch, and several
        batch = COLLATE(chosen)
        lengths = [length for row in chosen for length in row["seq_lengths"]]
        assert len(lengths) > 1
        labels = batch.pop("labels")[0].tolist()
        with torch.no_grad():
            together = model(**batch, use_cache=False).logits[0]
        start = 0
        for length in lengths:
            ids = batch["input_ids"][0, start : start + length]
            with torch.no_grad():
                alone = model(input_ids=ids[None], use_cache=False).logits[0]
            torch.testing.assert_close(together[start : start + length], alone, rtol=0, atol=1e-4)
            assert labels[start + 1 : start + length] == plain[tuple(ids.tolist())][1:]
            start += length


def test_the_same_rows_and_labels_are_packed(packed_rows: Any) -> None:
    packed, plain = packed_rows(packing=True)[0], packed_rows()[0]
    assert packed.audit.training_rows.packs == len(packed.train) < len(plain.train) / 3
    found = []
    for row in packed.train:
        assert len(row["input_ids"]) <= 128
        start = 0
        for length in row["seq_lengths"]:
            found.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
        assert start == len(row["input_ids"])
    assert sorted(found) == sorted((row["input_ids"], row["labels"]) for row in plain.train)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_over_a_packed_epoch_is_that_of_an_unpacked_one(
    attention: str, packed_rows: Any, tmp_path: Path, recipe: RecipeMaker
) -> None:
    """Through the trainer's own batches and loss, summed over an epoch."""
    losses = {}
    for packing in (False, True):
        data, plan = packed_rows(packing=packing)
        plan.model_kwargs["attn_implementation"] = attention
        run = RunDir(tmp_path / f"run-{packing}")
        trainer: Trainer = build_trainer(plan, run, data, load_tokenizer(plan))
        trainer.model.eval()
        count, total = 0, 0.0
        for batch in trainer.get_train_dataloader():
            labels = batch["labels"][:, 1:]
            learned = int((labels != IGNORED).sum())
            with torch.no_grad():
                loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(learned))
            total += float(loss) * learned
            count += learned
        losses[packing] = (count, total / count)
    assert losses[True][0] == losses[False][0]
    assert losses[True][1] == pytest.approx(losses[False][1], rel=1e-5)


# --- refused where rows can't be kept apart -------------------------------------------------------


def test_an_attention_that_ignores_positions_is_refused() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=384,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
        word_embed_proj_dim=64,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"packed rows .*\bopt model .*training\.packing: false"):
        check_isolation(as_trainer(model))


def test_a_recurrent_state_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=384, hidden_size=64, num_hidden_layers=2, state_size=8)
    )
    with pytest.raises(ModelError, match=r"see each other .*mamba model"):
        check_isolation(as_trainer(model))


def test_what_transformers_itself_refuses_is_one_line() -> None:
    config = AutoConfig.for_model("lfm2", **SIZES, layer_types=["conv", "full_attention"])
    with pytest.raises(ModelError, match=r"packed .*lfm2 model .*training\.packing: false"):
        check_isolation(as_trainer(AutoModelForCausalLM.from_config(config)))


def test_positions_that_do_not_begin_anew_are_refused() -> None:
    """GPT-2 learns its positions, so a row that begins at position 7 is another row."""

    def shifted(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = COLLATE(rows)
        lengths = rows[0]["seq_lengths"]
        if len(lengths) > 1:
            size = sum(lengths)
            mask = torch.ones(size, size, dtype=torch.bool).tril()
            mask[lengths[0] :, : lengths[0]] = False
            batch["attention_mask"] = torch.zeros(1, 1, size, size).masked_fill(~mask, torch.finfo(torch.float32).min)
            batch["position_ids"] = torch.arange(size)[None]
        return {key: batch[key] for key in ("input_ids", "labels", "position_ids", "attention_mask") if key in batch}

    with pytest.raises(ModelError, match=r"position 0 .*gpt2 model"):
        check_isolation(as_trainer(build("gpt2", "eager"), shifted))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_proof_does_not_change_the_run(attention: str) -> None:
    model = build("llama", attention).train()
    before = torch.get_rng_state()
    check_isolation(as_trainer(model))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_training_is_refused_before_the_first_step(recipe: RecipeMaker, tmp_path: Path, tiny_model: Path) -> None:
    """With a real command: an OPT model can't be packed, and without packing it trains."""
    import shutil

    folder = tmp_path / "opt"
    config = OPTConfig(
        vocab_size=384,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=128,
        word_embed_proj_dim=64,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, folder)
    if (tiny_model / "chat_template.jinja").is_file():
        shutil.copy(tiny_model / "chat_template.jinja", folder)

    def train(*more: str) -> Any:
        path = recipe("opt", model={"name_or_path": str(folder)}, lora={"target_modules": ["q_proj", "v_proj"]})
        command = [sys.executable, "-m", "lorafit", "train", str(path), *more]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)

    done = train("--set", "training.packing=true")
    assert done.returncode == 4, done.stderr
    assert done.stderr.splitlines()[-1] == Like("… packed rows … opt model")
    assert not RunDir(tmp_path / "runs" / "opt").metrics.exists()
    done = train()
    assert done.returncode == 0, done.stderr


def test_the_thresholds_are_above_rounding() -> None:
    """In bfloat16, where rounding is largest, isolated rows still pass and mixed ones do not."""
    check_isolation(as_trainer(build("llama", "sdpa").to(torch.bfloat16)))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=384, hidden_size=64, num_hidden_layers=2, state_size=8)
    ).to(torch.bfloat16)
    with pytest.raises(ModelError):
        check_isolation(as_trainer(model))
    assert lorafit.engine.trainer.FIRST != lorafit.engine.trainer.SECOND
