"""Whether a GGUF file answers as the model it was made of, by running both."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorafit.errors import DoesNotFitError, ModelError, first_line, is_out_of_memory
from lorafit.model import loading
from lorafit.progress import each

_FROM_FOLDER = ("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window")
"""What transformers doesn't read from a GGUF file of the known families and llama.cpp does."""


def compare_gguf(folder: Path, gguf: Path, token_rows: list[list[int]]) -> dict[str, float]:
    """Run a model folder and its GGUF file, one after the other, in float32 on the same tokens.

    transformers reads the GGUF file. It doesn't take a model's rope scaling, head size and biases from it, so these
    come from the folder's config.json: tensors and vocabulary size are what is compared.

    Args:
        token_rows: rows of token ids, of any lengths above 0.

    Returns:
        top1_agreement: share of positions where both find the same token most likely.
        mean_kl: mean of KL(folder || file) in nats.
        positions: how many were compared.

    Raises ModelError if one can't be loaded, DoesNotFitError if memory is too small.
    """
    rows = [row for row in token_rows if row]
    if not rows:
        raise ModelError(f"{gguf}: there are no tokens to compare the file on")
    expected = list(_log_probabilities(folder, None, rows))
    same = positions = 0
    divergence = 0.0
    for first, other in zip(expected, _log_probabilities(folder, gguf, rows), strict=True):
        if first.shape != other.shape:
            raise ModelError(f"{gguf}: has {other.shape[-1]:,} tokens, the model {first.shape[-1]:,}")
        same += int((first.argmax(-1) == other.argmax(-1)).sum())
        divergence += float((first.exp() * (first - other)).sum())
        positions += len(first)
    return {"top1_agreement": same / positions, "mean_kl": divergence / positions, "positions": float(positions)}


def _log_probabilities(folder: Path, gguf: Path | None, rows: list[list[int]]) -> Iterator[torch.Tensor]:
    """(tokens, vocabulary) for each row; the model is gone when all are done."""
    try:
        config = AutoConfig.from_pretrained(folder)
        if gguf is None:
            with loading(folder):
                model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
        else:
            read = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            for name in _FROM_FOLDER:
                if hasattr(config, name):
                    setattr(read, name, getattr(config, name))
            with loading(gguf):
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent, gguf_file=gguf.name, config=read, dtype=torch.float32
                )
    except Exception as error:
        if is_out_of_memory(error):
            raise DoesNotFitError(f"{gguf or folder}: the comparison doesn't fit into memory") from error
        raise ModelError(f"{gguf or folder}: can't be loaded to compare: {first_line(error)}") from error
    model.eval()
    for row in each(rows, f"comparing {(gguf or folder).name}", len(rows)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0]
        yield torch.log_softmax(logits.float(), -1)
    del model
    gc.collect()
