"""Facts of a local folder, from config.json, the headers of its safetensors files and the tokenizer's files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.bounds import LARGEST_TEMPLATE, opened, read_bytes, read_json, read_text
from lorafit.errors import ModelError
from lorafit.facts.layouts import is_tied, layout
from lorafit.facts.model import ModelFacts, Tensor, TokenizerFacts, check_sizes
from lorafit.files import is_inside
from lorafit.text import printable


def from_folder(name: str, path: Path) -> ModelFacts:
    config_file = path / "config.json"
    if not config_file.is_file():
        hint = " (an adapter: name its base model instead)" if (path / "adapter_config.json").is_file() else ""
        raise ModelError(f"{name}: the folder has no config.json{hint}")
    config = read_json(config_file)
    check_sizes(name, config)
    weights = weight_files(path)
    for file in weights:
        if not file.is_file():
            raise ModelError(f"{name}: {file.name} is missing, which model.safetensors.index.json names")
    return ModelFacts(name, "folder", *tensors_of(config, weights, "no safetensors files"), tokenizer_facts(path))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load (an index may name some that are not there)."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    others = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        _shards(others)  # which transformers follows
        return []
    return _shards(index)


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Raises ModelError for one outside its folder."""
    if not index.is_file():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: expected a weight_map of tensors to files")
    if odd := next((name for name in names.values() if not is_inside(name)), None):
        raise ModelError(f"{index}: {printable(odd)} is outside the model's folder")
    return [index.parent / name for name in sorted(set(names.values()))]


def tensors_of(
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
    for tensor, _ in stored_tensors(file):
        yield tensor


def stored_tensors(file: Path) -> list[tuple[Tensor, tuple[int, int]]]:
    """The same, each with where its bytes begin and end in the file."""
    try:
        with opened(file) as stream:
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
        start = 8 + length
        tensors = [(_header_tensor(name, header[name]), _place(header[name], start)) for name in sorted(header)]
        last = max((end for _, (_, end) in tensors), default=start)
        if last != size:
            raise ValueError(f"it is cut off: {size} bytes instead of {last}")
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    return tensors


def _header_tensor(name: str, entry: Any) -> Tensor:
    match entry:
        case {"shape": [*shape], "dtype": str(dtype), "data_offsets": [int(), int()]} if all(
            isinstance(length, int) and length >= 0 for length in shape
        ):
            return Tensor(name, tuple(shape), dtype)
    raise ValueError(f"its header has no shape, type and place for {name[:80]!r}")


def _place(entry: dict[str, Any], start: int) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    return start + begin, start + end


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
        if (is_tied(config) and name.endswith("lm_head.weight")) or _BUFFER.search(name):
            continue
        if gpt2 and name.endswith("attn.bias") and len(shape) == 4:  # the causal mask
            continue
        if gpt2 and _TRANSPOSED.search(name):
            shape = shape[::-1]
        yield Tensor(f"transformer.{name}" if bare and not name.startswith("lm_head") else name, shape, tensor.dtype)


def tokenizer_facts(path: Path) -> TokenizerFacts | None:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    config = read_json(file)

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
        template = read_text(jinja, LARGEST_TEMPLATE) if os.path.lexists(jinja) else template
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{jinja}: can't be read: {getattr(error, 'strerror', None) or error}") from None
    template = template if isinstance(template, str) else None
    return TokenizerFacts(token("eos_token"), token("pad_token"), token("bos_token"), template, _digest(path))


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""The files that shape a tokenizer."""


_MOST_OF_A_TOKENIZER = 1 << 30


def _digest(path: Path) -> str | None:
    """Of the tokenizer's files; None where the vocabulary is not there (yet)."""
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not files or files[0].name not in TOKENIZER_FILES[:3]:
        return None
    # transformers picks the tokenizer's class by config.json; a model's own code may be one.
    files += [path / "config.json", *sorted(path.glob("*.py")), *sorted(path.glob("additional_chat_templates/*.jinja"))]
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        digest.update(f"{file.name} {hashlib.sha256(read_bytes(file, _MOST_OF_A_TOKENIZER)).hexdigest()}\n".encode())
    return digest.hexdigest()
