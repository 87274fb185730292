"""Data sources -> tokenized rows with labels, in the shape that TRL's trainer takes.

A row is rendered to text once, the answers are found as spans of characters, the text is tokenized
once, and a token is learned if it overlaps an answer. Padding never enters into it: the collator
pads labels by position, so an end token that is also the padding token stays learned.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl import get_training_chat_template

from lorafit.errors import DataError
from lorafit.plan import DataPlan, SourcePlan, validation_rows
from lorafit.rows import Example, Message, Row, detect_format, read_rows, to_example
from lorafit.template import GENERATION, inspect_template

IGNORED = -100
_BATCH = 1000
Span = tuple[int, int]


@dataclass
class DataReport:
    """What became of the rows: counts, of rows or of tokens.

    Attributes:
        masks: how the answers were found.
        supervised_tokens: tokens in the loss.
        answers: answers in the loss.
        ends_learned: answers whose end is in the loss.
        truncated: rows cut at max_length.
        dropped: rows that truncation left without a learned token.
    """

    masks: str
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    answers: int = 0
    ends_learned: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Prepared:
    """Tokenized rows (`input_ids` and `labels`, unpadded) and what became of them."""

    train: Dataset
    validation: Dataset | None
    report: DataReport
    validation_report: DataReport | None


@dataclass(frozen=True)
class Rendered:
    """A row as text. `spans` are the answers with their ends, as character ranges."""

    place: str
    text: str
    spans: tuple[Span, ...]
    special: bool
    """Whether the tokenizer adds its special tokens (a chat template writes its own)."""
    question: str
    """What the last answer answers, for people."""


def prepare(plan: DataPlan, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, split, render and tokenize. Raises DataError."""
    train, held_out = load_examples(plan)
    renderer = Renderer(tokenizer, plan.loss_on)
    rows, report = tokenize(train, renderer, plan.max_length)
    if not held_out:
        return Prepared(rows, None, report, None)
    held_out_rows, held_out_report = tokenize(held_out, renderer, plan.max_length)
    return Prepared(rows, held_out_rows, report, held_out_report)


def load_examples(plan: DataPlan) -> tuple[list[Example], list[Example]]:
    """The training and the validation examples. Raises DataError."""
    train = [example for source in plan.train for example in _examples(source, plan)]
    if plan.validation:
        return train, [example for source in plan.validation for example in _examples(source, plan)]
    count = validation_rows(len(train), plan.validation_fraction)
    if plan.validation_fraction is not None and count == 0:
        raise DataError("dataset.validation: one row can't be split into training and validation rows")
    chosen = set(random.Random(plan.seed).sample(range(len(train)), count))
    return (
        [example for index, example in enumerate(train) if index not in chosen],
        [example for index, example in enumerate(train) if index in chosen],
    )


def _examples(source: SourcePlan, plan: DataPlan) -> Iterator[Example]:
    format = source.format
    count = 0
    for row in read_rows(source.path) if source.hub is None else _hub_rows(source):
        if format is None:
            format, _ = detect_format(row, source.columns)
        yield to_example(row, format, source.columns)
        count += 1
    if not count:
        raise DataError(f"{source.path}: there are no rows")


def _hub_rows(source: SourcePlan) -> Iterator[Row]:
    hub = source.hub or {}
    try:
        rows = load_dataset(source.path, hub["name"], split=hub["split"], revision=hub["revision"])
    except Exception as error:  # noqa: BLE001 - the client raises dozens of types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source.path}: no such local file, and the hub did not give it as a data set: {reason}"
        ) from None
    for number, fields in enumerate(rows, 1):
        yield Row(f"{source.path}: row {number}", dict(fields))


# --- rendering ------------------------------------------------------------------------------------


