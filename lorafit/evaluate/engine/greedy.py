"""Greedy answers in batches: what `generate` gives one by one, without computing for rows that have ended."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from lorafit.evaluate.engine.arithmetic import autocast
from lorafit.evaluate.engine.batches import batches, ones, padded, shrinking, token_budget

_HARMLESS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_length",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "use_cache",
    "cache_implementation",
    "transformers_version",
    "_from_model_config",
    "return_dict_in_generate",
}
"""What a generation configuration may say without changing a greedy answer."""
_KEPT = 0.75
"""Share of a batch that is still at work below which the others are taken out of it."""


@dataclass(frozen=True)
class Generated:
    """A greedy answer.

    Attributes:
        ids: without the end token.
        ended: by an end token.
        seconds: from the start of its batch to its own end.
    """

    row: int
    ids: list[int]
    ended: bool
    seconds: float
    batch_rows: int


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, learned: Collection[int] = ()) -> set[int]:
    """Every token that ends an answer: the model's, the tokenizer's, and those that training taught."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return {token for token in (*known, tokenizer.eos_token_id, *learned) if token is not None}


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    done: Collection[int] = (),
    expected_lengths: Sequence[int] | None = None,
) -> Iterator[Generated]:
    """Greedy answers to all prompts but those in `done`, batch by batch.

    Args:
        expected_lengths: of the answers, in tokens: rows that are alike are put together. They change no answer.
    """
    lengths = [len(prompt) for prompt in prompts]
    expected = expected_lengths or [0] * len(lengths)
    order = sorted(
        (index for index in range(len(lengths)) if index not in done),
        key=lambda index: (-expected[index], -lengths[index]),
    )
    whole = [length + max_new_tokens for length in lengths]
    own = _is_plain(model, ends, pad_id)

    def work(batch: list[int]) -> list[Generated]:
        chosen = [list(prompts[index]) for index in batch]
        with autocast(model):
            made = (_own_loop if own else _library)(model, chosen, set(ends), pad_id, max_new_tokens)
        return [Generated(row, *one, len(batch)) for row, one in zip(batch, made, strict=True)]

    for batch in batches(whole, token_budget(model) * 2, order=order):
        yield from shrinking(work, batch)


def _is_plain(model: Any, ends: Collection[int], pad_id: int) -> bool:
    """Whether a greedy answer is the most likely token each time, and the cache one that rows can be taken out of."""
    config: GenerationConfig = model.generation_config
    asked = {name for name in config.to_diff_dict() if getattr(config, name, None) not in (None, False, [])}
    neutral = {name for name in asked if getattr(config, name) == getattr(GenerationConfig(), name, None)}
    ones_ = {"repetition_penalty", "encoder_repetition_penalty", "length_penalty", "num_beams", "num_return_sequences"}
    neutral |= {name for name in asked & ones_ if getattr(config, name) == 1}
    if asked - neutral - _HARMLESS:
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    made = model(input_ids=torch.tensor([[pad_id, pad_id]], device=model.device), past_key_values=cache, use_cache=True)
    return type(made.past_key_values) is DynamicCache and all(
        type(layer) is DynamicLayer for layer in made.past_key_values.layers
    )


def _library(
    model: Any, prompts: list[list[int]], ends: set[int], pad_id: int, most: int
) -> list[tuple[list[int], bool, float]]:
    """By transformers, with all that the model's generation configuration asks for but sampling."""
    began = time.perf_counter()
    inputs = padded(prompts, pad_id, left=True).to(model.device)
    output = model.generate(
        input_ids=inputs,
        attention_mask=padded(ones(prompts), 0, left=True).to(model.device),
        max_new_tokens=most,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        use_cache=True,
    )
    seconds = time.perf_counter() - began
    found = []
    for ids in output[:, inputs.shape[1] :].tolist():
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        found.append((ids[:end], end is not None, seconds))
    return found


def _own_loop(
    model: Any, prompts: list[list[int]], ends: set[int], pad_id: int, most: int
) -> list[tuple[list[int], bool, float]]:
    """The most likely token each time; rows that have ended leave the batch and its cache."""
    began = time.perf_counter()
    device = model.device
    mask = padded(ones(prompts), 0, left=True).to(device)
    ids = padded(prompts, pad_id, left=True).to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    stop = torch.tensor(sorted(ends), device=device)
    answers: list[list[int]] = [[] for _ in prompts]
    ended = [0.0] * len(prompts)
    rows = torch.arange(len(prompts))
    alive = torch.ones(len(prompts), dtype=torch.bool)
    for step in range(most):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].float().argmax(-1)
        ends_now = torch.isin(chosen, stop).cpu()
        now = time.perf_counter() - began
        for place in torch.nonzero(alive).flatten().tolist():
            row = int(rows[place])
            if ends_now[place]:
                ended[row] = now
            else:
                answers[row].append(int(chosen[place]))
        alive &= ~ends_now
        if not alive.any() or step == most - 1:
            break
        ids = chosen[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if int(alive.sum()) <= _KEPT * len(alive):
            keep = torch.nonzero(alive).flatten()
            where = keep.to(device)
            cache.batch_select_indices(where)
            ids, positions, mask = ids[where], positions[where], mask[where]
            rows, alive = rows[keep], alive[keep]
    total = time.perf_counter() - began
    return [(answer, end > 0, end or total) for answer, end in zip(answers, ended, strict=True)]
