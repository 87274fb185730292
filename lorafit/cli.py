"""The command line: parse, call, print. The only place that prints results or exits.

Heavy modules are imported inside the commands that need them.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from lorafit.errors import (
    DataError,
    DoesNotFitError,
    Interrupted,
    LorafitError,
    ModelError,
    UsageError,
    is_out_of_memory,
)

if TYPE_CHECKING:
    from rich.console import Console

    from lorafit.plan import Plan

app = typer.Typer(
    name="lorafit",
    help="Fine-tune a language model from one YAML recipe, and know that it is true.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The recipe, a YAML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, such as runs/quickstart.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


HEAD_START = 3.0
"""Seconds that the first of several processes has for saying what is wrong."""

P = ParamSpec("P")
R = TypeVar("R")


def reporting(command: Callable[P, R]) -> Callable[P, R]:
    """Turn expected failures, and SIGTERM, into one message on stderr and their exit code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        before = signal.signal(signal.SIGTERM, terminated)
        try:
            return command(*args, **kwargs)
        except Interrupted as error:
            fail(str(error), 128 + error.signal_number)
        except LorafitError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(0) from None
        except Exception as error:
            if is_disk_full(error):
                fail(f"the disk is full: {error}", DoesNotFitError.exit_code)
            if is_out_of_memory(error):
                fail(f"out of memory: {error}", DoesNotFitError.exit_code)
            if isinstance(error, OSError) and error.filename:
                fail(f"{error.filename}: {error.strerror}", UsageError.exit_code)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    return wrapped


def terminated(number: int, _: Any) -> NoReturn:
    """SIGTERM outside the steps of a training: what is being written is given up, whole."""
    raise Interrupted("terminated; nothing is half written, and a run goes on from its last checkpoint", number)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, from whatever library, comes from a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "os error 28" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong and exit.

    Of several processes the first speaks. What another one meets alone it says after a while: if the first met it
    too, torchrun has ended this process by then.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(message, err=True)
    elif code < 128:  # a signal is for all
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(HEAD_START)
        typer.echo(f"process {rank}: {message}", err=True)
    raise typer.Exit(code)


def talk() -> Console:
    """Where progress and remarks go: stderr, of the first process only."""
    from rich.console import Console

    return Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


def make_plan(config: Path, overrides: list[str] | None, count_rows: bool = False) -> Plan:
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe

    return plan_recipe(Recipe.load(config, overrides or ()), config, count_rows=count_rows)


