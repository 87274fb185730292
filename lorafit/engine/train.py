"""Training: a plan in, a run directory out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import sort_checkpoints
from trl import SFTConfig, SFTTrainer

from lorafit.console import Console
from lorafit.engine.callbacks import (
    EvaluateAtTheEnd,
    MetricsFile,
    ProgressDisplay,
    RefuseNonFinite,
    RunningSums,
    StopAfter,
    StopOnSignal,
    StopRequest,
    check_finite,
)
from lorafit.engine.data.prepare import Prepared, prepare
from lorafit.engine.evaluate.run import rehearse
from lorafit.engine.isolation import check_isolation
from lorafit.engine.loss import row_sums, settle_head
from lorafit.engine.model import dequantize_gguf, load_base, lora_config
from lorafit.engine.quiet import hush_progress
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DoesNotFitError, LorafitError, ModelError, UsageError, is_out_of_memory
from lorafit.files import CARD, check_own, discard, partial_of, seal, staged, write_bytes
from lorafit.hardware import return_memory
from lorafit.plan import Plan, Schedule, dated, with_audit
from lorafit.plan.adapters import check_expressions
from lorafit.progress import Stage, stage
from lorafit.rows.audit import gate
from lorafit.run.card import write_card
from lorafit.run.directory import RunDir, located
from lorafit.run.fingerprint import changed_base, changed_source, listed, model_fingerprint, run_fingerprint
from lorafit.run.manifest import build_manifest, hashes
from lorafit.run.summary import print_findings
from lorafit.tree import differences, dotted
from lorafit.vram.calibrate import Foreseen, Meter, foresee, memory_record, shortage
from lorafit.written import References, as_written, expanded

ANEW = "bring that back, or start anew with --overwrite"


@dataclass(frozen=True)
class Start:
    """How to begin, and how to treat what already stands at the run directory.

    Attributes:
        lock: the text of the lock that the run is held to, which it keeps.
        recipe: the file that the recipe was read from, which must not go with an older run.
        steps: stop after so many, of a schedule for all: to repeat the beginning of a run.
    """

    resume: bool = False
    overwrite: bool = False
    lock: str | None = None
    steps: int | None = None
    recipe: str | None = None


def train(plan: Plan, recipe_text: bytes, start: Start, console: Console) -> RunDir:
    """Train as planned and write the run directory.

    Only rank 0 of several processes prints and writes. Raises LorafitError for everything that is
    expected to go wrong; Interrupted when a signal stopped the run after saving a checkpoint.
    """
    began = time.time()
    hush_progress()
    run = RunDir(located(plan.output_dir))
    main = is_main_process()
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
        if main:
            print_findings(data.audit, plan.data.audit, console)
            if not start.resume and start.steps is None:
                rehearse(plan, tokenizer, data)
            make_run(run, plan, recipe_text, start)
        foreseen = foresee(plan)
        foreseen = keep_within(plan, foreseen, console if main else None)
        meter = Meter.start(plan.hardware.device)
        trainer = build_trainer(plan, run, data, tokenizer)
        meter.loaded()
        if plan.data.packing:
            with stage("checking that packed rows don't see each other"):
                check_isolation(trainer)
        with stage(f"hashing {plan.model['name_or_path']}"):
            reading.join()
        if main and run.base_files() is None:
            run.write_base_files(as_written(run_fingerprint(plan, run), plan.references))
        checkpoint = next(iter(run.all_checkpoints()), None) if start.resume else None  # whole, as was checked
        request = StopRequest()
        schedule = plan.schedule
        assert schedule is not None
        display = add_callbacks(trainer, plan, run, schedule, request, console, meter, checkpoint)
        if start.steps is not None:
            trainer.add_callback(StopAfter(start.steps))
        measured = None
        with display.under_way:
            if checkpoint and is_last(checkpoint):
                trainer.take_up(checkpoint)
            else:
                with request.listening(), explained_out_of_memory(plan):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                measured = meter.measured()
            if plan.training_kwargs["load_best_model_at_end"] and (best := trainer.state.best_model_checkpoint):
                check_own(run.checkpoints / Path(best).name, ANEW)
                trainer.state.best_model_checkpoint = str(run.checkpoints / Path(best).name)
                trainer._load_best_model()
        check_finite(trainer.model, trainer.state.global_step)
        if main:
            if start.steps is None:
                say_what_is_kept(plan, trainer.state, schedule, console)
            memory = memory_record(foreseen, meter, measured) if measured else None
            base = run.base_files() or {}
            manifest = build_manifest(plan, base, data, trainer, schedule, began, memory)
            save_result(trainer, plan, run, tokenizer, manifest)
        wait_for_everyone()
    return run


def keep_within(plan: Plan, foreseen: Foreseen, console: Console | None) -> Foreseen:
    """On a CPU, have freed memory returned at once, which takes time, where it is short or checkpointing is to save it.

    Short memory is said on the console. Returns what is foreseen then.
    """
    short = shortage(foreseen)
    if short is None:
        if plan.hardware.device == "cpu" and plan.training_kwargs["gradient_checkpointing"]:
            return_memory()
        return foreseen
    returned = return_memory()
    if console is not None:
        console.print(short.line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    return dataclasses.replace(foreseen, estimate=short.least) if returned else foreseen


def say_what_is_kept(plan: Plan, state: TrainerState, schedule: Schedule, console: Console) -> None:
    """Say if the training stopped early, and of which step the result is where that isn't the last."""
    last, total = state.global_step, schedule.total_steps
    patience = plan.training_kwargs["early_stopping_patience"]
    if last < total and patience:
        console.print(
            f"early stopping: {patience} evaluation{'s' * (patience != 1)} in a row without a lower validation loss; "
            f"ended after step {last} of {total}",
            highlight=False,
            soft_wrap=True,
        )
    best = state.best_global_step
    if plan.training_kwargs["load_best_model_at_end"] and best and best != last:
        console.print(
            f"kept: step {best}, whose validation loss was the lowest ({state.best_metric:.4f})",
            highlight=False,
            soft_wrap=True,
        )


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def read_ahead(plan: Plan) -> threading.Thread:
    """Begin to read the base whole for its fingerprint, beside what takes longer; what is found is remembered."""

    def read() -> None:
        with contextlib.suppress(LorafitError, OSError):  # said where the fingerprint is taken
            model_fingerprint(plan)

    thread = threading.Thread(target=read if is_main_process() else lambda: None, name="lorafit-base", daemon=True)
    thread.start()
    return thread


