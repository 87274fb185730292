"""What the estimator is asked (a process, as a plan has it), an estimate as a value, and how far estimates were off
on measured runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal

from lorafit.errors import ModelError, UsageError
from lorafit.facts import ModelFacts
from lorafit.plan import Plan
from lorafit.plan.adapters import Adapter
from lorafit.text import MIB

CONTEXT = (300 * MIB, 900 * MIB, 1500 * MIB)
"""Bytes that CUDA takes for its context and the loaded kernels: least, the middle, most.

About 300 MiB with lazily loaded kernels (CUDA 11.7 on), 600 to 700 on a B200 with CUDA 13, 1.3 to 1.5 GB on an
RTX 5070 Ti with Triton and bitsandbytes loaded.
"""
DRIVER = 0.01
"""Share of what a driver reports that torch never sees: 0.6% of an H100, 1.1% of an A100 80GB, 2.3% of a T4."""
NCCL = (300 * MIB, 500 * MIB, 1600 * MIB)
"""Bytes that NCCL takes for one communicator between several GPUs: a planning guess from reports of 0.3 to 1.6 GB."""

PROCESS = (480 * MIB, 600 * MIB, 850 * MIB)
"""Bytes that a training process on a CPU has resident beside its tensors: Python, torch and the other libraries, the
tokenizer, rows. Measured: 570 to 750 MiB."""


@dataclass(frozen=True)
class Term:
    """One part of the memory: bytes, how many and why, and where that is known from."""

    name: str
    bytes: int
    why: str
    source: str = ""


@dataclass(frozen=True)
class Band:
    """How far estimates of this kind were off: relative to measured runs, and how many of them there were.

    Attributes:
        error: such as 0.03; an assumption where `rows` is 0.
        rows: measured runs with the same features.
        features: what the runs share with this one; what no run covers.
    """

    error: float
    rows: int
    features: str

    @property
    def status(self) -> str:
        return f"validated, {self.rows} rows" if self.rows else "unvalidated"


@dataclass(frozen=True)
class Estimate:
    """The memory of one training process at its peak, in bytes.

    Attributes:
        terms: what is allocated at the peak; their sum is `allocated`.
        moment: when that is, such as "backward pass of a layer".
        reserved: what the allocator holds at most, fragmentation included: torch's on a GPU (where it gives cached
            memory back for want of room, what it holds afterwards), the C library's on a CPU.
        paged: optimizer states in managed memory: on the GPU while there is room, in main memory otherwise.
        method: "closed form" or "trace".
        notes: what the estimate assumes, a sentence each.
        timeline: (event, allocated, reserved) of a trace.
        phases: (index of the first event, name) of a trace.
        device: "cuda" or "cpu".
        gpus: that take part.
        served: whether the allocator can serve every request at the capacity that was asked for.
    """

    terms: tuple[Term, ...]
    moment: str
    reserved: int
    method: str
    band: Band
    paged: int = 0
    notes: tuple[str, ...] = ()
    timeline: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)
    phases: tuple[tuple[int, str], ...] = field(default=(), repr=False)
    device: str = "cuda"
    gpus: int = 1
    served: bool = True

    @property
    def allocated(self) -> int:
        return sum(term.bytes for term in self.terms)

    @property
    def beside(self) -> tuple[int, int, int]:
        """What stands beside the allocator, in bytes: least, usual, most."""
        if self.device == "cpu":
            return PROCESS
        low, usual, high = CONTEXT
        return (low + NCCL[0], usual + NCCL[1], high + NCCL[2]) if self.gpus > 1 else (low, usual, high)

    @property
    def total(self) -> int:
        """What is used in all: reserved and `beside`, which is CUDA's context and NCCL, or the process on a CPU."""
        return self.reserved + self.beside[1]

    @property
    def least(self) -> int:
        return round(self.reserved * (1 - self.band.error)) + self.beside[0]

    @property
    def most(self) -> int:
        return round(self.reserved * (1 + self.band.error)) + self.beside[2]


def fits(estimate: Estimate, capacity: int) -> str:
    """Whether a device with so many bytes will do: "fits", "tight" (within the error) or "does not fit"."""
    if estimate.most <= capacity:
        return "fits"
    return "tight" if estimate.least <= capacity else "does not fit"


