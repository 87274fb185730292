"""What all commands share: the arguments that recur, and how failures, results and remarks are said."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from lorafit.cli.complete import gpus, keys, recipes, runs
from lorafit.errors import DoesNotFitError, Interrupted, LorafitError, UsageError, is_out_of_memory
from lorafit.progress import telling
from lorafit.written import hidden_in, verbatim

if TYPE_CHECKING:
    from lorafit.hardware import Hardware
    from lorafit.plan import Plan
    from lorafit.run.directory import RunDir

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.", autocompletion=recipes)]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/quickstart.", autocompletion=runs)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable.", autocompletion=keys),
]
ForGpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="NAME", help="Plan for this GPU, not what the recipe is meant for.", autocompletion=gpus
    ),
]
Here = Annotated[bool, typer.Option("--here", help="Plan for this machine.")]
Locked = Annotated[bool, typer.Option("--locked", help="Refuse any drift from the lock that the run was trained with.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


HEAD_START = 3.0
"""Seconds that the first of several processes has for saying what is wrong."""

P = ParamSpec("P")
R = TypeVar("R")


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Turn expected failures, and SIGTERM, into one message on stderr and their exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        _signals.clear()
        before = signal.signal(signal.SIGTERM, terminated)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupted)
        try:
            with telling(), _heard():
                return command(*args, **kwargs)
        except Interrupted as error:
            fail(str(error), 128 + error.signal_number)
        except LorafitError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(0) from None
        except Exception as error:
            if _signals:  # some library took what the handler raised for a failure of its own
                fail("interrupted" if _signals[-1] == signal.SIGINT else "terminated", 128 + _signals[-1])
            if is_disk_full(error):
                fail(f"the disk is full: {error}", DoesNotFitError.exit_code)
            if is_out_of_memory(error):
                fail(f"out of memory: {error}", DoesNotFitError.exit_code)
            if isinstance(error, OSError) and error.filename:
                fail(f"{error.filename}: {error.strerror}", UsageError.exit_code)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            if signal.getsignal(signal.SIGINT) is interrupted:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    return wrapped


_signals: list[int] = []
"""Signals that came while the command ran."""


def interrupted(number: int, _: Any) -> NoReturn:
    """SIGINT, as Python handles it."""
    _signals.append(number)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Have a signal come again whose exception is lost, as one is that is raised while Python destroys an object."""
    before = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        error = lost.exc_value
        if isinstance(error, KeyboardInterrupt):
            _again(signal.SIGINT)
        elif isinstance(error, Interrupted):
            _again(error.signal_number)
        elif isinstance(error, Exception):  # an alarm that is none rings until it is heard
            before(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _again(number: int) -> None:
    """Send this process a signal in a moment: what is raised at once would be lost as well."""
    timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def terminated(number: int, _: Any) -> NoReturn:
    """SIGTERM outside the steps of a training: what is being written is given up, whole."""
    _signals.append(number)
    raise Interrupted("terminated; nothing is half written, and a run goes on from its last checkpoint", number)


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


def fail(message: str, code: int) -> NoReturn:
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


def make_plan(config: Path, overrides: list[str] | None, count_rows: bool = False) -> Plan:
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe

    return plan_recipe(Recipe.load(config, overrides or ()), config, count_rows=count_rows)


def hardware_for(gpu: str | None, here: bool = False) -> Hardware | None:
    """What --gpu and --here ask to plan for; None: what a recipe is meant for. Raises UsageError."""
    if gpu is not None and here:
        raise UsageError("--gpu and --here exclude each other")
    from lorafit.gpus import find_gpu
    from lorafit.hardware import detect, hardware_of

    return hardware_of(find_gpu(gpu)) if gpu is not None else detect() if here else None


def check_locked(path: Path) -> None:
    """Refuse drift from the lock that a run was trained with; a recipe's run is where it says. Raises DriftError."""
    from lorafit.lock import check_run

    check_run(run_of(path))


def run_of(path: Path) -> RunDir:
    """A run by its directory or its recipe. Raises RecipeError."""
    from lorafit.recipe import Recipe
    from lorafit.run.directory import RunDir, located

    return RunDir(located(Recipe.load(path).output_dir or f"runs/{path.stem}" if path.is_file() else path))


def show(value: Any) -> None:
    text = json.dumps(hidden_in(value), indent=2, ensure_ascii=False)
    with verbatim():
        typer.echo(text)
