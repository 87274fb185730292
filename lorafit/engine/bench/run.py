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
from transformers import PreTrainedTokenizerBase

from lorafit.bounds import read_json
from lorafit.engine import hush_progress
from lorafit.engine.bench.measure import (
    Clock,
    Pass,
    Runnable,
    SharedBase,
    contenders_of,
    draw_tokens,
    fit_together,
    loaded,
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


@dataclasses.dataclass(frozen=True)
class _Measured:
    """What the rounds of one model gave, by shape, and the model as it was then."""

    passes: dict[Shape, list[Pass]]
    model: BenchModel


def _bench(options: BenchOptions, run: RunDir, plan: Plan, clock: Clock) -> BenchReport:
    contenders = contenders_of(run, plan, options.models)
    tokenizer = load_tokenizer(plan, run.result)
    busy = _Load()
    prompts: dict[Shape, torch.Tensor] = {}
    measured: dict[str, _Measured] = {}
    device = torch.device("cpu")
    loadings = groups(contenders)
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
            prompts = prompts or _prompts(options, tokenizer, model)
            passes = (options.rounds + 1) * len(prompts) * len(models)
            with stage("timing", passes, "passes") as timed:
                measured |= _measure(models, prompts, options, timed, clock)
            del model, models, shared  # before the next ones load
    timings = tuple(_timings(measured, options))
    reference = next((name for name in ("adapter", "trained") if name in measured), next(iter(measured)))
    load, remarks = busy.end()
    return BenchReport(
        run=as_written(str(run.path), plan.references),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={name: version for name, version in versions().items() if name in VERSIONS},
        hardware=_hardware(device),
        settings=_settings(options, prompts),
        models={
            name: dataclasses.replace(one.model, path=as_written(one.model.path, plan.references))
            for name, one in measured.items()
        },
        timings=timings,
        ratios=tuple(ratios(timings, reference, options.seed)),
        load=load,
        remarks=(CPU_MEMORY,) * (device.type == "cpu") + (APART,) * (not together) + remarks,
    )


def _measure(
    models: list[tuple[NamedModel, SharedBase]],
    prompts: dict[Shape, torch.Tensor],
    options: BenchOptions,
    timed: Stage,
    clock: Clock,
) -> dict[str, _Measured]:
    """Every shape once to warm up, then in rounds, in which the models take turns and who is first changes."""
    passes: dict[str, dict[Shape, list[Pass]]] = {one.name: {shape: [] for shape in prompts} for one, _ in models}
    for number in range(options.rounds + 1):
        for shape, ids in prompts.items():
            for contender, shared in models if number % 2 else reversed(models):
                model = shared.use(contender.kind == "adapter")
                done = run_pass(model, ids.to(model.device), options.new_tokens, clock)
                if number:
                    passes[contender.name][shape].append(done)
                timed.advance()
    return {one.name: _Measured(passes[one.name], _described(one, shared, passes[one.name])) for one, shared in models}


def _described(contender: NamedModel, shared: SharedBase, passes: dict[Shape, list[Pass]]) -> BenchModel:
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


def _timings(measured: dict[str, _Measured], options: BenchOptions) -> Iterator[Timing]:
    for name, one in measured.items():
        for shape, passes in one.passes.items():
            above = [done.above_bytes for done in passes if done.above_bytes is not None]
            yield timing(
                name,
                (shape.prompt_tokens, shape.batch, options.new_tokens),
                [(done.prefill_seconds, done.decode_seconds) for done in passes],
                one.model.tensor_bytes + max(above) if above else None,
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


def _prompts(options: BenchOptions, tokenizer: PreTrainedTokenizerBase, model: Runnable) -> dict[Shape, torch.Tensor]:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return {shape: draw_tokens(tokenizer, vocabulary, shape, options.seed) for shape in options.shapes}


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


class _Load:
    """Whether other processes were at work."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> float | None:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def end(self) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
        """The load at the start and now, and a remark if either is above the number of cores."""
        now = self._now()
        if self._start is None or now is None:
            return None, ()
        load = (round(self._start, 2), round(now, 2))
        if max(load) <= _cores():
            return load, ()
        return load, (
            f"The machine was busy (load {load[0]} at the start, {load[1]} at the end, {_cores()} cores): the figures "
            "can't be compared with others.",
        )
