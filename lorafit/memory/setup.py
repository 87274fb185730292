"""What the memory of one training process depends on: the estimator's inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lorafit.facts import ModelFacts

Checkpointing = Literal["none", "reentrant", "non_reentrant"]
LossPath = Literal["fused", "logits", "logits_shifted", "logits_upcast", "liger", "compact"]
Kernel = Literal["rms_norm", "swiglu", "rope", "cross_entropy"]
Sharding = Literal["none", "ddp", "fsdp", "fsdp_offload", "zero1", "zero2", "zero3"]


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
        lora: for LoraConfig; None in full training.
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
    lora: dict[str, Any] | None
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

    @property
    def tokens(self) -> int:
        """Tokens in one pass, padding included."""
        return self.batch * self.length
