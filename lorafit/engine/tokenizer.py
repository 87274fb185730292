"""Loading tokenizers, without torch's weight; where a model is loaded from, and what is said when it can't be,
for want of memory too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorafit.errors import DoesNotFitError, LorafitError, ModelError, is_out_of_memory
from lorafit.facts import TOKENIZER_FILES
from lorafit.facts.template import with_defaults
from lorafit.plan import Plan
from lorafit.text import first_line
from lorafit.written import expanded


def load_tokenizer(plan: Plan, source: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the base, with the plan's chat template. Raises ModelError.

    A tokenizer without a padding token pads with its end token: labels are padded by position, so
    that end tokens in the rows stay learned.
    """
    name = str(source or plan.model.name_or_path)
    with reading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(
            *location(name),
            **gguf(name),
            revision=plan.revision if source is None else None,
            trust_remote_code=plan.data.trust_remote_code,
        )
    if plan.data.chat_template is not None:
        tokenizer.chat_template = plan.data.chat_template
    settle_template(tokenizer, plan.data.chat_template_kwargs)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"{name}: the tokenizer has neither a padding token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    known = plan.data.vocab_size
    for what, id in (("padding", tokenizer.pad_token_id), ("end", tokenizer.eos_token_id)):
        if known is not None and id is not None and id >= known:
            token = tokenizer.convert_ids_to_tokens(id)
            raise ModelError(
                f"{name}: the tokenizer's {what} token {token!r} has the id {id}, and the model has embeddings for ids "
                f"below {known} only; use the model's own tokenizer, or resize the model's embeddings"
            )
    return tokenizer


def settle_template(tokenizer: PreTrainedTokenizerBase, values: dict[str, Any]) -> None:
    """Give the variables of a tokenizer's chat templates their values, for whoever renders them and gives no others."""
    named: Any = tokenizer.chat_template
    if isinstance(named, dict):
        tokenizer.chat_template = {name: with_defaults(text, values) for name, text in named.items()}
    elif named:
        tokenizer.chat_template = with_defaults(named, values)


def tokenizer_of(*folders: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the first folder that has one. Raises ModelError."""
    found = [folder for folder in folders if any((folder / name).is_file() for name in TOKENIZER_FILES)]
    if not found:
        raise ModelError(f"{folders[-1]}: has no tokenizer")
    with reading("tokenizer", found[0]):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(found[0]), trust_remote_code=False)
    return tokenizer


def location(name: str) -> tuple[str]:
    """What from_pretrained is told for a model: a hub id, a folder, or the folder of a GGUF file."""
    path = expanded(name)
    return (str(path.parent),) if name.endswith(".gguf") else (str(path) if path.exists() else name,)


def gguf(name: str) -> dict[str, str]:
    """The argument by which from_pretrained reads a GGUF file."""
    return {"gguf_file": Path(name).name} if name.endswith(".gguf") else {}


@contextlib.contextmanager
def reading(what: str, name: str | Path) -> Iterator[None]:
    """Within, what a library raises while it reads something is one of our errors, on one line."""
    try:
        yield
    except Exception as error:
        raise cannot_load(what, str(name), error) from error


def cannot_load(what: str, name: str, error: Exception) -> LorafitError:
    """An error of a library as one of ours, on one line."""
    if is_out_of_memory(error):
        return DoesNotFitError(f"{name}: the {what} does not fit into memory: {first_line(error)}")
    return ModelError(f"{name}: the {what} can't be loaded: {first_line(error)}")