def wait_for_everyone() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


# --- the run directory ----------------------------------------------------------------------------


def as_begun(run: RunDir, plan: Plan, start: Start) -> Plan:
    """The plan with the day on which the run that goes on was begun, for chat templates that write it."""
    if not start.resume or not run.is_run or plan.data.date is None:
        return plan
    return dated(plan, run.load_plan().data.date)


def check_start(run: RunDir, plan: Plan, start: Start) -> None:
    """Refuse what would lose or confuse a run. Raises UsageError."""
    path = run.path
    run.refuse_others()
    if not run.is_run and start.resume:
        raise UsageError(f"{path}: there is no run to resume; leave out --resume")
    if not run.is_run or is_anew(run, start):
        return
    if run.result is not None:
        raise UsageError(f"{path}: the run is finished; use --overwrite to start anew, or another output_dir")
    if start.resume:
        run.check_begun()
    before, now = run.load_plan().decides(), plan.decides()
    if before["data"]["tokenizer_sha256"] is None:  # the first run downloaded it
        now["data"]["tokenizer_sha256"] = None
    changed = changed_keys(before["recipe"], now["recipe"])
    if changed:
        raise UsageError(
            f"{path}: holds a run of another recipe ({', '.join(changed[:5])}{' …' * (len(changed) > 5)}); use "
            "--overwrite to start anew, or another output_dir"
        )
    changed = changed_keys(before, now)
    if changed and start.resume:
        raise UsageError(
            f"{path}: the recipe is the same, but the data or the machine is not ({', '.join(changed[:5])}), so the "
            "run can't go on exactly; bring back what changed, or start anew with --overwrite"
        )
    if not start.resume:
        raise UsageError(f"{path}: holds an unfinished run; go on with --resume, or start anew with --overwrite")
    changed = changed_source(plan, run) or (changed_base(plan, run) if run.base.is_dir() else [])
    if changed:
        raise UsageError(
            f"{path}: the base {plan.model['name_or_path']} is not the one that the run began with (changed: "
            f"{listed(changed)}); bring it back, or start anew with --overwrite"
        )


