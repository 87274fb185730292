"""How what can't be written exactly is refused."""

from __future__ import annotations

from pathlib import Path

from lorafit.errors import ModelError


def refused(folder: Path, what: str) -> ModelError:
    """An error for what our own writer of GGUF files doesn't know, with the way out."""
    return ModelError(f"{folder}: {what}, which lorafit can't write as GGUF exactly; use --llama-cpp DIR")
