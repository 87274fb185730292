"""Every open value is resolved, with its reason; what can't be done is said at its place in the recipe."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from wording import Like

from lorafit.errors import DataError
from lorafit.facts import ModelFacts, TokenizerFacts, layout
from lorafit.families import FAMILIES
from lorafit.hardware import APPLE, Hardware
from lorafit.plan import Plan, Training, make_plan, make_schedule, plan_recipe, validation_rows
from lorafit.plan.methods import SFT
from lorafit.recipe import Recipe, RecipeError
from lorafit.recipe.load import sections
from lorafit.recipe.schema import Source
from lorafit.rows.audit import RULES

CPU = Hardware("cpu", "a plain CPU", 16 << 30, None, False)
CPU_BF16 = Hardware("cpu", "a CPU with AMX", 16 << 30, None, True)
AMPERE = Hardware("cuda", "an A100", 80 << 30, (8, 0), True)
HOPPER = Hardware("cuda", "an H100", 80 << 30, (9, 0), True)
AMD = Hardware("cuda", "AMD gfx942", 192 << 30, None, True)
T4 = Hardware("cuda", "a T4", 16 << 30, (7, 5), False)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOKENIZER = TokenizerFacts("<|im_end|>", "<pad>", "<s>", CHATML)


def facts_of(tokenizer: TokenizerFacts | None = TOKENIZER, **config: Any) -> ModelFacts:
    values = CONFIG | config
    return ModelFacts("m", "folder", "its headers", values, tuple(layout(values)), tokenizer)


@pytest.fixture(autouse=True)
def trackers_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.hardware.is_installed", lambda module: module != "wandb")


FACTS = facts_of()
QLORA: dict[str, Any] = {"lora": {}, "quantization": {"load_in_4bit": True}}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else copy.deepcopy(value)
    return result


class Planner:
    """Writes recipes to a file and plans them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [{"prompt": f"question {i}", "completion": "answer"} for i in range(40)]
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.base: dict[str, Any] = {
            "model": {"name_or_path": "m"},
            "lora": {},
            "dataset": {"train": [{"path": str(self.rows)}]},
        }

    def load(self, sections: dict[str, Any]) -> Recipe:
        path = self.folder / "recipe.yaml"
        content = {key: value for key, value in merged(self.base, sections).items() if value is not ...}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return Recipe.load(path)

    def __call__(self, hardware: Hardware = CPU, facts: ModelFacts = FACTS, **sections: Any) -> Plan:
        return make_plan(self.load(sections), facts, hardware, default_name="name")

    def text(self, text: str, hardware: Hardware = CPU, facts: ModelFacts = FACTS) -> list[str]:
        """The mistakes in a recipe that is written out, as file:line:column lines."""
        path = self.folder / "written.yaml"
        path.write_text(text.replace("ROWS", str(self.rows)))
        recipe = Recipe.load(path)
        with pytest.raises(RecipeError) as caught:
            make_plan(recipe, facts, hardware)
        return [str(mistake).replace(f"{path}:", "") for mistake in caught.value.mistakes]


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    return Planner(tmp_path)


def because(plan: Plan, key: str) -> str:
    return plan.choices[key].reason


# --- auto -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "dtype", "reason", "flags"),
    [
        (CPU, "float32", "a plain CPU", (False, False)),
        (CPU_BF16, "bfloat16", "has fast bfloat16 arithmetic", (True, False)),
        (AMPERE, "bfloat16", "A100", (True, False)),
        (T4, "float16", "T4", (False, True)),
        (AMD, "bfloat16", "gfx942", (True, False)),
    ],
)
def test_dtype(planner: Planner, hardware: Hardware, dtype: str, reason: str, flags: tuple[bool, bool]) -> None:
    plan = planner(hardware, **QLORA)
    assert plan.dtype == dtype
    assert reason in because(plan, "model.dtype")
    assert (plan.training.bf16, plan.training.fp16) == flags
    assert plan.quantization_kwargs is not None
    assert plan.quantization_kwargs["bnb_4bit_compute_dtype"] == dtype
    assert because(plan, "quantization.bnb_4bit_compute_dtype") == Like("… dtype")
    assert plan.adapter_dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
    assert plan.training_kwargs["use_cpu"] is (hardware.device == "cpu")


def test_where_nothing_was_measured_the_plan_says_so(planner: Planner) -> None:
    assert any("AMD" in remark for remark in planner(AMD, **QLORA).remarks)
    assert any("Apple" in remark for remark in planner(APPLE).remarks)
    assert not any("measured" in remark for remark in planner(AMPERE, **QLORA).remarks)


def test_an_apple_gpu(planner: Planner) -> None:
    plan = planner(APPLE)
    assert (plan.dtype, plan.training.bf16, plan.training_kwargs["use_cpu"]) == ("bfloat16", True, False)


