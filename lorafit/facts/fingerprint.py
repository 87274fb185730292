"""What a base model is, so that resuming, evaluating, merging and going on from an adapter refuse another one.

A fingerprint is a JSON-able dict (version 3):

    fingerprint_version  3
    model, revision      a hub id and the revision asked for; of a local base, the last part of its path
    commit               of a hub model: the commit that its files in the cache are of
    files                SHA-256 of config.json and the tokenizer's files
    config               SHA-256 of config.json's meaning, which saving the model again leaves as it is
    tensors              XXH3 (128 bits) of each stored tensor: its type, its shape and all its bytes
    weights              XXH3 of each weight file of another kind (GGUF, PyTorch's)
    dequantized          of a run from a GGUF file: the fingerprint of the folder it was dequantized to

Tensors are compared by name, so a base that was only sharded anew is the same. `model`, `revision` and `commit` are for
information. Weight files are read whole, once: what was found is remembered until their size, times or inode change.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import xxhash

from lorafit.bounds import read_json
from lorafit.errors import ModelError
from lorafit.facts.folder import TOKENIZER_FILES, stored_tensors, weight_files
from lorafit.files import file_digest, quick_digest
from lorafit.progress import stage
from lorafit.rows.cache import remembered
from lorafit.written import expanded

VERSION = 3
Fingerprint = dict[str, Any]

_CONFIG = "config.json"
_CHUNK = 4 << 20
_SAVED_ANEW = ("transformers_version", "_name_or_path")
"""What saving a model again changes in its configuration."""


def fingerprint_of(folder: Path) -> Fingerprint:
    """The fingerprint of a local model folder. Raises ModelError for weight files that are missing or cut off."""
    return _fingerprint(folder, weight_files(folder))


def base_fingerprint(asked: str, revision: str | None, whole: bool = True) -> Fingerprint:
    """The fingerprint of a base by its name and revision; only its names for a hub model that isn't here.

    Args:
        whole: whether weights are read; else its small files alone.

    Raises ModelError for weight files that are missing or cut off.
    """
    path = expanded(asked)
    if path.is_file():
        named = {"fingerprint_version": VERSION, "model": path.name, "revision": None, "commit": None}
        return named | ({"weights": {path.name: remembered(path, "xxh3", quick_digest)}} if whole else {})
    if path.is_dir():
        return _fingerprint(path, weight_files(path) if whole else [], whole)
    folder = _cached(asked, revision)
    if folder is None:
        return {"fingerprint_version": VERSION, "model": asked, "revision": revision, "commit": None}
    weights = weight_files(folder)
    whole = whole and all(file.is_file() for file in weights)  # or else the download is not finished
    names = {"model": asked, "revision": revision}
    return _fingerprint(folder, weights if whole else [], whole) | names


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """The files and tensors, by readable names, in which two fingerprints differ, as far as both know them.

    The tensors have to be the same ones, but for an output head that is only stored a second time.
    """
    before, now = _weights_like(before, now), _weights_like(now, before)
    old, new = _part(before, "files"), _part(now, "files")
    changed = sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    if before.get("config") and before.get("config") == now.get("config"):
        changed = [name for name in changed if name != _CONFIG]  # it was only written anew
    one, two = _part(before, "weights"), _part(now, "weights")
    if one and two:
        changed += sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return changed + [f"tensor {name}" for name in _changed_tensors(_part(before, "tensors"), _part(now, "tensors"))]


def comparable(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether `differences` compares any weights: if not, no difference means that nothing is known."""
    before, now = _weights_like(before, now), _weights_like(now, before)
    return any(_part(before, name) and _part(now, name) for name in ("tensors", "weights"))


def whole_digest(file: Path) -> str:
    """SHA-256 of a weight file, remembered until the file changes."""
    return remembered(file, "whole", file_digest)


def weights_digest(folder: Path) -> str:
    """SHA-256 of an adapter's or a model's weights; of several files, that of their names and hashes.

    Raises ModelError for weight files that are missing.
    """
    files = [folder / "adapter_model.safetensors"]
    if not files[0].is_file():
        files = weight_files(folder)
    digests = {file.name: whole_digest(file) for file in files}
    if len(files) == 1:
        return digests[files[0].name]
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests.items()).encode()).hexdigest()


def damaged_in_cache(asked: str, revision: str | None) -> list[str]:
    """The files of a hub model in the client's cache whose bytes are not those that their name there says.

    A file's name is its SHA-256 if it is a large one (LFS), else the hash that git gives it (SHA-1).
    """
    folder = None if expanded(asked).exists() else _cached(asked, revision)
    files = sorted(folder.rglob("*")) if folder else []
    return [file.name for file in files if file.is_symlink() and file.is_file() and not _is_its_name(file)]


