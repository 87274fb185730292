"""Speed and memory of a run's models: merged against unmerged, and quantized.

options (here) -> models (found and loaded) -> measure (one model, one shape, timed) -> make (all of them, in rounds) ->
report (types, medians with intervals) and show (tables). Options, report and show are light, the others import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafit.errors import UsageError
from lorafit.files import claim_file
from lorafit.text import near

MODELS = ("base", "adapter", "trained", "merged", "quantized")
"""What can be measured, in this order. A run that trained in full has `trained` in place of `adapter`."""


@dataclass(frozen=True)
class Shape:
    """Prompts that are run together."""

    prompt_tokens: int
    batch: int


@dataclass(frozen=True)
class BenchOptions:
    """A benchmark as it was asked for.

    Attributes:
        models: names of MODELS; empty: all that the run has.
        new_tokens: decoding steps after each prompt.
        rounds: how often each model is timed on each shape.
        seed: of the prompts' tokens, and of the bootstrap.
        output: where the report goes as well, as .json or .md.
    """

    run: Path
    models: tuple[str, ...] = ()
    prompt_tokens: tuple[int, ...] = (128, 512)
    new_tokens: int = 64
    batch: tuple[int, ...] = (1, 8)
    rounds: int = 5
    seed: int = 0
    output: Path | None = None

    @property
    def shapes(self) -> list[Shape]:
        return [Shape(length, batch) for length in self.prompt_tokens for batch in self.batch]

    def check(self) -> None:
        """Raises UsageError for what can't be measured."""
        for name in self.models:
            if name not in MODELS:
                raise UsageError(f"--model {name}: is no model of a run{near(name, MODELS)}")
        if len(set(self.models)) < len(self.models):
            raise UsageError(f"--model {','.join(self.models)}: names a model twice")
        for option, values in (("--prompt-tokens", self.prompt_tokens), ("--batch", self.batch)):
            if not values or min(values) < 1:
                raise UsageError(f"{option}: needs numbers from 1, such as 1,8")
            if len(set(values)) < len(values):
                raise UsageError(f"{option} {','.join(map(str, values))}: has a number twice")
        for option, value in (("--new-tokens", self.new_tokens), ("--rounds", self.rounds)):
            if value < 1:
                raise UsageError(f"{option} {value}: has to be at least 1")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: has to be at least 0")
        if self.output is not None and self.output.suffix not in (".json", ".md"):
            raise UsageError(f"-o {self.output}: has to end in .json or .md, which says what is written")
        if self.output is not None:
            claim_file(self.output, "bench_version" if self.output.suffix == ".json" else "# Speed of ")
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise UsageError(f"-o {self.output}: there is no folder {self.output.parent}")


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """The value of an option such as `128,512`. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text}: has to be numbers with commas between, such as 1,8") from None


def parse_models(text: str) -> tuple[str, ...]:
    """The value of `--model`, such as `adapter,merged`."""
    return tuple(part.strip() for part in text.split(","))
