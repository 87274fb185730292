"""Targets are the modules that PEFT really adapts, and their size is what PEFT really trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from wording import Like

from lorafit.facts import ModelFacts, Tensor, layout, read_facts
from lorafit.hardware import Hardware
from lorafit.plan import make_plan
from lorafit.plan.adapters import Full, Lora, TargetError, adapter_told, find_targets, is_skipped
from lorafit.recipe import DatasetSection, LoraSection, ModelSection, Recipe

CPU = Hardware("cpu", "a CPU", None, None, False)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
LLAMA = ModelFacts("llama", "folder", "", CONFIG, tuple(layout(CONFIG)))
PHI = ModelFacts("phi", "folder", "", CONFIG, tuple(layout(CONFIG | {"model_type": "phi3"})))


def lora(**values: Any) -> LoraSection:
    return TypeAdapter(LoraSection).validate_python(values)


def leaves(facts: ModelFacts = LLAMA, **values: Any) -> set[str]:
    return {module.rpartition(".")[2] for module in find_targets(lora(**values), facts).modules}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("all-linear", ATTENTION | MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        ("qv", {"q_proj", "v_proj"}),
        (["up_proj", "self_attn.q_proj"], {"up_proj", "q_proj"}),
        (r".*\.(q|k)_proj", {"q_proj", "k_proj"}),
        (r"model\.layers\.1\..*", ATTENTION | MLP),
    ],
)
def test_presets_lists_and_expressions(asked: Any, expected: set[str]) -> None:
    assert leaves(target_modules=asked) == expected


def test_presets_of_fused_layers() -> None:
    assert leaves(PHI, target_modules="attention") == {"qkv_proj", "o_proj"}
    assert leaves(PHI, target_modules="mlp") == {"gate_up_proj", "down_proj"}
    with pytest.raises(TargetError, match=r"\bqv\b.*down_proj, gate_up_proj, o_proj, qkv_proj"):
        find_targets(lora(target_modules="qv"), PHI)


def test_short_names_are_used_only_where_they_mean_the_same() -> None:
    assert find_targets(lora(target_modules="qv"), LLAMA).names == ("q_proj", "v_proj")
    one = find_targets(lora(target_modules="qv", layers_to_transform=[1]), LLAMA)
    assert one.names == one.modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


def test_short_names_would_reach_a_vision_tower() -> None:
    q = "self_attn.q_proj.weight"
    tensors = (Tensor(f"language_model.layers.0.{q}", (32, 32)), Tensor(f"vision_tower.layers.0.{q}", (16, 16)))
    targets = find_targets(lora(), ModelFacts("vlm", "folder", "", {}, tensors))
    assert targets.names == ("language_model.layers.0.self_attn.q_proj",)


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        ({"target_modules": ["q_porj"]}, ("target_modules", 0), "q_porj.* q_proj"),
        ({"target_modules": ["q_proj", "query_key_value"]}, ("target_modules", 1), "no linear layer"),
        ({"target_modules": ["self_attn"]}, ("target_modules", 0), "there are down_proj, gate_proj"),
        ({"target_modules": "q_proj"}, ("target_modules",), r"list.* \[q_proj\]"),
        ({"target_modules": "all_linear"}, ("target_modules",), "all-linear, attention, mlp, qv"),
        ({"target_modules": r"layers\.0"}, ("target_modules",), r"such as model.layers.0.self_attn.q_proj"),
        ({"target_modules": "(q_proj"}, ("target_modules",), "regular expression"),
        ({"exclude_modules": ["v_porj"]}, ("exclude_modules", 0), "v_proj"),
        ({"target_modules": "qv", "exclude_modules": ["q_proj", "v_proj"]}, ("target_modules",), "leaves no module"),
        ({"layers_to_transform": [0, 7]}, ("layers_to_transform", 1), "layer 7.* 0 to 1"),
        ({"rank_pattern": {"q_porj": 4}}, ("rank_pattern", "q_porj"), "q_proj"),
        ({"alpha_pattern": {"(": 4}}, ("alpha_pattern", "("), "no target module"),
        ({"target_modules": "qv", "rank_pattern": {"up_proj": 4}}, ("rank_pattern", "up_proj"), "no target"),
        (
            {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]},
            ("target_modules", 1),
            "in full .*modules_to_save",
        ),
    ],
)
def test_what_matches_nothing_says_what_is_near(values: dict[str, Any], path: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        find_targets(lora(**values), LLAMA)
    assert caught.value.path == path


def test_without_an_adapter_everything_is_trained() -> None:
    assert sum(tensor.size for tensor in Full().tensors(LLAMA, None)) == LLAMA.parameters


@pytest.mark.parametrize(
    ("section", "result", "described", "scale"),
    [
        (None, "trained", "all parameters", None),
        ({"r": 4, "lora_alpha": 8}, "adapter", "LoRA … r 4, alpha 8", 2),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, "adapter", "rsLoRA … r 4, alpha 8", 4),
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, "adapter", "DoRA … r 4, alpha 8", 2),
    ],
)
def test_a_description_is_read_back_from_a_recipes_values(
    section: dict[str, Any] | None, result: str, described: str, scale: float | None
) -> None:
    asked = Full() if section is None else Lora(LoraSection.model_validate(section))
    targets = asked.targets(LLAMA)
    told = adapter_told({"lora": None if section is None else asked.section.model_dump(mode="json")})
    for one in (asked, told):
        assert (one.result, one.described(" on a base"), one.scale) == (result, Like(described), scale)
        assert one.trains_base is (section is None)
    assert [*told.tensors(LLAMA, None, "bfloat16")] == [*asked.tensors(LLAMA, targets, "bfloat16")]


@pytest.mark.parametrize(
    ("name", "skip", "expected"),
    [
        ("lm_head", ["lm_head"], True),
        ("model.layers.1.mlp.up_proj", ["model.layers.1"], True),
        ("model.layers.11.mlp.up_proj", ["model.layers.1"], False),
        ("model.layers.1.mlp.up_proj", ["up_proj"], True),
        ("model.layers.1.mlp.gate_proj", ["mlp.gate", r"model\.layers\.2\..*"], False),
        ("model.layers.1.mlp.up_proj", ["("], False),
    ],
)
def test_skipping_follows_transformers(name: str, skip: list[str], expected: bool) -> None:
    assert is_skipped(name, skip) is expected
    if "(" not in skip:
        from transformers.quantizers.quantizers_utils import should_convert_module

        assert should_convert_module(name, skip) is not expected


# --- against PEFT ---------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES | {"tie_word_embeddings": False}),
    "llama-tied": ("llama", SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", SIZES | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", SIZES | {"head_dim": 16}),
    "phi3": ("phi3", SIZES),
    "gpt2": ("gpt2", GPT2),
}
NAMES = {"phi3": ("qkv_proj", "o_proj"), "gpt2": ("c_attn", "c_fc")}
EMBEDDINGS = {"gpt2": "wte"}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, values = MODELS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).save_pretrained(path)
    return request.param, path


def variants(name: str) -> dict[str, dict[str, Any]]:
    q, other = NAMES.get(name, ("q_proj", "up_proj"))
    embeddings = EMBEDDINGS.get(name, "embed_tokens")
    return {
        "lora": {},
        "attention": {"target_modules": "attention"},
        "mlp": {"target_modules": "mlp"},
        "list": {"target_modules": [q]},
        "expression": {"target_modules": rf".*\.2\..*\.{q}"},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "ranks": {"rank_pattern": {q: 2, rf".*\.1\..*{other}": 7}, "alpha_pattern": {q: 3}},
        "ranks with dora": {"rank_pattern": {rf"^.*\.0\..*\.{q}": 3}, "use_dora": True},
        "all biases": {"bias": "all"},
        "own biases": {"bias": "lora_only", "target_modules": [q]},
        "embeddings": {"modules_to_save": [embeddings]},
        "head": {"modules_to_save": ["lm_head"]},
        "both": {"modules_to_save": [embeddings, "lm_head"], "bias": "all"},
        "a layer in full": {"modules_to_save": [other]},
        "a layer in full with biases": {"modules_to_save": [other], "bias": "all"},
        "one layer": {"layers_to_transform": [1]},
        "layers of a list": {"target_modules": [q, other], "layers_to_transform": [0, 2]},
        "exclusion": {"exclude_modules": [other]},
        "exclusion in a layer": {"exclude_modules": [f"1.{'attn' if name == 'gpt2' else 'self_attn'}.{q}"]},
        "norms": {"modules_to_save": ["ln_f" if name == "gpt2" else "norm"]},
    }


@pytest.mark.parametrize("variant", variants("llama"))
def test_peft_adapts_and_trains_what_is_planned(folder: tuple[str, Path], variant: str) -> None:
    import warnings

    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    name, path = folder
    section = lora(r=4, lora_dropout=0.0, **variants(name)[variant])
    recipe = Recipe(
        model=ModelSection(name_or_path=str(path)),
        lora=section,
        dataset=TypeAdapter(DatasetSection).validate_python({"train": [{"path": "x.jsonl"}]}),
    )
    facts = read_facts(str(path))
    plan = make_plan(recipe, facts, CPU, read_data=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), LoraConfig(**plan.lora_kwargs or {}))
    adapted = {
        module.removeprefix("base_model.model.")
        for module, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert adapted == set(find_targets(section, facts).modules)
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.model.adapted_modules == len(adapted)
