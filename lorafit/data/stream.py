"""Training data that is tokenized while it is trained on, for sets that should not be read whole first."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lorafit.audit import Audit, PartAudit, SourceAudit, breaches, source_findings
from lorafit.data import Prepared, pack, prepare_held_out, tokenize_source
from lorafit.data.encode import TokenRow
from lorafit.data.render import Renderer
from lorafit.errors import DataError
from lorafit.plan.types import DataPlan

SAMPLE_ROWS = 1000
"""Rows that are audited before training begins."""
SHUFFLE_ROWS = 1000
"""Rows among which a stream is shuffled."""


def prepare_stream(plan: DataPlan, tokenizer: PreTrainedTokenizerBase, console: Console | None) -> Prepared:
    """The training rows as a stream, and an audit of the first of them. Validation rows are read whole."""
    renderer = Renderer(tokenizer, plan.loss_on, plan.date)
    validation, held_out, part = prepare_held_out(plan, renderer, console)
    sample_audits, audits = ([SourceAudit(source.path) for source in plan.train] for _ in range(2))
    sample = list(itertools.islice(_interleaved(plan, renderer, sample_audits), SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{plan.train[0].path}: no row is left to learn from")
    audit = Audit(
        train=tuple(sample_audits),
        validation=held_out,
        training_rows=PartAudit(
            len(sample), sum(len(row.input_ids) for row in sample), sum(row.learned for row in sample)
        ),
        validation_rows=part,
        whole=False,
    )
    counting = iter([audits])

    def rows() -> Iterator[TokenRow]:
        # Only the first pass counts; later ones see the same rows.
        live = next(counting, None) or [SourceAudit(source.path) for source in plan.train]
        return _interleaved(plan, renderer, live)

    stream = IterableDataset(ExamplesIterable(_examples, {"plan": plan, "rows": rows}))
    if plan.shuffle:
        stream = stream.shuffle(seed=plan.seed, buffer_size=SHUFFLE_ROWS)
    return Prepared(stream, validation, audit, None, tuple(audits))


def _interleaved(plan: DataPlan, renderer: Renderer, audits: list[SourceAudit]) -> Iterator[TokenRow]:
    """Rows of all sources, drawn by weight until each is at its end. Raises DataError over a limit."""
    limits = plan.audit

    def rows(index: int) -> Iterator[TokenRow]:
        for batch in tokenize_source(plan, plan.train[index], renderer, audits[index]):
            lines = breaches(source_findings(audits[index], limits))
            if lines:
                raise DataError("\n".join(lines))
            yield from batch

    left = {index: rows(index) for index in range(len(plan.train))}
    draw = random.Random(plan.seed)
    while left:
        chosen = draw.choices(list(left), [plan.train[index].weight for index in left])[0]
        row = next(left[chosen], None)
        if row is None:
            del left[chosen]
        else:
            yield row


def _examples(plan: DataPlan, rows: Callable[[], Iterator[TokenRow]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows for the trainer, packed if the plan says so, with their numbers."""
    plain = ({"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows())
    if not plan.packing:
        yield from enumerate(plain)
        return
    chunks = iter(lambda: list(itertools.islice(plain, SHUFFLE_ROWS)), [])
    packs = (pack for chunk in chunks for pack in _packed(chunk, plan.max_length))
    yield from enumerate(packs)


def _packed(rows: list[dict[str, Any]], max_length: int) -> Iterator[dict[str, Any]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return iter(pack(Dataset.from_dict(columns), max_length))
