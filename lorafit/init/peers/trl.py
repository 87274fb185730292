"""TRL's recipes (`trl sft --config`): its keys, what several decide together, and its own defaults."""

from __future__ import annotations

from typing import Any

from lorafit.errors import LorafitError
from lorafit.init.peers import read
from lorafit.init.peers import transformers as shared
from lorafit.init.peers.convert import Conversion, Rules, becomes, decides, idle, lost, refused, table
from lorafit.rows import detect_format, is_local, read_rows

TITLE = "TRL"
NAMED = "model_name_or_path"
MARKS: tuple[str, ...] = (
    *("dataset_name", "use_peft", "lora_r", "max_length"),
    *("assistant_only_loss", "dtype", "torch_dtype"),
)
"""Keys by which a recipe is known to be TRL's."""
_ROWS = "dataset.train"

RULES: Rules = table(
    decides("dtype torch_dtype", "model.dtype"),
    decides("attn_implementation", "model.attn_implementation"),
    decides("chat_template_path", "model.chat_template"),
    decides("load_in_4bit load_in_8bit", "quantization"),
    decides("bnb_4bit_quant_type", "quantization.bnb_4bit_quant_type"),
    decides("use_bnb_nested_quant", "quantization.bnb_4bit_use_double_quant"),
    decides("use_peft", "lora"),
    becomes("lora_r", "lora.r", read.count),
    decides("lora_target_modules", "lora.target_modules"),
    becomes("lora_modules_to_save", "lora.modules_to_save", read.names),
    decides("dataset_name datasets dataset_train_split dataset_config", _ROWS),
    decides("dataset_test_split test_split_size", "dataset.validation"),
    decides("dataset_text_field", _ROWS),
    decides("dataset_streaming streaming", "dataset.streaming"),
    decides("assistant_only_loss completion_only_loss", "dataset.loss_on"),
    decides("max_length max_seq_length", "training.max_length"),
    becomes("packing", "training.packing", read.flag),
    decides("gradient_checkpointing activation_checkpointing", "training.gradient_checkpointing"),
    decides("datasets[].path datasets[].data_files datasets[].name datasets[].split", _ROWS),
    idle("datasets[].columns", "the format decides which columns are read"),
    lost("datasets[].fraction", "use max_rows or weight"),
    lost("datasets[].data_dir", "name the files"),
    shared.TRANSFORMERS,
    idle("padding_free pad_to_multiple_of eval_packing activation_offloading pad_token", shared.NOT_LEARNED),
    idle("ignore_bias_buffers bnb_4bit_quant_storage lora_task_type shuffle_dataset", shared.NOT_LEARNED),
    lost("env", "set environment variables where the training is started"),
    lost("dataset_kwargs", "lorafit prepares the rows itself"),
    refused("vision_model", "lorafit trains on text only"),
    lost("lora_target_parameters", "only linear layers are adapted"),
    lost("eos_token", "the chat template and the tokenizer decide how an answer ends"),
    lost("packing_strategy", "lorafit fills rows with whole examples", "bfd", "bfd_split"),
    lost("truncation_mode", "lorafit cuts at the end", "keep_start"),
    lost("loss_type", "lorafit has the usual cross-entropy", "nll", "chunked_nll"),
    lost("model_init_kwargs router_aux_loss_coef use_liger_loss", ""),
)


ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


def assemble(c: Conversion) -> None:
    """What several keys decide together, and TRL's own defaults."""
    adapter = c.on("use_peft")
    _quantization(c, adapter)
    if adapter:
        _adapter(c)
    else:
        c.without_adapter()
    _precision(c, adapter)
    _attention(c)
    _template(c)
    _sources(c)
    _masking(c)
    _training(c)
    shared.quiet_evaluation(c, logged=10)


def _quantization(c: Conversion, adapter: bool) -> None:
    four, eight = c.on("load_in_4bit"), c.on("load_in_8bit")
    key = "load_in_4bit" if four else "load_in_8bit"
    if (four or eight) and not adapter:
        c.refuse(key, "quantized weights can't be trained without an adapter; TRL wants use_peft: true with it")
    if four or eight:
        c.put(f"quantization.{key}", True, key)
    if four:
        c.choose("quantization.bnb_4bit_quant_type", "bnb_4bit_quant_type", read.text, "nf4")
        c.choose("quantization.bnb_4bit_use_double_quant", "use_bnb_nested_quant", read.flag, False)


def _adapter(c: Conversion) -> None:
    c.default("lora.r", 16)
    c.default("lora.lora_alpha", 32)
    c.default("lora.lora_dropout", 0.05)
    targets = c.plain("lora_target_modules")
    if not targets:
        shared.peft_default_targets(c)
    elif targets in ("all-linear", ["all-linear"]):
        c.put("lora.target_modules", "all-linear", "lora_target_modules")
    else:
        c.put("lora.target_modules", c.read("lora_target_modules", read.names, targets), "lora_target_modules")


def _precision(c: Conversion, adapter: bool) -> None:
    key = "dtype" if c.given("dtype") else "torch_dtype"
    dtype = c.get(key, read.text, "float32")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        c.refuse(key, f"expected auto, float32, bfloat16 or float16, got {dtype}")
    mixed = c.get("bf16", read.flag, not c.on("fp16")) or c.on("fp16")
    if dtype == "float32" and mixed and adapter:
        message = "TRL computes in 16 bits on float32 weights, lorafit in float32; dtype: bfloat16 halves the memory"
        c.note(key if c.given(key) else "dtype", message, "model.dtype")
    if dtype == "float32" and mixed and not adapter:
        dtype = "auto"  # which is float32 weights with 16-bit arithmetic
    c.put("model.dtype", dtype, c.why(key))


