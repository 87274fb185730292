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
from lorafit.facts.layouts import is_tied
from lorafit.families import FAMILIES, Family, Gguf, family_of

Value = bool | int | float | str
Rows = npt.NDArray[np.float32]
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Stored types that can be read: plain floats of 16 or 32 bits."""

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
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
        shift: what is added to every number.
    """

    name: str
    tensor: Tensor
    heads: int = 0
    shift: float = 0.0


@dataclass(frozen=True)
class Layout:
    """A model as GGUF has it.

    Attributes:
        architecture: GGUF's name of it.
        metadata: keys without the architecture's prefix. Lengths and counts are in tokens, heads, layers, numbers.
        tensors: in the order of the file.
        rope_factors: (rotated size / 2,) divisors of the rotary frequencies by their tensor's name, where the model
            scales them one by one.
        vocabulary: rows of the embeddings.
    """

    architecture: str
    metadata: dict[str, Value]
    tensors: tuple[Placed, ...]
    rope_factors: dict[str, Rows]
    vocabulary: int


def make_layout(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Layout:
    """Metadata and tensor names of a model; what isn't known exactly raises a ModelError that names it."""
    metadata = check_architecture(folder, config)
    family = family_of(str(config["model_type"]))
    placed = _place(folder, config, family, tensors)
    factors = _rope_factors(folder, language(config))
    return Layout(family.gguf.written, metadata, placed, factors, int(metadata["vocab_size"]))


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
        part = language(config)
        _check_config(folder, part, family)
        return {**_sizes(part), **_figures(part, family), **_rope(folder, part, family)}
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: holds what can't be used: {error}") from None


def language(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model, with what its class has where config.json says nothing."""
    family = family_of(str(config["model_type"]))
    part = dict(config["text_config"]) if family.vision else config
    return {**family.defaults, **part, "tie_word_embeddings": is_tied(config)}


def remarks(config: dict[str, Any]) -> list[str]:
    """What the user should know of how a model that can be written is run from a GGUF file."""
    family, part = family_of(str(config["model_type"])), language(config)
    said = []
    if family.vision:
        said.append("GGUF: the language model alone is written; what sees is left out")
    window = part.get("sliding_window")
    if family.gguf.runs_windowless and window and window < part["max_position_embeddings"]:
        said.append(
            f"GGUF: llama.cpp runs {family.gguf.written} without its sliding window of {window:,} tokens, so it "
            "answers longer texts in another way than this model"
        )
    return said


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


def _check_config(folder: Path, config: dict[str, Any], family: Gguf) -> None:
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if {"swish": "silu"}.get(activation, activation) != family.activation:
        raise refused(folder, f"the activation is {activation!r}")
    for key in family.refused:
        if config.get(key):
            raise refused(folder, f"{key} is {config[key]}")
    heads, head_size, width = int(config["num_attention_heads"]), _head_size(config), int(config["hidden_size"])
    if family.square and heads * head_size != width:
        raise refused(folder, f"{heads} heads of {head_size} are not as wide as the model, {width}")
    if family.large and config["query_pre_attn_scalar"] != query_scale(config):
        raise refused(
            folder, f"query_pre_attn_scalar is {config['query_pre_attn_scalar']} and not {query_scale(config)}"
        )
    if family.head in ("own", "tied") and config["tie_word_embeddings"] != (family.head == "tied"):
        raise refused(folder, f"{family.written} files have {'no' if family.head == 'tied' else 'an'} output head")
    _check_window(folder, config, family)
    if _rotated(config) != head_size and "partial" not in family.rope:
        raise refused(folder, "only a part of each head is rotated")


def _check_window(folder: Path, config: dict[str, Any], family: Gguf) -> None:
    layers = int(config["num_hidden_layers"])
    if family.period:
        usual = [
            "full_attention" if (index + 1) % family.period == 0 else "sliding_attention" for index in range(layers)
        ]
        pattern = config.get("sliding_window_pattern") or family.period
        if (config.get("layer_types") or usual) != usual or pattern != family.period:
            raise refused(folder, f"other layers slide than all but every {family.period}th")
        return
    window = config.get("sliding_window") if config.get("use_sliding_window", family.slides) else None
    slides = window and window < config.get("max_position_embeddings", 0)
    if not family.runs_windowless and (slides or "sliding_attention" in (config.get("layer_types") or ())):
        raise refused(folder, f"attention slides over a window of {window} tokens")


def _head_size(config: dict[str, Any]) -> int:
    given = config.get("head_dim")
    return int(given if given else config["hidden_size"] // config["num_attention_heads"])


def query_scale(config: dict[str, Any]) -> int:
    """What llama.cpp takes for query_pre_attn_scalar, of which GGUF says nothing."""
    if config["num_hidden_layers"] == family_of(str(config["model_type"])).gguf.large:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return _head_size(config)


def _rotated(config: dict[str, Any]) -> int:
    """Numbers of each head that are rotated."""
    part = config.get("partial_rotary_factor") or _rope_settings(config).get("partial_rotary_factor") or 1
    return int(_head_size(config) * part)


def _figures(config: dict[str, Any], family: Gguf) -> dict[str, Value]:
    """What one family has and others don't."""
    found: dict[str, Value] = {name: float(config[key]) for key, name in family.figures.items()}
    if family.period or family.runs_windowless:
        found["attention.sliding_window"] = int(config.get("sliding_window") or 0)
    return found


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
        "rope.dimension_count": _rotated(config),
        "vocab_size": int(config["vocab_size"]),
    }


def _rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in one form: transformers 5 has them in rope_parameters, older files in two places.

    A rope_scaling beside rope_parameters replaces it, as transformers has it. Where sliding layers have their own,
    these are the others'.
    """
    given = config.get("rope_parameters") or {}
    settings = dict(config.get("rope_scaling") or given.get("full_attention") or given)
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    settings.setdefault("rope_type", settings.get("type", "default"))
    return settings


def _local_base(config: dict[str, Any]) -> float:
    """The base of the rotations in sliding layers; 0 where they are scaled."""
    given = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if given.get("rope_type", "default") != "default":
        return 0.0
    return float(given.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)


def _rope(folder: Path, config: dict[str, Any], family: Gguf) -> dict[str, Value]:
    settings = _rope_settings(config)
    kind = settings["rope_type"]
    metadata: dict[str, Value] = {"rope.freq_base": float(settings["rope_theta"])}
    if family.local_base and _local_base(config) != family.local_base:
        raise refused(folder, f"sliding layers don't rotate by the base {family.local_base:g}")
    if kind in ("default", "llama3"):
        return metadata
    if kind in family.rope:
        return metadata | _long(folder, config, settings)
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


def _long(folder: Path, config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Value]:
    """LongRoPE's figures, as transformers' modeling_rope_utils has them; its factors are tensors."""
    longest = int(config["max_position_embeddings"])
    original = int(config.get("original_max_position_embeddings") or settings["original_max_position_embeddings"])
    factor = settings.get("factor") or longest / original
    attention = settings.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": float(attention)}


def _rope_factors(folder: Path, config: dict[str, Any]) -> dict[str, Rows]:
    """LongRoPE's divisors, or those by which Llama 3.1 lengthens slow rotations (transformers' modeling_rope_utils).

    Of the latter, wavelengths below `original / high_freq_factor` tokens are kept, those above
    `original / low_freq_factor` are multiplied by `factor`, and between them frequencies are mixed linearly.
    """
    settings = _rope_settings(config)
    if settings["rope_type"] == "longrope":
        try:
            factors = {name: np.array(settings[f"{name}_factor"], dtype=np.float32) for name in ("long", "short")}
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder / 'config.json'}: the longrope scaling has no usable factors: {error}") from None
        if any(each.shape != (_rotated(config) // 2,) for each in factors.values()):
            raise ModelError(f"{folder / 'config.json'}: longrope needs a factor for each of {_rotated(config) // 2}")
        return {f"rope_factors_{name}.weight": each for name, each in factors.items()}
    if settings["rope_type"] != "llama3":
        return {}
    try:
        factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = float(settings["original_max_position_embeddings"])
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: {error.args[0]} is missing from the llama3 rope scaling") from None
    size = _head_size(config)
    wavelengths = 2 * np.pi * float(settings["rope_theta"]) ** (np.arange(0, size, 2, dtype=np.float64) / size)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / (kept + (1 - kept) / factor)).astype(np.float32)}


_BESIDE = ("model.vision_tower.", "model.multi_modal_projector.")
"""What a multimodal model has beside the language model."""


def _place(folder: Path, config: dict[str, Any], family: Family, tensors: dict[str, Tensor]) -> tuple[Placed, ...]:
    """Every tensor of the language model with its GGUF name, none missing, none left over, all of the right shape."""
    gguf, part = family.gguf, language(config)
    wanted = {tensor.name: tensor.shape for tensor in layout(config) if not tensor.name.startswith(_BESIDE)}
    if biased := next((name for name in wanted if name.endswith(".bias") and not gguf.biases), None):
        raise refused(folder, f"it has the bias {biased}")
    queries = int(part["num_attention_heads"])
    permuted = {"attn_q": queries, "attn_k": int(part.get("num_key_value_heads") or queries)} if gguf.neighbours else {}
    named = ((loaded_name(name, family), tensor) for name, tensor in tensors.items())
    left = {name: tensor for name, tensor in named if not name.startswith(_BESIDE)}
    placed: list[Placed] = []

    def take(name: str, gguf_name: str) -> None:
        tensor = left.pop(name, None)
        if tensor is None:
            raise ModelError(f"{folder}: the tensor {name} is missing; merge again")
        if tensor.shape != wanted[name]:
            raise ModelError(
                f"{folder}: {name} has the shape {tensor.shape}, config.json means {wanted[name]}; merge again"
            )
        heads = permuted.get(gguf_name.split(".")[-2], 0)
        placed.append(Placed(gguf_name, tensor, heads, gguf.norm_shift if len(tensor.shape) == 1 else 0.0))

    inside = family.layers.removesuffix(".layers")
    embeddings = f"{inside}.embed_tokens.weight"
    take(embeddings, "token_embd.weight")
    for layer in range(int(part["num_hidden_layers"])):
        begin = f"{family.layers}.{layer}."
        names = dict(_BLOCK)
        if f"{begin}post_feedforward_layernorm.weight" in wanted:
            names["post_attention_layernorm"] = "post_attention_norm"
        for module, gguf_name in names.items():
            for kind in ("weight", "bias"):
                if f"{begin}{module}.{kind}" in wanted:
                    take(f"{begin}{module}.{kind}", f"blk.{layer}.{gguf_name}.{kind}")
    take(f"{inside}.norm.weight", "output_norm.weight")
    if not part["tie_word_embeddings"]:
        take("lm_head.weight", "output.weight")
    elif (head := left.pop("lm_head.weight", None)) is not None and not _same_numbers(head, placed[0].tensor):
        raise refused(folder, "the output head differs from the embeddings to which config.json ties it")
    if left:
        raise refused(folder, f"{len(left)} tensors have no place, first {min(left)}")
    for entry in placed:
        if entry.tensor.dtype not in _TYPES:
            raise ModelError(
                f"{folder}: {entry.tensor.name} is stored as {entry.tensor.dtype}; merge into 16 or 32 bits first"
            )
    return tuple(placed)


def loaded_name(name: str, family: Family) -> str:
    """What a stored tensor is called in the loaded model."""
    return next((new + name.removeprefix(old) for old, new in family.stored.items() if name.startswith(old)), name)
