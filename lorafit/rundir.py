"""The run directory: the interface between the commands.

A file or folder in it is whole or absent: everything is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorafit.errors import UsageError
from lorafit.plan import Plan
from lorafit.staging import discard, staged, write_text

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunDir:
    """Paths of a run, and what is in them."""

    path: Path

    @property
    def recipe(self) -> Path:
        """What the user wrote, byte for byte."""
        return self.path / "recipe.yaml"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result of a run with an adapter."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The result of a run that trained in full."""
        return self.path / "model"

    @property
    def base(self) -> Path:
        """The base that a GGUF file was dequantized to."""
        return self.path / "base"

    @property
    def start(self) -> Path:
        """The untrained adapter, kept for starts that change the base (PiSSA, OLoRA) or read data."""
        return self.path / "start"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def replaced(self) -> Path:
        """Where `--overwrite` keeps the run before until the new one is finished."""
        return self.path.with_name(self.path.name + ".replaced")

    @property
    def result(self) -> Path | None:
        """The finished adapter or model, if there is one."""
        return next((folder for folder in (self.adapter, self.model) if folder.is_dir()), None)

    @property
    def is_run(self) -> bool:
        return self.plan_file.is_file()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was trained or kept here yet."""
        return self.result is None and self.last_checkpoint() is None

    def load_plan(self) -> Plan:
        """Raises UsageError if this is no run."""
        try:
            return Plan.from_json(self.plan_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{self.path}: not a run directory (it has no plan.json)") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.plan_file}: can't be read as a plan of this version: {error}") from None

    def load_manifest(self) -> dict[str, Any]:
        """The manifest, or an empty one if the run has not written it."""
        try:
            return dict(json.loads(self.manifest.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        found = [
            (int(match[1]), folder)
            for folder in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
            if (match := _CHECKPOINT.fullmatch(folder.name)) and folder.is_dir()
        ]
        return max(found)[1] if found else None

    def begin(self, plan: Plan, recipe_text: bytes) -> None:
        """Make the directory of a new run, with the recipe and the plan."""
        with staged(self.path) as folder:
            (folder / "recipe.yaml").write_bytes(recipe_text)
            (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")

    def set_aside(self) -> None:
        """Make way for a new run: keep this one until that is finished, if it holds anything."""
        if not self.path.exists():
            return
        if self.is_empty or self.replaced.exists():
            discard(self.path)
        else:
            self.path.rename(self.replaced)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        write_text(self.manifest, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    def metrics_until(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to a step; a line that was cut off by a kill is left out."""
        kept = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                    if entry.get("step", 0) <= step:
                        kept.append(entry)
        return kept

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one process. Raises UsageError if another one has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(f"{self.path}: another process is training this run") from None
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)


def open_run(path: str | Path) -> tuple[RunDir, Plan]:
    """A finished run and its plan. Raises UsageError."""
    run = RunDir(Path(path))
    if not run.path.exists():
        raise UsageError(f"{path}: no such run directory")
    plan = run.load_plan()
    if run.result is None:
        raise UsageError(f"{path}: the run is not finished; go on with `lorafit train … --resume`")
    return run, plan
