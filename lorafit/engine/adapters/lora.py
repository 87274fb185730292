"""LoRA and its kin: what PEFT is told, how the adapter starts, and its type."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

from lorafit.engine.trainer import save_adapter
from lorafit.errors import ModelError
from lorafit.files import staged
from lorafit.plan import Plan
from lorafit.plan.adapters import MAGNITUDE, check_expressions
from lorafit.progress import is_first_process, stage
from lorafit.recipe.start import place_of
from lorafit.run.directory import RunDir
from lorafit.written import expanded


def config(arguments: Mapping[str, Any], start: bool = True) -> LoraConfig:
    """PEFT's configuration."""
    values = dict(arguments)
    if not start or values["init_lora_weights"] == "loftq":
        values["init_lora_weights"] = True  # put in by `start`, after the base is quantized
    if values["init_lora_weights"] == "eva":
        values["eva_config"] = EvaConfig(rho=1.0)  # equal ranks, so that the adapter has the planned size
    return LoraConfig(**values)


@contextlib.contextmanager
def put_on(plan: Plan, modules: Iterable[str]) -> Iterator[None]:
    """Check the targets against the base's modules, and explain PEFT's refusals while it puts the adapter on them.

    One is of dropout on fused experts, which PEFT adapts in some families. Raises ModelError.
    """
    check_expressions(plan.lora_kwargs or {}, modules, "lora")
    try:
        with stage("putting the adapter on the model"):
            yield
    except ValueError as error:
        if "not found in the base model" in str(error):
            raise ModelError(f"{plan.model.name_or_path}: has other modules than its files say: {error}") from error
        if "ParamWrapper" not in str(error):
            raise
        raise ModelError(
            f"PEFT puts these lora.target_modules on the fused experts of a {plan.model.model_type} model as well, "
            "which lorafit does not plan; use target_modules: attention"
        ) from error


def start(trainer: Any, plan: Plan, run: RunDir) -> None:
    """Finish the adapter's start and its type.

    EVA and LoftQ start after the adapter is on the model. PiSSA and OLoRA take their start out of
    the base, so the untrained adapter is kept to save an ordinary adapter for the unchanged base.
    """
    model: PeftModel = trainer.model
    if plan.start_from is not None:
        cast(model, plan.adapter_dtype)
        go_on_from(model, plan.start_from)
        return
    how = str((plan.lora_kwargs or {})["init_lora_weights"])
    if how == "loftq":
        from peft import replace_lora_weights_loftq

        folder = expanded(plan.model.name_or_path)
        with stage("starting the adapter by LoftQ"):
            replace_lora_weights_loftq(model, model_path=str(folder) if folder.is_dir() else None)
    elif how == "eva":
        from peft import initialize_lora_eva_weights

        with stage("starting the adapter by EVA"):
            initialize_lora_eva_weights(model, trainer.get_train_dataloader(), show_progress_bar=False)
    elif how.startswith(("pissa", "olora")) and is_first_process() and not run.start.is_dir():
        with staged(run.start, "start") as folder:
            save_adapter(model, folder, plan.references)
    cast(model, plan.adapter_dtype)


def go_on_from(model: PeftModel, start_from: str) -> None:
    """Give a new adapter the weights of an older one: all that it has, and nothing else. Raises ModelError."""
    folder = place_of(start_from).folder
    with stage(f"starting from {start_from}"):
        stored = load_peft_weights(str(folder), device="cpu")
        set_peft_model_state_dict(model, dict(stored))
        now = get_peft_model_state_dict(model)
    apart = sorted(stored.keys() ^ now.keys())
    apart += [name for name in stored.keys() & now.keys() if not _equal(stored[name], now[name])]
    if apart:
        raise ModelError(f"start_from: {start_from}: {len(apart)} of its tensors can't go on, such as {apart[0]}")


def _equal(stored: torch.Tensor, now: torch.Tensor) -> bool:
    return stored.shape == now.shape and torch.equal(stored.to(now.dtype), now.cpu())


def cast(model: torch.nn.Module, dtype: str) -> None:
    """Bring all but DoRA's magnitudes, which stay float32, to the adapter's type."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and MAGNITUDE not in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))


def optimizer(plan: Plan) -> Callable[[Any], torch.optim.Optimizer] | None:
    """LoRA+'s: B matrices learn faster than A matrices."""
    if plan.loraplus_lr_ratio is None:
        return None

    def make(trainer: Any) -> torch.optim.Optimizer:
        from peft.optimizers import create_loraplus_optimizer

        kind, values = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        made: torch.optim.Optimizer = create_loraplus_optimizer(
            model=trainer.model,
            optimizer_cls=kind,
            loraplus_lr_ratio=plan.loraplus_lr_ratio,
            loraplus_weight_decay=trainer.args.weight_decay,
            **values,
        )
        return made

    return make
