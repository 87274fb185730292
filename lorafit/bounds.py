"""Limits on what a recipe, a data set, a model or an adapter brings: time, length, size and place. No torch.

Regular expressions, templates and files are others' input, and each can be written so that it has no end. Time and
memory are limited by an alarm (`within`), which ends Python code and searches of `re`; what one call of C would make is
counted before it is made (`Environment`); files are read if they are files, and no further than a limit.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import glob
import json
import os
import re
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import FILTERS, do_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorafit.errors import ModelError

LONGEST = 10.0
"""Seconds of computing that a template may take for a text, or an expression for what it is searched in. Time in which
a busy machine does something else, or a disk is waited for, does not count."""
MOST_MEMORY = 1 << 30
"""Bytes that the process may grow by in that time."""
LONGEST_TEXT = 1 << 25
"""Characters, and values in lists, that a template may make at once."""
LONGEST_ROW = 1 << 26
"""Characters of a row of data in a text file, and bytes of one in a parquet file."""
LARGEST_DOCUMENT = 1 << 28
"""Characters of a JSON file that is no list of rows, but an object that holds one."""
LARGEST_FILE = 100_000_000
"""Bytes of a file that is read whole, such as a schema or a model's configuration."""
LARGEST_TEMPLATE = 1 << 20
"""Bytes of a chat template's file."""
_TICK = 0.1
_FEW = 20
_MOST = 1_000_000
"""The largest number that a filter or method is given, and the most bits of one that is computed."""


# --- time -----------------------------------------------------------------------------------------


class _TooMuch(BaseException):
    """The alarm. No Exception: those who try a template take every Exception for its own."""

    def __init__(self, guard: within, how: str) -> None:
        super().__init__(how)
        self.guard = guard


class within:
    """Raise an error if a block takes longer than LONGEST, or memory beyond MOST_MEMORY.

    Only in the main thread, where there are alarms. Blocks may be nested. It costs about a microsecond.

    Args:
        error: the error's type, or what makes it of a message.
        what: what the message begins with: the place, and what takes too long.
    """

    __slots__ = ("before", "error", "until", "what")
    _open: list[within] = []  # noqa: RUF012 - of the main thread

    def __init__(self, error: Callable[[str], Exception], what: str) -> None:
        self.error, self.what = error, what
        self.until: float | None = None
        self.before = 0

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
            self._open.append(self)
            if signal.getsignal(signal.SIGALRM) is not _tick or not signal.getitimer(signal.ITIMER_REAL)[1]:
                _ring()  # also where code of others has taken the alarm

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if self in self._open:
            self._open.remove(self)
        if isinstance(value, _TooMuch) and value.guard is self:
            raise self.error(f"{self.what} takes {value}; make it simpler") from None


_ringing: list[Any] = []
"""Whom the alarm rang for before: it is left ringing from block to block, which costs them nothing."""


def _ring() -> None:
    before = signal.signal(signal.SIGALRM, _tick)
    if before is not _tick:
        _ringing[:] = [before]
    tick = min(_TICK, LONGEST / 2)
    signal.setitimer(signal.ITIMER_REAL, tick, tick)  # again: what is raised while Python destroys an object is lost


@atexit.register
def _hush() -> None:
    if _ringing and signal.getsignal(signal.SIGALRM) is _tick:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(IndexError):  # a tick that was under way already has done it
            signal.signal(signal.SIGALRM, _ringing.pop() or signal.SIG_DFL)


os.register_at_fork(after_in_child=_ringing.clear)  # a child has no timer


def _tick(*_: object) -> None:
    if not within._open:
        _hush()
        return
    now, memory = time.thread_time(), _resident()
    for guard in within._open:
        if guard.until is None:
            guard.until, guard.before = now + LONGEST, memory
        if now > guard.until:
            raise _TooMuch(guard, f"longer than {LONGEST:g} seconds")
        if memory - guard.before > MOST_MEMORY:
            raise _TooMuch(guard, f"more than {MOST_MEMORY >> 20} MiB of memory")


