"""What the command line asks of a benchmark, checked before anything is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorafit.errors import UsageError
from lorafit.options.fields import JsonOptions, Option, RunPath
from lorafit.text import near

MODELS = ("base", "adapter", "trained", "merged", "quantized")
"""What can be measured, in this order. A run that trained in full has `trained` in place of `adapter`."""


@dataclass(frozen=True)
class Shape:
    """Prompts that are run together."""

    prompt_tokens: int
    batch: int


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers such as `128,512`. Raises UsageError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text}: has to be numbers with commas between, such as 1,8") from None


def parse_models(text: str) -> tuple[str, ...]:
    """Names such as `adapter,merged`."""
    return tuple(part.strip() for part in text.split(","))


@dataclass(frozen=True)
class BenchOptions(JsonOptions):
    """A benchmark as it was asked for.

    Attributes:
        models: names of MODELS; empty: all that the run has.
        output: where the report goes as well, as .json or .md.
    """

    run: RunPath
    models: Annotated[
        tuple[str, ...],
        Option(
            "base, adapter, merged, quantized.  [default: what there is]",
            "--model",
            "M1,M2",
            parse=parse_models,
            joined=True,
        ),
    ] = ()
    prompt_tokens: Annotated[
        tuple[int, ...], Option("Tokens of a prompt.", metavar="N1,N2", parse=parse_numbers, joined=True)
    ] = (128, 512)
    new_tokens: Annotated[int, Option("Tokens generated after it.", min=1)] = 64
    batch: Annotated[tuple[int, ...], Option("Prompts at once.", metavar="N1,N2", parse=parse_numbers, joined=True)] = (
        1,
        8,
    )
    rounds: Annotated[int, Option("Repetitions, models in turn.", min=1)] = 5
    seed: Annotated[int, Option("Decides the prompts' tokens.", min=0)] = 0
    output: Annotated[Path | None, Option("Write a .json or .md file as well.", "-o --output")] = None

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
            from lorafit.files import claim_file

            claim_file(self.output, "bench_version" if self.output.suffix == ".json" else "# Speed of ")
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise UsageError(f"-o {self.output}: there is no folder {self.output.parent}")