class Renderer:
    """Renders examples as text and finds their answers.

    `masks` says how answers in conversations are found: by `{% generation %}` markers (of the
    template, or of the training version of it that TRL ships), or, where there are none, by
    rendering the conversation turn by turn and taking what each assistant turn adds.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: str) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        template: Any = tokenizer.chat_template
        self.template: str | None = template["default"] if isinstance(template, dict) else template
        self.marked: str | None = None
        self.ends_turns = True
        self.masks = "turn by turn"
        if self.template is None:
            return
        special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        self.ends_turns = inspect_template(self.template, special).end_of_turn != ""
        self.marked = self._marked_template()
        if self.marked is not None:
            own = self.marked == self.template
            self.masks = "markers of the chat template" if own else "TRL's training version of the chat template"

    def _marked_template(self) -> str | None:
        try:
            replacement = get_training_chat_template(self.tokenizer)
        except ValueError:  # TRL has no training version
            return self.template if self.template and GENERATION.search(self.template) else None
        return replacement or self.template

    def render(self, example: Example) -> Rendered:
        """Raises DataError for a row that the template refuses or renders ambiguously."""
        eos = str(self.tokenizer.eos_token or "")
        if example.text is not None:
            text = example.text if eos and example.text.endswith(eos) else example.text + eos
            return Rendered(example.place, text, ((0, len(text)),), special=True, question="")
        if example.prompt is not None:
            completion = example.completion or ""
            text = example.prompt + (completion if eos and completion.endswith(eos) else completion + eos)
            span = (0 if self.loss_on == "all" else len(example.prompt), len(text))
            return Rendered(example.place, text, (span,), special=True, question=example.prompt)
        return self._render_conversation(example, eos)

    def _render_conversation(self, example: Example, eos: str) -> Rendered:
        if self.template is None:
            raise DataError(
                f"{example.place}: a conversation needs a chat template, and the tokenizer has none; set "
                "model.chat_template to a Jinja file"
            )
        messages = list(example.messages)
        if not self.ends_turns:
            messages = [
                {**m, "content": m["content"] + eos} if m["role"] == "assistant" else m for m in messages
            ]
        try:
            if self.marked is not None:
                text, spans = self._by_markers(messages, example)
            else:
                text, spans = self._turn_by_turn(messages, example)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - a template may fail in any way
            raise DataError(f"{example.place}: the chat template refuses the row: {error}") from None
        if not spans:
            raise DataError(f"{example.place}: the chat template leaves out the answer")
        if self.loss_on == "completion":
            spans = spans[-1:]
        elif self.loss_on == "all":
            spans = [(0, len(text))]
        question = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        return Rendered(example.place, text, tuple(spans), special=False, question=question)

    def _apply(self, messages: list[Message], example: Example, *, prompt: bool = False) -> str:
        text, _ = render_jinja_template(
            [messages],
            tools=list(example.tools) if example.tools else None,
            chat_template=self.template,
            add_generation_prompt=prompt,
            **self.tokenizer.special_tokens_map,
        )
        return str(text[0])

    def _by_markers(self, messages: list[Message], example: Example) -> tuple[str, list[Span]]:
        texts, spans = render_jinja_template(
            [messages],
            tools=list(example.tools) if example.tools else None,
            chat_template=self.marked,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        text = texts[0]
        return text, [self._with_end(text, start, end) for start, end in spans[0]]

    def _with_end(self, text: str, start: int, end: int) -> Span:
        """Trim white space off a marked answer's end, and take in an end token that follows it."""
        end = start + len(text[start:end].rstrip())
        tokens = sorted(map(str, self.tokenizer.all_special_tokens), key=len, reverse=True)
        if not any(text[start:end].endswith(token) for token in tokens):
            gap = len(text[end:]) - len(text[end:].lstrip())
            follows = next((t for t in tokens if text.startswith(t, end + gap)), None)
            if follows == self.tokenizer.eos_token and follows is not None:
                end += gap + len(follows)
        return start, end

    def _turn_by_turn(self, messages: list[Message], example: Example) -> tuple[str, list[Span]]:
        text = self._apply(messages, example)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:index], example, prompt=True) if index else ""
            until = self._apply(messages[: index + 1], example).rstrip()
            if not text.startswith(until):
                raise DataError(
                    f"{example.place}: the chat template renders an answer differently when turns follow it, so its "
                    "tokens can't be told apart; use loss_on: all, or a template with {% generation %} markers"
                )
            start = _common_length(before, until)
            shown = until.find(message["content"].strip()[:16], start) if message["content"].strip() else start
            if shown < 0:
                raise DataError(f"{example.place}: the chat template changes or leaves out an answer")
            if before[start:].strip():
                start = shown  # the prompt for an answer is not how an answer is rendered
            spans.append((start, len(until)))
        return text, spans


