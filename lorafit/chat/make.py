"""`lorafit chat`: the story."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from lorafit.chat import ChatOptions, Turn, Write
from lorafit.chat.conversation import Conversation
from lorafit.chat.rooms import open_room
from lorafit.console import Console
from lorafit.quiet import hush_progress


def chat(options: ChatOptions, console: Console, read: Callable[[str], str], write: Write) -> list[Turn]:
    """Answer the prompts of the options, or else those that are read until `/quit` or the end of input.

    Args:
        console: for remarks.
        read: shows its argument and returns a line, as `input` does.
        write: shows a part of an answer at once; it gets text that is harmless for a terminal.

    Returns every answer. Raises UsageError, ModelError, DoesNotFitError; DataError if the template refuses a prompt.
    """
    options.check()
    hush_progress()
    with open_room(options, console) as room:
        talk = Conversation(room, options, console, write)
        if options.prompts:
            for prompt in options.prompts:
                talk.ask(prompt)
        else:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives `input` its line editing
            talk.run(read)
        return talk.turns
