"""What the command line asks of a merge, checked before anything is loaded (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lorafit.errors import UsageError
from lorafit.files import claim
from lorafit.run.directory import RunDir, located

Method = Literal["auto", "stream", "full"]
BaseWeights = Literal["auto", "original", "dequantized"]
Verify = Literal["auto", "logits", "weights", "none"]
Combine = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["nf4", "fp4"]


@dataclass(frozen=True)
class Addition:
    """Another adapter, and the factor of its delta."""

    path: Path
    weight: float


@dataclass(frozen=True)
class Options:
    """A merge as it was asked for. None means: as the recipe's merge section has it, or its default."""

    path: Path
    output: Path | None = None
    method: Method = "auto"
    dtype: Dtype = "auto"
    base: str | None = None
    base_weights: BaseWeights | None = None
    allow_other_base: bool = False
    verify: Verify | None = None
    limits: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    additions: tuple[Addition, ...] = ()
    combine: Combine = "linear"
    density: float | None = None
    seed: int = 0
    as_adapter: bool = False
    rank: int | None = None
    quantize: Quantize | None = None
    exports: tuple[str, ...] = ()
    llama_cpp: Path | None = None
    push_to_hub: str | None = None
    private: bool = False
    overwrite: bool = False

    def destination(self) -> Path:
        """The folder to write: what --output says, or merged/ (merged-adapter/) in the run. Raises UsageError."""
        if self.output is not None:
            return located(self.output)
        run = RunDir(located(self.path))
        if run.path.name == "adapter" and RunDir(run.path.parent).is_run:
            run = RunDir(run.path.parent)
        if not run.is_run and (run.path / "adapter_config.json").is_file():
            raise UsageError(f"{run.path}: is not a run, so say with --output where the result goes")
        return run.path / "merged-adapter" if self.as_adapter else run.merged

    def places(self) -> dict[Path, str]:
        """The folders that exports make beside the merged one, and their kinds."""
        merged, found = self.destination(), {}
        if self.quantize:
            found[copy_of(merged, self.quantize)] = "merge"
        if self.exports:
            found[gguf_of(merged)] = "gguf"
        return found

    def claim(self, needed: Iterable[Path]) -> None:
        """See that what is written can be: the merged folder, one that fails, and exports. Raises UsageError."""
        for place, kind in {self.destination(): "merge", **self.places()}.items():
            for path in (place, unverified(place)):
                claim(path, kind, "a merge" if kind == "merge" else "an export", needed)
            if place.is_dir() and any(place.iterdir()) and not self.overwrite:
                raise UsageError(
                    f"{place}: is there already; use --overwrite to make it anew, or choose another --output"
                )

    def check(self) -> None:
        """Raises UsageError for what doesn't go together."""
        prunes = self.combine != "linear"
        if prunes and not self.additions:
            raise UsageError(f"--combine {self.combine} combines several adapters; name others with --add")
        if prunes and self.density is None:
            raise UsageError(f"--combine {self.combine} needs --density, the share of each delta to keep (such as 0.5)")
        if self.density is not None and not prunes:
            raise UsageError("--density is for --combine ties, dare_linear, dare_ties and magnitude_prune")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density: expected a share above 0 and up to 1, got {self.density:g}")
        if not math.isfinite(self.weight) or self.weight == 0:
            raise UsageError(f"--weight: expected a number other than 0, got {self.weight:g}")
        if self.rank is not None and not self.as_adapter:
            raise UsageError("--rank is the rank of the adapter that --as-adapter makes")
        if self.as_adapter:
            if self.rank is None:
                raise UsageError("--as-adapter needs --rank, the rank of the adapter to make")
            if self.exports or self.quantize or self.push_to_hub or self.method == "full":
                raise UsageError(
                    "--as-adapter makes an adapter; it can't go with --export, --quantize, --push-to-hub or "
                    "--method full"
                )
        for text in self.exports:
            from lorafit.export.gguf import parse_export

            parse_export(text, self.llama_cpp)
        if self.private and self.push_to_hub is None:
            raise UsageError("--private goes with --push-to-hub")
        if self.llama_cpp is not None and not self.exports:
            raise UsageError("--llama-cpp goes with --export gguf:KIND")
        if self.method == "full" and self.additions:
            raise UsageError("several adapters are combined by --method stream only")


def unverified(destination: Path) -> Path:
    """Where what failed its proof is left."""
    return destination.with_name(f"{destination.name}.unverified")


def copy_of(merged: Path, kind: str) -> Path:
    """The folder of a 4-bit copy."""
    return merged.with_name(f"{merged.name}-{kind}")


def gguf_of(merged: Path) -> Path:
    """The folder of GGUF files."""
    return merged.with_name(f"{merged.name}-gguf")


def parse_addition(text: str) -> Addition:
    """`PATH:WEIGHT`, or a path alone for a weight of 1. Raises UsageError."""
    path, colon, weight = text.rpartition(":")
    if not colon or (weight and not _is_number(weight) and Path(text).exists()):
        return Addition(Path(text), 1.0)
    if not path or not _is_number(weight) or not math.isfinite(float(weight)) or float(weight) == 0:
        raise UsageError(f"--add {text}: expected RUN:WEIGHT with a number other than 0, such as runs/other:0.3")
    return Addition(Path(path), float(weight))


def named_limits(**limits: float | None) -> dict[str, float]:
    """The limits that were given. Raises UsageError for numbers that can't be one."""
    for name, value in limits.items():
        if value is not None and not (math.isfinite(value) and 0 <= value <= (1 if name == "min_top1" else math.inf)):
            what = "a share from 0 to 1" if name == "min_top1" else "a number from 0"
            raise UsageError(f"--{name.replace('_', '-')}: expected {what}, got {value:g}")
    return {name: value for name, value in limits.items() if value is not None}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def one_of(option: str, value: str | None, kind: Any) -> Any:
    """The value if it is one of a Literal's. Raises UsageError."""
    choices = get_args(kind)
    if value is not None and value not in choices:
        raise UsageError(f"{option}: expected one of {', '.join(choices)}, got {value}")
    return value
