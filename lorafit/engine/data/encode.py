"""Text as tokens with labels, counted for the audit, cut at max_length, and kept as Arrow files.

A row is tokenized once, and a token is learned if it overlaps an answer. Padding never enters into
it: the collator pads labels by position, so an end token that is also the padding token stays learned.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorafit.engine.data.render import UNTRAINED, Rendered, Renderer, Span
from lorafit.errors import DataError, ModelError
from lorafit.plan.values import DataPlan
from lorafit.rows import Example, Fault, Row, Shape, place_of, to_example
from lorafit.rows.audit import SourceAudit, source_from_dict
from lorafit.text import first_line

IGNORED = -100
_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 4_000_000
_WHOLE = "text is learned whole"
Tokens: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class TokenRow:
    """A row that can be trained on. `labels` are IGNORED where nothing is learned.

    Attributes:
        key: a hash of the row's text, by which equal rows are known.
        learned: how many tokens are in the loss (the first token of a row never is).
        answer: the text of the last answer, with its end, where `asked` is -1.
        asked: how many of the tokens are the prompt for the last answer; 0 if there is none.
        prompt: that prompt's tokens where the row does not begin with them, and `asked` is -1.
        rejected_ids, rejected_labels: of a pair, tokens and labels with the rejected answer; empty otherwise.
    """

    file: str
    number: int
    input_ids: Tokens
    labels: Tokens
    question: str
    key: int
    learned: int
    answer: str
    asked: int
    prompt: list[int]
    rejected_ids: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    rejected_labels: Tokens = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def length(self) -> int:
        """All its tokens."""
        return len(self.input_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class Lengths:
    """What lengths, in tokens, rows may have, and how many tokens the model knows (None: any)."""

    max_length: int
    min_length: int | None = None
    drop_excess: bool = False
    vocab_size: int | None = None

    @staticmethod
    def of(plan: DataPlan) -> Lengths:
        """Lengths of the rows of a training."""
        return Lengths(plan.max_length, plan.min_length, plan.excess_length_strategy == "drop", plan.vocab_size)


def read_examples(rows: Iterable[Row], shape: Shape, audit: SourceAudit) -> Iterator[Example]:
    """Rows as examples. Rows that are not to be learned, or can't be, are counted and left out."""
    for row in rows:
        audit.read += 1
        try:
            example = to_example(row, shape)
        except Fault as fault:
            _leave_out(fault, audit)
            continue
        if not example.train:
            audit.drop(UNTRAINED)
        elif example.label is False:
            audit.drop("label is false")
        else:
            yield example


def tokenize(
    examples: Iterable[Example], renderer: Renderer, lengths: Lengths, audit: SourceAudit
) -> Iterator[list[TokenRow]]:
    """Examples as tokens, in order and in batches; a batch is rendered while the one before is tokenized.

    Raises DataError for a row that the chat template refuses. Other faults are counted in `audit`.
    """
    if not renderer.tokenizer.is_fast:
        raise DataError("the tokenizer has no fast version, which is needed to find the answers' tokens")
    encoder = _Encoder(renderer, lengths, audit)
    with ThreadPoolExecutor(1) as pool:
        waiting: tuple[list[Rendered], Any] | None = None
        for batch in _batches(_rendered(examples, renderer, audit)):
            encoded = pool.submit(encoder.encode, batch)
            if waiting is not None:
                yield encoder.rows(waiting[0], waiting[1].result())
            waiting = batch, encoded
        if waiting is not None:
            yield encoder.rows(waiting[0], waiting[1].result())


def _rendered(examples: Iterable[Example], renderer: Renderer, audit: SourceAudit) -> Iterator[Rendered]:
    for example in examples:
        try:
            row = renderer.render(example)
        except Fault as fault:
            _leave_out(fault, audit)
            continue
        how = renderer.masks if not row.special else "the completion column" if example.prompt is not None else _WHOLE
        if how not in audit.masks:
            audit.masks = f"{audit.masks}, {how}".lstrip(", ")
        for rule, what in row.remarks.items():
            audit.count(rule, f"{example.place}: {what}")
        audit.reasoning += row.reasoning is True
        audit.empty_reasoning += row.reasoning is False
        yield row


def _leave_out(fault: Fault, audit: SourceAudit) -> None:
    if fault.rule != UNTRAINED:
        audit.count(fault.rule, str(fault))
    audit.drop(fault.rule)


