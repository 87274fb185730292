"""The tensors that are told from a configuration are those of transformers' own classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wording import Like

from lorafit.errors import ModelError
from lorafit.facts import ModelFacts, Tensor, layout, read_facts
from lorafit.facts.layouts import as_loaded
from lorafit.families import FAMILIES

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "left out": {"num_attention_heads": 32, "hidden_size": 64},
    "plain": {"num_key_value_heads": 4},
    "grouped": {"num_key_value_heads": 2},
    "as many as heads": {"num_key_value_heads": None},
    "head_dim": {"num_key_value_heads": 1, "head_dim": 24},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "no biases": {"num_key_value_heads": 2, "attention_bias": False, "mlp_bias": False},
}
OPTIONAL_KEY_HEADS = (
    *("llama", "granite", "granitemoe", "smollm3", "qwen2", "qwen3", "phi", "phi3", "olmo", "olmo2", "olmo3"),
    *("olmoe", "seed_oss", "cohere", "cohere2", "deepseek_v2", "deepseek_v3"),
)
"""Families whose classes take a null; the others refuse it."""
NO_HEAD_DIM = ("gpt_neox", "stablelm")
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 20}
LATENT = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 20,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    "n_group": 2,
    "topk_group": 1,
}
KINDS = ["full_attention", "linear_attention", "linear_attention"]
LINEAR = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 2,
}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
OF_FAMILY: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {"experts": {"num_local_experts": 4}},
    "granitemoe": {"experts": {"num_local_experts": 4}},
    "olmoe": {"experts": {"num_experts": 4}},
    "gpt_oss": {"experts": {"num_local_experts": 4}},
    "qwen2_moe": {
        "experts": EXPERTS | {"shared_expert_intermediate_size": 28, "qkv_bias": False},
        "dense layers": EXPERTS | {"mlp_only_layers": [0]},
        "every other layer": EXPERTS | {"decoder_sparse_step": 2},
    },
    "qwen3_moe": {
        "experts": EXPERTS,
        "dense layers": EXPERTS | {"mlp_only_layers": [1, 2]},
        "every other layer": EXPERTS | {"decoder_sparse_step": 2},
    },
    "glm4_moe": {
        "experts": {"n_routed_experts": 4, "moe_intermediate_size": 20, "n_shared_experts": 2, "use_qk_norm": True},
        "all experts": {"first_k_dense_replace": 0},
    },
    "deepseek_v2": {
        "latent": LATENT | {"q_lora_rank": 8, "first_k_dense_replace": 1, "n_shared_experts": 3},
        "without queries": LATENT | {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
    },
    "deepseek_v3": {
        "latent": LATENT | {"q_lora_rank": 8, "first_k_dense_replace": 1, "attention_bias": True},
        "without queries": LATENT | {"q_lora_rank": None, "n_shared_experts": 2},
    },
    "qwen3_next": {
        "experts": EXPERTS | LINEAR | {"num_hidden_layers": 4, "shared_expert_intermediate_size": 28},
        "mixed": EXPERTS | {"layer_types": KINDS, "mlp_only_layers": [1], "attention_bias": True},
    },
    "qwen3_5_text": {"linear": LINEAR | {"num_hidden_layers": 4}, "mixed": {"layer_types": KINDS}},
    "qwen3_5_moe_text": {"experts": EXPERTS | LINEAR | {"num_hidden_layers": 4}},
    "qwen3_5": {
        "text": {"text_config": SIZES | LINEAR | {"tie_word_embeddings": True}, "tie_word_embeddings": True},
        "untied": {"text_config": SIZES | {"layer_types": KINDS}},
    },
    "qwen3_5_moe": {"text": {"text_config": SIZES | EXPERTS | LINEAR}},
    "gemma3": {
        "real keys": {"vision_config": VISION | {"vision_use_head": False}, "text_config": TEXT},
        "a head that sees": {"vision_config": VISION, "text_config": TEXT | {"head_dim": 16}},
        "untied": {"vision_config": VISION, "text_config": TEXT, "tie_word_embeddings": False},
    },
    "cohere": {"norms": {"use_qk_norm": True, "num_key_value_heads": 2}},
    "phi": {"norms": {"qk_layernorm": True}},
    "stablelm": {
        "norms": {"qk_layernorm": True, "num_key_value_heads": 2},
        "others": {"use_qkv_bias": True, "use_parallel_residual": True, "num_key_value_heads": 4},
    },
    "starcoder2": {"without biases": {"use_bias": False}},
    "seed_oss": {"biases of the output": {"attention_out_bias": True}},
    "falcon": {
        "multi-query": {},
        "biases": {"bias": True},
        "many queries": {"multi_query": False},
        "in turn": {"parallel_attn": False},
        "new": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "new with one norm": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        "inner": {"ffn_hidden_size": 40, "tie_word_embeddings": False},
    },
    "bloom": {"plain": {}, "untied": {"tie_word_embeddings": False}},
    "gpt2": {"plain": {}, "inner": {"n_inner": 40}, "untied": {"tie_word_embeddings": False}},
    "opt": {
        "plain": {},
        "projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "ffn_dim": 40},
        "galactica": {"enable_bias": False, "layer_norm_elementwise_affine": False},
        "untied": {"tie_word_embeddings": False, "_remove_final_layer_norm": True},
    },
}
KNOWN = [name for name, family in FAMILIES.items() if family.layer or family.text]
OTHER_KEYS = ("falcon", "bloom", "gpt2", "opt", "gemma3", "qwen3_5", "qwen3_5_moe")
OWN_KEYS = {
    "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "opt": {"intermediate_size": "ffn_dim"},
}
CASES = [
    (family, variant)
    for family in KNOWN
    for variant in {**({} if family in OTHER_KEYS else VARIANTS), **OF_FAMILY.get(family, {})}
    if not (variant == "head_dim" and family in NO_HEAD_DIM)
    and not (variant == "as many as heads" and family not in OPTIONAL_KEY_HEADS)
]


def written(family: str, variant: str) -> dict[str, Any]:
    """What a config.json may say."""
    values = ({} if FAMILIES[family].vision or FAMILIES[family].text else SIZES) | {
        **VARIANTS,
        **OF_FAMILY.get(family, {}),
    }[variant]
    if family in ("falcon", "bloom", "gpt2"):
        del values["intermediate_size"]
    own = OWN_KEYS.get(family, {})
    return {own.get(key, key): value for key, value in values.items()}


def build(family: str, variant: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **written(family, variant), pad_token_id=0)
    if family == "ministral":  # its class leaves head_dim to config.json, and fails without
        config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def facts_of(config: dict[str, Any]) -> ModelFacts:
    return ModelFacts("m", "folder", "", config, tuple(layout(config)))


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_layouts_are_those_of_the_real_classes(family: str, variant: str) -> None:
    model = build(family, variant)
    tied = {name for name in model.all_tied_weights_keys if name != model.all_tied_weights_keys[name]}
    real = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    if family == "gpt2":  # its layers are stored in x out
        real = {name: shape[::-1] if ".c_" in name else shape for name, shape in real.items()}
    for config in (written(family, variant) | {"model_type": family}, model.config.to_dict()):
        tensors = layout(config)
        assert {tensor.name: tensor.shape for tensor in tensors} == real
        assert len(tensors) == len(real)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_linear_layers_are_those_that_are_quantized_and_adapted(family: str, variant: str) -> None:
    """PEFT takes subclasses of torch's layers, bitsandbytes doesn't."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    model = build(family, variant)
    kept = get_keys_to_not_convert(model) + list(model._keep_in_fp32_modules or ())
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    fused = any(name.endswith(".experts") for name, _ in model.named_modules())
    replace_with_bnb_linear(model, kept, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    quantized = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    facts = facts_of(model.config.to_dict())
    assert set(facts.quantizable) == quantized
    assert set(facts.linear) == {name for name in linear - {"lm_head"} if "vision" not in name}
    assert facts.is_moe is fused


@pytest.mark.parametrize(
    "names",
    [
        ("mlp.gate.weight", "mlp.experts.0.up_proj.weight"),
        ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.7.w1.weight"),
        ("block_sparse_moe.router.layer.weight", "block_sparse_moe.input_linear.weight"),
    ],
)
def test_routers_and_experts_by_the_names_of_stored_files(names: tuple[str, str]) -> None:
    router, expert = (f"model.layers.0.{name}" for name in names)
    shape = (8, 48, 32) if "input_linear" in expert else (48, 32)
    facts = ModelFacts("m", "hub", "", {}, (Tensor(router, (8, 32)), Tensor(expert, shape)))
    assert (facts.quantizable, facts.linear, facts.is_moe) == ({}, {}, True)


@pytest.mark.parametrize("family", KNOWN)
def test_stored_names_are_told_as_the_loaded_ones(family: str, tmp_path: Path) -> None:
    """Experts one by one, layers in x out, names of older versions: whatever transformers writes and reads."""
    model = build(family, next(variant for name, variant in reversed(CASES) if name == family)).to_empty(device="cpu")
    model.save_pretrained(tmp_path)
    facts = read_facts(str(tmp_path))
    assert facts.source == Like("… headers … 1 safetensors file")
    assert {(t.name, t.shape) for t in facts.tensors} == {(t.name, t.shape) for t in layout(facts.config)}


def test_a_model_with_layers_of_its_own_is_what_its_headers_say() -> None:
    stored = [replace(tensor, dtype="F16") for tensor in layout(LLAMA)]
    extra = Tensor("model.layers.0.mlp.extra_proj.weight", (8, 8), "F16")
    assert set(as_loaded(LLAMA, [*stored, extra])) == set(stored)  # the class does not load it
    wider = replace(stored[3], shape=(99, 32))
    assert as_loaded(LLAMA, [*stored[:3], wider, *stored[4:], extra]) == (*stored[:3], wider, *stored[4:], extra)


def test_unknown_families_have_no_layout() -> None:
    assert layout({"model_type": "mamba"}) == []
    assert layout({"model_type": ["llama"]}) == []


LLAMA = SIZES | {"model_type": "llama"}
MOE = LLAMA | {"model_type": "qwen3_moe"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLAMA | {"hidden_size": ...}, "llama model .*no 'hidden_size'"),
        (LLAMA | {"hidden_size": "many"}, "can't be right"),
        (LLAMA | {"num_hidden_layers": [2]}, "can't be right"),
        (LLAMA | {"num_hidden_layers": 10**9}, "1000000000 .*hidden_layers"),
        (LLAMA | {"vocab_size": -1}, "-1 is no size"),
        (LLAMA | {"vocab_size": 64.0}, "64.0 is no size"),
        (LLAMA | {"num_attention_heads": 0}, "can't be right"),
        (LLAMA | {"num_attention_heads": None}, "can't be right"),
        (LLAMA | {"num_hidden_layers": 10**30}, "can't be right"),
        (LLAMA | {"head_dim": "wide"}, "can't be right"),
        (MOE | {"num_experts": -4}, "-4 is no size"),
        (MOE | {"mlp_only_layers": 3}, "can't be right"),
        (MOE | {"decoder_sparse_step": 0}, "can't be right"),
        (MOE | {"model_type": "deepseek_v3", "first_k_dense_replace": "all"}, "can't be right"),
        (MOE | {"model_type": "deepseek_v2", "qk_rope_head_dim": None}, "can't be right"),
        (MOE | {"model_type": "qwen3_next", "layer_types": ["full_attention"]}, "can't be right"),
        (MOE | {"model_type": "gemma3"}, "gemma3 model .*no 'vision_config'"),
        (
            MOE | {"model_type": "gemma3", "vision_config": 3, "text_config": 4},
            "gemma3 model .*vision_config",
        ),
        (MOE | {"model_type": "qwen3_5", "text_config": "none"}, "qwen3_5 model .*text_config"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        layout({key: value for key, value in config.items() if value is not ...})
    assert "\n" not in str(caught.value)


def refusal(config: dict[str, Any]) -> str:
    try:
        layout(config)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("family", KNOWN)
def test_any_value_is_a_layout_or_one_line(family: str) -> None:
    config = build(family, next(variant for name, variant in CASES if name == family)).config.to_dict()
    config |= {"text_config": TEXT, "vision_config": VISION, "model_type": family}
    for key in config:
        for value in (None, "x", -1, 1.5, [], {"a": 1}, 10**30):
            assert "\n" not in refusal(config | {key: value})
