"""How the model is loaded, and what is put on it: its type, attention, quantization and adapter."""

from __future__ import annotations

from typing import Any

from lorafit.errors import UsageError
from lorafit.families import family_of
from lorafit.plan.adapters import OUTPUT_HEADS, TargetError, Targets, adapter_of, is_skipped
from lorafit.plan.chain import is_float32
from lorafit.plan.values import Context, ModelPlan
from lorafit.text import near

FLASH_NEEDS = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0)}
"""The compute capability from which a kernel runs."""


def choose_dtype(context: Context) -> str:
    """The type of the model's weights."""
    recipe, hardware = context.recipe, context.hardware
    asked, key = recipe.model.dtype, "model.dtype"
    if asked != "auto":
        if asked == "float16" and not context.on_gpu:
            context.wrong(("model", "dtype"), f"float16 can't be trained on {hardware.name}; use auto")
        elif asked == "float16" and recipe.trains_base:
            context.wrong(("model", "dtype"), "float16 weights can't be trained in full; use auto")
        if asked == "bfloat16" and not hardware.fast_bf16:
            context.remarks.append(f"bfloat16 is slow on {hardware.name}, which has no fast arithmetic for it.")
        return context.choose(key, asked, "as the recipe says")
    if recipe.trains_base:
        return context.choose(key, "float32", "training in full: small updates get lost in 16-bit weights")
    if hardware.fast_bf16:
        return context.choose(key, "bfloat16", f"{hardware.name} has fast bfloat16 arithmetic")
    if context.on_gpu:
        reason = f"{hardware.name} has no bfloat16 arithmetic; the loss is scaled for float16"
        return context.choose(key, "float16", reason)
    return context.choose(key, "float32", f"a CPU without instructions for bfloat16 ({hardware.name})")


def mixed_dtype(context: Context, dtype: str) -> str | None:
    """The 16-bit type that arithmetic is done in, if any."""
    if context.recipe.trains_base and context.on_gpu and context.hardware.fast_bf16:
        return "bfloat16"
    return None if dtype == "float32" else dtype


def model_kwargs(context: Context, dtype: str) -> dict[str, Any]:
    """For from_pretrained."""
    model, stored = context.recipe.model, context.facts.stored_quantization
    if model.use_kernels and not context.on_gpu:
        context.wrong(("model", "use_kernels"), "kernels of the hub need a CUDA GPU; leave it out")
    if stored:
        context.wrong(
            ("model", "name_or_path"),
            f"its weights are stored quantized ({stored}); name the model that it was made "
            "from, and quantize that with the quantization section",
        )
    return {
        "revision": model.revision,
        "dtype": dtype,
        "attn_implementation": _attention(context, dtype),
        "trust_remote_code": model.trust_remote_code,
    }


def _attention(context: Context, dtype: str) -> str:
    asked, key = context.recipe.model.attn_implementation, "model.attn_implementation"
    family, hardware = context.facts.model_type, context.hardware
    if asked == "auto":
        if not family_of(family).sdpa:
            return context.choose(key, "eager", f"transformers does not run {family} models with sdpa")
        return context.choose(key, "sdpa", "fast everywhere and part of torch")
    wrong = None
    if asked == "sdpa" and not family_of(family).sdpa:
        wrong = f"transformers does not run {family} models with sdpa"
    elif asked in FLASH_NEEDS:
        major, minor = needed = FLASH_NEEDS[asked]
        if not context.on_gpu:
            wrong = f"{asked} needs a CUDA GPU"
        elif (hardware.compute_capability or (8, 0)) < needed:
            wrong = f"{asked} needs compute capability {major}.{minor}, which {hardware.name} does not have"
        elif dtype == "float32" and not mixed_dtype(context, dtype):
            wrong = f"{asked} does not compute in float32"
    if wrong:
        context.wrong(("model", "attn_implementation"), f"{wrong}; use auto")
    return asked


