"""What a base model is, so that resuming, evaluating and merging refuse another one.

A fingerprint is a JSON-able dict (version 2):

    fingerprint_version  2
    model, revision      a hub id and the revision asked for; of a local base, the last part of its path
    commit               of a hub model: the commit that its files in the cache are of
    files                SHA-256 of config.json and the tokenizer's files, whole
    config               SHA-256 of config.json's meaning, which saving the model again leaves as it is
    shards               of each safetensors file: SHA-256 of its header, and of samples of the file
    tensors              of each stored tensor: a hash of its type, its shape and samples of its bytes
    samples              of weight files of other kinds (GGUF, PyTorch's): SHA-256 of samples of the file
    dequantized          of a run from a GGUF file: the fingerprint of the folder it was dequantized to

Tensors are compared by name, so a base that was only sharded anew is the same. `shards`, `model`, `revision` and
`commit` are for information. Version 1, which older runs hold, was `files`, `samples` and the samples of `shards`
in one dict by file name. No weight file is read whole: of a tensor at most 4 KiB are, of a file 2 MiB.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lorafit.errors import ModelError
from lorafit.facts import TOKENIZER_FILES, Tensor, stored_tensors, weight_files
from lorafit.facts.folder import read_json
from lorafit.rows import file_digest

if TYPE_CHECKING:
    from lorafit.plan import Plan
    from lorafit.rundir import RunDir

VERSION = 2
Fingerprint = dict[str, Any]

_CONFIG = "config.json"
_PLACES = 4
_PLACE_BYTES = 1024
_SAVED_ANEW = ("transformers_version", "_name_or_path")
"""What saving a model again changes in its configuration."""


def fingerprint_of(folder: Path) -> Fingerprint:
    """The fingerprint of a local model folder. Raises ModelError for weight files that are missing or cut off."""
    return _fingerprint(folder, weight_files(folder))


def model_fingerprint(plan: Plan) -> Fingerprint:
    """The fingerprint of the base that a plan names; empty for a hub model that was not downloaded yet.

    Raises ModelError for weight files that are missing or cut off.
    """
    return base_fingerprint(plan.model["name_or_path"], plan.model_kwargs["revision"])


def base_fingerprint(asked: str, revision: str | None) -> Fingerprint:
    """The same for a model's name and revision."""
    path = Path(asked).expanduser()
    if path.is_file():
        named = {"fingerprint_version": VERSION, "model": path.name, "revision": None, "commit": None}
        return named | {"samples": {path.name: _hash_samples(path)}}
    if path.is_dir():
        return fingerprint_of(path)
    folder = _cached(asked, revision)
    if folder is None:
        return {}
    weights = weight_files(folder)
    whole = all(file.is_file() for file in weights)  # or else the download is not finished
    names = {"model": asked, "revision": revision}
    return _fingerprint(folder, weights if whole else []) | names


def run_fingerprint(plan: Plan, run: RunDir) -> Fingerprint:
    """What a run records of its base: the fingerprint, and that of the folder which a GGUF file became."""
    found = model_fingerprint(plan)
    return found | {"dequantized": fingerprint_of(run.base)} if run.base.is_dir() else found


def changed_base(plan: Plan, run: RunDir) -> list[str]:
    """What of a run's base is not as it was when the run began, as far as both are known.

    That is the base that the run would load again: of a GGUF file, the folder in the run. Raises ModelError.
    """
    if not run.base.is_dir():
        return changed_source(plan, run)
    recorded = (run.base_files() or {}).get("dequantized")
    return differences(recorded, fingerprint_of(run.base)) if recorded else []


def changed_source(plan: Plan, run: RunDir) -> list[str]:
    """The same of the base that the recipe names, such as a GGUF file itself. Raises ModelError."""
    recorded = run.base_files()
    return differences(recorded, model_fingerprint(plan)) if recorded else []


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """The files and tensors, by readable names, in which two fingerprints differ, as far as both know them.

    The tensors have to be the same ones, but for an output head that is only stored a second time.
    """
    if _is_first(before) or _is_first(now):
        return _changed_files(_by_file(before), _by_file(now))
    before, now = _weights_like(before, now), _weights_like(now, before)
    changed = _changed_files(_part(before, "files"), _part(now, "files"))
    if before.get("config") and before.get("config") == now.get("config"):
        changed = [name for name in changed if name != _CONFIG]  # it was only written anew
    one, two = _part(before, "samples"), _part(now, "samples")
    if one and two:
        changed += sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return changed + [f"tensor {name}" for name in _changed_tensors(_part(before, "tensors"), _part(now, "tensors"))]


