"""axolotl's recipes: what several keys decide together, and its own defaults."""

from __future__ import annotations

from typing import Any

from lorafit.init.peers.axolotl_data import set_template, sources
from lorafit.init.peers.common import (
    logging,
    optimizer,
    peft_default_targets,
    sampling,
    schedule,
    scheduler,
)
from lorafit.init.peers.convert import Conversion
from lorafit.init.peers.dialect import above_zero, count, flag, mapping, names, number, text, whole
from lorafit.init.peers.evaluation import evaluation, held_out


def assemble(c: Conversion) -> None:
    """What several keys decide together, and axolotl's own defaults."""
    adapter = _adapter(c)
    sources(c)
    _masking(c)
    _precision(c, adapter)
    _attention(c)
    _template(c)
    _batches(c)
    schedule(c, "num_epochs", 1.0)
    _schedule(c)
    optimizer(c, "optimizer")
    if not c.given("learning_rate"):
        c.note("learning_rate", "is not given, which axolotl wants; lorafit's default is 2e-4")
    logging(c)
    sampling(c)
    c.default("training.max_length", 512)
    for target, value in (("training.weight_decay", 0.0), ("training.max_grad_norm", 1.0), ("training.seed", 42)):
        c.default(target, value)
    _validation(c)
    _trackers(c)
    _words(c)


def _adapter(c: Conversion) -> bool:
    kind = c.get("adapter", text, "")
    four, eight = c.get("load_in_4bit", flag, False), c.get("load_in_8bit", flag, False)
    if kind not in ("", "lora", "qlora"):
        c.refuse("adapter", f"lorafit has no {kind}; it trains lora and qlora, or all weights")
    if not kind:
        if four or eight:
            c.refuse(
                "load_in_4bit" if four else "load_in_8bit", "quantized weights can't be trained without an adapter"
            )
        c.without_adapter()
        return False
    if four or eight:
        bits = "load_in_4bit" if four else "load_in_8bit"
        c.put(f"quantization.{bits}", True, bits)
    if four:
        c.default("quantization.bnb_4bit_quant_type", "nf4")
        c.default("quantization.bnb_4bit_use_double_quant", True)
    if kind == "qlora" and not four:
        c.refuse("adapter", "qlora needs load_in_4bit: true")
    for target in ("lora.r", "lora.lora_alpha"):
        if target not in c.lines:
            c.put(target, 8, "PEFT's default, if nothing is said")
    c.default("lora.lora_dropout", 0.0)
    named = c.plain("lora_target_modules")
    if c.get("lora_target_linear", flag, False) or named == "all-linear":
        c.put("lora.target_modules", "all-linear", "lora_target_linear" if named is None else "lora_target_modules")
    elif isinstance(named, list):
        c.put("lora.target_modules", c.read("lora_target_modules", names, named), "lora_target_modules")
    elif named:
        c.put("lora.target_modules", c.read("lora_target_modules", text, named), "lora_target_modules")
    else:
        peft_default_targets(c)
    start = c.plain("peft_init_lora_weights")
    if start is not None:
        start = start if isinstance(start, bool) else c.read("peft_init_lora_weights", text, start)
        c.put("lora.init_lora_weights", start, "peft_init_lora_weights")
    return True


def _masking(c: Conversion) -> None:
    everything = c.get("train_on_inputs", flag, False)
    if any(source["format"] == "text" for source in c.value("dataset.train")) and not everything:
        return _too_long(c)  # texts are learned whole, and what else there is has only its answers learned, by default
    if not everything and c.value("dataset.loss_on") is None:
        c.put("dataset.loss_on", "assistant", "train_on_inputs" if c.given("train_on_inputs") else "axolotl's default")
    elif everything:
        c.put("dataset.loss_on", "all", "train_on_inputs")
    return _too_long(c)


