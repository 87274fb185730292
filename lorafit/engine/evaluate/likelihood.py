"""Log-likelihoods of rows, and how far a model's predictions are from its base's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional

from lorafit.engine.data.encode import IGNORED
from lorafit.engine.evaluate.arithmetic import autocast, bare
from lorafit.engine.evaluate.batches import batches, logit_positions, ones, padded, shrinking, token_budget
from lorafit.engine.loss import row_sums

CHUNK_BYTES = 256 * 1024 * 1024
"""Logits of a model and of its base that are held at once, in bytes of float32."""


@dataclass(frozen=True)
class RowLikelihood:
    """A row's learned tokens: their summed negative log-likelihood in nats, how many, and how many are top-1."""

    row: int
    nll: float
    tokens: int
    hits: int


@dataclass(frozen=True)
class RowDivergence:
    """A row's learned positions: the summed KL(base || model) in nats, how many, and the model's own likelihoods."""

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
        made = score_rows(model, [rows[index] for index in batch], pad_id)
        return [RowLikelihood(index, *values) for index, values in zip(batch, made, strict=True)]

    yield from shrinking(work, _planned(rows, done, token_budget(model)))


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
) -> Iterator[RowDivergence]:
    """KL(base || model) at the learned positions, over the whole vocabulary.

    Args:
        base: within it, `model` is the base.
    """
    positions = logit_positions(model, CHUNK_BYTES // 2)
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

    def work(batch: list[int]) -> list[RowDivergence]:
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
            RowDivergence(row, kl, len(part), RowLikelihood(row, nll, len(part), round(hits)))
            for row, (kl, nll, hits), part in zip(batch, sums, labels, strict=True)
        ]

    yield from shrinking(work, _planned(rows, done, budget if apart else min(budget, positions)))


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


def _compared(base: torch.Tensor, model: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(3, positions) in float64, of (positions, vocabulary) log-probabilities: divergence, loss, and top-1 or not."""
    kl = (base.exp() * (base - model)).sum(-1).clamp_min(0)  # rounding makes it less at times
    return torch.stack([kl, -model.gather(-1, labels[:, None])[:, 0], model.argmax(-1) == labels]).double()


def _planned(rows: Any, done: Collection[int], budget: int) -> Iterator[list[int]]:
    lengths = _lengths(rows)
    order = sorted((index for index in range(len(lengths)) if index not in done), key=lambda index: -lengths[index])
    return batches(lengths, budget, order=order)


def _lengths(rows: Any) -> list[int]:
    """In tokens, without holding the rows."""
    if not isinstance(rows, Dataset):
        return [len(row["input_ids"]) for row in rows]
    import pyarrow.compute as pc

    tables = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    return [length for table in tables for length in pc.list_value_length(table["input_ids"]).to_pylist()]
