"""Log-likelihoods of rows and of options, and how far a model's predictions are from its base's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import DynamicCache

from lorafit.engine.data.encode import IGNORED
from lorafit.engine.evaluate.batches import (
    autocast,
    bare,
    batches,
    has_plain_cache,
    is_exact,
    logit_positions,
    new_cache,
    ones,
    padded,
    shrinking,
    token_budget,
    with_cache,
)
from lorafit.engine.loss import row_sums

LOGIT_BYTES = 256 * 1024 * 1024
"""Logits held at once, in bytes of float32."""


@dataclass(frozen=True)
class RowLikelihood:
    """What a model makes of a row's learned tokens.

    Attributes:
        nll: summed negative log-likelihood in nats.
        hits: tokens that it finds the most likely.
        kl: summed KL(base || model) in nats; None where there was no base beside it.
    """

    row: int
    nll: float
    tokens: int
    hits: int
    kl: float | None = None


@torch.no_grad()
def likelihoods(model: Any, rows: Any, pad_id: int, done: Collection[int] = ()) -> Iterator[RowLikelihood]:
    """Likelihoods of all rows but those in `done`, batch by batch.

    Args:
        model: with TRL's fused head, as `ready` leaves it.
        rows: a sequence of rows with `input_ids` and `labels`, such as a Dataset.
    """

    def work(batch: list[int]) -> list[RowLikelihood]:
        made = score_rows(model, [rows[index] for index in batch], pad_id)
        return [RowLikelihood(index, *values) for index, values in zip(batch, made, strict=True)]

    yield from shrinking(work, _planned(_lengths(rows), done, token_budget(model)))


def score_rows(model: Any, rows: list[dict[str, Any]], pad_id: int) -> list[tuple[float, int, int]]:
    """Each row's `nll`, `tokens` and `hits`, in one batch."""
    ids = [row["input_ids"] for row in rows]
    with autocast(model):
        output = model(
            input_ids=padded(ids, pad_id).to(model.device),
            attention_mask=padded(ones(ids), 0).to(model.device),
            labels=padded([row["labels"] for row in rows], IGNORED).to(model.device),
            fused_lm_head=True,
        )
    return [(nll, int(tokens), int(hits)) for tokens, nll, _, hits in row_sums(output).tolist()]


