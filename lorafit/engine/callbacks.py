"""What happens beside the training steps: metrics, measured memory, progress, stopping, and the refusal of losses
and weights that are not finite."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.console import Console
from lorafit.engine.memory import Meter
from lorafit.errors import GateError, Interrupted
from lorafit.files import write_text
from lorafit.progress import Stage, stage, told
from lorafit.run.directory import RunDir
from lorafit.text import GIB


class StopRequest:
    """Remembers a SIGINT or SIGTERM, so that training can stop after its step.

    A second SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self, *signals: signal.Signals) -> None:
        """Args: the signals, if not those two."""
        self.signals = signals or (signal.SIGINT, signal.SIGTERM)
        self.signal_number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._receive) for number in self.signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number

    def agreed(self) -> int | None:
        """The signal, if any process of the run got one; every process must ask at the same step."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.signal_number
        seen = torch.tensor([self.signal_number or 0])
        if torch.distributed.get_backend() == "nccl":
            seen = seen.cuda()
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        return int(seen.item()) or None


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint after the step in which a signal came, then raises Interrupted."""

    def __init__(self, request: StopRequest, run: RunDir) -> None:
        self.request = request
        self.run = run
        self.stopping: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopping = self.request.agreed()
        if self.stopping is not None and not control.should_training_stop:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopping is not None and not control.should_training_stop:  # else the run is finished rather
            raise Interrupted(
                f"{self.run.path}: stopped after step {state.global_step} of {state.max_steps}; a checkpoint was "
                "saved, go on with --resume",
                self.stopping,
            )


class StopAfter(TrainerCallback):
    """Ends the training after some steps, as if it were interrupted there."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= self.steps:
            control.should_training_stop = True


class EvaluateAtTheEnd(TrainerCallback):
    """Evaluates after the last step too, so that the last adapter can be the best one."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True


class RefuseNonFinite(TrainerCallback):
    """Stops a run whose loss is no longer a number, before that is saved as a checkpoint."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise _diverged(f"{name} is {value}", state.global_step)


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Refuse to keep trained parameters that are no numbers, whether their step was logged or not."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise _diverged(f"{name} is not finite", step)


def _diverged(what: str, step: int) -> GateError:
    return GateError(
        f"{what} at step {step}: the run diverged; lower training.learning_rate, or look at the rows of this step"
    )


class RunningSums(TrainerCallback):
    """Goes on with the sums of a checkpoint; the trainer sets them to zero before this event."""

    def __init__(self, trainer: Any, checkpoint: Path) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.load_sums(self.checkpoint)


class MetricsFile(TrainerCallback):
    """Appends each log to metrics.jsonl, and from where on steps are computed in other passes."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.started = time.monotonic()

    def keep_until(self, step: int) -> None:
        """Take out what an interrupted run logged after its checkpoint."""
        kept = self.run.metrics_until(step)
        write_text(self.run.metrics, "".join(json.dumps(entry) + "\n" for entry in kept))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        self._append({"step": state.global_step, **logs, "seconds": round(time.monotonic() - self.started, 3)})

    def note_passes(self, step: int, passes: dict[str, int]) -> bool:
        """Note that steps are computed in other passes from now on; whether they are."""
        noted = [entry["passes"] for entry in self.run.metrics_until(step) if "passes" in entry]
        if passes == (noted[-1] if noted else self.run.load_plan().passes):
            return False
        self._append({"step": step, "passes": passes})
        return True

    def _append(self, entry: dict[str, Any]) -> None:
        with self.run.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def _of_pairs(logs: dict[str, Any], prefix: str = "") -> list[str]:
    """How often the chosen answer is the preferred one, and by how much, where pairs are learned."""
    if f"{prefix}rewards/margins" not in logs:
        return []
    accuracy, margin = logs[f"{prefix}rewards/accuracies"], logs[f"{prefix}rewards/margins"]
    return [f"preferred {accuracy:.1%}", f"margin {margin:.3f}"]


class ProgressDisplay(TrainerCallback):
    """The steps as a stage: bars on a terminal, and in a log a line for each log of the trainer, too."""

    def __init__(self, console: Console, meter: Meter, total_steps: int, already_done: int = 0) -> None:
        self.console = console
        self.meter = meter
        self.tokens_at_start: float | None = None
        self.steps = Stage("training", total_steps, "steps", already_done)
        self.under_way = contextlib.ExitStack()  # the stage, from the training's begin to the end of the block

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        under_way = stage("training", state.max_steps, "steps", state.global_step)
        self.steps = self.under_way.enter_context(under_way)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps.partly += 1 / args.gradient_accumulation_steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.steps.done, self.steps.partly = state.global_step, 0.0

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        text = self._status(state, logs)
        if self.console.is_terminal and "eval_loss" not in logs:
            self.steps.note = text
            return
        left = f"  {self.steps.left()}".rstrip() if "loss" in logs else ""
        self.console.print(f"step {state.global_step}/{state.max_steps}  {text}{left}", highlight=False, soft_wrap=True)
        if not self.console.quiet:
            told()

    def _status(self, state: TrainerState, logs: dict[str, Any]) -> str:
        if "eval_loss" in logs:
            parts = [f"validation loss {logs['eval_loss']:.4f}", *_of_pairs(logs, "eval_")]
            parts += [f"{name.removeprefix('eval_')} {value:.4f}" for name, value in logs.items() if "." in name]
            return "  ".join(parts)
        parts = [f"loss {logs['loss']:.4f}"] if "loss" in logs else []
        parts += _of_pairs(logs)
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.2e}")
        tokens = logs.get("num_tokens")
        if tokens is not None:
            if self.tokens_at_start is None:
                self.tokens_at_start, self.tokens_since = tokens, time.monotonic()
            elif time.monotonic() > self.tokens_since:
                rate = (tokens - self.tokens_at_start) / (time.monotonic() - self.tokens_since)
                parts.append(f"{rate:.0f} tokens/s")
        parts.append(f"peak {self.meter.peak() / GIB:.1f} GiB")
        return "  ".join(parts)
