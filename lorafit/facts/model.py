"""What is known of a model: its tensors, configuration and tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from lorafit.errors import ModelError
from lorafit.families import family_of

Kind = Literal["folder", "gguf", "hub", "bundled"]


@dataclass(frozen=True)
class Tensor:
    """A weight.

    Attributes:
        name: as transformers has it, or as it is stored.
        shape: outermost first; a linear layer's is out x in.
        dtype: safetensors' name of the stored type, such as BF16; empty where nothing is stored.
        file: where it is stored.
        begin: its first byte in the file.
        end: the byte behind its last one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = ""
    file: Path = Path()
    begin: int = 0
    end: int = 0

    @property
    def size(self) -> int:
        """Numbers, not bytes."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first dimension."""
        return self.bytes // self.shape[0] if self.shape and self.shape[0] else self.bytes


@dataclass(frozen=True)
class TokenizerFacts:
    """What the tokenizer's files say; None where they say nothing.

    Attributes:
        sha256: of everything that shapes the tokens; None where the files are not all there.
    """

    eos_token: str | None = None
    pad_token: str | None = None
    bos_token: str | None = None
    chat_template: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it.

    Attributes:
        name: as the recipe has it.
        kind: where it comes from.
        source: the same for people, for the plan's reasons.
        config: config.json, or its like from a GGUF header.
        tensors: every stored weight, tied ones once. Empty if neither headers nor layout are known.
        tokenizer: None if its files can't be reached.
    """

    name: str
    kind: Kind
    source: str
    config: dict[str, Any]
    tensors: tuple[Tensor, ...]
    tokenizer: TokenizerFacts | None = None

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the configuration of a multimodal model."""
        return text_config_of(self.config)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def max_position_embeddings(self) -> int | None:
        return self._number("max_position_embeddings", "n_positions")

    @property
    def vocab_size(self) -> int | None:
        """Rows of the embedding; a tokenizer may know fewer tokens."""
        return self._number("vocab_size")

    @property
    def layers(self) -> int | None:
        return self._number("num_hidden_layers", "n_layer")

    @property
    def stored_quantization(self) -> str | None:
        """The method by which the stored weights are quantized, such as gptq; None if they are not."""
        stored = self.config.get("quantization_config")
        return str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None

    def _number(self, *keys: str) -> int | None:
        values = (self.text_config.get(key) for key in keys)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def linear(self) -> dict[str, Tensor]:
        """Linear layers that an adapter can go on, by module path, without the output head.

        Experts and routers are left out: transformers 5 keeps experts in fused parameters and
        routers in modules of their own, neither of them a linear layer. So are vision and audio.
        """
        return {module: tensor for module, tensor in self._matrices.items() if not _NOT_TEXT.search(module)}

    @cached_property
    def quantizable(self) -> dict[str, Tensor]:
        """The linear layers that bitsandbytes quantizes by default: those of vision and audio too.

        transformers replaces torch's own class only (integrations/bitsandbytes.py: replace_with_bnb_linear).
        """
        family = family_of(self.model_type)
        if not family.plain_linear:
            return {}
        ends = (tensor.name for tensor in self.tensors if "norm" in tensor.name or tensor.name.startswith("lm_head"))
        if not family.last_linear or any(ends):
            return self._matrices
        kept = f".layers.{(self.layers or 0) - 1}.{family.last_linear}"
        return {module: tensor for module, tensor in self._matrices.items() if not module.endswith(kept)}

    @cached_property
    def _matrices(self) -> dict[str, Tensor]:
        found = {}
        for tensor in self.tensors:
            module, _, leaf = tensor.name.rpartition(".")
            if leaf == "weight" and len(tensor.shape) == 2 and not _NOT_LINEAR.search(module):
                found[module] = tensor
        return found

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module that has a tensor, and every module that contains one, by path."""
        found: dict[str, None] = {}
        for tensor in self.tensors:
            parts = tensor.name.split(".")[:-1]
            found |= {".".join(parts[: depth + 1]): None for depth in range(len(parts))}
        return tuple(found)

    @cached_property
    def is_moe(self) -> bool:
        return any(re.search(r"\.(experts|block_sparse_moe)\.", tensor.name) for tensor in self.tensors)


_NOT_LINEAR = re.compile(
    r"(^|\.)(lm_head|embed_out|output|embed_tokens|embed_in|wte|wpe|word_embeddings|embed_positions|shared)$"
    r"|norm|\.experts(\.|$)|(mlp|block_sparse_moe|feed_forward)\.(gate|router)(\.layer)?$"
    r"|embed|rotary|(^|\.)vision_tower\.head\.attention\."
)
_NOT_TEXT = re.compile(r"(^|\.)(vision|visual|audio)")


_SIZES = {
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
}
_SIZES |= dict.fromkeys(
    ("hidden_size", "n_embd", "vocab_size", "intermediate_size", "n_inner", "num_attention_heads", "n_head"), 2**31 - 1
)
_SIZES |= dict.fromkeys(
    ("num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions", "moe_intermediate_size"), 2**31 - 1
)
"""Sizes that a configuration may have, and the most that each can be."""
_AT_LEAST_ONE = ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size")


def check_sizes(name: str, config: dict[str, Any]) -> None:
    """Raises ModelError for a size that no model has. What is no number, such as a list, is the family's own."""
    for part in (config, text_config_of(config)):
        for key, most in _SIZES.items():
            value = part.get(key)
            least = int(key in _AT_LEAST_ONE)
            if isinstance(value, float) or (isinstance(value, int) and not least <= value <= most):
                raise ModelError(f"{name}: the configuration can't be right: {key} is {str(value)[:30]}")


def text_config_of(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config