@torch.no_grad()
def divergences(
    base: Callable[[], AbstractContextManager[Any]], model: Any, rows: Any, pad_id: int, done: Collection[int] = ()
) -> Iterator[RowLikelihood]:
    """Likelihoods with the KL(base || model) at the learned positions, over the whole vocabulary.

    Args:
        base: within it, `model` is the base.
    """
    positions = logit_positions(model, LOGIT_BYTES // 2)
    inner, budget = bare(model), token_budget(model)
    apart = _has_plain_head(model)
    head = inner.get_output_embeddings() if apart else torch.nn.Identity()

    def states(chosen: list[dict[str, Any]]) -> torch.Tensor:
        """What enters the head at the learned positions of all rows, or the logits there: (positions, ...)."""
        ids = [row["input_ids"] for row in chosen]
        inputs = {
            "input_ids": padded(ids, pad_id).to(model.device),
            "attention_mask": padded(ones(ids), 0).to(model.device),
            "use_cache": False,
        }
        with autocast(model):
            made = inner.base_model(**inputs).last_hidden_state if apart else model(**inputs).logits
        learned = padded([row["labels"] for row in chosen], IGNORED)[:, 1:] != IGNORED
        return made[:, :-1][learned.to(made.device)]

    def log_probs(part: torch.Tensor) -> torch.Tensor:
        with autocast(model):
            made: torch.Tensor = head(part)
        return functional.log_softmax(made.float(), -1)

    def work(batch: list[int]) -> list[RowLikelihood]:
        chosen = [rows[index] for index in batch]
        mine = states(chosen)
        with base():
            its = states(chosen)
        labels = [[label for label in row["labels"][1:] if label != IGNORED] for row in chosen]
        wanted = torch.tensor([label for part in labels for label in part], dtype=torch.long, device=mine.device)
        parts = [torch.zeros(3, 0, dtype=torch.double)]
        for start in range(0, len(mine), positions):
            part = slice(start, start + positions)
            of_model = log_probs(mine[part])
            with base():
                of_base = log_probs(its[part])
            parts.append(_compared(of_base, of_model, wanted[part]).cpu())
        each = torch.cat(parts, 1).split([len(part) for part in labels], 1)
        sums = [one.sum(1).tolist() for one in each]
        return [
            RowLikelihood(row, nll, len(part), round(hits), kl)
            for row, (kl, nll, hits), part in zip(batch, sums, labels, strict=True)
        ]

    yield from shrinking(work, _planned(_lengths(rows), done, budget if apart else min(budget, positions)))


def _has_plain_head(model: Any) -> bool:
    """Whether logits are what the head makes of the last hidden states, and nothing is done to them."""
    inner = bare(model)
    inputs = {"input_ids": torch.arange(8, device=model.device)[None], "use_cache": False}
    with autocast(model):
        own = model(**inputs).logits
        try:
            made = inner.get_output_embeddings()(inner.base_model(**inputs).last_hidden_state)
        except (AttributeError, RuntimeError, TypeError):
            return False
    return made.shape == own.shape and bool((made - own).abs().max() <= 1e-4 * own.abs().max())


def divergence(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(positions,) KL(one || other) in nats, of (positions, vocabulary) log-probabilities; nan where there is one."""
    return (one.exp() * (one - other)).sum(-1).clamp_min(0)  # rounding makes it less at times


def _compared(base: torch.Tensor, model: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(3, positions) in float64, of (positions, vocabulary) log-probabilities: divergence, loss, and top-1 or not."""
    return torch.stack(
        [divergence(base, model), -model.gather(-1, labels[:, None])[:, 0], model.argmax(-1) == labels]
    ).double()


def _planned(sizes: Sequence[int], done: Collection[int], budget: int) -> Iterator[list[int]]:
    order = sorted((index for index in range(len(sizes)) if index not in done), key=lambda index: -sizes[index])
    return batches(sizes, budget, order=order)


def _lengths(rows: Any) -> list[int]:
    """Lengths in tokens, without holding the rows."""
    if not isinstance(rows, Dataset):
        return [len(row["input_ids"]) for row in rows]
    import pyarrow.compute as pc

    tables = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    return [length for table in tables for length in pc.list_value_length(table["input_ids"]).to_pylist()]


@dataclass(frozen=True)
class Choice:
    """A prompt and its options, in tokens; the prompt and each option have at least one."""

    prompt: list[int]
    options: list[list[int]]

    @cached_property
    def common(self) -> int:
        return common(self.options)


def common(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with, leaving each at least one of its own."""
    alike = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False))
    return min(sum(1 for _ in alike), *(len(row) - 1 for row in rows))


@dataclass(frozen=True)
class OptionLikelihoods:
    """The summed log-probability of each of a question's options, in nats."""

    row: int
    logprobs: list[float]


@torch.no_grad()
def choices(
    model: Any, questions: Sequence[Choice], pad_id: int, done: Collection[int] = ()
) -> Iterator[OptionLikelihoods]:
    """The likelihoods of the options of all questions but those in `done`.

    A prompt is run once, and its keys and values are shared by its options. Where a model keeps other things than keys
    and values, or where the first questions come out otherwise than whole, every option is run with its prompt.

    Args:
        model: with TRL's fused head, as `ready` leaves it.
    """
    budget, positions = token_budget(model), logit_positions(model, LOGIT_BYTES)
    sharing, checked = has_plain_cache(model), False
    sizes = [max(len(one.prompt) + one.common, (one.common + 1) * budget // positions) for one in questions]

    def work(batch: list[int]) -> list[OptionLikelihoods]:
        nonlocal sharing, checked
        chosen = [questions[index] for index in batch]
        if sharing:
            made = _shared(model, chosen, pad_id, budget)
            sharing, checked = checked or _agrees(model, chosen, made, pad_id), True
        if not sharing:
            made = whole(model, chosen, pad_id, budget)
        return [OptionLikelihoods(row, logprobs) for row, logprobs in zip(batch, made, strict=True)]

    yield from shrinking(work, _planned(sizes, done, budget))


def _agrees(model: Any, questions: list[Choice], made: list[list[float]], pad_id: int) -> bool:
    """Whether the longest options of the shortest question, which has the most padding, come out as if run whole."""
    row = min(range(len(questions)), key=lambda index: len(questions[index].prompt))
    question = questions[row]
    longest = sorted(range(len(question.options)), key=lambda index: -len(question.options[index]))[:2]
    (expected,) = whole(model, [Choice(question.prompt, [question.options[index] for index in longest])], pad_id, 1)
    rounding = 1e-3 if is_exact(model) else 5e-2
    return all(
        abs(made[row][index] - its) <= rounding * max(abs(its), len(question.options[index]))
        for index, its in zip(longest, expected, strict=True)
    )


def _shared(model: Any, questions: list[Choice], pad_id: int, budget: int) -> list[list[float]]:
    """Prompts in one batch, up to where their options part; then the rest of the options, on copies of the cache."""
    prompts = [[*one.prompt, *one.options[0][: one.common]] for one in questions]
    tails = [option[one.common :] for one in questions for option in one.options]
    owner = torch.tensor([row for row, one in enumerate(questions) for _ in one.options], device=model.device)
    mask = padded(ones(prompts), 0, left=True).to(model.device)
    kept = max(one.common for one in questions) + 1
    cache = new_cache(model)
    with autocast(model):
        logits = model(
            input_ids=padded(prompts, pad_id, left=True).to(model.device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            **with_cache(model, cache),
            use_cache=True,
            logits_to_keep=kept,
        ).logits
    first = torch.tensor([tail[0] for tail in tails], device=model.device)
    totals = logits[:, -1].float().log_softmax(-1)[owner, first].double()
    if kept > 1:
        spans = [(row, kept - 1 - one.common, one.common) for row, one in enumerate(questions)]
        totals = totals + _picked(logits, spans, [one.options[0][: one.common] for one in questions])[owner]
    longer = [index for index, tail in enumerate(tails) if len(tail) > 1]
    rows = max(2 * budget // mask.shape[1], 1)  # keys and values are about half of what a token takes, or less
    most = min(budget, logit_positions(model, LOGIT_BYTES))
    for piece in batches([len(tails[index]) - 1 for index in longer], most, rows):
        chosen = [longer[place] for place in piece]
        where = torch.tensor(chosen, device=model.device)
        made = _continued(model, cache, mask, owner[where], [tails[index] for index in chosen], pad_id)
        totals = totals.index_add(0, where, made)
    return _by_question(questions, totals)


def _continued(
    model: Any, cache: DynamicCache, mask: torch.Tensor, owner: torch.Tensor, tails: list[list[int]], pad_id: int
) -> torch.Tensor:
    """Summed log-probabilities of all tokens of the tails but the first, each after the prompt of its owner."""
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
            **with_cache(model, mine),
            use_cache=True,
        ).logits
    return _picked(logits, [(row, 0, len(head)) for row, head in enumerate(heads)], [tail[1:] for tail in tails])


def _picked(logits: torch.Tensor, spans: list[tuple[int, int, int]], tokens: list[list[int]]) -> torch.Tensor:
    """Summed log-probabilities (float64) of the tokens that belong to each span (row, first position, positions)."""
    device = logits.device
    rows = torch.tensor([row for row, _, count in spans for _ in range(count)], device=device)
    places = torch.tensor([start + step for _, start, count in spans for step in range(count)], device=device)
    ids = torch.tensor([token for part in tokens for token in part], device=device)
    each = logits[rows, places].float().log_softmax(-1).gather(-1, ids[:, None])[:, 0].double()
    return torch.zeros(len(spans), dtype=torch.double, device=device).index_add(0, rows, each)


def whole(model: Any, questions: Sequence[Choice], pad_id: int, budget: int) -> list[list[float]]:
    """Log-probabilities of the options by question, each run with its prompt."""
    rows = [
        {"input_ids": [*one.prompt, *option], "labels": [IGNORED] * len(one.prompt) + option}
        for one in questions
        for option in one.options
    ]
    logprobs = torch.zeros(len(rows), dtype=torch.double)
    for batch in batches([len(row["input_ids"]) for row in rows], budget):
        for index, (nll, *_) in zip(batch, score_rows(model, [rows[i] for i in batch], pad_id), strict=True):
            logprobs[index] = -nll
    return _by_question(questions, logprobs)


def _by_question(questions: Sequence[Choice], logprobs: torch.Tensor) -> list[list[float]]:
    values = iter(logprobs.tolist())
    return [[next(values) for _ in question.options] for question in questions]
