"""What the command line asks of a memory estimate. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from lorafit.errors import UsageError
from lorafit.options.fields import Argument, JsonOptions, Option, Overrides


@dataclass(frozen=True)
class EstimateOptions(JsonOptions):
    """An estimate as it was asked for.

    Attributes:
        gpus: names; the plan is made for the first.
        sizes: amounts of memory.
        asserted: either.
        world: GPUs that train together.
    """

    config: Annotated[Path | None, Argument("The recipe, a YAML file.", "[CONFIG]", "recipes")] = None
    overrides: Overrides = ()
    model: Annotated[str | None, Option("A model in place of a recipe, with defaults.", "NAME")] = None
    method: Annotated[str | None, Option("With --model.  [default: lora]", "lora|qlora|full")] = None
    max_length: Annotated[int | None, Option("Short for training.max_length.")] = None
    batch: Annotated[int | None, Option("Short for training.per_device_train_batch_size.")] = None
    gpus: Annotated[
        tuple[str, ...],
        Option("A GPU that it should fit, such as 'RTX 4090'; repeatable.", "--gpu NAME", "gpus"),
    ] = ()
    sizes: Annotated[
        tuple[str, ...], Option("Memory that it should fit, such as 24GiB; repeatable.", "--vram SIZE")
    ] = ()
    asserted: Annotated[
        tuple[str, ...],
        Option("Exit with 5 unless it certainly fits; repeatable, for CI.", "--assert-fits GPU|SIZE", "gpus"),
    ] = ()
    list_gpus: Annotated[bool, Option("Show which of the known GPUs it fits.")] = False
    world: Annotated[int | None, Option("GPUs that train together.", "--gpus N")] = None
    sharding: Annotated[str | None, Option("none, ddp, fsdp, fsdp_offload, zero1, zero2 or zero3.", "HOW")] = None
    sweeps: Annotated[
        tuple[str, ...], Option("Estimate for each value of a key; repeatable.", "--sweep KEY=V1,V2")
    ] = ()
    trace: Annotated[bool, Option("Run the real modules on tensors without data: exact, takes seconds.")] = False
    plot: Annotated[Path | None, Option("Draw it, as .png or .svg.", "FILE")] = None
    tokens: Annotated[int | None, Option("Tokens of an epoch, for cost.", "N")] = None
    price: Annotated[
        float | None, Option("Price of one GPU for an hour, for cost; needs --gpu.", "--price-per-hour X")
    ] = None
    calibrate: Annotated[
        tuple[Path, ...],
        Option("How far off the estimates of finished runs were; repeatable.", "RUN", "runs"),
    ] = ()

    @property
    def short(self) -> dict[str, str]:
        """Overrides that have options of their own, and these as typed."""
        keys = (("max-length", "max_length", self.max_length), ("batch", "per_device_train_batch_size", self.batch))
        return {f"training.{key}={value}": f"--{name} {value}" for name, key, value in keys if value is not None}

    def check(self) -> None:
        """Raises UsageError for what doesn't go with --calibrate."""
        others = [one for one in fields(self) if one.name not in ("calibrate", "as_json")]
        if self.calibrate and any(getattr(self, one.name) != one.default for one in others):
            raise UsageError("--calibrate reads runs; it goes with --json alone")