def _too_long(c: Conversion) -> None:
    strategy = c.get("excess_length_strategy", text, "drop")
    if strategy not in ("drop", "truncate"):
        c.refuse("excess_length_strategy", f"lorafit knows drop and truncate, not {strategy}")
    why = "excess_length_strategy" if c.given("excess_length_strategy") else "axolotl's default"
    c.put("dataset.excess_length_strategy", strategy, why)


def _precision(c: Conversion, adapter: bool) -> None:
    bf16 = c.plain("bf16")
    if c.get("float16", flag, False) or (c.get("fp16", flag, False) and bf16 in (None, False)):
        dtype, key = "float16", "fp16"
    elif c.get("bfloat16", flag, False):
        dtype, key = "bfloat16", "bfloat16"
    elif c.get("float32", flag, False):
        dtype, key = "float32", "float32"
    elif bf16 in (None, "auto"):
        dtype, key = "auto" if adapter else "bfloat16", "bf16"
    elif bf16 == "full" or c.get("bf16", flag, False):
        dtype, key = "bfloat16", "bf16"
    else:
        dtype, key = "float32", "bf16"
    if dtype == "float16" and not adapter:
        c.note(key, "lorafit trains no float16 weights in full; float32 is written")
        dtype = "float32"
    c.put("model.dtype", dtype, key if c.given(key) else "axolotl's default")


def _attention(c: Conversion) -> None:
    named = c.get("attn_implementation", text, "")
    for key, name in (
        ("flash_attention", "flash_attention_2"),
        ("sdp_attention", "sdpa"),
        ("eager_attention", "eager"),
    ):
        if c.get(key, flag, False):
            c.put("model.attn_implementation", name, key)
    if named in ("sdpa", "eager", "flash_attention_2", "flash_attention_3"):
        c.put("model.attn_implementation", named, "attn_implementation")
    elif named:
        c.note("attn_implementation", f"'{named}': no equivalent; lorafit chooses")
    for key in ("xformers_attention", "flex_attention"):
        if c.get(key, flag, False):
            c.note(key, "no equivalent; lorafit chooses (the same result but for rounding)")


def _template(c: Conversion) -> None:
    """The template of conversations: the data sets' own has been set before."""
    name, jinja = c.get("chat_template", text, ""), c.get("chat_template_jinja", text, "")
    if not c.value("dataset.train") or not any(
        s["format"] in ("messages", "sharegpt") for s in c.value("dataset.train")
    ):
        for key in ("chat_template", "chat_template_jinja"):
            if c.given(key):
                c.fates[key] = "no effect on what is learned: the rows are no conversations"
        return
    if "model.chat_template" not in c.lines:
        set_template(c, "chat_template", name, jinja)
    elif (name or jinja) and name not in [entry.get("chat_template") for entry in c.plain("datasets")]:
        key = "chat_template" if name else "chat_template_jinja"
        c.note(key, "lorafit has one chat template for all data sets, which is a data set's own here")