def comparable(before: Fingerprint, now: Fingerprint) -> bool:
    """Whether `differences` compares any weights: if not, no difference means that nothing is known."""
    if _is_first(before) or _is_first(now):
        one, two = ({name for name, digest in _by_file(side).items() if ":" in digest} for side in (before, now))
        return bool(one & two)
    before, now = _weights_like(before, now), _weights_like(now, before)
    return any(_part(before, name) and _part(now, name) for name in ("tensors", "samples"))


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


def _is_first(fingerprint: Fingerprint) -> bool:
    """Whether it is of version 1; an empty one is of any version."""
    return bool(fingerprint) and "fingerprint_version" not in fingerprint


def _by_file(fingerprint: Fingerprint) -> dict[str, str]:
    """A fingerprint as version 1 would have it."""
    if _is_first(fingerprint):
        return fingerprint
    shards = {name: shard["samples"] for name, shard in _part(fingerprint, "shards").items()}
    return _part(fingerprint, "files") | shards | _part(fingerprint, "samples")


def _weights_like(side: Fingerprint, other: Fingerprint) -> Fingerprint:
    """Of a run from a GGUF file, the folder that it became, where the other side is a folder."""
    if side.get("dequantized") and _part(other, "tensors") and not _part(side, "tensors"):
        return dict(side["dequantized"])
    return side


def _part(fingerprint: Fingerprint, name: str) -> dict[str, Any]:
    return fingerprint.get(name) or {}


def _changed_files(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() & now.keys() if before[name] != now[name])


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


def _fingerprint(folder: Path, weights: list[Path]) -> Fingerprint:
    for file in weights:
        if not file.is_file():
            raise ModelError(f"{folder}: {file.name} is missing, which model.safetensors.index.json names")
    real = Path(os.path.abspath(folder))  # not what links in it mean
    small = [folder / name for name in (_CONFIG, *TOKENIZER_FILES)]
    shards = {file.name: _shard(file) for file in weights}
    others = [] if weights else sorted(folder.glob("pytorch_model*.bin"))
    return {
        "fingerprint_version": VERSION,
        "model": real.name,
        "revision": None,
        "commit": real.name if real.parent.name == "snapshots" else None,
        "files": {file.name: file_digest(file) for file in small if file.is_file()},
        "config": _config_digest(folder / _CONFIG),
        "shards": {name: shard for name, (shard, _) in shards.items()},
        "tensors": {name: digest for _, tensors in shards.values() for name, digest in tensors.items()},
        "samples": {file.name: _hash_samples(file) for file in others},
    }


def _cached(asked: str, revision: str | None) -> Path | None:
    """The folder in which the hub's client keeps the base, if it does."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(asked, _CONFIG, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _config_digest(file: Path) -> str | None:
    if not file.is_file():
        return None
    config = {key: value for key, value in read_json(file).items() if key not in _SAVED_ANEW}
    if "torch_dtype" in config:  # what transformers 4 called it
        config.setdefault("dtype", config.pop("torch_dtype"))
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _shard(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What is recorded of a safetensors file, and the hashes of its tensors by name. Raises ModelError."""
    stored = stored_tensors(file)
    try:
        with file.open("rb", buffering=0) as stream:
            _read_here_and_there(stream)
            header = stream.read(8)
            header += stream.read(int.from_bytes(header, "little"))
            tensors = {tensor.name: _hash_tensor(stream, tensor, begin, end) for tensor, (begin, end) in stored}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    return {"header": hashlib.sha256(header).hexdigest(), "samples": _hash_samples(file)}, tensors


def _hash_tensor(stream: BinaryIO, tensor: Tensor, begin: int, end: int) -> str:
    """BLAKE2b (16 bytes) of a tensor's type and shape, and of its bytes: all if they are few, else places in it."""
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}\n".encode(), digest_size=16)
    for at, length in _places(begin, end):
        stream.seek(at)
        digest.update(stream.read(length))
    return digest.hexdigest()


def _places(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where to read: the first and the last bytes, and between them at equal distances, as (position, bytes)."""
    if end - begin <= _PLACES * _PLACE_BYTES:
        yield begin, end - begin
        return
    for place in range(_PLACES):
        yield begin + (end - begin - _PLACE_BYTES) * place // (_PLACES - 1), _PLACE_BYTES


def _read_here_and_there(stream: BinaryIO) -> None:
    """Ask the system, where it takes such advice, not to read ahead what will not be asked for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)


def _hash_samples(path: Path, first: int = 1 << 20, samples: int = 64, length: int = 1 << 14) -> str:
    """Of a weight file, the first MiB (which holds the header), places all over it, and the size.

    Quick, and enough to tell files apart: models trained from one another share some tensors, not all.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(first))
        for sample in range(1, samples + 1):
            stream.seek(max(size * sample // samples - length, 0))
            digest.update(stream.read(length))
    digest.update(str(size).encode())
    return f"samples:{digest.hexdigest()}"
