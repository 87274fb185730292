"""Rows in batches: of similar length, as large as memory allows, smaller where it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from lorafit.errors import is_out_of_memory
from lorafit.hardware import available_memory

T = TypeVar("T")
MOST_ROWS = 64
CPU_TOKENS = 2048
"""Padded tokens of a batch on a CPU: more are no faster there, and leave the caches."""
GPU_TOKENS = 32768
SHARE = 0.25
"""Of the free memory that a batch may take."""


def batches(
    lengths: Sequence[int], budget_tokens: int, most_rows: int = MOST_ROWS, order: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Indices by length, longest first (so that what doesn't fit is met at once), in batches within a budget.

    Args:
        budget_tokens: of rows times the longest of them; a longer row is a batch by itself.
        order: the indices to take, in this order, if not all by length.
    """
    if order is None:
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    longest = 0
    for index in order:
        longest_then = max(longest, lengths[index])
        if batch and (len(batch) == most_rows or longest_then * (len(batch) + 1) > budget_tokens):
            yield batch
            batch, longest_then = [], lengths[index]
        batch.append(index)
        longest = longest_then
    if batch:
        yield batch


def token_budget(model: Any) -> int:
    """Padded tokens of a batch: what fits into a quarter of the free memory, at most a fixed number on each device.

    A token takes its key and value in every layer (2 x layers x key-value heads x head size), and the activations of
    one layer, which are freed before the next: about eight tensors as wide as the hidden state and its feed-forward
    part, in float32 at worst. Logits are counted by those who make them.
    """
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    wide = max(int(getattr(config, "intermediate_size", 0) or 0), 4 * hidden)
    heads = int(getattr(config, "num_attention_heads", 0) or 1)
    kept = int(getattr(config, "num_key_value_heads", 0) or heads)
    head = int(getattr(config, "head_dim", 0) or hidden // heads)
    layers = int(getattr(config, "num_hidden_layers", 1))
    size = max(torch.finfo(model.dtype).bits // 8, 2)
    token_bytes = size * 2 * layers * kept * head + 4 * 8 * (hidden + wide)
    if model.device.type == "cuda":
        free: int | None = torch.cuda.mem_get_info(model.device)[0]
        most = GPU_TOKENS
    else:
        free, most = available_memory(), CPU_TOKENS
    return most if free is None else max(min(int(SHARE * free / token_bytes), most), 1)


def logit_positions(model: Any, most_bytes: int) -> int:
    """Positions whose logits take so many bytes in float32; at least one."""
    return max(most_bytes // (4 * int(model.config.get_text_config().vocab_size)), 1)


def shrinking(work: Callable[[list[int]], list[T]], planned: Iterable[list[int]]) -> Iterator[T]:
    """The results of all batches; where memory is too small for one, it and those after it are halved.

    Raises what a single row raises.
    """
    pieces = 1
    for batch in planned:
        place = 0
        while place < len(batch):
            part = batch[place : place + -(-len(batch) // pieces)]
            made = _attempt(work, part)
            if made is None:
                while -(-len(batch) // pieces) >= len(part):
                    pieces *= 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            else:
                yield from made
                place += len(part)


def _attempt(work: Callable[[list[int]], list[T]], batch: list[int]) -> list[T] | None:
    """None where memory is too small; by then nothing holds what was made until there."""
    try:
        return work(batch)
    except Exception as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
        return None


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """(rows, longest) from lists of different lengths."""
    longest = max(map(len, rows))
    return torch.tensor(
        [
            [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row))
            for row in rows
        ]
    )


def ones(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The attention mask of each row, without padding."""
    return [[1] * len(row) for row in rows]
