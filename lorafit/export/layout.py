"""What a GGUF file says of a model: from config.json to metadata and tensor names, for the families that are known.

Names and meanings are those of llama.cpp's GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and
the constants of the package gguf).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorafit.errors import ModelError
from lorafit.export.vocabulary import refused
from lorafit.facts import Tensor, layout
from lorafit.families import FAMILIES, family_of

Value = bool | int | float | str
Rows = npt.NDArray[np.float32]
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Stored types that can be read: plain floats of 16 or 32 bits."""

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


@dataclass(frozen=True)
class Placed:
    """A tensor with its GGUF name.

    Attributes:
        heads: heads whose rows change their order (llama.cpp rotates neighbours, transformers rotates halves); 0
            keeps the order.
    """

    name: str
    tensor: Tensor
    heads: int = 0


@dataclass(frozen=True)
class Layout:
    """A model as GGUF has it.

    Attributes:
        architecture: GGUF's name of it.
        metadata: keys without the architecture's prefix. Lengths and counts are in tokens, heads, layers, numbers.
        tensors: in the order of the file.
        rope_factors: (head size / 2,) divisors of the rotary frequencies, where the model scales them one by one.
        vocabulary: rows of the embeddings.
    """

    architecture: str
    metadata: dict[str, Value]
    tensors: tuple[Placed, ...]
    rope_factors: Rows | None
    vocabulary: int


def make_layout(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Layout:
    """Metadata and tensor names of a model; what isn't known exactly raises a ModelError that names it."""
    metadata = check_architecture(folder, config)
    placed = _place(folder, config, tensors, int(metadata["block_count"]))
    _check_shapes(folder, metadata, placed)
    written = family_of(str(config["model_type"])).gguf.written
    return Layout(written, metadata, placed, _rope_factors(folder, config), int(metadata["vocab_size"]))


def check_architecture(folder: Path, config: dict[str, Any]) -> dict[str, Value]:
    """The metadata of a model by its configuration. Raises ModelError for what isn't known exactly."""
    model_type = config.get("model_type")
    family = family_of(str(model_type)).gguf
    if not family.written:
        known = ", ".join(name for name, entry in FAMILIES.items() if entry.gguf.written)
        raise refused(folder, f"the architecture is {model_type!r} (known: {known})")
    classes = config.get("architectures") or [family.written_class]
    if classes != [family.written_class]:
        raise refused(folder, f"the model is a {classes[0]}")
    if config.get("quantization_config"):
        raise ModelError(f"{folder}: the weights are quantized; export a model that is merged into 16 or 32 bits")
    try:
        _check_config(folder, config)
        return {**_sizes(config), **_rope(folder, config)}
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: holds what can't be used: {error}") from None


def read_rows(tensor: Tensor, begin: int, end: int) -> Rows:
    """Rows `begin` to `end` (of a tensor with one dimension: its numbers), shape (end - begin, ...), in float32."""
    kind, inner = _TYPES[tensor.dtype], tensor.shape[1:]
    count = (end - begin) * math.prod(inner)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin + begin * math.prod(inner) * kind.itemsize)
        data = np.fromfile(stream, dtype=kind, count=count)
    if data.size != count:
        raise ModelError(f"{tensor.file}: the file is cut off at {tensor.name}; merge again")
    if tensor.dtype == "BF16":
        data = (data.astype(np.uint32) << 16).view(np.float32)
    rows: Rows = data.astype(np.float32, copy=False).reshape(end - begin, *inner)
    return rows


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, number by number."""
    if one.shape != other.shape:
        return False
    step = max(1, (16 << 20) // max(1, math.prod(one.shape[1:])))
    parts = ((at, min(at + step, one.shape[0])) for at in range(0, one.shape[0], step))
    return all(np.array_equal(read_rows(one, *part), read_rows(other, *part)) for part in parts)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise refused(folder, f"the activation is {config['hidden_act']!r}")
    slides = config.get("use_sliding_window", family_of(config["model_type"]).gguf.slides)
    window = config.get("sliding_window") if slides else None
    if (window and window < config.get("max_position_embeddings", 0)) or "sliding_attention" in (
        config.get("layer_types") or ()
    ):
        raise refused(folder, f"attention slides over a window of {window} tokens")
    rope = _rope_settings(config)
    if (config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1) != 1:
        raise refused(folder, "only a part of each head is rotated")


def _head_size(config: dict[str, Any]) -> int:
    given = config.get("head_dim")
    return int(given if given else config["hidden_size"] // config["num_attention_heads"])


def _sizes(config: dict[str, Any]) -> dict[str, Value]:
    heads, head_size = int(config["num_attention_heads"]), _head_size(config)
    return {
        "block_count": int(config["num_hidden_layers"]),
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": int(config["hidden_size"]),
        "feed_forward_length": int(config["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.key_length": head_size,
        "attention.value_length": head_size,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_size,
        "vocab_size": int(config["vocab_size"]),
    }


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in one form: transformers 5 has them in rope_parameters, older files in two places.

    A rope_scaling beside rope_parameters replaces it, as transformers has it.
    """
    settings = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    settings.setdefault("rope_type", settings.get("type", "default"))
    return settings


