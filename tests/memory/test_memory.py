"""The memory that is counted is the memory that bitsandbytes, torch and transformers really take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from lorafit.facts import ModelFacts, Tensor, known_models, layout, read_facts
from lorafit.hardware import Hardware
from lorafit.memory import Setup, setup_of
from lorafit.memory.static import (
    BYTES,
    OPTIMIZER_STATES,
    _state_bytes,
    constants_bytes,
    state_sizes,
    trained,
    trained_bytes,
    weight_terms,
)
from lorafit.plan import Plan, make_plan
from lorafit.plan.adapters import find_targets
from lorafit.recipe import Recipe, TrainingSection

GPU = Hardware("cuda", "an A100", 80 << 30, (8, 0), True)
CPU = Hardware("cpu", "a CPU", None, None, False)


def plan_for(facts: ModelFacts, hardware: Hardware = GPU, **sections: Any) -> Plan:
    content = {"model": {"name_or_path": facts.name}, "dataset": {"train": [{"path": "x.jsonl"}]}} | sections
    return make_plan(TypeAdapter(Recipe).validate_python(content), facts, hardware, read_data=False)


def setup_for(facts: ModelFacts, hardware: Hardware = GPU, **sections: Any) -> Setup:
    return setup_of(plan_for(facts, hardware, **sections), facts)


def weights(setup: Setup) -> dict[str, int]:
    return {term.name: term.bytes for term in weight_terms(setup)}


def states(setup: Setup) -> int:
    return sum(size for size, _ in state_sizes(setup))


def bundled(name: str) -> ModelFacts:
    config = known_models()[name.lower()]
    return ModelFacts(name, "bundled", "", config, tuple(layout(config)))


NF4 = {"load_in_4bit": True}


def test_llama3_8b_qlora() -> None:
    """By hand: 6,979,321,856 quantized weights in 224 layers, the rest in bfloat16."""
    facts = bundled("meta-llama/Meta-Llama-3-8B-Instruct")
    setup = setup_for(facts, lora={"r": 16}, quantization=NF4)
    counted = weights(setup)
    quantized = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    assert counted["4-bit weights"] == quantized // 2
    assert counted["other weights"] == 2 * (8_030_261_248 - quantized)
    blocks = quantized // 64
    assert counted["quantization constants"] == blocks + blocks // 256 * 4 + 224 * (1024 + 4 + 64)
    assert sum(tensor.size for tensor in trained(setup)) == 41_943_040
    assert trained_bytes(setup) == 2 * 41_943_040  # bfloat16
    assert states(setup) == 2 * 41_943_040 + 2 * 4 * 41_943_040 // 256


def test_full_training_takes_sixteen_bytes_a_parameter() -> None:
    """Weights, gradients of the same size, and two states."""
    facts = bundled("HuggingFaceTB/SmolLM2-135M-Instruct")
    setup = setup_for(facts)
    assert weights(setup)["weights"] + trained_bytes(setup) + states(setup) == 16 * facts.parameters


def test_every_optimizer_of_the_schema_is_counted() -> None:
    names = set(get_args(TrainingSection.model_fields["optim"].annotation)) - {"auto"}
    assert names == set(OPTIMIZER_STATES)


# --- quantization against bitsandbytes ------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 64), (100, 7), (33, 65), (1, 1), (128, 130), (257, 129)])
def test_four_bits_as_bitsandbytes_packs_them(shape: tuple[int, int], kind: str, double: bool) -> None:
    import torch
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(torch.randn(shape), requires_grad=False, quant_type=kind, compress_statistics=double).to("cpu")
    state = weight.quant_state
    parts = [state.absmax, state.code]
    if double:
        parts += [state.offset, state.state2.absmax, state.state2.code]
    tensor = Tensor("x.weight", shape)
    assert weight.numel() * weight.element_size() == -(-tensor.size // 2)
    assert sum(part.numel() * part.element_size() for part in parts) == constants_bytes(tensor, double)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    values: dict[str, dict[str, Any]] = {
        "llama": {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 130,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    }
    folder = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(request.param, **values[request.param])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def bytes_of(model: Any) -> int:
    """What a model's parameters and their quantization constants take; shared storage once."""
    import torch

    parts: list[Any] = []
    for parameter in model.parameters():
        parts.append(parameter.data)
        state, scales = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
        if state is not None:
            parts += [state.absmax, state.code, state.offset]
            parts += [state.state2.absmax, state.state2.code] if state.nested else []
        parts.append(scales)
    tensors = {part.data_ptr(): part for part in parts if isinstance(part, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


SHARED_CODE_BOOK = 256 * 4


@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": ["SKIP"]},
        {"load_in_8bit": True, "llm_int8_skip_modules": ["SKIP"]},
    ],
    ids=str,
)
def test_whole_models_as_transformers_quantizes_them(model_folder: Path, quantization: dict[str, Any]) -> None:
    """The head stays as it is, also with a list of other modules to skip."""
    from lorafit.engine.model import load_base

    facts = read_facts(str(model_folder))
    skip = {"llama": "down_proj", "gpt2": "c_fc"}[facts.model_type]
    quantization = {key: [skip] if value == ["SKIP"] else value for key, value in quantization.items()}
    plan = plan_for(
        facts, CPU, model={"name_or_path": facts.name, "dtype": "float32"}, lora={}, quantization=quantization
    )
    model = load_base(plan)
    counted = sum(weights(setup_of(plan, facts)).values())
    spare = 0
    if quantization.get("load_in_4bit") and quantization.get("bnb_4bit_use_double_quant", True):
        spare = SHARED_CODE_BOOK * (len(facts.quantizable) - 1)  # layers may share it
    assert counted - spare <= bytes_of(model) <= counted
    assert type(model.get_output_embeddings()).__name__ == "Linear"