def _batches(rows: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Neighbouring rows that are tokenized in the same way, not too much text at once."""
    for _, group in itertools.groupby(rows, key=lambda row: row.special):
        batch: list[Rendered] = []
        characters = 0
        for row in group:
            batch.append(row)
            characters += len(row.text)
            if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch


def tokenized(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> Any:
    """What a tokenizer makes of texts. Raises ModelError where an expression of its own has no end in sight."""
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        raise ModelError(f"the tokenizer of the model can't read a row: {first_line(error)}") from None


def plain_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A plain prompt's tokens, without a second start token, and without an end that the tokenizer adds."""
    ids = list(tokenized(tokenizer, text)["input_ids"])
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    ends = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends and not text.endswith(str(tokenizer.eos_token)) else ids


class _Encoder:
    """Tokenizes batches of rendered rows and counts what an audit wants to know."""

    def __init__(self, renderer: Renderer, lengths: Lengths, audit: SourceAudit) -> None:
        self.tokenizer: PreTrainedTokenizerBase = renderer.tokenizer
        self.lengths = lengths
        self.audit = audit
        self.special = set(renderer.special.values())
        self.special_ids = np.array(sorted(self.special), dtype=np.int32)
        self.tails: dict[str, list[int]] = {}
        self.stops = self.tokenizer.eos_token_id is not None
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]
        self.bos: int | None = bos if adds_bos else None

    def encode(self, batch: list[Rendered]) -> Any:
        """Tokens and their character ranges."""
        return tokenized(
            self.tokenizer,
            [row.text for row in batch],
            add_special_tokens=batch[0].special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
        )

    def _prompt(self, row: Rendered, ids: list[int], offsets: list[Span]) -> list[int]:
        """The tokens of a row's prompt.

        A tokenizer splits at control tokens, so where the row begins with the prompt it is enough to look at what
        follows the last of them. That is the same in most rows.
        """
        text = row.prompt or ""
        if not row.special and row.text.startswith(text):
            count = bisect.bisect_right(offsets, len(text), key=lambda span: span[1])
            last = next((index for index in range(count - 1, -1, -1) if ids[index] in self.special), None)
            if last is not None:
                tail = text[offsets[last][1] :]
                if tail not in self.tails:
                    self.tails[tail] = tokenized(self.tokenizer, tail, add_special_tokens=False)["input_ids"]
                if ids[last + 1 : count] == self.tails[tail]:
                    return ids[:count]
        if row.special:
            return plain_prompt(self.tokenizer, text)
        return list(tokenized(self.tokenizer, text, add_special_tokens=False)["input_ids"])

    def rows(self, batch: list[Rendered], encoded: Any) -> list[TokenRow]:
        """The rows that can be trained on."""
        made = []
        for row, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if row.special:  # no second end or start token beside one that the tokenizer adds itself
                if ids[-2:] == [self.tokenizer.eos_token_id] * 2 and offsets[-1][0] == offsets[-1][1]:
                    ids, offsets = ids[:-1], offsets[:-1]
                if ids[:2] == [self.tokenizer.bos_token_id] * 2 and offsets[0][0] == offsets[0][1]:
                    ids, offsets = ids[1:], offsets[1:]
            if (done := self._row(row, ids, offsets)) is not None:
                made.append(done)
        return made

    def _row(self, row: Rendered, ids: list[int], offsets: list[Span]) -> TokenRow | None:
        audit, limit = self.audit, self.lengths.max_length
        place = place_of(row.file, row.number)
        tokens = np.array(ids, dtype=np.int32)
        if self.lengths.vocab_size is not None and len(ids) and tokens.max() >= self.lengths.vocab_size:
            id = int(tokens.max())
            raise DataError(
                f"{place}: the token {self.tokenizer.convert_ids_to_tokens(id)!r} has the id {id}, and the model has "
                f"embeddings for ids below {self.lengths.vocab_size} only; use the model's own tokenizer, or resize "
                "the model's embeddings"
            )
        labels, ends = self._labels(row.spans, tokens, offsets)
        answers = row.spans if row.answers is None else row.answers
        if row.answers is not None:
            _, ends = self._labels(answers, tokens, offsets)
        supervised = int((labels[1:] != IGNORED).sum())
        self._check_start(ids, place)
        prompt = [] if row.prompt is None else self._prompt(row, ids, offsets)
        begins = ids[: len(prompt)] == prompt
        audit.longest = max(audit.longest, len(ids))
        if supervised == 0:
            self._drop("no_supervised_tokens", f"{place}: no token of the row would be learned")
            return None
        if self.lengths.min_length is not None and len(ids) < self.lengths.min_length:
            audit.drop("shorter than min_length")
            return None
        if self.lengths.drop_excess and len(ids) > limit:
            audit.drop("longer than max_length")
            return None
        audit.answers += len(answers)
        if self.stops and len(ends) < len(answers):
            line = f"{place}: an answer does not end with a token by which the model would learn to stop"
            audit.count("untrained_ends", line, len(answers) - len(ends))
        if len(ids) > limit:
            line = f"{place}: has {len(ids)} tokens and is cut at max_length {limit}"
            audit.count("truncated", line)
            tokens, labels = tokens[:limit], labels[:limit]
            kept = int((labels[1:] != IGNORED).sum())
            if kept < supervised:
                audit.lost_tokens += supervised - kept
                audit.count("lost_tokens", line, supervised - kept)
            supervised = kept
        audit.ends_learned += sum(end < limit for end in ends)
        if supervised == 0:
            self._drop("answers_cut_off", f"{place}: max_length {limit} cuts off every answer")
            return None
        if row.prompt is not None and not begins and "prompt_differs" not in row.remarks:
            hint = "let the answer begin with the white space, or the part of a word, that the prompt ends with"
            if not row.special:
                hint = "the tokenizer joins the end of the chat template's prompt with what the answer begins with"
            audit.count(
                "prompt_boundary",
                f"{place}: the prompt's last token is another one once the answer follows, so what is asked is not "
                f"what was learned; {hint}",
            )
        audit.rows += 1
        audit.tokens += len(tokens)
        audit.supervised_tokens += supervised
        digest = hashlib.blake2b(row.text.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        is_cut = bisect.bisect_right(offsets, answers[-1][0], key=lambda span: span[1]) >= len(tokens)
        is_cut = is_cut or (begins and len(prompt) >= len(tokens))
        asked = 0 if row.prompt is None or is_cut else len(prompt) if begins else -1
        other, answer = (prompt, row.answer) if asked < 0 else ([], "")
        return TokenRow(row.file, row.number, tokens, labels, row.question, key, supervised, answer, asked, other)

    def _labels(self, spans: tuple[Span, ...], tokens: Tokens, offsets: list[Span]) -> tuple[Tokens, list[int]]:
        """The tokens that overlap a span, IGNORED for the others, and the indices of the end tokens learned."""
        bounds = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
        first, last = bounds[0::2].copy(), bounds[1::2]
        first[first == last] -= 1  # white space that the tokenizer trims off its offsets; it stands before them
        control: Any = None
        labels = np.full(len(tokens), IGNORED, dtype=np.int32)
        ends = []
        for start, end in spans:
            inside = (last > start) & (first < end)
            early = inside & (first < start)
            if early.any():  # a special token before an answer may swallow the white space it begins with
                control = np.isin(tokens, self.special_ids) if control is None else control
                inside &= ~(early & control)
            index = np.flatnonzero(inside)
            labels[index] = tokens[index]
            # A line break may follow the end token where everything is learned.
            if len(index) and any(int(token) in self.special for token in tokens[index[-2:]]):
                ends.append(int(index[-1]))
        return labels, ends

    def _check_start(self, ids: list[int], place: str) -> None:
        if self.bos is None:
            return
        count = ids.count(self.bos)
        wrong = ids[:1] != [self.bos] if self.bos == self.tokenizer.eos_token_id else count != 1
        if wrong:
            self.audit.count(
                "bos",
                f"{place}: begins with {'no' if ids[:1] != [self.bos] else 'one'} beginning-of-sequence token and has "
                f"{count} of them; the chat template should write {self.tokenizer.bos_token!r} once, at the start",
            )

    def _drop(self, rule: str, line: str) -> None:
        self.audit.count(rule, line)
        self.audit.drop(rule)


Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]
"""A key, the learned tokens and the length of each row: what is compared, split and counted without reading tokens."""
NUMBERS = np.dtype([("key", "<i8"), ("learned", "<i4"), ("length", "<i4")])
_TOKENS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "question": pa.string(),
        "file": pa.string(),
        "number": pa.int64(),
        "answer": pa.string(),
        "asked": pa.int32(),
        "prompt": _TOKENS,
        "rejected_ids": _TOKENS,
        "rejected_labels": _TOKENS,
    }
)


