"""Greedy answers in batches: what `generate` gives one by one, without computing for rows that have ended."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers
from packaging.version import Version
from transformers import GenerationMixin, PreTrainedTokenizerBase

from lorafit.engine.evaluate.batches import (
    autocast,
    bare,
    batches,
    has_plain_cache,
    ignores_padding,
    new_cache,
    ones,
    padded,
    shrinking,
    token_budget,
    with_cache,
)
from lorafit.progress import partly_done

HARMLESS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"),
    *("do_sample", "temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("use_cache", "transformers_version", "_from_model_config", "return_dict_in_generate", "length_penalty"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "early_stopping"),
}
"""Settings of a generation configuration that change no greedy answer."""
NEUTRAL_AT_ONE = {"repetition_penalty", "encoder_repetition_penalty", "num_beams", "num_return_sequences"}
BLIND_TO_PADDING = {"min_new_tokens", "suppress_tokens", "begin_suppress_tokens"}
"""Wishes that padding before a prompt leaves as they are; n-grams are looked for in it as well."""
if Version(transformers.__version__) >= Version("5.23"):  # before, the padding was punished as well
    BLIND_TO_PADDING.add("repetition_penalty")
KEPT = 0.75
"""Share of a batch that is still at work below which the others are taken out of it."""


Answer: TypeAlias = tuple[list[int], bool, float]
"""`ids`, `ended` and `seconds` of Generated."""


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

    They are those of `model.generate` for one prompt at a time, with the model's generation configuration but for
    sampling: whatever else that asks for is left to `generate`, and so are models that keep other things than keys and
    values of all positions. Rows of different lengths are put together only where padding changes nothing. An answer
    ends, unended, where the model's positions do: some models can go no further, and others have never learned to.

    Args:
        ends: the tokens that end an answer.
        expected_lengths: of the answers, in tokens: rows that are alike are put together. They change no answer.
    """
    lengths = [len(prompt) for prompt in prompts]
    expected = [0] * len(lengths) if expected_lengths is None else expected_lengths
    left = [index for index in range(len(lengths)) if index not in done]
    if not left or max_new_tokens < 1:
        return
    wishes = _wishes(model)
    own = not wishes and _has_plain_loop(model)
    room = [_room(model, length, max_new_tokens) for length in lengths]

    def work(batch: list[int]) -> list[Generated]:
        chosen = [list(prompts[index]) for index in batch]
        with autocast(model):
            made = (_own_loop if own else _library)(model, chosen, set(ends), pad_id, room[batch[0]])
        return [Generated(row, *one, len(batch)) for row, one in zip(batch, made, strict=True)]

    def planned() -> Iterator[list[int]]:
        sizes = [length + max_new_tokens // 2 for length in lengths]  # an answer's tokens are keys and values only
        budget = 2 * token_budget(model)  # a step reads all weights, for however many rows
        yield from ([index] for index in left if room[index] < max_new_tokens)
        free = [index for index in left if room[index] == max_new_tokens]
        if own or (wishes <= BLIND_TO_PADDING and ignores_padding(model)):
            order = sorted(free, key=lambda index: (-expected[index], -lengths[index]))
            yield from batches(sizes, budget, order=order)
            return
        order = sorted(free, key=lambda index: (-lengths[index], -expected[index]))
        for _, alike in itertools.groupby(order, key=lambda index: lengths[index]):
            yield from batches(sizes, budget, order=list(alike))

    yield from shrinking(work, planned())


def _room(model: Any, prompt: int, most: int) -> int:
    """Tokens that an answer may have after a prompt of so many; a prompt beyond the positions shows there is no end."""
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(most, positions - prompt) if isinstance(positions, int) and positions > prompt else most


def _wishes(model: Any) -> set[str]:
    """The names of what a model's generation configuration asks for beyond the most likely token each time."""
    return {
        name
        for name, value in model.generation_config.to_diff_dict().items()
        if name not in HARMLESS
        and value not in (None, False, [], {}, 0)
        and not (name in NEUTRAL_AT_ONE and value == 1)
    }


def _has_plain_loop(model: Any) -> bool:
    """Whether `generate` does with this model what it does with most, so that the own loop does the same."""
    methods = ("generate", "_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    inner = type(bare(model))
    usual = all(getattr(inner, name, None) is getattr(GenerationMixin, name, None) for name in methods)
    return usual and has_plain_cache(model)


def _library(model: Any, prompts: list[list[int]], ends: set[int], pad_id: int, most: int) -> list[Answer]:
    """Generate by transformers, with all that the model's generation configuration asks for but sampling."""
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
        return_dict_in_generate=False,
    )
    seconds = time.perf_counter() - began
    found = []
    for ids in output[:, inputs.shape[1] :].tolist():
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        found.append((ids[:end], end is not None, seconds))
    return found


def _own_loop(model: Any, prompts: list[list[int]], ends: set[int], pad_id: int, most: int) -> list[Answer]:
    """The most likely token each time; rows that have ended leave the batch and its cache."""
    began = time.perf_counter()
    device = model.device
    mask = padded(ones(prompts), 0, left=True).to(device)
    ids = padded(prompts, pad_id, left=True).to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = new_cache(model)
    answers: list[list[int]] = [[] for _ in prompts]
    ended: list[float | None] = [None] * len(prompts)
    rows = list(range(len(prompts)))
    for step in range(most):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **with_cache(model, cache),
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].float().argmax(-1)
        now = time.perf_counter() - began
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if ended[row] is None and token in ends:
                ended[row] = now
            elif ended[row] is None:
                answers[row].append(token)
        partly_done(len(prompts) * (step + 1) / most)
        working = [place for place, row in enumerate(rows) if ended[row] is None]
        if not working or step == most - 1:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if len(working) <= KEPT * len(rows):
            where = torch.tensor(working, device=device)
            cache.batch_select_indices(where)
            ids, positions, mask = ids[where], positions[where], mask[where]
            rows = [rows[place] for place in working]
    total = time.perf_counter() - began
    return [
        (answer, end is not None, total if end is None else end) for answer, end in zip(answers, ended, strict=True)
    ]
