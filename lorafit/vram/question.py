"""A question to `lorafit estimate-vram`: the options as typed, the subject that they name, and sweeps."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lorafit.errors import UsageError
from lorafit.gpus import Gpu
from lorafit.hardware import Hardware, hardware_of, meant_hardware
from lorafit.memory import Sharding
from lorafit.options import EstimateOptions
from lorafit.outcome import Outcome, Outcomes
from lorafit.recipe import Recipe, RecipeError, Source
from lorafit.recipe.load import sections
from lorafit.text import clipped, printable

Method = Literal["lora", "qlora", "full"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {}},
    "qlora": {"lora": {}, "quantization": {"load_in_4bit": True}},
    "full": {},
}
"""The sections that make a method."""
SHARDINGS: tuple[str, ...] = get_args(Sharding)
MOST_GPUS = 1 << 16
SHORT_NAMES = {"batch": "training.per_device_train_batch_size"}
MOST_CELLS = 400
Sweeps = tuple[tuple[str, tuple[str, ...]], ...]
"""Keys as in recipes, each with its values."""


@dataclass(frozen=True)
class Subject:
    """What is estimated: a recipe's file, or a model with defaults; overrides are KEY=VALUE, as `--set` takes them."""

    config: Path | None
    model: str | None
    method: str
    overrides: tuple[str, ...]
    hardware: Hardware
    sharding: Sharding | None = None

    def changed(self, *overrides: str) -> Subject:
        return dataclasses.replace(self, overrides=(*self.overrides, *overrides))

    def on(self, gpu: Gpu | None) -> Subject:
        """This subject on another GPU; unchanged for one of which only the memory is known."""
        return self if gpu is None else dataclasses.replace(self, hardware=hardware_of(gpu, self.hardware.world_size))

    def over(self, gpus: int, sharding: Sharding) -> Subject:
        """This subject over several GPUs."""
        hardware = dataclasses.replace(self.hardware, world_size=gpus)
        return dataclasses.replace(self, hardware=hardware, sharding=sharding)


Solver = Callable[[Subject], Outcome]
"""Finds what a subject comes to, once. Raises RecipeError for a recipe that can't be read."""


def solver() -> Solver:
    """A solver whose subjects share what is known of models, and estimates of equal setups."""
    shared = Outcomes()

    @functools.cache
    def solve(subject: Subject) -> Outcome:
        recipe = recipe_of(subject.config, subject.model, subject.method, subject.overrides)
        return shared.of(recipe, "run", subject.hardware, reading="nothing", sharding=subject.sharding)

    return solve


def recipe_of(config: Path | None, model: str | None, method: str, overrides: Sequence[str]) -> Recipe:
    """The recipe in a file, or a model's with defaults for everything else. Raises RecipeError."""
    if config is not None:
        return Recipe.load(config, overrides)
    source = {"path": "data.jsonl", "format": "text"}  # never read
    values = {"model": {"name_or_path": model}, "dataset": {"train": [source]}}
    return Recipe.of(values | METHODS[method], "--model", overrides)


