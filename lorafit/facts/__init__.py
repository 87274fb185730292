"""What the base model is, read from small files: no torch, no transformers, no weights.

Sources, best first: the headers of safetensors files (the real tensors; of a hub model that is not
downloaded, over HTTP), a GGUF file's header, config.json (tensors by the family's layout), or, when
a hub can't be reached, the few configurations bundled in known_models.json.
"""

from __future__ import annotations

import re
from pathlib import Path

from lorafit.errors import ModelError
from lorafit.facts.folder import (
    TOKENIZER_FILES,
    Shard,
    by_name,
    from_folder,
    from_gguf,
    gguf_header,
    read_shard,
    stored_tensors,
    weight_files,
)
from lorafit.facts.hub import UnreachableError, from_hub, hub_unreachable, known_models, spare_retries
from lorafit.facts.layouts import layout
from lorafit.facts.model import ModelFacts, Tensor, TokenizerFacts
from lorafit.written import expanded

__all__ = [
    "TOKENIZER_FILES",
    "ModelFacts",
    "Shard",
    "Tensor",
    "TokenizerFacts",
    "UnreachableError",
    "by_name",
    "gguf_header",
    "hub_unreachable",
    "known_models",
    "layout",
    "read_facts",
    "read_shard",
    "spare_retries",
    "stored_tensors",
    "weight_files",
]


def read_facts(name: str, revision: str | None = None) -> ModelFacts:
    """The facts of a local folder, a .gguf file, or a hub id. Raises ModelError."""
    path = expanded(name)
    if name.endswith(".gguf"):
        return from_gguf(name, path)
    if path.is_dir():
        return from_folder(name, path)
    if path.exists():
        raise ModelError(f"{name}: expected a folder, a .gguf file or a hub id, but this is another kind of file")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such folder (looked in {Path.cwd()}), and not a hub id (owner/name)")
    return from_hub(name, revision)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
