"""Log-likelihoods of rows, and how far a model's predictions are from its base's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lorafit.data import IGNORED
from lorafit.evaluate.engine.arithmetic import autocast
from lorafit.evaluate.engine.batches import batches, ones, padded, shrinking, token_budget

CHUNK_BYTES = 256 * 1024 * 1024
"""Logits that are held at once, in bytes of float32."""


@dataclass(frozen=True)
class RowLikelihood:
    """A row's learned tokens: their summed negative log-likelihood in nats, how many, and how many are top-1."""

    row: int
    nll: float
    tokens: int
    hits: int


@dataclass(frozen=True)
class RowDivergence:
    """A row's learned positions: the summed KL(base || model) in nats, how many, and the model's likelihood there."""

    row: int
    kl: float
    tokens: int
    likelihood: RowLikelihood


@torch.no_grad()
def likelihoods(model: Any, rows: Any, pad_id: int, done: Collection[int] = ()) -> Iterator[RowLikelihood]:
    """Of all rows but those in `done`, batch by batch.

    Args:
        model: with TRL's fused head, as `ready` leaves it.
        rows: a sequence of rows with `input_ids` and `labels`, such as a Dataset.
    """

    def work(batch: list[int]) -> list[RowLikelihood]:
        chosen = [rows[index] for index in batch]
        inputs = padded([row["input_ids"] for row in chosen], pad_id)
        with autocast(model):
            output = model(
                input_ids=inputs.to(model.device),
                attention_mask=padded(ones([row["input_ids"] for row in chosen]), 0).to(model.device),
                labels=padded([row["labels"] for row in chosen], IGNORED).to(model.device),
                fused_lm_head=True,
            )
        columns = (-output.log_probs.double().sum(-1), output.label_mask.sum(-1), output.is_top1.sum(-1))
        values = zip(batch, *(column.tolist() for column in columns), strict=True)
        return [RowLikelihood(row, nll, int(tokens), int(hits)) for row, nll, tokens, hits in values]

    for batch in _in_batches(model, rows, done):
        yield from shrinking(work, batch)


@torch.no_grad()
def divergences(
    base: Callable[[], AbstractContextManager[Any]], model: Any, rows: Any, pad_id: int, done: Collection[int] = ()
) -> Iterator[RowDivergence]:
    """KL(base || model) at the learned positions, over the whole vocabulary.

    Args:
        base: within it, `model` is the base.
    """

    def logits(chosen: list[dict[str, Any]]) -> torch.Tensor:
        """(learned positions of all rows, vocabulary)."""
        ids = [row["input_ids"] for row in chosen]
        labels = padded([row["labels"] for row in chosen], IGNORED)[:, 1:]
        with autocast(model):
            made = model(
                input_ids=padded(ids, pad_id).to(model.device),
                attention_mask=padded(ones(ids), 0).to(model.device),
                use_cache=False,
            ).logits[:, :-1]
        return made[(labels != IGNORED).to(model.device)]

    def own(made: torch.Tensor, chosen: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each position: the negative log-likelihood of the row's own token, and whether it is top-1."""
        labels = torch.tensor([label for row in chosen for label in row["labels"][1:] if label != IGNORED])
        labels = labels.to(made.device)
        nll = functional.cross_entropy(made.float(), labels, reduction="none")
        return nll.double().cpu(), (made.argmax(-1) == labels).cpu()

    def work(batch: list[int]) -> list[RowDivergence]:
        chosen = [rows[index] for index in batch]
        mine = logits(chosen)
        with base():
            its = logits(chosen)
        count = max(CHUNK_BYTES // (4 * mine.shape[-1]), 1)
        parts = [_kl(its[i : i + count], mine[i : i + count]) for i in range(0, len(mine), count)]
        each = torch.cat(parts).double().cpu()
        sizes = [sum(label != IGNORED for label in row["labels"][1:]) for row in chosen]
        nll, hits = own(mine, chosen)
        parts_of = zip(batch, sizes, each.split(sizes), nll.split(sizes), hits.split(sizes), strict=True)
        return [
            RowDivergence(row, float(kl.sum()), size, RowLikelihood(row, float(loss.sum()), size, int(hit.sum())))
            for row, size, kl, loss, hit in parts_of
        ]

    vocabulary = int(model.config.get_text_config().vocab_size)
    for batch in _in_batches(model, rows, done, most_tokens=max(CHUNK_BYTES // (4 * vocabulary), 1)):
        yield from shrinking(work, batch)


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(positions,) divergences of two (positions, vocabulary) logits."""
    log_p, log_q = functional.log_softmax(one.float(), -1), functional.log_softmax(other.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding makes it less at times


def _in_batches(model: Any, rows: Any, done: Collection[int], most_tokens: int | None = None) -> Iterator[list[int]]:
    lengths = [len(row["input_ids"]) for row in rows]
    order = sorted((index for index in range(len(lengths)) if index not in done), key=lambda index: -lengths[index])
    budget = token_budget(model)
    yield from batches(lengths, min(budget, most_tokens or budget), order=order)
