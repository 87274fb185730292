"""How far long work is: bars on a terminal, and in a log a line now and then. All on stderr.

    with stage("merging", total=size, unit="bytes") as merging:
        merging.advance(written)

What is entered only counts. A thread looks at it from time to time and tells, so that a single step that takes minutes
is told of as well, and work that takes a moment is not.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from lorafit.console import Console

T = TypeVar("T")
EVERY = 30.0
"""Seconds after which a log gets another line."""
FIRST = 3.0
"""Seconds after which it gets the first line of a stage."""
DRAWN = 0.2
"""Seconds between two looks of a terminal's bars, which come after twice that."""


@dataclass(eq=False)
class Stage:
    """A piece of work.

    Attributes:
        total: of `unit`; None: not known.
        done: so far.
        place: says what is done, where nobody counts: the position in a file.
        partly: what was done of the next ones, which are done together.
        note: what else is known at the moment, for a terminal.
        begun: the time when it began.
        skipped: what was done before it began, of which there is no speed.
        told: whether a line told of it.
    """

    what: str
    total: float | None = None
    unit: str = ""
    done: float = 0.0
    place: Callable[[], float] | None = None
    partly: float = 0.0
    note: str = ""
    told: bool = False

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.skipped = self.done

    def advance(self, by: float = 1) -> None:
        self.done += by
        self.partly = max(self.partly - by, 0.0)

    @property
    def so_far(self) -> float:
        if self.place is not None:
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile
                self.done = self.place()
        return self.done + self.partly

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def left(self) -> str:
        """The time that is left, at the speed so far; empty where there is none yet."""
        if not self.total or self.so_far <= self.skipped:
            return ""
        seconds = self.seconds / (self.so_far - self.skipped) * max(self.total - self.so_far, 0)
        return f"about {duration(seconds)} left"

    def share(self) -> str:
        """Such as "3 of 180 steps (2%)"; empty where the total isn't known."""
        if not self.total:
            return f"{int(self.done):,} {self.unit}" if self.done and self.unit != "bytes" else ""
        part = min(self.so_far / self.total, 1)
        if self.unit == "bytes":
            size, unit = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
            amount = f"{self.done / size:,.2f} of {self.total / size:,.2f} {unit}"
        else:
            amount = f"{int(self.done):,} of {int(self.total):,} {self.unit}".rstrip()
        return f"{amount} ({part:.0%})"

    def __str__(self) -> str:
        time = self.left() or f"{duration(self.seconds)} so far" + ", time left not known yet" * bool(self.total)
        return f"{self.what}: {', '.join(filter(None, (self.share(), time)))}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class _Display:
    """The stages that are under way, outermost first, and the thread that tells of them."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.on_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self.owner = threading.get_ident()
        self.own: list[Stage] = []
        self.others: list[Stage] = []  # of threads beside, told of where the own ones know no share
        self.lock = threading.RLock()
        self.over = threading.Event()
        self.thread: threading.Thread | None = None
        self.last = time.monotonic()
        self.bars: Progress | None = None
        self.tasks: dict[Stage, TaskID] = {}
        self.console: Console | None = None

    def begin(self, stage: Stage) -> None:
        with self.lock:
            (self.own if threading.get_ident() == self.owner else self.others).append(stage)
            if self.thread is None:
                self.thread = threading.Thread(target=self._watch, name="lorafit-progress", daemon=True)
                self.thread.start()

    def end(self, stage: Stage, whole: bool) -> None:
        with self.lock:
            for stages in (self.own, self.others):
                if stage in stages:
                    stages.remove(stage)
            if whole and stage.told and stage.seconds >= EVERY:
                self.tell(f"{stage.what}: done in {duration(stage.seconds)}")
            if not self.own:
                self._clear()

    def close(self) -> None:
        self.over.set()
        with self.lock:
            self._clear()

    def tell(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            print(line, file=self.stream, flush=True)
        self.last = time.monotonic()

    def _watch(self) -> None:
        while not self.over.wait(DRAWN if self.on_terminal else min(FIRST, EVERY) / 4):
            self.look()

    def look(self) -> None:
        """Draw the bars, or tell of the stages if that is due."""
        with self.lock:
            stages = self.own if self.own and self.own[-1].total else self.own + self.others
            if not stages or self.over.is_set():
                return
            if self.on_terminal:
                self._draw(stages)
                return
            now, inner = time.monotonic(), stages[-1]
            if now - self.last >= EVERY or (not inner.told and now - inner.begun >= min(FIRST, EVERY)):
                self.tell("; ".join(map(str, stages)))
                for stage in stages:
                    stage.told = True

    def _draw(self, stages: list[Stage]) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        if self.bars is None:
            if stages[0].seconds < 2 * DRAWN:
                return
            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(20 if talk().width >= 100 else 8),
                TextColumn("{task.fields[text]}"),
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                expand=True,
                console=talk(),
                transient=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self.bars.start()
        for stage in [known for known in self.tasks if known not in stages]:
            self.bars.remove_task(self.tasks.pop(stage))
        for stage in stages:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage.what, total=stage.total, text="", note="")
            text = f"{stage.share()}  {stage.left() or duration(stage.seconds)}".lstrip()
            self.bars.update(self.tasks[stage], total=stage.total, completed=stage.so_far, text=text, note=stage.note)
        self.bars.refresh()

    def _clear(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.tasks = None, {}


_display: _Display | None = None


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tell of the stages of the block; of several processes, the first does."""
    global _display
    before, _display = _display, _Display(sys.stderr) if is_first_process() else None
    try:
        yield
    finally:
        if _display is not None:
            _display.close()
        _display = before


