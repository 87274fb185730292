"""Facts of a local folder or GGUF file; and headers of safetensors files, in a folder or over HTTP on a hub."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorafit.bounds import LARGEST_TEMPLATE, opened, read_bytes, read_json, read_text
from lorafit.errors import ModelError
from lorafit.facts.layouts import as_loaded, layout
from lorafit.facts.model import ModelFacts, Tensor, TokenizerFacts, check_sizes
from lorafit.families import FAMILIES
from lorafit.files import is_inside
from lorafit.progress import stage
from lorafit.text import first_line, printable

_MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself reads at most."""
_HUB_SECONDS = 5.0
"""How long a hub may be silent."""


@dataclass(frozen=True)
class Shard:
    """A safetensors file.

    Attributes:
        header: its bytes before the tensors.
        tensors: in order of name where the file was read, in order of place where it is to be written.
        size: bytes of the whole file.
    """

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]
    size: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load (an index may name some that are not there)."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    others = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        _indexed(others)  # which transformers follows
        return []
    return _indexed(index)


def _indexed(index: Path) -> list[Path]:
    """The files that an index names. Raises ModelError for one outside its folder."""
    if not index.is_file():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: expected a weight_map of tensors to files")
    if odd := next((name for name in names.values() if not is_inside(name)), None):
        raise ModelError(f"{index}: {printable(odd)} is outside the model's folder")
    return [index.parent / name for name in sorted(set(names.values()))]


def stored_tensors(file: Path) -> tuple[Tensor, ...]:
    """The tensors of a safetensors file and their places, in order of name. Raises ModelError."""
    return read_shard(file).tensors


def read_shard(file: Path) -> Shard:
    """Header and tensors of a safetensors file. Raises ModelError for one that is not whole."""
    try:
        with opened(file) as stream:
            size = file.stat().st_size
            if size < 8:
                raise ValueError(f"it has {size} bytes")
            prefix = stream.read(8)
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes of {size}")
            text = stream.read(length)
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        tensors = tuple(_tensor(file, name, header[name], 8 + length) for name in sorted(header))
        last = max((tensor.end for tensor in tensors), default=8 + length)
        if last != size:
            raise ValueError(f"it is cut off: {size} bytes instead of {last}")
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    return Shard(file.name, prefix + text, tensors, size)


def hub_shards(name: str, revision: str) -> tuple[Shard, ...]:
    """The headers of a hub model's safetensors files, over HTTP and without the weights, in order of name.

    Empty for a model that has no such files. Raises ModelError where they can't be read, such as without access.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import NotASafetensorsRepoError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    try:
        with stage(f"reading the headers of {name}'s safetensors files"):
            found = HfApi().get_safetensors_metadata(name, revision=revision, timeout=_HUB_SECONDS).files_metadata
        return tuple(
            Shard(file, b"", tuple(_tensor(Path(file), key, vars(tensors[key]), 0) for key in sorted(tensors)), 0)
            for file, tensors in ((file, found[file].tensors) for file in sorted(found))
        )
    except NotASafetensorsRepoError:
        return ()
    except Exception as error:  # noqa: BLE001 - the client raises whatever its HTTP library does
        raise ModelError(f"{name}: the headers of its safetensors files can't be read: {first_line(error)}") from None


def by_name(shards: Iterable[Shard]) -> dict[str, Tensor]:
    """All tensors of some files. Raises ModelError for a name that two of them have."""
    found: dict[str, Tensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if (other := found.setdefault(tensor.name, tensor)) is not tensor:
            place = f"{other.file.name} and {tensor.file.name}"
            raise ModelError(f"{tensor.file.parent}: {tensor.name} stands in {place}")
    return found


def _tensor(file: Path, name: str, entry: Any, start: int) -> Tensor:
    match entry:
        case {"shape": [*shape], "dtype": str(dtype), "data_offsets": [int(begin), int(end)]} if all(
            isinstance(length, int) and length >= 0 for length in shape
        ):
            return Tensor(name, tuple(shape), dtype, file, start + begin, start + end)
    raise ValueError(f"its header has no shape, type and place for {name[:80]!r}")


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


def from_gguf(name: str, path: Path) -> ModelFacts:
    try:
        metadata, names = gguf_header(path)
    except FileNotFoundError:
        raise ModelError(f"{name}: no such file (looked in {Path.cwd()})") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: not a whole GGUF file: {error}") from None
    architecture = str(metadata.get("general.architecture", ""))
    known = {family.gguf.read: model_type for model_type, family in FAMILIES.items() if family.gguf.read}
    if architecture not in known:
        raise ModelError(
            f"{name}: GGUF files of the architecture {architecture!r} are not supported; these are: {', '.join(known)}"
        )

    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if names & _ROPE_FACTORS or (kind != "none" and metadata.get(f"{architecture}.rope.scaling.factor", 1) != 1):
        raise ModelError(
            f"{name}: its rotary positions are scaled, which transformers doesn't read from a GGUF file, so it would "
            "train another model; use the model's folder of safetensors"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    config: dict[str, Any] = {
        key: metadata[f"{architecture}.{where}"]
        for key, where in {**_NEEDED, **_OPTIONAL, "head_dim": FAMILIES[known[architecture]].gguf.head_dim}.items()
        if f"{architecture}.{where}" in metadata
    }
    config["vocab_size"] = config.get("vocab_size") or len(tokens) or None
    if missing := next((where for key, where in _NEEDED.items() if config.get(key) is None), None):
        raise ModelError(f"{name}: the GGUF header has no {architecture}.{missing}")
    config |= {"model_type": known[architecture], "tie_word_embeddings": "output.weight" not in names}
    check_sizes(name, config)
    return ModelFacts(name, "gguf", "the GGUF header", config, tuple(layout(config)), _tokenizer(metadata, tokens))


def _tokenizer(metadata: dict[str, Any], tokens: list[str]) -> TokenizerFacts:
    def token(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    template = metadata.get("tokenizer.chat_template")
    shaping = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    sha256 = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
    template = template if isinstance(template, str) else None
    return TokenizerFacts(token("eos"), token("padding"), token("bos"), template, sha256)


_NEEDED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}
_OPTIONAL = {"num_key_value_heads": "attention.head_count_kv"}
"""config.json's keys, and what a header calls them behind its architecture's name."""
_ROPE_FACTORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
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
