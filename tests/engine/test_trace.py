"""The trace holds what a real training step holds, measured by torch's own profiler on this CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafit.engine.trace import standins
from lorafit.engine.trace.log import SHORT
from lorafit.engine.trace.record import Trace, _traced, build, estimate_by_trace, trace
from lorafit.facts import ModelFacts, layout, read_facts
from lorafit.memory import Setup, Stack
from lorafit.memory.closed import WORKSPACE, alive, highest
from lorafit.memory.estimate import DRIVER
from lorafit.memory.operations import FREE
from lorafit.memory.static import trained_bytes
from lorafit.plan.adapters import Full, Lora
from lorafit.recipe import LoraSection

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
    "llm_int8_skip_modules": None,
}


def lora(**changes: Any) -> Lora:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    values = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": names} | changes
    return Lora(LoraSection.model_validate(values))


LORA = lora()
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": LORA},
    "qlora": {"adapter": LORA, "quantization": NF4},
    "full": {"adapter": Full()},
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def facts(**changes: Any) -> ModelFacts:
    config = LLAMA | changes
    return ModelFacts("small", "folder", "", config, tuple(layout(config)))


def on_cpu(model: ModelFacts | None = None, **changes: Any) -> Setup:
    values: dict[str, Any] = {
        "facts": model or facts(),
        "batch": 4,
        "length": 128,
        "dtype": "float32",
        "quantization": None,
        "adapter": LORA,
        "adapter_dtype": "float32",
        "optimizer": "adamw_torch_fused",
        "checkpointing": "non_reentrant",
        "attention": "sdpa",
        "device": "cpu",
        "stack": Stack(loss="compact"),
    }
    return Setup(**values | changes)


def on_gpu(model: ModelFacts | None = None, **changes: Any) -> Setup:
    values = {"device": "cuda", "dtype": "bfloat16", "stack": Stack(autocast="bfloat16"), "length": 512}
    return on_cpu(model, **values | changes)


# --- the second step of a record ------------------------------------------------------------------


def second_step(found: Trace) -> tuple[int, int]:
    """Bytes held before the second step, and the most in it."""
    names = [name for _, name in found.phases]
    begin = next(index for index, name in found.phases[names.index("optimizer 1") :] if name.startswith("forward"))
    before = sum(alive(found.events[:begin]).values())
    return before, before + most_of(found, begin, len(found.events))


def most_of(found: Trace, begin: int, end: int) -> int:
    """The most bytes between two events, on top of those held at the first."""
    live: dict[object, int] = {}
    now = before = top = 0
    for index, (storage, size) in enumerate(found.events[:end]):
        if index == begin:
            before = top = now
        if size == FREE:
            now -= live.pop(storage, 0)
        else:
            live[storage] = size
            now += size
        top = max(top, now)
    return top - before


# --- a real step ----------------------------------------------------------------------------------


def real_model(setup: Setup, folder: Path) -> Any:
    """The setup's model with random weights, as lorafit makes it."""
    from trl.trainer.utils import add_fused_lm_head

    from lorafit.engine.loss import score_supervised_positions
    from lorafit.engine.model import quantization_config
    from lorafit.engine.trace.record import configuration, prepare

    dtype = getattr(torch, setup.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        configuration(setup, None), dtype=dtype, attn_implementation=setup.attention
    )
    if setup.quantization is not None:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=quantization_config(setup.quantization),
            device_map={"": setup.device},
            attn_implementation=setup.attention,
        )
    if setup.stack.loss == "compact":  # prepare puts TRL's head on for the other
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        score_supervised_positions(model)
    return prepare(model.to(setup.device) if setup.quantization is None else model, setup)


