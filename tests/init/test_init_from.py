"""`lorafit init --from`: other tools' recipes become recipes that train the same, and nothing is dropped in silence."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, write_jsonl
from typer.testing import CliRunner
from wording import Like

from lorafit.cli import app
from lorafit.errors import UsageError
from lorafit.init.document import recipe_of
from lorafit.init.peers import KINDS, PEERS, convert
from lorafit.init.peers.convert import Conversion, Kind, find
from lorafit.recipe import Recipe, RecipeError
from lorafit.recipe.load import section_at
from lorafit.rows import Row, Shape, to_example

LLAMA = "meta-llama/Meta-Llama-3-8B"

AXOLOTL_QLORA = """\
base_model: meta-llama/Meta-Llama-3-8B
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer

load_in_8bit: false
load_in_4bit: true
strict: false

datasets:
  - path: {folder}/alpaca.jsonl
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/qlora-out

adapter: qlora
lora_model_dir:

sequence_len: 4096
sample_packing: true
pad_to_sequence_len: true

lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
lora_fan_in_fan_out:

wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:

gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: "2e-4"

train_on_inputs: no
group_by_length: false
bf16: auto
fp16:
tf32: false

gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
logging_steps: 1
xformers_attention:
flash_attention: true

warmup_steps: 10
evals_per_epoch: 1
eval_table_size:
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
  pad_token: "<|end_of_text|>"
"""

AXOLOTL_CHAT = """\
base_model: meta-llama/Meta-Llama-3-8B-Instruct
plugins:
  - axolotl.integrations.liger.LigerPlugin
liger_rms_norm: true
chat_template: llama3
datasets:
  - path: {folder}/chat.jsonl
    type: chat_template
    field_messages: messages
    message_property_mappings:
      role: role
      content: content
    roles_to_train: ["assistant"]
    train_on_eos: turn
test_datasets:
  - path: {folder}/held-out.jsonl
    type: chat_template
    split: train
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
lora_modules_to_save: [embed_tokens, lm_head]
peft_use_rslora: true
loraplus_lr_ratio: 16
micro_batch_size: 1
gradient_accumulation_steps: 8
max_steps: 40
num_epochs: 3
optimizer: adamw_bnb_8bit
learning_rate: 1e-4
cosine_min_lr_ratio: 0.1
warmup_ratio: 0.1
bf16: true
sdp_attention: true
eval_steps: 10
save_steps: 20
early_stopping_patience: 2
neftune_noise_alpha: 5
wandb_project: tickets
wandb_entity: acme
hub_model_id: acme/tickets
deepspeed: deepspeed_configs/zero2.json
seed: 7
sequance_len: 4096
"""

AXOLOTL_FULL = """\
base_model: meta-llama/Meta-Llama-3-8B
datasets:
  - path: acme/texts
    name: english
    split: train[:500]
    type: completion
    field: body
  - path: acme/conversations
    type: sharegpt
    conversation: chatml
micro_batch_size: 2
batch_size: 32
learning_rate: 0.00002
lora_r: 8
lr_scheduler: rex
optimizer: lion_8bit
save_strategy: "no"
"""

FACTORY_LORA = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all

### dataset
dataset: tickets,dialogues
dataset_dir: {folder}
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none  # choices: [none, wandb, tensorboard, swanlab, mlflow]

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""

FACTORY_QLORA = """\
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
quantization_bit: 4
quantization_method: bnb
finetuning_type: lora
lora_target: q_proj,v_proj
use_dora: true
pissa_init: false
dataset: far_away
template: qwen
mask_history: true
neat_packing: true
packing: true
flash_attn: fa2
upcast_layernorm: true
val_size: 0.2
"""

FACTORY_FULL = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B
finetuning_type: full
lora_rank: 16
dataset: tickets
eval_dataset: dialogues
dataset_dir: {folder}
template: some_template
train_on_prompt: true
deepspeed: examples/deepspeed/ds_z3_config.json
disable_gradient_checkpointing: true
group_by_length: true
optim: adamw_torch
bf16: true
learnin_rate: 1.0e-5
"""

TRL_CHAT = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
dtype: bfloat16
dataset_name: {folder}/split
assistant_only_loss: true
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: all-linear
load_in_4bit: true
max_length: 2048
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 2.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.05
num_train_epochs: 1
eval_strategy: steps
eval_steps: 100
bf16: true
report_to: [tensorboard]
output_dir: out/sft
eos_token: <|eot_id|>
"""

TRL_DEFAULTS = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B
dataset_name: acme/capybara
use_peft: true
"""

TRL_FULL = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B
datasets:
  - path: json
    data_files: {folder}/pairs.jsonl
