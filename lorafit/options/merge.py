"""What the command line asks of a merge, checked before anything is loaded (no torch)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lorafit.errors import UsageError
from lorafit.options.fields import Argument, JsonOptions, Locked, Option

if TYPE_CHECKING:
    from lorafit.plan import Plan

Combine = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


@dataclass(frozen=True)
class Addition:
    """Another adapter, and the factor of its delta."""

    path: Path
    weight: float


def parse_addition(text: str) -> Addition:
    """`PATH:WEIGHT`, or a path alone for a weight of 1. Raises UsageError."""
    path, colon, weight = text.rpartition(":")
    if not colon or (weight and not _is_number(weight) and Path(text).exists()):
        return Addition(Path(text), 1.0)
    if not path or not _is_number(weight) or not math.isfinite(float(weight)) or float(weight) == 0:
        raise UsageError(f"{text}: expected RUN:WEIGHT with a number other than 0, such as runs/other:0.3")
    return Addition(Path(path), float(weight))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Options(JsonOptions):
    """A merge as it was asked for. None means: as the recipe's merge section has it, or its default."""

    path: Annotated[Path, Argument("RUN", "A run directory, or a folder with an adapter.", "runs")]
    overrides: Annotated[
        tuple[str, ...],
        Option("Override a value of the merge section; repeatable.", "--set", "KEY=VALUE"),
    ] = ()
    output: Annotated[Path | None, Option("Default: merged/ in the run.", "-o --output")] = None
    method: Annotated[
        Literal["auto", "stream", "full"],
        Option("stream: tensor by tensor; full: in memory.", metavar="auto|stream|full"),
    ] = "auto"
    base: Annotated[str | None, Option("The base, if not where the run or adapter says.", metavar="NAME")] = None
    allow_other_base: Annotated[bool, Option("Merge into a base that is not the one of the training.")] = False
    base_weights: Annotated[
        Literal["auto", "original", "dequantized"] | None,
        Option("For QLoRA: which weights to add to.", metavar="original|dequantized|auto"),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("float32, bfloat16 or float16.  [default: as stored]", metavar="TYPE"),
    ] = "auto"
    verify: Annotated[
        Literal["auto", "logits", "weights", "none"] | None,
        Option("How much is proved.  [default: auto]", metavar="logits|weights|none"),
    ] = None
    weight: Annotated[float, Option("Factor of the run's own adapter.", metavar="X")] = 1.0
    additions: Annotated[
        tuple[Addition, ...],
        Option("Add another adapter, X times; below 0 subtracts. Repeatable.", "--add", "RUN:X", parse=parse_addition),
    ] = ()
    combine: Annotated[Combine, Option("linear, ties, dare_linear, dare_ties or magnitude_prune.", metavar="HOW")] = (
        "linear"
    )
    density: Annotated[float | None, Option("Share of each delta that --combine keeps.", metavar="X")] = None
    seed: Annotated[int, Option("Decides what DARE drops.", min=0)] = 0
    as_adapter: Annotated[bool, Option("Make one adapter of several (SVD) instead of a model.")] = False
    rank: Annotated[int | None, Option("Rank of the adapter that --as-adapter makes.", metavar="R", min=1)] = None
    quantize: Annotated[
        Literal["nf4", "fp4"] | None, Option("A 4-bit copy of the merged model as well.", metavar="nf4|fp4")
    ] = None
    exports: Annotated[
        tuple[str, ...],
        Option("f16, bf16, q8_0 …, with an Ollama Modelfile. Repeatable.", "--export", "gguf:KIND"),
    ] = ()
    llama_cpp: Annotated[Path | None, Option("Export by llama.cpp's own converter, in this folder.", metavar="DIR")] = (
        None
    )
    push_to_hub: Annotated[str | None, Option("Upload the merged model, such as me/my-model.", metavar="ID")] = None
    private: Annotated[bool, Option("With --push-to-hub.")] = False
    check_vllm: Annotated[bool, Option("Only tell whether vLLM can serve the adapter unmerged, and how.")] = False
    overwrite: Annotated[bool, Option("Make anew what is there already; it is kept until that is done.")] = False
    locked: Locked = False

    def destination(self) -> Path:
        """The folder to write: what --output says, or merged/ (merged-adapter/) in the run. Raises UsageError."""
        from lorafit.run.directory import RunDir, located

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
        from lorafit.files import claim

        for place, kind in {self.destination(): "merge", **self.places()}.items():
            for path in (place, unverified(place)):
                claim(path, kind, "a merge" if kind == "merge" else "an export", needed)
            if place.is_dir() and any(place.iterdir()) and not self.overwrite:
                raise UsageError(
                    f"{place}: is there already; use --overwrite to make it anew, or choose another --output"
                )

    def settings(self, plan: Plan | None) -> dict[str, Any]:
        """The merge section of a run's plan (None: its defaults) with what was asked for. Raises RecipeError."""
        from lorafit.recipe import Recipe

        section = plan.merge if plan else {}
        if self.overrides or plan is None:
            values = {
                "model": {"name_or_path": "any"},
                "lora": {},
                "dataset": {"train": [{"path": "any"}]},
                "merge": section,
            }
            section = Recipe.restored(values, "plan.json", self.overrides).merge.model_dump(mode="json")
        given = {"base_weights": self.base_weights, "verify": self.verify}
        return section | {key: value for key, value in given.items() if value is not None}

    def check(self) -> None:
        """Raises UsageError for what doesn't go together."""
        if self.check_vllm:
            return
        for override in self.overrides:
            if not override.startswith("merge."):
                raise UsageError(f"--set {override}: a merge can change the merge section only, such as merge.max_kl")
        if self.overrides:
            self.settings(None)  # says what no recipe may have
        self._check_combination()
        self._check_adapter()
        for text in self.exports:
            from lorafit.export.gguf import parse_export

            parse_export(text, self.llama_cpp)
        if self.private and self.push_to_hub is None:
            raise UsageError("--private goes with --push-to-hub")
        if self.llama_cpp is not None and not self.exports:
            raise UsageError("--llama-cpp goes with --export gguf:KIND")
        if self.method == "full" and self.additions:
            raise UsageError("several adapters are combined by --method stream only")

    def _check_combination(self) -> None:
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

    def _check_adapter(self) -> None:
        if self.rank is not None and not self.as_adapter:
            raise UsageError("--rank is the rank of the adapter that --as-adapter makes")
        if self.as_adapter and self.rank is None:
            raise UsageError("--as-adapter needs --rank, the rank of the adapter to make")
        if self.as_adapter and (self.exports or self.quantize or self.push_to_hub or self.method == "full"):
            raise UsageError(
                "--as-adapter makes an adapter; it can't go with --export, --quantize, --push-to-hub or --method full"
            )


def unverified(destination: Path) -> Path:
    """Where what failed its proof is left."""
    return destination.with_name(f"{destination.name}.unverified")


def copy_of(merged: Path, kind: str) -> Path:
    """The folder of a 4-bit copy."""
    return merged.with_name(f"{merged.name}-{kind}")


def gguf_of(merged: Path) -> Path:
    """The folder of GGUF files."""
    return merged.with_name(f"{merged.name}-gguf")