class RealStep:
    """Training steps of a real model, one after the other."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        from lorafit.engine.trace.steps import decay_groups

        torch.manual_seed(0)
        self.setup = setup
        self.model = real_model(setup, folder)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(decay_groups(self.trained), fused=True)
        vocabulary = setup.facts.text_config["vocab_size"]
        self.ids = torch.randint(vocabulary, (setup.batch, setup.length)).to(setup.device)

    def __call__(self) -> None:
        autocast = self.setup.stack.autocast
        with torch.autocast(
            self.setup.device,
            dtype=getattr(torch, autocast or "bfloat16"),
            enabled=autocast is not None,
        ):
            out = self.model(input_ids=self.ids, labels=self.ids, fused_lm_head=True)
            loss = (-out.log_probs).sum() / torch.as_tensor(out.label_mask.sum()).clamp(min=1)
        del out
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of parameters, buffers, quantization constants and optimizer states."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for parameter in self.model.parameters():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        for values in self.optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


def measured(setup: Setup, folder: Path) -> tuple[int, int]:
    """Bytes held before the second step of a real model, and the most in it on top of that."""
    step = RealStep(setup, folder)
    step()
    return step.held(), taken(step, folder)


def taken(step: Callable[[], Any], folder: Path) -> int:
    """The most bytes that something takes while it runs, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    file = folder / "profile.json"
    profiler.export_chrome_trace(str(file))
    recorded = json.loads(file.read_text())["traceEvents"]
    events = sorted((event for event in recorded if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    first = events[0]["args"]
    start = first["Total Allocated"] - first["Bytes"]
    return int(max(event["args"]["Total Allocated"] for event in events) - start)


def compare(setup: Setup, folder: Path) -> None:
    real_before, real_more = measured(setup, folder)
    before, top = second_step(trace(setup))
    assert before == pytest.approx(real_before, rel=0.01)
    assert top - before == pytest.approx(real_more, rel=0.01)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "none"])