@pytest.mark.parametrize(
    ("hardware", "sections", "place"),
    [
        (APPLE, QLORA, "quantization"),
        (APPLE, {"training": {"optim": "paged_adamw_8bit"}}, "training.optim"),
        (APPLE, {"model": {"attn_implementation": "flash_attention_2"}}, "model.attn_implementation"),
        (APPLE, {"model": {"dtype": "float16"}}, "model.dtype"),
        (AMD, {"model": {"attn_implementation": "flash_attention_3"}}, "model.attn_implementation"),
    ],
)
def test_what_other_gpus_cannot_do_is_refused_at_its_line(
    planner: Planner, hardware: Hardware, sections: dict[str, Any], place: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        planner(hardware, **sections)
    assert [mistake.path for mistake in caught.value.mistakes] == [place]


def test_adapters_on_an_unquantized_base_stay_float32(planner: Planner) -> None:
    assert planner(AMPERE).adapter_dtype == "float32"


@pytest.mark.parametrize(("hardware", "bf16"), [(CPU, False), (CPU_BF16, False), (AMPERE, True), (T4, False)])
def test_training_in_full_keeps_float32_weights(planner: Planner, hardware: Hardware, bf16: bool) -> None:
    plan = planner(hardware, lora=...)
    assert plan.dtype == plan.adapter_dtype == "float32"
    assert (plan.training.bf16, plan.training.fp16) == (bf16, False)
    assert plan.trainable_parameters == FACTS.parameters
    assert plan.lora_kwargs is None


def test_bfloat16_where_it_is_slow_is_remarked_on(planner: Planner) -> None:
    plan = planner(T4, model={"dtype": "bfloat16"})
    assert any(remark == Like("… bfloat16 … slow … T4") for remark in plan.remarks)
    assert not any("bfloat16" in remark for remark in planner(AMPERE, model={"dtype": "bfloat16"}).remarks)


def test_attention(planner: Planner) -> None:
    assert planner().attention == "sdpa"
    gemma = planner(facts=facts_of(model_type="gemma2"))
    assert gemma.attention == "eager"
    assert because(gemma, "model.attn_implementation") == Like("… gemma2 … sdpa")
    flash = planner(AMPERE, model={"attn_implementation": "flash_attention_2"})
    assert flash.attention == "flash_attention_2"
    assert planner(HOPPER, lora=..., model={"attn_implementation": "flash_attention_3"}).training.bf16


def test_no_model_is_said_to_know_sdpa_that_does_not() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for model_type, family in FAMILIES.items():
        model_class = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(model_type))]
        assert model_class._supports_sdpa or not family.sdpa, model_type


@pytest.mark.parametrize(
    ("hardware", "world", "training", "batch", "accumulation"),
    [
        (CPU, 1, {}, 8, 2),
        (AMPERE, 1, {}, 4, 4),
        (AMPERE, 4, {}, 4, 1),
        (AMPERE, 8, {}, 2, 1),
        (AMPERE, 3, {}, 1, 5),
        (AMPERE, 64, {}, 1, 1),
        (CPU, 1, {"global_batch_size": 6}, 2, 3),
        (AMPERE, 2, {"global_batch_size": 64}, 4, 8),
        (AMPERE, 2, {"global_batch_size": 64, "per_device_train_batch_size": 16}, 16, 2),
        (AMPERE, 1, {"per_device_train_batch_size": 32}, 32, 1),
        (AMPERE, 1, {"gradient_accumulation_steps": 3}, 4, 3),
        (CPU, 1, {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 7}, 5, 7),
    ],
)
def test_batch_and_accumulation(
    planner: Planner, hardware: Hardware, world: int, training: dict[str, Any], batch: int, accumulation: int
) -> None:
    plan = planner(dataclasses.replace(hardware, world_size=world), training=training)
    kwargs = plan.training_kwargs
    assert (kwargs["per_device_train_batch_size"], kwargs["gradient_accumulation_steps"]) == (batch, accumulation)
    assert kwargs["per_device_eval_batch_size"] == batch
    if "gradient_accumulation_steps" not in training:
        assert f"= {batch * accumulation * world} rows a step" in because(plan, "training.gradient_accumulation_steps")
    if "per_device_train_batch_size" not in training:
        usual = batch == (8 if hardware.device == "cpu" else 4)
        assert because(plan, "training.per_device_train_batch_size").startswith("usual" if usual else "the most that")


@pytest.mark.parametrize(
    ("hardware", "quantized", "optimizer"),
    [
        (CPU, False, "adamw_torch_fused"),
        (CPU, True, "adamw_torch_fused"),
        (AMPERE, False, "adamw_torch_fused"),
        (AMPERE, True, "paged_adamw_8bit"),
        (T4, True, "paged_adamw_8bit"),
    ],
)
def test_optimizer(planner: Planner, hardware: Hardware, quantized: bool, optimizer: str) -> None:
    plan = planner(hardware, **(QLORA if quantized else {}))
    assert plan.training.optim == plan.choices["training.optim"].value == optimizer


@pytest.mark.parametrize(("hardware", "expected"), [(CPU, False), (AMPERE, True)])
def test_gradient_checkpointing(planner: Planner, hardware: Hardware, expected: bool) -> None:
    assert planner(hardware).training.gradient_checkpointing is expected
    assert planner(hardware, training={"gradient_checkpointing": not expected}).training_kwargs[
        "gradient_checkpointing"
    ] is (not expected)


