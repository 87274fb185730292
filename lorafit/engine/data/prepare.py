"""A recipe's rows, prepared for training: read, tokenized, split, mixed, packed and cached, or streamed.

rows (lorafit.rows) -> render (text and spans) -> encode (tokens and labels) -> table (Arrow, cached)
-> mix (split, weights, order) -> packs
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, arrow_dataset, concatenate_datasets, load_dataset
from datasets.iterable_dataset import ExamplesIterable
from transformers import PreTrainedTokenizerBase

from lorafit.engine.data.encode import (
    Indices,
    Numbers,
    TokenRow,
    Tokens,
    read_table,
    repeated,
    shared,
    split,
    weighted,
    write_table,
)
from lorafit.engine.data.render import Renderer
from lorafit.engine.methods import module_of
from lorafit.errors import DataError
from lorafit.facts import spare_retries
from lorafit.plan.methods import METHODS
from lorafit.plan.values import DataPlan, SourcePlan, validation_rows
from lorafit.progress import counting, each, stage
from lorafit.rows import Row, Shape, detect_format, digest, place_of, read_rows
from lorafit.rows.audit import Audit, Finding, PartAudit, SourceAudit, breaches, source_findings
from lorafit.rows.cache import entry, kept, prune, rows_key, set_key
from lorafit.text import first_line


@dataclass(frozen=True)
class Prepared:
    """Rows that can be trained on, and what the data is.

    Attributes:
        train: `input_ids` and `labels`, unpadded; packed if the plan says so. A stream if it says so.
        validation: the same, never packed, with all columns of a tokenized source.
        rows: the training rows before packing, with all columns; None for a stream.
        lengths: of each of them, in tokens.
        streamed: for a stream, what is counted while it is trained on.
    """

    train: Dataset | IterableDataset
    validation: Dataset | None
    audit: Audit
    rows: Dataset | None = None
    lengths: Tokens | None = None
    streamed: list[SourceAudit] = field(default_factory=list)

    def final_audit(self) -> Audit:
        """The audit after training: of a stream, what was seen of it."""
        if not self.streamed:
            return self.audit
        totals = (
            sum(getattr(source, name) for source in self.streamed) for name in ("rows", "tokens", "supervised_tokens")
        )
        return dataclasses.replace(self.audit, train=tuple(self.streamed), training_rows=PartAudit(*totals))


def prepare(plan: DataPlan, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, render, tokenize, count, split and mix; from the cache where nothing has changed.

    Raises DataError for what can't be read. Faults that have a limit are counted: see `lorafit.rows.audit.gate`.
    """
    plan = with_digests(plan, tokenizer)
    if plan.streaming:
        return prepare_stream(plan, tokenizer)
    renderer = Renderer(tokenizer, plan.loss_on, plan.date)
    train = [source_table(plan, source, renderer) for source in plan.train]
    held_out = [source_table(plan, source, renderer) for source in plan.validation]
    folder = entry("sets", str(set_key(plan)))
    made = kept(
        folder,
        lambda partial: make_set(plan, train, held_out, partial),
        lambda whole: read_set(plan, train, held_out, whole),
    )
    prune({folder, *(table.folder for table in (*train, *held_out))})
    return made


def with_digests(plan: DataPlan, tokenizer: PreTrainedTokenizerBase) -> DataPlan:
    """The plan with hashes of everything that shapes the data, where the light half could not have them."""

    def settled(source: SourcePlan) -> SourcePlan:
        known = source.sha256 or (digest(source.path) if source.hub is None else hub_rows(source)._fingerprint)
        return dataclasses.replace(source, sha256=known)

    own = plan.tokenizer_sha256
    if own is None:
        parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
        own = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
    return dataclasses.replace(
        plan,
        train=plan.train if plan.streaming else tuple(map(settled, plan.train)),
        validation=tuple(map(settled, plan.validation)),
        tokenizer_sha256=own,
    )


# --- sources --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceTable:
    """A tokenized source."""

    folder: Path
    rows: Dataset
    numbers: Numbers
    audit: SourceAudit


def source_table(plan: DataPlan, source: SourcePlan, renderer: Renderer) -> SourceTable:
    """A source's rows as tokens: from the cache, or made and put there."""
    folder = entry("rows", str(rows_key(plan, source)))

    def make(partial: Path) -> None:
        audit = SourceAudit(source.path)
        batches = tokenize_source(plan, source, renderer, audit)
        write_table(partial, each(batches, f"tokenizing {source.path}", source.rows, size=len), audit)
        if source.hub is None and digest(source.path) != source.sha256:
            raise DataError(f"{source.path}: was changed while it was being read; start again")

    return kept(folder, make, lambda whole: SourceTable(folder, *read_table(whole)))


