"""The tiny model: of the real one's architecture, random, with its tokenizer or a stand-in, in a folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lorafit.engine.tokenizer import cannot_load, gguf, location
from lorafit.errors import ModelError
from lorafit.facts import ModelFacts, Tensor, hub_unreachable, read_facts
from lorafit.facts.template import inspect_template
from lorafit.plan.adapters import adapter_of
from lorafit.recipe import Recipe
from lorafit.text import first_line

BLOCK = 64
"""bitsandbytes quantizes blocks of so many weights, and its kernels for a CPU want rows of whole blocks."""
MOST_LAYERS = 8
MOST_HEADS = 8

Shape: TypeAlias = Literal["narrow", "even", "roomy"]
"""The hidden size: small, a small multiple of the heads, or that of all heads, for families that know no other."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_SMALL = {
    "moe_intermediate_size": BLOCK,
    "shared_expert_intermediate_size": BLOCK,
    "intermediate_size_mlp": 2 * BLOCK,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "decoder_sparse_step": 2,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": BLOCK,
    "kv_lora_rank": BLOCK,
    "word_embed_proj_dim": None,
}
"""Sizes that are at most so much in a tiny model. None: those follow from others."""


def shrink(config: Any, vocabulary: int, tokens: Mapping[str, int | None], least: int, shape: Shape = "narrow") -> None:
    """Make a configuration tiny, in place.

    Kept are the size and grouping of heads, positions and windows, the pattern of layers, tied embeddings and
    whatever is a switch.

    Args:
        vocabulary: the tokenizer's size.
        tokens: ids of special tokens, by their name in a configuration.
        least: of each side of a matrix, for adapters that start from its singular values.
        shape: what the hidden size is.
    """
    text = config.get_text_config()
    _shorten(text)
    _narrow(text, least, shape)
    for part in (getattr(config, name, None) for name in ("vision_config", "audio_config")):
        if part is not None and not isinstance(part, dict):
            _shorten(part)
            _narrow(part, BLOCK, shape="roomy")
    for part in {id(config): config, id(text): text}.values():
        if getattr(part, "vocab_size", None) is not None:
            part.vocab_size = vocabulary
        for name, value in vars(part).copy().items():
            if name in tokens:
                setattr(part, name, tokens[name])
            elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= vocabulary:
                setattr(part, name, None if name in ("pad_token_id", "bos_token_id") else vocabulary - 1)
    if isinstance(getattr(text, "initializer_range", None), float):  # as wide models are scaled: a loss that moves
        text.initializer_range = round(1 / math.sqrt(text.hidden_size), 4)


def _shorten(part: Any) -> None:
    """The least number of layers that shows every kind that there is."""
    layers = getattr(part, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return
    patterns = {
        name: value for name, value in vars(part).items() if isinstance(value, list | tuple) and len(value) == layers
    }
    kept = min(2, layers)
    for pattern in patterns.values():
        firsts = [pattern.index(kind) + 1 for kind in pattern]
        kept = max([kept, *(first for first in firsts if first <= MOST_LAYERS)])
    if any(getattr(part, name, None) for name in _EXPERTS):
        kept = max(kept, min(layers, 3) if getattr(part, "first_k_dense_replace", 0) else 2)
    part.num_hidden_layers = kept
    for name, pattern in patterns.items():
        setattr(part, name, pattern[:kept])
    only = getattr(part, "mlp_only_layers", None)
    if only:
        part.mlp_only_layers = [index for index in only if index < kept]


def _narrow(part: Any, least: int, shape: Shape) -> None:
    """Small hidden sizes and few heads."""
    heads = getattr(part, "num_attention_heads", None)
    hidden = getattr(part, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    keys = getattr(part, "num_key_value_heads", None) or heads
    size = getattr(part, "head_dim", None) or hidden // heads
    group = min(max(heads // keys, 1), MOST_HEADS)
    few = next(
        (n for n in (2, 1, 4, 8) if n <= max(keys, 1) and n * size >= least and n * group * size % BLOCK == 0), 2
    )
    few = 1 if few * group > MOST_HEADS and group * size % BLOCK == 0 and size >= least else min(few, keys)
    part.num_attention_heads = few * group
    if getattr(part, "num_key_value_heads", None) is not None:
        part.num_key_value_heads = few
    width = -(-max(BLOCK, least) // BLOCK) * BLOCK
    if shape == "even":
        width = math.lcm(width, few * group)
    if shape == "roomy" or not _sets_head_dim(part, size):
        width = few * group * size
    part.hidden_size = width
    for name in ("intermediate_size", "ffn_dim", "ffn_hidden_size"):
        if isinstance(getattr(part, name, None), int):
            setattr(part, name, max(2 * BLOCK, width))
    for name in _EXPERTS:
        if isinstance(getattr(part, name, None), int):
            setattr(part, name, min(getattr(part, name), 4))
    for name, most in _SMALL.items():
        value = getattr(part, name, None)
        if isinstance(value, int):
            setattr(part, name, width if most is None else min(value, most))


def _sets_head_dim(part: Any, size: int) -> bool:
    """Whether the size of heads can be set beside the hidden size."""
    try:
        part.head_dim = size
    except AttributeError:  # a property, computed from the hidden size
        return False
    return True


VOCABULARY = 2048
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] %}{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = "<|im_end|>"
_LIKE_A_TOKEN = re.compile(r"<\|?[A-Za-z][\w/-]*\|?>|\[/?[A-Z]+\]|</s>")


def own_tokenizer(facts: ModelFacts, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The model's own tokenizer; None where the hub or its cache does not give it. Raises ModelError for local ones."""
    local = facts.kind in ("folder", "gguf")
    if facts.kind == "bundled":
        return None
    hub: dict[str, Any] = {} if local else {"revision": revision, "local_files_only": hub_unreachable() is not None}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            *location(facts.name), **gguf(facts.name), **hub, trust_remote_code=False
        )
    except Exception as error:
        if local:
            raise cannot_load("tokenizer", facts.name, error) from error
        return None
    return tokenizer


def small_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    """A small byte-level tokenizer, the same every time, that knows the control tokens of the recipe's template.

    It is made from lorafit's own texts, not from the data, so that a change of the data changes the rows alone.
    """
    found = inspect_template(template, {}) if template else None
    end = found.end_of_turn if found and _LIKE_A_TOKEN.fullmatch(found.end_of_turn or "") else END
    control = dict.fromkeys(("<|endoftext|>", "<|im_start|>", END, *_LIKE_A_TOKEN.findall(template or "")))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token=end, pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template or CHATML
    return tokenizer


def _texts() -> Iterator[str]:
    text = resources.files("lorafit.engine.evaluate").joinpath("texts/general.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        yield json.loads(line)["text"]


SEED = 0


def write_tiny_model(
    facts: ModelFacts, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, folder: Path
) -> tuple[ModelFacts, dict[str, int]]:
    """Write the model and its tokenizer; returns its facts and sizes. Raises ModelError if there is no such model."""
    try:
        model = _built(facts, tokenizer, max(BLOCK, adapter_of(recipe).least_width))
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
