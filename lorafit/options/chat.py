"""What the command line asks of a chat, and what comes of it. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TextIO

from lorafit.errors import UsageError
from lorafit.options.evaluate import Adapters
from lorafit.options.fields import Argument, JsonOptions, Option

Write = Callable[[str], None]


@dataclass(frozen=True)
class ChatOptions(JsonOptions):
    """A chat as it was asked for.

    Attributes:
        adapters: more adapters on the same base: names, and runs or adapter folders.
        prompts: a conversation to have instead of asking for prompts.
        seed: decides what is drawn; the n-th answer of a chat is drawn alike every time.
        use: which model answers first; None: what the run trained, or the model itself.
    """

    path: Annotated[str, Argument("RUN|MODEL", "A run directory, a model folder or a hub id.", "runs")]
    adapters: Adapters = ()
    use: Annotated[str | None, Option("The model that answers first.  [default: the run's]", metavar="NAME")] = None
    prompts: Annotated[tuple[str, ...], Option("Answer this and leave; repeatable, in turn.", "--prompt", "TEXT")] = ()
    system: Annotated[str | None, Option("The system message.", metavar="TEXT")] = None
    max_new_tokens: Annotated[int, Option("Tokens an answer may have.", min=1)] = 512
    temperature: Annotated[float, Option("Temperature of sampling; 0 is greedy.", min=0)] = 0.0
    seed: Annotated[int, Option("Decides what is drawn at a temperature above 0.", min=0)] = 0

    def check(self) -> None:
        """Raises UsageError for what no chat can be held with."""
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: has to be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature}: has to be a number from 0")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: has to be at least 0")


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer.

    Attributes:
        answer: as the model wrote it, without special tokens; not made harmless for a terminal.
        tokens: of the answer, with its end token.
        ended: `end`: by itself; `length`: cut off; `stopped`: by Ctrl-C.
    """

    prompt: str
    answer: str
    model: str
    tokens: int
    seconds: float
    ended: Literal["end", "length", "stopped"]


def from_stdin(stdin: TextIO) -> tuple[str, ...]:
    """What a file or a pipe at stdin holds, as one prompt; none if people type there. Raises UsageError."""
    if stdin.isatty():
        return ()
    try:
        text = stdin.read().rstrip("\n")
    except UnicodeDecodeError:
        raise UsageError("stdin: is no UTF-8 text") from None
    if not text.strip():
        raise UsageError("stdin: is empty, so there is no prompt; give one with --prompt")
    return (text,)
