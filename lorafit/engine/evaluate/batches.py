"""How a model is run on many rows: its arithmetic and its cache, and batches as large as memory allows."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from trl.trainer.utils import add_fused_lm_head

from lorafit.engine.loss import settle_head
from lorafit.errors import is_out_of_memory
from lorafit.hardware import available_memory
from lorafit.plan import Plan

T = TypeVar("T")
MOST_ROWS = 64
CPU_TOKENS = 2048
"""Padded tokens of a batch on a CPU: more are no faster there, and leave the caches."""
GPU_TOKENS = 32768
SHARE = 0.25
"""Share of the free memory that a batch may take."""


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
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*more, *row] if left else [*row, *more] for row, more in zip(rows, fill, strict=True)])


def ones(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The attention mask of each row, without padding."""
    return [[1] * len(row) for row in rows]


def ready(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The model on the device it was trained on, with the training's head, so that losses mean the same."""
    if getattr(model, "hf_quantizer", None) is None:  # else it is there already
        model.to(plan.hardware.device)
    model.config.use_cache = True
    model.eval()
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    with autocast(model):
        settle_head(model)
    return model


def autocast(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Arithmetic as in training: 16-bit weights with float32 adapters meet in 16-bit arithmetic."""
    dtype = model.dtype
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


def bare(model: Any) -> PreTrainedModel:
    """The transformers model, with the adapters in it where there are some."""
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner


def new_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a model takes a cache: `cache` since transformers 5.24, `past_key_values` before."""
    return {"cache" if "cache" in _takes(model) else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None if there is none."""
    return getattr(output, "cache", getattr(output, "past_key_values", None))


@torch.no_grad()
def has_plain_cache(model: Any) -> bool:
    """Whether all that a model keeps of a prompt is keys and values of every position: rows can be copied and dropped.

    It must also take positions and the number of logits wanted.
    """
    takes = _takes(model)
    if not {"attention_mask", "position_ids", "logits_to_keep"} <= takes or not {"cache", "past_key_values"} & takes:
        return False
    cache = new_cache(model)
    with autocast(model):
        ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
        kept = cache_of(model(input_ids=ids, use_cache=True, **with_cache(model, cache)))
    return (
        type(kept) is DynamicCache
        and kept.get_seq_length() == 2
        and all(type(layer) is DynamicLayer for layer in kept.layers)
    )


@torch.no_grad()
def ignores_padding(model: Any) -> bool:
    """Whether padding before a prompt changes nothing, which is not so for everything recurrent: it is tried."""
    ids = torch.arange(3, 9, device=model.device)
    wide, mask = torch.cat([ids.new_zeros(4), ids])[None], torch.tensor([[0] * 4 + [1] * 6], device=model.device)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if "position_ids" in _takes(model) else {}
    with autocast(model):
        alone = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, -1].float()
        after = model(input_ids=wide, attention_mask=mask, **positions).logits[0, -1].float()
    return bool((alone - after).abs().max() <= (1e-3 if is_exact(model) else 5e-2) * alone.abs().max())


def is_exact(model: Any) -> bool:
    """Whether results differ by float32 rounding only, however they are put into batches."""
    return model.dtype == torch.float32 and not getattr(model, "is_quantized", False)


def _takes(model: Any) -> frozenset[str]:
    return _parameters(type(bare(model)).forward)


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
