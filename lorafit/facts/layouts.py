"""The tensors of a decoder, by its family's layout in transformers, or as they are stored."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError
from lorafit.facts.model import Tensor, text_config_of
from lorafit.families import Family, family_of


def layout(config: dict[str, Any]) -> list[Tensor]:
    """The tensors of a decoder by its family's layout in transformers; empty for other families."""
    model_type = str(config.get("model_type"))
    family = family_of(model_type)
    try:
        if family.vision:
            return list(_towers(config, family.vision, family))
        if family.text:
            return list(_decoder(_part(config, "text_config"), family_of(family.text)))
        return list(_decoder(config, family)) if family.layer else []
    except KeyError as error:
        raise ModelError(f"the configuration of a {model_type} model has no {error}") from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"the configuration of a {model_type} model can't be right: {error}") from None


_OTHER_KEYS = {
    "hidden_size": ("n_embd", "n_embed"),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "num_hidden_layers": ("n_layer",),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "max_position_embeddings": ("n_positions",),
}
"""Other names of a key, by which some families' config.json has it."""
_MOST_MODULES = 1 << 14


class _Sizes:
    """The lengths and conditions that a family's lines name."""

    def __init__(self, config: dict[str, Any], family: Family, tied: bool) -> None:
        self._known = dict(family.defaults) | config
        for key, others in _OTHER_KEYS.items():
            found = [other for other in (key, *others) if other in config]
            if found:
                self._known[key] = config[found[0]]
        self._known |= {"yes": True, "tie_word_embeddings": tied}
        self._derive(str(config.get("model_type")))

    def _derive(self, model_type: str) -> None:
        known = self._known
        hidden, heads = self["hidden_size"], self["num_attention_heads"]
        known["whole_head"] = hidden // heads
        known["head_dim"] = known.get("head_dim") or known["whole_head"]
        known["num_key_value_heads"] = known.get("num_key_value_heads") or heads
        match model_type:
            case "falcon":
                self._derive_falcon()
            case "gpt2" | "bloom":
                known["intermediate_size"] = known.get("intermediate_size") or 4 * hidden
            case "opt":
                known["word_embed_proj_dim"] = known.get("word_embed_proj_dim") or hidden
                known["projected"] = known["word_embed_proj_dim"] != hidden
                known["last_norm"] = known["do_layer_norm_before"] and not known.get("_remove_final_layer_norm")
            case "deepseek_v2" | "deepseek_v3":
                known["qk_head_dim"] = self["qk_nope_head_dim"] + self["qk_rope_head_dim"]
            case "siglip_vision_model":
                known["patches"] = self["image_size"] // self["patch_size"]
            case "stablelm" | "gpt_neox":
                known["head_dim"] = known["whole_head"]
        known["queries"] = heads * self["head_dim"]
        known["keys"] = self["num_key_value_heads"] * self["head_dim"]

    def _derive_falcon(self) -> None:
        known = self._known
        new = known.get("new_decoder_architecture")
        known["head_dim"] = known["whole_head"]
        known["intermediate_size"] = known.get("intermediate_size") or 4 * self["hidden_size"]
        if not new:
            known["num_key_value_heads"] = 1 if known["multi_query"] else self["num_attention_heads"]
        norms = known.get("num_ln_in_parallel_attn") or (2 if new else 1)
        known["two_norms"] = known["parallel_attn"] and norms == 2

    def __getitem__(self, key: str) -> int:
        value = int(key) if key.isdigit() else self._known[key]
        if not isinstance(value, int) or not 0 < value < 1 << 32:
            raise ValueError(f"{str(value)[:40]} is no size")
        return value

    def count(self, key: str) -> int:
        """How many modules: what would never end is nonsense too."""
        if self[key] > _MOST_MODULES:
            raise ValueError(f"{self[key]} is no number of {key.removeprefix('num_')}")
        return self[key]

    def shape(self, sizes: str) -> tuple[int, ...]:
        return tuple(
            sum(prod(self[key] for key in term.split("*")) for term in size.split("+")) for size in sizes.split(",")
        )

    def holds(self, condition: str) -> bool:
        key = condition.removeprefix("!")
        return bool(self._known.get(key)) is not condition.startswith("!")

    def enter(self, layer: int) -> None:
        """Sets the conditions that differ from layer to layer."""
        known = self._known
        known["sparse"] = (
            layer >= (known.get("first_k_dense_replace") or 0)
            and layer not in (known.get("mlp_only_layers") or ())
            and (layer + 1) % known.get("decoder_sparse_step", 1) == 0
        )
        if "full_attention_interval" in known:
            kinds = known.get("layer_types")
            known["linear"] = (
                kinds[layer] == "linear_attention" if kinds else (layer + 1) % known["full_attention_interval"] != 0
            )


