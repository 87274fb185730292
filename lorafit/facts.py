"""What the base model is, read from small files: no torch, no transformers, no weights.

Sources, best first: the headers of safetensors files (the real tensors), a GGUF file's header,
config.json (tensors by the family's layout), or, when a hub can't be reached, the few
configurations bundled in known_models.json.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

from lorafit.errors import ModelError

Kind = Literal["folder", "gguf", "hub", "bundled"]


@dataclass(frozen=True)
class Tensor:
    """A weight: its name as transformers has it, and its shape (a linear layer's is out x in)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = ""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TokenizerFacts:
    """What the tokenizer's files say; None where they say nothing."""

    eos_token: str | None = None
    pad_token: str | None = None
    bos_token: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model as its files describe it.

    Attributes:
        name: as the recipe has it.
        kind: where it comes from.
        source: the same for people, for the plan's reasons.
        config: config.json, or its like from a GGUF header.
        tensors: every stored weight, tied ones once. Empty if neither headers nor layout are known.
        tokenizer: None if its files can't be reached.
    """

    name: str
    kind: Kind
    source: str
    config: dict[str, Any]
    tensors: tuple[Tensor, ...]
    tokenizer: TokenizerFacts | None = None

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of the configuration of a multimodal model."""
        return _text_config(self.config)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def max_position_embeddings(self) -> int | None:
        return self._number("max_position_embeddings", "n_positions")

    @property
    def layers(self) -> int | None:
        return self._number("num_hidden_layers", "n_layer")

    @property
    def stored_quantization(self) -> str | None:
        """The method by which the stored weights are quantized, such as gptq; None if they are not."""
        stored = self.config.get("quantization_config")
        return str(stored.get("quant_method", "unknown")) if isinstance(stored, dict) else None

    def _number(self, *keys: str) -> int | None:
        values = (self.text_config.get(key) for key in keys)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def linear(self) -> dict[str, Tensor]:
        """Linear layers that an adapter can go on, by module path, without the output head.

        Experts and routers are left out: transformers 5 keeps experts in fused parameters and
        routers in modules of their own, neither of them a linear layer. So are vision and audio.
        """
        return {module: tensor for module, tensor in self.quantizable.items() if not _NOT_TEXT.search(module)}

    @cached_property
    def quantizable(self) -> dict[str, Tensor]:
        """The linear layers that bitsandbytes quantizes by default: those of vision and audio too."""
        found = {}
        for tensor in self.tensors:
            module, _, leaf = tensor.name.rpartition(".")
            if leaf == "weight" and len(tensor.shape) == 2 and not _NOT_LINEAR.search(module):
                found[module] = tensor
        return found

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module that has a tensor, and every module that contains one, by path."""
        found: dict[str, None] = {}
        for tensor in self.tensors:
            parts = tensor.name.split(".")[:-1]
            found |= {".".join(parts[: depth + 1]): None for depth in range(len(parts))}
        return tuple(found)

    @cached_property
    def is_moe(self) -> bool:
        return any(re.search(r"\.experts\.", tensor.name) for tensor in self.tensors)


_NOT_LINEAR = re.compile(
    r"(^|\.)(lm_head|embed_out|output|embed_tokens|embed_in|wte|wpe|word_embeddings|embed_positions|shared)$"
    r"|norm|\.experts(\.|$)|(mlp|block_sparse_moe|feed_forward)\.(gate|router)$"
    r"|embed|rotary"
)
_NOT_TEXT = re.compile(r"(^|\.)(vision|visual|audio)")


def read_facts(name: str, revision: str | None = None, chat_template: str | None = None) -> ModelFacts:
    """The facts of a local folder, a .gguf file, or a hub id. Raises ModelError."""
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        return _from_gguf(name, path)
    if path.is_dir():
        return _from_folder(name, path)
    if path.exists():
        raise ModelError(f"{name}: expected a folder, a .gguf file or a hub id, but this is another kind of file")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such folder (looked in {Path.cwd()}), and not a hub id (owner/name)")
    return _from_hub(name, revision)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


# --- folder ---------------------------------------------------------------------------------------


def _from_folder(name: str, path: Path) -> ModelFacts:
    config_file = path / "config.json"
    if not config_file.is_file():
        hint = " (an adapter: name its base model instead)" if (path / "adapter_config.json").is_file() else ""
        raise ModelError(f"{name}: the folder has no config.json{hint}")
    config = _read_json(config_file)
    weights = weight_files(path)
    for file in weights:
        if not file.is_file():
            raise ModelError(f"{name}: {file.name} is missing, which model.safetensors.index.json names")
    return ModelFacts(name, "folder", *_tensors(config, weights, "no safetensors files"), _tokenizer_facts(path))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load (an index may name some that are not there)."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: expected a weight_map of tensors to files")
    return [folder / name for name in sorted(set(names.values()))]


def _tensors(
    config: dict[str, Any], weights: list[Path], otherwise: str
) -> tuple[str, dict[str, Any], tuple[Tensor, ...]]:
    """Where the tensors are known from, the configuration, and the tensors."""
    stored = [tensor for file in weights for tensor in safetensors_header(file)]
    if not stored or "quantization_config" in config:  # packed tensors don't have the layers' shapes
        return f"config.json ({otherwise})", config, tuple(layout(config))
    source = f"the headers of {len(weights)} safetensors file{'s' * (len(weights) != 1)}"
    return source, config, tuple(_as_loaded(config, stored))


_MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself reads at most."""


def safetensors_header(file: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file from its header, in order of name. Raises ModelError."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            if size < 8:
                raise ValueError(f"it has {size} bytes")
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes of {size}")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        tensors = [_header_tensor(name, header[name]) for name in sorted(header)]
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it is cut off: {size} bytes instead of {8 + length + end}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    yield from tensors


def _header_tensor(name: str, entry: Any) -> Tensor:
    match entry:
        case {"shape": [*shape], "dtype": str(dtype), "data_offsets": [int(), int()]} if all(
            isinstance(length, int) and length >= 0 for length in shape
        ):
            return Tensor(name, tuple(shape), dtype)
    raise ValueError(f"its header has no shape, type and place for {name[:80]!r}")


_BUFFER = re.compile(r"(rotary_emb\.inv_freq|attn\.masked_bias)$")
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def _as_loaded(config: dict[str, Any], tensors: list[Tensor]) -> Iterator[Tensor]:
    """Stored tensors as the loaded model has them as parameters.

    Tied heads are counted once, stored buffers are left out, and GPT-2's layers, which are stored
    in x out and often without their prefix, look like everyone's.
    """
    gpt2 = config.get("model_type") == "gpt2"
    bare = gpt2 and not any(tensor.name.startswith("transformer.") for tensor in tensors)
    for tensor in tensors:
        name, shape = tensor.name, tensor.shape
        if (_is_tied(config) and name.endswith("lm_head.weight")) or _BUFFER.search(name):
            continue
        if gpt2 and name.endswith("attn.bias") and len(shape) == 4:  # the causal mask
            continue
        if gpt2 and _TRANSPOSED.search(name):
            shape = shape[::-1]
        yield Tensor(f"transformer.{name}" if bare and not name.startswith("lm_head") else name, shape, tensor.dtype)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _is_tied(config: dict[str, Any]) -> bool:
    key, family = "tie_word_embeddings", _FAMILIES.get(str(config.get("model_type")))
    usual = family.tied if family else config.get("model_type") in ("gpt2", "gemma3")
    return bool(_text_config(config).get(key, config.get(key, usual)))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected an object")
    return value


def _tokenizer_facts(path: Path) -> TokenizerFacts | None:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    config = _read_json(file)

    def token(name: str) -> str | None:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    template = config.get("chat_template")
    if isinstance(template, list):  # named templates
        named = [item for item in template if isinstance(item, dict)]
        template = next((item.get("template") for item in named if item.get("name") == "default"), None)
    jinja = path / "chat_template.jinja"
    try:
        template = jinja.read_text(encoding="utf-8") if jinja.is_file() else template
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{jinja}: can't be read: {error}") from None
    template = template if isinstance(template, str) else None
    return TokenizerFacts(token("eos_token"), token("pad_token"), token("bos_token"), template)


# --- hub ------------------------------------------------------------------------------------------


@functools.cache
def hub_unreachable() -> str | None:
    """Why the hub is not asked, or None if it can be.

    One quick connection stands before the client's own retries, which take most of a minute.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return None  # the client knows how to use a proxy
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=3).close()
    except OSError:
        return f"{endpoint.hostname} can't be reached"
    return None


def _from_hub(name: str, revision: str | None) -> ModelFacts:
    """Cached files first, then the network, then the bundled configuration."""
    found = {file: _hub_file(name, file, revision) for file in ("config.json", "tokenizer_config.json")}
    if found["config.json"] is None:
        bundled = known_models().get(name.lower())
        if bundled is None:
            why = hub_unreachable() or "the hub does not have it or does not let you read it"
            raise ModelError(
                f"{name}: config.json is not in the cache and {why}; download the model first, or check the name, "
                "the revision and your access"
            )
        source = f"the bundled configuration ({hub_unreachable() or 'the hub does not let you read it'})"
        return ModelFacts(name, "bundled", source, bundled, tuple(layout(bundled)))
    _hub_file(name, "chat_template.jinja", revision)
    folder = found["config.json"].parent
    config = _read_json(found["config.json"])
    weights = weight_files(folder)
    if not all(file.is_file() for file in weights):  # not downloaded yet, or in part
        weights = []
    return ModelFacts(name, "hub", *_tensors(config, weights, "from the hub"), _tokenizer_facts(folder))


def _hub_file(name: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None or hub_unreachable():
        return None  # known to be missing, or not to be asked for
    try:
        return Path(hf_hub_download(name, file, revision=revision, etag_timeout=5))
    except Exception:  # noqa: BLE001 - whatever the client raises, the file can't be had
        return None


def known_models() -> dict[str, dict[str, Any]]:
    """The bundled configurations by lower-case name; their sources are in the file."""
    text = resources.files("lorafit").joinpath("known_models.json").read_text(encoding="utf-8")
    return {key.lower(): value for key, value in json.loads(text)["models"].items()}


# --- layouts --------------------------------------------------------------------------------------


def layout(config: dict[str, Any]) -> list[Tensor]:
    """The tensors of a decoder by its family's layout in transformers; empty for other families."""
    family = _FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return []
    try:
        return list(_decoder(config, family))
    except KeyError as error:
        raise ModelError(f"the configuration of a {config['model_type']} model has no {error}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"the configuration of a {config['model_type']} model can't be right: {error}") from None


@dataclass(frozen=True)
class _Family:
    """How a family differs from Llama."""

    qkv_bias: bool = False
    attention_bias: bool = True  # whether config.json may ask for biases
    mlp_bias: bool = False
    qk_norm: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: bool = False  # qkv_proj and gate_up_proj (Phi-3)
    # What a key that config.json leaves out means:
    tied: bool = False
    kv_heads: int | None = None  # as many as heads
    head_dim: int | None = None  # hidden_size / heads


_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_FAMILIES = {
    "llama": _Family(mlp_bias=True),
    "mistral": _Family(attention_bias=False, kv_heads=8),
    "granite": _Family(mlp_bias=True),
    "qwen2": _Family(qkv_bias=True, attention_bias=False, kv_heads=32),
    "qwen3": _Family(qk_norm=True, kv_heads=32, head_dim=128),
    "gemma": _Family(tied=True, kv_heads=16, head_dim=256),
    "gemma2": _Family(norms=_FOUR_NORMS, tied=True, kv_heads=4, head_dim=256),
    "gemma3_text": _Family(norms=_FOUR_NORMS, qk_norm=True, tied=True, kv_heads=4, head_dim=256),
    "phi3": _Family(attention_bias=False, fused=True),
}


def _decoder(config: dict[str, Any], family: _Family) -> Iterator[Tensor]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", family.kv_heads) or heads
    head = config.get("head_dim", family.head_dim) or hidden // heads
    for value in (hidden, inner, vocab, heads, kv_heads, head, config["num_hidden_layers"]):
        if not isinstance(value, int) or not 0 < value < 1 << 32:
            raise ValueError(f"{str(value)[:40]} is no size")
    queries, keys = heads * head, kv_heads * head
    attention_bias = family.attention_bias and config.get("attention_bias", False)
    yield Tensor("model.embed_tokens.weight", (vocab, hidden))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        linear: list[tuple[str, int, int, bool]]
        if family.fused:
            linear = [
                ("self_attn.qkv_proj", queries + 2 * keys, hidden, False),
                ("self_attn.o_proj", hidden, queries, False),
                ("mlp.gate_up_proj", 2 * inner, hidden, False),
                ("mlp.down_proj", hidden, inner, False),
            ]
        else:
            qkv_bias = attention_bias or family.qkv_bias
            mlp_bias = family.mlp_bias and config.get("mlp_bias", False)
            linear = [
                ("self_attn.q_proj", queries, hidden, qkv_bias),
                ("self_attn.k_proj", keys, hidden, qkv_bias),
                ("self_attn.v_proj", keys, hidden, qkv_bias),
                ("self_attn.o_proj", hidden, queries, attention_bias),
                ("mlp.gate_proj", inner, hidden, mlp_bias),
                ("mlp.up_proj", inner, hidden, mlp_bias),
                ("mlp.down_proj", hidden, inner, mlp_bias),
            ]
        for name, rows, columns, bias in linear:
            yield Tensor(f"{layer}.{name}.weight", (rows, columns))
            if bias:
                yield Tensor(f"{layer}.{name}.bias", (rows,))
        if family.qk_norm:
            yield Tensor(f"{layer}.self_attn.q_norm.weight", (head,))
            yield Tensor(f"{layer}.self_attn.k_norm.weight", (head,))
        for norm in family.norms:
            yield Tensor(f"{layer}.{norm}.weight", (hidden,))
    yield Tensor("model.norm.weight", (hidden,))
    if not _is_tied(config):
        yield Tensor("lm_head.weight", (vocab, hidden))


# --- GGUF -----------------------------------------------------------------------------------------


def _from_gguf(name: str, path: Path) -> ModelFacts:
    try:
        metadata, names = gguf_header(path)
    except FileNotFoundError:
        raise ModelError(f"{name}: no such file (looked in {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: not a whole GGUF file: {error}") from None
    family = str(metadata.get("general.architecture", ""))
    if family not in _GGUF_FAMILIES:
        known = ", ".join(_GGUF_FAMILIES)
        raise ModelError(f"{name}: GGUF files of the architecture {family!r} are not supported; these are: {known}")

    def need(key: str) -> Any:
        if f"{family}.{key}" not in metadata:
            raise ModelError(f"{name}: the GGUF header has no {family}.{key}")
        return metadata[f"{family}.{key}"]

    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    config: dict[str, Any] = {
        "model_type": _GGUF_FAMILIES[family],
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": need("attention.head_count"),
        "vocab_size": metadata.get(f"{family}.vocab_size") or len(tokens) or need("vocab_size"),
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
    }
    for key, where in (("num_key_value_heads", "attention.head_count_kv"), ("head_dim", _GGUF_HEAD_DIM.get(family))):
        if f"{family}.{where}" in metadata:
            config[key] = metadata[f"{family}.{where}"]

    def token(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    tokenizer = TokenizerFacts(token("eos"), token("padding"), token("bos"), template)
    return ModelFacts(name, "gguf", "the GGUF header", config, tuple(layout(config)), tokenizer)


_GGUF_FAMILIES = {"llama": "llama", "gemma3": "gemma3_text"} | {
    same: same for same in ("mistral", "qwen2", "qwen3", "phi3", "gemma2")
}
"""Architectures that transformers dequantizes and whose layout is known, with transformers' name."""
_GGUF_HEAD_DIM = {
    "llama": "rope.dimension_count",
    "mistral": "rope.dimension_count",
    "gemma2": "attention.key_length",
    "gemma3": "attention.key_length",
}
"""Where transformers takes head_dim from; elsewhere it takes its default (integrations/ggml.py)."""
_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def gguf_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Metadata and tensor names of a GGUF file (version 2 or 3, little-endian). Raises ValueError.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensor_count, entry_count = _gguf_numbers(stream, "<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported")
        metadata = {}
        for _ in range(entry_count):
            key = _gguf_string(stream)
            (kind,) = _gguf_numbers(stream, "<I")
            metadata[key] = _gguf_value(stream, kind)
        names, last = set(), 0
        for _ in range(tensor_count):
            names.add(_gguf_string(stream))
            (dimensions,) = _gguf_numbers(stream, "<I")
            if dimensions > 8:
                raise ValueError("a tensor has too many dimensions")
            *_, offset = _gguf_numbers(stream, f"<{dimensions}QIQ")
            last = max(last, offset)
        if tensor_count and stream.tell() + last >= size:
            raise ValueError("it is cut off")
        return metadata, names


def _gguf_bytes(stream: BinaryIO, size: int) -> bytes:
    if size > 1 << 16 and size > os.fstat(stream.fileno()).st_size:  # before memory is asked for
        raise ValueError(f"a length of {size} bytes in it is beyond its end")
    data = stream.read(size)
    if len(data) != size:
        raise ValueError("it is cut off")
    return data


def _gguf_numbers(stream: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack(code, _gguf_bytes(stream, struct.calcsize(code)))


def _gguf_string(stream: BinaryIO) -> str:
    (length,) = _gguf_numbers(stream, "<Q")
    return _gguf_bytes(stream, length).decode("utf-8", errors="replace")


def _gguf_value(stream: BinaryIO, kind: int, nested: bool = False) -> Any:
    if kind in _GGUF_NUMBERS:
        return _gguf_numbers(stream, "<" + _GGUF_NUMBERS[kind])[0]
    if kind == _GGUF_STRING:
        return _gguf_string(stream)
    if kind == _GGUF_ARRAY and not nested:
        item_kind, count = _gguf_numbers(stream, "<IQ")
        if item_kind in _GGUF_NUMBERS:
            code = _GGUF_NUMBERS[item_kind]
            data = _gguf_bytes(stream, count * struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", data))
        return [_gguf_value(stream, item_kind, nested=True) for _ in range(count)]
    raise ValueError(f"unknown value type {kind}")
