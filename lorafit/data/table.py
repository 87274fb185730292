"""Tokenized sources as Arrow files, written batch by batch and read by mapping them into memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lorafit.audit import SourceAudit, source_from_dict
from lorafit.data.encode import TokenRow

Keys: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
TRAINED = ["input_ids", "labels"]
"""The columns that the trainer takes; the others are for people and for the audit."""
_TOKENS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "question": pa.string(),
        "file": pa.string(),
        "number": pa.int64(),
        "key": pa.int64(),
        "learned": pa.int32(),
        "length": pa.int32(),
    }
)


def write_table(folder: Path, batches: Iterable[list[TokenRow]], audit: SourceAudit) -> None:
    """Write rows.arrow and audit.json; `audit` is what the batches counted, complete when they end."""
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        for batch in batches:
            if batch:
                writer.write_batch(_record_batch(batch))
    (folder / "audit.json").write_text(json.dumps(dataclasses.asdict(audit)), encoding="utf-8")


def read_table(folder: Path) -> tuple[Dataset, SourceAudit]:
    """What `write_table` wrote. The rows stay on the disk. Raises ValueError for a damaged file."""
    audit = source_from_dict(json.loads((folder / "audit.json").read_text(encoding="utf-8")))
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    if len(rows) != audit.rows:
        raise ValueError(f"{folder}: has {len(rows)} rows instead of {audit.rows}")
    return rows, audit


def column(rows: Dataset, name: str) -> Any:
    """A column of numbers of a whole (not selected) data set, as a NumPy array."""
    return rows.data.column(name).to_numpy()


def _record_batch(batch: list[TokenRow]) -> pa.RecordBatch:
    lengths = [len(row.input_ids) for row in batch]
    offsets = np.cumsum([0, *lengths], dtype=np.int32)

    def tokens(name: str) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, np.concatenate([getattr(row, name) for row in batch]))

    def plain(name: str) -> pa.Array:
        return pa.array([getattr(row, name) for row in batch], _SCHEMA.field(name).type)

    columns = [plain(name) for name in ("question", "file", "number", "key", "learned")]
    return pa.record_batch(
        [tokens("input_ids"), tokens("labels"), *columns, pa.array(lengths, pa.int32())], schema=_SCHEMA
    )