@pytest.mark.parametrize(
    ("training", "validation", "strategy", "best"),
    [
        ({}, None, "no", False),
        ({}, 0.1, "epoch", True),
        ({"eval_strategy": "no"}, 0.1, "no", False),
        ({"eval_strategy": "steps", "eval_steps": 2}, 0.1, "steps", True),
        ({"save_strategy": "no"}, 0.1, "epoch", False),
        ({"load_best_model_at_end": False}, 0.1, "epoch", False),
    ],
)
def test_evaluation_and_the_best(
    planner: Planner, training: dict[str, Any], validation: float | None, strategy: str, best: bool
) -> None:
    plan = planner(training=training, dataset={"validation": validation})
    assert plan.training.eval_strategy == strategy
    assert plan.training.load_best_model_at_end is best


@pytest.mark.parametrize(
    ("asked", "name", "greater"),
    [
        (None, "loss", False),
        ("eval_loss", "loss", False),
        ("mean_token_accuracy", "mean_token_accuracy", True),
        ("heldout.exact_match", "heldout.exact_match", True),
        ("heldout.bits_per_byte", "heldout.bits_per_byte", False),
        ("general.perplexity", "general.perplexity", False),
    ],
)
def test_what_the_best_is_found_by(planner: Planner, asked: str | None, name: str, greater: bool) -> None:
    plan = planner(training={"metric_for_best_model": asked}, dataset={"validation": 0.1})
    assert (plan.training_kwargs["metric_for_best_model"], plan.training_kwargs["greater_is_better"]) == (name, greater)


