"""A plan's training step as the estimator's inputs."""

from __future__ import annotations

from lorafit.facts import ModelFacts
from lorafit.memory.setup import Setup, Sharding, Stack
from lorafit.plan import Plan


def setup_of(plan: Plan, facts: ModelFacts, sharding: Sharding | None = None) -> Setup:
    """What the plan runs, with every row as long as max_length: the most that a step can take.

    Several rows of different lengths are padded to the longest, and then a mask reaches the attention.
    """
    training, data = plan.training_kwargs, plan.data
    cuda = plan.hardware.device == "cuda"
    mixed = "bfloat16" if training["bf16"] else "float16" if training["fp16"] else None
    batch = training["per_device_train_batch_size"]
    world = plan.hardware.world_size
    validates = bool(data.validation) or data.validation_fraction is not None
    eval_batch = training["per_device_eval_batch_size"] if validates and training["eval_strategy"] != "no" else 0
    return Setup(
        facts=facts,
        batch=batch,
        length=data.max_length,
        dtype=plan.model_kwargs["dtype"],
        quantization=plan.quantization_kwargs,
        lora=plan.lora_kwargs,
        adapter_dtype=plan.adapter_dtype,
        optimizer=training["optim"],
        checkpointing="non_reentrant" if training["gradient_checkpointing"] else "none",
        attention=plan.model_kwargs["attn_implementation"],
        masked=batch > 1 and not data.packing,
        packed=data.packing,
        accumulation=training["gradient_accumulation_steps"],
        eval_batch=eval_batch,
        eval_masked=eval_batch > 1 and not data.packing,
        device=plan.hardware.device,
        compute_capability=plan.hardware.compute_capability or (8, 0),
        world=world,
        sharding=sharding or ("ddp" if world > 1 else "none"),
        stack=Stack(
            loss="fused" if cuda else "compact",
            autocast=mixed,
            clip_gradients=bool(training["max_grad_norm"]),
        ),
    )
