"""Making the plan: the only place that decides what a recipe leaves open.

The decisions are by theme in the modules beside this one. Their order here is the order in which
choices and mistakes are shown.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lorafit.errors import DataError, UsageError
from lorafit.facts import ModelFacts, read_facts
from lorafit.facts.template import syntax_error
from lorafit.hardware import Hardware, detect, elsewhere
from lorafit.plan.adapters import adapter_of
from lorafit.plan.data import Reading, choose_max_length, counted, plan_data, plan_sources, read_chat_template
from lorafit.plan.model import (
    adapter_dtype,
    adapter_targets,
    choose_dtype,
    model_kwargs,
    model_plan,
    quantization_kwargs,
)
from lorafit.plan.training import long_warmup, training_kwargs
from lorafit.plan.values import Choice, Context, Plan, Schedule, make_schedule, validation_rows
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
    return _with_steps(plan, count_rows) if read_data else plan


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
    remark = elsewhere(recipe, context.hardware)
    if remark:
        context.remarks.append(remark)
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
    )


def _with_steps(plan: Plan, count_rows: bool) -> Plan:
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
