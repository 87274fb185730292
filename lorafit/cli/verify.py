"""`lorafit verify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import DriftError, UsageError
from lorafit.options import JsonOptions, Option, RunPath
from lorafit.progress import talk

if TYPE_CHECKING:
    from lorafit.engine.verify import Repeated
    from lorafit.run.directory import RunDir
    from lorafit.run.fingerprint import Check


@dataclass(frozen=True)
class VerifyOptions(JsonOptions):
    run: RunPath
    retrain: Annotated[int | None, Option("Repeat the first N steps and compare them.", "N", min=1)] = None
    tolerance: Annotated[
        float | None, Option("Relative difference that --retrain allows.  [default: 0 where all is as it was]", min=0)
    ] = None

    def check(self) -> None:
        if self.tolerance is not None and self.retrain is None:
            raise UsageError("--tolerance is for the figures of --retrain")


@command
def verify(options: VerifyOptions) -> None:
    from lorafit.run.directory import RunDir, located
    from lorafit.run.fingerprint import verify as check_hashes

    run, path = RunDir(located(options.run)), str(options.run)
    checks = check_hashes(run)
    repeated = trained_again(run, options.retrain, options.tolerance) if options.retrain else None
    wrong = [f"{path}: {check.what} {told(check)}" for check in checks if check.failed]
    if repeated and repeated.failed:
        allowed = f"{repeated.tolerance:g} ({repeated.why})"
        wrong.append(f"{path}: trained again, it differs by up to {repeated.largest:.3g}, where {allowed} may be")
    if options.as_json:
        again = repeated.as_dict() if repeated else None
        print_json({"run": path, "ok": not wrong, "checks": [asdict(check) for check in checks], "retrained": again})
    else:
        print_checks(checks)
        if repeated:
            print_repeated(repeated)
    if wrong:
        raise DriftError("\n".join(wrong))


def trained_again(run: RunDir, steps: int, tolerance: float | None) -> Repeated:
    from lorafit.engine.verify import retrain

    return retrain(run, steps, tolerance, talk())


def told(check: Check) -> str:
    status = {"changed": "has changed", "missing": "is missing"}.get(check.status, check.status)
    return f"{status} ({check.detail})" if check.detail else status


def print_checks(checks: list[Check]) -> None:
    for check in checks:
        typer.echo(f"{check.status:12}  {check.what}" + f" ({check.detail})" * bool(check.detail))


def print_repeated(repeated: Repeated) -> None:
    for step, figures in repeated.steps.items():
        shown = "  ".join(f"{name} {one:.6g} | {two:.6g}" for name, (one, two) in figures.items())
        typer.echo(f"step {step:<7}  {shown}")
    typer.echo(f"largest difference {repeated.largest:.3g}; allowed {repeated.tolerance:g}: {repeated.why}")
