"""Learning from pairs: their batches, TRL's trainer over them, the reference, and the proof that it is the start."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from lorafit.engine.data.encode import IGNORED
from lorafit.engine.evaluate.batches import ones, padded
from lorafit.engine.evaluate.likelihood import likelihoods
from lorafit.engine.trainer import Checkpointed, Shown, common_arguments
from lorafit.errors import ModelError
from lorafit.plan import Plan
from lorafit.plan.values import Preference
from lorafit.progress import Stage, each, stage
from lorafit.run.directory import RunDir

SIDES = ("chosen", "rejected")
REFERENCE = tuple(f"ref_{side}_logps" for side in SIDES)
"""Columns of the reference's log-likelihoods of both answers."""


class PairArguments(Shown, DPOConfig):
    """TRL's arguments for pairs."""


def pair_arguments(plan: Plan, run: RunDir) -> PairArguments:
    """Arguments of TRL's trainer for pairs."""
    asked = plan.preference
    assert asked is not None
    arguments = PairArguments(
        **common_arguments(plan, run),
        max_length=None,  # rows are cut already
        loss_type=list(asked.loss_type),
        loss_weights=list(asked.loss_weights),
        beta=asked.beta,
        label_smoothing=asked.label_smoothing,
        precompute_ref_log_probs=True,
        disable_dropout=False,  # the recipe's holds
    )
    arguments.references = plan.references
    return arguments


@contextlib.contextmanager
def unhashed() -> Iterator[None]:
    """Spare TRL the hash of all weights, by which it would know its cache of the reference: `refer` computes that."""
    with mock.patch("trl.trainer.dpo_trainer.hash_module", return_value=""):
        yield


