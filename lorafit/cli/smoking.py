"""`lorafit smoke`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.common import AsJson, Config, Overrides, fail, reporting, show
from lorafit.errors import GateError

if TYPE_CHECKING:
    from lorafit.options.smoke import Report


@reporting
def smoke(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Optimizer steps.  [default: 5, or the recording's]")
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Write the losses to the golden file.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 6 unless they are as recorded.")] = False,
    golden: Annotated[
        Path | None,
        typer.Option("--golden", metavar="FILE", help="The golden file.  [default: beside CONFIG, .golden.json]"),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", metavar="X", help="Relative, for --check.  [default: 0.001]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe's whole pipeline for a few steps with a tiny random model, on the CPU."""
    from lorafit.options.smoke import SmokeOptions

    options = SmokeOptions(config, tuple(overrides or ()), steps, record, check, golden, tolerance)
    options.validate()
    from lorafit.engine.quiet import hush

    hush()
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is there
    try:
        from lorafit.engine.smoke.run import smoke as run_smoke

        report = run_smoke(options)
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    show(as_dict(report)) if as_json else print_report(report, recorded=record)
    if report.failures:
        fail("\n".join(report.failures), GateError.exit_code)


def as_dict(report: Report) -> dict[str, object]:
    import dataclasses

    return dataclasses.asdict(report)


def print_report(report: Report, recorded: bool) -> None:
    """The report as text."""
    tiny = report.tiny
    typer.echo(
        f"tiny model   {tiny['parameters']:,} random parameters in the architecture of {report.model} "
        f"({tiny['layers']} layers, hidden size {tiny['hidden_size']}, vocabulary {tiny['vocab_size']})"
    )
    typer.echo(f"tokenizer    {report.tokenizer_note}")
    typer.echo(f"rows         the first {report.rows} of each source, {report.rows_per_step} in a step")
    for index, one in enumerate(report.replaced):
        typer.echo(f"{'' if index else 'replaced':12} {one}")
    typer.echo("\nstep       loss   grad norm        rate  tokens")
    for step in report.steps:
        typer.echo(
            f"{step.step:4}  {step.loss:9.5f}  {step.grad_norm:10.4g}  {step.learning_rate:10.3g}  {step.tokens:6}"
        )
    if report.validation_loss is not None:
        typer.echo(f"validation loss {report.validation_loss:.5f}")
    if report.golden is not None and not report.failures:
        typer.echo(f"{'recorded in' if recorded else 'as recorded in'} {report.golden}")
        if report.changed:
            typer.echo(f"changed since the recording, without effect on the losses: {', '.join(report.changed)}")
    typer.echo(f"{report.seconds:.1f} s")