def test_learning_rates(planner: Planner) -> None:
    (planner.folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    pairs: dict[str, Any] = {"dataset": {"train": [{"path": str(planner.folder / "pairs.jsonl")}]}, "preference": {}}
    assert planner().training.learning_rate == 2e-4
    assert planner(**pairs).training.learning_rate == 1e-5
    assert planner(**pairs, lora=None).training.learning_rate == 1e-6
    assert planner(**pairs, training={"learning_rate": 2e-4}).training.learning_rate == 2e-4


@pytest.mark.parametrize("asked", ["heldout.rouge", "nowhere.loss", "general.kl", "heldout.length", "heldout", "f1"])
def test_what_the_best_can_not_be_found_by(planner: Planner, asked: str) -> None:
    with pytest.raises(RecipeError, match=r"training\.metric_for_best_model: "):
        planner(training={"metric_for_best_model": asked}, dataset={"validation": 0.1})


def test_warmup(planner: Planner) -> None:
    assert planner().training.warmup_steps == 0.03
    assert planner(training={"warmup_ratio": 0.0}).training.warmup_steps == 0.0
    assert planner(training={"warmup_steps": 7}).training.warmup_steps == 7
    assert planner(training={"lr_scheduler_type": "constant"}).training.warmup_steps == 0


def test_max_length_follows_a_short_context(planner: Planner) -> None:
    plan = planner(facts=facts_of(max_position_embeddings=512))
    assert plan.data.max_length == 512
    assert because(plan, "training.max_length") == Like("… context … 2048")


def test_targets_and_counts(planner: Planner) -> None:
    plan = planner(lora={"r": 4, "target_modules": "qv"})
    assert plan.choices["lora.target_modules"].value == ["q_proj", "v_proj"]
    assert plan.model.adapted_modules == 4
    assert plan.trainable_parameters == 2 * 4 * ((32 + 32) + (16 + 32))
    assert plan.model.parameters == FACTS.parameters


def test_the_head_stays_unquantized_beside_what_the_recipe_lists(planner: Planner) -> None:
    section = {"load_in_8bit": True, "llm_int8_skip_modules": ["down_proj"]}
    plan = planner(AMPERE, quantization=section)
    assert plan.quantization_kwargs is not None
    assert plan.quantization_kwargs["llm_int8_skip_modules"] == ["down_proj", "lm_head"]
    assert planner(AMPERE, **QLORA).quantization_kwargs["llm_int8_skip_modules"] is None  # type: ignore[index]


def test_what_quantization_leaves_alone_is_said(planner: Planner) -> None:
    experts = facts_of(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    plan = planner(AMPERE, facts=experts, **QLORA)
    assert any("leaves experts in bfloat16" in remark for remark in plan.remarks)
    assert not any("leaves experts" in remark for remark in planner(AMPERE, **QLORA).remarks)
    falcon = facts_of(model_type="falcon", multi_query=True, parallel_attn=True, bias=False)
    with pytest.raises(RecipeError, match=r"nothing .*quantized"):
        planner(AMPERE, facts=falcon, **QLORA)


def test_models_of_unknown_layout_are_planned_with_a_remark(planner: Planner) -> None:
    facts = ModelFacts("m", "hub", "config.json", {"model_type": "mamba"}, ())
    plan = planner(facts=facts)
    assert plan.lora_kwargs is not None
    assert plan.lora_kwargs["target_modules"] == "all-linear"
    assert plan.trainable_parameters == 0
    assert any("model loads" in remark for remark in plan.remarks)


def test_padding_and_ends_of_turns(planner: Planner) -> None:
    rows = planner.folder / "chat.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    chat = {"train": [{"path": str(rows)}]}
    plan = planner(dataset=chat)
    assert plan.choices["end of turn"].value == "<|im_end|>"
    assert plan.choices["padding token"].value == "<pad>"
    assert because(plan, "dataset.train.0.format") == Like("… 'messages'")
    plan = planner(facts=facts_of(TokenizerFacts("</s>", None, None, "{{ messages[1].content }}")), dataset=chat)
    assert plan.choices["padding token"].value == plan.choices["end of turn"].value == "</s>"
    assert because(plan, "end of turn") == Like("… end token … learned")
    plan = planner(facts=facts_of(TokenizerFacts("</s>", "</s>", None, CHATML)), dataset=chat)
    assert "end token" in because(plan, "padding token")


# --- mistakes -------------------------------------------------------------------------------------


def test_every_mistake_is_at_its_place(planner: Planner) -> None:
    mistakes = planner.text(
        """\
model:
  name_or_path: m
  dtype: float16
  attn_implementation: flash_attention_2
lora:
  target_modules: [q_porj]
dataset:
  train:
    - path: ROWS
      split: test
training:
  max_length: 5000
  optim: paged_adamw_8bit
""",
    )
    assert mistakes == [
        Like("3:10: model.dtype: float16 … CPU … auto"),
        Like("4:24: model.attn_implementation: flash_attention_2 … GPU … auto"),
        Like("6:20: lora.target_modules.0: 'q_porj' … q_proj, v_proj, o_proj"),
        Like("10:14: dataset.train.0.split: … hub … local path"),
        Like("12:15: training.max_length: 5000 … context … 4096"),
        Like("13:10: training.optim: paged_adamw_8bit … GPU … auto … adamw_torch_fused"),
    ]


@pytest.mark.parametrize(
    ("hardware", "facts", "sections", "message"),
    [
        (T4, FACTS, {"model": {"attn_implementation": "flash_attention_2"}}, "needs compute capability 8.0"),
        (
            CPU,
            FACTS,
            {"quantization": {"load_in_4bit": True}, "lora": {"init_lora_weights": "loftq", "lora_alpha": 16}},
            "init_lora_weights: .*loftq .*GPU",
        ),
        (AMPERE, FACTS, {"model": {"attn_implementation": "flash_attention_3"}}, "needs compute capability 9.0"),
        (
            AMPERE,
            FACTS,
            {"model": {"attn_implementation": "flash_attention_2", "dtype": "float32"}},
            "flash_attention_2.*float32",
        ),
        (CPU, facts_of(model_type="gemma2"), {"model": {"attn_implementation": "sdpa"}}, "does not run gemma2"),
        (AMPERE, FACTS, {"model": {"dtype": "float16"}, "lora": ...}, "float16 weights .*in full"),
        (
            dataclasses.replace(AMPERE, world_size=4),
            FACTS,
            {"training": {"global_batch_size": 6}},
            "6 .*multiple .*1 rows x 4 processes",
        ),
        (
            dataclasses.replace(AMPERE, world_size=2),
            FACTS,
            {"training": {"global_batch_size": 8, "per_device_train_batch_size": 8}},
            "8 .*multiple .*8 rows x 2 processes",
        ),
        (CPU, FACTS, {"lora": {"modules_to_save": ["lm_haed"]}}, "lm_haed.* lm_head"),
        (CPU, FACTS, {"model": {"chat_template": "nowhere.jinja"}}, "model.chat_template: can't be read"),
        (
            AMPERE,
            FACTS,
            QLORA | {"quantization": {"load_in_4bit": True, "llm_int8_skip_modules": ["dwon_proj"]}},
            r"llm_int8_skip_modules.0: 'dwon_proj' .* down_proj",
        ),
        (
            CPU,
            facts_of(quantization_config={"quant_method": "gptq"}),
            {},
            r"quantized \(gptq\)",
        ),
        (
            CPU,
            ModelFacts("m", "hub", "", {"model_type": "mamba"}, ()),
            {"lora": {"target_modules": "attention"}},
            "mamba",
        ),
        (
            CPU,
            ModelFacts("m", "hub", "", {"model_type": "mamba"}, ()),
            {"lora": {"layers_to_transform": [1]}},
            "target_modules",
        ),
    ],
)
def test_what_cannot_be_done(
    planner: Planner, hardware: Hardware, facts: ModelFacts, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        planner(hardware, facts, **sections)


def test_conversations_without_a_chat_template(planner: Planner) -> None:
    rows = planner.folder / "chat.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    facts = facts_of(TokenizerFacts("</s>", None, None, None))
    with pytest.raises(RecipeError, match=r"no chat template.*packing"):
        planner(facts=facts, dataset={"train": [{"path": str(rows)}]}, training={"packing": True})
    template = planner.folder / "t.jinja"
    template.write_text(CHATML)
    plan = planner(facts=facts, dataset={"train": [{"path": str(rows)}]}, model={"chat_template": str(template)})
    assert plan.data.chat_template == CHATML


def test_data_that_is_not_there(planner: Planner) -> None:
    with pytest.raises(DataError, match="no such file"):
        planner(dataset={"train": [{"path": "nowhere.jsonl"}]})
    empty = planner.folder / "empty.jsonl"
    empty.touch()
    with pytest.raises(DataError, match=r"empty\.jsonl.* no rows"):
        planner(dataset={"train": [{"path": str(empty)}]})


# --- every field reaches something ----------------------------------------------------------------

HUB = {"dataset": {"train": [{"path": "owner/rows"}]}}
GPU_QLORA = {"hardware": AMPERE, **QLORA}
ON_GPU: dict[str, Any] = {"hardware": AMPERE}
VALIDATED = {"dataset": {"validation": 0.25}}
PAIRED: dict[str, Any] = {"dataset": {"train": [{"path": "PAIRS"}]}}
PAIRS = PAIRED | {"preference": {}}

OWN_SET: dict[str, Any] = {"eval": {"sets": [{"name": "own", "path": "own.jsonl"}]}}
BENCHMARKED: dict[str, Any] = {"eval": {"lm_eval": {"tasks": ["one"]}}}
JUDGED: dict[str, Any] = {"eval": {"judge": {"base_url": "http://localhost:1/v1", "model": "judge"}}}

CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "model.use_kernels": (
        {"RMSNorm": f"kernels-community/liger@{'0' * 40}:LigerRMSNorm"},
        {"hardware": AMPERE, "model": {"trust_remote_code": True, "dtype": "bfloat16"}},
    ),
    # field: a changed value, and a recipe (or machine) in which it has a meaning
    "model.name_or_path": ("other", {}),
    "model.revision": ("v2", {}),
    "model.dtype": ("bfloat16", {}),
    "model.attn_implementation": ("eager", {}),
    "model.trust_remote_code": (True, {}),
    "model.chat_template": ("TEMPLATE", {}),
    "model.chat_template_kwargs": ({"enable_thinking": True}, {"model": {"chat_template": "qwen3"}}),
    "quantization.load_in_4bit": (False, GPU_QLORA | {"quantization": {"load_in_4bit": True, "load_in_8bit": False}}),
    "quantization.load_in_8bit": (True, GPU_QLORA | {"quantization": {"load_in_4bit": True, "load_in_8bit": False}}),
    "quantization.bnb_4bit_quant_type": ("fp4", GPU_QLORA),
    "quantization.bnb_4bit_use_double_quant": (False, GPU_QLORA),
    "quantization.bnb_4bit_compute_dtype": ("float16", GPU_QLORA),
    "quantization.llm_int8_threshold": (4.0, ON_GPU | {"quantization": {"load_in_8bit": True}}),
    "quantization.llm_int8_skip_modules": (["down_proj"], GPU_QLORA),
    "lora.r": (7, {}),
    "lora.lora_alpha": (5.0, {}),
    "lora.lora_dropout": (0.5, {}),
    "lora.target_modules": ("qv", {}),
    "lora.exclude_modules": (["q_proj"], {}),
    "lora.modules_to_save": (["lm_head"], {}),
    "lora.layers_to_transform": ([1], {}),
    "lora.rank_pattern": ({"q_proj": 3}, {}),
    "lora.alpha_pattern": ({"q_proj": 3.0}, {}),
    "lora.bias": ("all", {}),
    "lora.use_rslora": (True, {}),
    "lora.use_dora": (True, {}),
    "lora.init_lora_weights": ("gaussian", {}),
    "lora.loraplus_lr_ratio": (16.0, {}),
    "dataset.train.path": ("MORE", {}),
    "dataset.train.format": ("text", {"dataset": {"train": [{"path": "TEXTS"}]}}),
    "dataset.train.columns": ({"input": "context"}, {}),
    "dataset.train.template": ({"prompt": "{{ prompt }}!"}, {}),
    "dataset.train.weight": (2.0, {}),
    "dataset.train.max_rows": (5, {}),
    "dataset.train.split": ("test", HUB),
    "dataset.train.name": ("small", HUB),
    "dataset.train.revision": ("v2", HUB),
    "dataset.validation": (0.5, {}),
    "dataset.loss_on": ("all", {}),
    "dataset.min_length": (3, {}),
    "dataset.excess_length_strategy": ("drop", {}),
    "dataset.streaming": (True, {"training": {"max_steps": 3}}),
    **{f"dataset.audit.{rule}": (0.25, {}) for rule in RULES},
    "training.max_length": (77, {}),
    "training.packing": (True, {}),
    "training.num_train_epochs": (5.5, {}),
    "training.max_steps": (9, {}),
    "training.per_device_train_batch_size": (3, {}),
    "training.gradient_accumulation_steps": (5, {}),
    "training.global_batch_size": (64, {}),
    "training.per_device_eval_batch_size": (3, VALIDATED),
    "training.learning_rate": (0.5, {}),
    "training.lr_scheduler_type": ("linear", {}),
    "training.lr_scheduler_kwargs": (
        {"min_lr_rate": 0.1},
        {"training": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}}},
    ),
    "training.warmup_ratio": (0.5, {}),
    "training.warmup_steps": (5, {}),
    "training.optim": ("sgd", {}),
    "training.weight_decay": (0.5, {}),
    "training.adam_beta1": (0.5, {}),
    "training.adam_beta2": (0.5, {}),
    "training.adam_epsilon": (0.5, {}),
    "training.max_grad_norm": (0.0, {}),
    "training.neftune_noise_alpha": (5.0, {}),
    "training.gradient_checkpointing": (True, {}),
    "training.train_sampling_strategy": ("sequential", {}),
    "training.dataloader_num_workers": (2, {}),
    "training.seed": (7, {}),
    "training.logging_steps": (5, {}),
    "training.eval_strategy": ("no", VALIDATED),
    "training.eval_steps": (3, VALIDATED | {"training": {"eval_strategy": "steps", "eval_steps": 2}}),
    "preference.method": ("dpo", PAIRED),
    "preference.loss_type": ("ipo", PAIRS),
    "preference.loss_weights": ([2.0], PAIRS),
    "preference.beta": (0.5, PAIRS),
    "preference.label_smoothing": (0.2, PAIRED | {"preference": {"loss_type": "robust"}}),
    "preference.reference": ("base", PAIRS),
    "training.evals_per_epoch": (2, VALIDATED),
    "training.save_strategy": ("no", {}),
    "training.save_steps": (3, {"training": {"save_strategy": "steps", "save_steps": 2}}),
    "training.saves_per_epoch": (2, {}),
    "training.metric_for_best_model": ("mean_token_accuracy", VALIDATED),
    "training.save_total_limit": (None, {}),
    "training.load_best_model_at_end": (False, VALIDATED),
    "training.early_stopping_patience": (3, VALIDATED),
    "training.report_to": (["tensorboard"], {}),
    "merge.base_weights": ("original", GPU_QLORA),
    "merge.verify": ("none", {}),
    "merge.rows": (5, {}),
    "merge.max_kl": (0.5, {}),
    "merge.min_top1": (None, {}),
    "merge.max_loss_increase": (0.0, {}),
    "merge.max_logit_difference": (0.5, {}),
    "eval.sets.name": ("other", OWN_SET),
    "eval.sets.path": ("other.jsonl", OWN_SET),
    "eval.sets.format": ("alpaca", OWN_SET),
    "eval.sets.columns": ({"completion": "answer"}, OWN_SET),
    "eval.sets.template": ({"completion": "{{ answer }}"}, OWN_SET),
    "eval.sets.max_rows": (5, OWN_SET),
    "eval.sets.role": ("forgetting", OWN_SET),
    "eval.sets.metrics": (["token_f1"], OWN_SET),
    "eval.sets.options": (["yes", "no"], OWN_SET),
    "eval.sets.limit": (5, OWN_SET),
    "eval.sets.max_new_tokens": (5, OWN_SET),
    "eval.forgetting": ([], {}),
    "eval.metrics": (["token_f1", {"regex": "a+"}], {}),
    "eval.limit": (5, {}),
    "eval.max_new_tokens": (5, {}),
    "eval.seed": (5, {}),
    "eval.gates": (["heldout.loss.adapter < 1"], {}),
    "eval.lm_eval.tasks": (["other"], BENCHMARKED),
    "eval.lm_eval.include_path": ("tasks", BENCHMARKED),
    "eval.lm_eval.num_fewshot": (2, BENCHMARKED),
    "eval.lm_eval.limit": (5, BENCHMARKED),
    "eval.lm_eval.apply_chat_template": (True, BENCHMARKED),
    "eval.trust_code": (True, {}),
    "eval.judge.base_url": ("http://localhost:2/v1", JUDGED),
    "eval.judge.model": ("other", JUDGED),
    "eval.judge.api_key_env": ("KEY", JUDGED),
    "eval.judge.rows": (5, JUDGED),
    "eval.judge.prompt": ("{question} {expected} {first} {second}", JUDGED),
    "eval.judge.timeout": (5.0, JUDGED),
    "eval.judge.max_tokens": (5, JUDGED),
    "output_dir": ("elsewhere/run", {}),
    "start_from": ("ADAPTER", {}),
}