def _is_its_name(file: Path) -> bool:
    name = file.resolve().name
    if len(name) == 64:
        return whole_digest(file) == name
    return len(name) != 40 or remembered(file, "git", lambda path: git_digest(path.read_bytes())) == name


def git_digest(content: bytes) -> str:
    """The name that git gives a file's content (SHA-1)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def listed(changed: list[str], most: int = 5) -> str:
    """Differences on one line: the first ones, and how many more."""
    more = f" and {len(changed) - most} more" if len(changed) > most else ""
    return ", ".join(changed[:most]) + more


def summary(fingerprint: Fingerprint) -> Fingerprint:
    """A fingerprint with the tensors as a count and one hash of them all, for people to compare."""
    short = dict(fingerprint)
    if tensors := _part(fingerprint, "tensors"):
        lines = "".join(f"{name} {tensors[name]}\n" for name in sorted(tensors))
        short["tensors"] = {"count": len(tensors), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
    if "dequantized" in fingerprint:
        short["dequantized"] = summary(fingerprint["dequantized"])
    return short


# --- comparing ------------------------------------------------------------------------------------


def _weights_like(side: Fingerprint, other: Fingerprint) -> Fingerprint:
    """A side as it is compared: for a run from a GGUF file the folder that it became, where the other is a folder."""
    if side.get("dequantized") and _part(other, "tensors") and not _part(side, "tensors"):
        return dict(side["dequantized"])
    return side


def _part(fingerprint: Fingerprint, name: str) -> dict[str, Any]:
    return fingerprint.get(name) or {}


def _changed_tensors(before: dict[str, str], now: dict[str, str]) -> list[str]:
    if not before or not now:
        return []  # not known of one of them
    both = before.keys() & now.keys()
    changed = {name for name in both if before[name] != now[name]}
    for side in (before, now):
        shared = {side[name] for name in both}
        alone = side.keys() - both
        changed |= {name for name in alone if not (name.endswith("lm_head.weight") and side[name] in shared)}
    return sorted(changed)


# --- making ---------------------------------------------------------------------------------------


def _fingerprint(folder: Path, weights: list[Path], whole: bool = True) -> Fingerprint:
    for file in weights:
        if not file.is_file():
            raise ModelError(f"{folder}: {file.name} is missing, which model.safetensors.index.json names")
    real = Path(os.path.abspath(folder))  # not what links in it mean
    small = [folder / name for name in (_CONFIG, *TOKENIZER_FILES)]
    others = [] if weights or not whole else sorted(folder.glob("pytorch_model*.bin"))
    tensors = [remembered(file, "tensors", tensor_digests) for file in weights]
    return {
        "fingerprint_version": VERSION,
        "model": real.name,
        "revision": None,
        "commit": real.name if real.parent.name == "snapshots" else None,
        "files": {file.name: file_digest(file) for file in small if file.is_file()},
        "config": _config_digest(folder / _CONFIG),
        "tensors": {name: digest for found in tensors for name, digest in found.items()},
        "weights": {file.name: remembered(file, "xxh3", quick_digest) for file in others},
    }


def _cached(asked: str, revision: str | None) -> Path | None:
    """The folder in which the hub's client keeps the base, if it does."""
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(asked, _CONFIG, revision=revision)
    except ValueError:  # no name on a hub, such as a folder that is gone
        return None
    return Path(config).parent if isinstance(config, str) else None


def _config_digest(file: Path) -> str | None:
    if not file.is_file():
        return None
    config = {key: value for key, value in read_json(file).items() if key not in _SAVED_ANEW}
    if "torch_dtype" in config:  # what transformers 4 called it
        config.setdefault("dtype", config.pop("torch_dtype"))
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def tensor_digests(file: Path) -> dict[str, str]:
    """XXH3 (128 bits) of each tensor of a safetensors file: type, shape and all bytes. Raises ModelError."""
    stored = sorted(stored_tensors(file), key=lambda tensor: (tensor.begin, tensor.end))  # as they lie in the file
    buffer = memoryview(bytearray(_CHUNK))
    found = {}
    try:
        with (
            file.open("rb", buffering=0) as stream,
            stage(f"hashing {file.name}", stored[-1].end if stored else None, "bytes") as hashed,
        ):
            for tensor in stored:
                begin, end = tensor.begin, tensor.end
                digest = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
                stream.seek(begin)
                while begin < end and (count := stream.readinto(buffer[: end - begin])):
                    digest.update(buffer[:count])
                    begin += count
                    hashed.advance(count)
                found[tensor.name] = digest.hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    return found
