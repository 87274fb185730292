"""`lorafit estimate-vram`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import DoesNotFitError
from lorafit.options import EstimateOptions
from lorafit.progress import stage

if TYPE_CHECKING:
    from lorafit.memory import Estimate, Setup


@command
def estimate_vram(options: EstimateOptions) -> None:
    if options.calibrate:
        show_calibration(options)
        return
    from lorafit.vram.answer import as_dict, ask
    from lorafit.vram.text import print_answer

    found = ask(options, traced)
    print_json(as_dict(found)) if options.as_json else print_answer(found, options.list_gpus)
    if found.failures:
        raise DoesNotFitError("\n".join(found.failures))


def traced(setup: Setup, capacity: int | None) -> Estimate:
    """An estimate by running the real modules without data. Raises ModelError."""

    from lorafit.engine.trace.record import estimate_by_trace

    with stage("tracing a training step"):
        return estimate_by_trace(setup, capacity)


def show_calibration(options: EstimateOptions) -> None:
    from lorafit.run.memory import calibrate
    from lorafit.vram.text import print_calibration

    found = calibrate(options.calibrate)
    print_json(found.as_dict()) if options.as_json else print_calibration(found)
