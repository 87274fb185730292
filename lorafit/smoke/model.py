"""The tiny model: of the real one's architecture, random, with its tokenizer, in a folder."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorafit.errors import ModelError, first_line
from lorafit.facts import ModelFacts, Tensor, read_facts
from lorafit.recipe import Recipe
from lorafit.smoke.shrink import BLOCK, Shape, shrink

SEED = 0
_FROM_VALUES = ("pissa", "olora", "eva", "orthogonal")
"""Ways to start an adapter for which a matrix must not be smaller than the rank."""


def write_tiny_model(
    facts: ModelFacts, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path
) -> tuple[ModelFacts, dict[str, int]]:
    """Write the model and its tokenizer; returns its facts and sizes. Raises ModelError if there is no such model."""
    try:
        model = _built(facts, tokenizer, _least(recipe))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{facts.name}: no tiny model of the kind {facts.model_type} can be made: {first_line(error)}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = model.config.get_text_config()
    sizes = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
    }
    tiny = read_facts(str(folder))
    if text is not model.config:  # stored under other names than it has in memory
        named = tuple(Tensor(name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
        tiny = dataclasses.replace(tiny, tensors=named)
    return tiny, sizes


def _built(facts: ModelFacts, tokenizer: PreTrainedTokenizerBase, least: int) -> PreTrainedModel:
    """The smallest that works: some families know no size of heads but the hidden size divided among them."""
    shapes: tuple[Shape, ...] = ("narrow", "even", "roomy")
    for shape in shapes:
        config = _configuration(facts)
        shrink(config, _vocabulary(tokenizer), _special_ids(tokenizer), least, shape)
        try:
            return _checked(config)
        except Exception:
            if shape == shapes[-1]:
                raise
    raise AssertionError


def _configuration(facts: ModelFacts) -> PreTrainedConfig:
    values = copy.deepcopy(facts.config)
    for name in ("quantization_config", "auto_map", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(name, None)
    kind = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:
        raise ModelError(
            f"{facts.name}: transformers can't use its configuration, and code of the model's own is not run here: "
            f"{first_line(error)}"
        ) from error


def _checked(config: PreTrainedConfig) -> PreTrainedModel:
    """The model, after it ran once."""
    config.validate()
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(4)[None])
    return model


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    return -(-len(tokenizer) // BLOCK) * BLOCK


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _least(recipe: Recipe) -> int:
    """What no side of a matrix may be below."""
    lora = recipe.lora
    if lora is None or not str(lora.init_lora_weights).startswith(_FROM_VALUES):
        return BLOCK
    return max(BLOCK, lora.r, *lora.rank_pattern.values())
