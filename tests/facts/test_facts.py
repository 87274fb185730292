"""What is read of a model from its small files: real names and shapes, and one clear line for broken files."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any

import pytest
from wording import Like

from lorafit.errors import ModelError
from lorafit.facts import gguf_header, hub, hub_unreachable, known_models, layout, read_facts, stored_tensors
from lorafit.families import FAMILIES

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def write_safetensors(file: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "BF16", size: int = 2) -> Path:
    """A whole safetensors file whose data is a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + size * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return write_header(file, header, end)


def write_header(file: Path, header: Any, data: int = 0) -> Path:
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + data)
    return file


def write_model(folder: Path, config: dict[str, Any] = LLAMA) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {t.name: t.shape for t in layout(config)})
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub_unreachable.cache_clear()
    yield
    hub_unreachable.cache_clear()


# --- bundled configurations -----------------------------------------------------------------------

PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "codellama/CodeLlama-13b-hf": 13_016_028_160,
    "codellama/CodeLlama-34b-hf": 33_743_970_304,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "mistralai/Mixtral-8x22B-Instruct-v0.1": 140_630_071_296,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "Qwen/Qwen3-0.6B": 751_632_384,
    "Qwen/Qwen3-1.7B": 2_031_739_904,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,
    "Qwen/Qwen3-30B-A3B-Instruct-2507": 30_532_122_624,
    "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "Qwen/Qwen3-235B-A22B-Instruct-2507": 235_093_634_560,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/phi-1_5": 1_418_270_720,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/Phi-3-medium-4k-instruct": 13_960_238_080,
    "microsoft/Phi-3-medium-128k-instruct": 13_960_238_080,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "HuggingFaceTB/SmolLM-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "ibm-granite/granite-3.1-2b-base": 2_533_531_648,
    "ibm-granite/granite-3.1-8b-base": 8_170_848_256,
    "ibm-granite/granite-3.3-2b-base": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-base": 8_170_864_640,
    "allenai/OLMo-1B-hf": 1_176_764_416,
    "allenai/OLMo-7B-hf": 6_888_095_744,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "allenai/OLMoE-1B-7B-0924": 6_919_161_856,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "01-ai/Yi-1.5-6B": 6_061_035_520,
    "01-ai/Yi-1.5-9B": 8_829_407_232,
    "01-ai/Yi-1.5-34B": 34_388_917_248,
    "tiiuae/falcon-7b": 7_217_189_760,
    "tiiuae/Falcon3-3B-Base": 3_227_655_168,
    "tiiuae/Falcon3-7B-Base": 7_455_550_464,
    "tiiuae/Falcon3-10B-Base": 10_305_653_760,
    "stabilityai/stablelm-3b-4e1t": 2_795_443_200,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-7b1": 7_069_016_064,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "bigcode/starcoder2-7b": 7_173_923_840,
    "CohereForAI/aya-expanse-8b": 8_028_033_024,
    "deepseek-ai/DeepSeek-V2-Lite": 15_706_484_224,
    "deepseek-ai/deepseek-llm-7b-base": 6_910_365_696,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "google/gemma-3-4b-pt": 4_300_079_472,
    "google/gemma-3-12b-pt": 12_187_325_040,
    "google/gemma-3-27b-pt": 27_432_406_640,
}
"""As published: the safetensors total of a model's page, without stored buffers, or the count on its card."""
HEAD_STORED_TOO = {"Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "tiiuae/falcon-7b"}
"""Their files, and so their totals, have the tied output head once more."""


def shapes(config: dict[str, Any]) -> frozenset[tuple[str, tuple[int, ...]]]:
    return frozenset((tensor.name, tensor.shape) for tensor in layout(config))


def test_bundled_models_have_the_published_sizes() -> None:
    for name, count in PUBLISHED.items():
        config = known_models()[name.lower()]
        head = config["vocab_size"] * config["hidden_size"] if name in HEAD_STORED_TOO else 0
        assert sum(tensor.size for tensor in layout(config)) + head == count, name


def test_every_bundled_model_has_the_tensors_of_one_with_a_published_size() -> None:
    """Versions of a model differ in their context, say."""
    models = known_models()
    checked = {shapes(config) for config in (models[name.lower()] for name in PUBLISHED)}
    different = {json.dumps(config): config for config in models.values()}
    assert [config for config in different.values() if shapes(config) not in checked] == []


def test_bundled_configurations_are_numbers() -> None:
    entries = json.loads(resources.files("lorafit.facts").joinpath("known_models.json").read_text())["models"]
    names = [name.lower() for entry in entries for name in entry["names"]]
    assert len(names) == len(set(names))
    for entry in entries:
        for part in (entry["config"], *(value for value in entry["config"].values() if isinstance(value, dict))):
            words = {key for key, value in part.items() if not isinstance(value, int | dict | None)}
            assert words == {"model_type"}, entry["names"]


@pytest.mark.usefixtures("offline")
class TestHub:
    def test_a_bundled_model_is_known_offline(self) -> None:
        facts = read_facts("Meta-Llama/meta-llama-3-8b-instruct")
        assert facts.kind == "bundled"
        assert facts.parameters == PUBLISHED["meta-llama/Meta-Llama-3-8B"]
        assert "HF_HUB_OFFLINE is set" in facts.source

    def test_an_unknown_model_offline_is_one_line(self) -> None:
        with pytest.raises(ModelError) as caught:
            read_facts("someone/some-model-that-is-not-cached")
        assert "someone/some-model-that-is-not-cached: config.json " in str(caught.value)
        assert "HF_HUB_OFFLINE is set" in str(caught.value)
        assert "\n" not in str(caught.value)

    def cached(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(hub, "hub_file", lambda _, file, __: folder / file if (folder / file).exists() else None)

    def test_cached_weights_are_read(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.cached(monkeypatch, write_model(tmp_path))
        facts = read_facts("someone/model")
        assert facts.kind == "hub"
        assert "1 safetensors file" in facts.source

    def test_half_a_download_is_planned_from_the_configuration(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        write_safetensors(tmp_path / "a.safetensors", {"model.norm.weight": (32,)})
        index = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        self.cached(monkeypatch, tmp_path)
        facts = read_facts("someone/model")
        assert facts.parameters == sum(tensor.size for tensor in layout(LLAMA))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "no such folder"),
        ("./nowhere", "no such folder"),
        ("gpt2x", "no such folder"),
        ("bad name/with spaces", "no such folder"),
        ("nowhere.gguf", "no such file"),
    ],
)
def test_what_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_facts(name)


# --- folders --------------------------------------------------------------------------------------


class TestFolder:
    def test_tensors_come_from_the_headers(self, tmp_path: Path) -> None:
        facts = read_facts(str(write_model(tmp_path)))
        assert facts.tensors == tuple(sorted(facts.tensors, key=lambda t: t.name))
        assert facts.parameters == sum(tensor.size for tensor in layout(LLAMA))
        assert facts.tensors[0].dtype == "BF16"
        assert (facts.layers, facts.max_position_embeddings, facts.model_type) == (2, 128, "llama")

    def test_without_weights_the_configuration_is_enough(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        facts = read_facts(str(tmp_path))
        assert facts.source == "config.json (no safetensors files)"
        assert facts.parameters > 0

    def test_a_tied_head_counts_once_even_if_it_is_stored(self, tmp_path: Path) -> None:
        write_model(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
        assert read_facts(str(tmp_path)).parameters == sum(t.size for t in layout(LLAMA)) - 64 * 32

    def test_only_the_files_that_transformers_loads(self, tmp_path: Path) -> None:
        """Mistral's folders hold the same weights twice; an adapter may lie beside a model."""
        tensors = {tensor.name: tensor.shape for tensor in layout(LLAMA)}
        names = list(tensors)
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        write_safetensors(tmp_path / "model-1.safetensors", {name: tensors[name] for name in names[:5]})
        write_safetensors(tmp_path / "model-2.safetensors", {name: tensors[name] for name in names[5:]})
        write_safetensors(tmp_path / "consolidated.safetensors", {"layers.0.attention.wq.weight": (32, 32)})
        write_safetensors(tmp_path / "adapter_model.safetensors", {"x.lora_A.weight": (4, 32)})
        index = {name: f"model-{1 + (i >= 5)}.safetensors" for i, name in enumerate(names)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        facts = read_facts(str(tmp_path))
        assert {tensor.name for tensor in facts.tensors} == set(names)
        assert facts.source == Like("… headers … 2 safetensors files")
        (tmp_path / "model-2.safetensors").unlink()
        with pytest.raises(ModelError, match=r"model-2.safetensors is missing"):
            read_facts(str(tmp_path))

    def test_stored_quantized_weights_are_not_taken_for_layers(self, tmp_path: Path) -> None:
        write_safetensors(tmp_path / "model.safetensors", {"model.layers.0.self_attn.q_proj.weight": (512, 1)})
        config = LLAMA | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        facts = read_facts(str(tmp_path))
        assert facts.stored_quantization == "bitsandbytes"
        assert facts.linear["model.layers.0.self_attn.q_proj"].shape == (32, 32)

    def test_gpt2_as_the_hub_has_it(self, tmp_path: Path) -> None:
        """Without its prefix, layers stored in x out, with causal masks among the weights."""
        config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 50}
        (tmp_path / "config.json").write_text(json.dumps(config))
        stored = {
            tensor.name.removeprefix("transformer."): tensor.shape[:: -1 if ".c_" in tensor.name else 1]
            for tensor in layout(config)
        }
        write_safetensors(tmp_path / "model.safetensors", stored | {"h.0.attn.bias": (1, 1, 64, 64)})
        facts = read_facts(str(tmp_path))
        assert {t.name: t.shape for t in facts.tensors} == {t.name: t.shape for t in layout(config)}
        assert (facts.layers, facts.max_position_embeddings) == (1, 64)

    def test_gpt2_has_the_parameters_of_the_real_class(self, tmp_path: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32))
        model.save_pretrained(tmp_path)
        facts = read_facts(str(tmp_path))
        assert facts.parameters == model.num_parameters()
        assert {t.name for t in facts.tensors} == {name for name, _ in model.named_parameters()}

    def test_vision_and_experts_get_no_adapter_by_default(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_vlm", "text_config": LLAMA}))
        language = {"model.language_model.layers.0.self_attn.q_proj.weight": (32, 32)}
        vision = {"model.vision_tower.layers.0.self_attn.q_proj.weight": (16, 16)}
        experts = {"model.language_model.layers.0.mlp.experts.0.up_proj.weight": (48, 32)}
        write_safetensors(tmp_path / "model.safetensors", language | vision | experts)
        facts = read_facts(str(tmp_path))
        assert list(facts.linear) == ["model.language_model.layers.0.self_attn.q_proj"]
        assert len(facts.quantizable) == 2
        assert facts.is_moe
        assert facts.max_position_embeddings == 128

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "has no config.json"),
            ({"adapter_config.json": "{}"}, "adapter: .*base model"),
            ({"config.json": "{"}, "JSON"),
            ({"config.json": "[1]"}, "expected an object"),
            ({"config.json": "[" * 100_000}, "JSON"),
            ({"config.json": "\ud83d"}, "JSON"),
            ({"config.json": json.dumps(LLAMA), "tokenizer_config.json": "no"}, "tokenizer_config.json: can't be read"),
            ({"config.json": json.dumps(LLAMA), "model.safetensors.index.json": "{}"}, "expected a weight_map"),
        ],
    )
    def test_broken_folders_are_one_line(self, tmp_path: Path, files: dict[str, str], message: str) -> None:
        for name, text in files.items():
            (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ModelError, match=message) as caught:
            read_facts(str(tmp_path))
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "model.bin").write_bytes(b"x")
        with pytest.raises(ModelError, match="kind of file"):
            read_facts(str(tmp_path / "model.bin"))

    def test_strange_values_do_not_break_the_reading(self, tmp_path: Path) -> None:
        odd = {"model_type": "mamba", "text_config": 3, "max_position_embeddings": "long", "num_hidden_layers": None}
        (tmp_path / "config.json").write_text(json.dumps(odd))
        facts = read_facts(str(tmp_path))
        assert (facts.max_position_embeddings, facts.layers, facts.linear) == (None, None, {})


