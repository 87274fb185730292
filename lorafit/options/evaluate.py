"""What the command line asks of an evaluation, checked before anything is loaded (no torch)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from lorafit.errors import UsageError
from lorafit.options.fields import Argument, JsonOptions, Locked, Option

if TYPE_CHECKING:
    from lorafit.run.directory import RunDir

_NAME = re.compile(r"[A-Za-z0-9_-]+")
RESERVED = ("base", "adapter", "trained", "merged", "baseline")
"""Names of models that are always the run's own, and of what gates compare with."""


class Named(NamedTuple):
    """A model by a name of its own."""

    name: str
    path: Path


def parse_adapter(text: str) -> Named:
    """`NAME=PATH`. Raises UsageError."""
    name, equals, path = text.partition("=")
    if not equals or not path or not _NAME.fullmatch(name):
        raise UsageError(f"{text}: expected NAME=PATH, the name of letters, digits, _ and -")
    return Named(name, Path(path))


def parse_compare(text: str) -> tuple[str, ...]:
    """Names and paths, separated by commas. Raises UsageError."""
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise UsageError(f"{text}: names no model; expected some of base, adapter, merged, or paths of runs")
    return parts


Adapters = Annotated[
    tuple[Named, ...],
    Option("Another adapter, or a run's, on the same base; repeatable.", "--adapter NAME=PATH", parse=parse_adapter),
]


@dataclass(frozen=True)
class Options(JsonOptions):
    """An evaluation as it was asked for. None means: as the recipe's eval section has it, or its default.

    Attributes:
        path: a run, or a recipe, whose run is evaluated by the recipe's eval section as it is now.
    """

    path: Annotated[Path, Argument("A run directory, or the recipe of one.", "RUN|CONFIG", "runs")]
    overrides: Annotated[
        tuple[str, ...], Option("Override a value of the eval section; repeatable.", "--set KEY=VALUE")
    ] = ()
    compare: Annotated[
        tuple[str, ...] | None,
        Option(
            "base, adapter, merged, or paths of other runs.  [default: those that there are]",
            "M1,M2",
            parse=parse_compare,
            joined=True,
        ),
    ] = None
    adapters: Adapters = ()
    data: Annotated[Path | None, Option("Rows to evaluate on instead of the held-out ones.")] = None
    limit: Annotated[int | None, Option("Rows to generate answers for.  [default: eval.limit]", min=1)] = None
    max_new_tokens: Annotated[
        int | None, Option("Tokens an answer may have.  [default: eval.max_new_tokens]", min=1)
    ] = None
    fail_under: Annotated[tuple[str, ...], Option("Exit with 6 unless this holds; repeatable, for CI.", "GATE")] = ()
    baseline: Annotated[Path | None, Option("An earlier results.json: exit with 6 if it was better.", "FILE")] = None
    output: Annotated[Path | None, Option("Default: eval/ in the run.", "-o --output")] = None
    resume: Annotated[bool, Option("Go on with an interrupted evaluation.")] = False
    locked: Locked = False
    show_rows: Annotated[int, Option("Answers to print.", "--show", min=0)] = 3

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
        from lorafit.run.directory import located

        return located(self.output) if self.output else run.eval


def name_of(path: str, taken: list[str]) -> str:
    """A name for a run or model in figures, from the last part of its path."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(path).resolve().name).strip("_") or "model"
    name, number = stem, 2
    while name in taken or name in RESERVED:
        name, number = f"{stem}_{number}", number + 1
    return name