def write_table(folder: Path, batches: Iterable[list[TokenRow]], audit: SourceAudit) -> None:
    """Write rows.arrow, numbers.bin and audit.json; `audit` is what the batches counted, complete when they end."""
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, _SCHEMA) as writer,
        (folder / "numbers.bin").open("wb") as numbers,
    ):
        for batch in filter(None, batches):
            writer.write_batch(_record_batch(batch))
            numbers.write(np.array([(row.key, row.learned, row.length) for row in batch], NUMBERS).tobytes())
    (folder / "audit.json").write_text(json.dumps(dataclasses.asdict(audit)), encoding="utf-8")


def read_table(folder: Path) -> tuple[Dataset, Numbers, SourceAudit]:
    """What `write_table` wrote. The tokens stay on the disk. Raises ValueError for a damaged file."""
    audit = source_from_dict(json.loads((folder / "audit.json").read_text(encoding="utf-8")))
    rows = Dataset.from_file(str(folder / "rows.arrow"))
    file = folder / "numbers.bin"
    numbers: Numbers = np.memmap(file, NUMBERS, "r") if file.stat().st_size else np.empty(0, NUMBERS)
    if not len(rows) == len(numbers) == audit.rows:
        raise ValueError(f"{folder}: has {len(rows)} rows and {len(numbers)} numbers instead of {audit.rows}")
    return rows, numbers, audit