def is_anew(run: RunDir, start: Start) -> bool:
    """Whether a start takes the place of what a run holds."""
    return start.overwrite or (run.is_empty and not start.resume)


def check_way(run: RunDir, plan: Plan, start: Start) -> None:
    """See that nothing but lorafit's own is where a new run will be, and nothing that is needed. Raises UsageError."""
    if not run.is_begun or (run.is_run and not is_anew(run, start)):
        return
    if other := run.in_the_way(start.lock is not None):
        raise UsageError(
            f"{run.path}: {other} is in the way, which lorafit did not write; move it, or choose another output_dir"
        )
    sources = [source.path for source in (*plan.data.train, *plan.data.validation)]
    sets = [one["path"] for one in plan.eval["sets"] if one["path"]]
    named = [plan.model["name_or_path"], *sources, *sets, *filter(None, [start.recipe]), os.getcwd()]
    inside = next((name for name in named if run.holds(located(name))), None)
    if inside is not None:
        raise UsageError(f"{run.path}: would be replaced, and {inside} is in it; choose another output_dir")


def check_checkpoints(run: RunDir) -> None:
    """See that the checkpoints that a run goes on with are as they were written. Raises DriftError."""
    last = run.last_checkpoint()
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8")) if last else {}
    best = Path(state.get("best_model_checkpoint") or "").name
    for folder in {*([run.checkpoints / best] if best else []), run.start} - {last}:
        if folder.is_dir():
            check_own(folder, ANEW)


def changed_keys(before: Any, after: Any) -> list[str]:
    """The keys at which two resolved recipes or plans differ."""
    return [dotted(key) for key in sorted(key for key, _, _ in differences(before, after))]


def make_run(run: RunDir, plan: Plan, recipe_text: bytes, start: Start) -> None:
    if start.resume and not run.is_empty:
        return
    if start.overwrite:
        run.set_aside()
    else:
        run.clear()
    run.begin(plan, recipe_text, start.lock)


def is_last(checkpoint: Path) -> bool:
    """Whether the training was over when a checkpoint was saved: all steps done, or stopped early."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state["stateful_callbacks"]["TrainerControl"]["args"]
    return bool(state["global_step"] >= state["max_steps"] or control["should_training_stop"])


def dequantized_base(plan: Plan, run: RunDir) -> Path | None:
    """The folder that a GGUF base is loaded from; None for other bases. The first process makes it."""
    if plan.model["kind"] != "gguf":
        return None
    wait_for_everyone()  # until the run directory is the new run's: the one that it replaces has a base too
    if is_main_process() and not run.base.is_dir():
        dequantize_gguf(plan.model["name_or_path"], run.base, plan.model_kwargs["dtype"])
    wait_for_everyone()
    return run.base


def settle_device(plan: Plan, console: Console) -> None:
    """See that torch uses the device that the plan was made for. Raises ModelError."""
    if plan.hardware.device == "cpu":
        if torch.cuda.is_available():
            raise ModelError(
                "torch sees a GPU that the plan does not (is nvidia-smi missing?); install it, or set "
                "CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        return
    if plan.hardware.world_size == 1:  # the first GPU, as planned; must be said before CUDA starts
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0] if visible else "0"
    if not torch.cuda.is_available():
        raise ModelError("there is an NVIDIA GPU, but this torch can't use it; install a CUDA build of torch")
    if plan.hardware.world_size == 1:
        console.print(f"on the first GPU, {plan.hardware.name}; torchrun uses several", soft_wrap=True)


@contextlib.contextmanager
def explained_out_of_memory(plan: Plan) -> Iterator[None]:
    """Turn running out of memory into a DoesNotFitError that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows = plan.training_kwargs["per_device_train_batch_size"]
        raise DoesNotFitError(
            f"out of memory in training with {rows} rows of up to {plan.data.max_length} tokens at once; lower "
            "training.per_device_train_batch_size (with global_batch_size, accumulation makes up for it), turn on "
            "gradient_checkpointing, shorten max_length, or quantize the base"
        ) from error


