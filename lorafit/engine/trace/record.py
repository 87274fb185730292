"""The estimate by a trace: the setup's model built without data or weights, its step recorded, its highest moment."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from unittest import mock

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from trl.trainer.utils import add_fused_lm_head

from lorafit.engine.adapters import module_of
from lorafit.engine.model import quantization_config
from lorafit.engine.trace.log import SHORT, Event, NotPeriodic, Recorder, Segment, lay_out
from lorafit.engine.trace.standins import FLASH, standing_in
from lorafit.engine.trace.steps import (
    LAYER,
    decoder_layers,
    mark_layers,
    record_evaluation,
    record_optimizer,
    record_pass,
    record_weights,
)
from lorafit.errors import ModelError, UsageError
from lorafit.memory.allocator import Replay, replay
from lorafit.memory.closed import alive, cautions, highest, serve, workspace
from lorafit.memory.estimate import Estimate, Setup, Term, band_of
from lorafit.memory.operations import FREE
from lorafit.memory.static import own_bytes, state_sizes, trained, weight_terms
from lorafit.text import first_line

Model: TypeAlias = PreTrainedModel | PeftModel


def build(setup: Setup, layers: int | None) -> Model:
    """The model with `layers` layers (None: all) on the meta device, quantized and with its adapter, ready to train."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            configuration(setup, layers), dtype=getattr(torch, setup.dtype), attn_implementation="eager"
        )
    model.config._attn_implementation = FLASH if setup.attention.startswith("flash") else setup.attention
    if setup.quantization is not None:
        model = quantize(model, setup.quantization)
    if setup.stack.upcast != "none":
        upcast(model, setup.stack.upcast)
    with torch.device("meta"):
        return prepare(model, setup)


def prepare(model: PreTrainedModel, setup: Setup) -> Model:
    """Put on a base what training needs: TRL's head, checkpointing, the adapter in its type."""
    if setup.stack.loss == "fused":
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    model.config.use_cache = setup.stack.use_cache
    if setup.checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": setup.checkpointing == "reentrant"})
        if not setup.adapter.trains_base:
            model.enable_input_require_grads()
    adapter = module_of(setup.adapter)
    if adapter is None:
        return model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    arguments = setup.adapter.arguments(setup.adapter.targets(setup.facts)) or {}
    adapted = get_peft_model(model, adapter.config(arguments, start=False))  # how it starts takes no memory
    adapter.cast(adapted, setup.adapter_dtype)
    return adapted.train()


def configuration(setup: Setup, layers: int | None) -> PreTrainedConfig:
    """transformers' configuration, shortened to a number of layers. Raises ModelError."""
    values = copy.deepcopy(setup.facts.config)
    values.pop("quantization_config", None)
    kind = values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind, **values)
    except Exception as error:
        raise ModelError(
            f"{setup.facts.name}: transformers can't use its configuration: {first_line(error)}"
        ) from error
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == setup.facts.layers:
                setattr(text, name, value[:layers])
    return config


def quantize(model: PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    """bitsandbytes' layers in place of the linear ones, with packed weights and their constants."""
    config = quantization_config(kwargs)
    skip = kwargs.get("llm_int8_skip_modules") or ["lm_head"]
    dtypes = {name: module.weight.dtype for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model = replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=config)
    bits = "8" if kwargs.get("load_in_8bit") else "4"
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT puts its layers for bitsandbytes on such models
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            with mock.patch.dict(bnb.functional.name2qmap, clear=True):  # it would keep a code book on meta for good
                packed, state = bnb.functional.quantize_4bit(
                    torch.empty(weight.shape, dtype=dtypes[name], device="meta"),
                    blocksize=64,
                    compress_statistics=config.bnb_4bit_use_double_quant,
                    quant_type=config.bnb_4bit_quant_type,
                )
            module.weight = bnb.nn.Params4bit(
                packed, requires_grad=False, quant_state=state, bnb_quantized=True, module=module
            )
            module.quant_state = state
        elif isinstance(module, bnb.nn.Linear8bitLt):
            shape = module.weight.shape
            module.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8, device="meta"), requires_grad=False)
            module.register_buffer("SCB", torch.empty(shape[0], dtype=torch.float32, device="meta"))
    return model


def upcast(model: PreTrainedModel, which: str) -> None:
    """PEFT's prepare_model_for_kbit_training: what isn't quantized becomes float32; with TRL up to 0.2x and bf16, only
    the norms stay so (trl: peft_module_casting_to_bf16)."""
    for name, parameter in model.named_parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16) and not isinstance(parameter, bnb.nn.Params4bit)
        if half and (which == "all" or "norm" in name):
            parameter.data = parameter.data.float()


@dataclass(frozen=True)
class Trace:
    """Two optimizer steps of the whole model, event by event.

    Attributes:
        events: (storage, bytes), FREE in place of the bytes where a storage ends.
        phases: (index of the first event, name) of each part.
    """

    events: tuple[Event, ...]
    phases: tuple[tuple[int, str], ...]

    def replay(self) -> Replay:
        """What torch's allocator for CUDA does with it."""
        return replay(self.events)


