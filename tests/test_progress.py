"""What is told of long work: when, how far it is, and that it is told in every command."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import RecipeMaker
from transformers.models.llama.modeling_llama import LlamaModel
from typer.testing import CliRunner
from wording import Like

from lorafit import progress
from lorafit.cli import app
from lorafit.rows import read_rows

SHARE = re.compile(r"\((\d+)%\)")


class Clock:
    """A time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def at(self, seconds: float) -> None:
        self.now = 1000.0 + seconds
        display().look()


def display() -> Any:
    assert progress._display is not None
    return progress._display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a log gets, of a display whose thread only looks when the test does."""
    monkeypatch.setattr(progress._Display, "_watch", lambda self: None)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with progress.telling():
        yield stream


@pytest.fixture
def clock(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(monkeypatch)
    display().last = made.now
    return made


def lines(log: io.StringIO) -> list[str]:
    return log.getvalue().splitlines()


def test_long_work_is_told_of_at_once_and_then_every_half_minute(log: io.StringIO, clock: Clock) -> None:
    with progress.stage("copying", 200, "files") as copying:
        clock.at(2)
        assert lines(log) == []
        clock.at(4)
        assert len(lines(log)) == 1
        assert "0 of 200 files (0%)" in lines(log)[0]
        copying.advance(50)
        clock.at(20)
        assert len(lines(log)) == 1
        for number, seconds in enumerate((40, 75, 110), start=2):  # the same step all the while
            clock.at(seconds)
            assert len(lines(log)) == number
    assert lines(log)[1] == Like("… 50 of 200 files (25%) … 2 min")
    assert len(lines(log)) == 5, "and that it is done"
    assert "copying" in lines(log)[-1]


def test_short_work_is_not_told_of(log: io.StringIO, clock: Clock) -> None:
    for number in range(14):
        with progress.stage("a moment", 1):
            clock.at(2 * number)
            clock.at(2 * number + 1.9)
    assert lines(log) == []


def test_many_short_stages_are_told_of_as_well(log: io.StringIO, clock: Clock) -> None:
    for number in range(31):
        with progress.stage(f"file {number}", 1):
            clock.at(2 * number + 1.9)
    assert [line.split(":")[0] for line in lines(log)] == ["file 15", "file 30"]


def test_a_failure_is_not_told_of_as_done(log: io.StringIO, clock: Clock) -> None:
    with contextlib.suppress(OSError), progress.stage("writing"):
        clock.at(60)
        raise OSError
    with progress.stage("clearing"):
        clock.at(120)
    assert [line.split(":")[0] for line in lines(log)] == ["writing", "clearing", "clearing"]


def test_what_is_within_another_stage_is_told_with_it(log: io.StringIO, clock: Clock) -> None:
    with progress.stage("training", 10, "steps", done=4) as training:
        training.advance(3)
        with progress.stage("validating", 4, "batches") as validating:
            validating.advance()
            progress.partly_done(0.5)
            clock.at(30)
    outer, inner = lines(log)[0].split("; ")
    assert outer == Like("… training: 7 of 10 steps (70%) … 30 s"), "the first four cost no time now"
    assert "validating: 1 of 4 batches (38%)" in inner


def test_a_thread_is_told_of_where_the_command_waits(log: io.StringIO, clock: Clock) -> None:
    def hash_files() -> None:
        with progress.stage("hashing", 4e9, "bytes") as hashing:
            hashing.advance(1e9)
            begun.set()
            over.wait(10)

    begun, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=hash_files)
    thread.start()
    assert begun.wait(10)
    with progress.stage("busy", 10):
        clock.at(5)
    with progress.stage("waiting"):
        clock.at(40)
    over.set()
    thread.join()
    assert "hashing" not in lines(log)[0]
    assert "hashing: 1.00 of 4.00 GB (25%)" in lines(log)[1]


def test_libraries_bars_count_for_the_stage(log: io.StringIO, clock: Clock) -> None:
    place = type("library", (), {"tqdm": None})
    with progress.stage("loading") as loading, progress.counting((place, "tqdm")):
        for number in place.tqdm(iter(range(8)), total=8, desc="Loading weights"):  # type: ignore[misc]
            if number == 6:
                clock.at(10)
        with place.tqdm(total=3, disable=True) as bar:  # type: ignore[misc]
            bar.set_description("other")
            bar.update(2)
            clock.at(50)
    assert place.tqdm is None
    assert loading.total is None, "the bar is over"
    assert [SHARE.findall(line) for line in lines(log)[:2]] == [["75"], ["67"]]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet"])
def test_a_data_file_is_known_by_its_size(kind: str, log: io.StringIO, clock: Clock, tmp_path: Path) -> None:
    """So that reading rows that nobody has counted has a share."""
    rows = [{"text": f"{number} {hash(str(number))} {hash(str(-number))}"} for number in range(30_000)]
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        lines_of = {"json": [json.dumps(rows)], "csv": ["text", *(row["text"] for row in rows)]}
        content = "\n".join(lines_of.get(kind, map(json.dumps, rows))).encode()
        pack = {"gz": gzip.compress, "zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True)}
        file.write_bytes(pack.get(file.suffix[1:], bytes)(content))
    for number, _ in enumerate(progress.each(read_rows(str(file)), "counting", None)):
        if number == 15_000:
            clock.at(10)
    (share,) = map(int, SHARE.findall(lines(log)[0]))
    assert 20 < share < 90
    assert "about" in lines(log)[0]


def test_only_the_first_process_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.telling():
        assert progress._display is None
        assert progress.talk().quiet
        with progress.stage("anything", 3) as anything:
            anything.advance()
    assert list(progress.each("abc", "letters", 3)) == ["a", "b", "c"]


def test_a_forked_process_tells_nothing(log: io.StringIO) -> None:
    """Such as one that loads data: it has no thread to tell, and a lock may be held for ever."""
    with progress.stage("training"), display().lock:
        child = os.fork()
        if not child:
            with progress.stage("packing", 3) as packing:
                packing.advance()
            os._exit(0 if progress._display is None else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_bars_on_a_terminal_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a remark stands above them, whole."""
    monkeypatch.setattr(progress, "DRAWN", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress.telling():
        for item in progress.each(range(4), "copying", 4, "files"):
            until(lambda count=item: f"{count} of 4 files" in terminal.getvalue())
            progress.talk().print(f"remark {item}", highlight=False)
        assert display().bars is None
    shown = terminal.getvalue()
    assert all(re.search(rf"\x1b\[2Kremark {item}$", shown, re.MULTILINE) for item in range(4)), shown
    assert shown.rstrip().endswith("\x1b[2K"), "the bars' lines are cleared"


def until(there: Callable[[], bool]) -> None:
    """Wait until something is so; at most ten seconds."""
    for _ in range(1000):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("nothing came")


# --- every command --------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model each of whose passes lasts until another line came, where a line may come 30 times a second."""
    monkeypatch.setattr(progress, "EVERY", 0.03)
    forward, told = LlamaModel.forward, progress._Display.tell
    count = 0

    def tell(self: Any, line: str) -> None:
        nonlocal count
        told(self, line)
        count += 1

    def pass_on(self: Any, *args: Any, **kwargs: Any) -> Any:
        if progress._display is not None and progress._display.own:
            before = count
            until(lambda: count > before)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(progress._Display, "tell", tell)
    monkeypatch.setattr(LlamaModel, "forward", pass_on)


def lorafit(*words: object) -> tuple[Any, list[str]]:
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr.splitlines()


def told(log: list[str], what: str) -> None:
    """Each of its lines has a share, which grows, and where some of it is done the time that is left."""
    own = [part for line in log for part in line.split("; ") if part.startswith(f"{what}: ") and "done in" not in part]
    shares = [int(found) for part in own for found in SHARE.findall(part)]
    assert own, f"{what}: {log}"
    assert len(shares) == len(own)
    assert any(share > 0 for share in shares), own
    assert all(" left" in part for part in own)
    assert any("about" in part for part in own)


def test_every_command_tells_how_far_it_is(recipe: RecipeMaker, slow: None, tmp_path: Path) -> None:
    path = recipe(
        dataset={"validation": 0.5},
        training={"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
        | {"per_device_eval_batch_size": 4, "logging_steps": 3, "eval_steps": 2, "eval_strategy": "steps"},
        eval={"forgetting": ["chat"]},
    )
    result, log = lorafit("train", path)
    told(log, "training")
    told(log, "validating")
    assert any(line.startswith("training") and "validating" in line for line in log), "with the steps so far"
    assert any(re.match(r"step 3/3 .*loss", line) for line in log)
    run = result["run"]
    _, log = lorafit("eval", run, "--max-new-tokens", 3, "--limit", 3)
    for model in ("base", "adapter"):
        told(log, f"answers of {model} on heldout")
    assert any(line == Like("likelihood … base … heldout") for line in log)
    assert any(line == Like("divergence … adapter … chat") for line in log)
    _, log = lorafit("merge", run, "--output", tmp_path / "merged")
    for whose in ("the adapter's", "the base's", "the merged model's"):
        told(log, f"comparing {whose} answers")
    sizes = ("--prompt-tokens", 4, "--batch", 1, "--new-tokens", 2, "--rounds", 1)
    told(lorafit("bench", run, "--model", "base,adapter", *sizes)[1], "timing")
    told(lorafit("smoke", path, "--steps", 3)[1], "training")
