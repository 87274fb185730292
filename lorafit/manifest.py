"""The manifest: what a run was made of and how it went, so that it can be compared and repeated."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.facts import TOKENIZER_FILES
from lorafit.rows import data_files, file_digest

if TYPE_CHECKING:
    from lorafit.data import Prepared
    from lorafit.plan import Plan, Schedule
    from lorafit.rundir import RunDir

STACK = (
    "lorafit",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


def build_manifest(
    plan: Plan,
    data: Prepared,
    trainer: Any,
    schedule: Schedule,
    began: float,
    peak_bytes: int,
    memory: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything but secrets: no environment variables, no tokens, no user names."""
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    ended = datetime.datetime.now(datetime.UTC)
    return {
        "manifest_version": 1,
        "name": plan.name,
        "versions": versions(),
        "git": git_state(),
        "hardware": dataclasses.asdict(plan.hardware),
        "model": plan.model | {"files": model_fingerprint(plan)},
        "data": {
            "files": {path: digest for source in _local(plan) for path, digest in _hash_files(source)},
            "audit": data.final_audit().as_dict(),
        },
        "tokenizer": {
            "chat_template_sha256": _hash_text(trainer.processing_class.chat_template),
            "eos_token": trainer.processing_class.eos_token,
            "pad_token": trainer.processing_class.pad_token,
        },
        "schedule": dataclasses.asdict(schedule),
        "result": {
            "steps": state.global_step,
            "epochs": state.epoch,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "best_validation_loss": state.best_metric,
            "best_step": state.best_global_step,
            "stopped_early": state.global_step < state.max_steps,
        },
        "peak_memory_bytes": peak_bytes,
        "memory": memory,
        "seconds": round(ended.timestamp() - began, 3),
        "finished": ended.isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in STACK:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the working directory's repository, and whether it has uncommitted changes."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def model_fingerprint(plan: Plan) -> dict[str, str]:
    """SHA-256 of the base's small files whole, and of samples of its weight files with their sizes.

    Of a hub model, the files in the cache; none before it was downloaded.
    """
    name = Path(plan.model["name_or_path"]).expanduser()
    if name.is_file():
        return {name.name: _hash_samples(name)}
    folder = name if name.is_dir() else _cached(plan)
    if folder is None:
        return {}
    small = [folder / file for file in ("config.json", *TOKENIZER_FILES)]
    found = {file.name: file_digest(file) for file in small if file.is_file()}
    return found | {file.name: _hash_samples(file) for file in sorted(folder.glob("*.safetensors"))}


def _cached(plan: Plan) -> Path | None:
    """The folder in which the hub's client keeps the base, if it does."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(plan.model["name_or_path"], "config.json", revision=plan.model_kwargs["revision"])
    return Path(config).parent if isinstance(config, str) else None


def changed_base(plan: Plan, run: RunDir) -> list[str]:
    """The files of the base that are not what they were when the run began, as far as both are known."""
    before, now = run.base_files() or {}, model_fingerprint(plan)
    return sorted(file for file in before.keys() & now.keys() if before[file] != now[file])


def _local(plan: Plan) -> list[str]:
    return [source.path for source in (*plan.data.train, *plan.data.validation) if source.hub is None]


def _hash_files(path: str) -> list[tuple[str, str]]:
    return [(str(file), file_digest(file)) for file in data_files(path)]


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


def _hash_text(text: Any) -> str | None:
    return hashlib.sha256(str(text).encode()).hexdigest() if text is not None else None
