"""`lorafit merge`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import ModelError
from lorafit.options import MergeOptions, run_of
from lorafit.progress import talk


@command
def merge(options: MergeOptions) -> None:
    if options.check_vllm:
        show_vllm(options.path, options.as_json)
        return
    from lorafit.files import refuse_busy

    run = run_of(options.path)
    if options.locked:
        from lorafit.lock import check_run

        check_run(run)
    run.refuse_busy(shared=True)
    refuse_busy(options.destination())
    options.claim([options.path])

    from lorafit.engine.merge.run import merge as run_merge

    destination = run_merge(options, talk())
    if options.as_json:
        report = json.loads((destination / "merge_report.json").read_text(encoding="utf-8"))
        print_json(report | {"merged": str(destination)})
    else:
        typer.echo(str(destination))


def show_vllm(path: Path, as_json: bool) -> None:
    """Whether vLLM can serve an adapter as it is; exits with 4 if not."""

    from lorafit.export.vllm import check_vllm
    from lorafit.run.directory import RunDir

    adapter = RunDir(path).adapter if RunDir(path).is_run else path
    report = check_vllm(adapter)
    if as_json:
        print_json(asdict(report))
    else:
        for remark in report.remarks:
            typer.echo(remark, err=True)
        if report.command:
            typer.echo(report.command)
    if not report.servable:
        raise ModelError("\n".join(f"{adapter}: {reason}" for reason in report.reasons))
