"""Log-likelihoods of several answers to one prompt, whose shared part is computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lorafit.evaluate.engine.arithmetic import autocast
from lorafit.evaluate.engine.batches import batches, ones, padded, shrinking, token_budget

LOGIT_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Choice:
    """A prompt and its options, in tokens; each option has at least one."""

    prompt: list[int]
    options: list[list[int]]


@dataclass(frozen=True)
class Scores:
    """Of a question's options: the summed log-probability of the tokens in nats, and whether each token is top-1."""

    row: int
    logprobs: list[float]
    greedy: list[bool]


@torch.no_grad()
def choices(model: Any, questions: Sequence[Choice], pad_id: int, done: Collection[int] = ()) -> Iterator[Scores]:
    """The scores of all questions but those in `done`.

    A prompt is run once, and its keys and values are shared by its options. Where a model keeps other things than keys
    and values, or where the first questions come out otherwise than whole, every option is run with its prompt.
    """
    left = [index for index in range(len(questions)) if index not in done]
    if not left:
        return
    how = _shared if _can_share(model, questions[left[0]], pad_id) else _whole
    sizes = [
        len(question.prompt) + sum(map(len, question.options)) if how is _shared else _whole_size(question)
        for question in questions
    ]
    vocabulary = int(model.config.get_text_config().vocab_size)
    budget = min(token_budget(model), max(LOGIT_BYTES // (4 * vocabulary), 1) if how is _whole else 1 << 40)

    def work(batch: list[int]) -> list[Scores]:
        made = how(model, [questions[index] for index in batch], pad_id)
        return [dataclasses.replace(scores, row=row) for row, scores in zip(batch, made, strict=True)]

    order = sorted(left, key=lambda index: -sizes[index])
    for batch in batches(sizes, budget, order=order):
        yield from shrinking(work, batch)


def whole_rows(model: Any, questions: Sequence[Choice], pad_id: int) -> list[Scores]:
    """The same, each option run with its prompt."""
    with torch.no_grad():
        made = [_whole(model, [question], pad_id)[0] for question in questions]
    return [dataclasses.replace(scores, row=row) for row, scores in enumerate(made)]


def _whole_size(question: Choice) -> int:
    return len(question.options) * (len(question.prompt) + max(map(len, question.options)))


def _can_share(model: Any, question: Choice, pad_id: int) -> bool:
    """Whether the cache is of keys and values alone, and sharing it changes nothing but rounding."""
    try:
        with autocast(model):
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
            ids = torch.tensor([question.prompt], device=model.device)
            kept = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
        if type(kept) is not DynamicCache or not all(type(layer) is DynamicLayer for layer in kept.layers):
            return False
        shorter = Choice(question.prompt[len(question.prompt) // 2 :], question.options)
        pair = [question, shorter]  # of two lengths, so that padding is tried as well
        shared, whole = _shared(model, pair, pad_id), [_whole(model, [one], pad_id)[0] for one in pair]
    except (TypeError, ValueError, NotImplementedError, AttributeError):
        return False
    exact = model.dtype == torch.float32 and not getattr(model, "is_quantized", False)
    one = torch.tensor([value for scores in shared for value in scores.logprobs])
    other = torch.tensor([value for scores in whole for value in scores.logprobs])
    allowed = (1e-4 if exact else 2e-2) * other.abs().clamp_min(1)
    return bool(((one - other).abs() <= allowed).all())


def _shared(model: Any, questions: list[Choice], pad_id: int) -> list[Scores]:
    prompts = [question.prompt for question in questions]
    counts = torch.tensor([len(question.options) for question in questions], device=model.device)
    mask = padded(ones(prompts), 0, left=True).to(model.device)
    with autocast(model):
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        first = model(
            input_ids=padded(prompts, pad_id, left=True).to(model.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1:]
        options = [option for question in questions for option in question.options]
        owner = torch.repeat_interleave(torch.arange(len(questions), device=model.device), counts)
        logits = first[owner]
        if max(map(len, options)) > 1:
            cache.batch_select_indices(owner)
            heads = [option[:-1] for option in options]
            inputs, inner = padded(heads, pad_id).to(model.device), padded(ones(heads), 0).to(model.device)
            start = mask.sum(-1)[owner]
            rest = model(
                input_ids=inputs,
                attention_mask=torch.cat([mask[owner], inner], dim=1),
                position_ids=start[:, None] + torch.arange(inputs.shape[1], device=model.device),
                past_key_values=cache,
                use_cache=True,
            ).logits
            logits = torch.cat([logits, rest], dim=1)
    return _grouped(questions, _score(logits, options, [0] * len(options)))


def _whole(model: Any, questions: list[Choice], pad_id: int) -> list[Scores]:
    rows = [[*question.prompt, *option] for question in questions for option in question.options]
    options = [option for question in questions for option in question.options]
    starts = [len(question.prompt) - 1 for question in questions for _ in question.options]
    with autocast(model):
        logits = model(
            input_ids=padded(rows, pad_id).to(model.device),
            attention_mask=padded(ones(rows), 0).to(model.device),
            use_cache=False,
        ).logits
    return _grouped(questions, _score(logits, options, starts))


def _score(logits: torch.Tensor, options: list[list[int]], starts: list[int]) -> list[tuple[float, bool]]:
    """Of each option: its log-probability and whether it is greedy. `logits` at `start` predict its first token."""
    found = []
    for row, (option, start) in enumerate(zip(options, starts, strict=True)):
        log_probs = logits[row, start : start + len(option)].float().log_softmax(-1)
        ids = torch.tensor(option, device=logits.device)
        each = log_probs.gather(-1, ids[:, None])[:, 0].double()
        found.append((float(each.sum()), bool((log_probs.argmax(-1) == ids).all())))
    return found


def _grouped(questions: list[Choice], scores: list[tuple[float, bool]]) -> list[Scores]:
    found, place = [], 0
    for row, question in enumerate(questions):
        part = scores[place : place + len(question.options)]
        found.append(Scores(row, [value for value, _ in part], [greedy for _, greedy in part]))
        place += len(question.options)
    return found
