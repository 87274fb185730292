"""What the command line asks of a smoke run, and what comes of it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lorafit.errors import UsageError
from lorafit.options.fields import Option, RecipeOptions

DEFAULT_STEPS = 5
LEAST_STEPS = 3
"""The rate is 0 in the first step, B moves in the second, and only then has A a gradient."""
MOST_STEPS = 50
DEFAULT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SmokeOptions(RecipeOptions):
    """What the command line asks for.

    Attributes:
        steps: None: the recording's with --check, else DEFAULT_STEPS.
        compare: whether the losses are compared with the golden file's.
        golden: None: beside the recipe.
        tolerance: relative; None: DEFAULT_TOLERANCE.
    """

    steps: Annotated[int | None, Option("Optimizer steps.  [default: 5, or the recording's]", metavar="N")] = None
    record: Annotated[bool, Option("Write the losses to the golden file.")] = False
    compare: Annotated[bool, Option("Exit with 6 unless they are as recorded.", "--check")] = False
    golden: Annotated[
        Path | None, Option("The golden file.  [default: beside CONFIG, .golden.json]", metavar="FILE")
    ] = None
    tolerance: Annotated[
        float | None, Option("Relative difference that --check allows.  [default: 0.001]", metavar="X")
    ] = None

    @property
    def golden_file(self) -> Path:
        return self.golden or self.config.with_suffix(".golden.json")

    def check(self) -> None:
        """Raises UsageError for options that don't go together."""
        if self.record:
            from lorafit.files import claim_file

            claim_file(self.golden_file, "lorafit_golden")
        if self.record and self.compare:
            raise UsageError("--record and --check exclude each other")
        if self.golden is not None and not (self.record or self.compare):
            raise UsageError("--golden: goes with --record or --check")
        if self.tolerance is not None and not self.compare:
            raise UsageError("--tolerance: goes with --check")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise UsageError(f"--tolerance {self.tolerance:g}: expected a number above 0 and below 1")
        if self.steps is not None and not LEAST_STEPS <= self.steps <= MOST_STEPS:
            raise UsageError(
                f"--steps {self.steps}: expected {LEAST_STEPS} to {MOST_STEPS}; not every part of an adapter moves "
                f"before step {LEAST_STEPS}"
            )


@dataclass(frozen=True)
class Replaced:
    """A setting that can't be, or need not be, as the recipe has it."""

    key: str
    asked: Any
    used: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.asked} -> {self.used} ({self.why})"


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        moved: how far all trained tensors are from where they began, as one vector's length.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    moved: float


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        tiny: the tiny model: parameters, layers, hidden_size, vocab_size.
        tokenizer: `real` or `stand-in`, with what it is and why in tokenizer_note.
        inputs: what the losses follow from, for a golden file: recipe, data and versions.
        failures: why the exit code is not 0.
        changed: what is not as it was when the golden file was recorded.
    """

    model: str
    tiny: dict[str, int]
    tokenizer: str
    tokenizer_note: str
    rows: int
    rows_per_step: int
    steps: tuple[Step, ...]
    validation_loss: float | None
    replaced: tuple[Replaced, ...]
    inputs: dict[str, Any]
    seconds: float
    failures: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    golden: str | None = None
