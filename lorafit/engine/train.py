"""Training: a plan in, a run directory out; and what is said when memory runs out."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from transformers import TrainerState

from lorafit.console import Console
from lorafit.engine import hush_progress
from lorafit.engine.callbacks import StopAfter, StopRequest, check_finite
from lorafit.engine.data.prepare import prepare
from lorafit.engine.evaluate.run import figure_of_steps, rehearse
from lorafit.engine.memory import Meter, explained_out_of_memory, keep_within
from lorafit.engine.methods import module_of
from lorafit.engine.model import wait_for_everyone
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.engine.trainer import Checkpointed, add_callbacks, is_last, save_result
from lorafit.errors import LorafitError, ModelError
from lorafit.files import check_own
from lorafit.plan import Plan, Schedule, with_audit
from lorafit.progress import is_first_process, stage
from lorafit.rows.audit import gate
from lorafit.run.directory import RunDir, located
from lorafit.run.fingerprint import model_fingerprint, run_fingerprint
from lorafit.run.manifest import (
    ANEW,
    Start,
    as_begun,
    build_manifest,
    check_base_of_start,
    check_checkpoints,
    check_start,
    check_way,
    make_run,
)
from lorafit.run.memory import Foreseen, foresee, memory_record
from lorafit.run.summary import print_findings
from lorafit.written import as_written


def train(plan: Plan, recipe_text: bytes, start: Start, console: Console) -> RunDir:
    """Train as planned and write the run directory.

    Only rank 0 of several processes prints and writes. Raises LorafitError for everything that is
    expected to go wrong; Interrupted when a signal stopped the run after saving a checkpoint.
    """
    began = time.time()
    hush_progress()
    run = RunDir(located(plan.output_dir))
    main = is_first_process()
    if main:
        run.restore()
    plan = as_begun(run, plan, start)
    check_start(run, plan, start)
    settle_device(plan, console)
    with run.lock() if main else contextlib.nullcontext():
        if main:  # another process may have been at it until now
            check_start(run, plan, start)
            check_way(run, plan, start)
            if start.resume:
                check_checkpoints(run)
        reading = read_ahead(plan)
        tokenizer = load_tokenizer(plan)
        data = prepare(plan.data, tokenizer)
        gate(data.audit, plan.data.audit)
        plan = with_audit(plan, data.audit)
        figure = figure_of_steps(plan, tokenizer, data) if main else None
        if main:
            print_findings(data.audit, plan.data.audit, console)
            if not start.resume and start.steps is None:
                rehearse(plan, tokenizer, data)
            make_run(run, plan, recipe_text, start)
        foreseen = keep_within(plan, foresee(plan), console if main else None)
        meter = Meter.start(plan.hardware.device)
        method = module_of(plan.method.name)
        trainer = method.build(plan, run, data, tokenizer)
        trainer.figure = figure
        meter.loaded()
        method.check(trainer, plan)
        with stage(f"hashing {plan.model.name_or_path}"):
            reading.join()
        if main and run.base_files() is None:
            run.write_base_files(as_written(run_fingerprint(plan, run), plan.references))
        check_base_of_start(plan, run)
        measured = go_on(trainer, plan, run, start, foreseen, meter, console)
        if main:
            schedule = plan.schedule
            assert schedule is not None
            if start.steps is None:
                say_what_is_kept(plan, trainer.state, schedule, console)
                say_how_pairs_moved(plan, trainer.state, console)
            memory = memory_record(foreseen, meter.device, meter.baseline, measured) if measured else None
            manifest = build_manifest(
                plan, run.base_files() or {}, data.final_audit(), trainer, schedule, began, memory
            )
            save_result(trainer, plan, run, manifest)
        wait_for_everyone()
    return run


def go_on(
    trainer: Checkpointed, plan: Plan, run: RunDir, start: Start, foreseen: Foreseen, meter: Meter, console: Console
) -> dict[str, int] | None:
    """Train to the end, from the last checkpoint of a run that is resumed, and take the best step's weights if asked.

    Returns the peak of memory; None if the training was over already.
    """
    checkpoint = next(iter(run.all_checkpoints()), None) if start.resume else None  # whole, as was checked
    request, measured = StopRequest(), None
    display = add_callbacks(trainer, plan, run, request, console, meter, checkpoint)
    if start.steps is not None:
        trainer.add_callback(StopAfter(start.steps))
    with display.under_way:
        if checkpoint and is_last(checkpoint):
            trainer.take_up(checkpoint)
        else:
            with request.listening(), explained_out_of_memory(plan, foreseen, meter):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            measured = meter.measured()
        if plan.training.load_best_model_at_end and (best := trainer.state.best_model_checkpoint):
            folder = run.checkpoints / Path(best).name
            check_own(folder, ANEW)
            trainer.state.best_model_checkpoint = str(folder)
            trainer._load_best_model()
    check_finite(trainer.model, trainer.state.global_step)
    return measured


def say_what_is_kept(plan: Plan, state: TrainerState, schedule: Schedule, console: Console) -> None:
    """Say if the training stopped early, and of which step the result is where that isn't the last."""
    last, total = state.global_step, schedule.total_steps
    patience = plan.training.early_stopping_patience
    if last < total and patience:
        console.print(
            f"early stopping: {patience} evaluation{'s' * (patience != 1)} in a row without a better "
            f"{plan.training.best_by}; ended after step {last} of {total}",
            highlight=False,
            soft_wrap=True,
        )
    best = state.best_global_step
    if plan.training.load_best_model_at_end and best and best != last:
        console.print(
            f"kept: step {best}, whose {plan.training.best_by} was the best ({state.best_metric:.4f})",
            highlight=False,
            soft_wrap=True,
        )


