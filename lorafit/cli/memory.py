"""`lorafit estimate-vram`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.common import AsJson, Overrides, fail, reporting, show
from lorafit.cli.complete import gpus as known_gpus
from lorafit.cli.complete import recipes, runs
from lorafit.errors import DoesNotFitError, UsageError
from lorafit.progress import stage

if TYPE_CHECKING:
    from lorafit.memory import Estimate, Setup


@reporting
def estimate_vram(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="The recipe, a YAML file.", autocompletion=recipes)
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="A model in place of a recipe, with defaults.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="lora|qlora|full", help="With --model.  [default: lora]")
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Short for training.max_length.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Short for training.per_device_train_batch_size.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="A GPU that it should fit, such as 'RTX 4090'; repeatable.",
            autocompletion=known_gpus,
        ),
    ] = None,
    vram: Annotated[
        list[str] | None,
        typer.Option("--vram", metavar="SIZE", help="Memory that it should fit, such as 24GiB; repeatable."),
    ] = None,
    assert_fits: Annotated[
        list[str] | None,
        typer.Option(
            "--assert-fits",
            metavar="GPU|SIZE",
            help="Exit with 5 unless it certainly fits; repeatable, for CI.",
            autocompletion=known_gpus,
        ),
    ] = None,
    list_gpus: Annotated[bool, typer.Option("--list-gpus", help="Show which of the known GPUs it fits.")] = False,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", help="GPUs that train together.")] = None,
    sharding: Annotated[
        str | None,
        typer.Option("--sharding", metavar="HOW", help="none, ddp, fsdp, fsdp_offload, zero1, zero2 or zero3."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=V1,V2", help="Estimate for each value of a key; repeatable."),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Run the real modules on tensors without data: exact, takes seconds.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it, as .png or .svg.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens of an epoch, for cost.")] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", metavar="X", help="Of one GPU, for cost; needs --gpu.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibrate",
            metavar="RUN",
            help="How far off the estimates of finished runs were; repeatable.",
            autocompletion=runs,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a recipe's memory from tensor shapes, without weights or a GPU, and say where it fits."""
    if calibrate:
        others = (config, model, method, overrides, max_length, batch, gpu, vram, assert_fits, gpus, sharding, sweep)
        if any(given is not None for given in (*others, plot, tokens, price)) or trace:
            fail("--calibrate reads runs; it goes with --json alone", UsageError.exit_code)
        show_calibration(calibrate, as_json)
        return
    from lorafit.vram.answer import as_dict, ask
    from lorafit.vram.question import Asked

    asked = Asked(
        config=config,
        model=model,
        method=method,
        overrides=tuple(overrides or ()),
        max_length=max_length,
        batch=batch,
        gpus=tuple(gpu or ()),
        sizes=tuple(vram or ()),
        asserted=tuple(assert_fits or ()),
        world=gpus,
        sharding=sharding,
        sweeps=tuple(sweep or ()),
        trace=trace,
        plot=plot,
        tokens=tokens,
        price=price,
    )
    found = ask(asked, traced)
    if as_json:
        show(as_dict(found))
    else:
        from lorafit.vram.text import print_answer

        print_answer(found, list_gpus)
    if found.failures:
        fail("\n".join(found.failures), DoesNotFitError.exit_code)


def traced(setup: Setup, capacity: int | None) -> Estimate:
    """An estimate by running the real modules without data. Raises ModelError."""
    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.trace.record import estimate_by_trace

    with stage("tracing a training step"):
        return estimate_by_trace(setup, capacity)


def show_calibration(runs: list[Path], as_json: bool) -> None:
    from lorafit.run.memory import calibrate
    from lorafit.vram.text import print_calibration

    found = calibrate(runs)
    show(found.as_dict()) if as_json else print_calibration(found)
