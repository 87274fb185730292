"""How commands end: results printed, failures said with their exit codes, signals heard."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from lorafit.errors import DoesNotFitError, Interrupted, LorafitError, UsageError, is_out_of_memory
from lorafit.progress import talk, telling
from lorafit.written import hidden_in, verbatim

HEAD_START = 3.0
"""Seconds that the first of several processes has for saying what is wrong."""


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Turn expected failures, and signals, into one message on stderr and their exit code."""
    came: list[int] = []
    try:
        with _hearing(came), telling():
            yield
    except Interrupted as error:
        _fail(str(error), 128 + error.signal_number)
    except LorafitError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(0) from None
    except Exception as error:
        if came:  # some library took what the handler raised for a failure of its own
            _fail("interrupted" if came[-1] == signal.SIGINT else "terminated", 128 + came[-1])
        if is_disk_full(error):
            _fail(f"the disk is full: {error}", DoesNotFitError.exit_code)
        if is_out_of_memory(error):
            _fail(f"out of memory: {error}", DoesNotFitError.exit_code)
        if isinstance(error, OSError) and error.filename:
            _fail(f"{error.filename}: {error.strerror}", UsageError.exit_code)
        raise


@contextlib.contextmanager
def _hearing(came: list[int]) -> Iterator[None]:
    """Raise what SIGINT and SIGTERM ask for, and note them.

    A signal comes again whose exception is lost, as one is that is raised while Python destroys an object.
    """

    def interrupted(number: int, _: Any) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    def terminated(number: int, _: Any) -> NoReturn:  # outside a training's steps, which save a checkpoint
        came.append(number)
        raise Interrupted("terminated; nothing is half written, and a run goes on from its last checkpoint", number)

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        error = lost.exc_value
        if isinstance(error, KeyboardInterrupt):
            _again(signal.SIGINT)
        elif isinstance(error, Interrupted):
            _again(error.signal_number)
        elif isinstance(error, Exception):  # an alarm that is none rings until it is heard
            hook(lost)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    sigterm, sigint = signal.signal(signal.SIGTERM, terminated), signal.getsignal(signal.SIGINT)
    if sigint is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, sigterm)
        if signal.getsignal(signal.SIGINT) is interrupted:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _again(number: int) -> None:
    """Send this process a signal in a moment: what is raised at once would be lost as well."""
    timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, from whatever library, comes from a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "os error 28" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _fail(message: str, code: int) -> NoReturn:
    """Say what is wrong and exit.

    Of several processes the first speaks. What another one meets alone it says after a while: if the first met it
    too, torchrun has ended this process by then.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(message, err=True)
    elif code < 128:  # a signal is for all
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START)
        typer.echo(f"process {rank}: {message}", err=True)
    raise typer.Exit(code)


def remark(line: str, style: str = "") -> None:
    """Say something on stderr that is no failure."""
    talk().print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def warn(line: str) -> None:
    """Say what the user should look at."""
    remark(line, "yellow")


def print_json(value: Any) -> None:
    text = json.dumps(hidden_in(value), indent=2, ensure_ascii=False)
    with verbatim():
        typer.echo(text)
