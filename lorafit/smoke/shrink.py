"""A configuration of transformers, made tiny: fewer and smaller layers of the very same kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

BLOCK = 64
"""bitsandbytes quantizes blocks of so many weights, and its kernels for a CPU want rows of whole blocks."""
MOST_LAYERS = 8
MOST_HEADS = 8

Shape: TypeAlias = Literal["narrow", "even", "roomy"]
"""Of the hidden size: small, a small multiple of the heads, or that of all heads, for families that know no other."""
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
    """As few layers as show every kind that there is."""
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
