"""Making the plan: all decisions in their order, and those on batches, optimizer and schedule.

The decisions are by theme in the modules beside this one. Their order here is the order in which
choices and mistakes are shown.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from lorafit.errors import DataError, UsageError
from lorafit.facts import ModelFacts, read_facts
from lorafit.facts.template import syntax_error
from lorafit.hardware import Hardware, detect, elsewhere, unmeasured
from lorafit.plan.adapters import adapter_of
from lorafit.plan.chain import find_chain
from lorafit.plan.data import Reading, choose_max_length, counted, plan_data, plan_sources, read_chat_template
from lorafit.plan.model import (
    adapter_dtype,
    adapter_targets,
    choose_dtype,
    mixed_dtype,
    model_kwargs,
    model_plan,
    quantization_kwargs,
)
from lorafit.plan.values import Choice, Context, Plan, Preference, Schedule, make_schedule, validation_rows
from lorafit.recipe import Recipe, RecipeError
from lorafit.recipe.layers import displaced
from lorafit.rows.audit import Audit
from lorafit.rows.cache import known_audit

_PACKED_LATER = "The number of steps is known once the rows are packed."


def plan_recipe(
    recipe: Recipe, recipe_path: str | Path, hardware: Hardware | None = None, count_rows: bool = True
) -> Plan:
    """Read the model's facts and the machine, and make the plan."""
    model = recipe.model
    facts = read_facts(model.name_or_path, model.revision)
    return make_plan(recipe, facts, hardware or detect(), Path(recipe_path).stem, count_rows=count_rows)


def make_plan(
    recipe: Recipe,
    facts: ModelFacts,
    hardware: Hardware,
    default_name: str = "run",
    read_data: bool = True,
    count_rows: bool = True,
) -> Plan:
    """Resolve a recipe for a model and a machine.

    Args:
        default_name: of the run directory below runs/, if the recipe names none.
        read_data: whether to look into the data files, for their formats and contents.
        count_rows: whether to read them through for the number of rows, where no audit knows it.

    Raises RecipeError with every choice that this model or machine can't carry out, and DataError.
    """
    context = Context(recipe, facts, hardware)
    plan = examine(context, default_name, "digests" if read_data else "nothing")
    if plan is None:
        raise RecipeError(context.mistakes)
    if context.faults:
        raise DataError("\n".join(str(error) for _, error in context.faults))
    return with_steps(plan, count_rows) if read_data else plan


def with_audit(plan: Plan, audit: Audit) -> Plan:
    """The plan, completed by what was counted of its data: the audit, and the number of steps."""
    part = audit.training_rows
    rows = None if plan.data.streaming else part.packs if plan.data.packing else part.rows
    schedule = make_schedule(rows, plan.training, plan.hardware.world_size)
    counted = dataclasses.replace(
        plan,
        audit=audit.as_dict(),
        choices=plan.choices | {"steps": _steps_choice(schedule, rows, plan.data.packing)},
        remarks=tuple(remark for remark in plan.remarks if remark != _PACKED_LATER),
    )
    return _scheduled(counted, schedule)


def _scheduled(plan: Plan, schedule: Schedule | None) -> Plan:
    """The plan with its steps, and with what is to be said of a warm-up that is not shorter. Raises UsageError."""
    kwargs, choices, remarks = plan.training_kwargs, plan.choices, list(plan.remarks)
    too_long = long_warmup(plan.training.warmup_steps, schedule.total_steps) if schedule else None
    if schedule and too_long and schedule.total_steps == 1:
        key = f"training.{'warmup_ratio' if plan.recipe['training']['warmup_steps'] is None else 'warmup_steps'}"
        if plan.training.warmup_steps >= 1:
            raise UsageError(f"{key}: {too_long}")
        kwargs = kwargs | {"warmup_steps": 0.0}
        choices = choices | {key: Choice(0.0, "the only step would have the learning rate 0")}
    elif too_long and (remark := f"Warm-up: {too_long}.") not in remarks:
        remarks.append(remark)
    return dataclasses.replace(plan, schedule=schedule, training_kwargs=kwargs, choices=choices, remarks=tuple(remarks))


def dated(plan: Plan, date: str | None) -> Plan:
    """The plan with another day for chat templates that write it."""
    return plan if plan.data.date is None else dataclasses.replace(plan, data=dataclasses.replace(plan.data, date=date))


def examine(context: Context, default_name: str, reading: Reading) -> Plan | None:
    """All but the number of steps, which takes reading the data through.

    What can't be carried out is noted in the context, as mistakes and faults; None if there are mistakes.
    """
    recipe = context.recipe
    output_dir = recipe.output_dir or f"runs/{default_name}"
    if recipe.source is not None:
        context.remarks += displaced(recipe.source)
    remarks = (elsewhere(recipe, context.hardware), unmeasured(context.hardware))
    context.remarks += [remark for remark in remarks if remark]
    dtype = choose_dtype(context)
    targets = adapter_targets(context)
    max_length = choose_max_length(context)
    chat_template = read_chat_template(context)
    if chat_template is not None and (wrong := syntax_error(chat_template)):
        context.wrong(("model", "chat_template"), f"{recipe.model.chat_template}:{wrong}")
    train, validation = plan_sources(context, reading)
    data = plan_data(context, train, validation, max_length, chat_template, looks=reading != "nothing")
    for_training = training_kwargs(context, dtype, has_validation=bool(recipe.dataset.validation))
    for_model = model_kwargs(context, dtype)
    for_quantization = quantization_kwargs(context, dtype)
    preference = preference_plan(context)
    chain = find_chain(context, for_quantization) if reading != "nothing" else ()
    if context.mistakes:
        return None
    return Plan(
        name=Path(output_dir).name,
        output_dir=output_dir,
        recipe=recipe.resolved(),
        hardware=context.hardware,
        model=model_plan(context, targets),
        choices=context.choices,
        model_kwargs=for_model,
        quantization_kwargs=for_quantization,
        lora_kwargs=adapter_of(recipe).arguments(targets),
        adapter_dtype=adapter_dtype(context, dtype),
        loraplus_lr_ratio=adapter_of(recipe).loraplus_lr_ratio,
        training_kwargs=for_training,
        data=data,
        schedule=None,
        merge=recipe.merge.model_dump(mode="json"),
        eval=recipe.eval.model_dump(mode="json"),
        remarks=tuple(context.remarks),
        references=recipe.references,
        chain=chain,
        preference=preference,
    )


