"""All of a model folder but its weights: configuration, generation settings, tokenizer, card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorafit.facts.folder import read_json
from lorafit.template import inspect_template

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
        for file in base.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def write_generation_config(base: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The base's generation settings, stopping at every token that ends an answer. Returns these tokens' ids.

    The ends are those of the base, the tokenizer's end token, and what the chat template writes after an answer.
    """
    file = base / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    model = read_json(base / "config.json")
    known = config.get("eos_token_id", model.get("eos_token_id"))
    every = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, end_of_turn(tokenizer)]
    ends = list(dict.fromkeys(token for token in every if isinstance(token, int)))
    if ends:
        config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for name in ("bos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name)
        if config.get(name) is None and value is not None:
            config[name] = value
    write_json(folder / "generation_config.json", config)
    return ends


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that the chat template writes after an answer, if it is one token."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    text = inspect_template(tokenizer.chat_template, special_tokens(tokenizer)).end_of_turn
    found = tokenizer.get_added_vocab().get(text) if text else None
    return found if isinstance(found, int) else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """The named special tokens, as chat templates see them."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {name: getattr(tokenizer, name, None) for name in names}


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
