"""`lorafit chat`."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace

from lorafit.cli.exits import print_json
from lorafit.cli.signature import command
from lorafit.errors import UsageError
from lorafit.options import ChatOptions, from_stdin
from lorafit.progress import talk


@command
def chat(options: ChatOptions) -> None:
    options = replace(options, prompts=options.prompts or from_stdin(sys.stdin))
    if options.as_json and not options.prompts:
        raise UsageError("--json prints answers to --prompt, or to what comes on stdin")
    from lorafit.run.directory import RunDir, located

    RunDir(located(options.path)).refuse_busy(shared=True)

    def write(text: str) -> None:
        if not options.as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    from lorafit.engine.chat import chat as run_chat

    turns = run_chat(options, talk(), input, write)
    if options.as_json:
        print_json([asdict(turn) for turn in turns])