def _resident() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


# --- templates ------------------------------------------------------------------------------------


class Environment(ImmutableSandboxedEnvironment):
    """Jinja that can neither reach Python nor make more than LONGEST_TEXT at once.

    It renders `within` limits: of those around it, or its own.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"optimized": False})  # constants would be computed as it is compiled
        self.globals.pop("lipsum", None)
        self.filters = _Filters()
        for name, function in (FILTERS | {"join": _join, "list": lambda value: list(weighed(list(value)))}).items():
            self.filters[name] = function

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _fits(_formatted(left, right))
        elif operator == "*":
            _fits(max(_times(left, right), _times(right, left)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 0:
            _fits(left.bit_length() * right, _MOST)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        size = _METHODS.get(getattr(__obj, "__name__", ""))
        if size is not None:
            subject = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # `format` is wrapped
            if isinstance(subject, (str, bytes, int)):
                _small(args, kwargs)
                _fits(size(subject, *args, **kwargs))
        made = super().call(__context, __obj, *args, **kwargs)
        return weighed(made) if type(made) is dict else made

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        found = list(parts)
        if sum(map(len, found)) > LONGEST_TEXT:
            _fits(LONGEST_TEXT + 1)
        return "".join(found)

    @staticmethod
    def weighed(value: Any) -> Any:
        """A list, tuple or dict, if what it comes to when it is written out is no more than LONGEST_TEXT."""
        _fits(_weight(value))
        return value


class _Generator(CodeGenerator):
    """Has what is joined by many `~`, and lists that a template writes, measured."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if len(node.nodes) < _FEW:  # the memory that they take is seen as they are joined one after the other
            super().visit_Concat(node, frame)
            return
        self.write("environment.concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def _weighed(self, node: Any, parts: list[Any], frame: Frame, visit: Callable[[Any, Frame], None]) -> None:
        if getattr(node, "ctx", "load") != "load" or all(isinstance(part, nodes.Const) for part in parts):
            visit(node, frame)
            return
        self.write("environment.weighed(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._weighed(node, node.items, frame, super().visit_List)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._weighed(node, node.items, frame, super().visit_Tuple)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._weighed(node, [part for pair in node.items for part in (pair.key, pair.value)], frame, super().visit_Dict)


class _Template(jinja2.Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        if within._open:
            return super().render(*args, **kwargs)
        with within(jinja2.TemplateRuntimeError, "it"):
            return super().render(*args, **kwargs)


Environment.code_generator_class = _Generator
Environment.template_class = _Template
weighed = Environment.weighed


def _weight(value: Any) -> int:
    """Characters and values in something nested; a part that is there twice counts twice."""
    found, left = 0, [value]
    while left and found <= LONGEST_TEXT:
        one = left.pop()
        found += 1 + (len(one) if isinstance(one, (str, list, tuple, dict)) else 0)
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, (list, tuple)):
            left += one
    return found


def _fits(size: int, most: int | None = None) -> None:
    if size > (LONGEST_TEXT if most is None else most):
        raise jinja2.TemplateRuntimeError(
            f"it makes a text, a list or a number that is too long (over {LONGEST_TEXT} characters)"
        )


def _small(args: Any, kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _fits(value, _MOST)


def _times(value: Any, by: Any) -> int:
    if not isinstance(by, int):
        return 0
    if isinstance(value, int):
        return (value.bit_length() + by.bit_length()) * LONGEST_TEXT // _MOST
    return (_weight(value) if isinstance(value, (str, list, tuple)) else 0) * by


def _formatted(text: str, given: Any) -> int:
    _small(given if isinstance(given, tuple) else (given,), {})
    places = 1 if isinstance(given, tuple) else text.count("%") + text.count("{")
    return len(text) + sum(int(number[:12]) for number in re.findall(r"\d+", text)) + places * _weight(given)


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> int:
    return len(str(text)) + str(text).count(str(old)) * len(str(new))


def _longest(text: Any, *args: Any, **kwargs: Any) -> int:
    """For what may be put before, behind or between any two characters."""
    return len(str(text)) * max(1, *(_length(value) for value in (*args, *kwargs.values())))


def _length(value: Any) -> int:
    return value if isinstance(value, int) else len(value) if isinstance(value, str) else 0


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    return len(str(text)) + (str(text).count("\n") + 1) * _length(width)


def _of_arguments(*_: Any, **__: Any) -> int:
    return 0  # which are small


_FILTERS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "indent": _indented,
    "wordwrap": _longest,
    "urlize": _longest,
    "format": lambda text, *args, **kwargs: _formatted(str(text), args or kwargs),
    "tojson": lambda value, *_, indent=None, **__: _weight(value) * _length(indent) if indent else 0,
    "sum": lambda value, attribute=None, start=0: 0 if isinstance(start, (int, float)) else LONGEST_TEXT + 1,
    **dict.fromkeys(("center", "batch", "slice", "round", "truncate"), _of_arguments),
}
_METHODS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "format": lambda text, *args, **kwargs: _formatted(text, {**dict(enumerate(args)), **kwargs}),
    "format_map": lambda text, given: _formatted(text, given),
    "join": lambda text, parts: len(text) * len(parts) + _weight(list(parts)),
    "translate": lambda text, table: len(text) * _weight(table),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _of_arguments),
}
"""What filters and methods make at most, by what they are given."""