def is_first_process() -> bool:
    """Whether this is the process that prints and writes, of the several that torchrun starts."""
    return os.environ.get("RANK", "0") == "0"


def _forget() -> None:
    """Have a forked process, such as one that loads data, tell nothing: its thread and its locks are the parent's."""
    global _display
    _display = None


os.register_at_fork(after_in_child=_forget)


def talk() -> Console:
    """Where remarks go: stderr, of the first process only, above the bars of a terminal."""
    from lorafit.console import Console

    if _display is None:
        return Console(stderr=True, quiet=not is_first_process())
    _display.console = _display.console or Console(file=_display.stream, stderr=True)
    return _display.console


def partly_done(partly: float) -> None:
    """Note how much is done of what the innermost stage counts next: half a batch's rows after half of its steps."""
    if _display is not None and _display.own:
        _display.own[-1].partly = partly


def told() -> None:
    """Note that the log got a line by other means."""
    if _display is not None:
        _display.last = time.monotonic()


@contextlib.contextmanager
def stage(
    what: str,
    total: float | None = None,
    unit: str = "",
    done: float = 0.0,
    place: Callable[[], float] | None = None,
) -> Iterator[Stage]:
    """A piece of work that is told of while the block lasts, if a command is under way."""
    made, display = Stage(what, total, unit, done, place), _display
    if display is None:
        yield made
        return
    display.begin(made)
    whole = False
    try:
        yield made
        whole = True
    finally:
        display.end(made, whole)


def each(
    items: Iterable[T], what: str, total: float | None, unit: str = "rows", size: Callable[[T], float] | None = None
) -> Iterator[T]:
    """Yield the items, each counted when the next is asked for, as one or as much of the total as `size` says."""
    with stage(what, total, unit) as counted:
        for item in items:
            yield item
            counted.advance(size(item) if size else 1)


class Counted:
    """A stand-in for tqdm that counts for the innermost stage, if that has no total of its own."""

    def __init__(self, items: Iterable[Any] = (), *_: Any, total: float | None = None, **__: Any) -> None:
        self.items = items
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        inner = _display.own[-1] if _display is not None and _display.own else None
        self.stage = inner if inner is not None and inner.total is None and total else None
        if self.stage is not None:
            self.stage.total, self.stage.done, self.stage.begun = total, 0.0, time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.items:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, by: float = 1) -> None:
        if self.stage is not None:
            self.stage.advance(by)

    def close(self) -> None:
        """Leave the stage to what follows."""
        if self.stage is not None:
            self.stage.total, self.stage.done, self.stage = None, 0.0, None

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.contextmanager
def counting(*places: tuple[Any, str]) -> Iterator[None]:
    """Have libraries' bars, each the attribute of a module, count for the stage of the block."""
    before = [(module, name, getattr(module, name)) for module, name in places]
    for module, name in places:
        setattr(module, name, Counted)
    try:
        yield
    finally:
        for module, name, bar in before:
            setattr(module, name, bar)
