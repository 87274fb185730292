"""Supervised fine-tuning: rows with labels on what is learned, TRL's trainer, and what is checked before its steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import PreTrainedTokenizerBase

from lorafit.engine.data.encode import Lengths, TokenRow, read_examples, tokenize
from lorafit.engine.data.render import Renderer
from lorafit.errors import ModelError
from lorafit.plan.values import DataPlan, Plan
from lorafit.progress import stage
from lorafit.rows import Row, Shape
from lorafit.rows.audit import SourceAudit
from lorafit.run.directory import RunDir

if TYPE_CHECKING:
    from lorafit.engine.data.prepare import Prepared
    from lorafit.engine.trainer import Checkpointed, Trainer

T = TypeVar("T", bound="Checkpointed")


def encode(
    rows: Iterable[Row], shape: Shape, plan: DataPlan, renderer: Renderer, audit: SourceAudit
) -> Iterator[list[TokenRow]]:
    """Tokens of rows, learned where the plan's `loss_on` says, in batches. Raises DataError."""
    return tokenize(read_examples(rows, shape, audit), renderer, Lengths.of(plan), audit)


def build(plan: Plan, run: RunDir, data: Prepared, tokenizer: PreTrainedTokenizerBase) -> Trainer:
    """The trainer with model, adapter and data in place. Raises ModelError, DoesNotFitError."""
    from lorafit.engine.trainer import Trainer, training_arguments

    return assemble(Trainer, training_arguments, plan, run, data, tokenizer)


def assemble(
    kind: type[T],
    arguments: Callable[[Plan, RunDir], Any],
    plan: Plan,
    run: RunDir,
    data: Prepared,
    tokenizer: PreTrainedTokenizerBase,
    **more: Any,
) -> T:
    """A trainer of TRL's with model, adapter and data in place, its head settled.

    Args:
        more: what the trainer takes besides.

    Raises ModelError, DoesNotFitError.
    """
    from lorafit.engine.adapters import module_of  # torch and TRL take seconds, and data is prepared without them
    from lorafit.engine.loss import settle_head
    from lorafit.engine.model import dequantized_base, load_base, put_kernels
    from lorafit.engine.trainer import name_base

    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    args = arguments(plan, run)  # from here on, several processes know each other
    base = load_base(plan, dequantized_base(plan, run))
    put_kernels(base, plan.model.kernels)
    adapter = module_of(plan.adapter)
    modules = [name for name, _ in base.named_modules()]
    with adapter.put_on(plan, modules) if adapter else contextlib.nullcontext():
        trainer = kind(
            model=base,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=tokenizer,
            peft_config=adapter.config(plan.lora_kwargs or {}) if adapter else None,
            references=plan.references,
            make_optimizer=adapter.optimizer(plan) if adapter else None,
            **more,
        )
    name_base(trainer.model, plan.references)
    if adapter:
        adapter.start(trainer, plan, run)
    _check_parameters(trainer, plan)
    inner = trainer.model.get_base_model() if adapter else trainer.model
    trainer.model.train()  # 4-bit layers on a CPU that once run for inference compute otherwise ever after
    with trainer.compute_loss_context_manager():
        settle_head(inner, mean_logits=plan.preference is not None)
    return trainer


def check(trainer: Trainer, plan: Plan) -> None:
    """See that packed rows don't see each other. Raises ModelError."""
    from lorafit.engine.trainer import check_isolation

    if plan.data.packing:
        with stage("checking that packed rows don't see each other"):
            check_isolation(trainer)


def _check_parameters(trainer: Checkpointed, plan: Plan) -> None:
    """See that the plan's count of trainable parameters is the model's. Raises ModelError."""
    actual = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if plan.trainable_parameters and actual != plan.trainable_parameters:
        raise ModelError(
            f"the plan expects {plan.trainable_parameters:,} trainable parameters and the model has {actual:,}: "
            f"lorafit does not know this {plan.model.model_type} model's layers well enough; please report it"
        )
    if actual == 0:
        raise ModelError("nothing would be trained: no module matches lora.target_modules")
