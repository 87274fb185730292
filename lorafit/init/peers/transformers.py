"""What the tools have in common: transformers' options, held-out rows, evaluation, saving, and chat templates."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, get_args

from lorafit.bounds import expand
from lorafit.errors import LorafitError, UsageError
from lorafit.facts import read_facts
from lorafit.facts.template import trl_templates
from lorafit.families import family_of
from lorafit.init.peers import read
from lorafit.init.peers.convert import NO_EFFECT, Conversion, Rules, becomes, decides, idle, lost, table
from lorafit.recipe import TrainingSection
from lorafit.rows import is_local, read_rows


def _choices(field: str) -> tuple[str, ...]:
    """What a field of the recipe's training section may be, but for auto."""
    return tuple(name for name in get_args(TrainingSection.model_fields[field].annotation) if name != "auto")


SCHEDULERS = _choices("lr_scheduler_type")
OPTIMIZERS = {name: name for name in _choices("optim")} | {
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_hf": "adamw_torch",
    "adamw_apex_fused": "adamw_torch_fused",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
    "lion": "lion_32bit",
}
FUSED = "adamw_torch_fused"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NOT_LEARNED = "only how fast it runs, or what is shown"
COMMON: Rules = table(
    becomes("trust_remote_code", "model.trust_remote_code", read.flag),
    becomes("lora_alpha", "lora.lora_alpha", read.number),
    becomes("lora_dropout", "lora.lora_dropout", read.number),
    becomes("learning_rate", "training.learning_rate", read.above_zero),
    decides("warmup_ratio warmup_steps", "training.warmup_ratio, training.warmup_steps"),
    becomes("lr_scheduler_kwargs", "training.lr_scheduler_kwargs", read.mapping),
    becomes("weight_decay", "training.weight_decay", read.number),
    becomes("adam_beta1", "training.adam_beta1", read.number),
    becomes("adam_beta2", "training.adam_beta2", read.number),
    becomes("adam_epsilon", "training.adam_epsilon", read.above_zero),
    becomes("max_grad_norm", "training.max_grad_norm", read.number),
    becomes("neftune_noise_alpha", "training.neftune_noise_alpha", read.above_zero_or_none),
    becomes("seed", "training.seed", read.whole),
    becomes("dataloader_num_workers", "training.dataloader_num_workers", read.whole),
    becomes("output_dir", "output_dir", read.text),
    becomes("save_total_limit", "training.save_total_limit", read.limit),
    decides("load_best_model_at_end", "training.load_best_model_at_end"),
    lost("tf32", "matters to float32 arithmetic only, and there in the last digits"),
    lost("deepspeed fsdp fsdp_*", "several processes are started with accelerate launch, and share by DDP"),
    decides("metric_for_best_model", "training.metric_for_best_model"),
    lost("greater_is_better", "follows from the metric"),
)
"""Keys that mean the same to all three tools."""
TRANSFORMERS: Rules = table(
    COMMON,
    becomes("model_name_or_path", "model.name_or_path", read.text),
    becomes("model_revision", "model.revision", read.text),
    becomes("use_rslora", "lora.use_rslora", read.flag),
    becomes("use_dora", "lora.use_dora", read.flag),
    becomes("per_device_train_batch_size", "training.per_device_train_batch_size", read.count),
    becomes("gradient_accumulation_steps", "training.gradient_accumulation_steps", read.count),
    decides("num_train_epochs max_steps", "training.num_train_epochs, training.max_steps"),
    decides("lr_scheduler_type", "training.lr_scheduler_type"),
    decides("optim", "training.optim"),
    decides("bf16 fp16", "model.dtype"),
    decides("logging_steps logging_strategy", "training.logging_steps"),
    decides("eval_strategy evaluation_strategy eval_steps", "training.eval_strategy, training.eval_steps"),
    decides("save_strategy save_steps", "training.save_strategy, training.save_steps"),
    decides("per_device_eval_batch_size", "training.per_device_eval_batch_size"),
    decides("report_to", "training.report_to"),
    decides("group_by_length train_sampling_strategy", "training.train_sampling_strategy"),
    idle(
        "do_train do_eval do_predict overwrite_output_dir log_level log_level_replica logging_first_step logging_dir "
        "disable_tqdm dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers "
        "remove_unused_columns use_liger_kernel torch_compile torch_compile_backend torch_compile_mode "
        "gradient_checkpointing_kwargs ddp_timeout ddp_find_unused_parameters ddp_backend save_safetensors "
        "save_only_model torch_empty_cache_steps local_rank include_num_input_tokens_seen include_tokens_per_second "
        "skip_memory_metrics activation_checkpointing_kwargs dataloader_in_order dataloader_multiprocessing_context "
        "ddp_broadcast_buffers ddp_bucket_cap_mb ddp_static_graph debug enable_jit_checkpoint liger_kernel_config "
        "eval_do_concat_batches eval_use_gather_object include_for_metrics batch_eval_metrics label_names "
        "length_column_name logging_nan_inf_filter restore_callback_states_from_checkpoint save_on_each_node "
        "prediction_loss_only use_cache eval_accumulation_steps "
        "dataset_num_proc bf16_full_eval fp16_full_eval use_legacy_prediction_loop log_on_each_node",
        NOT_LEARNED,
    ),
    lost("run_name project trackio_*", "a tracker's own settings come from its environment variables", "huggingface"),
    lost("use_cpu", "say it with --cpu"),
    lost("push_to_hub hub_* push_to_hub_*", "lorafit pushes nothing by itself; `lorafit push` does", "every_save"),
    lost("resume_from_checkpoint", "an unfinished run goes on with `lorafit train --resume`"),
    lost("label_smoothing_factor optim_args optim_target_modules auto_find_batch_size full_determinism", ""),
    lost("data_seed", "rows are shuffled by training.seed", chosen=(0,)),
    lost("average_tokens_across_devices", "every learned token counts the same, whatever the process", True),
    lost("dataloader_drop_last eval_on_start eval_delay accelerator_config parallelism_config ignore_data_skip", ""),
)
"""transformers' TrainingArguments, which TRL and LLaMA-Factory take as they are, and what both call alike."""


