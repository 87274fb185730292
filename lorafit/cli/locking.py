"""`lorafit lock` and `lorafit verify`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.common import AsJson, Config, Overrides, RunPath, fail, reporting, show
from lorafit.errors import DriftError, UsageError
from lorafit.progress import talk

if TYPE_CHECKING:
    from lorafit.engine.verify import Repeated
    from lorafit.run.hashes import Check


@reporting
def lock(
    config: Config,
    overrides: Overrides = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 7 if anything drifted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write beside a recipe what it comes to: values, commits, hashes, versions; or check it."""
    from lorafit.lock import check_lock, lock_path, write_lock

    if check:
        found = check_lock(config, overrides or ())
        show({"lock": str(lock_path(config)), "sha256": found.sha256, "drift": []}) if as_json else typer.echo(
            f"{lock_path(config)}: nothing drifted"
        )
        return
    path, written, changed = write_lock(config, overrides or ())
    if as_json:
        show({"lock": str(path), "sha256": written.sha256, "changed": changed})
        return
    for line in changed:
        typer.echo(line, err=True)
    typer.echo(str(path))


@reporting
def verify(
    path: RunPath,
    retrain: Annotated[
        int | None, typer.Option("--retrain", metavar="N", min=1, help="Repeat the first N steps and compare them.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Relative, with --retrain.  [default: 0 where all is as it was]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute a run's hashes once more, and see that it trains again as it did."""
    if tolerance is not None and retrain is None:
        fail("--tolerance is for the figures of --retrain", UsageError.exit_code)
    from lorafit.run.directory import RunDir, located
    from lorafit.run.hashes import verify as check_hashes

    run = RunDir(located(path))
    checks = check_hashes(run)
    repeated = None
    if retrain is not None:
        from lorafit.engine.quiet import hush

        hush()
        from lorafit.engine.verify import retrain as train_again

        repeated = train_again(run, retrain, tolerance, talk())
    if as_json:
        ok = not any(check.failed for check in checks) and not (repeated and repeated.failed)
        again = repeated.as_dict() if repeated else None
        show({"run": str(path), "ok": ok, "checks": [asdict(check) for check in checks], "retrained": again})
    else:
        print_checks(checks)
        if repeated:
            print_repeated(repeated)
    wrong = [f"{path}: {check.what} {told(check)}" for check in checks if check.failed]
    if repeated and repeated.failed:
        allowed = f"{repeated.tolerance:g} ({repeated.why})"
        wrong.append(f"{path}: trained again, it differs by up to {repeated.largest:.3g}, where {allowed} may be")
    if wrong:
        fail("\n".join(wrong), DriftError.exit_code)


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
