"""The merge in memory, by PEFT: for adapters and bases that can't be merged tensor by tensor."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafit.engine.merge.task import RoundTrip
from lorafit.engine.model import loading
from lorafit.engine.tokenizer import cannot_load
from lorafit.errors import GateError, ModelError
from lorafit.plan.adapters import check_adapter
from lorafit.text import first_line


def merge_in_memory(
    base: Path, adapter: Path, folder: Path, round_trip: RoundTrip | None, dtype: torch.dtype | None
) -> tuple[int, bool]:
    """Load the base, merge with PEFT in float32, round once, and save.

    Returns:
        how many layers were merged, and whether tied embeddings had to be untied. Raises ModelError, GateError.
    """
    try:
        with loading(base):
            model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto", trust_remote_code=False)
    except Exception as error:
        raise cannot_load("base", str(base), error) from error
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{base}: is stored quantized, so it can't be merged into in memory; name the model that it was made of "
            "with --base"
        )
    types = {name: dtype or p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    for name, parameter in model.named_parameters():
        if round_trip is not None and name in round_trip.parameters:
            parameter.data = round_trip(name, parameter.data)
    model = model.float()
    check_adapter(adapter, (name for name, _ in model.named_modules()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
            found = peft.load_adapter(str(adapter), "default", torch_device="cpu")  # again, for it tells what it finds
    except Exception as error:
        raise cannot_load("adapter", str(adapter), error) from error
    if peft.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{adapter}: is of PEFT's type {peft.active_peft_config.peft_type.value}, which no weights hold"
        )
    if found.missing_keys:
        raise ModelError(f"{adapter}: lacks {len(found.missing_keys)} of its tensors, such as {found.missing_keys[0]}")
    if found.unexpected_keys:
        raise ModelError(
            f"{adapter}: holds {len(found.unexpected_keys)} tensors that the base has no place for, such as "
            f"{found.unexpected_keys[0]}; it belongs to another model"
        )
    merged_layers = _check(peft, adapter)
    _separate_tied(peft)
    try:
        merged: PreTrainedModel = peft.merge_and_unload(safe_merge=False)
    except Exception as error:
        raise ModelError(f"{adapter}: PEFT can't merge it into this base: {first_line(error)}") from error
    untied = _is_untied(merged)
    if untied:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}
    last = dtype or next(iter(types.values()), torch.float32)
    for name, parameter in merged.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(types.get(name, last))
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise GateError(
                f"{name}: the merged weight holds numbers that are not finite in {str(parameter.dtype)[6:]}; the "
                "adapter is broken, or --dtype float32 is needed"
            )
    merged.save_pretrained(folder)
    return merged_layers, untied


def _check(peft: PeftModel, adapter: Path) -> int:
    """How many layers the adapter has. Raises GateError for one that changes nothing or is not finite."""
    for name, parameter in peft.named_parameters():
        if "lora_" in name and not torch.isfinite(parameter).all():
            raise GateError(f"{adapter}: {name} holds numbers that are not finite; the adapter is broken")
    count = 0
    for name, module in peft.named_modules():
        if isinstance(module, BaseTunerLayer):
            count += 1
            size = math.inf
            with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
                size = float(torch.linalg.vector_norm(_delta(module)))
            if size == 0:
                raise GateError(
                    f"{name}: the adapter changes nothing here, so it is untrained or broken; nothing was kept"
                )
    return count


@torch.no_grad()
def _delta(layer: Any) -> torch.Tensor:
    found: torch.Tensor = layer.get_delta_weight("default")
    return found


def _separate_tied(peft: PeftModel) -> None:
    """Give a tied parameter a copy of its own if a layer adds to one of the two: PEFT adds in place, to both."""
    inner = peft.base_model.model
    for target, source in getattr(inner, "all_tied_weights_keys", {}).items():
        owners = [inner.get_submodule(name.rpartition(".")[0]) for name in (target, source)]
        if any(isinstance(owner, BaseTunerLayer) for owner in owners):
            mine = owners[0].get_base_layer() if isinstance(owners[0], BaseTunerLayer) else owners[0]
            if isinstance(getattr(mine, "weight", None), nn.Parameter):
                mine.weight = nn.Parameter(mine.weight.detach().clone(), requires_grad=False)


def _is_untied(model: PreTrainedModel) -> bool:
    pairs = getattr(model, "all_tied_weights_keys", {}).items()
    return any(not torch.equal(model.get_parameter(target), model.get_parameter(source)) for target, source in pairs)
