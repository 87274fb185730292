"""The run directory: the interface between the commands.

A file or folder in it is whole or absent: everything is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lorafit.errors import UsageError, first_line
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
    def lock_file(self) -> Path:
        """The recipe's lock, of a run with --locked."""
        return self.path / "recipe.lock"

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
    def fingerprint(self) -> Path:
        """What the base was as the run began, see lorafit.fingerprint."""
        return self.path / "fingerprint.json"

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
        return self.path.with_name(f".{self.path.name}.replaced")

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

    def begin(self, plan: Plan, recipe_text: bytes, lock_text: str | None = None) -> None:
        """Make the directory of a new run, or fill an empty one, with the recipe, its lock and the plan."""
        with contextlib.nullcontext(self.path) if self.path.exists() else staged(self.path) as folder:
            (folder / "recipe.yaml").write_bytes(recipe_text)
            if lock_text is not None:
                write_text(folder / "recipe.lock", lock_text)
            write_text(folder / "plan.json", plan.to_json())  # makes it a run, so it comes last

    def clear(self) -> None:
        """Take out what is in the directory, which may be one that can't be renamed, such as a mount point."""
        for entry in sorted(self.path.iterdir(), key=self.plan_file.__eq__):  # a run to the last
            discard(entry) if entry.is_dir() else entry.unlink()

    def set_aside(self) -> None:
        """Make way for a new run: keep this one until that is finished, if it holds anything."""
        if not self.is_run:
            return
        if self.is_empty:
            self.clear()
        elif self.replaced.exists():
            discard(self.path)
        else:
            self.path.rename(self.replaced)

    def base_files(self) -> dict[str, Any] | None:
        """The base's fingerprint (see lorafit.fingerprint) that `write_base_files` wrote; None if it did not.

        Raises UsageError for a file that is broken.
        """
        try:
            return dict(json.loads(self.fingerprint.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{self.fingerprint}: can't be read as a fingerprint: {first_line(error)}") from None

    def write_base_files(self, fingerprint: dict[str, Any]) -> None:
        write_text(self.fingerprint, json.dumps(fingerprint, indent=2) + "\n")

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
        """Hold the run for one process. Raises UsageError if another one has it.

        The lock's file stays: who takes it away lets one process lock the old file and another a new one.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(f"{self.path}: another process is at work on this run") from None
        try:
            yield
        finally:
            lock.release()


def located(path: str | Path) -> Path:
    """A path as it was written if that is plain; what it means if it has a `~`, links, `.` or `..` in it."""
    written = Path(path).expanduser()
    real = written.resolve()
    return written if written.name and written.absolute() == real else real


@contextlib.contextmanager
def open_run(path: str | Path) -> Iterator[tuple[RunDir, Plan]]:
    """A finished run and its plan, held for this process until the block ends. Raises UsageError."""
    run = RunDir(located(path))
    if not run.path.exists():
        raise UsageError(f"{path}: no such run directory")
    with run.lock():
        plan = run.load_plan()
        if run.result is None:
            raise UsageError(f"{path}: the run is not finished; go on with `lorafit train … --resume`")
        yield run, plan
