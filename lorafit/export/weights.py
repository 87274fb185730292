"""The tensors of a model folder's safetensors files, read a few rows at a time (no torch)."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorafit.errors import ModelError

_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is.

    Attributes:
        shape: sizes, outermost first, as in torch.
        dtype: "F32", "F16" or "BF16", as the file's header has it.
        begin: its first byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def rows(self, begin: int, end: int) -> Rows:
        """Rows `begin` to `end` (of a tensor with one dimension: its numbers), shape (end - begin, ...), in float32."""
        inner = self.shape[1:]
        width = math.prod(inner)
        kind = _TYPES[self.dtype]
        with self.file.open("rb") as stream:
            stream.seek(self.begin + begin * width * kind.itemsize)
            data = np.fromfile(stream, dtype=kind, count=(end - begin) * width)
        if data.size != (end - begin) * width:
            raise ModelError(f"{self.file}: the file is cut off at {self.name}; merge again")
        if self.dtype == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        rows: Rows = data.astype(np.float32, copy=False).reshape(end - begin, *inner)
        return rows


def safetensors_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """A safetensors file's header without its metadata, and the place of its first tensor byte.

    Format: https://github.com/huggingface/safetensors#format. Raises ModelError.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_LONGEST_HEADER, file.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header, 8 + length


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the shards that its index names. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index}: not an index of safetensors files") from None
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for file in (folder / name for name in names):
        header, start = safetensors_header(file)
        for name, entry in header.items():
            if name in tensors:
                raise ModelError(f"{file}: {name} is in {tensors[name].file.name} as well")
            tensors[name] = Tensor(
                name, file, str(entry["dtype"]), tuple(entry["shape"]), start + entry["data_offsets"][0]
            )
    return tensors


def is_readable(tensor: Tensor) -> bool:
    """Whether the numbers are plain floats of 16 or 32 bits."""
    return tensor.dtype in _TYPES


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, number by number."""
    if one.shape != other.shape:
        return False
    step = max(1, (16 << 20) // max(1, math.prod(one.shape[1:])))
    return all(
        np.array_equal(one.rows(at, end), other.rows(at, end))
        for at in range(0, one.shape[0], step)
        for end in [min(at + step, one.shape[0])]
    )
