"""What bitsandbytes makes of weights: the very values that an adapter on a quantized base was trained on."""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lorafit.engine.merge.skeleton import empty_model
from lorafit.engine.model import quantization_config

SIDE_KEYS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
"""What bitsandbytes stores beside a packed 4-bit weight, behind the weight's key."""


class RoundTrip:
    """Quantizes and dequantizes as the training's base was.

    Attributes:
        parameters: the weights that bitsandbytes quantizes, by transformers' own choice of modules.
    """

    def __init__(self, config: PreTrainedConfig, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
        """
        Args:
            kwargs: of BitsAndBytesConfig, as the plan has them.
            dtype: that the base was loaded in, from which bitsandbytes quantized.
        """
        self._config, self._dtype = quantization_config(kwargs), dtype
        model = empty_model(config)
        turned = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        quantizer = AutoHfQuantizer.from_config(self._config, pre_quantized=False)
        heard = logging.getLogger("transformers.integrations.bitsandbytes")
        level = heard.level
        heard.setLevel(logging.ERROR)
        quantizer._process_model_before_weight_loading(model, device_map={"": "cpu"})
        heard.setLevel(level)
        kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
        found = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        self.parameters = frozenset(f"{name}.weight" for name in found)
        self._turned = frozenset(f"{name}.weight" for name in found & turned)

    def __call__(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight as the adapter saw it, in the type that the base was loaded in."""
        if parameter not in self.parameters:
            return weight.to(self._dtype)
        weight = weight.to(self._dtype)
        if parameter in self._turned:
            return self._there_and_back(weight.T.contiguous()).T.contiguous()
        return self._there_and_back(weight)

    def _there_and_back(self, weight: torch.Tensor) -> torch.Tensor:
        if self._config.load_in_8bit:
            packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
            return bnb.functional.int8_vectorwise_dequant(packed, scales).to(self._dtype)
        packed, state = bnb.functional.quantize_4bit(
            weight,
            compress_statistics=self._config.bnb_4bit_use_double_quant,
            quant_type=self._config.bnb_4bit_quant_type,
        )
        return bnb.functional.dequantize_4bit(packed, state)


def unpack(weight: torch.Tensor, beside: dict[str, torch.Tensor]) -> torch.Tensor:
    """A stored bitsandbytes weight as plain numbers: 4-bit with its state, or int8 with its row scales."""
    if "SCB" in beside:
        return bnb.functional.int8_vectorwise_dequant(weight, beside["SCB"]).to(torch.float16)
    state = bnb.functional.QuantState.from_dict(beside, device=torch.device("cpu"))
    return bnb.functional.dequantize_4bit(weight, state)