lora_r: 8
max_steps: 100
num_train_epochs: 3
max_seq_length: 512
torch_dtype: bfloat16
optim: adamw_8bit
warmup_steps: 0.1
packing_strategy: wrapped
gradient_checkpointing: false
push_to_hub: false
attn_implementation: flash_attention_2
"""

RECIPES: dict[str, tuple[str, str]] = {
    "axolotl-qlora": ("axolotl", AXOLOTL_QLORA),
    "axolotl-chat": ("axolotl", AXOLOTL_CHAT),
    "axolotl-full": ("axolotl", AXOLOTL_FULL),
    "factory-lora": ("llamafactory", FACTORY_LORA),
    "factory-qlora": ("llamafactory", FACTORY_QLORA),
    "factory-full": ("llamafactory", FACTORY_FULL),
    "trl-chat": ("trl", TRL_CHAT),
    "trl-defaults": ("trl", TRL_DEFAULTS),
    "trl-full": ("trl", TRL_FULL),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data sets of every kind that the recipes name."""
    talk = [conversation(f"question {i}", f"answer {i}") for i in range(20)]
    alpaca = [{"instruction": f"say {i}", "input": "", "output": f"said {i}"} for i in range(40)]
    write_jsonl(tmp_path / "chat.jsonl", talk)
    write_jsonl(tmp_path / "held-out.jsonl", talk[:4])
    write_jsonl(tmp_path / "alpaca.jsonl", alpaca)
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "split").mkdir()
    write_jsonl(tmp_path / "split" / "train.jsonl", talk)
    write_jsonl(tmp_path / "split" / "test.jsonl", talk[:4])
    info = {
        "tickets": {"file_name": "alpaca.jsonl", "columns": {"prompt": "instruction", "query": "input"}},
        "dialogues": {
            "file_name": "chat.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "pictures": {"file_name": "x.json", "columns": {"images": "images"}},
        "better": {"file_name": "x.json", "ranking": True},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def converted(folder: Path, content: str, kind: str | None = None, name: str = "other.yml") -> Conversion:
    (folder / name).write_text(content.replace("{folder}", str(folder)), encoding="utf-8")
    return convert(folder / name, folder / "recipe.yaml", kind)[1]


def recipe_from(folder: Path, name: str) -> dict[str, Any]:
    return recipe_of(converted(folder, RECIPES[name][1]).document().text(), "recipe.yaml").resolved()


def same(found: dict[str, Any], wanted: dict[str, Any], path: str = "") -> None:
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(found[key], dict) and key != "template":
            same(found[key], value, f"{path}{key}.")
        else:
            assert found[key] == value, f"{path}{key}"


@pytest.mark.parametrize("name", RECIPES)
def test_whose_a_recipe_is_shows_in_its_keys(folder: Path, name: str) -> None:
    kind, content = RECIPES[name]
    (folder / "other.yml").write_text(content.replace("{folder}", str(folder)))
    assert convert(folder / "other.yml", folder / "r.yaml")[0] == kind


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_is_mapped_or_listed_or_explained(folder: Path, name: str) -> None:
    made = converted(folder, RECIPES[name][1])
    listed = {note.key for note in made.notes}
    document = made.document()
    nested = {
        f"{key}.{index}.{name}"
        for key in ("datasets", "test_datasets")
        if key in made.source
        for index, entry in enumerate(made.source[key].value)
        for name in entry.value
    }
    for key in (*made.source, *nested):
        fate = made.fates[key]
        explained = fate.startswith(("no effect", "has no effect", "off", "empty", "as lorafit"))
        reached = any(
            line == target or line.startswith(f"{target}.") for target in fate.split(", ") for line in document.lines
        )
        assert key in listed or explained or reached, (key, fate)
    text = document.text()
    for line in (*made.said(), *made.idle()):
        assert f"#   {line}" in text
    explained = {key for key in made.source if made.fates[key].startswith(("no effect", "off", "empty", "as lorafit"))}
    assert explained - listed <= {line.split(": ")[1] for line in made.idle()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_names_only_keys_that_recipes_have(kind: Kind) -> None:
    rules = PEERS[kind].RULES
    assert len({rule.key for rule in rules}) == len(rules)
    for rule in rules:
        for target in filter(None, rule.target.split(", ")):
            *path, name = target.split(".")
            section = section_at(tuple(path))
            assert name in (section.model_fields if section else ()), (rule.key, target)


def test_axolotl_qlora(folder: Path) -> None:
    recipe = recipe_from(folder, "axolotl-qlora")
    same(
        recipe,
        {
            "model": {
                "name_or_path": LLAMA,
                "dtype": "auto",
                "attn_implementation": "flash_attention_2",
                "chat_template": None,
            },
            "quantization": {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "lora": {
                "r": 32,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "target_modules": "all-linear",
                "modules_to_save": None,
                "use_dora": False,
            },
            "dataset": {
                "validation": 0.05,
                "loss_on": "assistant",
                "excess_length_strategy": "drop",
            },
            "training": {
                "max_length": 4096,
                "packing": True,
                "num_train_epochs": 4,
                "max_steps": None,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 4,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 10,
                "warmup_ratio": None,
                "optim": "paged_adamw_32bit",
                "weight_decay": 0.0,
                "max_grad_norm": 1.0,
                "gradient_checkpointing": True,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "load_best_model_at_end": False,
                "early_stopping_patience": None,
                "seed": 42,
                "report_to": [],
            },
            "output_dir": "./outputs/qlora-out",
        },
    )
    (source,) = recipe["dataset"]["train"]
    assert source["path"] == str(folder / "alpaca.jsonl")


def test_axolotl_alpaca_rows_get_the_prompt_of_alpaca(folder: Path) -> None:
    from lorafit.rows import Shape, read_rows, to_example

    write_jsonl(folder / "alpaca.jsonl", [{"instruction": "Add.", "input": "1 + 2", "output": "3"}])
    (source,) = recipe_from(folder, "axolotl-qlora")["dataset"]["train"]
    (row,) = read_rows(source["path"])
    example = to_example(row, Shape(source["format"], source["columns"], source["template"]))
    assert example.prompt is not None
    assert example.prompt.startswith("Below is an instruction that describes a task, paired with an input")
    assert example.prompt.endswith("\n\n### Instruction:\nAdd.\n\n### Input:\n1 + 2\n\n### Response:\n")
    assert example.completion == "3"


def test_axolotl_conversations(folder: Path) -> None:
    recipe = recipe_from(folder, "axolotl-chat")
    same(
        recipe,
        {
            "model": {"dtype": "bfloat16", "attn_implementation": "sdpa", "chat_template": "llama3"},
            "quantization": None,
            "lora": {
                "r": 16,
                "lora_alpha": 32,
                "lora_dropout": 0.0,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
                "modules_to_save": ["embed_tokens", "lm_head"],
                "use_rslora": True,
                "loraplus_lr_ratio": 16,
            },
            "dataset": {"loss_on": "assistant"},
            "training": {
                "max_length": 512,
                "packing": False,
                "num_train_epochs": None,
                "max_steps": 40,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": 8,
                "learning_rate": 1e-4,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "warmup_ratio": 0.1,
                "optim": "adamw_8bit",
                "eval_strategy": "steps",
                "eval_steps": 10,
                "save_strategy": "steps",
                "save_steps": 20,
                "early_stopping_patience": 2,
                "load_best_model_at_end": True,
                "neftune_noise_alpha": 5,
                "gradient_checkpointing": False,
                "report_to": ["wandb"],
                "seed": 7,
            },
        },
    )
    assert recipe["dataset"]["train"][0]["format"] == "messages"
    assert recipe["dataset"]["validation"][0]["path"] == str(folder / "held-out.jsonl")


def test_what_axolotl_has_alone_is_listed_with_its_line(folder: Path) -> None:
    said = converted(folder, AXOLOTL_CHAT).said()
    file = folder / "other.yml"
    assert any(line.startswith(f"{file}:41: wandb_entity: no equivalent") for line in said)
    assert any(line.startswith(f"{file}:43: deepspeed: no equivalent") for line in said)
    assert any(line == Like(f"{file}:45: sequance_len: … axolotl … sequence_len") for line in said)
    assert [line.split(": ")[1] for line in said] == [
        "wandb_project",
        "wandb_entity",
        "hub_model_id",
        "deepspeed",
        "sequance_len",
    ]


def test_axolotl_without_an_adapter_trains_all_weights(folder: Path) -> None:
    made = converted(folder, AXOLOTL_FULL)
    recipe = recipe_of(made.document().text(), "recipe.yaml").resolved()
    assert recipe["lora"] is None
    assert recipe["quantization"] is None
    assert recipe["model"]["dtype"] == "bfloat16"
    assert recipe["training"]["gradient_accumulation_steps"] == 16
    assert recipe["training"]["num_train_epochs"] == 1
    assert recipe["training"]["warmup_ratio"] == 0.03
    assert recipe["training"]["lr_scheduler_type"] == "cosine"
    assert recipe["training"]["optim"] == "lion_8bit"
    assert recipe["training"]["save_strategy"] == "no"
    texts, talks = recipe["dataset"]["train"]
    assert (texts["path"], texts["name"], texts["max_rows"]) == ("acme/texts", "english", 500)
    assert (texts["format"], texts["columns"]) == ("text", {"text": "body"})
    assert talks["format"] == "sharegpt"
    assert made.fates["lora_r"] == Like("… no effect … adapter")
    template = Path(recipe["model"]["chat_template"])
    assert template == folder / "recipe.chatml.jinja"
    assert "<|im_start|>" in made.beside[template]
    assert any("lr_scheduler: 'rex'" in line for line in made.said())


def test_llama_factory_lora(folder: Path) -> None:
    recipe = recipe_from(folder, "factory-lora")
    same(
        recipe,
        {
            "model": {
                "name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
                "trust_remote_code": True,
                "dtype": "bfloat16",
                "chat_template": "llama3",
                "attn_implementation": "auto",
            },
            "quantization": None,
            "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
            "dataset": {"validation": 0.1, "loss_on": "assistant", "excess_length_strategy": "truncate"},
            "training": {
                "max_length": 2048,
                "packing": False,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 1,
                "per_device_eval_batch_size": 1,
                "gradient_accumulation_steps": 8,
                "learning_rate": 1e-4,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.1,
                "optim": "adamw_torch_fused",
                "gradient_checkpointing": True,
                "dataloader_num_workers": 4,
                "logging_steps": 10,
                "eval_strategy": "steps",
                "eval_steps": 500,
                "save_strategy": "steps",
                "save_steps": 500,
                "load_best_model_at_end": False,
                "report_to": [],
            },
            "output_dir": "saves/llama3-8b/lora/sft",
        },
    )
    tickets, dialogues = recipe["dataset"]["train"]
    assert (tickets["path"], tickets["format"], tickets["max_rows"]) == (str(folder / "alpaca.jsonl"), "alpaca", 1000)
    assert (dialogues["path"], dialogues["format"]) == (str(folder / "chat.jsonl"), "messages")


def test_llama_factory_joins_instruction_and_input_by_one_line_break(folder: Path) -> None:
    from lorafit.rows import Shape, read_rows, to_example

    rows = [{"instruction": "Add.", "input": "1 + 2", "output": "3"}, {"instruction": "Hi", "output": "Ho"}]
    write_jsonl(folder / "alpaca.jsonl", rows)
    source = recipe_from(folder, "factory-lora")["dataset"]["train"][0]
    shape = Shape(source["format"], source["columns"], source["template"])
    said = [to_example(row, shape).messages[0]["content"] for row in read_rows(source["path"])]
    assert said == ["Add.\n1 + 2", "Hi"]


def test_llama_factory_qlora_with_its_own_defaults(folder: Path) -> None:
    made = converted(folder, FACTORY_QLORA)
    recipe = recipe_of(made.document().text(), "recipe.yaml").resolved()
    same(
        recipe,
        {
            "model": {"dtype": "auto", "chat_template": "qwen2_5", "attn_implementation": "flash_attention_2"},
            "quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "lora": {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": ["q_proj", "v_proj"]},
            "dataset": {"loss_on": "completion", "validation": 0.2},
            "training": {
                "max_length": 2048,
                "packing": True,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "learning_rate": 5e-5,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0,
                "eval_strategy": "no",
                "load_best_model_at_end": False,
            },
        },
    )
    said = "\n".join(made.said())
    assert said == Like("… dataset: 'far_away' … data/dataset_info.json")
    assert "upcast_layernorm: no equivalent" in said


def test_llama_factory_in_full(folder: Path) -> None:
    made = converted(folder, FACTORY_FULL)
    recipe = recipe_of(made.document().text(), "recipe.yaml").resolved()
    assert recipe["lora"] is None
    assert recipe["model"]["dtype"] == "auto"
    assert recipe["dataset"]["loss_on"] == "all"
    assert recipe["dataset"]["validation"][0]["path"] == str(folder / "chat.jsonl")
    assert recipe["training"]["gradient_checkpointing"] is False
    assert recipe["training"]["train_sampling_strategy"] == "group_by_length"
    said = "\n".join(made.said())
    assert "template: 'some_template' " in said
    assert said == Like("… learnin_rate: … LLaMA-Factory … learning_rate")


def test_trl_with_an_adapter(folder: Path) -> None:
    made = converted(folder, TRL_CHAT)
    recipe = recipe_of(made.document().text(), "recipe.yaml").resolved()
    same(
        recipe,
        {
            "model": {"dtype": "bfloat16"},
            "quantization": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
            "lora": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"},
            "dataset": {"loss_on": "assistant"},
            "training": {
                "max_length": 2048,
                "packing": True,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 8,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "cosine",
                "warmup_ratio": 0.05,
                "num_train_epochs": 1,
                "eval_strategy": "steps",
                "eval_steps": 100,
                "gradient_checkpointing": True,
                "optim": "adamw_torch_fused",
                "report_to": ["tensorboard"],
                "load_best_model_at_end": False,
            },
            "output_dir": "out/sft",
        },
    )
    assert recipe["dataset"]["train"][0]["path"] == str(folder / "split" / "train.*")
    assert recipe["dataset"]["validation"][0]["path"] == str(folder / "split" / "test.*")
    assert [note.key for note in made.notes] == ["eos_token"]


def test_trl_with_its_own_defaults(folder: Path) -> None:
    """As trl.SFTConfig, trl.ModelConfig and PEFT have them."""
    made = converted(folder, TRL_DEFAULTS)
    same(
        recipe_of(made.document().text(), "recipe.yaml").resolved(),
        {
            "model": {"dtype": "float32"},
            "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "qv"},
            "dataset": {"loss_on": "all", "validation": None},
            "training": {
                "max_length": 1024,
                "packing": False,
                "num_train_epochs": 3,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "learning_rate": 2e-5,
                "lr_scheduler_type": "linear",
                "warmup_steps": 0,
                "weight_decay": 0.0,
                "gradient_checkpointing": True,
            },
        },
    )
    assert any("set loss_on: completion" in line for line in made.said())


def test_trls_defaults_are_those_of_the_installed_trl(folder: Path) -> None:
    from trl import ModelConfig, SFTConfig

    recipe = recipe_from(folder, "trl-defaults")
    theirs, model = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False), ModelConfig()
    ours = recipe["training"]
    for name in (
        "max_length",
        "packing",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "gradient_checkpointing",
        "neftune_noise_alpha",
        "seed",
    ):
        assert ours[name] == getattr(theirs, name), name
    assert ours["lr_scheduler_type"] == theirs.lr_scheduler_type.value
    assert ours["optim"] == theirs.optim.value
    assert (theirs.eval_strategy.value, theirs.assistant_only_loss, theirs.completion_only_loss) == ("no", False, None)
    lora = recipe["lora"]
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (
        model.lora_r,
        model.lora_alpha,
        model.lora_dropout,
    )
    assert (model.lora_target_modules, model.dtype, model.use_bnb_nested_quant) == (None, "float32", False)


def test_trl_knows_no_key_that_the_table_does_not(folder: Path) -> None:
    import dataclasses

    from trl import ModelConfig, ScriptArguments, SFTConfig

    known = {field.name for kind in (SFTConfig, ModelConfig, ScriptArguments) for field in dataclasses.fields(kind)}
    assert not {name for name in known if find(PEERS["trl"].RULES, name) is None}


def test_trl_in_full(folder: Path) -> None:
    made = converted(folder, TRL_FULL)
    recipe = recipe_of(made.document().text(), "recipe.yaml").resolved()
    assert recipe["lora"] is None
    assert recipe["model"]["dtype"] == "bfloat16"
    assert recipe["dataset"]["loss_on"] == "completion"
    assert (recipe["training"]["max_steps"], recipe["training"]["num_train_epochs"]) == (100, None)
    assert recipe["training"]["max_length"] == 512
    assert recipe["training"]["warmup_ratio"] == 0.1
    assert [note.key for note in made.notes] == ["packing_strategy"]
    assert "max_steps" in made.fates["num_train_epochs"]


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("axolotl-qlora", "rl: dpo", "rl: … dpo.yaml"),
        ("axolotl-qlora", "pretraining_dataset: [{path: x}]", "pretraining_dataset: "),
        ("axolotl-qlora", "processor_type: AutoProcessor", "processor_type: … text"),
        ("axolotl-full", "adapter: llama-adapter", "adapter: … llama-adapter"),
        ("axolotl-full", "load_in_8bit: true", "load_in_8bit: … quantized … adapter"),
        ("factory-full", "stage: dpo", "stage: … sft … dpo"),
        ("factory-full", "use_galore: true", "use_galore: … LoRA"),
        ("trl-full", "load_in_4bit: true", "load_in_4bit: … quantized … adapter"),
    ],
)
def test_another_kind_of_training_is_refused_with_its_line(folder: Path, kind: str, change: str, said: str) -> None:
    content = RECIPES[kind][1] + change + "\n"
    with pytest.raises(UsageError) as caught:
        converted(folder, content, RECIPES[kind][0])
    assert str(caught.value) == Like(f"{folder / 'other.yml'}:{content.count(chr(10))}: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "said"), [("pictures", "has images"), ("better", "holds preferences")])
def test_llama_factory_data_of_another_kind_is_refused(folder: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        converted(folder, FACTORY_FULL.replace("dataset: tickets", f"dataset: {name}"))


def test_how_often_an_epoch(folder: Path) -> None:
    content = AXOLOTL_QLORA.replace("evals_per_epoch: 1", "evals_per_epoch: 4")
    training = recipe_of(converted(folder, content).document().text(), "r.yaml").training
    assert (training.evals_per_epoch, training.eval_strategy) == (4, "auto")
    assert (training.saves_per_epoch, training.save_strategy) == (None, "epoch")


@pytest.mark.parametrize(("metric", "taken"), [("eval_loss", None), ("eval_mean_token_accuracy", True), ("f1", False)])
def test_what_the_best_is_found_by(metric: str, taken: bool | None, folder: Path) -> None:
    content = f"{AXOLOTL_QLORA}\nload_best_model_at_end: true\nmetric_for_best_model: {metric}\n"
    made = converted(folder, content)
    asked = recipe_of(made.document().text(), "r.yaml").training.metric_for_best_model
    assert asked == ("mean_token_accuracy" if taken else None)
    assert any("metric_for_best_model" in line for line in made.said()) == (taken is False)


def test_a_number_of_validation_rows_becomes_a_share(folder: Path) -> None:
    made = converted(folder, AXOLOTL_QLORA.replace("val_set_size: 0.05", "val_set_size: 10"))
    assert made.value("dataset.validation") == 0.25


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("base_model: a/b\nbase_model: c/d\n", "is given twice"),
        ("base_model: !!python/object:os.system x\n", "tags such as"),
        ("- base_model\n", "mapping"),
        ("base_model: a/b\nlearning_rate: fast\n", "other.yml:2: learning_rate: … number … 'fast'"),
        ("base_model: a/b\nmicro_batch_size: 1.5\n", "micro_batch_size: … whole … 1.5"),
        ("base_model: a/b\nmicro_batch_size: 1\n", "datasets: "),
        ("micro_batch_size: 1\nsequence_len: 12\n", "base_model: is missing"),
    ],
)
def test_what_cannot_be_read_is_said(folder: Path, content: str, said: str) -> None:
    with pytest.raises((UsageError, RecipeError)) as caught:
        converted(folder, content, "axolotl")
    assert str(caught.value) == Like(f"… {said}")


