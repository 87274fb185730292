"""The tensors of a model folder, read one by one, and the same layout for what is written.

A tensor is known by its key, type, shape and place. Reading is plain reading into memory of our own: mapped
files would count as resident, and stay so.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from lorafit.errors import ModelError
from lorafit.facts import Shard, Tensor, by_name, read_shard, weight_files

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by safetensors' names. Others can be copied, not computed with."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
_BITS = dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8)
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "U16": 16, "U32": 32, "U64": 64}


class Store:
    """The tensors of a folder of safetensors files. Raises ModelError for files that are not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = weight_files(folder)
        if odd := next((file for file in files if file.parent != folder), None):
            raise ModelError(f"{odd}: the weights must be in the model's folder itself, not below or beside it")
        self.shards = tuple(map(_checked, files))
        self.tensors = by_name(self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    def read(self, tensor: Tensor, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or some of its rows, in its stored type."""
        if tensor.dtype not in DTYPES:
            raise ModelError(f"{tensor.file}: {tensor.name} is of type {tensor.dtype}, which can't be added to")
        shape, begin, size = tensor.shape, tensor.begin, tensor.bytes
        if rows is not None:
            begin += rows.start * tensor.row_bytes
            size = (rows.stop - rows.start) * tensor.row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        made = torch.empty(size, dtype=torch.uint8)
        read_into(tensor.file, begin, made)
        return made.view(DTYPES[tensor.dtype]).view(shape)


def _checked(file: Path) -> Shard:
    """A shard with its tensors in order of place, each as long as its type and shape say."""
    shard = read_shard(file)
    for tensor in shard.tensors:
        bits = bits_of(tensor.dtype)
        if bits is None or tensor.begin < len(shard.header) or 8 * tensor.bytes != tensor.size * bits:
            raise ModelError(
                f"{file}: not a whole safetensors file: {tensor.name} is no {tensor.dtype} of {tensor.shape}"
            )
    return replace(shard, tensors=tuple(sorted(shard.tensors, key=lambda tensor: (tensor.begin, tensor.name))))


def read_into(file: Path, begin: int, buffer: torch.Tensor) -> None:
    """Fill a tensor of bytes from a place in a file. Raises ModelError if the file ends before."""
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done : done + (1 << 30)]], begin + done)
            if not count:
                raise ModelError(f"{file}: ends in the middle of a tensor; was it changed just now?")
            done += count
    finally:
        os.close(descriptor)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """(bytes,) of a tensor, without a copy where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Change:
    """What becomes of a stored tensor: another type or shape."""

    dtype: str
    shape: tuple[int, ...]


def new_shards(
    store: Store, changes: Mapping[str, Change | None], added: Mapping[str, Mapping[str, Change]]
) -> tuple[Shard, ...]:
    """The layout of the output: that of the store, byte for byte, but for what changes.

    Args:
        changes: by key; None for a tensor that is left out.
        added: new tensors by the shard that they go to, behind its own.
    """
    made = []
    for shard in store.shards:
        entries = [
            (tensor.name, changes.get(tensor.name, Change(tensor.dtype, tensor.shape))) for tensor in shard.tensors
        ]
        kept = [(key, change) for key, change in entries if change is not None]
        kept += added.get(shard.name, {}).items()
        if [(t.name, t.dtype, t.shape) for t in shard.tensors] == [(k, c.dtype, c.shape) for k, c in kept]:
            made.append(shard)
        elif kept:
            made.append(_new_shard(shard.name, kept, _metadata(shard.header)))
    return tuple(made)


def _metadata(header: bytes) -> dict[str, str]:
    found = json.loads(header[8:]).get("__metadata__")
    return found if isinstance(found, dict) else {"format": "pt"}


def _new_shard(name: str, entries: Iterable[tuple[str, Change]], metadata: dict[str, str]) -> Shard:
    places: dict[str, Any] = {"__metadata__": metadata}
    begin, sizes = 0, []
    for key, change in entries:
        size = prod(change.shape) * (bits_of(change.dtype) or 0) // 8
        places[key] = {"dtype": change.dtype, "shape": list(change.shape), "data_offsets": [begin, begin + size]}
        sizes.append((key, change, begin, size))
        begin += size
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    tensors = tuple(
        Tensor(key, c.shape, c.dtype, Path(name), len(header) + at, len(header) + at + size)
        for key, c, at, size in sizes
    )
    return Shard(name, header, tensors, len(header) + begin)


def bits_of(dtype: str) -> int | None:
    """Bits of one number of a type by safetensors' name; None for one that isn't known."""
    return DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _BITS.get(dtype)


def write_index(shards: tuple[Shard, ...], source: Path, folder: Path) -> None:
    """model.safetensors.index.json where there is more than the one file, with the true total size in bytes."""
    index = "model.safetensors.index.json"
    if len(shards) == 1 and shards[0].name == "model.safetensors":
        return
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    metadata: dict[str, Any] = {}
    if (source / index).is_file():
        found = json.loads((source / index).read_text(encoding="utf-8")).get("metadata")
        metadata = found if isinstance(found, dict) else {}
    metadata["total_size"] = sum(tensor.bytes for tensor in tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(tensor.size for tensor in tensors)
    places = {tensor.name: tensor.file.name for tensor in tensors}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
    (folder / index).write_text(text, encoding="utf-8")