def tokenize_source(
    plan: DataPlan, source: SourcePlan, renderer: Renderer, audit: SourceAudit
) -> Iterator[list[TokenRow]]:
    """A source's rows as tokens, in batches. Raises DataError if it has no rows."""
    rows, shape = with_shape(itertools.islice(rows_of(source, plan.streaming), source.max_rows), source)
    if shape is None:
        raise DataError(f"{source.path}: there are no rows")
    yield from module_of(plan.method).encode(rows, shape, plan, renderer, audit)


def with_shape(rows: Iterator[Row], source: SourcePlan) -> tuple[Iterator[Row], Shape | None]:
    """Rows of a source, and their shape, which the first one tells if the recipe doesn't; None where there are none."""
    first = next(rows, None)
    if first is None:
        return rows, None
    format = source.format or detect_format(first, source.columns, source.template, source.key)[0]
    return itertools.chain([first], rows), source.shape(format)


def rows_of(source: SourcePlan, streaming: bool = False) -> Iterator[Row]:
    """The rows of a source, in order. Raises DataError."""
    if source.hub is None:
        return read_rows(source.path)
    return (Row(source.path, number, dict(fields)) for number, fields in enumerate(hub_rows(source, streaming), 1))


def hub_rows(source: SourcePlan, streaming: bool = False) -> Dataset | IterableDataset:
    """A hub data set, from the client's cache where it is there. Raises DataError."""
    hub = source.hub or {}
    spare_retries()
    try:
        return load_dataset(source.path, hub["name"], split=hub["split"], revision=hub["revision"], streaming=streaming)
    except Exception as error:  # noqa: BLE001 - the client raises dozens of types
        raise DataError(
            f"{source.path}: no such local file, and the hub did not give it as a data set: {first_line(error)}"
        ) from None


# --- the set of all sources -----------------------------------------------------------------------


def make_set(plan: DataPlan, train: list[SourceTable], held_out: list[SourceTable], folder: Path) -> None:
    """Split, mix, compare and pack, and write what came of it."""
    rows, other = together(plan, train), together(plan, held_out)
    numbers = numbers_of(train)
    training, validation = split_rows(plan, numbers)
    others = numbers
    if held_out:
        validation, others = np.arange(len(other)), numbers_of(held_out)
    else:
        other = rows
    order = mixed(plan, train, training)
    np.save(folder / "training.npy", order)
    np.save(folder / "validation.npy", validation)
    packs = None
    if plan.packing:
        shuffled = np.random.default_rng(plan.seed).permutation(order) if plan.shuffle else order
        packs = len(pack(rows.select(shuffled), plan.max_length, folder / "packed.arrow"))
    audit = Audit(
        train=tuple(table.audit for table in train),
        validation=tuple(table.audit for table in held_out),
        training_rows=part_audit(numbers[order], packs),
        validation_rows=part_audit(others[validation]) if len(validation) else None,
        duplicates=duplicates(rows, numbers, training),
        unweighted_rows=len(training),
        leaked=leaked(rows, numbers, training, other, others, validation),
    )
    (folder / "audit.json").write_text(json.dumps(audit.as_dict()), encoding="utf-8")


def read_set(plan: DataPlan, train: list[SourceTable], held_out: list[SourceTable], folder: Path) -> Prepared:
    """What `make_set` wrote, with the sources' rows in place. Raises ValueError for a damaged folder."""
    audit = Audit.from_dict(json.loads((folder / "audit.json").read_text(encoding="utf-8")))
    rows = together(plan, train)
    validation = np.load(folder / "validation.npy")
    other = (together(plan, held_out) if held_out else rows).select(validation) if len(validation) else None
    training = np.load(folder / "training.npy")
    chosen = rows.select(training)
    columns = list(METHODS[plan.method].columns)
    trained = Dataset.from_file(str(folder / "packed.arrow")) if plan.packing else chosen.select_columns(columns)
    part = audit.training_rows
    if len(chosen) != part.rows or len(trained) != (part.packs if plan.packing else part.rows):
        raise ValueError(f"{folder}: has other rows than its audit says")
    return Prepared(trained, other, audit, chosen, numbers_of(train)["length"][training])


def together(plan: DataPlan, tables: list[SourceTable]) -> Dataset:
    """The rows of all tables. Raises DataError if there are tables, and none has a row."""
    if not tables:
        return Dataset.from_dict({})
    rows = concatenate_datasets([table.rows for table in tables])
    if not len(rows):
        raise no_row_left(plan, [table.audit for table in tables])
    return rows


def numbers_of(tables: list[SourceTable]) -> Numbers:
    return tables[0].numbers if len(tables) == 1 else np.concatenate([table.numbers for table in tables])