def test_keys_that_do_not_tell_ask_for_the_kind(folder: Path) -> None:
    ambiguous = "model_name_or_path: a/b\nlearning_rate: 1e-4\n"
    with pytest.raises(UsageError, match="--kind axolotl, llamafactory, trl"):
        converted(folder, ambiguous)
    with pytest.raises(UsageError, match=r"trll.* trl\b"):
        converted(folder, ambiguous, "trll")


def test_the_command_writes_the_recipe_and_lists_the_rest(folder: Path) -> None:
    (folder / "axolotl.yml").write_text(AXOLOTL_CHAT.replace("{folder}", str(folder)))
    target = folder / "mine.yaml"
    done = CliRunner().invoke(app, ["init", str(target), "--from", str(folder / "axolotl.yml"), "--gpu", "RTX 4090"])
    assert done.exit_code == 0, done.output
    assert "axolotl's, " in done.stderr
    assert "axolotl.yml:43: deepspeed: no equivalent" in done.stderr
    assert f"lorafit train {target}" in done.stderr
    recipe = Recipe.load(target)
    assert recipe.hardware is not None
    assert recipe.hardware.gpu == "RTX 4090"
    assert "# Not converted:" in target.read_text()
    again = CliRunner().invoke(app, ["init", str(target), "--from", str(folder / "axolotl.yml")])
    assert again.exit_code == 2
    assert "--force" in again.stderr