@pytest.mark.parametrize("length", [64, 256])
@pytest.mark.parametrize("method", METHODS)
def test_a_real_step(method: str, length: int, checkpointing: Any, tied: bool, tmp_path: Path) -> None:
    model = facts(tie_word_embeddings=tied)
    compare(on_cpu(model, length=length, checkpointing=checkpointing, **METHODS[method]), tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_a_real_step_of_other_families(family: str, tmp_path: Path) -> None:
    model = facts(model_type=family, head_dim=32, tie_word_embeddings=True)
    compare(on_cpu(model, checkpointing="none"), tmp_path)


def test_a_real_step_of_layers_that_differ(tmp_path: Path) -> None:
    compare(on_cpu(adapter=lora(r=128, layers_to_transform=[4, 5]), checkpointing="none"), tmp_path)


def test_a_real_step_with_eager_attention(tmp_path: Path) -> None:
    compare(on_cpu(attention="eager", checkpointing="none"), tmp_path)


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", "rmsprop", "adagrad", "adafactor"])
def test_a_real_update(name: str, tmp_path: Path) -> None:
    """States, and the copies that torch's updates of many tensors at once make: on GPUs, and here if told to."""
    from lorafit.engine.trace.steps import decay_groups, make_optimizer

    setup = on_gpu(adapter=Full(), dtype="float32", optimizer=name, stack=Stack())
    parameters = [torch.nn.Parameter(torch.randn(tensor.shape)) for tensor in setup.facts.tensors]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make_optimizer(name, decay_groups(parameters), "cuda")
    optimizer.step()
    states = sum(
        value.untyped_storage().nbytes()
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    copies = taken(optimizer.step, tmp_path)
    found = trace(setup)
    names = [name for _, name in found.phases]
    before, *_ = second_step(found)
    begin = found.phases[names.index("optimizer 2")][0]
    end = found.phases[names.index("optimizer 2") + 1][0]
    weights = 4 * setup.facts.parameters
    assert before - weights - WORKSPACE == pytest.approx(states, rel=0.01, abs=1 << 16)
    # at most a tensor's copies more: adafactor and the others let go of them at other moments
    assert most_of(found, begin, end) == pytest.approx(copies, rel=0.02, abs=1 << 16)


# --- a short model laid out -----------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "none"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_short_model_stands_for_the_whole(device: str, method: str, checkpointing: Any) -> None:
    layers = 11
    make = on_cpu if device == "cpu" else on_gpu
    setup = make(facts(num_hidden_layers=layers), checkpointing=checkpointing, accumulation=2, **METHODS[method])
    short, whole = _traced(setup, layers, SHORT), _traced(setup, layers, layers)
    assert trace(setup).events == short.events
    laid_out, recorded = short.replay(), whole.replay()
    assert laid_out.max_allocated == recorded.max_allocated
    assert laid_out.max_reserved == recorded.max_reserved
    assert second_step(short) == second_step(whole)
    assert len(short.events) == len(whole.events)


@pytest.mark.parametrize(
    "setup",
    [
        on_gpu(facts(num_hidden_layers=8), adapter=lora(layers_to_transform=[0, 1, 7]), checkpointing="none"),
        on_gpu(facts(num_hidden_layers=8), adapter=lora(rank_pattern={"layers.7.self_attn.q_proj": 64})),
        on_gpu(
            facts(
                model_type="qwen2_moe",
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=128,
                shared_expert_intermediate_size=128,
                mlp_only_layers=[0],
                decoder_sparse_step=1,
                num_hidden_layers=8,
            ),
            adapter=lora(target_modules=["q_proj", "v_proj"]),
        ),
    ],
    ids=["adapters on some layers", "a rank of its own", "a dense layer first"],
)
def test_layers_that_differ_are_recorded_one_by_one(setup: Setup) -> None:
    layers = setup.facts.layers
    assert layers == 8
    found, whole = trace(setup), _traced(setup, layers, layers)
    assert found.replay() == whole.replay()
    estimate = estimate_by_trace(setup)
    # the allocator's blocks may be up to a MiB larger than what was asked for, which such a small model notices
    assert estimate.allocated == pytest.approx(found.replay().max_allocated, rel=0.03)
    terms = {term.name: term.bytes for term in estimate.terms}
    assert terms["weights"] == 2 * setup.facts.parameters
    assert terms["adapter"] == trained_bytes(setup)
    assert terms["optimizer"] == pytest.approx(2 * trained_bytes(setup), rel=0.01)


@pytest.mark.parametrize("chosen", [[0], [3, 4], [7]], ids=str)
def test_an_adapter_on_some_layers(chosen: list[int]) -> None:
    """However many layers have one: the states are those of these layers' adapters."""
    setup = on_gpu(facts(num_hidden_layers=8), adapter=lora(layers_to_transform=chosen), checkpointing="none")
    every = on_gpu(setup.facts, checkpointing="none")
    assert estimate_by_trace(setup).allocated < estimate_by_trace(every).allocated
    found = [size for (kind, *_), size in trace(setup).events if kind == "optimizer" and size != FREE]
    assert sum(found) >= 2 * trained_bytes(setup)


@pytest.mark.parametrize("layers", [1, 2, SHORT, SHORT + 1])
def test_weights_are_counted_once(layers: int) -> None:
    setup = on_gpu(facts(num_hidden_layers=layers))
    found = estimate_by_trace(setup)
    assert found.allocated == pytest.approx(trace(setup).replay().max_allocated, rel=0.01)
    terms = {term.name: term.bytes for term in found.terms}
    assert terms["adapter"] == trained_bytes(setup)
    assert found.moment == "backward pass"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_get_the_adapter_made_for_them(bits: int) -> None:
    """PEFT has classes of its own for them, which cast and copy less than the plain one."""
    quantization = (
        NF4 if bits == 4 else {"load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None}
    )
    model = build(on_gpu(quantization=quantization), 2)
    kinds = {type(module) for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))}
    assert {kind.__module__ for kind in kinds} == {"peft.tuners.lora.bnb"}


def test_attention_under_autocast_is_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch casts the inputs of scaled_dot_product_attention, rotated in float32 as they may be."""
    seen = set()
    kernel = standins._Attention._kernel

    def spy(self: Any, q: Any, k: Any, v: Any, bias: Any) -> Any:
        seen.update({q.dtype, k.dtype, v.dtype})
        return kernel(self, q, k, v, bias)

    monkeypatch.setattr(standins._Attention, "_kernel", spy)
    trace(on_gpu(adapter=Full(), dtype="float32"))
    assert seen == {torch.bfloat16}


# --- the estimate ---------------------------------------------------------------------------------


def test_estimate() -> None:
    setup = replace(on_gpu(read_facts("HuggingFaceTB/SmolLM2-135M-Instruct")), accumulation=2, eval_batch=8)
    found = estimate_by_trace(setup)
    assert found.method == "trace"
    assert found.served
    indices = [index for index, *_ in found.timeline]
    assert indices == sorted(indices)
    assert len(indices) > 100
    assert all(reserved >= allocated >= 0 for _, allocated, reserved in found.timeline)
    assert found.reserved >= found.allocated
    assert found.reserved == max(reserved for *_, reserved in found.timeline)
    starts = [index for index, _ in found.phases]
    assert starts == sorted(starts)
    names = [name for _, name in found.phases]
    assert names[0] == "weights"
    expected = {"forward 0", "forward 1", "backward 0", "backward 1", "optimizer 1", "optimizer 2", "evaluation"}
    assert expected <= set(names)
    assert names.count("forward 0") == 2  # the first step has no optimizer states yet
    assert all(term.bytes > 0 for term in found.terms)
    assert all(term.why for term in found.terms)


def test_what_is_alive_at_the_peak_are_the_terms() -> None:
    """512 bytes are the allocator's smallest step, so that it counts a little more than the sum."""
    for setup in (on_gpu(), on_gpu(adapter=Full()), on_gpu(quantization=NF4 | {"bnb_4bit_compute_dtype": "bfloat16"})):
        record = trace(setup)
        total = estimate_by_trace(setup).allocated
        assert total <= record.replay().max_allocated
        assert total == pytest.approx(record.replay().max_allocated, rel=0.01)
        assert 0 < highest(record.events) < len(record.events)


def test_a_card_that_is_too_small() -> None:
    setup = on_gpu(read_facts("HuggingFaceTB/SmolLM2-135M-Instruct"))
    enough = estimate_by_trace(setup)
    small = estimate_by_trace(setup, enough.total // 2)
    assert not small.served
    assert any("out of memory" in note for note in small.notes)
    assert (small.allocated, small.reserved) == (enough.allocated, enough.reserved)
    large = estimate_by_trace(setup, 4 * enough.total)
    assert large.served
    assert not large.notes


def test_a_tight_card_gives_cached_memory_back() -> None:
    """Between what is allocated and what would be reserved, torch goes on with less."""
    setup = on_gpu(read_facts("HuggingFaceTB/SmolLM2-135M-Instruct"), checkpointing="none", batch=8)
    free = estimate_by_trace(setup)
    assert free.reserved > 1.01 * free.allocated

    def card(reserved: int) -> int:
        """Of a size that leaves so many bytes to torch."""
        return math.ceil((reserved + free.total - free.reserved) / (1 - DRIVER))

    tight = estimate_by_trace(setup, card(free.reserved - (2 << 20)))
    assert tight.served
    assert tight.reserved < free.reserved
    assert any("cached memory" in note for note in tight.notes)
    assert not estimate_by_trace(setup, card(free.reserved + (2 << 20))).notes


# --- a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_a_real_step_on_a_gpu(method: str, checkpointing: Any, tmp_path: Path) -> None:
    changes = METHODS[method]
    if changes.get("quantization"):
        changes = changes | {"quantization": NF4 | {"bnb_4bit_compute_dtype": "bfloat16"}, "adapter_dtype": "bfloat16"}
    setup = on_gpu(
        facts(hidden_size=1024, intermediate_size=2816, vocab_size=32000),
        checkpointing=checkpointing,
        compute_capability=torch.cuda.get_device_capability(0),
        **{"adapter_dtype": "bfloat16" if method == "full" else "float32"} | changes,
    )
    step = RealStep(setup, tmp_path)
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    assert trace(setup).replay().max_allocated == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.03)
