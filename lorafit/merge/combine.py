"""Several adapters as one change: weighted, pruned or voted on, over their full deltas.

On full deltas nothing depends on the adapters' ranks or kinds. The methods are PEFT's functions
(peft.utils.merge_utils): TIES (arXiv:2306.01708), DARE (arXiv:2311.03099), magnitude pruning.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from peft.utils import merge_utils

from lorafit.merge.options import Combine


@dataclass(frozen=True)
class Combination:
    """How deltas are combined.

    Attributes:
        density: share of each delta that is kept, by the methods that prune.
        seed: of what DARE drops.
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
