"""Measurements row by row, written to disk as they come, so that an interrupted evaluation can go on.

A file for each set, model and kind (likelihood, divergence, options, answers, judge), one JSON object a row, in the
order in which rows were done. `key.json` says what the records depend on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from lorafit.bounds import known_json
from lorafit.errors import DriftError, UsageError
from lorafit.files import Seal, claim, discard, read_seal, write_bytes, write_text

_KEY = "key.json"
_TIMES = "times.jsonl"


class Records:
    """A folder of records."""

    def __init__(self, folder: Path, key: dict[str, Any], resume: bool) -> None:
        """Begin, or go on with what is there. Raises UsageError if that was measured in another way."""
        self.folder = folder
        if resume:
            _check(folder, key)
        else:
            claim(folder, "records", "the records of an evaluation")
            discard(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._names = {_KEY, *(read_seal(folder) or Seal("records", {})).names}
        Seal("records", dict.fromkeys(self._names)).write(folder)
        write_text(folder / _KEY, json.dumps(key, indent=2) + "\n")

    def done(self, *names: str) -> frozenset[int]:
        """The rows that are there."""
        return frozenset(self._offsets(*names))

    @contextlib.contextmanager
    def writer(self, *names: str, timed: bool = True) -> Iterator[Any]:
        """A function that adds a record; what was cut off by a kill is taken away first.

        Args:
            timed: whether the time until the block ends counts as that of these records.
        """
        file = self._own(self._file(*names))
        whole = sum(len(line) for _, line in _lines(file))
        began, added = time.perf_counter(), 0
        with file.open("ab") as stream:
            stream.truncate(whole)

            def add(record: dict[str, Any]) -> None:
                nonlocal added
                stream.write(_packed(record))
                stream.flush()
                added += 1

            try:
                yield add
            finally:
                if timed:
                    seconds = time.perf_counter() - began
                    with self._own(self.folder / _TIMES).open("ab") as times:
                        times.write(_packed({"of": names, "seconds": seconds, "records": added}))

    def read(self, *names: str) -> Iterator[dict[str, Any]]:
        """All records, in the order in which they were written."""
        file = self._file(*names)
        return (_unpacked(line, file) for _, line in _lines(file))

    def by_row(self, *names: str) -> ByRow:
        """Records by their row, without holding them in memory."""
        return ByRow(self._file(*names), self._offsets(*names))

    def seconds(self, model: str, *of: str) -> float:
        """How long a model was run, all times together; with `of`, a set and a kind, for these alone."""
        times = [entry for entry in self._times() if entry["of"][1:2] == [model]]
        if of:
            times = [entry for entry in times if entry["of"] == [of[0], model, *of[1:]]]
        return float(sum(entry["seconds"] for entry in times))

    def timed(self, *names: str) -> int:
        """How many of these records were written in a time that is known: a kill leaves none."""
        return sum(entry["records"] for entry in self._times() if entry["of"] == list(names))

    def write(self, value: Any, *names: str) -> None:
        """Keep something whole that is not by row."""
        write_bytes(self._own(self.folder / f"{'.'.join(names)}.json"), _packed({"value": value}))

    def whole(self, *names: str) -> Any:
        """The value that `write` kept; None if there is none."""
        file = self.folder / f"{'.'.join(names)}.json"
        return _unpacked(file.read_bytes(), file)["value"] if file.exists() else None

    def discard(self) -> None:
        """Remove them: the evaluation is finished."""
        discard(self.folder)

    def _times(self) -> list[dict[str, Any]]:
        file = self.folder / _TIMES
        return [_unpacked(line, file) for line in file.read_bytes().splitlines()] if file.exists() else []

    def _file(self, *names: str) -> Path:
        return self.folder / f"{'.'.join(names)}.jsonl"

    def _own(self, file: Path) -> Path:
        """A file that is going to be written, listed in the seal before that."""
        if file.name not in self._names:
            self._names.add(file.name)
            Seal("records", dict.fromkeys(self._names)).write(self.folder)
        return file

    def _offsets(self, *names: str) -> dict[int, int]:
        file = self._file(*names)
        return {int(_unpacked(line, file)["row"]): offset for offset, line in _lines(file)}


class ByRow:
    """Records of a file by their row."""

    def __init__(self, file: Path, offsets: dict[int, int]) -> None:
        self.file, self.offsets = file, offsets

    def get(self, row: int) -> dict[str, Any] | None:
        if row not in self.offsets:
            return None
        with self.file.open("rb") as stream:
            stream.seek(self.offsets[row])
            return _unpacked(stream.readline(), self.file)


def _packed(record: dict[str, Any]) -> bytes:
    """A record as a line: the XXH3 of its JSON, and the JSON."""
    text = json.dumps(record).encode()
    return xxhash.xxh3_64(text).hexdigest().encode() + b" " + text + b"\n"


def _unpacked(line: bytes, file: Path) -> dict[str, Any]:
    """The record in a line that `_packed` made. Raises DriftError for a line that was changed."""
    digest, _, text = line.rstrip(b"\n").partition(b" ")
    if xxhash.xxh3_64(text).hexdigest().encode() != digest:
        raise DriftError(
            f"{file}: a record in it is not as it was written; start the evaluation anew, without --resume"
        )
    return dict(json.loads(text))


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The whole lines of a file, if it is there, and where each begins; what a kill cut off is none."""
    offset = 0
    if file.exists():
        with file.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    yield offset, line
                offset += len(line)


def _check(folder: Path, key: dict[str, Any]) -> None:
    before = known_json(folder / _KEY)
    if before is None:
        raise UsageError(f"{folder}: there is no interrupted evaluation to go on with; leave out --resume")
    now = json.loads(json.dumps(key))
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        raise UsageError(
            f"{folder}: the interrupted evaluation was another one (differs in {', '.join(changed)}); ask for the same "
            "as then, or start anew without --resume"
        )
