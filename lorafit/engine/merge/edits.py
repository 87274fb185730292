"""What an adapter does to one parameter, computed with PEFT's own layers; several adapters as one change."""

from __future__ import annotations

import contextlib
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils import merge_utils
from torch import nn

from lorafit.options import Combine

ADAPTER = "default"
SAMPLED = 32
"""Rows of each chunk that are computed a second time, and in which the loss by rounding is measured."""


class Edit(ABC):
    """A change of one parameter. Weights are float32."""

    must_change: bool
    """Whether an edit that changes nothing is a mistake."""

    @property
    def fewest_rows(self) -> int | None:
        """The fewest rows of a weight that it can be applied to at a time; None: only to all at once."""
        return 1

    @property
    def copies(self) -> int:
        """How many copies of the weight in float32 it needs beside the weight itself."""
        return 1

    @abstractmethod
    def apply(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        """The changed weight. May reuse the one that is given."""

    def delta(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        """What it adds to a weight, which is left as it is."""
        return self.apply(weight, rows) - weight


@dataclass
class LayerEdit(Edit):
    """LoRA, rsLoRA or DoRA on a linear layer, an embedding, or a bare parameter (experts)."""

    layer: Any
    must_change: bool = True

    @property
    def is_dora(self) -> bool:
        return ADAPTER in self.layer.lora_variant

    @property
    def fewest_rows(self) -> int | None:
        if isinstance(self.layer, ParamWrapper):
            return 2 if self.layer.num_experts > 1 else None  # PEFT takes a single expert for a plain matrix
        by_columns = self.is_dora if isinstance(self.layer, Embedding) else self.layer.fan_in_fan_out
        return None if by_columns else 1

    @property
    def copies(self) -> int:
        return 4 if self.is_dora else 2

    @property
    def name(self) -> str:
        return self.layer.parameter_name if isinstance(self.layer, ParamWrapper) else "weight"

    def apply(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        with self._given(weight, rows) as base:
            self.layer.merge(safe_merge=False, adapter_names=[ADAPTER])
            return getattr(base, self.name).data

    def delta(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        if self.is_dora:
            return self.apply(weight.clone(), rows).sub_(weight)
        with self._given(weight, rows):
            return self.layer.get_delta_weight(ADAPTER)

    def gap(self, before: torch.Tensor, after: torch.Tensor, rows: slice | None = None) -> float:
        """How far some merged rows are from what the adapter's definition gives, relative to their norm."""
        count, start = len(before), rows.start if rows else 0
        chosen = torch.linspace(0, count - 1, min(SAMPLED, count)).long().unique()
        if isinstance(self.layer, ParamWrapper):
            chosen = chosen[:2]
        if self.is_dora and self.fewest_rows is None:  # its norms are over all rows
            expected = self._defined(before.float(), slice(0, count))[chosen]
        else:
            expected = self._defined(before[chosen].float(), start + chosen)
        off = torch.linalg.vector_norm(after[chosen] - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-30)
        return float(off)

    def _defined(self, weight: torch.Tensor, rows: Any) -> torch.Tensor:
        """Some rows of W + s BA (arXiv:2106.09685), or of DoRA's m (W + s BA) / ‖W + s BA‖ (arXiv:2402.09353)."""
        layer, scale = self.layer, self.layer.scaling[ADAPTER]
        if isinstance(layer, Embedding):
            a, b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
            moved = weight + scale * (a[:, rows].T @ b.T)
            dim = 0
        elif isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            a = layer.lora_A[ADAPTER].weight.view(layer.num_experts, -1, layer.lora_A[ADAPTER].weight.shape[1])[rows]
            b = layer.lora_B[ADAPTER].weight
            b = b.view(len(b), -1, layer.num_experts)[:, :, rows].permute(2, 0, 1)
            product = b @ a
            return weight + scale * (product if layer._did_swap_in_out_features else product.transpose(1, 2))
        else:
            a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            if layer.fan_in_fan_out:
                moved, dim = weight + scale * (a[:, rows].T @ b.T), 0
            else:
                moved, dim = weight + scale * (b[rows] @ a), 1
        if not self.is_dora:
            return moved
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight
        magnitude = magnitude[rows] if dim == 1 else magnitude
        return moved * (magnitude / torch.linalg.vector_norm(moved, dim=dim)).unsqueeze(dim)

    @contextlib.contextmanager
    def _given(self, weight: torch.Tensor, rows: slice | None) -> Iterator[nn.Module]:
        """The base layer with a real weight in it, and the adapter cut to its rows."""
        layer, base = self.layer, self.layer.get_base_layer()
        held: list[tuple[Any, str, Any]] = []

        def swap(owner: Any, name: str, value: Any) -> None:
            held.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

        def cut(owner: Any, name: str, value: torch.Tensor) -> None:
            swap(owner, name, nn.Parameter(value, requires_grad=False))

        swap(base, self.name, nn.Parameter(weight, requires_grad=False))
        swap(layer, "lora_bias", layer.lora_bias | {ADAPTER: False})  # an edit of its own
        try:
            if rows is not None and isinstance(layer, Embedding):
                cut(layer.lora_embedding_A, ADAPTER, layer.lora_embedding_A[ADAPTER][:, rows])
            elif rows is not None and isinstance(layer, ParamWrapper):
                a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
                experts, width = layer.num_experts, len(b.weight)
                cut(a, "weight", a.weight.view(experts, -1, a.weight.shape[1])[rows].flatten(0, 1))
                cut(b, "weight", b.weight.view(width, -1, experts)[:, :, rows].reshape(width, -1))
                swap(layer, "num_experts", rows.stop - rows.start)
            elif rows is not None:
                cut(layer.lora_B[ADAPTER], "weight", layer.lora_B[ADAPTER].weight[rows])
                if self.is_dora:
                    magnitude = layer.lora_magnitude_vector[ADAPTER]
                    cut(magnitude, "weight", magnitude.weight[rows])
            with torch.no_grad():
                yield base
        finally:
            for owner, name, value in reversed(held):
                setattr(owner, name, value)
            layer.merged_adapters.clear()
            layer._caches.clear()


@dataclass
class BiasEdit(Edit):
    """The bias of a LoRA layer's B, added to the base layer's bias."""

    layer: Any
    must_change: bool = False

    @property
    def fewest_rows(self) -> int | None:
        return None

    def apply(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        return weight + self.delta(weight)

    def delta(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        return self.layer.lora_B[ADAPTER].bias.detach().float() * self.layer.scaling[ADAPTER]


@dataclass
class Replacement(Edit):
    """A parameter that was trained in full and is saved with the adapter.

    Attributes:
        must_change: true of modules_to_save; PEFT also saves embeddings that it only has to keep.
    """

    value: torch.Tensor
    must_change: bool

    def apply(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        return (self.value if rows is None else self.value[rows]).to(torch.float32, copy=True)


@dataclass
class TokensEdit(Edit):
    """Rows of an embedding that were trained (PEFT's trainable tokens)."""

    indices: torch.Tensor
    values: torch.Tensor
    must_change: bool = True

    def apply(self, weight: torch.Tensor, rows: slice | None = None) -> torch.Tensor:
        start, stop = (rows.start, rows.stop) if rows else (0, len(weight))
        inside = (self.indices >= start) & (self.indices < stop)
        return weight.index_copy(0, self.indices[inside] - start, self.values[inside].float())


def edit_of(layer: Any) -> LayerEdit | None:
    """The edit of a PEFT layer; None for kinds that are not computed one by one."""
    plain = isinstance(layer, (Linear, Embedding, ParamWrapper)) and type(layer).__module__ == Linear.__module__
    variant = layer.lora_variant.get(ADAPTER) if plain else None
    known = variant is None or isinstance(variant, (DoraLinearVariant, DoraEmbeddingVariant))
    return LayerEdit(layer) if plain and known else None


@dataclass(frozen=True)
class Combination:
    """How deltas are combined.

    Attributes:
        density: share of each delta that is kept, by the methods that prune.
        seed: that decides what DARE drops.
    """

    method: Combine = "linear"
    density: float | None = None
    seed: int = 0

    @property
    def by_rows(self) -> bool:
        """Whether some rows of a weight can be combined without the others."""
        return self.method == "linear"

    def __call__(self, parameter: str, deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        """One delta of many, each of the same shape, float32."""
        if self.method == "linear":
            total = torch.zeros_like(deltas[0])
            for delta, weight in zip(deltas, weights, strict=True):
                total.add_(delta, alpha=weight)
            return total
        assert self.density is not None
        factors = torch.tensor(weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.seed} {parameter}".encode()))  # torch looks at 32 bits only
            made: torch.Tensor = getattr(merge_utils, self.method)(deltas, factors, self.density)
        return made
