"""What the memory of one training process depends on: the estimator's inputs, and those of a plan."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from lorafit.errors import ModelError, UsageError
from lorafit.facts import ModelFacts
from lorafit.plan import Plan
from lorafit.plan.adapters import Adapter, Full, Lora
from lorafit.recipe import LoraSection

Checkpointing = Literal["none", "reentrant", "non_reentrant"]
LossPath = Literal["fused", "logits", "logits_shifted", "logits_upcast", "liger", "compact"]
Kernel = Literal["rms_norm", "swiglu", "rope", "cross_entropy"]
Sharding = Literal["none", "ddp", "fsdp", "fsdp_offload", "zero1", "zero2", "zero3"]
MOST_TOKENS = 1 << 26
"""Tokens in one pass above which a size is taken for a slip."""


@dataclass(frozen=True)
class Stack:
    """How the software spends memory, where the recipe has no say. The defaults are lorafit's.

    Attributes:
        loss: `fused` is TRL's head, which never holds the logits; `compact` lorafit's head for CPUs; `logits` is
            transformers 5's loss on whole logits; `logits_upcast` that of transformers up to 4.45 (logits in float32
            and a shifted copy), `logits_shifted` that of 4.46 to 4.48 (the same beside the 16-bit logits); `liger`
            Liger's fused head.
        autocast: type in which matrix products are done; None: in that of their inputs.
        kernels: fused kernels in place of modules: they keep fewer copies.
        upcast: PEFT's prepare_model_for_kbit_training: what isn't quantized becomes float32.
        use_cache: keys and values are copied for generation even in training.
        keep_outputs: the training loop holds the model's outputs, logits included, through the backward pass.
        clip_gradients: the norm of the gradients is limited.
    """

    loss: LossPath = "fused"
    autocast: str | None = None
    kernels: frozenset[Kernel] = frozenset()
    upcast: Literal["none", "norms", "all"] = "none"
    use_cache: bool = False
    keep_outputs: bool = False
    clip_gradients: bool = True


@dataclass(frozen=True)
class Setup:
    """One process's training step.

    Attributes:
        batch: rows at once.
        length: tokens a row, as padded or packed.
        masked: whether padding reaches the attention as a mask; eval_masked: in evaluation.
        packed: rows of several examples, laid end to end in one row of batch x length tokens.
        quantization: for BitsAndBytesConfig; None without.
        lora: None in full training.
        accumulation: forward and backward passes a step.
        supervised: share of the positions whose label is learned.
        eval_batch: rows at once in evaluation; 0 without.
        device: whose kernels run.
        compute_capability: of the GPU: it decides about workspaces and 4-bit kernels.
    """

    facts: ModelFacts
    batch: int
    length: int
    dtype: str
    quantization: dict[str, Any] | None
    lora: LoraSection | None
    adapter_dtype: str
    optimizer: str
    checkpointing: Checkpointing
    attention: str
    masked: bool = False
    packed: bool = False
    accumulation: int = 1
    supervised: float = 1.0
    eval_batch: int = 0
    eval_masked: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    compute_capability: tuple[int, int] = (8, 0)
    world: int = 1
    sharding: Sharding = "none"
    stack: Stack = field(default_factory=Stack)

    @functools.cached_property
    def adapter(self) -> Adapter:
        return Full() if self.lora is None else Lora(self.lora)

    @property
    def tokens(self) -> int:
        """Tokens in one pass, padding included."""
        return self.batch * self.length

    @property
    def drops(self) -> bool:
        """Whether what goes into an adapter is dropped out."""
        return self.lora is not None and self.lora.lora_dropout > 0


def setup_of(plan: Plan, facts: ModelFacts, sharding: Sharding | None = None) -> Setup:
    """What the plan runs, with every row as long as max_length: the most that a step can take.

    Several rows of different lengths are padded to the longest, and then a mask reaches the attention.
    Raises ModelError where the shapes aren't known.
    """
    training, data = plan.training, plan.data
    cuda = plan.hardware.device == "cuda"
    mixed = "bfloat16" if training.bf16 else "float16" if training.fp16 else None
    batch = training.per_device_train_batch_size * plan.method.sequences
    world = plan.hardware.world_size
    validates = bool(data.validation) or data.validation_fraction is not None
    eval_batch = training.per_device_eval_batch_size * plan.method.sequences
    if not validates or training.eval_strategy == "no":
        eval_batch = 0
    return Setup(
        facts=known_tensors(facts),
        batch=batch,
        length=data.max_length,
        dtype=plan.dtype,
        quantization=plan.quantization_kwargs,
        lora=LoraSection.model_validate(plan.recipe["lora"]) if plan.recipe["lora"] is not None else None,
        adapter_dtype=plan.adapter_dtype,
        optimizer=training.optim,
        checkpointing="non_reentrant" if training.gradient_checkpointing else "none",
        attention=plan.attention,
        masked=batch > 1 and not data.packing,
        packed=data.packing,
        accumulation=training.gradient_accumulation_steps,
        eval_batch=eval_batch,
        eval_masked=eval_batch > 1 and not data.packing,
        device=plan.hardware.device,
        compute_capability=plan.hardware.compute_capability or (8, 0),
        world=world,
        sharding=sharding or ("ddp" if world > 1 else "none"),
        stack=Stack(
            loss="fused" if cuda else "compact",
            autocast=mixed,
            clip_gradients=bool(training.max_grad_norm),
        ),
    )


def known_tensors(facts: ModelFacts) -> ModelFacts:
    """Raises ModelError where the shapes aren't known."""
    if not facts.tensors:
        raise ModelError(
            f"{facts.name}: the tensors of a {facts.model_type} model are not known without its safetensors files"
        )
    return facts


def check_size(setup: Setup) -> None:
    """Raises UsageError for what must be a slip."""
    for name, rows in (("per_device_train_batch_size", setup.batch), ("per_device_eval_batch_size", setup.eval_batch)):
        if rows * setup.length > MOST_TOKENS:
            raise UsageError(
                f"training.{name}: {rows:,} rows of {setup.length:,} tokens at once are more than {MOST_TOKENS:,} "
                "tokens; are the sizes right?"
            )