def estimate_by_trace(setup: Setup, capacity: int | None = None) -> Estimate:
    """The trace's estimate; `capacity` is the card's memory in bytes. Raises ModelError, UsageError."""
    if setup.sharding not in ("none", "ddp"):
        raise UsageError(f"--trace: records one GPU, and figures for {setup.sharding} are in closed form; leave it out")
    found = trace(setup)
    index = highest(found.events)
    parts: Counter[str] = Counter()
    for storage, size in alive(found.events[: index + 1]).items():
        parts[_named(storage[0])] += size
    parts.pop("weights", None)
    moment = _named(next(name for start, name in reversed(found.phases) if start <= index))
    served, fits, notes = serve(found.events, found.phases, setup, capacity)
    return Estimate(
        terms=(*weight_terms(setup), *(Term(name, size, WHAT[name]) for name, size in parts.most_common())),
        moment="optimizer's step" if moment == "optimizer" else moment,
        reserved=served.settled,
        method="trace",
        band=band_of(setup, "trace"),
        paged=sum(size for size, paged in state_sizes(setup) if paged),
        notes=(*notes, *cautions(setup)),
        served=fits,
        gpus=setup.world,
        timeline=served.timeline,
        phases=found.phases,
        device=setup.device,
    )


WHAT = {
    "adapter": "its trained weights",
    "cuBLAS workspace": "kept for matrix products",
    "forward pass": "what the layers keep for the backward pass, and what is in use",
    "output head and loss": "hidden states of the supervised positions, logits as far as they exist",
    "backward pass": "gradients so far, a recomputed layer, and what flows through it",
    "optimizer": "states, and copies during the update",
    "evaluation": "what is in use",
}


def _named(phase: str) -> str:
    """A phase, and what is made in it, for people."""
    kind = phase.split()[0]
    if kind == "forward" and phase.endswith("head"):
        return "output head and loss"
    return {"start": "cuBLAS workspace", "forward": "forward pass", "backward": "backward pass"}.get(kind, kind)


def trace(setup: Setup) -> Trace:
    """Record a setup's training step. Raises ModelError."""
    layers = setup.facts.layers or 0
    try:
        try:
            return _traced(setup, layers, SHORT if layers > SHORT and _uniform(setup) else layers)
        except NotPeriodic:
            return _traced(setup, layers, layers)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{setup.facts.name}: can't be traced: {first_line(error)}") from error


def _uniform(setup: Setup) -> bool:
    """Whether the layers have tensors of the same shapes, and adapters on the same of them."""
    shapes: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for tensor in (*setup.facts.tensors, *trained(setup)):
        found = LAYER.search(tensor.name)
        if found:
            shapes.setdefault(found[1], []).append((tensor.name[found.end() :], tensor.shape))
    return len({tuple(sorted(found)) for found in shapes.values()}) == 1


def _traced(setup: Setup, layers: int, recorded: int) -> Trace:
    recorder = Recorder()
    model = build(setup, recorded)
    record_weights(model, recorder, setup)
    passes = min(setup.accumulation, 2)
    with standing_in(setup, recorder, model) as autocast, recorder:
        if setup.device == "cuda":
            recorder.begin("start")
            for size in (*own_bytes(setup), workspace(setup)):
                recorder.keep(size)
        mark_layers(decoder_layers(model), recorder)
        for number in range(passes):
            record_pass(model, setup, recorder, autocast, number)
        recorder.begin("zero_grad")
        for parameter in model.parameters():
            parameter.grad = None
        recorder.begin("end")
    if setup.eval_batch:
        evaluation = replace(setup, batch=setup.eval_batch, masked=setup.eval_masked)
        with standing_in(evaluation, recorder, model) as autocast, recorder:
            record_evaluation(model, evaluation, recorder, autocast)
            recorder.begin("after")
    parts = lay_out(recorder.segments, layers) if recorded != layers else as_recorded(recorder.segments)
    steps = Recorder()
    record_optimizer(model, setup, steps, layers if recorded != layers else None)
    update: dict[str, list[Event]] = {
        segment.phase: [(("optimizer", None, n), size) for n, size in segment.events] for segment in steps.segments
    }
    return Trace(*_in_order(parts | update))


def _in_order(parts: dict[str, list[Event]]) -> tuple[tuple[Event, ...], tuple[tuple[int, str], ...]]:
    once = [name for name in parts if name.split()[0] in ("weights", "adapter", "start", "states")]
    passes = [name for name in parts if name.split()[0] in ("forward", "backward")]
    order = list(once)
    for number in (1, 2):
        order += [*passes, f"clipping {number}", f"optimizer {number}", "zero_grad"]
    order += [name for name in parts if name.startswith("evaluation")]
    events: list[Event] = []
    phases: list[tuple[int, str]] = []
    for name in order:
        phases.append((len(events), name))
        events += parts.get(name, [])
    return tuple(events), tuple(phases)


def as_recorded(segments: list[Segment]) -> dict[str, list[Event]]:
    result: dict[str, list[Event]] = {}
    origin: dict[int, tuple[str, int | None, int]] = {}
    for segment in segments:
        origin |= {n: (segment.phase, segment.layer, n) for n, size in segment.events if size != FREE}
        result.setdefault(segment.phase, []).extend((origin[n], size) for n, size in segment.events if n in origin)
    return result
