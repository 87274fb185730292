"""The adapter: which modules get one, and what PEFT is told about it."""

from __future__ import annotations

from typing import Any

from lorafit.plan.context import Context
from lorafit.recipe import LoraSection
from lorafit.targets import TargetError, Targets, check_modules_to_save, find_targets


def adapter_targets(context: Context) -> Targets | None:
    """The modules that are adapted; None for training in full, and where only the model can tell."""
    lora, facts = context.recipe.lora, context.facts
    if lora is None:
        return None
    if not facts.tensors:
        if lora.target_modules in ("attention", "mlp", "qv"):
            context.wrong(
                ("lora", "target_modules"),
                f"can't be expanded for a {facts.model_type} model without its safetensors headers; use all-linear",
            )
        if isinstance(lora.target_modules, str) and lora.layers_to_transform is not None:
            context.wrong(("lora", "layers_to_transform"), "needs a list of target_modules for this model")
        context.remarks.append(
            f"The layers of a {facts.model_type} model are not known without its safetensors headers: "
            "target_modules are checked when the model loads."
        )
        return None
    try:
        targets = find_targets(lora, facts)
        check_modules_to_save(lora, facts)
    except TargetError as error:
        context.wrong(("lora", *error.path), str(error))
        return None
    if lora.init_lora_weights == "loftq" and context.hardware.device == "cpu":
        context.wrong(("lora", "init_lora_weights"), "PEFT computes loftq on a GPU, and this is a CPU; use true")
    if facts.is_moe:
        context.remarks.append("Experts are fused parameters in transformers 5, so they get no adapter.")
    context.choose("lora.target_modules", list(targets.names), f"{targets.reason} ({len(targets.modules)} modules)")
    return targets


def lora_kwargs(lora: LoraSection | None, targets: Targets | None) -> dict[str, Any] | None:
    """For LoraConfig; None for training in full."""
    if lora is None:
        return None
    names: Any = list(targets.names) if targets else lora.target_modules
    return {
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(names) if isinstance(names, tuple) else names,
        "exclude_modules": _list(lora.exclude_modules),
        "modules_to_save": _list(lora.modules_to_save),
        "layers_to_transform": _list(lora.layers_to_transform),
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
        "bias": lora.bias,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "init_lora_weights": lora.init_lora_weights,
        "task_type": "CAUSAL_LM",
    }


def adapter_dtype(context: Context, dtype: str) -> str:
    """The type of the trained adapter's weights."""
    if context.recipe.lora is None:
        return dtype
    if context.recipe.quantization and dtype == "bfloat16":
        reason = "as QLoRA does it (arXiv:2305.14314); DoRA's magnitudes stay float32"
        return context.choose("adapter dtype", "bfloat16", reason)
    return context.choose("adapter dtype", "float32", "small updates get lost in 16 bits")


def _list(values: Any) -> list[Any] | None:
    return None if values is None else list(values)