def training(c: Conversion, learning_rate: float) -> None:
    """The options of a training under transformers' own names, with its defaults but for the learning rate."""
    c.defaults(per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=learning_rate)
    c.defaults(weight_decay=0.0, max_grad_norm=1.0, seed=42)
    schedule(c, "num_train_epochs", 3.0)
    scheduler(c, "lr_scheduler_type", "linear")
    warmup(c)
    optimizer(c, "optim")
    sampling(c)
    logging(c)


def schedule(c: Conversion, epochs_key: str, epochs: float) -> None:
    """max_steps has the last word over epochs; a recipe has only one of them."""
    steps = c.get("max_steps", read.whole, -1)
    if steps > 0:
        c.put("training.max_steps", steps, "max_steps")
        c.no_effect(epochs_key, why="max_steps has the last word")
    elif c.given(epochs_key):
        c.put("training.num_train_epochs", c.get(epochs_key, read.above_zero, epochs), epochs_key)
    else:
        c.default("training.num_train_epochs", epochs)


def scheduler(c: Conversion, key: str, default: str) -> None:
    name = c.get(key, read.text, default)
    if name not in SCHEDULERS:
        c.note(key, f"'{name}': no equivalent; {default} is written in its place")
        if c.lines.pop("training.lr_scheduler_kwargs", None):
            c.note("lr_scheduler_kwargs", f"no equivalent: they are those of '{name}'")
        name = default
    c.put("training.lr_scheduler_type", name, c.why(key))


def optimizer(c: Conversion, key: str) -> None:
    name = c.get(key, read.text, FUSED)
    if name not in OPTIMIZERS:
        c.note(key, f"'{name}': no equivalent; {FUSED} is written in its place")
        name = FUSED
    c.put("training.optim", OPTIMIZERS[name], c.why(key))


def warmup(c: Conversion) -> None:
    """transformers': steps before the ratio, steps below 1 are a ratio, and none by default."""
    steps = c.get("warmup_steps", read.number, 0.0)
    ratio = c.get("warmup_ratio", read.number, 0.0)
    if steps >= 1:
        c.put("training.warmup_steps", int(steps), "warmup_steps")
    elif steps or ratio:
        c.put("training.warmup_ratio", steps or ratio, "warmup_steps" if steps else "warmup_ratio")
    else:
        given = next((key for key in ("warmup_steps", "warmup_ratio") if c.given(key)), None)
        c.put("training.warmup_steps", 0, given or f"{c.title}'s default")