def show(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@app.command()
@reporting
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; load no weights.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew; the old run is kept until the new one is done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train as a recipe says, into its run directory."""
    if resume and overwrite:
        fail("--resume and --overwrite exclude each other", 2)
    written = config.read_bytes() if config.is_file() else b""
    plan = make_plan(config, overrides, count_rows=dry_run)
    if dry_run:
        from lorafit.show import print_plan

        show(json.loads(plan.to_json())) if as_json else print_plan(plan)
        if plan.audit:
            from lorafit.audit import Audit, gate

            gate(Audit.from_dict(plan.audit), plan.data.audit)
        return
    if not written or config.read_bytes() != written:
        fail(f"{config}: has changed while it was read, or is no file; a run keeps its recipe as it was read", 2)
    from lorafit.quiet import hush

    hush()
    from lorafit.train import Start
    from lorafit.train import train as run_training

    console = talk()
    for remark in plan.remarks:
        console.print(remark, style="yellow", highlight=False, soft_wrap=True)
    run = run_training(plan, written, Start(resume, overwrite), console)
    result = run.load_manifest().get("result", {}) | {"run": str(run.path), "result": str(run.result)}
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        show(result)
    else:
        typer.echo(f"{result['result']}")


@app.command()
@reporting
def preview(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="Rows to show, from the first.")] = 3,
    row: Annotated[
        list[int] | None, typer.Option("--row", min=1, help="Show this row of the training rows (from 1); repeatable.")
    ] = None,
    validation: Annotated[bool, typer.Option("--validation", help="Show validation rows instead.")] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Show the token ids as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the data as the model will see it, and audit it; exits with 3 if training would be refused."""
    plan = make_plan(config, overrides)
    from lorafit.quiet import hush

    hush()
    from lorafit.preview import preview as run_preview
    from lorafit.show import print_preview

    report = run_preview(plan, row or list(range(1, rows + 1)), bool(row), validation, ids, talk())
    show(report) if as_json else print_preview(report)
    if report["breaches"]:
        fail("\n".join(report["breaches"]), DataError.exit_code)


@app.command("eval")
@reporting
def evaluate(
    run: RunPath,
    data: Annotated[
        Path | None, typer.Option("--data", help="Rows to evaluate on instead of the held-out ones.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows to generate answers for.")] = 100,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens an answer may have.")] = 256,
    show_rows: Annotated[int, typer.Option("--show", min=0, help="Answers to print.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare base and adapter on held-out rows: loss, perplexity and greedy answers."""
    from lorafit.quiet import hush

    hush()
    from lorafit.evaluate import evaluate as run_evaluation
    from lorafit.show import print_evaluation

    report = run_evaluation(run, data, limit, max_new_tokens, talk())
    show(report) if as_json else print_evaluation(report, show_rows)


@app.command()
@reporting
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a folder with an adapter.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: merged/ in the run.")] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="auto|stream|full", help="stream: tensor by tensor; full: in memory.")
    ] = "auto",
    base: Annotated[
        str | None, typer.Option("--base", metavar="NAME", help="The base, if not where the run or adapter says.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge into a base that is not the one of the training.")
    ] = False,
    base_weights: Annotated[
        str | None,
        typer.Option("--base-weights", metavar="original|dequantized|auto", help="For QLoRA: which weights to add to."),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16.  [default: as stored]")
    ] = "auto",
    verify: Annotated[
        str | None, typer.Option("--verify", metavar="logits|weights|none", help="How much is proved.  [default: auto]")
    ] = None,
    max_kl: Annotated[float | None, typer.Option("--max-kl", metavar="X", help="Short for merge.max_kl.")] = None,
    min_top1: Annotated[float | None, typer.Option("--min-top1", metavar="X", help="Short for merge.min_top1.")] = None,
    max_loss_increase: Annotated[
        float | None, typer.Option("--max-loss-increase", metavar="X", help="Short for merge.max_loss_increase.")
    ] = None,
    max_logit_difference: Annotated[
        float | None, typer.Option("--max-logit-difference", metavar="X", help="Short for merge.max_logit_difference.")
    ] = None,
    weight: Annotated[float, typer.Option("--weight", metavar="X", help="Factor of the run's own adapter.")] = 1.0,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", metavar="RUN:X", help="Add another adapter, X times; below 0 subtracts. Repeatable."),
    ] = None,
    combine: Annotated[
        str,
        typer.Option("--combine", metavar="HOW", help="linear, ties, dare_linear, dare_ties or magnitude_prune."),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option("--density", metavar="X", help="Share of each delta that --combine keeps.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what DARE drops.")] = 0,
    as_adapter: Annotated[
        bool, typer.Option("--as-adapter", help="Make one adapter of several (SVD) instead of a model.")
    ] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=1, metavar="R", help="With --as-adapter.")] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="nf4|fp4", help="A 4-bit copy of the merged model as well.")
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option("--export", metavar="gguf:KIND", help="f16, bf16, q8_0 …, with an Ollama Modelfile. Repeatable."),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option("--llama-cpp", metavar="DIR", help="Export by llama.cpp's own converter, in this folder."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="ID", help="Upload the merged model, such as me/my-model.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub.")] = False,
    check_vllm: Annotated[
        bool, typer.Option("--check-vllm", help="Only tell whether vLLM can serve the adapter unmerged, and how.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, prove the result, and save it as a model that transformers loads alone."""
    if check_vllm:
        show_vllm(run, as_json)
        return
    from lorafit.merge import Options
    from lorafit.merge.options import (
        BaseWeights,
        Combine,
        Dtype,
        Method,
        Quantize,
        Verify,
        named_limits,
        one_of,
        parse_addition,
    )

    limits = named_limits(
        max_kl=max_kl,
        min_top1=min_top1,
        max_loss_increase=max_loss_increase,
        max_logit_difference=max_logit_difference,
    )
    options = Options(
        run,
        output,
        method=one_of("--method", method, Method),
        dtype=one_of("--dtype", dtype, Dtype),
        base=base,
        base_weights=one_of("--base-weights", base_weights, BaseWeights),
        allow_other_base=allow_other_base,
        verify=one_of("--verify", verify, Verify),
        limits=limits,
        weight=weight,
        additions=tuple(parse_addition(text) for text in add or ()),
        combine=one_of("--combine", combine, Combine),
        density=density,
        seed=seed,
        as_adapter=as_adapter,
        rank=rank,
        quantize=one_of("--quantize", quantize, Quantize),
        exports=tuple(export or ()),
        llama_cpp=llama_cpp,
        push_to_hub=push_to_hub,
        private=private,
    )
    options.check()
    from lorafit.quiet import hush

    hush()
    from lorafit.merge.make import merge as run_merge

    destination = run_merge(options, talk())
    if as_json:
        report = json.loads((destination / "merge_report.json").read_text(encoding="utf-8"))
        show(report | {"merged": str(destination)})
    else:
        typer.echo(str(destination))


def show_vllm(path: Path, as_json: bool) -> None:
    """Whether vLLM can serve an adapter as it is; exits with 4 if not."""
    from dataclasses import asdict

    from lorafit.export.vllm import check_vllm
    from lorafit.rundir import RunDir

    adapter = RunDir(path).adapter if RunDir(path).is_run else path
    report = check_vllm(adapter)
    if as_json:
        show(asdict(report))
    else:
        for remark in report.remarks:
            typer.echo(remark, err=True)
        if report.command:
            typer.echo(report.command)
    if not report.servable:
        fail("\n".join(f"{adapter}: {reason}" for reason in report.reasons), ModelError.exit_code)


@app.command("estimate-vram")
@reporting
def estimate_vram(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="The recipe, a YAML file.")] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="A model in place of a recipe, with defaults.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="lora|qlora|full", help="With --model.  [default: lora]")
    ] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Short for training.max_length.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Short for training.per_device_train_batch_size.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help="A GPU that it should fit, such as 'RTX 4090'; repeatable."),
    ] = None,
    vram: Annotated[
        list[str] | None,
        typer.Option("--vram", metavar="SIZE", help="Memory that it should fit, such as 24GiB; repeatable."),
    ] = None,
    assert_fits: Annotated[
        list[str] | None,
        typer.Option(
            "--assert-fits", metavar="GPU|SIZE", help="Exit with 5 unless it certainly fits; repeatable, for CI."
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", metavar="N", help="GPUs that train together.")] = None,
    sharding: Annotated[
        str | None,
        typer.Option("--sharding", metavar="HOW", help="none, ddp, fsdp, fsdp_offload, zero1, zero2 or zero3."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="KEY=V1,V2", help="Estimate for each value of a key; repeatable."),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Run the real modules on tensors without data: exact, takes seconds.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it, as .png or .svg.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens of an epoch, for cost.")] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", metavar="X", help="Of one GPU, for cost; needs --gpu.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", metavar="RUN", help="How far off the estimates of finished runs were; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a recipe's memory from tensor shapes, without weights or a GPU, and say where it fits."""
    if calibrate:
        others = (config, model, method, overrides, max_length, batch, gpu, vram, assert_fits, gpus, sharding, sweep)
        if any(given is not None for given in (*others, plot, tokens, price)) or trace:
            fail("--calibrate reads runs; it goes with --json alone", UsageError.exit_code)
        show_calibration(calibrate, as_json)
        return
    from lorafit.vram.ask import Asked, ask

    asked = Asked(
        config=config,
        model=model,
        method=method,
        overrides=tuple(overrides or ()),
        max_length=max_length,
        batch=batch,
        gpus=tuple(gpu or ()),
        sizes=tuple(vram or ()),
        asserted=tuple(assert_fits or ()),
        world=gpus,
        sharding=sharding,
        sweeps=tuple(sweep or ()),
        trace=trace,
        plot=plot,
        tokens=tokens,
        price=price,
    )
    if trace:
        talk().print("tracing a training step, which takes some seconds …", highlight=False)
    reply = ask(asked)
    if as_json:
        show(reply.as_dict())
    else:
        from lorafit.vram.show import print_reply

        print_reply(reply)
    if reply.failures:
        fail("\n".join(reply.failures), DoesNotFitError.exit_code)


def show_calibration(runs: list[Path], as_json: bool) -> None:
    from lorafit.vram.calibrate import calibrate
    from lorafit.vram.show import print_calibration

    found = calibrate(runs)
    show(found.as_dict()) if as_json else print_calibration(found)


@app.command()
@reporting
def schema() -> None:
    """Print the recipe's JSON Schema (2020-12)."""
    from lorafit.recipe.docs import json_schema

    show(json_schema())


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from lorafit import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # what a terminal can't show is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
