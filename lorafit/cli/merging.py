"""`lorafit merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.common import AsJson, Locked, check_locked, fail, reporting, run_of, show
from lorafit.cli.complete import runs
from lorafit.errors import ModelError
from lorafit.progress import talk


@reporting
def merge(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run directory, or a folder with an adapter.", autocompletion=runs)
    ],
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make anew what is there already; it is kept until that is done.")
    ] = False,
    locked: Locked = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, prove the result, and save it as a model that transformers loads alone."""
    if check_vllm:
        show_vllm(run, as_json)
        return
    from lorafit.options.merge import (
        BaseWeights,
        Combine,
        Dtype,
        Method,
        Options,
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
        overwrite=overwrite,
    )
    options.check()
    if locked:
        check_locked(run)
    from lorafit.files import refuse_busy

    run_of(run).refuse_busy(shared=True)
    refuse_busy(options.destination())
    options.claim([options.path])
    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.merge.run import merge as run_merge

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
    from lorafit.run.directory import RunDir

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