class _Filters(dict[str, Callable[..., Any]]):
    """Filters that first count what they would make at most."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _measured(function, _FILTERS[name]) if name in _FILTERS else function)


def _measured(function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _small(args[first + 1 :], kwargs)
        _fits(size(*args[first:], **kwargs))
        return function(*args, **kwargs)

    return bounded


@jinja2.pass_eval_context
def _join(eval_ctx: Any, value: Any, d: str = "", attribute: Any = None) -> str:
    parts = list(value)
    _fits(_weight(parts) + len(str(d)) * len(parts))
    return str(do_join(eval_ctx, parts, d, attribute))


# --- files ----------------------------------------------------------------------------------------


_WILD = re.compile(r"\*\*/(?:\*\*/)+")
"""`**/` again and again, which matches what one does, and takes far longer."""


def expand(pattern: str, error: Callable[[str], Exception]) -> list[str]:
    """The paths that a glob matches."""
    with within(error, f"{pattern}: to look for it"):
        return glob.glob(_WILD.sub("**/", pattern), recursive=True) if "\0" not in pattern else []


def opened(path: Path) -> BinaryIO:
    """A file for reading. Raises OSError also for what is none, such as a pipe, a device or what is below /proc."""
    kernel = {os.stat(place).st_dev for place in ("/proc", "/sys") if os.path.isdir(place)}
    facts = path.stat()  # to open a pipe or a device may wait, or do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if stat.S_ISREG(facts.st_mode) else None
    if descriptor is None or os.fstat(descriptor).st_dev in kernel:
        if descriptor is not None:
            os.close(descriptor)
        is_folder = stat.S_ISDIR(facts.st_mode)
        number, reason = (errno.EISDIR, "is a folder") if is_folder else (errno.EINVAL, "is no regular file")
        raise OSError(number, reason, str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = LARGEST_FILE) -> bytes:
    """All of a file. Raises OSError as `opened` does, and for a file of more bytes."""
    with opened(path) as stream:
        if os.fstat(stream.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"has more than {most} bytes", str(path))
        return stream.read()


def read_text(path: Path, most: int = LARGEST_FILE) -> str:
    """Read all of a file as text. Raises OSError, and ValueError for what is not UTF-8 or no path."""
    return read_bytes(path, most).decode("utf-8")


def known_json(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file that lorafit wrote; None where there is none that can be read."""
    try:
        return dict(json.loads(read_text(file)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, an adapter or a run. Raises ModelError."""
    try:
        value = json.loads(read_text(file))
    except OSError as error:
        raise ModelError(f"{file}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected an object")
    return value
