"""The setup's model on the meta device: real modules of transformers, PEFT and bitsandbytes without storage."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from trl.trainer.utils import add_fused_lm_head

from lorafit.errors import ModelError, first_line
from lorafit.memory.setup import Setup
from lorafit.model import quantization_config
from lorafit.trace.standins import FLASH

Model: TypeAlias = PreTrainedModel | PeftModel


def build(setup: Setup, layers: int | None) -> Model:
    """The model with `layers` layers (None: all) on the meta device, quantized and with its adapter, ready to train."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            configuration(setup, layers), dtype=getattr(torch, setup.dtype), attn_implementation="eager"
        )
    model.config._attn_implementation = FLASH if setup.attention.startswith("flash") else setup.attention
    if setup.quantization is not None:
        model = quantize(model, setup.quantization)
    if setup.stack.upcast != "none":
        upcast(model, setup.stack.upcast)
    with torch.device("meta"):
        return prepare(model, setup)


def prepare(model: PreTrainedModel, setup: Setup) -> Model:
    """Put on a base what training needs: TRL's head, checkpointing, the adapter in its type."""
    if setup.stack.loss == "fused":
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model.config.use_cache = setup.stack.use_cache
    if setup.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": setup.checkpointing == "reentrant"})
        if setup.lora is not None:
            model.enable_input_require_grads()
    if setup.lora is None:
        return model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    values = dict(setup.lora)
    values["init_lora_weights"] = bool(values.get("init_lora_weights", True))  # how it starts takes no memory
    adapted = get_peft_model(model, LoraConfig(**values))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(getattr(torch, setup.adapter_dtype))
    return adapted.train()


def configuration(setup: Setup, layers: int | None) -> PreTrainedConfig:
    """transformers' configuration, shortened to a number of layers. Raises ModelError."""
    values = copy.deepcopy(setup.facts.config)
    values.pop("quantization_config", None)
    kind = values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind, **values)
    except Exception as error:
        raise ModelError(
            f"{setup.facts.name}: transformers can't use its configuration: {first_line(error)}"
        ) from error
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == setup.facts.layers:
                setattr(text, name, value[:layers])
    return config


def quantize(model: PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    """bitsandbytes' layers in place of the linear ones, with packed weights and their constants."""
    config = quantization_config(kwargs)
    skip = kwargs.get("llm_int8_skip_modules") or ["lm_head"]
    dtypes = {name: module.weight.dtype for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model = replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=config)
    bits = "8" if kwargs.get("load_in_8bit") else "4"
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT puts its layers for bitsandbytes on such models
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            with mock.patch.dict(bnb.functional.name2qmap, clear=True):  # it would keep a code book on meta for good
                packed, state = bnb.functional.quantize_4bit(
                    torch.empty(weight.shape, dtype=dtypes[name], device="meta"),
                    blocksize=64,
                    compress_statistics=config.bnb_4bit_use_double_quant,
                    quant_type=config.bnb_4bit_quant_type,
                )
            module.weight = bnb.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=module
            )
            module.quant_state = state
        elif isinstance(module, bnb.nn.Linear8bitLt):
            shape = module.weight.shape
            module.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device="meta"), requires_grad=False)
            module.register_buffer("SCB", torch.empty(shape[0], dtype=torch.float32, device="meta"))
    return model


def upcast(model: PreTrainedModel, which: str) -> None:
    """PEFT's prepare_model_for_kbit_training: what isn't quantized becomes float32; with TRL up to 0.2x and bf16, only
    the norms stay so (trl: peft_module_casting_to_bf16)."""
    for name, parameter in model.named_parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16) and not isinstance(parameter, bnb.nn.Params4bit)
        if half and (which == "all" or "norm" in name):
            parameter.data = parameter.data.float()
