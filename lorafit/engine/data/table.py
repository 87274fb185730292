"""Tokenized sources as Arrow files, written batch by batch and mapped into memory; and how their rows are split,
weighted and compared by key."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lorafit.engine.data.encode import TokenRow
from lorafit.plan.methods import SFT
from lorafit.rows.audit import SourceAudit, source_from_dict

Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""A key, the learned tokens and the length of each row: what is compared, split and counted without reading tokens."""
NUMBERS = np.dtype([("key", "<i8"), ("learned", "<i4"), ("length", "<i4")])
TRAINED = list(SFT.columns)
"""The columns that the trainer takes; the others are for people and for the audit."""
_TOKENS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "question": pa.string(),
        "file": pa.string(),
        "number": pa.int64(),
        "answer": pa.string(),
        "asked": pa.int32(),
        "prompt": _TOKENS,
    }
)


def write_table(folder: Path, batches: Iterable[list[TokenRow]], audit: SourceAudit) -> None:
    """Write rows.arrow, numbers.bin and audit.json; `audit` is what the batches counted, complete when they end."""
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
        (folder / "numbers.bin").open("wb") as numbers,
    ):
        for batch in filter(None, batches):
            writer.write_batch(_record_batch(batch))
            numbers.write(np.array([(row.key, row.learned, len(row.input_ids)) for row in batch], NUMBERS).tobytes())
    (folder / "audit.json").write_text(json.dumps(dataclasses.asdict(audit)), encoding="utf-8")


def read_table(folder: Path) -> tuple[Dataset, Numbers, SourceAudit]:
    """What `write_table` wrote. The tokens stay on the disk. Raises ValueError for a damaged file."""
    audit = source_from_dict(json.loads((folder / "audit.json").read_text(encoding="utf-8")))
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    file = folder / "numbers.bin"
    numbers: Numbers = np.memmap(file, NUMBERS, "r") if file.stat().st_size else np.empty(0, NUMBERS)
    if not len(rows) == len(numbers) == audit.rows:
        raise ValueError(f"{folder}: has {len(rows)} rows and {len(numbers)} numbers instead of {audit.rows}")
    return rows, numbers, audit


def _record_batch(batch: list[TokenRow]) -> pa.RecordBatch:
    lengths = [len(row.input_ids) for row in batch]
    offsets = np.cumsum([0, *lengths], dtype=np.int32)

    def tokens(name: str) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, np.concatenate([getattr(row, name) for row in batch]))

    def plain(name: str) -> pa.Array:
        return pa.array([getattr(row, name) for row in batch], _SCHEMA.field(name).type)

    columns = [plain(name) for name in _SCHEMA.names[2:]]
    return pa.record_batch([tokens("input_ids"), tokens("labels"), *columns], schema=_SCHEMA)


# --- rows by key ----------------------------------------------------------------------------------

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Keys: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_ROWS_AT_ONCE = 1 << 18


def split(keys: Keys, count: int, seed: int) -> tuple[Indices, Indices]:
    """Training and validation indices, in order. `count` rows are held out, taken at random.

    Rows with equal keys stay together, so that no validation row is a training row as well; where
    that does not come out even, fewer than `count` are held out (but always some).
    """
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    held = np.zeros(len(sizes), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(sizes))
    missing = count
    for index in order:
        if sizes[index] <= missing:
            held[index] = True
            missing -= sizes[index]
        if not missing:
            break
    if not held.any() and len(sizes) > 1:
        held[order[int(np.argmin(sizes[order]))]] = True
    chosen = held[group]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def weighted(indices: Indices, weight: float, seed: int) -> Indices:
    """The indices as often as the weight says: all of them for each whole, and a random part for the rest."""
    whole = int(weight)
    parts = [indices] * whole
    rest = round(weight * len(indices)) - whole * len(indices)
    if rest:
        parts.append(np.sort(np.random.default_rng(seed).choice(indices, rest, replace=False)))
    return np.concatenate(parts) if parts else indices[:0]


def repeated(keys: Keys) -> tuple[int, int, int]:
    """How many rows repeat an earlier one, the first that does, and the one that it repeats."""
    count = 0
    first: tuple[int, int] | None = None
    for part, places in _parts(keys):
        _, where, group = np.unique(part, return_index=True, return_inverse=True)
        again = np.ones(len(part), dtype=bool)
        again[where] = False
        count += int(again.sum())
        if again.any():
            one = int(np.argmax(again))
            found = int(places[one]), int(places[where[group[one]]])
            first = min(first, found) if first else found
    return (count, *first) if first else (0, 0, 0)


def shared(keys: Keys, others: Keys) -> tuple[int, int, int]:
    """How many rows are among the others too, the first that is, and the one that it equals."""
    mask = np.isin(keys, others)
    if not mask.any():
        return 0, 0, 0
    first = int(np.argmax(mask))
    return int(mask.sum()), first, int(np.argmax(others == keys[first]))


def _parts(keys: Keys) -> Any:
    """The keys in parts that hold all equal ones, so that sorting needs little memory."""
    parts = 1 + len(keys) // _ROWS_AT_ONCE
    for part in range(parts):
        places = np.flatnonzero(keys % parts == part)
        yield keys[places], places
