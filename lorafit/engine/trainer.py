"""What every method's trainer has, such as whole checkpoints; TRL's for supervised fine-tuning; saving a result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerState
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from lorafit.console import Console
from lorafit.engine.callbacks import (
    EvaluateAtTheEnd,
    MetricsFile,
    ProgressDisplay,
    RefuseNonFinite,
    RunningSums,
    StopOnSignal,
    StopRequest,
    check_finite,
)
from lorafit.engine.loss import row_sums
from lorafit.engine.memory import Meter
from lorafit.engine.model import wait_for_everyone
from lorafit.errors import ModelError
from lorafit.files import discard, partial_of, seal, staged, write_bytes
from lorafit.plan import Plan
from lorafit.progress import Stage, is_first_process, stage
from lorafit.run.directory import RunDir
from lorafit.run.manifest import hashes
from lorafit.run.summary import write_card
from lorafit.text import first_line
from lorafit.written import References, as_written, expanded


class Checkpointed(transformers.Trainer):
    """What every method adds to its TRL trainer, before which it stands among the bases.

    Whole checkpoints, sums that outlive an interruption, an adapter's own optimizer, and nothing pickled that isn't
    needed.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *args: Any,
        references: References,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        **kwargs: Any,
    ) -> None:
        self.references = references
        self.figure: Callable[[Any], float] | None = None  # of the first process: SET.METRIC of metric_for_best_model
        self.make_optimizer = make_optimizer
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None  # not by transformers

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.make_optimizer is not None and self.optimizer is None:
            self.optimizer = self.make_optimizer(self)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        return made

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

    def measure_best(self, metrics: dict[str, float], prefix: str) -> None:
        """Add the figure of the evaluation that metric_for_best_model names; the first process measures it, for all."""
        best_by = self.args.metric_for_best_model or ""
        if "." in best_by:
            (value,) = broadcast_object_list([self.figure(self.model) if self.figure else None])
            metrics[f"{prefix}_{best_by}"] = value

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
        found = RunDir(Path(self.args.output_dir).parent).all_checkpoints()
        best = Path(self.state.best_model_checkpoint or "").name
        kept = {folder.name for folder in found[: self.save_total_limit]}
        if best not in kept and any(folder.name == best for folder in found):
            kept = {folder.name for folder in found[: max(self.save_total_limit - 1, 1)]} | {best}
        for folder in found:
            if folder.name not in kept:
                discard(folder)

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


class Trainer(Checkpointed, SFTTrainer):
    """TRL's trainer for supervised fine-tuning, whose validation means do not depend on batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._evaluated = torch.zeros(4, dtype=torch.float64)
        self._validating = Stage("validating")
        super().__init__(*args, **kwargs)

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
        output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = hits / tokens
        self.measure_best(output.metrics, metric_key_prefix)
        self._metrics["eval"] |= {
            "entropy": [entropy / tokens],
            "mean_token_accuracy": [hits / tokens],
            "num_tokens": [self._total_train_tokens],
        }
        return output


class Shown(transformers.TrainingArguments):
    """What stands before TRL's arguments among the bases: trackers log them as they may be seen."""

    references: References

    def to_dict(self) -> dict[str, Any]:
        return as_written(super().to_dict(), self.references)


class Arguments(Shown, SFTConfig):
    """TRL's arguments for supervised fine-tuning."""


def common_arguments(plan: Plan, run: RunDir) -> dict[str, Any]:
    """The arguments of every method's TRL trainer."""
    values = dict(plan.training_kwargs)
    for what in ("eval", "save"):
        for name in (f"{what}_strategy", f"{what}_steps", f"{what}s_per_epoch"):
            values.pop(name)  # follow from the number of rows, see add_callbacks
    values.pop("early_stopping_patience")
    values.pop("load_best_model_at_end")  # lorafit loads the best one itself
    return values | {
        "output_dir": str(run.checkpoints),
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "run_name": plan.name,
        "dataloader_pin_memory": plan.hardware.device == "cuda",
        "prediction_loss_only": True,
    }