@cache
def _lines(text: str) -> tuple[tuple[str, str, str, tuple[str, ...]], ...]:
    """Name, sizes, the bias's condition and the line's conditions."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, sizes, *rest = line.split()
        bias = next((word[1:] for word in rest if word[0] == "+"), "")
        found.append((name, sizes, bias, tuple(word[1:] for word in rest if word[0] == "?")))
    return tuple(found)


def _tensors(text: str, prefix: str, sizes: _Sizes) -> Iterator[Tensor]:
    for name, shape_text, bias, conditions in _lines(text):
        if not all(map(sizes.holds, conditions)):
            continue
        shape = sizes.shape(shape_text)
        if name[0] == "=":
            yield Tensor(prefix + name[1:], shape)
            continue
        module, _, count = name.rstrip("]").partition("[")
        numbers = [f".{index}" for index in range(sizes.count(count))] if count else [""]
        for path in (f"{prefix}{module}{number}" for number in numbers):
            yield Tensor(f"{path}.weight", shape)
            if bias and sizes.holds(bias):
                yield Tensor(f"{path}.bias", shape[:1])


def _part(config: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(config[key], dict):
        raise TypeError(f"{key} is no object")
    return dict(config[key])


def _towers(config: dict[str, Any], sees: Family, reads: Family) -> Iterator[Tensor]:
    vision, text = _part(config, "vision_config"), _part(config, "text_config")
    more = {"model_type": "siglip_vision_model", "text_hidden_size": text["hidden_size"]}
    yield from _decoder(vision | more, sees)
    yield from _decoder(text | {"tie_word_embeddings": is_tied(config)}, reads)


def _decoder(config: dict[str, Any], family: Family) -> Iterator[Tensor]:
    sizes = _Sizes(config, family, is_tied(config))
    yield from _tensors(family.before, "", sizes)
    for index in range(sizes.count("num_hidden_layers")):
        sizes.enter(index)
        yield from _tensors(family.layer, f"{family.layers}.{index}.", sizes)
    yield from _tensors(family.after, "", sizes)


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the output head is the embeddings. The configuration of the loaded class says so, not a part's."""
    key, family = "tie_word_embeddings", family_of(str(config.get("model_type")))
    if family.text:
        config = text_config_of(config)
    if key in config:
        return bool(config[key])
    if family.layer and not family.vision:
        return bool(family.defaults.get(key, False))
    return family.vision is not None or bool(text_config_of(config).get(key, False))


_EXPERT = re.compile(r"\.experts\.\d+\.(?:(gate_proj|up_proj|w1|w3)|down_proj|w2)\.weight$")
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias)$")


def as_loaded(config: dict[str, Any], stored: list[Tensor]) -> tuple[Tensor, ...]:
    """Stored tensors as the loaded model has them as parameters, in the order of the stored ones.

    Files may have other names than transformers' modules, experts one by one that are fused as they are loaded, layers
    stored in x out, tied heads, buffers, and layers that are not loaded. So where every tensor of the family's layout
    is stored, they are these; else (such as in a model with layers of its own) they are the stored ones but for tied
    heads and buffers. Raises ModelError for those of another family's model.
    """
    family = family_of(str(config.get("model_type")))
    try:
        wanted = {tensor.name: tensor for tensor in layout(config)}
    except ModelError:
        wanted = {}
    found: dict[str, Tensor] = {}
    sizes: Counter[str] = Counter()
    for tensor in stored:
        if name := next((name for name in _loaded_names(tensor.name, family) if name in wanted), None):
            found.setdefault(name, replace(wanted[name], dtype=tensor.dtype))
            sizes[name] += tensor.size
    if wanted and sizes == {name: tensor.size for name, tensor in wanted.items()}:
        return tuple(found.values())
    embedding = next((name for name in wanted if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and embedding not in found:
        raise ModelError(
            f"the safetensors files are not those of a {config['model_type']} model: they lack {embedding}"
        )
    tied = is_tied(config)
    return tuple(
        replace(tensor, file=Path(), begin=0, end=0)
        for tensor in stored
        if not _BUFFER.search(tensor.name) and not (tied and tensor.name.endswith("lm_head.weight"))
    )


def _loaded_names(name: str, family: Family) -> Iterator[str]:
    """What a stored tensor may be called in the loaded model."""
    yield name
    renamed = [name, *(name.replace(old, new, 1) for old, new in family.stored.items() if old in name)]
    yield from renamed
    for other in renamed:
        yield _EXPERT.sub(lambda match: f".experts.{'gate_up_proj' if match[1] else 'down_proj'}", other)