@dataclass
class PairCollator:
    """Pairs as one batch, as TRL's trainer takes it: the chosen answers' rows, then the rejected ones'."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row[name] for name in ("input_ids", "rejected_ids") for row in rows]
        labels = [row[name] for name in ("labels", "rejected_labels") for row in rows]
        made = {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded(ones(ids), 0),
            "completion_mask": (padded(labels, IGNORED) != IGNORED).long(),
        }
        return made | {name: torch.tensor([row[name] for row in rows]) for name in REFERENCE if name in rows[0]}


class PairTrainer(Checkpointed, DPOTrainer):
    """TRL's trainer for pairs, whose validation means do not depend on batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sums: dict[str, float] = {}
        self._validating = Stage("validating")
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset  # `refer` does, once the adapter has its start

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "rejected_ids", "rejected_labels", *REFERENCE]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Add up what is measured of each pair, once for all processes; a batch's own mean is for nobody."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels,
                use_cache=False,
                fused_lm_head=True,
            )
            loss = torch.stack(
                [self._compute_loss(*_alone(output, inputs, pair), False) for pair in range(len(labels) // 2)]
            )
        self._metrics["eval"].clear()  # of this batch
        logps = output.log_probs.sum(1).chunk(2)
        rewards = [self.beta * (mine - inputs[name]) for mine, name in zip(logps, REFERENCE, strict=True)]
        found = {
            "loss": loss,
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            **{f"rewards/{side}": one for side, one in zip(SIDES, rewards, strict=True)},
            **{f"logps/{side}": one for side, one in zip(SIDES, logps, strict=True)},
        }
        table = torch.stack([torch.ones_like(loss), *found.values()], 1).double()
        sums = self.accelerator.gather_for_metrics(table).sum(0).tolist()
        for name, value in zip(("pairs", *found), sums, strict=True):
            self._sums[name] += value
        self._validating.advance()
        return loss.detach().mean(), None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Means over all pairs, whatever the batches and the processes."""
        self._sums = defaultdict(float)
        loader = args[0] if args else kwargs["dataloader"]
        with stage("validating", len(loader), "batches") as self._validating:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        pairs = self._sums.pop("pairs")
        output.metrics.update({f"{metric_key_prefix}_{name}": value / pairs for name, value in self._sums.items()})
        self.measure_best(output.metrics, metric_key_prefix)
        return output


def _alone(
    output: Any, inputs: dict[str, torch.Tensor], pair: int
) -> tuple[Callable[..., Any], dict[str, torch.Tensor]]:
    """What the model made of one pair of a batch, as a model, and that pair as a batch."""
    both = [pair, len(inputs["input_ids"]) // 2 + pair]
    kept = {
        name: value[both] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
        for name, value in vars(output).items()
    }
    batch = {name: value[[pair]] if name in REFERENCE else value[both] for name, value in inputs.items()}
    return lambda **_: SimpleNamespace(**kept), batch


class _Answers(Sequence[dict[str, Any]]):
    """The answers of pairs, one after the other, as rows with tokens and labels."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        names = (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))[index % 2]
        row = self.pairs[index // 2]
        return dict(zip(("input_ids", "labels"), (row[name] for name in names), strict=True))


class Referred(torch.utils.data.Dataset[dict[str, Any]]):
    """Pairs with the reference's log-likelihoods."""

    def __init__(self, pairs: Dataset, logps: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        self.pairs, self.logps = pairs, logps

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.pairs[int(index)]
        return row | dict(zip(REFERENCE, self.logps[index].tolist(), strict=True))


def refer(trainer: PairTrainer, plan: Plan) -> None:
    """Give every pair the reference's log-likelihoods of its answers, computed once, without gradients."""
    for name in ("train_dataset", "eval_dataset"):
        pairs = getattr(trainer, name)
        if pairs is None:
            continue
        with reference(trainer, plan):
            found = of_answers(trainer, pairs)
        setattr(trainer, name, Referred(pairs, found))


@contextlib.contextmanager
def reference(trainer: PairTrainer, plan: Plan) -> Iterator[None]:
    """The model as the reference: as it is before the first step, or without the adapter that goes on."""
    model, training = trainer.model, trainer.model.training
    without = plan.preference is not None and plan.preference.reference == "base" and plan.start_from is not None
    model.eval()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.training = True  # on a CPU one that is run for inference would compute otherwise ever after
    try:
        with model.disable_adapter() if without else contextlib.nullcontext(), trainer.compute_loss_context_manager():
            yield
    finally:
        model.train(training)


def of_answers(trainer: PairTrainer, pairs: Dataset) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(pairs, 2) summed log-likelihoods of the chosen and the rejected answers, by all processes together."""
    accelerator = trainer.accelerator
    mine = range(accelerator.process_index, len(pairs), accelerator.num_processes)
    made = likelihoods(trainer.model, _Answers(pairs.select(mine)), trainer.processing_class.pad_token_id)
    made = each(made, "log-likelihoods of the reference", 2 * len(mine), "answers")
    found = [(mine[one.row // 2], one.row % 2, -one.nll) for one in made]
    table = np.full((len(pairs), 2), np.nan, dtype=np.float32)
    for row, side, value in gather_object(found):
        table[row, side] = value
    if not np.isfinite(table).all():
        raise ModelError("the reference's log-likelihoods are not finite; the model's weights are broken")
    return table


_LN2 = math.log(2)
KNOWN_AT_START: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda beta, smooth: _LN2,
    "sigmoid_norm": lambda beta, smooth: _LN2,
    "robust": lambda beta, smooth: _LN2,
    "hinge": lambda beta, smooth: 1.0,
    "ipo": lambda beta, smooth: (1 / (2 * beta)) ** 2,
    "exo_pair": lambda beta, smooth: -0.5 * (math.log(1 - smooth) + math.log(smooth)) - _LN2,
    "nca_pair": lambda beta, smooth: 2 * _LN2,
    "bco_pair": lambda beta, smooth: 2 * _LN2,
    "sppo_hard": lambda beta, smooth: 2 * (0.5 / beta) ** 2,
    "apo_zero": lambda beta, smooth: 1.0,
    "apo_down": lambda beta, smooth: 1.0,
    "discopop": lambda beta, smooth: 0.5 * _LN2 + 0.5,
}
"""Each loss of a pair, by beta and label_smoothing, while policy and reference are the same."""


def at_start(asked: Preference) -> float | None:
    """The loss while policy and reference are the same; None with a term that depends on the answers."""
    if not set(asked.loss_type) <= KNOWN_AT_START.keys():
        return None
    return sum(
        weight * KNOWN_AT_START[name](asked.beta, asked.label_smoothing)
        for name, weight in zip(asked.loss_type, asked.loss_weights, strict=True)
    )


def check_start(trainer: PairTrainer, plan: Plan) -> None:
    """See that the reference is the start's own output, and that the loss is what follows from that.

    The policy's log-likelihoods are those of a pass of a step, dropout off. Raises ModelError.
    """
    asked = plan.preference
    assert asked is not None
    count = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(count)]))
    exact = trainer.model.dtype == torch.float32 and not getattr(trainer.model, "is_quantized", False)
    rounding = 1e-5 if exact and not (trainer.args.bf16 or trainer.args.fp16) else 2e-2
    with stage("checking that the reference is the start"), reference(trainer, plan), torch.no_grad():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        made = trainer.model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        mine = made.log_probs.sum(1).chunk(2)
        for side, logps, column in zip(SIDES, mine, REFERENCE, strict=True):
            apart = ((logps - batch[column]).abs() / batch[column].abs().clamp_min(1)).max().item()
            if not apart <= rounding:
                raise ModelError(
                    f"the reference's log-likelihoods of the {side} answers differ from those of its model by "
                    f"{apart:.1e}, and rounding allows {rounding:.0e}: the reference is not what it is said to be"
                )
        loss = trainer._compute_loss(lambda **_: made, batch | dict(zip(REFERENCE, mine, strict=True)), False).item()
    trainer._metrics["eval"].clear()
    expected = at_start(asked)
    if expected is not None and not math.isclose(loss, expected, rel_tol=1e-4, abs_tol=1e-6):
        raise ModelError(
            f"the loss of a policy that is its reference is {loss:.6f}, and {', '.join(asked.loss_type)} make "
            f"{expected:.6f} of it"
        )
