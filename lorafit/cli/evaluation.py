"""`lorafit eval`, `lorafit chat` and `lorafit bench`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.common import AsJson, Locked, RunPath, check_locked, fail, reporting, run_of, show
from lorafit.cli.complete import runs
from lorafit.errors import GateError, UsageError
from lorafit.progress import talk

Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=PATH", help="Another adapter, or a run's, on the same base; repeatable."),
]


@reporting
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|CONFIG", help="A run directory, or the recipe of one.", autocompletion=runs)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the eval section; repeatable."),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="M1,M2",
            help="base, adapter, merged, or paths of other runs.  [default: those that there are]",
        ),
    ] = None,
    adapter: Adapters = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Rows to evaluate on instead of the held-out ones.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Rows to generate answers for.  [default: eval.limit]")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", min=1, help="Tokens an answer may have.  [default: eval.max_new_tokens]"),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option("--fail-under", metavar="GATE", help="Exit with 6 unless this holds; repeatable, for CI."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option("--baseline", metavar="FILE", help="An earlier results.json: exit with 6 if it was better."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: eval/ in the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted evaluation.")] = False,
    locked: Locked = False,
    show_rows: Annotated[int, typer.Option("--show", min=0, help="Answers to print.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compare base, adapter and merged model on the same rows, with intervals, gates and reports."""
    from lorafit.options.evaluate import Options, parse_adapter, parse_compare

    options = Options(
        path,
        overrides=tuple(overrides or ()),
        compare=parse_compare(compare),
        adapters=tuple(map(parse_adapter, adapter or ())),
        data=data,
        limit=limit,
        max_new_tokens=max_new_tokens,
        fail_under=tuple(fail_under or ()),
        baseline=baseline,
        output=output,
        resume=resume,
    )
    options.check()
    if locked:
        check_locked(path)
    from lorafit.files import refuse_busy

    run_of(path).refuse_busy(shared=True)
    refuse_busy(options.destination(run_of(path)))
    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.evaluate.run import evaluate as run_evaluation
    from lorafit.evaluation.report.text import print_results
    from lorafit.evaluation.report.write import read_samples

    results, folder = run_evaluation(options)
    if as_json:
        show(results.model_dump(mode="json"))
    else:
        print_results(results, list(read_samples(folder, show_rows)))
        typer.echo(str(folder / results.files["html"]))
    if results.failed:
        fail("\n".join(f"{gate.where}: {gate.gate}: {gate.sentence}" for gate in results.failed), GateError.exit_code)


@reporting
def chat(
    path: Annotated[
        str,
        typer.Argument(metavar="RUN|MODEL", help="A run directory, a model folder or a hub id.", autocompletion=runs),
    ],
    adapter: Adapters = None,
    use: Annotated[
        str | None, typer.Option("--use", metavar="NAME", help="The model that answers first.  [default: the run's]")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and leave; repeatable, in turn.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens an answer may have.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn at a temperature.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk to a model in the terminal, and switch between base and adapters on the fly."""
    from lorafit.options.evaluate import parse_adapter

    adapters = tuple((one.name, one.path) for one in map(parse_adapter, adapter or ()))
    from lorafit.options.chat import ChatOptions, from_stdin

    prompts = tuple(prompt or ()) or from_stdin(sys.stdin)
    if as_json and not prompts:
        fail("--json prints answers to --prompt, or to what comes on stdin", UsageError.exit_code)
    options = ChatOptions(path, adapters, prompts, system, max_new_tokens, temperature, seed, use)
    options.check()
    from lorafit.run.directory import RunDir, located

    RunDir(located(path)).refuse_busy(shared=True)

    def write(text: str) -> None:
        if not as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.chat.run import chat as run_chat

    turns = run_chat(options, talk(), input, write)
    if as_json:
        show([asdict(turn) for turn in turns])


@reporting
def bench(
    run: RunPath,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="M1,M2", help="base, adapter, merged, quantized.  [default: what there is]"),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option("--prompt-tokens", metavar="N1,N2", help="Tokens of a prompt.")
    ] = "128,512",
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens generated after it.")] = 64,
    batch: Annotated[str, typer.Option("--batch", metavar="N1,N2", help="Prompts at once.")] = "1,8",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Repetitions, models in turn.")] = 5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the prompts' tokens.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write a .json or .md file as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast base, adapter, merged and quantized model answer, and how much memory each takes."""
    from lorafit.options.bench import BenchOptions, parse_models, parse_numbers

    options = BenchOptions(
        run,
        models=parse_models(model) if model else (),
        prompt_tokens=parse_numbers("--prompt-tokens", prompt_tokens),
        new_tokens=new_tokens,
        batch=parse_numbers("--batch", batch),
        rounds=rounds,
        seed=seed,
        output=output,
    )
    options.check()
    run_of(run).refuse_busy(shared=True)
    from lorafit.engine.quiet import hush

    hush()
    from lorafit.engine.bench.report import print_bench
    from lorafit.engine.bench.run import bench as run_bench

    report = run_bench(options)
    show(report.as_dict()) if as_json else print_bench(report)