def _batches(c: Conversion) -> None:
    c.default("training.per_device_train_batch_size", 1)
    rows, total = int(c.value("training.per_device_train_batch_size")), c.get("batch_size", whole, 0)
    if total:
        c.put("training.gradient_accumulation_steps", max(total // rows, 1), "batch_size / micro_batch_size")
    else:
        why = "gradient_accumulation_steps" if c.given("gradient_accumulation_steps") else "axolotl's default"
        c.put("training.gradient_accumulation_steps", c.get("gradient_accumulation_steps", count, 1), why)
    checkpointing = c.plain("gradient_checkpointing")
    if isinstance(checkpointing, str) and checkpointing in ("offload", "offload_disk", "unsloth"):
        c.note("gradient_checkpointing", f"'{checkpointing}': no equivalent; plain checkpointing is written")
        checkpointing = True
    on = False if checkpointing is None else c.read("gradient_checkpointing", flag, checkpointing)
    c.put(
        "training.gradient_checkpointing",
        on,
        "gradient_checkpointing" if checkpointing is not None else "axolotl's default",
    )
    noise = c.get("noisy_embedding_alpha", above_zero, 0.0)
    if noise:
        c.put("training.neftune_noise_alpha", noise, "noisy_embedding_alpha")


def _schedule(c: Conversion) -> None:
    scheduler(c, "lr_scheduler", "cosine")
    least = c.get("cosine_min_lr_ratio", number, 0.0)
    if least and c.value("training.lr_scheduler_type") == "cosine":
        c.put("training.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler, cosine_min_lr_ratio")
        c.put("training.lr_scheduler_kwargs", {"min_lr_rate": least}, "cosine_min_lr_ratio")
    if c.given("warmup_steps"):
        c.put("training.warmup_steps", c.get("warmup_steps", whole, 0), "warmup_steps")
    elif c.given("warmup_ratio"):
        c.put("training.warmup_ratio", c.get("warmup_ratio", number, 0.0), "warmup_ratio")
    else:
        c.put("training.warmup_ratio", 0.03, "axolotl's default (there at most 100 steps)")


def _validation(c: Conversion) -> None:
    if "dataset.validation" not in c.lines:
        held_out(c, "val_set_size")
    elif c.given("val_set_size"):
        c.fates["val_set_size"] = "no effect on what is learned: test_datasets are the validation rows"
    evaluation(c, ("evals_per_epoch", "saves_per_epoch"))
    if c.value("dataset.validation") is None:
        for key in ("early_stopping_patience", "eval_batch_size", "load_best_model_at_end"):
            if c.given(key):
                c.fates[key] = "no effect on what is learned: there are no validation rows"
        c.lines.pop("training.early_stopping_patience", None)
        c.lines.pop("training.per_device_eval_batch_size", None)
        return
    best = c.get("load_best_model_at_end", flag, bool(c.value("training.early_stopping_patience")))
    c.put(
        "training.load_best_model_at_end",
        best,
        "load_best_model_at_end" if c.given("load_best_model_at_end") else "axolotl's default",
    )


def _trackers(c: Conversion) -> None:
    found: dict[str, str] = {}
    if c.plain("wandb_project") or c.plain("use_wandb"):
        found["wandb"] = "wandb_project"
    if c.plain("wandb_mode") == "disabled" or c.plain("use_wandb") is False:
        found.pop("wandb", None)
    elif c.plain("wandb_project"):
        c.note("wandb_project", "set the environment variable WANDB_PROJECT", "training.report_to")
    others = (
        ("use_tensorboard", "tensorboard"),
        ("use_mlflow", "mlflow"),
        ("mlflow_experiment_name", "mlflow"),
        ("use_comet", "comet_ml"),
    )
    found |= {name: key for key, name in others if c.plain(key)}
    if found:
        c.put("training.report_to", list(found), ", ".join(found.values()))


def _words(c: Conversion) -> None:
    """Special tokens and plugins."""
    tokens: dict[str, Any] = c.get("special_tokens", mapping, {})
    others = [name for name, token in tokens.items() if token and name != "pad_token"]
    if others:
        c.note("special_tokens", f"{', '.join(others)}: no equivalent (the tokenizer keeps its own special tokens)")
    elif c.given("special_tokens"):
        c.fates["special_tokens"] = "no effect on what is learned: padding is masked"
    plugins: list[str] = c.get("plugins", names, [])
    strange = [name for name in plugins if not any(part in str(name) for part in ("liger", "cut_cross_entropy"))]
    c.fates["plugins"] = "no effect on what is learned: faster kernels" if not strange else c.fates.get("plugins", "")
    if strange:
        c.note("plugins", f"{', '.join(map(str, strange))}: no equivalent")
    if c.given("peft"):
        c.note("peft", "no equivalent (lorafit's loftq wants a 4-bit base and lora_alpha equal to r)")