class TestTokenizer:
    def read(self, folder: Path, config: dict[str, Any], jinja: bytes | None = None) -> Any:
        write_model(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        if jinja is not None:
            (folder / "chat_template.jinja").write_bytes(jinja)
        return read_facts(str(folder)).tokenizer

    def test_tokens_in_both_shapes(self, tmp_path: Path) -> None:
        tokens = self.read(tmp_path, {"eos_token": {"content": "</s>"}, "pad_token": "<pad>", "bos_token": None})
        assert (tokens.eos_token, tokens.pad_token, tokens.bos_token) == ("</s>", "<pad>", None)

    def test_the_file_wins_over_the_configuration(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, {"chat_template": "old"}, b"new").chat_template == "new"

    def test_named_templates(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}, 7]
        assert self.read(tmp_path, {"chat_template": named}).chat_template == "b"

    def test_strange_values_are_none(self, tmp_path: Path) -> None:
        tokens = self.read(tmp_path, {"chat_template": 5, "eos_token": 7})
        assert (tokens.chat_template, tokens.eos_token) == (None, None)

    def test_a_template_that_is_no_text(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"chat_template.jinja: can't be read"):
            self.read(tmp_path, {}, b"\xff\xfe")


# --- broken weight files --------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "short": lambda file: file.write_bytes(b"\x01\x02"),
    "zeros": lambda file: file.write_bytes(bytes(4096)),
    "text": lambda file: file.write_bytes(b"<html>404 not found</html>"),
    "huge length": lambda file: file.write_bytes(struct.pack("<Q", 2**64 - 1) + b"{}"),
    "large length": lambda file: file.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
    "not json": lambda file: file.write_bytes(struct.pack("<Q", 4) + b"{{{{"),
    "not text": lambda file: file.write_bytes(struct.pack("<Q", 4) + b"\xff\xff\xff\xff"),
    "too deep": lambda file: file.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "a list": lambda file: write_header(file, [1]),
    "null": lambda file: write_header(file, None),
    "no shape": lambda file: write_header(file, {"a": {"dtype": "F32", "data_offsets": [0, 0]}}),
    "no object": lambda file: write_header(file, {"a": 3}),
    "strange shape": lambda file: write_header(file, {"a": ENTRY | {"shape": ["x"]}}, 8),
    "negative shape": lambda file: write_header(file, {"a": ENTRY | {"shape": [-2]}}, 8),
    "one offset": lambda file: write_header(file, {"a": ENTRY | {"data_offsets": [0]}}, 8),
    "cut off": lambda file: write_header(file, {"a": ENTRY}, 7),
    "too long": lambda file: write_header(file, {"a": ENTRY}, 9),
    "huge offset": lambda file: write_header(file, {"a": ENTRY | {"data_offsets": [0, 10**30]}}, 8),
}