def leaf_fields() -> list[str]:
    """Every field of the schema that is not a section itself, by path."""
    paths = dict(sections())
    return [
        ".".join((*where, name))
        for where, section in paths.items()
        for name in section.model_fields
        if (*where, name) not in paths
    ]


def with_value(content: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    step, rest = path[0], path[1:]
    if not rest:
        return content | {step: value}
    child = content.get(step) or {}
    changed = [with_value(child[0], rest, value)] if isinstance(child, list) else with_value(child, rest, value)
    return content | {step: changed}


def echo_free(plan: Plan) -> dict[str, Any]:
    """What a plan hands on: without the recipe that it repeats, its folder's name, and what it tells people."""
    raw: dict[str, Any] = json.loads(plan.to_json())
    for key in ("recipe", "name", "choices", "remarks"):
        del raw[key]
    return raw


def test_the_table_has_every_field() -> None:
    sources = {("dataset", "validation", name) for name in Source.model_fields}
    fields = {field for field in leaf_fields() if tuple(field.split(".")) not in sources}
    fields = {field for field in fields if not field.startswith("hardware.")}  # decide nothing; see test_meant.py
    assert "dataset.validation" in fields | set(map(".".join, dict(sections())))
    assert fields | {"dataset.validation"} == set(CHANGES)


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_reaches_something(field: str, planner: Planner) -> None:
    value, context = CHANGES[field]
    files = {"TEMPLATE": "template.jinja", "MORE": "more.jsonl", "TEXTS": "texts.jsonl", "ADAPTER": "adapter"}
    files["PAIRS"] = "pairs.jsonl"
    (planner.folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (planner.folder / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "m", "r": 16, "target_modules": ["q_proj"]}
    (planner.folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (planner.folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\x02" + b"\x00" * 7 + b"{}")
    (planner.folder / "template.jinja").write_text(CHATML)
    (planner.folder / "more.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (planner.folder / "texts.jsonl").write_text('{"prompt": "a", "completion": "b", "text": "ab"}\n')

    def real(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: real(child) for key, child in part.items()}
        if isinstance(part, list):
            return [real(child) for child in part]
        return str(planner.folder / files[part]) if isinstance(part, str) and part in files else part

    hardware = context.get("hardware", CPU)
    before = real(merged(planner.base, {key: part for key, part in context.items() if key != "hardware"}))
    after = with_value(before, field.split("."), real(value))
    if field == "quantization.load_in_4bit":  # exactly one of the two is true
        after["quantization"]["load_in_8bit"] = True
    if field == "quantization.load_in_8bit":
        after["quantization"]["load_in_4bit"] = False
    plans = []
    for content in (before, after):
        name = content["model"]["name_or_path"]
        facts = dataclasses.replace(FACTS, name=name)
        plans.append(echo_free(make_plan(planner.load(content), facts, hardware, default_name="name")))
    assert plans[0] != plans[1]
    if field not in ("model.name_or_path", "output_dir"):
        assert plans[0]["model"]["name_or_path"] == plans[1]["model"]["name_or_path"]


def test_the_seed_reaches_the_training_and_the_split(planner: Planner) -> None:
    plan = planner(training={"seed": 7})
    assert plan.training.seed == plan.data.seed == 7


def test_validation_sources_reach_the_plan(planner: Planner) -> None:
    source = {
        "path": "owner/rows",
        "format": "text",
        "columns": {"text": "body"},
        "split": "test",
        "name": "small",
        "revision": "v2",
    }
    (plan,) = planner(dataset={"validation": [source]}).data.validation
    assert (plan.path, plan.format, plan.columns) == ("owner/rows", "text", {"text": "body"})
    assert plan.hub == {"split": "test", "name": "small", "revision": "v2"}


def test_extends_is_consumed_by_the_loader(planner: Planner) -> None:
    (planner.folder / "parent.yaml").write_text("lora: {r: 3}\n")
    recipe = planner.load({"extends": "parent.yaml"})
    assert recipe.lora is not None
    assert recipe.lora.r == 3
    assert "extends" not in recipe.resolved()


def test_what_is_planned_is_what_the_libraries_take(planner: Planner) -> None:
    from lorafit.engine.adapters import lora
    from lorafit.engine.model import quantization_config
    from lorafit.engine.trainer import training_arguments
    from lorafit.run.directory import RunDir

    values = {"per_device_train_batch_size": 3, "warmup_steps": 5, "seed": 7, "weight_decay": 0.5}
    plan = planner(CPU, training=values, quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"})
    arguments = training_arguments(plan, RunDir(planner.folder / "run"))
    for name, value in (plan.training_kwargs | values).items():
        if name in ("eval_strategy", "eval_steps", "save_strategy", "save_steps", "greater_is_better"):
            continue  # follow from the number of rows
        if hasattr(arguments, name) and name not in ("load_best_model_at_end", "lr_scheduler_kwargs"):
            assert getattr(arguments, name) == value, name
    config: Any = lora.config(plan.lora_kwargs or {})
    for name, value in (plan.lora_kwargs or {}).items():
        given = getattr(config, name)
        assert (sorted(given) if isinstance(given, set) else given) == (
            sorted(value) if isinstance(given, set) else value
        )
    assert quantization_config(plan.quantization_kwargs or {}).bnb_4bit_quant_type == "fp4"


# --- the plan as a file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "sections"),
    [
        (CPU, {}),
        (AMPERE, QLORA | {"dataset": {"validation": 0.25}}),
        (T4, {"lora": ..., "training": {"packing": True, "report_to": ["tensorboard"]}}),
        (
            CPU,
            {"dataset": {"train": [{"path": "owner/rows"}], "validation": [{"path": "owner/rows", "split": "test"}]}},
        ),
        (CPU, {"lora": {"rank_pattern": {"q_proj": 3}, "init_lora_weights": "orthogonal"}, "output_dir": "ä/ö"}),
    ],
)
def test_json_and_back(planner: Planner, hardware: Hardware, sections: dict[str, Any]) -> None:
    plan = planner(hardware, **sections)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_a_plan_of_before_recipes_said_how_to_evaluate_and_merge(planner: Planner) -> None:
    plan = planner()
    raw = json.loads(plan.to_json())
    for later in ("merge", "eval"):
        del raw[later], raw["recipe"][later]
    old = Plan.from_json(json.dumps(raw))
    assert old.merge == old.eval == {}
    assert old.decides() == plan.decides()


def test_what_comes_after_decides_nothing_about_the_training(planner: Planner) -> None:
    plan, other = planner(), planner(merge={"max_kl": None, "rows": 7}, eval={"limit": 7})
    assert (plan.merge["max_kl"], other.merge["max_kl"], other.merge["rows"]) == (0.1, None, 7)
    assert plan.decides() == other.decides()
    assert plan.decides() != planner(lora={"r": 3}).decides()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"data": 3}', "null"])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Plan.from_json(text)


def test_where_the_run_goes(planner: Planner) -> None:
    assert planner().output_dir == "runs/name"
    assert planner(output_dir="a/b").name == "b"


# --- the number of steps --------------------------------------------------------------------------


def kwargs(**values: Any) -> dict[str, Any]:
    usual = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 3,
        "eval_strategy": "no",
        "eval_steps": None,
        "save_strategy": "auto",
        "save_steps": None,
    }
    return usual | values


def training(**values: Any) -> Training:
    everything = dict.fromkeys(field.name for field in dataclasses.fields(Training))
    return Training.of(everything | kwargs(**values))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("epochs", [0.01, 1, 2.5, 3])
def test_steps_are_counted_as_transformers_counts_them(world: int, epochs: float) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers import Trainer

    class Loader:
        def __init__(self, rows: int, batch: int) -> None:
            sampler = BatchSampler(SequentialSampler(range(rows)), batch, drop_last=False)
            self.sampler = BatchSamplerShard(sampler, world, 0) if world > 1 else sampler
            self.dataset = range(rows)

        def __len__(self) -> int:
            return len(self.sampler)

    class Counter(Trainer):
        def __init__(self) -> None:
            pass

        def get_total_train_batch_size(self, args: Any) -> int:
            return 1

        def get_sp_size(self) -> int:
            return 1

    for rows in (1, 2, 7, 8, 9, 64, 100, 257):
        for batch in (1, 3, 8):
            for accumulation in (1, 2, 5):
                for max_steps in (-1, 1, 10):
                    values = kwargs(
                        per_device_train_batch_size=batch,
                        gradient_accumulation_steps=accumulation,
                        max_steps=max_steps,
                        num_train_epochs=epochs,
                    )
                    counted = Counter().set_initial_training_values(SimpleNamespace(**values), Loader(rows, batch))
                    schedule = make_schedule(rows, training(**values), world)
                    assert (schedule.steps_per_epoch, schedule.total_steps) == (counted[1], counted[-1])


def test_evaluations_and_checkpoints_of_an_epoch_become_steps() -> None:
    schedule = make_schedule(100, training(eval_strategy="epoch"), 1)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (7, 21)
    assert (schedule.eval_steps, schedule.save_steps) == (7, 7)
    short = make_schedule(100, training(eval_strategy="epoch", max_steps=5), 1)
    assert (short.eval_steps, short.save_steps) == (5, 5)
    own = make_schedule(100, training(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=6), 1)
    assert (own.eval_steps, own.save_steps) == (3, 6)
    assert make_schedule(100, training(eval_strategy="steps", eval_steps=3), 1).save_steps == 3
    often = make_schedule(100, training(eval_strategy="epoch", evals_per_epoch=2, saves_per_epoch=4), 1)
    assert (often.eval_steps, often.save_steps) == (4, 2)
    assert make_schedule(100, training(eval_strategy="epoch", evals_per_epoch=4), 1).save_steps == 2
    assert make_schedule(100, training(eval_strategy="epoch", evals_per_epoch=99), 1).eval_steps == 1
    none = make_schedule(100, training(save_strategy="no"), 1)
    assert (none.eval_steps, none.save_steps) == (None, None)


def test_what_a_method_does_not_read_is_refused(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = dataclasses.replace(SFT, title="of pairs", reads={"preference": ""})
    monkeypatch.setattr("lorafit.plan.data.method_of", lambda recipe: pairs)
    with pytest.raises(DataError, match=r"dataset.train.0: of pairs .* prompt_completion"):
        planner()


def test_the_schedule_leaves_the_held_out_rows_out(planner: Planner) -> None:
    plan = planner(dataset={"validation": 0.25}, training={"per_device_train_batch_size": 10})
    assert plan.schedule is not None
    assert plan.schedule.steps_per_epoch == 3
    assert because(plan, "steps") == Like("30 rows … 3 steps")
    packed = planner(training={"packing": True})
    assert packed.schedule is None
    assert any("packed" in remark for remark in packed.remarks)


@pytest.mark.parametrize(("rows", "fraction"), [(1, 0.5), (2, 0.001), (2, 0.999), (10, 0.25), (1000, 0.1)])
def test_validation_rows(rows: int, fraction: float) -> None:
    count = validation_rows(rows, fraction)
    assert 0 <= count < rows
    assert abs(count - rows * fraction) <= 1 or rows == 1
    assert count >= 1 or rows == 1
    assert validation_rows(rows, None) == 0
    assert math.isfinite(count)


def test_plan_recipe_reads_the_facts(planner: Planner) -> None:
    model = planner.folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    recipe = planner.load({"model": {"name_or_path": str(model)}})
    plan = plan_recipe(recipe, "configs/some-name.yaml", CPU)
    assert plan.output_dir == "runs/some-name"
    assert plan.model.source == "config.json (no safetensors files)"