def training_arguments(plan: Plan, run: RunDir) -> Arguments:
    """Arguments of TRL's trainer for supervised fine-tuning."""
    packing = plan.data.packing
    arguments = Arguments(
        **common_arguments(plan, run),
        max_length=plan.data.max_length if packing else None,  # rows are cut already
        packing=packing,  # they are packed already, and collated without padding
        eval_packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    arguments.references = plan.references
    return arguments


def add_callbacks(
    trainer: Checkpointed,
    plan: Plan,
    run: RunDir,
    request: StopRequest,
    console: Console,
    meter: Meter,
    checkpoint: Path | None,
) -> ProgressDisplay:
    """Set when to evaluate and save, and add what happens beside the steps."""
    args, schedule = trainer.args, plan.schedule
    assert schedule is not None
    if schedule.eval_steps:
        args.eval_strategy, args.eval_steps = "steps", schedule.eval_steps
        trainer.add_callback(EvaluateAtTheEnd())
    if schedule.save_steps:
        args.save_strategy, args.save_steps = "steps", schedule.save_steps
    patience = plan.training.early_stopping_patience
    if patience:
        trainer.add_callback(EarlyStoppingCallback(patience))
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    display = ProgressDisplay(console, meter, schedule.total_steps, step)
    trainer.add_callback(RefuseNonFinite())
    if checkpoint:
        trainer.add_callback(RunningSums(trainer, checkpoint))
    if is_first_process():
        metrics = MetricsFile(run)
        metrics.keep_until(step)
        if checkpoint and metrics.note_passes(step, plan.passes):
            rows, times = plan.training.per_device_train_batch_size, plan.training.gradient_accumulation_steps
            kept = ", with gradient checkpointing" * plan.training.gradient_checkpointing
            console.print(f"from step {step} on, {rows} rows at once, {times} passes a step{kept}", soft_wrap=True)
        trainer.add_callback(metrics)
        trainer.add_callback(display)
    trainer.add_callback(StopOnSignal(request, run))
    return display


def is_last(checkpoint: Path) -> bool:
    """Whether the training was over when a checkpoint was saved: all steps done, or stopped early."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state["stateful_callbacks"]["TrainerControl"]["args"]
    return bool(state["global_step"] >= state["max_steps"] or control["should_training_stop"])


FIRST, SECOND = 7, 9
"""Tokens of the two rows by which `check_isolation` proves that packed rows do not see each other."""


@torch.no_grad()
def check_isolation(trainer: Any) -> None:
    """Pack two rows as training does, and look at what the second becomes. Raises ModelError.

    It may neither change with the row before it (attention, a recurrent state or a convolution that
    reaches over the boundary), nor differ from what it becomes alone (positions that don't restart).
    What is allowed is rounding, relative to the spread of the logits.
    """
    model, collate = trainer.model, trainer.data_collator
    config = model.config.get_text_config()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2 * FIRST + SECOND,), generator=draw).tolist()
    first, other, second = ids[:FIRST], ids[FIRST : 2 * FIRST], ids[2 * FIRST :]

    def logits(*rows: list[int]) -> torch.Tensor:
        joined = [token for row in rows for token in row]
        batch = collate([{"input_ids": joined, "labels": joined, "seq_lengths": [len(row) for row in rows]}])
        batch.pop("labels")
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
        }
        with trainer.compute_loss_context_manager():
            found: torch.Tensor = model(**inputs, use_cache=False).logits[0, -SECOND:].float()
        return found

    here = f"this {config.model_type} model with attn_implementation {config._attn_implementation}"
    training = model.training
    model.eval()
    try:
        packed, elsewhere, alone = logits(first, second), logits(other, second), logits(second)
    except (ValueError, TypeError, NotImplementedError) as error:  # transformers refuses some models itself
        raise ModelError(f"rows can't be packed for {here}: {first_line(error)}; set training.packing: false") from None
    finally:
        model.train(training)
    spread = packed.std().item() or 1.0
    seen = (packed - elsewhere).abs().max().item() / spread
    moved = (packed - alone).abs().max().item() / spread
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    # LLM.int8() picks its outliers over all rows at once, so there one row does round another.
    mixes = getattr(model, "is_loaded_in_8bit", False)
    if seen > (0.05 if mixes else 1e-4 if exact else 2e-3) or moved > (1e-3 if exact else 0.25):
        what = "see each other" if seen > moved / 10 else "do not begin at position 0"
        raise ModelError(
            f"packed rows {what} in {here}: packing changes a row's logits by {max(seen, moved):.2g} of their spread; "
            "set training.packing: false"
        )


def save_adapter(model: Any, folder: Path, references: References, **kwargs: Any) -> None:
    """Save what was trained, and of an adapter name the base as the recipe does; PEFT's empty card is left out.

    The names of modules, which PEFT keeps as sets, are sorted: the same run writes the same bytes.
    """
    configs = [*model.peft_config.values()] if isinstance(model, PeftModel) else []
    for one in configs:  # PEFT looks there whether the vocabulary has grown
        one.base_model_name_or_path = str(expanded(one.base_model_name_or_path or ""))
    cards = mock.patch.object(PeftModel, "create_or_update_model_card")  # lorafit writes its own
    with cards if configs else contextlib.nullcontext():
        model.save_pretrained(str(folder), **kwargs)
    name_base(model, references)
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
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


def save_result(trainer: Any, plan: Plan, run: RunDir, manifest: dict[str, Any]) -> None:
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
        trainer.processing_class.save_pretrained(str(folder))
        write_card(folder / "README.md", plan, manifest)
        # A run with a result is finished, so the manifest is there before it.
        seal(folder, name)
        run.write_manifest(manifest | {"files": hashes(run, folder, name)})
    run.forget_replaced()