def fails_fast(call: Callable[[], Any]) -> str:
    """The one line of the ModelError that a call raises, quickly and in little memory."""
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        call()
    assert time.perf_counter() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("how", BROKEN)
def test_broken_safetensors_are_one_line(how: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    BROKEN[how](tmp_path / "model.safetensors")
    assert "model.safetensors: not a whole" in fails_fast(lambda: read_facts(str(tmp_path)))


def test_a_large_file_with_a_large_header_is_not_read_into_memory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**33))
        stream.truncate(2**34)  # a hole
    assert "claims" in fails_fast(lambda: list(stored_tensors(file)))


def test_the_header_agrees_with_safetensors_itself(tmp_path: Path) -> None:
    import numpy
    from safetensors.numpy import save_file

    arrays = {"b": numpy.zeros((3, 5), "float16"), "a": numpy.zeros((), "float32"), "c": numpy.zeros((0, 2), "int8")}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = [(t.name, t.shape, t.dtype) for t in stored_tensors(tmp_path / "x.safetensors")]
    assert read == [("a", (), "F32"), ("b", (3, 5), "F16"), ("c", (0, 2), "I8")]


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(file: Path, architecture: str = "llama", tied: bool = False, **changes: Any) -> Path:
    """A small file by the writer of llama.cpp's own package, with a layer's tensors."""
    import numpy
    from gguf import GGUFWriter, RopeScalingType, TokenType

    writer = GGUFWriter(file, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(1)
    writer.add_head_count(changes.get("heads", 4))
    writer.add_head_count_kv(2)
    if "head_dim" in changes:
        writer.add_key_length(changes["head_dim"])
        writer.add_rope_dimension_count(changes["head_dim"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<pad>", "a"])
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL])
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(changes.get("pad", 2))
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", numpy.zeros((4, 32), "float32"))
    if changes.get("scaled") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    elif "scaled" in changes:
        writer.add_tensor(changes["scaled"], numpy.ones(4, "float32"))
    if not tied:
        writer.add_tensor("output.weight", numpy.zeros((4, 32), "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


class TestGguf:
    def test_a_small_file(self, tmp_path: Path) -> None:
        facts = read_facts(str(write_gguf(tmp_path / "m.gguf", head_dim=16)))
        assert facts.kind == "gguf"
        assert (facts.model_type, facts.layers, facts.max_position_embeddings) == ("llama", 1, 128)
        assert facts.linear["model.layers.0.self_attn.q_proj"].shape == (64, 32)
        assert facts.linear["model.layers.0.self_attn.k_proj"].shape == (32, 32)
        assert facts.modules.count("lm_head") == 1
        tokens = facts.tokenizer
        assert tokens is not None
        assert (tokens.bos_token, tokens.eos_token, tokens.pad_token) == ("<s>", "</s>", "<pad>")
        assert tokens.chat_template == "{{ messages }}"

    def test_a_tied_head_and_a_token_that_is_not_there(self, tmp_path: Path) -> None:
        facts = read_facts(str(write_gguf(tmp_path / "m.gguf", tied=True, pad=99)))
        assert "lm_head" not in facts.modules
        assert facts.tokenizer is not None
        assert facts.tokenizer.pad_token is None

    @pytest.mark.parametrize("architecture", [family.gguf.read for family in FAMILIES.values() if family.gguf.read])
    def test_shapes_are_those_that_transformers_reads(self, architecture: str, tmp_path: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        changes = {} if architecture in ("qwen2", "phi3") else {"head_dim": 16}
        write_gguf(tmp_path / "m.gguf", architecture, tied=True, **changes)
        config = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
        config.pad_token_id = None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert {t.name: t.shape for t in read_facts(str(tmp_path / "m.gguf")).tensors} == real

    def test_other_architectures_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"architecture 'falcon' .*llama, mistral"):
            read_facts(str(write_gguf(tmp_path / "m.gguf", "falcon")))

    @pytest.mark.parametrize("scaled", ["rope_freqs.weight", "linear"])
    def test_scaled_rotations_are_refused(self, scaled: str, tmp_path: Path) -> None:
        """transformers would leave them out in silence, and train another model."""
        with pytest.raises(ModelError, match="rotary positions are scaled"):
            read_facts(str(write_gguf(tmp_path / "m.gguf", scaled=scaled)))

    def test_sizes_that_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="can't be right"):
            read_facts(str(write_gguf(tmp_path / "m.gguf", heads=[4, 2])))

    def test_every_cut_is_noticed(self, tmp_path: Path) -> None:
        whole = write_gguf(tmp_path / "m.gguf").read_bytes()
        file = tmp_path / "cut.gguf"
        for size in {*range(0, len(whole) - 600, 13), len(whole) - 600}:
            file.write_bytes(whole[:size])
            assert "not a whole" in fails_fast(lambda: read_facts(str(file)))

    @pytest.mark.parametrize(
        "rest",
        [
            struct.pack("<IQQ", 3, 0, 2**63),
            struct.pack("<IQQ", 3, 2**63, 0),
            struct.pack("<IQQ", 1, 0, 0),
            struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1),
            struct.pack("<IQQQ", 3, 0, 1, 2**24) + b"key",
            struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62),
            struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**24),
            struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**62),
            struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000,
            struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99),
            struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 2**31),
        ],
    )
    def test_wrong_lengths_fail_fast(self, rest: bytes, tmp_path: Path) -> None:
        file = tmp_path / "m.gguf"
        file.write_bytes(b"GGUF" + rest)
        assert "not a whole" in fails_fast(lambda: read_facts(str(file)))

    def test_every_kind_of_value(self, tmp_path: Path) -> None:
        from gguf import GGUFWriter

        writer = GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_uint8("a", 7)
        writer.add_int64("b", -(2**40))
        writer.add_float64("c", 0.5)
        writer.add_bool("d", True)
        writer.add_array("e", [1, 2, 3])
        writer.add_array("f", ["ä", "ö"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        metadata, names = gguf_header(tmp_path / "m.gguf")
        assert [metadata[key] for key in "abcdef"] == [7, -(2**40), 0.5, True, [1, 2, 3], ["ä", "ö"]]
        assert names == set()

    def test_a_folder_named_like_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").mkdir()
        with pytest.raises(ModelError):
            read_facts(str(tmp_path / "m.gguf"))
