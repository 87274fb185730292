"""`lorafit estimate-vram`."""

from __future__ import annotations

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import DoesNotFitError
from lorafit.options.estimate_vram import EstimateOptions


@command
def estimate_vram(options: EstimateOptions) -> None:
    if options.calibrate:
        show_calibration(options)
        return
    from lorafit.vram.ask import ask
    from lorafit.vram.text import print_reply

    reply = ask(options)
    print_json(reply.as_dict()) if options.as_json else print_reply(reply, options.list_gpus)
    if reply.failures:
        raise DoesNotFitError("\n".join(reply.failures))


def show_calibration(options: EstimateOptions) -> None:
    from lorafit.vram.calibrate import calibrate
    from lorafit.vram.text import print_calibration

    found = calibrate(options.calibrate)
    print_json(found.as_dict()) if options.as_json else print_calibration(found)
