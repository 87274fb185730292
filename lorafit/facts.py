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
        return self.config.get("text_config") or self.config

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def max_position_embeddings(self) -> int | None:
        value = self.text_config.get("max_position_embeddings") or self.text_config.get("n_positions")
        return int(value) if value else None

    @property
    def layers(self) -> int | None:
        value = self.text_config.get("num_hidden_layers") or self.text_config.get("n_layer")
        return int(value) if value else None

    @cached_property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def linear(self) -> dict[str, Tensor]:
        """Linear layers that an adapter can go on, by module path, without the output head.

        Experts and routers are left out: transformers 5 keeps experts in fused parameters and
        routers in modules of their own, neither of them a linear layer.
        """
        found = {}
        for tensor in self.tensors:
            module, dot, leaf = tensor.name.rpartition(".")
            if leaf == "weight" and len(tensor.shape) == 2 and not _NOT_LINEAR.search(module):
                found[module] = tensor
        return found

    @cached_property
    def is_moe(self) -> bool:
        return any(re.search(r"\.experts\.", tensor.name) for tensor in self.tensors)


_NOT_LINEAR = re.compile(
    r"(^|\.)(lm_head|embed_out|output|embed_tokens|embed_in|wte|wpe|word_embeddings|embed_positions|shared)$"
    r"|norm|\.experts(\.|$)|(mlp|block_sparse_moe|feed_forward)\.(gate|router)$"
    r"|embed|rotary|(^|\.)(vision|visual|audio)"
)


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
    weights = sorted(path.glob("*.safetensors"))
    tensors = _tied_once(config, [tensor for file in weights for tensor in safetensors_header(file)])
    source = f"the headers of {len(weights)} safetensors file{'s' * (len(weights) != 1)}"
    if not tensors:
        tensors, source = layout(config), "config.json (no safetensors files)"
    return ModelFacts(name, "folder", source, config, tuple(tensors), _tokenizer_facts(path))


def safetensors_header(file: Path) -> Iterator[Tensor]:
    """The tensors of a safetensors file from its header, in order of name. Raises ModelError."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size - 8:
                raise ValueError(f"its header claims {length} bytes of {size}")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if 8 + length + end != size:
                raise ValueError(f"it is cut off: {size} bytes instead of {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    for tensor in sorted(header):
        yield Tensor(tensor, tuple(header[tensor]["shape"]), header[tensor]["dtype"])


def _tied_once(config: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
    text = config.get("text_config") or config
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return [t for t in tensors if not (tied and t.name.endswith("lm_head.weight"))]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        template = jinja.read_text(encoding="utf-8")
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
    config = _read_json(found["config.json"])
    tokenizer = _tokenizer_facts(found["config.json"].parent)
    weights = sorted(found["config.json"].parent.glob("*.safetensors"))
    if weights and not (found["config.json"].parent / "model.safetensors.index.json").exists():
        tensors = _tied_once(config, [tensor for file in weights for tensor in safetensors_header(file)])
        return ModelFacts(name, "hub", "the headers of cached safetensors files", config, tuple(tensors), tokenizer)
    return ModelFacts(name, "hub", "config.json from the hub", config, tuple(layout(config)), tokenizer)


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
    if config.get("model_type") not in _FAMILIES:
        return []
    family = _FAMILIES[config["model_type"]]
    try:
        return list(_decoder(config, family))
    except KeyError as error:
        raise ModelError(f"config.json of a {config['model_type']} model has no {error}") from None


@dataclass(frozen=True)
class _Family:
    """How a family differs from Llama."""

    qkv_bias: bool = False
    qk_norm: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: bool = False  # qkv_proj and gate_up_proj (Phi-3)
    tied: bool = False  # what config.json leaves out means


_FOUR_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(),
    "granite": _Family(),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=True),
    "gemma": _Family(tied=True),
    "gemma2": _Family(norms=_FOUR_NORMS, tied=True),
    "gemma3_text": _Family(norms=_FOUR_NORMS, qk_norm=True, tied=True),
    "phi3": _Family(fused=True),
}


def _decoder(config: dict[str, Any], family: _Family) -> Iterator[Tensor]:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, kv_heads * head
    attention_bias = config.get("attention_bias", False)
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
            mlp_bias = config.get("mlp_bias", False)
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
    if not config.get("tie_word_embeddings", family.tied):
        yield Tensor("lm_head.weight", (vocab, hidden))


# --- GGUF -----------------------------------------------------------------------------------------


def _from_gguf(name: str, path: Path) -> ModelFacts:
    try:
        metadata, names = gguf_header(path)
    except FileNotFoundError:
        raise ModelError(f"{name}: no such file (looked in {Path.cwd()})") from None
    except (OSError, ValueError, struct.error, UnicodeDecodeError, MemoryError) as error:
        raise ModelError(f"{name}: not a whole GGUF file: {error}") from None
    family = str(metadata.get("general.architecture", ""))
    if family not in _FAMILIES:
        raise ModelError(f"{name}: GGUF files of the architecture {family!r} are not supported")

    def need(key: str) -> Any:
        if f"{family}.{key}" not in metadata:
            raise ModelError(f"{name}: the GGUF header has no {family}.{key}")
        return metadata[f"{family}.{key}"]

    tokens = metadata.get("tokenizer.ggml.tokens") or []
    config = {
        "model_type": family,
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": need("attention.head_count"),
        "num_key_value_heads": metadata.get(f"{family}.attention.head_count_kv"),
        "head_dim": metadata.get(f"{family}.attention.key_length"),
        "vocab_size": len(tokens) or need("vocab_size"),
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
    }

    def token(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if isinstance(index, int) and index < len(tokens) else None

    tokenizer = TokenizerFacts(
        token("eos"), token("padding"), token("bos"), metadata.get("tokenizer.chat_template")
    )
    return ModelFacts(name, "gguf", "the GGUF header", config, tuple(layout(config)), tokenizer)


_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def gguf_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Metadata and tensor names of a GGUF file (version 2 or 3, little-endian).

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensor_count, entry_count = struct.unpack("<IQQ", stream.read(20))
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported")
        metadata = {}
        for _ in range(entry_count):
            key = _gguf_string(stream)
            (kind,) = struct.unpack("<I", stream.read(4))
            metadata[key] = _gguf_value(stream, kind)
        names = set()
        for _ in range(tensor_count):
            names.add(_gguf_string(stream))
            (dimensions,) = struct.unpack("<I", stream.read(4))
            if dimensions > 8:
                raise ValueError("a tensor has too many dimensions")
            stream.read(8 * dimensions + 4 + 8)
        return metadata, names


def _gguf_string(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > 1 << 24:
        raise ValueError("a string is too long")
    return stream.read(length).decode("utf-8", errors="replace")


def _gguf_value(stream: BinaryIO, kind: int) -> Any:
    if kind in _GGUF_NUMBERS:
        code = "<" + _GGUF_NUMBERS[kind]
        return struct.unpack(code, stream.read(struct.calcsize(code)))[0]
    if kind == _GGUF_STRING:
        return _gguf_string(stream)
    if kind == _GGUF_ARRAY:
        item_kind, count = struct.unpack("<IQ", stream.read(12))
        if count > 1 << 24:
            raise ValueError("an array is too long")
        if item_kind in _GGUF_NUMBERS:
            code = f"<{count}{_GGUF_NUMBERS[item_kind]}"
            return list(struct.unpack(code, stream.read(struct.calcsize(code))))
        return [_gguf_value(stream, item_kind) for _ in range(count)]
    raise ValueError(f"unknown value type {kind}")
