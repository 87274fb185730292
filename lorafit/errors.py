"""The errors that lorafit expects to happen, each with the exit code that its users' scripts see.

An expected failure is one clear line (what, where, how to fix it). Anything else that escapes is a
bug: it keeps its traceback and exits with 1.
"""

from __future__ import annotations

from typing import ClassVar


class LorafitError(Exception):
    """An expected failure. The message is complete: what is wrong, where, and how to fix it."""

    exit_code: ClassVar[int] = 1


class UsageError(LorafitError):
    """The command line asks for something that can't be done, such as starting a finished run."""

    exit_code = 2


class MissingError(UsageError):
    """This machine lacks a package or a key that a recipe needs, which need not be so where the recipe is used."""


class DataError(LorafitError):
    """A data file is missing, unreadable, or holds a row that can't be trained on.

    Attributes:
        where: the key of its source in a recipe that decides about it, such as ("columns", "output"), if one does.
    """

    exit_code = 3

    def __init__(self, message: str, where: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.where = where


class ModelError(LorafitError):
    """The model can't be had or loaded, or two inputs don't belong together."""

    exit_code = 4


class DoesNotFitError(LorafitError):
    """Memory or disk is too small for what was asked."""

    exit_code = 5


class GateError(LorafitError):
    """A result is worse than what was demanded of it (such as a loss that is no longer finite)."""

    exit_code = 6


class DriftError(LorafitError):
    """Something is no longer what a lock or a record says."""

    exit_code = 7


class Interrupted(BaseException):
    """The command was stopped by a signal; a run in its steps, after saving what can be resumed.

    Like KeyboardInterrupt no Exception: a signal that comes while a library loads is not that library's error.

    Attributes:
        signal_number: the signal that asked for the stop (2 SIGINT, 15 SIGTERM). The exit code is
            128 plus this number, as shells have it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, from torch or Python, says that memory is too small."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported everywhere
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


EXIT_CODES: dict[int, str] = {
    0: "success",
    1: "internal error: a bug in lorafit, shown with its traceback",
    2: "the command line or the recipe is wrong",
    3: "the data is wrong",
    4: "the model can't be loaded, or inputs don't belong together",
    5: "it does not fit in memory or on disk",
    6: "a gate failed: a result is worse than demanded, or the loss is not finite",
    7: "something differs from its lock or record; for `diff`: the recipes differ",
    130: "interrupted by Ctrl-C; a checkpoint was saved if training had begun",
    143: "terminated by SIGTERM; a checkpoint was saved if training had begun",
}
"""The exit codes of every command, for the documentation and its test."""