# --- trained tensors and optimizers ---------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 96,
    "intermediate_size": 130,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
QWEN = ModelFacts("qwen", "folder", "", CONFIG, tuple(layout(CONFIG)))
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4}},
    "dora": {"lora": {"r": 8, "use_dora": True}, "quantization": NF4},
    "mixed": {
        "lora": {"r": 8, "bias": "all", "modules_to_save": ["embed_tokens", "lm_head"], "rank_pattern": {"q_proj": 50}}
    },
    "full": {},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("optimizer", OPTIMIZER_STATES)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_states_as_the_real_optimizers_keep_them(
    optimizer: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    setup = setup_for(QWEN, training={"optim": optimizer}, **ADAPTERS[adapter])
    tensors = trained(setup)
    optimizer_class, values = Trainer.get_optimizer_cls_and_kwargs(
        TrainingArguments(output_dir=str(tmp_path), optim=optimizer, use_cpu=True, report_to=[])
    )
    parameters = [torch.nn.Parameter(torch.ones(t.shape, dtype=getattr(torch, t.dtype))) for t in tensors]
    real = optimizer_class(parameters, **values)
    overrides: dict[tuple[int, int], dict[str, int]] = {}
    if hasattr(real, "mng"):
        monkeypatch.setattr(real.mng, "index2config", overrides)
    for index, (parameter, tensor) in enumerate(zip(parameters, tensors, strict=True)):
        parameter.grad = torch.ones_like(parameter)
        if "embed" in tensor.name and optimizer.endswith("8bit"):  # as transformers does for nn.Embedding
            overrides[(0, index)] = {"optim_bits": 32}
    if hasattr(real, "init_state"):  # bitsandbytes: the states without an update, which needs a GPU
        for index, parameter in enumerate(parameters):
            real.init_state(real.param_groups[0], parameter, 0, index)
    else:
        real.step()
    apart = ("step", "RMS", "qmap1", "qmap2")  # single numbers, and code books that all states share
    kept = sum(
        value.numel() * value.element_size()
        for state in real.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in apart
    )
    assert states(setup) == kept


def test_magnitudes_stay_float32_in_a_bfloat16_adapter() -> None:
    plan = plan_for(QWEN, **ADAPTERS["dora"])
    setup = setup_of(plan, QWEN)
    outputs = sum(QWEN.linear[module].shape[0] for module in find_targets(_lora(plan), QWEN).modules)
    assert trained_bytes(setup) == 2 * plan.trainable_parameters + 2 * outputs


def _lora(plan: Plan) -> Any:
    return TypeAdapter(Recipe).validate_python(plan.recipe).lora


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4)])
def test_adafactor_of_any_shape(shape: tuple[int, ...]) -> None:
    import torch
    from transformers import Adafactor

    parameter = torch.nn.Parameter(torch.ones(shape))
    parameter.grad = torch.ones_like(parameter)
    real = Adafactor([parameter], lr=1e-3, relative_step=False, scale_parameter=False)
    real.step()
    kept = sum(v.numel() * 4 for k, v in real.state[parameter].items() if k.startswith("exp_avg"))
    assert _state_bytes("adafactor", Tensor("x", shape, "float32")) == kept


def test_bytes_of_types() -> None:
    import torch

    assert {name: getattr(torch, name).itemsize for name in BYTES} == BYTES
