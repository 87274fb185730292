"""The output head on supervised positions gives TRL's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from lorafit.engine import loss
from lorafit.errors import ModelError


def batch(supervised: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 384, (3, 17), generator=generator)
    labels = ids.clone()
    if supervised == "answers":
        labels[:, :9] = -100
        labels[1, 12:] = -100
    elif supervised == "none":
        labels[:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **more: object):
    model.zero_grad()
    output = model(**inputs, fused_lm_head=True, **more)
    (-output.log_probs.sum() / 7).backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("supervised", ["answers", "all", "none"])
@pytest.mark.parametrize("chunked", [False, True])
def test_it_equals_trls_head(supervised: str, chunked: bool, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 384 * 5)  # five positions at once
    outputs = []
    for ours in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if ours:
            loss.score_supervised_positions(model)
        outputs.append(run(model, batch(supervised), num_items_in_batch=7))
    (trl, trl_gradients), (ours_, our_gradients) = outputs
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(getattr(ours_, name), getattr(trl, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(ours_.is_top1.bool(), trl.is_top1.bool())
    assert torch.equal(ours_.label_mask, trl.label_mask)
    assert our_gradients.keys() == trl_gradients.keys()
    for name, gradient in trl_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_it_agrees_with_the_models_own_loss(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    inputs = batch("answers")
    expected = model(**inputs).loss
    add_fused_lm_head(model)
    loss.score_supervised_positions(model)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).loss, expected)
    torch.testing.assert_close(model(**inputs).loss, expected)


def test_generation_still_works(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(3, 9)[None]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    add_fused_lm_head(model)
    loss.score_supervised_positions(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


def test_only_the_supervised_positions_reach_the_head(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    loss.score_supervised_positions(model)
    scored = []
    original = loss.functional.linear

    def linear(hidden: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        if weight.shape[0] == 384:
            scored.append(hidden.shape[0])
        return original(hidden, weight, *rest)

    inputs = batch("answers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.functional, "linear", linear)
        model(**inputs, fused_lm_head=True)
    assert scored == [int((inputs["labels"][:, 1:] != -100).sum())]


def test_heads_that_scale_or_cap_their_logits_keep_trls_path(tiny_model: Path) -> None:
    assert loss.applies_to(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert not loss.applies_to(capped())


def capped() -> PreTrainedModel:
    """A model with a soft cap that TRL knows, and logits of the size at which it matters."""
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=30.0,
    )
    return loud(Gemma2ForCausalLM(config))


def loud(model: PreTrainedModel) -> PreTrainedModel:
    model.get_output_embeddings().weight.data *= 200
    return model


def test_a_head_that_is_not_what_it_seems_falls_back_to_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "applies_to", lambda _: True)
    model = capped()
    add_fused_lm_head(model)
    loss.settle_head(model)
    inputs = {"input_ids": torch.arange(12)[None], "labels": torch.arange(12)[None]}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, fused_lm_head=True).loss, model(**inputs).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_is_taken_in_every_type(dtype: torch.dtype, tiny_model: Path) -> None:
    model = loud(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype))
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    trls = model.forward
    state = torch.get_rng_state()
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.5  # the same in both, and nothing is drawn from the run's
    loss.settle_head(model)
    assert model.forward != trls
    assert torch.equal(torch.get_rng_state(), state)


def heads_that_trl_does_not_know() -> dict[str, PreTrainedModel]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    griffin = RecurrentGemmaConfig(**sizes, num_attention_heads=2, block_types=("attention",), logits_soft_cap=30.0)
    bert = BertConfig(**sizes, num_attention_heads=2, is_decoder=True)
    return {"recurrent_gemma": RecurrentGemmaForCausalLM(griffin), "bert": BertLMHeadModel(bert)}


@pytest.mark.parametrize("family", ["recurrent_gemma", "bert"])
def test_a_head_that_trl_does_not_know_is_refused(family: str) -> None:
    model = loud(heads_that_trl_does_not_know()[family])
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    with pytest.raises(ModelError, match=rf"loss .*{family} models"):
        loss.settle_head(model)
