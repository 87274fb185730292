"""`lorafit push`."""

from __future__ import annotations

import typer

from lorafit.cli.exits import print_json, remark
from lorafit.cli.signature import command
from lorafit.options import PushOptions


@command
def push(options: PushOptions) -> None:
    from lorafit.push import push as upload

    done = upload(options)
    if options.as_json:
        print_json(done)
        return
    for one in done["files"]:
        typer.echo(f"{one['bytes']:>15,}  {one['path']}", err=done["pushed"])
    remark(f"no secret and no place on this machine in {', '.join(done['searched'])}")
    whose = "private" if done["private"] else "public"
    if not done["pushed"]:
        remark(f"{len(done['files'])} files would go to {done['repository']} ({whose}); nothing was sent")
        return
    if done["left"]:
        remark(f"left as they were: {', '.join(done['left'])}")
    remark(f"{len(done['files'])} files are there as they are here ({whose}, commit {done['commit'][:12]})")
    typer.echo(done["url"])