def split_rows(plan: DataPlan, numbers: Numbers) -> tuple[Indices, Indices]:
    """Training and held-out indices. Raises DataError where a fraction leaves one of them empty."""
    if plan.validation_fraction is None:
        return np.arange(len(numbers)), np.arange(0)
    count = validation_rows(len(numbers), plan.validation_fraction)
    training, validation = split(numbers["key"], count, plan.seed)
    if not len(training) or not len(validation):
        raise DataError(
            f"dataset.validation: {len(numbers)} row{'s' * (len(numbers) > 1)} can't be split into training and "
            "validation rows that differ"
        )
    return training, validation


def mixed(plan: DataPlan, tables: list[SourceTable], training: Indices) -> Indices:
    """The training indices, each source's as often as its weight says. Raises DataError if none is left."""
    bounds = np.cumsum([0, *(len(table.rows) for table in tables)])
    parts = [
        weighted(training[(training >= begin) & (training < end)], source.weight, plan.seed + number)
        for number, (source, begin, end) in enumerate(zip(plan.train, bounds[:-1], bounds[1:], strict=True))
    ]
    if not sum(map(len, parts)):
        raise DataError("dataset.train: the weights leave no row to train on")
    return np.concatenate(parts)


def pack(rows: Dataset, max_length: int, file: Path | None = None) -> Dataset:
    """Rows of at most `max_length` tokens with several examples each: TRL's best fit, a thousand rows at a time."""
    from trl import pack_dataset  # takes seconds, and only packing needs it

    where = {"cache_file_name": str(file)} if file else {"keep_in_memory": True}
    with stage("packing rows"), counting((arrow_dataset, "hf_tqdm")):
        return pack_dataset(rows.select_columns(["input_ids", "labels"]), max_length, map_kwargs=where)


def part_audit(numbers: Numbers, packs: int | None = None) -> PartAudit:
    tokens, learned = (int(numbers[name].sum(dtype=np.int64)) for name in ("length", "learned"))
    return PartAudit(len(numbers), tokens, learned, packs)


def duplicates(rows: Dataset, numbers: Numbers, training: Indices) -> Finding | None:
    count, row, earlier = repeated(numbers["key"][training])
    if not count:
        return None
    return Finding(count, f"{place(rows, training[row])}: repeats {place(rows, training[earlier])}")


def leaked(
    rows: Dataset, numbers: Numbers, training: Indices, other: Dataset, others: Numbers, validation: Indices
) -> Finding | None:
    if not len(validation):
        return None
    count, row, known = shared(others["key"][validation], numbers["key"][training])
    if not count:
        return None
    line = f"{place(other, validation[row])}: is a training row as well, {place(rows, training[known])}"
    return Finding(count, line)


def place(rows: Dataset, index: int) -> str:
    """Where a tokenized row comes from."""
    row = rows.select_columns(["file", "number"])[int(index)]
    return place_of(row["file"], row["number"])


def no_row_left(plan: DataPlan, audits: list[SourceAudit]) -> DataError:
    """Why nothing is left of some sources, with the first row that was left out."""
    reasons = dict.fromkeys(reason for audit in audits for reason in audit.dropped)
    found = [audit.found[reason].first for audit in audits for reason in audit.dropped if reason in audit.found]
    where = f"{found[0]};" if found else f"{audits[0].path}:"
    return DataError(f"{where} no row is left to learn from ({', '.join(reasons)}; max_length {plan.max_length})")


SAMPLE_ROWS = 1000
"""Rows that are audited before training begins."""
SHUFFLE_ROWS = 1000
"""Rows among which a stream is shuffled."""


def prepare_stream(plan: DataPlan, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The training rows as a stream, and an audit of the first of them. Validation rows are read whole."""
    renderer = Renderer(tokenizer, plan.loss_on, plan.date)
    held_out = [source_table(plan, source, renderer) for source in plan.validation]
    validation = together(plan, held_out) if held_out else None
    audits = [SourceAudit(source.path) for source in plan.train]
    rows = itertools.islice(_interleaved(plan, renderer, audits), SAMPLE_ROWS)
    sample = list(each(rows, "auditing the first rows", SAMPLE_ROWS))
    if not sample:
        raise no_row_left(plan, audits)
    audit = Audit(
        train=tuple(audits),
        validation=tuple(table.audit for table in held_out),
        training_rows=PartAudit(
            len(sample), sum(len(row.input_ids) for row in sample), sum(row.learned for row in sample)
        ),
        validation_rows=part_audit(numbers_of(held_out)) if held_out else None,
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
    columns = METHODS[plan.method].columns
    plain = ({name: getattr(row, name).tolist() for name in columns} for row in rows)
    if not plan.packing:
        yield from enumerate(plain)
        return
    chunks = iter(lambda: list(itertools.islice(plain, SHUFFLE_ROWS)), [])
    yield from enumerate(itertools.chain.from_iterable(_packed(chunk, plan.max_length) for chunk in chunks))


def _packed(rows: list[dict[str, Any]], max_length: int) -> Iterator[dict[str, Any]]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return iter(pack(Dataset.from_dict(columns), max_length))
