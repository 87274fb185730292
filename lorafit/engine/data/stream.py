"""Training data that is tokenized while it is trained on, for sets that should not be read whole first."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.iterable_dataset import ExamplesIterable
from transformers import PreTrainedTokenizerBase

from lorafit.engine.data.encode import TokenRow
from lorafit.engine.data.prepare import Prepared, no_row_left, pack, prepare_held_out, tokenize_source
from lorafit.engine.data.render import Renderer
from lorafit.errors import DataError
from lorafit.plan.values import DataPlan
from lorafit.progress import each
from lorafit.rows.audit import Audit, PartAudit, SourceAudit, breaches, source_findings

SAMPLE_ROWS = 1000
"""Rows that are audited before training begins."""
SHUFFLE_ROWS = 1000
"""Rows among which a stream is shuffled."""


def prepare_stream(plan: DataPlan, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The training rows as a stream, and an audit of the first of them. Validation rows are read whole."""
    renderer = Renderer(tokenizer, plan.loss_on, plan.date)
    validation, held_out, part = prepare_held_out(plan, renderer)
    audits = [SourceAudit(source.path) for source in plan.train]
    rows = itertools.islice(_interleaved(plan, renderer, audits), SAMPLE_ROWS)
    sample = list(each(rows, "auditing the first rows", SAMPLE_ROWS))
    if not sample:
        raise no_row_left(plan, audits)
    audit = Audit(
        train=tuple(audits),
        validation=held_out,
        training_rows=PartAudit(
            len(sample), sum(len(row.input_ids) for row in sample), sum(row.learned for row in sample)
        ),
        validation_rows=part,
        whole=False,
    )
    streamed: list[SourceAudit] = []
    stream = IterableDataset(ExamplesIterable(_examples, {"plan": plan, "renderer": renderer, "audits": streamed}))
    return Prepared(stream, validation, audit, streamed=streamed)


def _passes(plan: DataPlan, renderer: Renderer, audits: list[SourceAudit]) -> Iterator[TokenRow]:
    """Pass after pass over the rows, without end, so that a run which skips its first batches goes on exactly.

    `audits` is filled anew with what the first pass counts; later passes see the same rows.
    """
    audits[:] = [SourceAudit(source.path) for source in plan.train]
    counted = audits
    for number in itertools.count():
        rows = _interleaved(plan, renderer, counted)
        if plan.shuffle:
            rows = _shuffled(rows, random.Random(f"{plan.seed} {number}"))
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            return
        counted = [SourceAudit(source.path) for source in plan.train]


def _shuffled(rows: Iterator[TokenRow], draw: random.Random) -> Iterator[TokenRow]:
    """The rows, each drawn from the next SHUFFLE_ROWS."""
    waiting = list(itertools.islice(rows, SHUFFLE_ROWS))
    for row in rows:
        place = draw.randrange(len(waiting))
        chosen, waiting[place] = waiting[place], row
        yield chosen
    draw.shuffle(waiting)
    yield from waiting


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


def _examples(plan: DataPlan, renderer: Renderer, audits: list[SourceAudit]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows for the trainer, packed if the plan says so, with their numbers."""
    rows = _passes(plan, renderer, audits)
    plain = ({"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows)
    if not plan.packing:
        yield from enumerate(plain)
        return
    chunks = iter(lambda: list(itertools.islice(plain, SHUFFLE_ROWS)), [])
    yield from enumerate(itertools.chain.from_iterable(_packed(chunk, plan.max_length) for chunk in chunks))


def _packed(rows: list[dict[str, Any]], max_length: int) -> Iterator[dict[str, Any]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return iter(pack(Dataset.from_dict(columns), max_length))