def test_a_recipe_whose_model_and_data_are_elsewhere_is_still_written(folder: Path) -> None:
    (folder / "o.yml").write_text(TRL_DEFAULTS.replace(LLAMA, "acme/not-here"))
    target = folder / "mine.yaml"
    done = CliRunner().invoke(app, ["init", str(target), "--from", str(folder / "o.yml")])
    assert done.exit_code == 0, done.output
    assert "acme/not-here: config.json " in done.stderr
    assert Recipe.load(target).model.name_or_path == "acme/not-here"


@pytest.mark.parametrize("name", ["axolotl-full", "factory-qlora", "trl-full"])
def test_any_value_is_converted_or_refused(folder: Path, name: str) -> None:
    kind, content = RECIPES[name]
    values = ("3", "-1", "0", "0.5", "x", "[1]", "{a: 1}", "true", ".nan", "1e400", "'${A}'")
    for rule in PEERS[kind].RULES:  # type: ignore[index]
        if "[]" in rule.key or "*" in rule.key:
            continue
        others = re.sub(rf"(?m)^{rule.key}:.*\n((  |- ).*\n)*", "", content)
        for value in values if rule.fate in ("becomes", "decides") else values[:1]:
            with contextlib.suppress(UsageError):
                converted(folder, f"{others}{rule.key}: {value}\n", kind).document().text()