def trackers(c: Conversion) -> None:
    """transformers' report_to."""
    asked: list[str] = c.get("report_to", read.names, [])
    named = [name for name in asked if name not in ("none", "all")]
    if "all" in asked:
        c.note("report_to", "all: name the trackers in training.report_to")
    if named:
        c.put("training.report_to", named, "report_to")


def sampling(c: Conversion) -> None:
    strategy = c.get("train_sampling_strategy", read.text, "random")
    if c.on("group_by_length"):
        strategy = "group_by_length"
    if strategy != "random":
        c.put("training.train_sampling_strategy", strategy, "group_by_length")


def logging(c: Conversion) -> None:
    steps = c.get("logging_steps", read.number, 0.0)
    if steps >= 1:
        c.put("training.logging_steps", int(steps), "logging_steps")
    elif steps:
        c.note("logging_steps", "a share of the steps has no equivalent; every step is logged")


def chat_template(c: Conversion, key: str, name: str, known: dict[str, str]) -> None:
    """A template by the tool's name for it: one that TRL ships, or ChatML in a file beside the recipe."""
    if name == "chatml":
        beside_recipe(c, "chatml.jinja", CHATML, key)
    elif known.get(name, name) in trl_templates():
        c.put("model.chat_template", known.get(name, name), key)
    else:
        c.note(
            key, f"'{name}' is not shipped with lorafit; the tokenizer's own is used: compare with `lorafit preview`"
        )


def beside_recipe(c: Conversion, name: str, content: str, key: str) -> None:
    path = c.output.parent / f"{c.output.stem}.{name}"
    c.beside[path] = content
    c.put("model.chat_template", str(path), key)


def peft_default_targets(c: Conversion) -> None:
    """What PEFT adapts if nothing is said, which depends on the family."""
    try:
        family = read_facts(str(c.value("model.name_or_path"))).model_type
    except LorafitError:
        family = ""
    c.put("lora.target_modules", list(family_of(family).peft_targets) or "qv", "PEFT's default, if nothing is said")
    if not family:
        c.note("lora_target_modules", "is not given: PEFT's default for most models, query and value, is written")


def split_of_folder(path: str, split: str) -> str | None:
    """The files of a folder that the datasets library takes for a split, as a glob."""
    for pattern in (f"{split}.*", f"{split}[-_]*", f"*[-_]{split}.*"):
        if expand(os.path.join(path, pattern), UsageError):
            return str(Path(path) / pattern)
    return None


def evaluation(c: Conversion, per_epoch: tuple[str, str] = ("", ""), logged: int = 500) -> None:
    """When it evaluates and saves.

    Args:
        per_epoch: keys that say how often in an epoch.
        logged: steps between two lines of a log, by default, which evaluations follow.

    Of rows that are held out, tools of transformers make no use unless they are told to; lorafit would.
    """
    has_rows = c.value("dataset.validation") is not None
    for what, key in zip(("eval", "save"), per_epoch, strict=True):
        given = next((k for k in (f"{what}_strategy", "evaluation_strategy") if c.given(k)), f"{what}_strategy")
        strategy = _strategy(c.plain(given)) if what == "eval" or given == "save_strategy" else None
        steps = c.get(f"{what}_steps", read.number, 0.0)
        often = c.get(key, read.whole, 0) if key else 0
        if what == "eval" and not has_rows:
            c.no_effect(given, "eval_steps", key, why="there are no validation rows")
            continue
        source = f"{what}_steps" if steps else given
        if often > 1:
            c.put(f"training.{what}s_per_epoch", often, key)
        elif often:
            c.put(f"training.{what}_strategy", "epoch", key)
        elif steps and strategy in (None, "steps"):
            if steps >= 1:
                _each(c, what, int(steps), source)
            else:
                _share(c, what, source, steps)
        elif strategy == "steps":
            _each(c, what, {"eval": c.value("training.logging_steps") or logged, "save": 500}[what], source)
        elif strategy is not None:
            known = strategy in ("no", "epoch")
            c.put(f"training.{what}_strategy", strategy if known else "auto", source)
            if not known:
                c.note(source, f"'{strategy}': no equivalent; lorafit chooses")


