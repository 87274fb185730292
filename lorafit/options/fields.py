"""Options as fields of frozen types: what the command line shows of each, and those that recur."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lorafit.errors import UsageError

if TYPE_CHECKING:
    from lorafit.hardware import Hardware
    from lorafit.run.directory import RunDir

Completes = Literal["recipes", "runs", "keys", "gpus"]
"""What a shell offers for a value: a function of lorafit.cli.complete."""


@dataclass(frozen=True)
class Argument:
    """How a field is typed by its place. A field of several values takes all that is typed."""

    metavar: str
    help: str
    completes: Completes | None = None


@dataclass(frozen=True)
class Option:
    """How a field is typed by a name. A field of several values is repeatable, and a Literal's choices are checked.

    Attributes:
        flags: names, such as `-o --output`; empty: the field's own, with dashes.
        min: the least number.
        parse: makes a value of a text (of each, where the option is repeatable), or raises UsageError, whose message
            begins with the text.
        joined: whether one text holds all values of a field of several, which `parse` takes apart.
    """

    help: str
    flags: str = ""
    metavar: str | None = None
    min: float | None = None
    completes: Completes | None = None
    parse: Callable[[str], Any] | None = None
    joined: bool = False


RunPath = Annotated[Path, Argument("RUN", "A run directory, such as runs/quickstart.", "runs")]
Overrides = Annotated[
    tuple[str, ...],
    Option("Override a value of the recipe; repeatable.", "--set", "KEY=VALUE", completes="keys"),
]
ForGpu = Annotated[
    str | None, Option("Plan for this GPU, not what the recipe is meant for.", metavar="NAME", completes="gpus")
]
Here = Annotated[bool, Option("Plan for this machine.")]
Locked = Annotated[bool, Option("Refuse any drift from the lock that the run was trained with.")]


@dataclass(frozen=True)
class Options:
    """What a command is asked to do: its arguments and options, each written once, as a field."""

    def check(self) -> None:
        """Raises UsageError for what doesn't go together."""


@dataclass(frozen=True)
class JsonOptions(Options):
    """What a command is asked to do whose result can be had as JSON."""

    as_json: Annotated[bool, Option("Print the result as JSON.", "--json")] = field(default=False, kw_only=True)


@dataclass(frozen=True)
class RecipeOptions(JsonOptions):
    """What a command is asked to do with one recipe."""

    config: Annotated[Path, Argument("CONFIG", "The recipe, a YAML file.", "recipes")]
    overrides: Overrides = ()


def hardware_for(gpu: str | None, here: bool = False) -> Hardware | None:
    """What --gpu and --here ask to plan for; None: what a recipe is meant for. Raises UsageError."""
    if gpu is not None and here:
        raise UsageError("--gpu and --here exclude each other")
    from lorafit.gpus import find_gpu
    from lorafit.hardware import detect, hardware_of

    return hardware_of(find_gpu(gpu)) if gpu is not None else detect() if here else None


def run_of(path: Path) -> RunDir:
    """A run by its directory, or by the recipe that says where it is. Raises RecipeError."""
    from lorafit.recipe import Recipe
    from lorafit.run.directory import RunDir, located

    return RunDir(located(Recipe.load(path).output_dir or f"runs/{path.stem}" if path.is_file() else path))
