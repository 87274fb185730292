"""What an evaluation found: row by row on the disk, as it comes, so that it can go on; and results.json, as types.

docs/results.schema.json is made from the types. A figure is named `SET.METRIC.MODEL`, such as
`heldout.exact_match.adapter`. Of records there is a file for each set, model and kind (likelihood, divergence, options,
answers, judge), one JSON object a row, in the order in which rows were done; `key.json` says what they depend on.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from lorafit.bounds import known_json
from lorafit.errors import DriftError, UsageError
from lorafit.files import Seal, claim, discard, read_seal, write_bytes, write_text

RESULTS_VERSION: Literal[3] = 3
FEWEST = 6
"""Rows that differ: of fewer, all may fall to one side by chance more often than in 5 of 100 cases (2 * 0.5 ** 5)."""


Better = Literal["higher", "lower"] | None
"""Which way a metric should go; None: neither, such as the length of an answer."""


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class Metric(Part):
    """What a figure measures."""

    name: str
    label: str
    """For people, such as `exact match`."""
    unit: Literal["share", "nats", "bits", "tokens", "number", "seconds"]
    better: Better
    """None: neither, such as the length of an answer."""


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Figure(Part):
    value: Number | None
    """None where no row has it."""
    low: Number | None
    """Lower end of the 95% bootstrap interval."""
    high: Number | None
    """Upper end of it."""
    rows: int
    """Rows that it is taken over."""


class Difference(Part):
    """A metric of one model minus that of another, on the same rows."""

    set: str
    metric: str
    model: str
    against: str
    value: float | None
    """model - against."""
    low: float | None
    """Lower end of the 95% interval of the paired bootstrap."""
    high: float | None
    """Upper end of it."""
    wins: int
    """Rows on which `model` is better (or higher, where neither is better)."""
    ties: int
    losses: int
    detectable: float | None
    """The smallest difference that this many rows would have shown with a probability of 80%."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero, and enough rows differ: resamples of few rows are too sure of them."""
        if self.low is None or self.high is None or self.wins + self.losses < FEWEST:
            return False
        return self.low > 0 or self.high < 0

    @property
    def is_same(self) -> bool:
        """Whether no row differs."""
        return self.low == self.high == 0


class Gate(Part):
    """A demand and whether it was met."""

    gate: str
    """The gate as it was written, such as `heldout.loss.adapter < heldout.loss.base (ci)`."""
    where: str
    """Where it was written: `eval.gates.0`, `--fail-under` or `--baseline`; `eval` for a loss that is not finite."""
    passed: bool
    sentence: str
    """The figures in it, for people: `heldout.exact_match.adapter is 0.75, and 0.8 was demanded`."""


class Set(Part):
    """Rows that the models were run on."""

    role: Literal["task", "forgetting", "benchmark"]
    source: str
    """A path, or what the rows are in words."""
    rows: int
    """Rows of which the likelihood was measured."""
    answered: int
    """Rows for which answers were generated."""
    sha256: str | None = None
    """SHA-256 of what the rows were read from, and which of them they are; equal for every model. None: not known."""
    metrics: tuple[Metric, ...]
    """Metrics in the order in which they are shown."""


class Model(Part):
    kind: Literal["base", "adapter", "trained", "merged"]
    path: str
    """A folder or hub id."""
    sha256: str | None
    """SHA-256 of the weights of an adapter or a model; None for a base."""
    quantization: str | None
    """Such as nf4; None where the weights are not quantized."""
    dtype: str
    seconds: float
    """Time that it was run, all sets together."""


class Speed(Part):
    """How fast answers were generated, in the batches of the evaluation."""

    model: str
    set: str
    tokens_per_second: float
    """New tokens of all rows of a batch."""
    latency_median: float
    """Seconds from the start of a row's batch to the row's end token."""
    latency_p95: float


class Results(Part):
    results_version: Literal[3] = RESULTS_VERSION
    run: str
    name: str
    created: str
    """ISO time, UTC."""
    versions: dict[str, str]
    hardware: dict[str, Any]
    settings: dict[str, Any]
    """What the figures depend on: seed, max_new_tokens, limit, and the eval section as it was used."""
    models: dict[str, Model]
    """Models by name, in the order in which they are shown: base first."""
    sets: dict[str, Set]
    figures: dict[str, Figure]
    differences: tuple[Difference, ...]
    gates: tuple[Gate, ...]
    speed: tuple[Speed, ...] = ()
    baseline: str | None = None
    """The earlier results.json that gates compared with."""
    remarks: tuple[str, ...] = ()
    """What a reader should know, a sentence each."""
    files: dict[str, str] = Field(default_factory=dict)
    """Files beside this one, by what they are: samples, report, html, junit."""

    def figure(self, set_name: str, metric: str, model: str) -> Figure | None:
        return self.figures.get(f"{set_name}.{metric}.{model}")

    @property
    def first(self) -> str:
        """The model that others are compared with: the base, if it is there."""
        return next(iter(self.models))

    @property
    def failed(self) -> list[Gate]:
        return [gate for gate in self.gates if not gate.passed]


class Answer(Part):
    """What one model made of a row."""

    text: str | None = None
    """The generated answer; None where none was."""
    ended: bool | None = None
    """Whether it ended by itself rather than at max_new_tokens."""
    chosen: str | None = None
    """The option with the highest likelihood, of a row with options."""
    scores: dict[str, float]
    """This row's value by metric."""


class Sample(Part):
    """A row of samples.jsonl."""

    set: str
    row: int
    """From 0, in the order of the set."""
    place: str
    """File and line."""
    prompt: str
    expected: str
    answers: dict[str, Answer]
    """Answers by model."""


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