def _record_batch(batch: list[TokenRow]) -> pa.RecordBatch:
    def tokens(name: str) -> pa.Array:
        each = [getattr(row, name) for row in batch]
        return pa.ListArray.from_arrays(np.cumsum([0, *map(len, each)], dtype=np.int32), np.concatenate(each))

    def plain(name: str) -> pa.Array:
        return pa.array([getattr(row, name) for row in batch], _SCHEMA.field(name).type)

    arrays = {"input_ids", "labels", "rejected_ids", "rejected_labels"}
    columns = [tokens(name) if name in arrays else plain(name) for name in _SCHEMA.names]
    return pa.record_batch(columns, schema=_SCHEMA)


# --- rows by key ----------------------------------------------------------------------------------

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Keys: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_ROWS_AT_ONCE = 1 << 18


def split(keys: Keys, count: int, seed: int) -> tuple[Indices, Indices]:
    """Training and validation indices, in order. `count` rows are held out, taken at random.

    Rows with equal keys stay together, so that no validation row is a training row as well; where
    that does not come out even, fewer than `count` are held out (but always some).
    """
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    held = np.zeros(len(sizes), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(sizes))
    missing = count
    for index in order:
        if sizes[index] <= missing:
            held[index] = True
            missing -= sizes[index]
        if not missing:
            break
    if not held.any() and len(sizes) > 1:
        held[order[int(np.argmin(sizes[order]))]] = True
    chosen = held[group]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def weighted(indices: Indices, weight: float, seed: int) -> Indices:
    """The indices as often as the weight says: all of them for each whole, and a random part for the rest."""
    whole = int(weight)
    parts = [indices] * whole
    rest = round(weight * len(indices)) - whole * len(indices)
    if rest:
        parts.append(np.sort(np.random.default_rng(seed).choice(indices, rest, replace=False)))
    return np.concatenate(parts) if parts else indices[:0]


def repeated(keys: Keys) -> tuple[int, int, int]:
    """How many rows repeat an earlier one, the first that does, and the one that it repeats."""
    count = 0
    first: tuple[int, int] | None = None
    for part, places in _parts(keys):
        _, where, group = np.unique(part, return_index=True, return_inverse=True)
        again = np.ones(len(part), dtype=bool)
        again[where] = False
        count += int(again.sum())
        if again.any():
            one = int(np.argmax(again))
            found = int(places[one]), int(places[where[group[one]]])
            first = min(first, found) if first else found
    return (count, *first) if first else (0, 0, 0)


def shared(keys: Keys, others: Keys) -> tuple[int, int, int]:
    """How many rows are among the others too, the first that is, and the one that it equals."""
    mask = np.isin(keys, others)
    if not mask.any():
        return 0, 0, 0
    first = int(np.argmax(mask))
    return int(mask.sum()), first, int(np.argmax(others == keys[first]))


def _parts(keys: Keys) -> Any:
    """The keys in parts that hold all equal ones, so that sorting needs little memory."""
    parts = 1 + len(keys) // _ROWS_AT_ONCE
    for part in range(parts):
        places = np.flatnonzero(keys % parts == part)
        yield keys[places], places