@pytest.mark.parametrize("value", ["3", "x", "[1]", "[x]", "{a: 1}", "{a: [x]}", "true", "", "0.5", "[[1]]"])
def test_any_value_of_a_data_set_is_converted_or_refused(folder: Path, value: str) -> None:
    for kind in ("chat_template", "sharegpt", "completion", "alpaca", "{field_instruction: q}"):
        for rule in PEERS["axolotl"].RULES:
            name = rule.key.removeprefix("datasets[].")
            if name != rule.key:
                entry = {"path": "a/b", "type": kind} | {name: value}
                content = f"base_model: a/b\ndatasets: [{{{', '.join(f'{k}: {v}' for k, v in entry.items())}}}]\n"
                with contextlib.suppress(UsageError):
                    converted(folder, content, "axolotl").document().text()


def test_a_secret_is_not_written(folder: Path) -> None:
    secret = "hf_" + "a" * 20
    made = converted(folder, TRL_DEFAULTS + f"push_to_hub: true\nhub_token: {secret}\n")
    assert any("hub_token: no equivalent" in line for line in made.said())
    assert secret not in made.document().text()


def test_what_makes_no_valid_recipe_is_said_of_the_other_one(folder: Path) -> None:
    (folder / "o.yml").write_text(FACTORY_QLORA.replace("pissa_init: false", "pissa_init: true"))
    done = CliRunner().invoke(app, ["init", str(folder / "r.yaml"), "--from", str(folder / "o.yml")])
    assert done.exit_code == 2
    assert done.stderr == Like("… o.yml: … lora.init_lora_weights: pissa_niter_16")
    assert not (folder / "r.yaml").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_decides_something_is_looked_at(kind: Kind) -> None:
    """A key in the table that no code reads would be dropped in silence."""
    import lorafit.init.peers as module

    folder = Path(module.__file__).parent
    files = [file for file in folder.glob("*.py") if file.stem.startswith(kind) or file.stem == "transformers"]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if "decides(" not in line]
    quoted = {*re.findall(r"""["']([a-z_0-9]+)["']""", "\n".join(lines))}
    quoted |= {f"{what}_{when}" for what in ("eval", "save") for when in ("steps", "strategy")}  # made of two parts
    ignored = {"ds_type", "logging_strategy"}  # the file's name tells; how often it logs, not when
    for rule in PEERS[kind].RULES:
        if rule.fate == "decides" and rule.target:
            assert rule.key.rpartition(".")[2] in quoted | ignored, rule.key


