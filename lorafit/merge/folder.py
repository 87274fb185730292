"""All of a model folder but its weights: configuration, generation settings, tokenizer, card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lorafit.facts import TOKENIZER_FILES, TokenizerFacts
from lorafit.facts.folder import read_json, tokenizer_facts
from lorafit.template import inspect_template
from lorafit.tokenizer import tokenizer_of

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_KEPT = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE*", "NOTICE*")


def write_config(base: Path, folder: Path, dtype: str | None, untied: bool, vocabulary: int | None) -> None:
    """The base's config.json with what the merge has changed, and the files beside it that a deployment needs.

    Args:
        dtype: name of the weights' type, where it is not the base's; None leaves it.
        untied: whether embeddings and head are now different tensors.
        vocabulary: rows of the embeddings, where they are not the base's; None leaves it.
    """
    config = read_json(base / "config.json")
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)  # where somebody had it
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else None
    parts: list[dict[str, Any]] = [part for part in (config, text) if part is not None]
    for part in parts:
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if vocabulary and "vocab_size" in part:
            part["vocab_size"] = vocabulary
        if dtype in TYPES.values():
            names = [name for name in ("dtype", "torch_dtype") if name in part] or (["dtype"] if part is config else [])
            part |= dict.fromkeys(names, dtype)
    write_json(folder / "config.json", config)
    for pattern in _KEPT:
        for file in filter(Path.is_file, base.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


def tokenizer_folder(*folders: Path) -> Path | None:
    """The first folder with a tokenizer: with a vocabulary, or if none has one of the usual names, any of its files."""
    for names in (("tokenizer.json", "tokenizer.model", "vocab.json"), TOKENIZER_FILES):
        for folder in folders:
            if any((folder / name).is_file() for name in names):
                return folder
    return None


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer with its chat templates, byte for byte as it was trained with."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", folder / "additional_chat_templates")


def write_generation_config(base: Path, folder: Path) -> None:
    """The base's generation settings, stopping at every token that ends an answer of the folder's tokenizer.

    The ends are those of the base, the tokenizer's end token, and what the chat template writes after an answer,
    if that is one token.
    """
    file = base / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    known = config.get("eos_token_id", read_json(base / "config.json").get("eos_token_id"))
    facts = tokenizer_facts(folder) or TokenizerFacts()
    ids = _token_ids(folder) if tokenizer_folder(folder) else {}
    named = {"bos_token": facts.bos_token, "eos_token": facts.eos_token, "pad_token": facts.pad_token}
    turn = inspect_template(facts.chat_template, dict(named)).end_of_turn if facts.chat_template else None
    every = [*(known if isinstance(known, list) else [known]), ids.get(facts.eos_token), ids.get(turn)]
    ends = list(dict.fromkeys(token for token in every if isinstance(token, int)))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name in ("bos_token", "pad_token"):
        if config.get(f"{name}_id") is None and named[name] in ids:
            config[f"{name}_id"] = ids[named[name]]
    write_json(folder / "generation_config.json", config)


def _token_ids(folder: Path) -> dict[str | None, int]:
    """The ids of a tokenizer's special tokens, and of others as far as they are at hand."""
    file = folder / "tokenizer.json"
    added = read_json(file).get("added_tokens") if file.is_file() else None
    if not added:
        return dict(tokenizer_of(folder).get_vocab())
    return {token["content"]: token["id"] for token in added}


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
