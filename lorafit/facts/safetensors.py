"""Safetensors files: those that a model is loaded from, and their headers, in a folder or over HTTP on a hub."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.bounds import opened, read_json
from lorafit.errors import ModelError
from lorafit.facts.model import Tensor
from lorafit.files import is_inside
from lorafit.progress import stage
from lorafit.text import first_line, printable

_MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself reads at most."""
_HUB_SECONDS = 5.0
"""How long a hub may be silent."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file.

    Attributes:
        header: its bytes before the tensors.
        tensors: in order of name where the file was read, in order of place where it is to be written.
        size: bytes of the whole file.
    """

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]
    size: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load (an index may name some that are not there)."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    others = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        _indexed(others)  # which transformers follows
        return []
    return _indexed(index)


def _indexed(index: Path) -> list[Path]:
    """The files that an index names. Raises ModelError for one outside its folder."""
    if not index.is_file():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: expected a weight_map of tensors to files")
    if odd := next((name for name in names.values() if not is_inside(name)), None):
        raise ModelError(f"{index}: {printable(odd)} is outside the model's folder")
    return [index.parent / name for name in sorted(set(names.values()))]


def stored_tensors(file: Path) -> tuple[Tensor, ...]:
    """The tensors of a safetensors file and their places, in order of name. Raises ModelError."""
    return read_shard(file).tensors


def read_shard(file: Path) -> Shard:
    """Header and tensors of a safetensors file. Raises ModelError for one that is not whole."""
    try:
        with opened(file) as stream:
            size = file.stat().st_size
            if size < 8:
                raise ValueError(f"it has {size} bytes")
            prefix = stream.read(8)
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes of {size}")
            text = stream.read(length)
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        tensors = tuple(_tensor(file, name, header[name], 8 + length) for name in sorted(header))
        last = max((tensor.end for tensor in tensors), default=8 + length)
        if last != size:
            raise ValueError(f"it is cut off: {size} bytes instead of {last}")
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    return Shard(file.name, prefix + text, tensors, size)


def hub_shards(name: str, revision: str) -> tuple[Shard, ...]:
    """The headers of a hub model's safetensors files, over HTTP and without the weights, in order of name.

    Empty for a model that has no such files. Raises ModelError where they can't be read, such as without access.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import NotASafetensorsRepoError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    try:
        with stage(f"reading the headers of {name}'s safetensors files"):
            found = HfApi().get_safetensors_metadata(name, revision=revision, timeout=_HUB_SECONDS).files_metadata
        return tuple(
            Shard(file, b"", tuple(_tensor(Path(file), key, vars(tensors[key]), 0) for key in sorted(tensors)), 0)
            for file, tensors in ((file, found[file].tensors) for file in sorted(found))
        )
    except NotASafetensorsRepoError:
        return ()
    except Exception as error:  # noqa: BLE001 - the client raises whatever its HTTP library does
        raise ModelError(f"{name}: the headers of its safetensors files can't be read: {first_line(error)}") from None


def by_name(shards: Iterable[Shard]) -> dict[str, Tensor]:
    """All tensors of some files. Raises ModelError for a name that two of them have."""
    found: dict[str, Tensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if (other := found.setdefault(tensor.name, tensor)) is not tensor:
            place = f"{other.file.name} and {tensor.file.name}"
            raise ModelError(f"{tensor.file.parent}: {tensor.name} stands in {place}")
    return found


def _tensor(file: Path, name: str, entry: Any, start: int) -> Tensor:
    match entry:
        case {"shape": [*shape], "dtype": str(dtype), "data_offsets": [int(begin), int(end)]} if all(
            isinstance(length, int) and length >= 0 for length in shape
        ):
            return Tensor(name, tuple(shape), dtype, file, start + begin, start + end)
    raise ValueError(f"its header has no shape, type and place for {name[:80]!r}")