def axolotl(folder: Path, datasets: str, more: str = "") -> tuple[Conversion, dict[str, Any]]:
    """A small recipe of axolotl's with these data sets, converted."""
    content = (
        f"base_model: {LLAMA}\nadapter: lora\nmicro_batch_size: 1\nlearning_rate: 1e-4\nsequence_len: 64\n"
        f"datasets:\n{datasets}{more}"
    )
    made = converted(folder, content, "axolotl", "small.yml")
    return made, recipe_of(made.document().text(), "recipe.yaml").resolved()


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"q": "how?"}, "SYS Be {good}\nhow? "),
        ({"q": "how?", "input": "this"}, "SYS Be {good}\nQ: how? {x} this\nA:"),
        ({"q": "how?", "role": "Be bad", "input": ""}, "SYS Be bad\nhow? "),
        ({"q": "how?", "role": ""}, "how? "),
    ],
)
def test_axolotls_own_prompt_is_written_as_axolotl_writes_it(folder: Path, row: dict[str, str], prompt: str) -> None:
    kind = (
        "      system_prompt: Be {good}\n"
        '      system_format: "SYS {system}\\n"\n'
        "      field_instruction: q\n      field_system: role\n"
        '      format: "Q: {instruction} {{x}} {input}\\nA:"\n'
    )
    _, recipe = axolotl(folder, f"  - path: {folder}/own.jsonl\n    type:\n{kind}")
    source = recipe["dataset"]["train"][0]
    found = to_example(
        Row("own.jsonl", 1, row | {"output": "so"}), Shape(source["format"], template=source["template"])
    )
    assert (found.prompt, found.completion) == (prompt, "so")


