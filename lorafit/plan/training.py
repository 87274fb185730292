"""The training: batches, optimizer, schedule, evaluation and what goes with them."""

from __future__ import annotations

import math
from typing import Any

from lorafit.plan.model import mixed_dtype
from lorafit.plan.values import Context

DEFAULT_GLOBAL_BATCH_SIZE = 16
DEFAULT_EPOCHS = 3.0
DEFAULT_WARMUP_RATIO = 0.03
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
CUDA_ONLY_OPTIMIZERS = ("8bit", "paged", "lion", "ademamix")


def training_kwargs(context: Context, dtype: str, has_validation: bool) -> dict[str, Any]:
    """For SFTConfig, without what follows from the number of rows."""
    training = context.recipe.training
    batch, accumulation = _batch(context)
    eval_batch: Any = training.per_device_eval_batch_size
    if eval_batch == "auto":
        eval_batch = batch
        if has_validation:
            context.choose("training.per_device_eval_batch_size", batch, "as in training")
    mixed = mixed_dtype(context, dtype)
    return {
        "num_train_epochs": training.num_train_epochs or DEFAULT_EPOCHS,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": eval_batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.lr_scheduler_type,
        "lr_scheduler_kwargs": dict(training.lr_scheduler_kwargs),
        "warmup_steps": _warmup(context),
        "optim": _optimizer(context),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_grad_norm": training.max_grad_norm,
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "gradient_checkpointing": _checkpointing(context),
        "train_sampling_strategy": training.train_sampling_strategy,
        "dataloader_num_workers": training.dataloader_num_workers,
        "seed": training.seed,
        "logging_steps": training.logging_steps,
        "eval_strategy": _evaluation(context, has_validation),
        "eval_steps": training.eval_steps,
        "save_strategy": training.save_strategy,
        "save_steps": training.save_steps,
        "save_total_limit": training.save_total_limit,
        "load_best_model_at_end": _keep_best(context, has_validation),
        "early_stopping_patience": training.early_stopping_patience,
        "report_to": list(training.report_to),
        "bf16": mixed == "bfloat16",
        "fp16": mixed == "float16",
        "use_cpu": not context.on_gpu,
    }


def _batch(context: Context) -> tuple[int, int]:
    """The rows of a pass on a device, and the passes of a step."""
    training, world = context.recipe.training, context.hardware.world_size
    wanted = training.global_batch_size or DEFAULT_GLOBAL_BATCH_SIZE
    batch: Any = training.per_device_train_batch_size
    if batch == "auto":
        usual = 4 if context.on_gpu else 8
        batch = next((size for size in (usual, 4, 2, 1) if size <= usual and wanted % (size * world) == 0), 1)
        reason = f"usual on a {'GPU' if context.on_gpu else 'CPU'}"
        if batch != usual:
            reason = f"the most that makes {wanted} rows a step, of {usual} that are {reason}"
        context.choose("training.per_device_train_batch_size", batch, reason)
    steps: Any = training.gradient_accumulation_steps
    if steps == "auto":
        if training.global_batch_size and wanted % (batch * world):
            context.wrong(
                ("training", "global_batch_size"),
                f"{wanted} is not a multiple of {batch} rows x {world} processes",
            )
        steps = max(1, wanted // (batch * world))
        processes = f"{world} process{'es' * (world > 1)}"
        reason = f"{batch} rows x {steps} passes x {processes} = {batch * steps * world} rows a step"
        context.choose("training.gradient_accumulation_steps", steps, reason)
    return int(batch), int(steps)


def _warmup(context: Context) -> float:
    training = context.recipe.training
    name = "warmup_ratio" if training.warmup_steps is None else "warmup_steps"
    asked = training.warmup_ratio if training.warmup_steps is None else training.warmup_steps
    if training.lr_scheduler_type in _WITHOUT_WARMUP:
        if asked:
            hint = "; constant_with_warmup has one" if training.lr_scheduler_type == "constant" else ""
            context.remarks.append(f"training.{name}: {training.lr_scheduler_type} has no warm-up{hint}.")
        return 0
    if asked is not None:
        too_long = long_warmup(asked, training.max_steps) if training.max_steps else None
        if too_long and training.max_steps == 1 and asked < 1:
            return context.choose(f"training.{name}", 0.0, "the only step would have the learning rate 0")
        if too_long and training.max_steps == 1:
            context.wrong(("training", name), too_long)
        elif too_long:
            context.remarks.append(f"Warm-up: {too_long}.")
        return asked
    if training.max_steps == 1:
        return context.choose("training.warmup_ratio", 0.0, "the only step would have the learning rate 0")
    return context.choose("training.warmup_ratio", DEFAULT_WARMUP_RATIO, "default")


def long_warmup(asked: float, total: int) -> str | None:
    """What is to be said of a warm-up, in steps or (below 1) a share of them, that is not shorter than the run."""
    steps = int(asked) if asked >= 1 else math.ceil(total * asked)  # as transformers' get_warmup_steps
    if steps < total or not steps:
        return None
    if total == 1:
        return "the warm-up is as long as the run, whose only step has the learning rate 0: nothing would be learned"
    return (
        f"the warm-up of {steps} steps is not shorter than the run of {total}, so the learning rate never gets beyond "
        f"{(total - 1) / steps:.0%} of learning_rate"
    )


def _optimizer(context: Context) -> str:
    asked = context.recipe.training.optim
    if asked == "auto":
        if context.recipe.quantization and context.on_gpu:
            reason = "quantized base: states in 8 bits, paged out when memory is short"
            return context.choose("training.optim", "paged_adamw_8bit", reason)
        return context.choose("training.optim", "adamw_torch_fused", "one kernel for the whole update")
    if not context.on_gpu and any(part in asked for part in CUDA_ONLY_OPTIMIZERS):
        message = f"{asked} needs a CUDA GPU, and this is a CPU; use auto or adamw_torch_fused"
        context.wrong(("training", "optim"), message)
    return asked


def _checkpointing(context: Context) -> bool:
    asked = context.recipe.training.gradient_checkpointing
    if asked != "auto":
        return asked
    reason = "GPU memory is scarcer than time" if context.on_gpu else "main memory is plenty, time is not"
    return context.choose("training.gradient_checkpointing", context.on_gpu, reason)


def _evaluation(context: Context, has_validation: bool) -> str:
    asked = context.recipe.training.eval_strategy
    if asked != "auto":
        return asked
    if not has_validation:
        return context.choose("training.eval_strategy", "no", "there are no validation rows")
    return context.choose("training.eval_strategy", "epoch", "there are validation rows")


def _keep_best(context: Context, has_validation: bool) -> bool:
    training = context.recipe.training
    asked = training.load_best_model_at_end
    if asked != "auto":
        return asked
    best = has_validation and training.eval_strategy != "no" and training.save_strategy != "no"
    reason = "of the lowest validation loss" if best else "there is no validation loss to choose by"
    return context.choose("training.load_best_model_at_end", best, reason)
