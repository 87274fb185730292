"""Running a benchmark: a run's models in turns, each shape in rounds.

A base and the adapter on it share one loading. All models are in memory together if they fit, since a machine's speed
changes over minutes by more than the rounds of one minute show; else they are measured one after the other.

Memory is that of tensors. The peak is measured on CUDA only: on a CPU, what a process has resident depends on the
models that it held before and on the allocator, not on this model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lorafit.bounds import read_json
from lorafit.engine import hush_progress
from lorafit.engine.bench.measure import (
    Clock,
    Pass,
    Runnable,
    SharedBase,
    draw_tokens,
    fit_together,
    loaded,
    models_of,
    run_pass,
    tensor_bytes,
)
from lorafit.engine.bench.report import BenchModel, BenchReport, Timing, as_markdown, ratios, timing
from lorafit.engine.evaluate.models import NamedModel, groups
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import UsageError
from lorafit.files import write_text
from lorafit.hardware import detect
from lorafit.options import BenchOptions, Shape
from lorafit.plan import Plan
from lorafit.progress import Stage, stage
from lorafit.run.directory import RunDir, open_run
from lorafit.run.manifest import versions
from lorafit.written import as_written

VERSIONS = ("lorafit", "torch", "transformers", "peft", "bitsandbytes")
CPU_MEMORY = (
    "Memory is that of tensors; no peak is measured on a CPU, where it depends on what the process held before."
)


APART = (
    "The models don't fit in memory together, so they were measured one after the other: changes of the machine's "
    "speed meanwhile are in their ratios, but not in the intervals."
)


def bench(options: BenchOptions, clock: Clock = time.perf_counter) -> BenchReport:
    """Time a run's models, and write the report if the options say where.

    Raises UsageError for a model that the run does not have, ModelError for one that is of another run.
    """
    options.check()
    hush_progress()
    with open_run(options.run) as (run, plan):
        report = _bench(options, run, plan, clock)
    if options.output is not None:
        as_json = options.output.suffix == ".json"
        text = json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n" if as_json else as_markdown(report)
        write_text(options.output, text)
    return report


Passes = dict[Shape, list[Pass]]
"""What the rounds of one model gave."""


def _bench(options: BenchOptions, run: RunDir, plan: Plan, clock: Clock) -> BenchReport:
    candidates = models_of(run, plan, options.models)
    tokenizer = load_tokenizer(plan, run.result)
    load = os.getloadavg()[0]
    prompts: dict[Shape, torch.Tensor] = {}
    passes: dict[str, Passes] = {}
    measured: dict[str, BenchModel] = {}
    device = torch.device("cpu")
    loadings = groups(candidates)
    together = fit_together(plan, len(loadings))
    for turns in [loadings] if together else [[group] for group in loadings]:
        with contextlib.ExitStack() as stack:
            models: list[tuple[NamedModel, SharedBase]] = []
            for group in turns:
                shared = stack.enter_context(loaded(group))
                models += [(one, shared) for one in group]
            model = models[0][1].use(models[0][0].kind == "adapter")
            device = model.device
            _check_lengths(options, model)
            vocabulary = int(model.config.get_text_config().vocab_size)
            for shape in options.shapes if not prompts else ():
                prompts[shape] = draw_tokens(tokenizer, vocabulary, shape, options.seed)
            with stage("timing", (options.rounds + 1) * len(prompts) * len(models), "passes") as timed:
                passes |= _measure(models, prompts, options, timed, clock)
            for one, shared in models:
                made = _described(one, shared, passes[one.name])
                measured[one.name] = dataclasses.replace(made, path=as_written(made.path, plan.references))
            del model, models, shared  # before the next ones load
    timings = tuple(_timings(passes, measured, options))
    reference = next((name for name in ("adapter", "trained") if name in measured), next(iter(measured)))
    loads = (round(load, 2), round(os.getloadavg()[0], 2))
    return BenchReport(
        run=as_written(str(run.path), plan.references),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: version for name, version in versions().items() if name in VERSIONS},
        hardware=_hardware(device),
        settings=_settings(options, prompts),
        models=measured,
        timings=timings,
        ratios=tuple(ratios(timings, reference, options.seed)),
        load=loads,
        remarks=(CPU_MEMORY,) * (device.type == "cpu") + (APART,) * (not together) + _busy(*loads),
    )


def _measure(
    models: list[tuple[NamedModel, SharedBase]],
    prompts: dict[Shape, torch.Tensor],
    options: BenchOptions,
    timed: Stage,
    clock: Clock,
) -> dict[str, Passes]:
    """Every shape once to warm up, then in rounds, in which the models take turns and who is first changes."""
    passes: dict[str, Passes] = {one.name: {shape: [] for shape in prompts} for one, _ in models}
    for number in range(options.rounds + 1):
        for shape, ids in prompts.items():
            for contender, shared in models if number % 2 else reversed(models):
                model = shared.use(contender.kind == "adapter")
                done = run_pass(model, ids.to(model.device), options.new_tokens, clock)
                if number:
                    passes[contender.name][shape].append(done)
                timed.advance()
    return passes


def _described(contender: NamedModel, shared: SharedBase, passes: Passes) -> BenchModel:
    model = shared.use(contender.kind == "adapter")
    longest = max(passes, key=lambda shape: shape.prompt_tokens)
    last = passes[longest][-1]
    quantization = contender.quantization
    if contender.name == "quantized":
        quantization = read_json(Path(contender.path) / "config.json")["quantization_config"]["bnb_4bit_quant_type"]
    return BenchModel(
        "quantized" if contender.name == "quantized" else contender.kind,
        contender.path,
        str(model.dtype).removeprefix("torch."),
        quantization,
        tensor_bytes(model),
        last.cache_bytes / (last.cached_tokens * longest.batch),
    )


def _timings(passes: dict[str, Passes], models: dict[str, BenchModel], options: BenchOptions) -> Iterator[Timing]:
    for name, shape, done in ((name, shape, done) for name, of in passes.items() for shape, done in of.items()):
        above = [one.above_bytes for one in done if one.above_bytes is not None]
        yield timing(
            name,
            (shape.prompt_tokens, shape.batch, options.new_tokens),
            [(one.prefill_seconds, one.decode_seconds) for one in done],
            models[name].tensor_bytes + max(above) if above else None,
            options.seed,
        )


def _check_lengths(options: BenchOptions, model: Runnable) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = max(options.prompt_tokens) + options.new_tokens
    if most is not None and asked > most:
        raise UsageError(
            f"--prompt-tokens {max(options.prompt_tokens)} and --new-tokens {options.new_tokens}: make {asked} "
            f"positions, and the model has {most}"
        )


def _settings(options: BenchOptions, prompts: dict[Shape, torch.Tensor]) -> dict[str, Any]:
    return {
        "prompt_tokens": list(options.prompt_tokens),
        "batch": list(options.batch),
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "seed": options.seed,
        "token_digests": {
            f"{shape.prompt_tokens}x{shape.batch}": hashlib.sha256(ids.numpy().tobytes()).hexdigest()
            for shape, ids in prompts.items()
        },
    }


def _hardware(device: torch.device) -> dict[str, Any]:
    """The device that was used, which may be a CPU where there is a GPU."""
    here = detect()
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else here.name
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "cores": _cores()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _busy(before: float, after: float) -> tuple[str, ...]:
    """A remark if other processes were at work: where a load is above the number of cores."""
    if max(before, after) <= _cores():
        return ()
    return (
        f"The machine was busy (load {before} at the start, {after} at the end, {_cores()} cores): the figures "
        "can't be compared with others.",
    )