def test_a_field_that_axolotl_does_not_fill_in_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"small.yml:9: datasets.0.type.format: \{question\}: "):
        axolotl(folder, "  - path: own.jsonl\n    type:\n      format: '{question}'\n")


def test_several_chat_templates_are_listed(folder: Path) -> None:
    sets = "".join(
        f"  - {{path: c.jsonl, type: chat_template, chat_template: {name}}}\n" for name in ("llama3", "qwen3")
    )
    made, recipe = axolotl(folder, sets, "chat_template: gemma\n")
    assert recipe["model"]["chat_template"] == "qwen3"
    assert [line.partition(" lorafit")[0] for line in made.said() if "one chat template" in line] == [
        f"{folder}/small.yml:8: datasets.1.chat_template:",
        f"{folder}/small.yml:9: chat_template:",
    ]


def test_arguments_of_a_schedule_that_has_no_equivalent_are_listed(folder: Path) -> None:
    more = "lr_scheduler: rex\nlr_scheduler_kwargs: {max_lr: 1}\n"
    made, recipe = axolotl(folder, "  - {path: a.jsonl, type: alpaca}\n", more)
    assert recipe["training"]["lr_scheduler_kwargs"] == {}
    assert any("lr_scheduler_kwargs: no equivalent" in line for line in made.said())


def test_the_environment_of_trl_is_listed(folder: Path) -> None:
    (folder / "t.yml").write_text(f"model_name_or_path: {LLAMA}\ndataset_name: org/set\nenv:\n  NAME: value\n")
    assert any(
        ":3: env: no equivalent" in line for line in convert(folder / "t.yml", folder / "recipe.yaml", "trl")[1].said()
    )


