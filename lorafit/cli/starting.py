"""`lorafit init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.common import fail, reporting
from lorafit.cli.complete import gpus
from lorafit.errors import LorafitError, UsageError
from lorafit.progress import talk
from lorafit.written import from_home

if TYPE_CHECKING:
    from lorafit.init.propose import Wish


@reporting
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Hub id or folder of the base.")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="Training rows.")] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation", metavar="PATH|FRACTION", help="Held-out rows.  [default: 0.1, if rows are enough]"
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help="The GPU that it has to fit, such as 'RTX 4090'.", autocompletion=gpus
        ),
    ] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", metavar="SIZE", help="The memory that it has to fit, such as 24GiB.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="For a machine without a GPU.")] = False,
    name: Annotated[
        str | None, typer.Option("--name", metavar="RUN", help="Of the run, below runs/.  [default: FILE's]")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="OTHER", help="Convert a recipe of axolotl, LLaMA-Factory or TRL instead."),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="TOOL", help="Whose --from is: axolotl, llamafactory or trl.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    to_stdout: Annotated[bool, typer.Option("--print", help="Print the recipe; write nothing.")] = False,
) -> None:
    """Write a first recipe, with settings that fit; or convert another tool's."""
    if cpu and (gpu or vram):
        fail("--cpu and --gpu or --vram exclude each other", UsageError.exit_code)
    if not to_stdout:
        refuse_overwriting(file, force)
    if source is not None:
        if model or data or validation or name:
            fail("--from takes everything from the other recipe; it goes with --kind, --gpu, --vram and --cpu", 2)
        convert_other(source, kind, file, gpu, vram, cpu, to_stdout, force)
        return
    if kind is not None:
        fail("--kind says whose recipe --from is; give both", UsageError.exit_code)
    wish = wished(model, data, validation, gpu, vram, cpu, name or file.stem)
    from lorafit.init.propose import first_recipe

    made = first_recipe(wish)
    console = talk()
    for remark in made.remarks:
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    deliver(made.document.text(), file, to_stdout, {})


def wished(
    model: str | None, data: str | None, validation: str | None, gpu: str | None, vram: str | None, cpu: bool, name: str
) -> Wish:
    """The options; on a terminal the missing ones are asked for. Raises UsageError."""
    from lorafit.gpus import parse_device
    from lorafit.init.propose import Wish

    missing = [
        option
        for option, given in (("--model", model), ("--data", data), ("--gpu, --vram or --cpu", gpu or vram or cpu))
        if not given
    ]
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
    return Wish(model, data, name, validation, gpu, vram, cpu)


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


def refuse_overwriting(file: Path, force: bool) -> None:
    if file.is_dir():
        raise UsageError(f"{file}: is a folder; give the name of a file")
    if file.exists() and not file.is_file():
        raise UsageError(f"{file}: is no file that can be replaced")
    if file.exists() and not force:
        raise UsageError(f"{file}: is there already; --force overwrites it, --print only shows")
    if not file.parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}")


def deliver(text: str, file: Path, to_stdout: bool, beside: dict[Path, str]) -> None:
    """Check the recipe, write or print it, and say how to go on. Raises RecipeError for what is no recipe."""
    from lorafit.files import write_text
    from lorafit.init.write import recipe_of

    text = from_home(text)
    recipe = recipe_of(text, file)
    console = talk()
    if to_stdout:
        typer.echo(text, nl=False)
        for path in beside:
            console.print(
                f"{path}: named by the recipe, but not written, as --print says", markup=False, soft_wrap=True
            )
    else:
        for path, content in beside.items():
            write_text(path, content)
        write_text(file, text)
    for line in doubts(recipe):
        console.print(f"not ready to train: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if not to_stdout:
        name = str(file)
        console.print(f"{name} is written. Next:", highlight=False, markup=False, soft_wrap=True)
        for command in ("validate", "estimate-vram", "preview", "train"):
            console.print(f"  lorafit {command} {name}", highlight=False, markup=False, soft_wrap=True)


def doubts(recipe: object) -> list[str]:
    """What a plan for the machine that the recipe is meant for finds wrong."""
    from lorafit.outcome import Outcomes
    from lorafit.recipe import Recipe

    assert isinstance(recipe, Recipe)
    try:
        Outcomes().of(recipe, "run", reading="digests").require_plan()
    except LorafitError as error:
        return str(error).splitlines()
    return []


def convert_other(
    source: Path,
    kind: str | None,
    file: Path,
    gpu: str | None,
    vram: str | None,
    cpu: bool,
    to_stdout: bool,
    force: bool,
) -> None:
    """Convert another tool's recipe, and list what has no equivalent."""
    from lorafit.init.peers import PEERS, convert
    from lorafit.recipe import RecipeError

    found, conversion = convert(source, file, kind)
    for key, value in (("gpu", gpu), ("vram", vram), ("device", "cpu" if cpu else None)):
        if value:
            conversion.put(f"hardware.{key}", value)
    if not to_stdout:
        for path in conversion.beside:
            refuse_overwriting(path, force)
    console = talk()
    how = "as --kind says" if kind else "by its keys"
    console.print(f"{source}: {PEERS[found].title}'s, {how}", highlight=False, markup=False, soft_wrap=True)
    for line in conversion.said():
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    try:
        deliver(conversion.document().text(), file, to_stdout, conversion.beside)
    except RecipeError as error:
        wrong = [f"{source}: can't be converted: {mistake.path}: {mistake.message}" for mistake in error.mistakes]
        raise UsageError("\n".join(wrong)) from None
