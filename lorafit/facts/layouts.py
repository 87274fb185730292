"""The tensors of a decoder, by its family's layout in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError
from lorafit.facts.types import Tensor, text_config_of


def layout(config: dict[str, Any]) -> list[Tensor]:
    """The tensors of a decoder by its family's layout in transformers; empty for other families."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return []
    try:
        return list(_decoder(config, family))
    except KeyError as error:
        raise ModelError(f"the configuration of a {config['model_type']} model has no {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"the configuration of a {config['model_type']} model can't be right: {error}") from None


@dataclass(frozen=True)
class _Family:
    """How a family differs from Llama."""

    qkv_bias: bool = False
    attention_bias: bool = True  # whether config.json may ask for biases
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: bool = False  # qkv_proj and gate_up_proj (Phi-3)
    # What a key that config.json leaves out means:
    tied: bool = False
    kv_heads: int | None = None  # as many as heads
    head_dim: int | None = None  # hidden_size / heads


_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
FAMILIES = {
    "llama": _Family(mlp_bias=True),
    "mistral": _Family(attention_bias=False, kv_heads=8),
    "granite": _Family(mlp_bias=True),
    "qwen2": _Family(qkv_bias=True, attention_bias=False, kv_heads=32),
    "qwen3": _Family(qk_norm=True, kv_heads=32, head_dim=128),
    "gemma": _Family(tied=True, kv_heads=16, head_dim=256),
    "gemma2": _Family(norms=_FOUR_NORMS, tied=True, kv_heads=4, head_dim=256),
    "gemma3_text": _Family(norms=_FOUR_NORMS, qk_norm=True, tied=True, kv_heads=4, head_dim=256),
    "phi3": _Family(attention_bias=False, fused=True),
}


def _decoder(config: dict[str, Any], family: _Family) -> Iterator[Tensor]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", family.kv_heads) or heads
    head = config.get("head_dim", family.head_dim) or hidden // heads
    for value in (hidden, inner, vocab, heads, kv_heads, head, config["num_hidden_layers"]):
        if not isinstance(value, int) or not 0 < value < 1 << 32:
            raise ValueError(f"{str(value)[:40]} is no size")
    queries, keys = heads * head, kv_heads * head
    attention_bias = family.attention_bias and config.get("attention_bias", False)
    yield Tensor("model.embed_tokens.weight", (vocab, hidden))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        linear: list[tuple[str, int, int, bool]]
        if family.fused:
            linear = [
                ("self_attn.qkv_proj", queries + 2 * keys, hidden, False),
                ("self_attn.o_proj", hidden, queries, False),
                ("mlp.gate_up_proj", 2 * inner, hidden, False),
                ("mlp.down_proj", hidden, inner, False),
            ]
        else:
            qkv_bias = attention_bias or family.qkv_bias
            mlp_bias = family.mlp_bias and config.get("mlp_bias", False)
            linear = [
                ("self_attn.q_proj", queries, hidden, qkv_bias),
                ("self_attn.k_proj", keys, hidden, qkv_bias),
                ("self_attn.v_proj", keys, hidden, qkv_bias),
                ("self_attn.o_proj", hidden, queries, attention_bias),
                ("mlp.gate_proj", inner, hidden, mlp_bias),
                ("mlp.up_proj", inner, hidden, mlp_bias),
                ("mlp.down_proj", hidden, inner, mlp_bias),
            ]
        for name, rows, columns, bias in linear:
            yield Tensor(f"{layer}.{name}.weight", (rows, columns))
            if bias:
                yield Tensor(f"{layer}.{name}.bias", (rows,))
        if family.qk_norm:
            yield Tensor(f"{layer}.self_attn.q_norm.weight", (head,))
            yield Tensor(f"{layer}.self_attn.k_norm.weight", (head,))
        for norm in family.norms:
            yield Tensor(f"{layer}.{norm}.weight", (hidden,))
    yield Tensor("model.norm.weight", (hidden,))
    if not is_tied(config):
        yield Tensor("lm_head.weight", (vocab, hidden))


def is_tied(config: dict[str, Any]) -> bool:
    key, family = "tie_word_embeddings", FAMILIES.get(str(config.get("model_type")))
    usual = family.tied if family else config.get("model_type") in ("gpt2", "gemma3")
    return bool(text_config_of(config).get(key, config.get(key, usual)))
