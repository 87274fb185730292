"""What the command line asks of an evaluation, checked before anything is loaded (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import UsageError
from lorafit.run.directory import RunDir, located

_NAME = re.compile(r"[A-Za-z0-9_-]+")
RESERVED = ("base", "adapter", "trained", "merged", "baseline")
"""Names of models that are always the run's own, and of what gates compare with."""


@dataclass(frozen=True)
class Named:
    """A model by a name of its own."""

    name: str
    path: Path


@dataclass(frozen=True)
class Options:
    """An evaluation as it was asked for. None means: as the recipe's eval section has it, or its default.

    Attributes:
        path: a run, or a recipe, whose run is evaluated by the recipe's eval section as it is now.
        overrides: KEY=VALUE of the eval section.
        compare: base, adapter (or trained), merged, or paths of other runs or merged models.
        adapters: more adapters on the run's base.
        data: rows to take for the held-out ones.
        fail_under: gates besides the recipe's.
        baseline: an earlier results.json.
        resume: go on with an interrupted evaluation.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    compare: tuple[str, ...] | None = None
    adapters: tuple[Named, ...] = ()
    data: Path | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    fail_under: tuple[str, ...] = ()
    baseline: Path | None = None
    output: Path | None = None
    resume: bool = False

    def check(self) -> None:
        """Raises UsageError for what doesn't go together."""
        for override in self.overrides:
            if not override.startswith("eval."):
                raise UsageError(
                    f"--set {override}: an evaluation can change the eval section only, such as eval.limit"
                )
        if self.compare is not None and len(set(self.compare)) < len(self.compare):
            raise UsageError(f"--compare {','.join(self.compare)}: names a model twice")
        names = [adapter.name for adapter in self.adapters]
        for name in names:
            if name in RESERVED or names.count(name) > 1:
                raise UsageError(f"--adapter {name}=…: the name is taken; choose another")
        for path, option in ((self.data, "--data"), (self.baseline, "--baseline")):
            if path is not None and not path.exists():
                raise UsageError(f"{option} {path}: no such file")

    def destination(self, run: RunDir) -> Path:
        """The folder that is written: what --output says, or eval/ in the run."""
        return located(self.output) if self.output else run.eval


def parse_adapter(text: str) -> Named:
    """`NAME=PATH`. Raises UsageError."""
    name, equals, path = text.partition("=")
    if not equals or not path or not _NAME.fullmatch(name):
        raise UsageError(f"--adapter {text}: expected NAME=PATH, the name of letters, digits, _ and -")
    return Named(name, Path(path))


def parse_compare(text: str | None) -> tuple[str, ...] | None:
    """Names and paths, separated by commas. Raises UsageError."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise UsageError("--compare: names no model; expected some of base, adapter, merged, or paths of runs")
    return parts


def name_of(path: str, taken: list[str]) -> str:
    """A name for a run or model in figures, from the last part of its path."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).resolve().name).strip("_") or "model"
    name, number = stem, 2
    while name in taken or name in RESERVED:
        name, number = f"{stem}_{number}", number + 1
    return name