def _common_length(first: str, second: str) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


# --- tokenizing -----------------------------------------------------------------------------------


def tokenize(
    examples: list[Example], renderer: Renderer, max_length: int, keep_questions: bool = False
) -> tuple[Dataset, DataReport]:
    """Tokenize with labels: `input_ids` and `labels` (IGNORED where nothing is learned), unpadded.

    With `keep_questions`, a column `question` has what the last answer answers, as text.

    Raises DataError for a row without a learned token, and when no row is left.
    """
    if not renderer.tokenizer.is_fast:
        raise DataError("the tokenizer has no fast version, which is needed to find the answers' tokens")
    report = DataReport(renderer.masks)
    ends = set(renderer.tokenizer.all_special_ids)
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    questions: list[str] = []
    for batch in _batches(renderer.render(example) for example in examples):
        for row, row_ids, row_labels in _encode(batch, renderer.tokenizer):
            _count(report, row, row_labels, max_length, ends)
            row_ids, row_labels = row_ids[:max_length], row_labels[:max_length]
            if all(label == IGNORED for label in row_labels[1:]):
                report.dropped += 1
                continue
            report.rows += 1
            report.tokens += len(row_ids)
            report.supervised_tokens += sum(label != IGNORED for label in row_labels[1:])
            ids.append(row_ids)
            labels.append(row_labels)
            questions.append(row.question)
    if not ids:
        raise DataError(
            f"no row is left to learn from: max_length {max_length} cuts the answer off in all {report.dropped}"
        )
    if not report.ends_learned and not report.truncated and renderer.tokenizer.eos_token_id is not None:
        raise DataError(
            "no answer ends with one of the tokenizer's special tokens, so the model would not learn to stop; check "
            "the chat template"
        )
    columns: dict[str, Any] = {"input_ids": ids, "labels": labels}
    return Dataset.from_dict(columns | {"question": questions} if keep_questions else columns), report


def _batches(rows: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    """Neighbouring rows that are tokenized in the same way, at most _BATCH of them."""
    for _, group in itertools.groupby(rows, key=lambda row: row.special):
        while batch := list(itertools.islice(group, _BATCH)):
            yield batch


def _encode(
    batch: list[Rendered], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Rendered, list[int], list[int]]]:
    encoded = tokenizer(
        [row.text for row in batch],
        add_special_tokens=batch[0].special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    for row, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield row, *_label(row, ids, offsets, tokenizer.eos_token_id)


def _label(
    row: Rendered, ids: list[int], offsets: list[tuple[int, int]], eos: int | None
) -> tuple[list[int], list[int]]:
    if row.special and eos is not None and ids[-2:] == [eos, eos]:  # the tokenizer adds an end token itself
        ids, offsets = ids[:-1], offsets[:-1]
    spans = iter(row.spans)
    start, end = next(spans)
    labels = []
    for token, (token_start, token_end) in zip(ids, offsets, strict=True):
        while token_start >= end and (following := next(spans, None)) is not None:
            start, end = following
        learned = token_end > start and token_start < end and token_end > token_start
        labels.append(token if learned else IGNORED)
    return ids, labels


def _count(report: DataReport, row: Rendered, labels: list[int], max_length: int, ends: set[int]) -> None:
    """Count a row that will be cut at max_length. Raises DataError if nothing in it is learned."""
    if all(label == IGNORED for label in labels[1:]):
        raise DataError(f"{row.place}: no token of the row would be learned")
    report.longest = max(report.longest, len(labels))
    report.truncated += len(labels) > max_length
    report.answers += len(row.spans)
    last = [
        index
        for index, label in enumerate(labels[:max_length])
        if label != IGNORED and (index + 1 == len(labels) or labels[index + 1] == IGNORED)
    ]
    # A line break may follow the end token where everything is learned.
    report.ends_learned += sum(any(token in ends for token in labels[max(i - 1, 0) : i + 1]) for i in last)