def subject_of(asked: EstimateOptions, gpu: Gpu | None) -> Subject:
    """What is asked about, for a GPU or what the recipe is meant for. Raises UsageError and RecipeError."""
    config, model, gpus, sharding = asked.config, asked.model, asked.world, asked.sharding
    if (config is None) == (model is None):
        raise UsageError("give a recipe or --model NAME" + ", not both" * (config is not None))
    if asked.method is not None and config is not None:
        raise UsageError("--method goes with --model; a recipe says itself what is trained")
    if asked.method is not None and asked.method not in METHODS:
        raise UsageError(f"--method {asked.method}: not one of {', '.join(METHODS)}")
    if gpus is not None and not 1 <= gpus <= MOST_GPUS:
        raise UsageError(f"--gpus {gpus}: has to be from 1 to {MOST_GPUS}")
    if sharding is not None and sharding not in SHARDINGS:
        raise UsageError(f"--sharding {sharding}: not one of {', '.join(SHARDINGS)}")
    method = asked.method or "lora"
    overrides = (*asked.short, *asked.overrides)  # --set, as advice gives it, has the last word
    hardware = hardware_of(gpu) if gpu else meant_hardware(recipe_of(config, model, method, overrides))
    if hardware.device != "cuda" and (gpus or sharding):
        raise UsageError(
            f"--gpus, --sharding: the recipe is for {hardware.name}, where each process takes what is estimated for one"
        )
    world = gpus or hardware.world_size
    if sharding not in (None, "none") and world == 1:
        raise UsageError(f"--sharding {sharding}: needs --gpus of 2 or more")
    if sharding == "none" and world > 1:
        raise UsageError(f"--sharding none: is for one GPU, not {world}; ddp gives each GPU the whole model")
    hardware = dataclasses.replace(hardware, world_size=world)
    return Subject(config, model, method, overrides, hardware, sharding)  # type: ignore[arg-type]


# --- sweeps ---------------------------------------------------------------------------------------


def parse_sweeps(arguments: Sequence[str]) -> Sweeps:
    """KEY=V1,V2,… each. Raises UsageError."""
    sweeps = tuple(_parse(argument) for argument in arguments)
    keys = [key for key, _ in sweeps]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"--sweep {key}: is given twice; put its values into one: {key}=1,2")
    cells = math.prod(len(values) for _, values in sweeps)
    if cells > MOST_CELLS:
        raise UsageError(f"--sweep: makes {cells:,} combinations; at most {MOST_CELLS} are estimated")
    return sweeps


def _parse(argument: str) -> tuple[str, tuple[str, ...]]:
    name, equals, text = argument.partition("=")
    values = tuple(value.strip() for value in _split(text))
    if not equals or not name.strip() or not all(values):
        raise UsageError(f"--sweep {printable(argument)}: expected KEY=V1,V2, such as max_length=1024,2048")
    return _key(name.strip()), tuple(dict.fromkeys(values))


def _split(text: str) -> Iterator[str]:
    """The parts between commas that stand outside of brackets."""
    depth, part = 0, ""
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth <= 0:
            yield part
            part = ""
        else:
            part += c
    yield part


def _key(name: str) -> str:
    """A key of the recipe, from its whole path, or its last part where that is the only one of its name."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if name.partition(".")[0] == "hardware":
        raise UsageError(f"--sweep {printable(name)}: an answer is for one machine; give --gpu, or --set hardware.…")
    known = _keys()
    paths = known.get(name.rpartition(".")[2], [])
    if name in paths:
        return name
    if "." not in name and len(paths) == 1:
        return paths[0]
    if "." not in name and paths:
        raise UsageError(f"--sweep {printable(name)}: could be {' or '.join(paths)}; give the whole key")
    every = [path for found in known.values() for path in found]
    if any(name.startswith(f"{path}.") for path in every):
        return name  # into a list or a mapping
    near = difflib.get_close_matches(name, [*SHORT_NAMES, *known, *every], n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UsageError(f"--sweep {printable(name)}: no such key in a recipe{hint}")


def _keys() -> dict[str, list[str]]:
    """The recipe's keys by their last part."""
    found: dict[str, list[str]] = {}
    for where, section in sections():
        if section is not Source:  # in lists: addressed by an index
            for name in section.model_fields:
                found.setdefault(name, []).append(".".join((*where, name)))
    return found


@contextlib.contextmanager
def as_typed(typed: Mapping[str, str]) -> Iterator[None]:
    """Let mistakes in overrides be said of the options that made them, not of --set."""
    places = {f"--set {clipped(override, 60)}": option for override, option in typed.items()}
    try:
        yield
    except RecipeError as error:
        mistakes = []
        for mistake in error.mistakes:
            position = mistake.position
            position = dataclasses.replace(position, file=places.get(position.file, position.file))
            mistakes.append(dataclasses.replace(mistake, position=position))
        raise RecipeError(mistakes) from None