def test_llama_factorys_columns_without_an_equivalent_are_listed_or_refused(folder: Path) -> None:
    (folder / "l.yml").write_text(
        f"model_name_or_path: {LLAMA}\nstage: sft\ndataset: own\ndataset_dir: {folder / 'own'}\ntemplate: llama3\n"
    )
    (folder / "own").mkdir()
    for column, is_refused in (("strange", False), ("kto_tag", True)):
        entry = {"file_name": "a.jsonl", "columns": {"prompt": "q", column: "x"}}
        (folder / "own/dataset_info.json").write_text(json.dumps({"own": entry}))
        with pytest.raises(UsageError, match="preferences") if is_refused else contextlib.nullcontext():
            assert any(
                "columns.strange" in line
                for line in convert(folder / "l.yml", folder / "recipe.yaml", "llamafactory")[1].said()
            )


def test_llama_factory_online_reads_the_hub(folder: Path) -> None:
    (folder / "l.yml").write_text(
        f"model_name_or_path: {LLAMA}\nstage: sft\ndataset: org/set\ndataset_dir: ONLINE\ntemplate: llama3\n"
    )
    made = convert(folder / "l.yml", folder / "recipe.yaml", "llamafactory")[1]
    assert made.value("dataset.train")[0]["path"] == "org/set"


def test_files_beside_the_recipe_are_not_overwritten_either(folder: Path) -> None:
    jinja = "chat_template_jinja: '{{ messages }}'\nchat_template: jinja\n"
    axolotl(folder, "  - {path: c.jsonl, type: chat_template}\n", jinja)
    beside = folder / "mine.chat_template.jinja"
    beside.write_text("mine")
    arguments = ["init", str(folder / "mine.yaml"), "--from", str(folder / "small.yml")]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, beside.read_text()) == (2, "mine")
    assert not (folder / "mine.yaml").exists()
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    assert beside.read_text() == "{{ messages }}"


def test_of_hundreds_of_keys_only_those_that_are_alike_are_named(folder: Path) -> None:
    made, _ = axolotl(folder, "  - {path: a.jsonl, type: alpaca}\n", "zzz: 1\nsequence_length: 2\n")
    strange, alike = [line.partition(": ")[2] for line in made.said() if "unknown" in line]
    assert strange == Like("zzz: … unknown … axolotl")
    assert alike == Like("sequence_length: … unknown … axolotl … sequence_len,")


# --- values that look like "off" ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("FACTORY_QLORA", "enable_thinking: false"),
        ("FACTORY_QLORA", 'default_system: ""'),
        ("FACTORY_QLORA", "data_seed: 0"),
        ("FACTORY_QLORA", "ignore_pad_token_for_loss: false"),
        ("FACTORY_QLORA", "ignore_pad_token_for_loss: off"),
        ("FACTORY_QLORA", "average_tokens_across_devices: false"),
        ("AXOLOTL_CHAT", "shuffle_merged_datasets: false"),
        ("AXOLOTL_CHAT", "shuffle_merged_datasets: 'no'"),
        ("AXOLOTL_CHAT", "eot_tokens: []"),
        ("AXOLOTL_CHAT", "tokenizer_legacy: false"),
        ("TRL_DEFAULTS", "average_tokens_across_devices: false"),
        ("TRL_DEFAULTS", "data_seed: 0"),
    ],
)
def test_a_choice_that_looks_like_off_is_listed(folder: Path, content: str, line: str) -> None:
    key = line.partition(":")[0]
    kept = [one for one in globals()[content].splitlines() if not one.startswith(f"{key}:")]
    made = converted(folder, "\n".join([*kept, line, ""]))
    said = [one for one in made.said() if f":{len(kept) + 1}: {key}: " in one]
    assert len(said) == 1
    assert "Not converted:" in made.document().text()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("FACTORY_QLORA", "enable_thinking: null"),
        ("FACTORY_QLORA", "ignore_pad_token_for_loss: true"),
        ("FACTORY_QLORA", "data_seed: null"),
        ("AXOLOTL_CHAT", "shuffle_merged_datasets: true"),
        ("AXOLOTL_CHAT", "dataset_exact_deduplication: false"),
        ("AXOLOTL_CHAT", "eot_tokens: null"),
        ("TRL_DEFAULTS", "label_smoothing_factor: 0"),
        ("TRL_DEFAULTS", "dataloader_drop_last: false"),
    ],
)
def test_what_is_off_is_not_listed(folder: Path, content: str, line: str) -> None:
    key = line.partition(":")[0]
    kept = [one for one in globals()[content].splitlines() if not one.startswith(f"{key}:")]
    made = converted(folder, "\n".join([*kept, line, ""]))
    assert not [one for one in made.said() if f": {key}: " in one]


def test_thinking_that_is_turned_off_is_turned_off(folder: Path) -> None:
    made = converted(folder, f"{FACTORY_QLORA}enable_thinking: false\n")
    recipe = recipe_of(made.document().text(), "recipe.yaml")
    assert recipe.model.chat_template_kwargs == {"enable_thinking": False}


def test_noise_of_nothing_is_none(folder: Path) -> None:
    made = converted(folder, f"{FACTORY_QLORA}neftune_noise_alpha: 0\n")
    assert recipe_of(made.document().text(), "recipe.yaml").training.neftune_noise_alpha is None
