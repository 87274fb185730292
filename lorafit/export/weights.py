"""The tensors of a model folder's safetensors files, read a few rows at a time (no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorafit.errors import ModelError
from lorafit.facts import stored_tensors, weight_files

_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder. Raises ModelError for files that are missing or not whole."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder) or [folder / "model.safetensors"]:
        for tensor, (begin, _) in stored_tensors(file):
            if tensor.name in tensors:
                raise ModelError(f"{file}: {tensor.name} is in {tensors[tensor.name].file.name} as well")
            tensors[tensor.name] = Tensor(tensor.name, file, tensor.dtype, tensor.shape, begin)
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
