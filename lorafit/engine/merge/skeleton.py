"""A model's modules without its weights, on which an adapter is put to see what it changes.

PEFT puts an adapter on it as on any model, with its own matching of names, patterns and ranks, and so tells what
the adapter does to which parameter. Checkpoint keys are matched to parameters by transformers' own rules.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper, load_peft_weights, set_peft_model_state_dict
from peft.utils.save_and_load import _get_adapter_state_dict_key_prefixes, _is_adapter_key, _peft_key_to_original_key
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from lorafit.engine.merge.edits import ADAPTER, BiasEdit, Edit, Replacement, TokensEdit, edit_of
from lorafit.errors import LorafitError, ModelError
from lorafit.facts import stored_tensors
from lorafit.plan.adapters import check_adapter
from lorafit.text import first_line


class NotOneByOne(Exception):
    """The adapter or the base can't be merged tensor by tensor; the message is why."""


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a base, without its quantization. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}: its config.json can't be used: {first_line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The architecture, with parameters (float32, on the CPU) that take no memory."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:
        raise ModelError(
            f"transformers can't build a {config.model_type} model for text: {first_line(error)}"
        ) from error
    model.config.dtype = config.dtype  # the one that the weights are meant for
    made: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(_nothing(parameter), requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _nothing(buffer)
    return model.eval()


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def is_nothing(tensor: torch.Tensor) -> bool:
    """Whether a tensor is still a place holder (one of a single element can't be told, and is taken for one)."""
    return tensor.device.type == "meta" or tensor.untyped_storage().nbytes() <= tensor.element_size()


# --- keys -----------------------------------------------------------------------------------------


@dataclass
class Part:
    """The checkpoint's tensors that make one parameter.

    Attributes:
        keys: by the converter's source pattern; of a parameter that is stored as it is, one key under "".
        converter: transformers' operation that makes the parameter of them; None if it is stored as it is.
    """

    parameter: str
    keys: dict[str, list[str]] = field(default_factory=dict)
    converter: WeightConverter | None = None

    @property
    def all_keys(self) -> list[str]:
        return sorted((key for keys in self.keys.values() for key in keys), key=dot_natural_key)

    @property
    def key(self) -> str:
        """The one key of a parameter that is stored as it is."""
        assert self.converter is None
        return self.keys[""][0]


def match_keys(model: PreTrainedModel, keys: Iterable[str]) -> tuple[dict[str, Part], list[str]]:
    """Which parameter each key of a checkpoint belongs to, as from_pretrained has it, and the keys that have none.

    Follows transformers.core_model_loading.convert_and_load_state_dict_in_model.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = dict.fromkeys(
        (*(name for name, _ in model.named_parameters(remove_duplicate=False)), *model.state_dict()), True
    )
    prefix = model.base_model_prefix
    parts: dict[str, Part] = {}
    unknown = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if name not in known:
            unknown.append(key)
            continue
        part = parts.setdefault(name, Part(name, converter=by_pattern[pattern] if pattern else None))
        part.keys.setdefault(pattern or "", []).append(key)
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]  # for the way back
    return parts, unknown


def convert(model: PreTrainedModel, part: Part, tensors: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """A parameter made of its stored tensors (by source pattern, in the order of Part.keys)."""
    assert part.converter is not None
    converter = copy.deepcopy(part.converter)
    for pattern in part.keys:
        for key, tensor in zip(part.keys[pattern], tensors.pop(pattern), strict=False):
            converter.add_tensor(part.parameter, key, pattern, tensor)
    made = converter.convert(part.parameter, model=model, config=model.config)
    value = made[part.parameter]
    return value[0] if isinstance(value, list) else value


def revert(model: PreTrainedModel, parameter: str, value: torch.Tensor) -> list[torch.Tensor]:
    """The stored tensors of a parameter, in the natural order of their keys."""
    made = revert_weight_conversion(model, {parameter: value})
    return [made[key] for key in sorted(made, key=dot_natural_key)]


# --- the adapter ----------------------------------------------------------------------------------


@dataclass
class Attached:
    """An adapter on a model without memory, and what it does to each parameter, in order."""

    model: PeftModel
    edits: dict[str, tuple[Edit, ...]]

    @property
    def bytes(self) -> int:
        """Bytes of the adapter's weights, as they are held."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if not is_nothing(p))


def resized(adapter: Path, config: PreTrainedConfig) -> int | None:
    """The rows of the embeddings that an adapter brings along, if they are not as many as the base has."""
    model = empty_model(config)
    names = {
        name
        for name, module in model.named_modules()
        if module is model.get_input_embeddings() or module is model.get_output_embeddings()
    }
    width = model.get_input_embeddings().weight.shape[0]
    file = adapter / "adapter_model.safetensors"
    for tensor in stored_tensors(file) if file.is_file() else ():
        module = tensor.name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
        if module in names and len(tensor.shape) == 2 and tensor.shape[0] != width:
            return tensor.shape[0]
    return None


def attach(model: PreTrainedModel, adapter: Path) -> Attached:
    """Put an adapter on a model without memory, and see what it does.

    Raises ModelError for an adapter that doesn't belong to the model, and NotOneByOne.
    """
    check_adapter(adapter, (name for name, _ in model.named_modules()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig.from_pretrained(str(adapter))
            config.inference_mode = True
            peft = PeftModel(model, config, ADAPTER, low_cpu_mem_usage=True)
            renamed = getattr(model, "_checkpoint_conversion_mapping", {})  # as PeftModel.from_pretrained has it
            weights = load_peft_weights(str(adapter), device="cpu", key_mapping=renamed)
            # Weights of the base that came along are put in last: PEFT casts a layer's adapter to its base's type.
            brought = {key: weights.pop(key) for key in list(weights) if key.endswith(".base_layer.weight")}
            found = set_peft_model_state_dict(peft, weights, ADAPTER, low_cpu_mem_usage=True)
            for key, value in brought.items():
                peft.get_submodule(key.rpartition(".")[0]).weight = nn.Parameter(value, requires_grad=False)
    except LorafitError:
        raise
    except Exception as error:
        raise ModelError(f"{adapter}: does not belong to this base: {_mismatch(error)}") from error
    # With a vocabulary of another size, PEFT also saves a module's original, and its new version a second time.
    odd = [key for key in found.unexpected_keys if ".original_module." not in key and ".modules_to_save." not in key]
    if odd:
        raise ModelError(
            f"{adapter}: holds {len(odd)} tensors that the base has no place for, such as {odd[0]}; it belongs to "
            "another model"
        )
    missing = [name for name, value in peft.named_parameters() if value.device.type == "meta"]
    if missing:
        raise ModelError(f"{adapter}: lacks {len(missing)} of its tensors, such as {missing[0]}; is the file whole?")
    odd = [name for name, value in weights.items() if not value.is_floating_point()]
    if odd:
        raise ModelError(f"{adapter}: {odd[0]} holds {str(weights[odd[0]].dtype)[6:]}, not floating numbers")
    broken = next((name for name, value in (weights | brought).items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise ModelError(f"{adapter}: {broken} holds numbers that are not finite; the adapter is broken")
    edits: dict[str, list[Edit]] = {}
    for name, edit in _edits(peft):
        edits.setdefault(name, []).append(edit)
    if not edits:
        raise ModelError(f"{adapter}: changes nothing in this base: none of its modules exists there")
    for name, several in edits.items():
        first, *others = several
        if any(isinstance(edit, Replacement) for edit in others) or len(others) > (isinstance(first, Replacement)):
            raise NotOneByOne(f"{name} is changed in more than one way")
    return Attached(peft, {name: tuple(several) for name, several in edits.items()})


def _mismatch(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return first_line(next((line.strip() for line in lines if "size mismatch" in line), first_line(error)))


def _edits(peft: PeftModel) -> Iterator[tuple[str, Edit]]:
    """Replacements first: what a LoRA layer adds, it adds to a weight that the adapter brought along."""
    prefixes = _get_adapter_state_dict_key_prefixes(peft)
    inner = peft.base_model.model
    wrapped = {name: module for name, module in inner.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    for name, wrapper in wrapped.items():
        for leaf, value in wrapper.modules_to_save[ADAPTER].named_parameters():
            if is_nothing(value):
                raise ModelError(f"the adapter lacks {name}.{leaf}, which its modules_to_save names")
            yield f"{name}.{leaf}", Replacement(value.data, must_change=True)
    for name, value in inner.named_parameters():
        if ".lora_" in name or is_nothing(value) or value.numel() == 1:
            continue
        if not _is_adapter_key(name, prefixes):
            original = _peft_key_to_original_key(peft, name)
            if original.rpartition(".")[0] not in wrapped:  # else it is what modules_to_save replaces
                yield original, Replacement(value.data, must_change=False)
    for name, module in inner.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            adapter = module.token_adapter
            indices = torch.tensor(adapter.token_indices[ADAPTER])
            yield f"{name}.weight", TokensEdit(indices, adapter.trainable_tokens_delta[ADAPTER].data)
        elif isinstance(module, LoraLayer):
            yield from _layer_edits(name, module)
        elif isinstance(module, BaseTunerLayer) and not name.endswith("token_adapter"):
            raise NotOneByOne(f"{name} has a layer of {type(module).__module__}, which only PEFT merges")


def _layer_edits(name: str, layer: Any) -> Iterator[tuple[str, Edit]]:
    edit = edit_of(layer)
    if edit is None:
        raise NotOneByOne(f"{name} is a {type(layer).__name__} with a method that only PEFT merges")
    path = name
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    if isinstance(layer, ParamWrapper):
        yield f"{path}.{layer.parameter_name}", edit
        return
    yield f"{path}.weight", edit
    if layer.lora_bias.get(ADAPTER):
        if getattr(layer.get_base_layer(), "bias", None) is None:
            raise ModelError(
                f"{path}: the adapter has a bias (lora_bias) and the base layer has none, so it can't be merged"
            )
        yield f"{path}.bias", BiasEdit(layer)


def parted(model: PreTrainedModel, edits: dict[str, tuple[Edit, ...]]) -> dict[str, str]:
    """Parameters that can't stay tied to another one, since the adapter treats the two differently.

    Returns:
        the source by the parameter that was tied to it.
    """
    tied = model.all_tied_weights_keys.items()
    return {target: source for target, source in tied if not _same(edits.get(target, ()), edits.get(source, ()))}


def _same(one: tuple[Edit, ...], other: tuple[Edit, ...]) -> bool:
    def same(mine: Edit, its: Edit) -> bool:
        match mine, its:
            case Replacement(), Replacement():
                return torch.equal(mine.value, its.value)
            case TokensEdit(), TokensEdit():
                return torch.equal(mine.indices, its.indices) and torch.equal(mine.values, its.values)
        return False

    return len(one) == len(other) and all(map(same, one, other))