def _rope(folder: Path, config: dict[str, Any]) -> dict[str, Value]:
    settings = _rope_settings(config)
    kind = settings["rope_type"]
    metadata: dict[str, Value] = {"rope.freq_base": float(settings["rope_theta"])}
    if kind in ("default", "llama3"):
        return metadata
    if kind == "linear":
        return metadata | {"rope.scaling.type": "linear", "rope.scaling.factor": float(settings["factor"])}
    if kind != "yarn":
        raise refused(folder, f"the rotary positions are scaled by {kind!r}")
    factor = float(settings["factor"])
    usual = {
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
        "mscale": None,
        "mscale_all_dim": None,
        "attention_factor": 0.1 * math.log(factor) + 1 if factor > 1 else 1.0,
    }
    for name, value in usual.items():
        given = settings.get(name)
        if given is not None and (value is None or not math.isclose(given, value, rel_tol=1e-6)):
            raise refused(folder, f"YaRN's {name} is {given}")
    original = settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return metadata | {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(original),
    }


def _rope_factors(folder: Path, config: dict[str, Any]) -> Rows | None:
    """The divisors by which Llama 3.1 lengthens slow rotations (defined in transformers' modeling_rope_utils).

    Wavelengths below `original / high_freq_factor` tokens are kept, those above `original / low_freq_factor` are
    multiplied by `factor`, and between them frequencies are mixed linearly.
    """
    settings = _rope_settings(config)
    if settings["rope_type"] != "llama3":
        return None
    try:
        factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = float(settings["original_max_position_embeddings"])
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: {error.args[0]} is missing from the llama3 rope scaling") from None
    size = _head_size(config)
    wavelengths = 2 * np.pi * float(settings["rope_theta"]) ** (np.arange(0, size, 2, dtype=np.float64) / size)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)


def _place(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], layers: int) -> tuple[Placed, ...]:
    """Every tensor with its GGUF name, none missing and none left over."""
    wanted = {tensor.name for tensor in layout(config)}
    queries = int(config["num_attention_heads"])
    permuted = {"attn_q": queries, "attn_k": int(config.get("num_key_value_heads") or queries)}
    if family_of(config["model_type"]).gguf.written != "llama":
        permuted = {}
    left = dict(tensors)
    placed: list[Placed] = []

    def take(name: str, gguf_name: str, heads: int = 0, needed: bool = True) -> None:
        tensor = left.pop(name, None)
        if tensor is not None:
            placed.append(Placed(gguf_name, tensor, heads))
        elif needed:
            raise ModelError(f"{folder}: the tensor {name} is missing; merge again")

    take("model.embed_tokens.weight", "token_embd.weight")
    for layer in range(layers):
        for module, gguf_name in _BLOCK.items():
            for part in ("weight", "bias"):
                name = f"model.layers.{layer}.{module}.{part}"
                if name in wanted:
                    take(name, f"blk.{layer}.{gguf_name}.{part}", permuted.get(gguf_name, 0))
    take("model.norm.weight", "output_norm.weight")
    if not config.get("tie_word_embeddings", False):
        take("lm_head.weight", "output.weight")
    elif (head := left.get("lm_head.weight")) is not None:
        if not _same_numbers(head, tensors["model.embed_tokens.weight"]):
            raise refused(folder, "the output head differs from the embeddings to which config.json ties it")
        del left["lm_head.weight"]
    if left:
        raise refused(folder, f"{len(left)} tensors have no place, first {min(left)}")
    for entry in placed:
        if entry.tensor.dtype not in _TYPES:
            raise ModelError(
                f"{folder}: {entry.tensor.name} is stored as {entry.tensor.dtype}; merge into 16 or 32 bits first"
            )
    return tuple(placed)


def _check_shapes(folder: Path, sizes: dict[str, Value], placed: tuple[Placed, ...]) -> None:
    """Sizes in the configuration and in the tensors must be the same, for readers take them from the former."""
    wide, tall = int(sizes["embedding_length"]), int(sizes["feed_forward_length"])
    queries = int(sizes["attention.head_count"]) * int(sizes["attention.key_length"])
    keys = int(sizes["attention.head_count_kv"]) * int(sizes["attention.key_length"])
    vocabulary = int(sizes["vocab_size"])
    shapes = {
        "token_embd": (vocabulary, wide),
        "output": (vocabulary, wide),
        "attn_q": (queries, wide),
        "attn_k": (keys, wide),
        "attn_v": (keys, wide),
        "attn_output": (wide, queries),
        "ffn_gate": (tall, wide),
        "ffn_up": (tall, wide),
        "ffn_down": (wide, tall),
        "attn_q_norm": (int(sizes["attention.key_length"]),),
        "attn_k_norm": (int(sizes["attention.key_length"]),),
    }
    for entry in placed:
        *_, role, part = entry.name.split(".")
        wanted = shapes.get(role, (wide,))
        if part == "bias":
            wanted = wanted[:1]
        if entry.tensor.shape != wanted:
            raise ModelError(
                f"{folder}: {entry.tensor.name} has the shape {entry.tensor.shape}, "
                f"config.json means {wanted}; merge again"
            )