# --- the trainer ----------------------------------------------------------------------------------


class Trainer(SFTTrainer):
    """TRL's trainer, with whole checkpoints, LoRA+, and nothing pickled that isn't needed."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, *args: Any, references: References, loraplus_lr_ratio: float | None = None, **kwargs: Any
    ) -> None:
        self.references = references
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self._evaluated = torch.zeros(4, dtype=torch.float64)
        self._validating = Stage("validating")
        super().__init__(*args, **kwargs)
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None  # not by transformers

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Add up what is measured of each row, once for all processes; a batch's own mean is for nobody."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**inputs, use_cache=False, fused_lm_head=True)
        sums = self.accelerator.gather_for_metrics(row_sums(output, inputs.get("seq_idx")))
        self._evaluated += sums.sum(0).cpu()
        self._validating.advance()
        return output.loss.detach(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Means over the learned tokens of all rows, whatever the batches, the padding and the processes."""
        self._evaluated = torch.zeros(4, dtype=torch.float64)
        loader = args[0] if args else kwargs["dataloader"]
        with stage("validating", len(loader), "batches") as self._validating:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        tokens, nll, entropy, hits = self._evaluated.tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = nll / tokens
        self._metrics["eval"] |= {
            "entropy": [entropy / tokens],
            "mean_token_accuracy": [hits / tokens],
            "num_tokens": [self._total_train_tokens],
        }
        return output

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            made: torch.optim.Optimizer = super().create_optimizer(model)
            return made
        from peft.optimizers import create_loraplus_optimizer

        optimizer_class, values = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model=self.model,
            optimizer_cls=optimizer_class,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **values,
        )
        self.optimizer = optimizer
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(self.model, folder, self.references, state_dict=state_dict)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is always saved, whatever the steps between checkpoints."""
        best = bool(super()._determine_best_metric(metrics, trial))
        if best and self.args.save_strategy != "no":
            self.control.should_save = True
        return best

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it, so that every one that exists is whole.

        The steps are those of transformers.Trainer._save_checkpoint.
        """
        check_finite(self.model, self.state.global_step)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        written = staged(folder, "checkpoint") if self.args.should_save else contextlib.nullcontext()
        with stage(f"saving {folder.name}"), written as made:
            wait_for_everyone()  # the first process made it, for all
            partial = made or partial_of(folder)
            self.store_flos()
            self.save_model(str(partial), _internal_call=True)
            if self.state.best_global_step:
                best = folder.with_name(f"checkpoint-{self.state.best_global_step}")
                if best == folder or best.is_dir():
                    self.state.best_model_checkpoint = best.name  # a run may be moved, and its place is nobody's
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            self.save_sums(partial)
            if self.args.should_save:
                RunDir(folder.parent.parent).write_begun(partial, self.state.global_step)
                self.state.stateful_callbacks.update(
                    {
                        type(callback).__name__: callback.state()
                        for callback in [*self.callback_handler.callbacks, self.control]
                        if isinstance(callback, ExportableState)
                    }
                )
                self.state.save_to_json(str(partial / "trainer_state.json"))
            wait_for_everyone()
        if self.args.should_save:
            self.rotate_checkpoints()
        wait_for_everyone()

    def rotate_checkpoints(self) -> None:
        """Keep the newest checkpoints, as many as asked for, and the best one. As transformers', but never half."""
        if not self.save_total_limit:
            return
        name = self.state.best_model_checkpoint
        best = str(Path(self.args.output_dir) / Path(name).name) if name else None
        found = sort_checkpoints(output_dir=self.args.output_dir, best_model_checkpoint=best)  # these two come last
        for checkpoint in found[: -max(self.save_total_limit, 2 if best not in (None, found[-1]) else 1)]:
            discard(Path(checkpoint))

    def sums_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"running_sums_{self.args.process_index}.json"

    def save_sums(self, checkpoint: Path) -> None:
        """What was summed up since the last log, so that the next one is the same after an interruption."""
        sums = {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": self._metrics["train"],
        }
        self.sums_file(checkpoint).write_text(json.dumps(sums), encoding="utf-8")

    def load_sums(self, checkpoint: Path) -> None:
        sums = json.loads(self.sums_file(checkpoint).read_text(encoding="utf-8"))
        self._tr_loss += sums["loss"]
        self._globalstep_last_logged = sums["last_logged"]
        self._total_train_tokens = sums["tokens"]
        self._metrics["train"].update(sums["metrics"])

    def take_up(self, checkpoint: Path) -> None:
        """Stand where the training ended: the weights and the state of its last checkpoint."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def build_trainer(plan: Plan, run: RunDir, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> Trainer:
    """The trainer with model, adapter and data in place."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    args = training_arguments(plan, run)  # from here on, several processes know each other
    base = load_base(plan, dequantized_base(plan, run))
    check_expressions(plan.lora_kwargs or {}, (name for name, _ in base.named_modules()), "lora")
    with explained_experts(plan), stage("putting the adapter on the model"):
        trainer = Trainer(
            model=base,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            peft_config=lora_config(plan),
            references=plan.references,
            loraplus_lr_ratio=plan.loraplus_lr_ratio,
        )
    trainer.remove_callback(PrinterCallback)
    name_base(trainer.model, plan.references)
    settle_adapter(trainer, plan, run)
    check_parameters(trainer, plan)
    inner = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    trainer.model.train()  # 4-bit layers on a CPU that once run for inference compute otherwise ever after
    with trainer.compute_loss_context_manager():
        settle_head(inner)
    return trainer