def say_how_pairs_moved(plan: Plan, state: TrainerState, console: Console) -> None:
    """Say if the chosen answers became less likely although the margin grew, as the validation rows have it."""
    found = [entry for entry in state.log_history if "eval_rewards/chosen" in entry]
    if plan.training.load_best_model_at_end:
        found = [entry for entry in found if entry["step"] == state.best_global_step]
    if (
        plan.preference is None
        or not found
        or not found[-1]["eval_rewards/margins"] > 0 > found[-1]["eval_rewards/chosen"]
    ):
        return
    less = -found[-1]["eval_rewards/chosen"] / plan.preference.beta
    console.print(
        f"the margin grew, and yet the chosen answers became less likely, by {less:.3g} nats each: a higher beta, or "
        "an sft term in loss_type, holds them",
        style="yellow",
        highlight=False,
        soft_wrap=True,
    )


def read_ahead(plan: Plan) -> threading.Thread:
    """Begin to read the base whole for its fingerprint, beside what takes longer; what is found is remembered."""

    def read() -> None:
        with contextlib.suppress(LorafitError, OSError):  # said where the fingerprint is taken
            model_fingerprint(plan)

    thread = threading.Thread(target=read if is_first_process() else lambda: None, name="lorafit-base", daemon=True)
    thread.start()
    return thread


def settle_device(plan: Plan, console: Console) -> None:
    """See that torch uses the device that the plan was made for. Raises ModelError."""
    if plan.hardware.device == "cpu":
        if torch.cuda.is_available():
            raise ModelError(
                "torch sees a GPU that the plan does not (is nvidia-smi missing?); install it, or set "
                "CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        return
    if plan.hardware.device == "mps":
        if not torch.backends.mps.is_available():
            raise ModelError("this torch can't use the Apple GPU; ACCELERATE_USE_CPU=true trains on the CPU")
        return
    amd = plan.hardware.compute_capability is None
    build = "ROCm" if amd else "CUDA"
    if not torch.cuda.is_available() or (torch.version.hip is not None) is not amd:
        raise ModelError(
            f"there is {plan.hardware.name}, but this torch can't use it; install a {build} build of torch"
        )
    if plan.quantization_kwargs is not None and not bnb.cextension.lib.compiled_with_cuda:
        raise ModelError(
            f"quantization: bitsandbytes has no kernels for this torch's {build}; `python -m bitsandbytes` says why"
        )
    if plan.hardware.world_size == 1:
        console.print(f"on the first GPU, {plan.hardware.name}; torchrun uses several", soft_wrap=True)
