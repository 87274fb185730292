"""The manifest: what a run was made of and how it went, so that it can be compared and repeated."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lorafit.files import file_digest
from lorafit.rows import data_files
from lorafit.run.fingerprint import Fingerprint, summary
from lorafit.written import as_written

if TYPE_CHECKING:
    from pathlib import Path

    from lorafit.plan import Plan, Schedule
    from lorafit.rows.audit import Audit
    from lorafit.run.directory import RunDir

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
    base: Fingerprint,
    audit: Audit,
    trainer: Any,
    schedule: Schedule,
    began: float,
    memory: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything but secrets: nothing that the recipe takes from the environment, no tokens, no user names.

    Args:
        base: the fingerprint of the base, as the run began.
        began: when, in seconds since 1970.
    """
    state = trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    ended = datetime.datetime.now(datetime.UTC)
    manifest = {
        "manifest_version": 1,
        "name": plan.name,
        "versions": versions(),
        "git": git_state(),
        "hardware": dataclasses.asdict(plan.hardware),
        "model": dataclasses.asdict(plan.model) | {"fingerprint": summary(base)},
        "data": {
            "files": {path: digest for source in _local(plan) for path, digest in _hash_files(source)},
            "audit": audit.as_dict(),
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
        "memory": memory,
        "seconds": round(ended.timestamp() - began, 3),
        "finished": ended.isoformat(timespec="seconds"),
    }
    return as_written(manifest, plan.references)


def hashes(run: RunDir, result: Path, name: str) -> dict[str, str]:
    """SHA-256 of what a finished run holds, by path in it.

    Args:
        result: where the result is now.
        name: what it will be called.
    """
    own = [run.recipe, run.lock_file, run.plan_file, run.metrics, run.fingerprint]
    files = {file.name: file for file in own if file.is_file()}
    inside = sorted(file for file in result.rglob("*") if file.is_file())
    files |= {f"{name}/{file.relative_to(result).as_posix()}": file for file in inside}
    return {path: file_digest(file) for path, file in files.items()}


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


def _local(plan: Plan) -> list[str]:
    return [source.path for source in (*plan.data.train, *plan.data.validation) if source.hub is None]


def _hash_files(path: str) -> list[tuple[str, str]]:
    return [(str(file), file_digest(file)) for file in data_files(path)]


def _hash_text(text: Any) -> str | None:
    return hashlib.sha256(str(text).encode()).hexdigest() if text is not None else None