@contextlib.contextmanager
def explained_experts(plan: Plan) -> Iterator[None]:
    """Turn PEFT's refusal of dropout on fused experts, which it adapts in some families, into a ModelError."""
    try:
        yield
    except ValueError as error:
        if "not found in the base model" in str(error):
            raise ModelError(f"{plan.model['name_or_path']}: has other modules than its files say: {error}") from error
        if "ParamWrapper" not in str(error):
            raise
        raise ModelError(
            f"PEFT puts these lora.target_modules on the fused experts of a {plan.model['model_type']} model as well, "
            "which lorafit does not plan; use target_modules: attention"
        ) from error


class Arguments(SFTConfig):
    """TRL's arguments, which trackers log as they may be seen."""

    references: References

    def to_dict(self) -> dict[str, Any]:
        return as_written(super().to_dict(), self.references)


def training_arguments(plan: Plan, run: RunDir) -> Arguments:
    """TRL's arguments from the plan."""
    values = dict(plan.training_kwargs)
    for name in ("eval_strategy", "eval_steps", "save_strategy", "save_steps"):
        values.pop(name)  # follow from the number of rows, see add_callbacks
    values.pop("early_stopping_patience")
    values.pop("load_best_model_at_end")  # lorafit loads the best one itself
    packing = plan.data.packing
    arguments = Arguments(
        **values,
        output_dir=str(run.checkpoints),
        max_length=plan.data.max_length if packing else None,  # rows are cut already
        packing=packing,  # they are packed already, and collated without padding
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        metric_for_best_model="eval_loss" if plan.training_kwargs["eval_strategy"] != "no" else None,
        greater_is_better=False,
        logging_nan_inf_filter=False,
        restore_callback_states_from_checkpoint=True,
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        run_name=plan.name,
        dataloader_pin_memory=plan.hardware.device == "cuda",
        prediction_loss_only=True,
    )
    arguments.references = plan.references
    return arguments


def add_callbacks(
    trainer: Trainer,
    plan: Plan,
    run: RunDir,
    schedule: Schedule,
    request: StopRequest,
    console: Console,
    meter: Meter,
    checkpoint: Path | None,
) -> ProgressDisplay:
    """Set when to evaluate and save, and add what happens beside the steps."""
    args = trainer.args
    if schedule.eval_steps:
        args.eval_strategy, args.eval_steps = "steps", schedule.eval_steps
        trainer.add_callback(EvaluateAtTheEnd())
    if schedule.save_steps:
        args.save_strategy, args.save_steps = "steps", schedule.save_steps
    patience = plan.training_kwargs["early_stopping_patience"]
    if patience:
        trainer.add_callback(EarlyStoppingCallback(patience))
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    display = ProgressDisplay(console, meter, schedule.total_steps, step)
    trainer.add_callback(RefuseNonFinite())
    if checkpoint:
        trainer.add_callback(RunningSums(trainer, checkpoint))
    if is_main_process():
        metrics = MetricsFile(run)
        metrics.keep_until(step)
        trainer.add_callback(metrics)
        trainer.add_callback(display)
    trainer.add_callback(StopOnSignal(request, run))
    return display