def quantization_kwargs(context: Context, dtype: str) -> dict[str, Any] | None:
    """For BitsAndBytesConfig; None without quantization."""
    quantization = context.recipe.quantization
    if quantization is None:
        return None
    if context.hardware.device == "mps":
        context.wrong(
            ("quantization",),
            "bitsandbytes has no kernels of its own for an Apple GPU: it downloads code from a hub, or is slow; leave "
            "out the section, or train on the CPU (ACCELERATE_USE_CPU=true)",
        )
    skip = _unquantized(context, quantization.llm_int8_skip_modules)
    _say_what_stays(context, dtype)
    if quantization.load_in_8bit:
        return {
            "load_in_8bit": True,
            "llm_int8_threshold": quantization.llm_int8_threshold,
            "llm_int8_skip_modules": skip,
        }
    compute: str = quantization.bnb_4bit_compute_dtype
    if compute == "auto":
        compute = context.choose("quantization.bnb_4bit_compute_dtype", dtype, "as the model's dtype")
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quantization.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": quantization.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": compute,
        "llm_int8_skip_modules": skip,
    }


def _say_what_stays(context: Context, dtype: str) -> None:
    """bitsandbytes replaces plain linear layers: not fused experts, and some families have none."""
    facts = context.facts
    if facts.tensors and not facts.quantizable:
        context.wrong(
            ("quantization",),
            f"bitsandbytes finds no linear layer in a {facts.model_type} model as transformers builds it, so nothing "
            "would be quantized; leave out the section",
        )
    elif facts.is_moe:
        part = sum(tensor.size for tensor in facts.quantizable.values()) / facts.parameters
        context.remarks.append(
            f"bitsandbytes leaves experts in {dtype}: {part:.0%} of this model's parameters are quantized, so that it "
            "stays nearly as large."
        )


def _unquantized(context: Context, asked: tuple[str, ...] | None) -> list[str] | None:
    """What bitsandbytes leaves alone. A list replaces its default, which is the output head."""
    if asked is None:
        return None
    names = list(context.facts.quantizable)
    for index, name in enumerate(asked):
        where = ("quantization", "llm_int8_skip_modules", index)
        try:
            skipped = {module for module in context.facts.modules if is_skipped(module, [name])}
        except UsageError as error:
            context.wrong(where, str(error).partition(": ")[2])
            continue
        if names and name not in OUTPUT_HEADS and skipped.isdisjoint(names):
            context.wrong(where, f"'{name}' matches no linear layer of the model{near(name, names)}")
    heads = [head for head in OUTPUT_HEADS if head in context.facts.modules] or ["lm_head"]
    reason = "the recipe's list, and the output head, from whose weight the loss is computed"
    return list(context.choose("quantization.llm_int8_skip_modules", list(dict.fromkeys((*asked, *heads))), reason))


def adapter_targets(context: Context) -> Targets | None:
    """The modules that are adapted; None for training in full, and where only the model can tell."""
    adapter, facts = adapter_of(context.recipe), context.facts
    targets = None
    if facts.tensors:
        try:
            targets = adapter.targets(facts)
        except TargetError as error:
            context.wrong(error.path, str(error))
            return None
    for path, message in adapter.complaints(facts, context.hardware.device):
        context.wrong(path, message)
    if targets is None:
        if not adapter.trains_base:
            context.remarks.append(
                f"The layers of a {facts.model_type} model are not known without its safetensors headers: "
                "target_modules are checked when the model loads."
            )
        return None
    if facts.is_moe:
        context.remarks.append("Experts are fused parameters in transformers 5, so they get no adapter.")
    reason = f"{targets.reason} ({len(targets.modules)} modules)"
    context.choose(f"{adapter.name}.target_modules", list(targets.names), reason)
    return targets


def adapter_dtype(context: Context, dtype: str) -> str:
    """The type of the trained adapter's weights."""
    if context.recipe.trains_base:
        return dtype
    start = context.recipe.start_from
    if start is not None and is_float32(start):
        return context.choose("adapter dtype", "float32", f"as {start}, from which it starts")
    if context.recipe.quantization and dtype == "bfloat16":
        reason = "as QLoRA does it (arXiv:2305.14314); DoRA's magnitudes stay float32"
        return context.choose("adapter dtype", "bfloat16", reason)
    return context.choose("adapter dtype", "float32", "small updates get lost in 16 bits")


def model_plan(context: Context, targets: Targets | None) -> ModelPlan:
    facts = context.facts
    trained = adapter_of(context.recipe).tensors(facts, targets) if facts.tensors else ()
    return ModelPlan(
        name_or_path=facts.name,
        kind=facts.kind,
        source=facts.source,
        model_type=facts.model_type,
        parameters=facts.parameters,
        trainable_parameters=sum(tensor.size for tensor in trained),
        adapted_modules=len(targets.modules) if targets else 0,
        kernels=dict(context.recipe.model.use_kernels),
    )