def judged(estimated: Callable[[int | None], Estimate], capacity: int) -> tuple[Estimate, str]:
    """The estimate and the verdict for a capacity, from estimates by capacity (None: without a limit).

    What is held beyond what is allocated may be given back: then it is tight rather than too much.
    """
    known = estimated(None)
    verdict = fits(known, capacity)
    if known.device == "cpu" and known.total > capacity:  # then train has large blocks returned at once
        short = estimated(capacity)
        return (short, fits(short, capacity)) if short.served else (known, verdict)
    if verdict == "does not fit" and known.allocated + known.beside[0] <= capacity:
        short = estimated(capacity)
        if short.served:
            return short, "tight"
    return known, verdict


GROUPED = ("method", "logits", "gpus")
"""What decides about the size of an error: what is trained, whether whole logits exist, one GPU or shards."""
LEAST = 0.03
"""No band is narrower: a few runs say little about the next."""
UNCOVERED = 0.08
"""Assumed where no measured run is alike."""

CPU = Band(0.12, 11, "of a model of 135M parameters on a CPU (docs/vram.md)")
"""scripts/bench/memory.py measures them; the largest error was 11.2%."""


def band_of(setup: Setup, method: str) -> Band:
    """A method's band on the measured runs most like a setup, and what no measured run has."""
    having = features_of(setup)
    if setup.device == "cpu":
        if setup.world > 1 or having["method"] == "8-bit lora":
            what = "several processes" if setup.world > 1 else having["method"]
            return Band(UNCOVERED, 0, f"no run on a CPU with {what} has been measured")
        other = f"; none of the family {having['family']}" * (having["family"] != "llama")
        return replace(CPU, features=CPU.features + other)
    found = _recorded()
    group = next((g for g in found["groups"] if all(g[name] == having[name] for name in GROUPED)), None)
    missing = [f"{name} {value}" for name, value in having.items() if value not in found["covered"].get(name, {})]
    alike = ", ".join(having[name] for name in GROUPED)
    if group is None or method not in group["error"]:
        return Band(UNCOVERED, 0, f"no run with {alike} has been measured")
    error = max(LEAST, group["error"][method], 0.05 if missing else 0.0)
    lacking = f"; no measured run has {', '.join(missing)}" if missing else ""
    return Band(error, group["rows"], f"with the same method, logits and GPUs ({alike}){lacking}")


def features_of(setup: Setup) -> dict[str, str]:
    """What a setup has in common with others."""
    loss = setup.stack.loss
    sharded = setup.sharding not in ("none", "ddp")
    kind = setup.adapter.title if setup.adapter.trains_base else setup.adapter.name
    if setup.quantization:
        kind = f"{8 if setup.quantization.get('load_in_8bit') else 4}-bit {setup.adapter.name}"
    return {
        "method": kind,
        "logits": "no whole logits" if loss in ("fused", "compact", "liger") else "whole logits",
        "gpus": setup.sharding if sharded else "one GPU each",
        "checkpointing": "off" if setup.checkpointing == "none" else "on",
        "attention": setup.attention,
        "optimizer": setup.optimizer.replace("_fused", ""),
        "packing": "packed" if setup.packed else "plain rows",
        "dora": setup.adapter.variant,
        "family": setup.facts.model_type,
    }


@functools.cache
def _recorded() -> dict[str, Any]:
    text = resources.files("lorafit.memory").joinpath("validated.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


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
        adapter: what is trained, as lorafit.plan.adapters describes it.
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
    adapter: Adapter
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
        adapter=plan.adapter,
        adapter_dtype=plan.adapter_dtype,
        optimizer=training.optim,
        checkpointing="non_reentrant" if training.gradient_checkpointing else "none",
        attention=plan.attention,
        masked=batch > 1 and not data.packing,
        packed=data.packing,
        accumulation=training.gradient_accumulation_steps,
        eval_batch=eval_batch,
        eval_masked=eval_batch > 1 and not data.packing,
        device="cuda" if cuda else "cpu",
        compute_capability=plan.hardware.compute_capability or (8, 0),
        world=world,
        sharding=sharding or ("ddp" if world > 1 else "none"),
        stack=Stack(
            loss="fused" if cuda else "compact",
            kernels=frozenset({"rms_norm"} if "RMSNorm" in plan.model.kernels else ()),
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