def _strategy(value: Any) -> str | None:
    return None if value is None else "no" if value is False else str(value)


def _each(c: Conversion, what: str, steps: int, source: str) -> None:
    c.put(f"training.{what}_strategy", "steps", source)
    c.put(f"training.{what}_steps", steps, source)


def _share(c: Conversion, what: str, key: str, share: float) -> None:
    """A share of the whole training, in steps, if the rows can be counted."""
    per_epoch = steps_per_epoch(c)
    if per_epoch is None:
        c.put(f"training.{what}_strategy", "epoch", key)
        c.note(key, f"in steps it depends on the number of rows, which is not known here; set training.{what}_steps")
        return
    total = float(c.value("training.max_steps") or per_epoch * float(c.value("training.num_train_epochs") or 1))
    _each(c, what, max(math.ceil(total * share), 1), f"{key}, of {per_epoch} steps an epoch on one GPU")


def steps_per_epoch(c: Conversion) -> int | None:
    """Steps of an epoch on one GPU; None where rows are not here, or are packed."""
    count = rows_here(c)
    if count is None or c.value("training.packing"):
        return None
    held_out = c.value("dataset.validation")
    count -= round(count * held_out) if isinstance(held_out, float) else 0
    batch = c.value("training.per_device_train_batch_size") or 1
    steps = c.value("training.gradient_accumulation_steps") or 1
    return max(math.ceil(math.ceil(count / batch) / steps), 1)


def rows_here(c: Conversion) -> int | None:
    """The number of training rows; None if not all are on this disk."""
    total = 0
    for source in c.value("dataset.train") or ():
        if not is_local(source["path"]):
            return None
        try:
            count = sum(1 for _ in read_rows(source["path"]))
        except LorafitError:
            return None
        total += min(count, source.get("max_rows", count))
    return total


def held_out(c: Conversion, key: str) -> None:
    """A share of the training rows, or a number of them."""
    size = c.get(key, read.number, 0.0)
    if not size:
        return
    if size < 1:
        c.put("dataset.validation", size, key)
        return
    count = rows_here(c)
    if count is None or count <= size:
        c.note(key, f"{size:g} rows: lorafit takes a share of them; 0.05 is written in its place")
        c.put("dataset.validation", 0.05, key)
    else:
        c.put("dataset.validation", round(size / count, 6), f"{key}: {size:g} of {count} rows")


def quiet_evaluation(c: Conversion, logged: int = 500) -> None:
    """`evaluation` and trackers; transformers evaluates and keeps the best only if it is told to."""
    evaluation(c, logged=logged)
    trackers(c)
    patience = c.value("training.early_stopping_patience")
    if c.value("dataset.validation") is None:
        keys = ("early_stopping_steps", "load_best_model_at_end", "per_device_eval_batch_size")
        c.no_effect(*keys, why="there are no validation rows")
        c.lines.pop("training.early_stopping_patience", None)
        return
    c.default("training.eval_strategy", "no")
    rows = c.get("per_device_eval_batch_size", read.whole, 0)
    if rows:
        c.put("training.per_device_eval_batch_size", rows, "per_device_eval_batch_size")
    if c.value("training.eval_strategy") == "no":
        if patience:
            c.lines.pop("training.early_stopping_patience")
            c.fates["early_stopping_steps"] = f"{NO_EFFECT}: there are no evaluations"
        c.put("training.load_best_model_at_end", False, c.why("load_best_model_at_end"))
    else:
        c.choose("training.load_best_model_at_end", "load_best_model_at_end", read.flag, False)
        best(c)


def best(c: Conversion) -> None:
    """What the best adapter is found by: the tools know their validation loss and accuracy, lorafit any figure."""
    asked = c.get("metric_for_best_model", read.text, "loss").removeprefix("eval_")
    keeps = c.value("training.load_best_model_at_end") or c.value("training.early_stopping_patience")
    if asked == "mean_token_accuracy" and keeps:
        c.put("training.metric_for_best_model", asked, "metric_for_best_model")
    elif asked not in ("loss", "mean_token_accuracy"):
        c.note("metric_for_best_model", f"'{asked}': no equivalent; figures of lorafit's evaluation are SET.METRIC")
