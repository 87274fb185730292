"""`lorafit smoke`."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import GateError
from lorafit.options import SmokeOptions

if TYPE_CHECKING:
    from lorafit.engine.smoke import Report


@command
def smoke(options: SmokeOptions) -> None:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is there
    try:
        from lorafit.engine.smoke import smoke as run_smoke

        report = run_smoke(options)
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
    print_json(asdict(report)) if options.as_json else print_report(report, recorded=options.record)
    if report.failures:
        raise GateError("\n".join(report.failures))


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
