"""Log-likelihoods of several answers to one prompt, whose shared part is computed once."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from lorafit.engine.data.encode import IGNORED
from lorafit.engine.evaluate.arithmetic import autocast, has_plain_cache, is_exact, new_cache
from lorafit.engine.evaluate.batches import batches, logit_positions, ones, padded, shrinking, token_budget
from lorafit.engine.evaluate.likelihood import score_rows

LOGIT_BYTES = 256 * 1024 * 1024
"""Logits held at once, in bytes of float32."""


@dataclass(frozen=True)
class Choice:
    """A prompt and its options, in tokens; the prompt and each option have at least one."""

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

    Args:
        model: with TRL's fused head, as `ready` leaves it.
    """
    budget, positions = token_budget(model), logit_positions(model, LOGIT_BYTES)
    sharing, checked = has_plain_cache(model), False
    commons = [_common(question.options) for question in questions]
    sizes = [
        max(len(question.prompt) + common, (common + 1) * budget // positions)
        for question, common in zip(questions, commons, strict=True)
    ]

    def work(batch: list[int]) -> list[Scores]:
        nonlocal sharing, checked
        chosen = [questions[index] for index in batch]
        trial = _trial(model, chosen, pad_id) if sharing and not checked else None
        if sharing:
            made = _shared(model, chosen, pad_id, budget)
            sharing, checked = trial is None or trial.agrees(made), True
        if not sharing:
            made = _whole(model, chosen, pad_id, budget)
        return [dataclasses.replace(scores, row=row) for row, scores in zip(batch, made, strict=True)]

    order = sorted((index for index in range(len(questions)) if index not in done), key=lambda index: -sizes[index])
    yield from shrinking(work, batches(sizes, budget, order=order))


@torch.no_grad()
def whole_rows(model: Any, questions: Sequence[Choice], pad_id: int) -> list[Scores]:
    """The same, each option run with its prompt."""
    return _whole(model, questions, pad_id, token_budget(model))


@dataclass(frozen=True)
class Trial:
    """Some options of one of a batch's questions, run whole: what they must come out as."""

    row: int
    options: list[int]
    logprobs: list[float]
    allowed: list[float]

    def agrees(self, made: list[Scores]) -> bool:
        found = [made[self.row].logprobs[option] for option in self.options]
        triples = zip(found, self.logprobs, self.allowed, strict=True)
        return all(abs(value - its) <= allowed for value, its, allowed in triples)


def _trial(model: Any, questions: list[Choice], pad_id: int) -> Trial:
    """Of the two longest options of the shortest question, which has the most padding."""
    row = min(range(len(questions)), key=lambda index: len(questions[index].prompt))
    question = questions[row]
    options = sorted(range(len(question.options)), key=lambda index: -len(question.options[index]))[:2]
    chosen = [question.options[index] for index in options]
    whole = _whole(model, [Choice(question.prompt, chosen)], pad_id, 1)[0].logprobs
    rounding = 1e-3 if is_exact(model) else 5e-2
    allowed = [rounding * max(abs(value), len(option)) for value, option in zip(whole, chosen, strict=True)]
    return Trial(row, options, whole, allowed)


def _common(options: list[list[int]]) -> int:
    """How many tokens all options begin with, leaving each at least one of its own."""
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*options, strict=False))
    return min(sum(1 for _ in alike), *(len(option) - 1 for option in options))


