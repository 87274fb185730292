"""LLaMA-Factory's recipes: what several keys decide together, and its own defaults."""

from __future__ import annotations

from lorafit.init.peers.common import (
    chat_template,
    logging,
    optimizer,
    sampling,
    schedule,
    scheduler,
    trackers,
    warmup,
)
from lorafit.init.peers.convert import Conversion
from lorafit.init.peers.dialect import flag, names, text, whole
from lorafit.init.peers.evaluation import evaluation, held_out, quiet_evaluation
from lorafit.init.peers.llamafactory_data import sources

TEMPLATES = {
    "qwen": "qwen2_5",
    "phi": "phi3",
    "gemma2": "gemma",
    "gemma3_text": "gemma3",
    "qwen3_nothink": "qwen3_instruct_2507",
    "gpt_oss": "gptoss",
    "gpt": "gptoss",
    "deepseek3": "deepseekv3",
    "glm4_moe": "glm4moe",
}
"""Its names for templates that TRL ships under another."""
ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}


def assemble(c: Conversion) -> None:
    """What several keys decide together, and LLaMA-Factory's own defaults."""
    stage = c.get("stage", text, "sft")
    if stage != "sft":
        c.refuse("stage", f"lorafit trains on answers (sft) only, not {stage}")
    _method(c)
    sources(c)
    _masking(c)
    _precision(c)
    _template(c)
    c.put("model.attn_implementation", *_attention(c))
    _training(c)
    if "dataset.validation" not in c.lines:
        held_out(c, "val_size")
    evaluation(c)
    quiet_evaluation(c)
    trackers(c)
    if c.get("use_swanlab", flag, False):
        c.put("training.report_to", [*(c.value("training.report_to") or []), "swanlab"], "use_swanlab")


def _method(c: Conversion) -> None:
    kind = c.get("finetuning_type", text, "lora")
    bits = c.get("quantization_bit", whole, 0)
    if kind not in ("lora", "full"):
        c.refuse("finetuning_type", f"lorafit has no {kind}; it trains lora, or all weights (full)")
    if bits:
        _quantization(c, bits)
    if kind == "full":
        if bits:
            c.refuse("quantization_bit", "quantized weights can't be trained without an adapter")
        c.without_adapter()
        return
    c.default("lora.r", 8)
    if "lora.lora_alpha" not in c.lines:
        c.put("lora.lora_alpha", 2 * c.value("lora.r"), "LLaMA-Factory's default: twice lora_rank")
    c.default("lora.lora_dropout", 0.0)
    targets = c.get("lora_target", names, ["all"])
    why = "lora_target" if c.given("lora_target") else "LLaMA-Factory's default"
    c.put("lora.target_modules", "all-linear" if targets == ["all"] else targets, why)
    if c.get("pissa_init", flag, False):
        rounds = c.get("pissa_iter", whole, 16)
        c.put("lora.init_lora_weights", "pissa" if rounds == -1 else f"pissa_niter_{rounds}", "pissa_init, pissa_iter")


def _quantization(c: Conversion, bits: int) -> None:
    how = str(c.plain("quantization_method") or "bnb").lower()
    if how not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        key = "quantization_bit" if bits not in (4, 8) else "quantization_method"
        c.refuse(key, f"lorafit quantizes with bitsandbytes, to 4 or 8 bits, not with {how} to {bits}")
    c.put(f"quantization.load_in_{bits}bit", True, "quantization_bit")
    if bits == 4:
        kind, double = c.get("quantization_type", text, "nf4"), c.get("double_quantization", flag, True)
        own = "LLaMA-Factory's default"
        c.put("quantization.bnb_4bit_quant_type", kind, "quantization_type" if c.given("quantization_type") else own)
        c.put(
            "quantization.bnb_4bit_use_double_quant",
            double,
            "double_quantization" if c.given("double_quantization") else own,
        )
        if c.get("bf16", flag, False):
            c.note(
                "quantization_bit", "with a 4-bit base lorafit keeps the adapter in bfloat16, LLaMA-Factory in float32"
            )
            c.fates["quantization_bit"] = "quantization"


def _masking(c: Conversion) -> None:
    if c.get("train_on_prompt", flag, False):
        c.put("dataset.loss_on", "all", "train_on_prompt")
    elif c.get("mask_history", flag, False):
        c.put("dataset.loss_on", "completion", "mask_history: only the last answer")
    else:
        given = next((key for key in ("train_on_prompt", "mask_history") if c.given(key)), None)
        c.put("dataset.loss_on", "assistant", given or "LLaMA-Factory's default")


def _precision(c: Conversion) -> None:
    if c.get("pure_bf16", flag, False):
        c.put("model.dtype", "bfloat16", "pure_bf16")
    elif c.get("bf16", flag, False):
        # In full, its weights are float32 under bfloat16 arithmetic: lorafit's auto.
        c.put("model.dtype", "bfloat16" if "lora.r" in c.lines else "auto", "bf16")
    elif c.get("fp16", flag, False):
        c.put("model.dtype", "float16" if "lora.r" in c.lines else "auto", "fp16")
    else:
        c.put("model.dtype", "auto", "LLaMA-Factory's default: the model's own type")


def _template(c: Conversion) -> None:
    name = c.get("template", text, "")
    if name:
        chat_template(c, "template", name, TEMPLATES)
    if not c.given("enable_thinking"):
        return
    if c.get("enable_thinking", flag, True):
        c.note("enable_thinking", "true: LLaMA-Factory also learns an empty block where a row has no reasoning")
    else:
        c.put("model.chat_template_kwargs", {"enable_thinking": False}, "enable_thinking")
        message = "false: LLaMA-Factory takes reasoning out of the rows, lorafit learns what they have"
        c.note("enable_thinking", message, "model.chat_template_kwargs")


def _attention(c: Conversion) -> tuple[str, str]:
    asked = c.plain("flash_attn")
    words = {True: "fa2", False: "disabled", None: "auto"}  # as older recipes say it
    name = words[asked] if asked is None or isinstance(asked, bool) else c.read("flash_attn", text, asked)
    if name not in ATTENTION:
        c.note("flash_attn", f"'{name}': no equivalent; lorafit chooses")
        name = "auto"
    return ATTENTION[name], "flash_attn" if c.given("flash_attn") else "LLaMA-Factory's default"


def _training(c: Conversion) -> None:
    c.default("training.max_length", 2048)
    if c.get("packing", flag, False) or c.get("neat_packing", flag, False):
        key = "neat_packing" if c.get("neat_packing", flag, False) else "packing"
        c.put("training.packing", True, key)
        if key == "packing":
            c.note("packing", "LLaMA-Factory lets packed rows see each other, lorafit doesn't", "training.packing")
    for target, value in (
        ("training.per_device_train_batch_size", 8),
        ("training.gradient_accumulation_steps", 1),
        ("training.learning_rate", 5e-5),
        ("training.weight_decay", 0.0),
        ("training.max_grad_norm", 1.0),
        ("training.seed", 42),
    ):
        c.default(target, value)
    off = c.get("disable_gradient_checkpointing", flag, False)
    given = "disable_gradient_checkpointing" if c.given("disable_gradient_checkpointing") else "LLaMA-Factory's default"
    c.put("training.gradient_checkpointing", not off, given)
    schedule(c, "num_train_epochs", 3.0)
    scheduler(c, "lr_scheduler_type", "linear")
    warmup(c)
    optimizer(c, "optim")
    sampling(c)
    if c.get("disable_shuffling", flag, False):
        c.put("training.train_sampling_strategy", "sequential", "disable_shuffling")
    logging(c)
