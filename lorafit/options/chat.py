"""Talking to a run's models, or to any model, in the terminal: text in the training's form, adapters switched at once.

options (here) -> rooms (models loaded) -> room (an answer, streamed) -> conversation (what was said, and the commands)
-> make (the story). This module is light.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from lorafit.errors import UsageError

Write = Callable[[str], None]
NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ChatOptions:
    """A chat as it was asked for.

    Attributes:
        path: a run, a model's folder, or a model's id on the hub.
        adapters: more adapters on the same base: names, and runs or adapter folders.
        prompts: a conversation to have instead of asking for prompts.
        temperature: 0 is greedy; else answers are drawn from the model's whole distribution.
        seed: of what is drawn; the n-th answer of a chat is drawn alike every time.
        use: which model answers first; None: what the run trained, or the model itself.
    """

    path: str
    adapters: tuple[tuple[str, Path], ...] = ()
    prompts: tuple[str, ...] = ()
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    use: str | None = None

    def check(self) -> None:
        """Raises UsageError for what no chat can be held with."""
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: has to be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature}: has to be a number from 0")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: has to be at least 0")
        for name, path in self.adapters:
            if not NAME.fullmatch(name):
                raise UsageError(f"--adapter {name}={path}: a name consists of letters, digits, _ and -")


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