def _shared(model: Any, questions: list[Choice], pad_id: int, budget: int) -> list[Scores]:
    """Prompts in one batch, up to where their options part; then the rest of the options, on copies of the cache."""
    commons = [_common(question.options) for question in questions]
    prompts = [[*one.prompt, *one.options[0][:common]] for one, common in zip(questions, commons, strict=True)]
    tails = [option[common:] for one, common in zip(questions, commons, strict=True) for option in one.options]
    owner = torch.tensor([row for row, one in enumerate(questions) for _ in one.options], device=model.device)
    mask = padded(ones(prompts), 0, left=True).to(model.device)
    kept = max(commons) + 1
    cache = new_cache(model)
    with autocast(model):
        logits = model(
            input_ids=padded(prompts, pad_id, left=True).to(model.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
        ).logits
    log_probs = logits[:, -1].float().log_softmax(-1)
    first = torch.tensor([tail[0] for tail in tails], device=model.device)
    totals = Totals(log_probs[owner, first].double(), (log_probs.argmax(-1)[owner] == first).long())
    if kept > 1:
        spans = [(row, kept - 1 - common, common) for row, common in enumerate(commons)]
        heads = [one.options[0][:common] for one, common in zip(questions, commons, strict=True)]
        totals = totals.plus(_picked(logits, spans, heads).at(owner))
    longer = [index for index, tail in enumerate(tails) if len(tail) > 1]
    rows = max(2 * budget // mask.shape[1], 1)  # keys and values are about half of what a token takes, or less
    for piece in batches(
        [len(tails[index]) - 1 for index in longer], min(budget, logit_positions(model, LOGIT_BYTES)), rows
    ):
        chosen = [longer[place] for place in piece]
        where = torch.tensor(chosen, device=model.device)
        made = _continued(model, cache, mask, owner[where], [tails[index] for index in chosen], pad_id)
        totals = totals.added(where, made)
    return _grouped(questions, totals)


@dataclass(frozen=True)
class Totals:
    """Of rows: summed log-probabilities (float64) and numbers of top-1 tokens."""

    logprobs: torch.Tensor
    hits: torch.Tensor

    def at(self, rows: torch.Tensor) -> Totals:
        return Totals(self.logprobs[rows], self.hits[rows])

    def plus(self, other: Totals) -> Totals:
        return Totals(self.logprobs + other.logprobs, self.hits + other.hits)

    def added(self, rows: torch.Tensor, other: Totals) -> Totals:
        return Totals(self.logprobs.index_add(0, rows, other.logprobs), self.hits.index_add(0, rows, other.hits))


def _continued(
    model: Any, cache: DynamicCache, mask: torch.Tensor, owner: torch.Tensor, tails: list[list[int]], pad_id: int
) -> Totals:
    """Of all tokens of the tails but the first, each after the prompt of its owner."""
    heads = [tail[:-1] for tail in tails]
    inputs, inner = padded(heads, pad_id).to(model.device), padded(ones(heads), 0).to(model.device)
    mine = copy.copy(cache)
    mine.layers = [copy.copy(layer) for layer in cache.layers]  # their tensors are replaced, never written into
    mine.batch_select_indices(owner)
    with autocast(model):
        logits = model(
            input_ids=inputs,
            attention_mask=torch.cat([mask[owner], inner], dim=1),
            position_ids=mask.sum(-1)[owner][:, None] + torch.arange(inputs.shape[1], device=model.device),
            past_key_values=mine,
            use_cache=True,
        ).logits
    return _picked(logits, [(row, 0, len(head)) for row, head in enumerate(heads)], [tail[1:] for tail in tails])


def _picked(logits: torch.Tensor, spans: list[tuple[int, int, int]], tokens: list[list[int]]) -> Totals:
    """Of each span (row, first position, positions) of logits: what they say about the tokens that belong there."""
    device = logits.device
    rows = torch.tensor([row for row, _, count in spans for _ in range(count)], device=device)
    places = torch.tensor([start + step for _, start, count in spans for step in range(count)], device=device)
    ids = torch.tensor([token for part in tokens for token in part], device=device)
    log_probs = logits[rows, places].float().log_softmax(-1)
    nothing = Totals(
        torch.zeros(len(spans), dtype=torch.double, device=device),
        torch.zeros(len(spans), dtype=torch.long, device=device),
    )
    each = log_probs.gather(-1, ids[:, None])[:, 0].double()
    return nothing.added(rows, Totals(each, (log_probs.argmax(-1) == ids).long()))


def _whole(model: Any, questions: Sequence[Choice], pad_id: int, budget: int) -> list[Scores]:
    rows = [
        {"input_ids": [*one.prompt, *option], "labels": [IGNORED] * len(one.prompt) + option}
        for one in questions
        for option in one.options
    ]
    logprobs, hits = torch.zeros(len(rows), dtype=torch.double), torch.zeros(len(rows), dtype=torch.long)
    for batch in batches([len(row["input_ids"]) for row in rows], budget):
        for index, (nll, _, right) in zip(batch, score_rows(model, [rows[i] for i in batch], pad_id), strict=True):
            logprobs[index], hits[index] = -nll, right
    return _grouped(questions, Totals(logprobs, hits))


def _grouped(questions: Sequence[Choice], totals: Totals) -> list[Scores]:
    values = iter(zip(totals.logprobs.tolist(), totals.hits.tolist(), strict=True))
    found = []
    for row, question in enumerate(questions):
        part = [(*next(values), len(option)) for option in question.options]
        found.append(Scores(row, [value for value, _, _ in part], [hits == length for _, hits, length in part]))
    return found