def with_steps(plan: Plan, count_rows: bool) -> Plan:
    """The plan with the number of steps, from an audit of this very data or by counting its rows."""
    data, world_size = plan.data, plan.hardware.world_size
    known = None if data.streaming else known_audit(data)
    if known is not None:
        return with_audit(plan, Audit.from_dict(known))
    schedule, choices = None, plan.choices
    remarks = list(plan.remarks)
    if data.streaming:
        schedule = make_schedule(None, plan.training, world_size)
    elif data.packing:
        remarks.append(_PACKED_LATER)
    if count_rows and not data.streaming:
        data = dataclasses.replace(
            data, train=tuple(map(counted, data.train)), validation=tuple(map(counted, data.validation))
        )
        counts = [source.rows for source in data.train]
        if not data.packing and all(count is not None for count in counts):
            rows = sum(round((source.rows or 0) * source.weight) for source in data.train)
            rows -= validation_rows(rows, data.validation_fraction)
            schedule = make_schedule(rows, plan.training, world_size)
            choices = choices | {"steps": _steps_choice(schedule, rows, data.packing)}
    return _scheduled(dataclasses.replace(plan, data=data, choices=choices, remarks=tuple(remarks)), schedule)


def _steps_choice(schedule: Schedule, rows: int | None, packing: bool) -> Choice:
    if rows is None:
        return Choice(schedule.total_steps, "max_steps; the rows are streamed")
    kind = "packed rows" if packing else "rows"
    return Choice(schedule.total_steps, f"{rows} {kind} make {schedule.steps_per_epoch} steps an epoch")


def preference_plan(context: Context) -> Preference | None:
    """How pairs are learned, if they are."""
    section, lora = context.recipe.preference, context.recipe.lora
    if section is None:
        return None
    losses = (section.loss_type,) if isinstance(section.loss_type, str) else section.loss_type
    reference: Any = section.reference
    if reference == "auto":
        reference = context.choose("preference.reference", "start", "what the training must not move away from")
    if reference == "base" and lora is not None and (lora.bias != "none" or lora.modules_to_save):
        context.wrong(
            ("preference", "reference"),
            "without an adapter that trains biases or whole modules the model is not its base again; use start",
        )
    if lora is not None and lora.lora_dropout:
        context.remarks.append(
            f"lora.lora_dropout: {lora.lora_dropout:g} is on while the policy learns, and off for its reference; the "
            "usual value for pairs is 0."
        )
    weights = section.loss_weights or (1.0,) * len(losses)
    return Preference(section.method, losses, weights, section.beta, section.label_smoothing, reference)


DEFAULT_GLOBAL_BATCH_SIZE = 16
DEFAULT_EPOCHS = 3.0
DEFAULT_WARMUP_RATIO = 0.03
DEFAULT_LEARNING_RATE = 2e-4
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
        "learning_rate": _learning_rate(context),
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
        "evals_per_epoch": training.evals_per_epoch,
        "save_strategy": training.save_strategy,
        "save_steps": training.save_steps,
        "saves_per_epoch": training.saves_per_epoch,
        "save_total_limit": training.save_total_limit,
        "load_best_model_at_end": _keep_best(context, has_validation),
        **_best(context, has_validation),
        "early_stopping_patience": training.early_stopping_patience,
        "report_to": list(training.report_to),
        "bf16": mixed == "bfloat16",
        "fp16": mixed == "float16",
        "use_cpu": context.hardware.device == "cpu",
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


def _learning_rate(context: Context) -> float:
    asked = context.recipe.training.learning_rate
    if asked is not None:
        return asked
    if context.recipe.preference is None:
        return context.choose("training.learning_rate", DEFAULT_LEARNING_RATE, "default")
    if context.recipe.trains_base:
        return context.choose("training.learning_rate", 1e-6, "usual for pairs, as TRL has it")
    return context.choose("training.learning_rate", 1e-5, "usual for pairs: ten times that of training in full")


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
        message = f"{asked} needs a CUDA GPU, and this is {context.hardware.name}; use auto or adamw_torch_fused"
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
    reason = "by metric_for_best_model" if best else "there is no validation loss to choose by"
    return context.choose("training.load_best_model_at_end", best, reason)


def _best(context: Context, has_validation: bool) -> dict[str, Any]:
    """What the best adapter is found by, and whether more of it is better."""
    asked = context.recipe.training.metric_for_best_model
    by_loss = {"metric_for_best_model": "loss", "greater_is_better": False}
    if asked is None:
        if has_validation:
            context.choose("training.metric_for_best_model", "loss", "the validation loss")
        return by_loss
    from lorafit.plan.evaluation import best_by  # numpy, which most recipes don't need

    try:
        name, greater = best_by(context.recipe, asked)
    except UsageError as error:
        context.wrong(("training", "metric_for_best_model"), str(error))
        return by_loss
    return {"metric_for_best_model": name, "greater_is_better": greater}
