"""Facts of a GGUF file, from its header."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from lorafit.bounds import opened
from lorafit.errors import ModelError
from lorafit.facts.layouts import layout
from lorafit.facts.model import ModelFacts, TokenizerFacts, check_sizes
from lorafit.families import FAMILIES


def from_gguf(name: str, path: Path) -> ModelFacts:
    try:
        metadata, names = gguf_header(path)
    except FileNotFoundError:
        raise ModelError(f"{name}: no such file (looked in {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: not a whole GGUF file: {error}") from None
    family = str(metadata.get("general.architecture", ""))
    known = {entry.gguf.read: name for name, entry in FAMILIES.items() if entry.gguf.read}
    if family not in known:
        others = ", ".join(known)
        raise ModelError(f"{name}: GGUF files of the architecture {family!r} are not supported; these are: {others}")

    def need(key: str) -> Any:
        if f"{family}.{key}" not in metadata:
            raise ModelError(f"{name}: the GGUF header has no {family}.{key}")
        return metadata[f"{family}.{key}"]

    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    config: dict[str, Any] = {
        "model_type": known[family],
        "hidden_size": need("embedding_length"),
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": need("attention.head_count"),
        "vocab_size": metadata.get(f"{family}.vocab_size") or len(tokens) or need("vocab_size"),
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
    }
    head_dim = FAMILIES[known[family]].gguf.head_dim
    for key, where in (("num_key_value_heads", "attention.head_count_kv"), ("head_dim", head_dim)):
        if f"{family}.{where}" in metadata:
            config[key] = metadata[f"{family}.{where}"]

    check_sizes(name, config)

    def token(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    template = metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    shaping = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    sha256 = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
    tokenizer = TokenizerFacts(token("eos"), token("padding"), token("bos"), template, sha256)
    return ModelFacts(name, "gguf", "the GGUF header", config, tuple(layout(config)), tokenizer)


_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def gguf_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Metadata and tensor names of a GGUF file (version 2 or 3, little-endian). Raises ValueError.

    Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    size = path.stat().st_size
    with opened(path) as stream:
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
