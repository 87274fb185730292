"""`lorafit init`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lorafit.cli.exits import remark, warn
from lorafit.cli.signature import command
from lorafit.errors import LorafitError, UsageError
from lorafit.options import InitOptions
from lorafit.written import from_home

if TYPE_CHECKING:
    from lorafit.recipe import Mistake, Recipe


@command
def init(options: InitOptions) -> None:
    if options.source is not None:
        convert_other(options.source, options)
        return
    options = completed(options)
    from lorafit.init.propose import first_recipe

    document, remarks = first_recipe(options)
    for line in remarks:
        remark(line)
    deliver(document.text(), options, {})


def completed(options: InitOptions) -> InitOptions:
    """The options; on a terminal the missing ones are asked for. Raises UsageError."""
    from lorafit.gpus import parse_device

    model, data, gpu, vram, cpu = options.model, options.data, options.gpu, options.vram, options.cpu
    needed = {"--model": model, "--data": data, "--gpu, --vram or --cpu": gpu or vram or cpu}
    missing = [option for option, given in needed.items() if not given]
    if missing and not is_terminal():
        raise UsageError(f"missing: {'; '.join(missing)} (on a terminal, init asks for them)")
    model = model or typer.prompt("Base model (hub id or folder)", err=True)
    data = data or typer.prompt("Training rows (file, folder or hub id)", err=True)
    if not (gpu or vram or cpu):
        device = typer.prompt("GPU (a name, memory such as 24GiB, or cpu)", default=here(), err=True)
        if device.strip().lower() == "cpu":
            cpu = True
        else:
            known = parse_device(device).gpu
            gpu, vram = (known.name, None) if known else (None, device.strip())
    return dataclasses.replace(options, model=model, data=data, gpu=gpu, vram=vram, cpu=cpu)


def here() -> str:
    """This machine, as an answer to the question for the GPU."""
    from lorafit.gpus import known_gpu
    from lorafit.hardware import detect

    hardware = detect()
    if hardware.device == "cpu":
        return "cpu"
    gpu = known_gpu(hardware.name, hardware.memory_bytes) if hardware.memory_bytes else None
    return gpu.name if gpu else f"{(hardware.memory_bytes or 0) >> 20}MiB"


def is_terminal() -> bool:
    return sys.stdin.isatty()


def deliver(text: str, options: InitOptions, beside: dict[Path, str]) -> None:
    """Check the recipe, write or print it, and say how to go on. Raises RecipeError for what is no recipe."""
    from lorafit.files import write_text
    from lorafit.init.document import recipe_of
    from lorafit.recipe import RecipeError

    text = from_home(text)
    recipe: Recipe | None = None
    wrong: tuple[Mistake, ...] = ()
    try:
        recipe = recipe_of(text, options.file)
    except RecipeError as error:
        if any(mistake.path != "start_from" for mistake in error.mistakes):
            raise
        wrong = error.mistakes  # its adapter may be on another machine
    if options.to_stdout:
        typer.echo(text, nl=False)
        for path in beside:
            remark(f"{path}: named by the recipe, but not written, as --print says")
    else:
        for path, content in (beside | {options.file: text}).items():
            write_text(path, content)
    for line in doubts(recipe) if recipe else map(str, wrong):
        warn(f"not ready to train: {line}")
    if not options.to_stdout:
        remark(f"{options.file} is written. Next:")
        for name in ("validate", "estimate-vram", "preview", "train"):
            remark(f"  lorafit {name} {options.file}")


def doubts(recipe: Recipe) -> list[str]:
    """What a plan for the machine that the recipe is meant for finds wrong."""
    from lorafit.outcome import Outcomes

    try:
        Outcomes().of(recipe, "run", reading="digests").require_plan()
    except LorafitError as error:
        return str(error).splitlines()
    return []


def convert_other(source: Path, options: InitOptions) -> None:
    """Convert another tool's recipe, and list what has no equivalent."""
    from lorafit.init.peers import PEERS, convert
    from lorafit.recipe import RecipeError

    found, conversion = convert(source, options.file, options.kind)
    for key, value in (("gpu", options.gpu), ("vram", options.vram), ("device", "cpu" if options.cpu else None)):
        if value:
            conversion.put(f"hardware.{key}", value)
    if not options.to_stdout:
        for path in conversion.beside:
            options.refuse_overwriting(path)
    remark(f"{source}: {PEERS[found].TITLE}'s, {'as --kind says' if options.kind else 'by its keys'}")
    for line in conversion.said():
        warn(line)
    try:
        deliver(conversion.document().text(), options, conversion.beside)
    except RecipeError as error:
        wrong = [f"{source}: can't be converted: {mistake.path}: {mistake.message}" for mistake in error.mistakes]
        raise UsageError("\n".join(wrong)) from None