def settle_adapter(trainer: Trainer, plan: Plan, run: RunDir) -> None:
    """Finish the adapter's start and its type.

    EVA and LoftQ start after the adapter is on the model. PiSSA and OLoRA take their start out of
    the base, so the untrained adapter is kept to save an ordinary adapter for the unchanged base.
    """
    model = trainer.model
    if plan.lora_kwargs is None or not isinstance(model, PeftModel):
        return
    start = str(plan.lora_kwargs["init_lora_weights"])
    if start == "loftq":
        from peft import replace_lora_weights_loftq

        folder = expanded(plan.model["name_or_path"])
        with stage("starting the adapter by LoftQ"):
            replace_lora_weights_loftq(model, model_path=str(folder) if folder.is_dir() else None)
    elif start == "eva":
        from peft import initialize_lora_eva_weights

        with stage("starting the adapter by EVA"):
            initialize_lora_eva_weights(model, trainer.get_train_dataloader(), show_progress_bar=False)
    elif start.startswith(("pissa", "olora")) and is_main_process() and not run.start.is_dir():
        with staged(run.start, "start") as folder:
            save_adapter(model, folder, plan.references)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(getattr(torch, plan.adapter_dtype))


def check_parameters(trainer: Trainer, plan: Plan) -> None:
    """The plan's count of trainable parameters must be the model's. Raises ModelError."""
    actual = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if plan.trainable_parameters and actual != plan.trainable_parameters:
        raise ModelError(
            f"the plan expects {plan.trainable_parameters:,} trainable parameters and the model has {actual:,}: "
            f"lorafit does not know this {plan.model['model_type']} model's layers well enough; please report it"
        )
    if actual == 0:
        raise ModelError("nothing would be trained: no module matches lora.target_modules")


def save_adapter(model: Any, folder: Path, references: References, **kwargs: Any) -> None:
    """Save what was trained, and of an adapter name the base as the recipe does; PEFT's empty card is left out.

    The names of modules, which PEFT keeps as sets, are sorted: the same run writes the same bytes.
    """
    configs = [*model.peft_config.values()] if isinstance(model, PeftModel) else []
    for one in configs:  # PEFT looks there whether the vocabulary has grown
        one.base_model_name_or_path = str(expanded(one.base_model_name_or_path or ""))
    model.save_pretrained(str(folder), **kwargs)
    name_base(model, references)
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    (folder / CARD).unlink(missing_ok=True)
    values = as_written(json.loads(config.read_text(encoding="utf-8")), references)
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(name), list):
            values[name].sort()
    config.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def name_base(model: Any, references: References) -> None:
    """Name the base in a model's configurations, which trackers log, as the recipe does."""
    for one in model.peft_config.values() if isinstance(model, PeftModel) else ():
        one.base_model_name_or_path = as_written(one.base_model_name_or_path, references)
    model.config.name_or_path = as_written(model.config.name_or_path, references)


def save_result(
    trainer: Trainer, plan: Plan, run: RunDir, tokenizer: PreTrainedTokenizerBase, manifest: dict[str, Any]
) -> None:
    """Write adapter/ (or model/), whole, with a manifest that knows its hashes; clear away what it replaces."""
    adapter = isinstance(trainer.model, PeftModel)
    name = "adapter" if adapter else "model"
    with stage(f"saving {name}"), staged(run.path / name, name) as folder:
        if adapter:
            start = {"path_initial_model_for_weight_conversion": str(run.start)} if run.start.is_dir() else {}
            before = (run.start / "adapter_config.json").read_bytes() if start else b""
            save_adapter(trainer.model, folder, plan.references, **start)
            if start:  # PEFT writes its own there
                write_bytes(run.start / "adapter_config.json", before)
        else:
            trainer.model.config.use_cache = True
            trainer.model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        write_card(folder / "README.md", plan, manifest)
        # A run with a result is finished, so the manifest is there before it.
        seal(folder, name)
        run.write_manifest(manifest | {"files": hashes(run, folder, name)})
    run.forget_replaced()