def _attention(c: Conversion) -> None:
    name = c.get("attn_implementation", read.text, "")
    if name in ATTENTION:
        c.put("model.attn_implementation", name, "attn_implementation")
    elif name:
        c.note("attn_implementation", f"'{name}': no equivalent; lorafit chooses (the same result but for rounding)")


def _template(c: Conversion) -> None:
    path = c.get("chat_template_path", read.text, "")
    if path.endswith((".jinja", ".j2", ".jinja2")):
        c.put("model.chat_template", path, "chat_template_path")
    elif path:
        c.note("chat_template_path", f"'{path}': a tokenizer's template has no equivalent; save it as a Jinja file")


def _sources(c: Conversion) -> None:
    if c.plain("datasets"):
        found: list[dict[str, Any]] = []
        c.read("datasets", read.data_sets, c.plain("datasets"))
        for index, located in enumerate(c.source["datasets"].value):
            c.apply("datasets", index, located.value)
            entry = located.plain()
            path = c.read(f"datasets.{index}.path", read.text, entry.get("path"))
            for file in c.read(f"datasets.{index}.data_files", read.file_names, entry.get("data_files")) or [path]:
                hub = {
                    name: c.read(f"datasets.{index}.{name}", read.text, entry[name])
                    for name in ("name", "split")
                    if entry.get(name) not in (None, "train")
                }
                found.append(_shaped(c, {"path": file} | ({} if is_local(file) else hub)))
        c.put("dataset.train", found, "datasets")
        c.no_effect("dataset_name", why="datasets has the last word")
    elif c.given("dataset_name"):
        c.put("dataset.train", [_shaped(c, _split(c, "dataset_train_split", "train"))], "dataset_name")
    else:
        c.refuse("dataset_name", "there is none, so there is nothing to train on")
    if c.get("test_split_size", read.number, 0.0):
        c.put("dataset.validation", c.get("test_split_size", read.number, 0.0), "test_split_size")
    elif c.given("dataset_name") and _evaluates(c):
        rows = _split(c, "dataset_test_split", "test")
        if "split" in rows or rows["path"] != c.plain("dataset_name"):
            c.put("dataset.validation", [_shaped(c, rows)], c.why("dataset_test_split"))
    if c.on("dataset_streaming") or c.on("streaming"):
        c.put("dataset.streaming", True, "dataset_streaming")


def _evaluates(c: Conversion) -> bool:
    strategy = c.plain("eval_strategy") if c.given("eval_strategy") else c.plain("evaluation_strategy")
    return strategy not in (None, False, "no")


def _split(c: Conversion, key: str, usual: str) -> dict[str, Any]:
    """A split of dataset_name: on the hub, or the files of a folder that are named after it."""
    path, split = c.get("dataset_name", read.text, ""), c.get(key, read.text, usual)
    if not is_local(path):
        config = c.get("dataset_config", read.text, "")
        return {"path": path} | ({"name": config} if config else {}) | ({"split": split} if split != "train" else {})
    files = shared.split_of_folder(path, split)
    if files is None and split != c.get("dataset_train_split", read.text, "train"):
        c.note(
            key if c.given(key) else "dataset_name",
            f"no files of the split {split} in {path}: it does not evaluate",
        )
    return {"path": files or path}


def _shaped(c: Conversion, source: dict[str, Any]) -> dict[str, Any]:
    """A source with its rows' format, if they are here."""
    column = c.get("dataset_text_field", read.text, "text")
    columns = {"text": column} if column != "text" else {}
    form = "auto"
    if is_local(source["path"]):
        try:
            first = next(read_rows(source["path"]), None)
            form = detect_format(first, columns)[0] if first is not None else "auto"
        except LorafitError:
            form = "auto"
    return source | {"format": form} | ({"columns": columns} if columns and form in ("text", "auto") else {})


def _masking(c: Conversion) -> None:
    """Mask a prompt by default if it has a column of its own; else all tokens are learned."""
    forms = {source["format"] for source in c.value("dataset.train")}
    only = c.plain("completion_only_loss")
    if c.on("assistant_only_loss"):
        c.put("dataset.loss_on", "assistant", "assistant_only_loss")
    elif forms == {"prompt_completion"} and (only is None or c.read("completion_only_loss", read.flag, only)):
        c.put("dataset.loss_on", "completion", c.why("completion_only_loss"))
    else:
        c.put("dataset.loss_on", "all", c.why("completion_only_loss"))
        if "auto" in forms and only is not False:
            c.note("dataset_name", "the rows are not here: if they have prompt and completion, set loss_on: completion")
            c.fates["dataset_name"] = "dataset.train"


def _training(c: Conversion) -> None:
    key = "max_length" if c.given("max_length") or "max_length" in c.source else "max_seq_length"
    length = c.get(key, read.whole, 1024)
    if "max_length" in c.source and not c.given("max_length"):
        c.note("max_length", "null: TRL cuts no rows; lorafit needs a limit, 1024 is written")
    c.put("training.max_length", length, c.why(key))
    key = "gradient_checkpointing" if c.given("gradient_checkpointing") else "activation_checkpointing"
    c.choose("training.gradient_checkpointing", key, read.flag, True)
    shared.training(c, 2e-5)
