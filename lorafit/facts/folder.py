"""Facts of a local folder, from config.json, the headers of its safetensors files and the tokenizer's files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorafit.bounds import LARGEST_TEMPLATE, read_bytes, read_json, read_text
from lorafit.errors import ModelError
from lorafit.facts.layouts import as_loaded, layout
from lorafit.facts.model import ModelFacts, Tensor, TokenizerFacts, check_sizes
from lorafit.facts.safetensors import Shard, read_shard, weight_files


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
    known = described(name, config, map(read_shard, weights), "", "no safetensors files")
    return ModelFacts(name, "folder", *known, tokenizer_facts(path))


def described(
    name: str, config: dict[str, Any], shards: Iterable[Shard], place: str, otherwise: str
) -> tuple[str, dict[str, Any], tuple[Tensor, ...]]:
    """Where the tensors are known from, the configuration, and the tensors.

    Args:
        place: where the headers were read, if not on this disk.
        otherwise: why it is the configuration if there are no headers.

    Raises ModelError for tensors of another family than the configuration's.
    """
    files = list(shards)
    stored = [tensor for shard in files for tensor in shard.tensors]
    if not stored or "quantization_config" in config:  # packed tensors don't have the layers' shapes
        return f"config.json ({otherwise})", config, tuple(layout(config))
    source = f"the headers of {len(files)} safetensors file{'s' * (len(files) != 1)}{place}"
    try:
        return source, config, as_loaded(config, stored)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None


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
    """SHA-256 of the tokenizer's files; None where the vocabulary is not there (yet)."""
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    if not files or files[0].name not in TOKENIZER_FILES[:3]:
        return None
    # transformers picks the tokenizer's class by config.json; a model's own code may be one.
    files += [path / "config.json", *sorted(path.glob("*.py")), *sorted(path.glob("additional_chat_templates/*.jinja"))]
    digest = hashlib.sha256()
    for file in filter(Path.is_file, files):
        digest.update(f"{file.name} {hashlib.sha256(read_bytes(file, _MOST_OF_A_TOKENIZER)).hexdigest()}\n".encode())
    return digest.hexdigest()
