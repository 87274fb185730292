"""Data sources -> tokenized rows with labels, in the shape that TRL's trainer takes.

A row is rendered to text once, the answers are found as spans of characters, the text is tokenized
once, and a token is learned if it overlaps an answer. Padding never enters into it: the collator
pads labels by position, so an end token that is also the padding token stays learned.
"""

from __future__ import annotations

import itertools
import random
import re
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
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OTHER = "\ue0ff"
"""An answer that differs from every other in its first character (which is for private use)."""
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
        self.template: str | None = template.get("default") if isinstance(template, dict) else template
        self.special = special_tokens(tokenizer)
        self.special_pattern = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self.closing = {str(tokenizer.eos_token)} if tokenizer.eos_token else set()
        self.marked: str | None = None
        self.ends_turns = True
        self.masks = "turn by turn"
        if self.template is None:
            return
        named: dict[str, str | None] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
        end_of_turn = inspect_template(self.template, named).end_of_turn
        self.ends_turns = end_of_turn != ""
        self.closing.update(token for token in self.special if (end_of_turn or "").startswith(token))
        self.marked = self._marked_template()
        if self.marked is not None:
            own = self.marked == self.template
            self.masks = "markers of the chat template" if own else "TRL's training version of the chat template"

    def _marked_template(self) -> str | None:
        try:
            replacement = get_training_chat_template(self.tokenizer)
        except Exception:  # noqa: BLE001 - there is no training version, or the template fails in TRL's trial of tools
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
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self.loss_on == "completion":
            answers = answers[-1:]
        try:
            if self.marked is not None:
                text, spans = self._by_markers(messages, example)
            elif self.loss_on == "all" and self.ends_turns:
                text = self._apply(messages, example)
                spans = [(0, len(text))]
            else:
                text, spans = self._turn_by_turn(messages, answers, example)
        except DataError:
            raise
        except Exception as error:  # noqa: BLE001 - a template may fail in any way
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{example.place}: the chat template refuses the row: {reason}") from None
        if self.loss_on == "completion":
            spans = spans[-1:]
        self._check_shown(text, spans, [messages[index] for index in answers], example)
        if not self.ends_turns:
            text, spans = self._end_turns(text, spans, eos)
        if self.loss_on == "all":
            spans = [(0, len(text))]
        asked = messages[: answers[-1]]
        question = next((m["content"] for m in reversed(asked) if m["role"] == "user"), "")
        return Rendered(example.place, text, tuple(spans), special=False, question=question)

    def _check_shown(self, text: str, spans: list[Span], answers: list[Message], example: Example) -> None:
        """Raises DataError for an answer or a tool call that the template does not write."""

        def has_words(part: str) -> bool:
            return self.special_pattern.sub("", part).strip() != ""

        shown = [text[start:end] for start, end in spans]
        expected = all(has_words(message["content"]) or message.get("tool_calls") for message in answers)
        if not shown or (expected and not all(map(has_words, shown))):
            raise DataError(f"{example.place}: the chat template leaves out an answer")
        for message in answers:
            for call in message.get("tool_calls") or []:
                name = str((call.get("function") or call).get("name")) if isinstance(call, dict) else str(call)
                if not any(name in part for part in shown):
                    raise DataError(f"{example.place}: the chat template leaves out the tool call {name!r}")

    def _end_turns(self, text: str, spans: list[Span], eos: str) -> tuple[str, list[Span]]:
        """Put the end token after every answer that has none, for templates that don't end turns."""
        parts: list[str] = []
        ended: list[Span] = []
        done = length = 0
        for start, end in spans:
            answer = text[start:end] if text[start:end].endswith(eos) else text[start:end] + eos
            parts += [text[done:start], answer]
            length += start - done
            ended.append((length, length + len(answer)))
            length, done = length + len(answer), end
        return "".join([*parts, text[done:]]), ended

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
        joined: list[Span] = []
        for start, end in spans[0]:
            if joined and joined[-1][1] == start:  # one answer in several blocks
                joined[-1] = joined[-1][0], end
            elif start < end:
                joined.append((start, end))
        return text, [self._with_end(text, start, end) for start, end in joined]

    def _with_end(self, text: str, start: int, end: int) -> Span:
        """Trim white space off an answer's end, and take in an end token that follows it."""
        end = start + len(text[start:end].rstrip())
        if not text.endswith(tuple(self.special), start, end):
            gap = len(text[end:]) - len(text[end:].lstrip())
            follows = self.special_pattern.match(text, end + gap)
            if follows and follows.group() in self.closing:
                end = follows.end()
        return start, end

    def _turn_by_turn(self, messages: list[Message], answers: list[int], example: Example) -> tuple[str, list[Span]]:
        text = self._apply(messages, example)
        spans: list[Span] = []
        for index in answers:
            until = self._apply(messages[: index + 1], example).rstrip()
            while not text.startswith(until):
                # some templates close the whole conversation with a token, which is not in its midst
                closing = next((token for token in self.special if until.endswith(token)), None)
                if closing is None:
                    raise DataError(
                        f"{example.place}: the chat template renders an answer differently when turns follow it, so "
                        "its tokens can't be told apart; use loss_on: completion or all, or a template with "
                        "{% generation %} markers"
                    )
                until = until.removesuffix(closing).rstrip()
            start = self._answer_start(messages, index, until, example)
            if start < len(until):
                spans.append(self._with_end(text, start, len(until)))
            else:
                raise DataError(f"{example.place}: the chat template leaves out an answer")
        return text, spans

    def _answer_start(self, messages: list[Message], index: int, until: str, example: Example) -> int:
        """Where an answer begins in `until`, the text that it ends.

        That is after the prompt for it. Where the answer is not rendered after just that prompt (one
        that begins to think, say), or there is no prompt (the first turn), it is where the text
        changes with the answer.
        """
        try:
            prompt = self._apply(messages[:index], example, prompt=True) if index else None
        except Exception:  # noqa: BLE001 - a template may refuse a system message alone
            prompt = None
        if prompt is not None:
            start = _common_length(prompt, until)
            if not prompt[start:].strip():
                return start
        changed = {key: _OTHER for key in ("content", *_REASONING) if key in messages[index]}
        return _common_length(self._apply([*messages[:index], {**messages[index], **changed}], example), until)


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
    ends = set(renderer.special.values())
    ended = False
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    questions: list[str] = []
    for batch in _batches(renderer.render(example) for example in examples):
        for row, row_ids, row_labels in _encode(batch, renderer):
            ended = _count(report, row, row_labels, max_length, ends) or ended
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
    if not ended and renderer.tokenizer.eos_token_id is not None:
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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ids of the tokens that stand for no text, longest first.

    The tokenizer's own list has only those with a name, such as eos_token; many a model ends its turns
    with one that has none.
    """
    tokens = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    tokens |= {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(sorted(tokens.items(), key=lambda item: -len(item[0])))


def _encode(batch: list[Rendered], renderer: Renderer) -> Iterator[tuple[Rendered, list[int], list[int]]]:
    tokenizer = renderer.tokenizer
    special = set(renderer.special.values())
    encoded = tokenizer(
        [row.text for row in batch],
        add_special_tokens=batch[0].special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    for row, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if row.special:  # no second end or start token beside one that the tokenizer adds itself
            if ids[-2:] == [tokenizer.eos_token_id] * 2 and offsets[-1][0] == offsets[-1][1]:
                ids, offsets = ids[:-1], offsets[:-1]
            if ids[:2] == [tokenizer.bos_token_id] * 2 and offsets[0][0] == offsets[0][1]:
                ids, offsets = ids[1:], offsets[1:]
        yield row, ids, _label(row.spans, ids, offsets, special)


def _label(spans: Iterable[Span], ids: list[int], offsets: list[Span], special: set[int]) -> list[int]:
    """The tokens that overlap a span, IGNORED for the others."""
    following = iter(spans)
    start, end = next(following)
    labels = []
    for token, (first, last) in zip(ids, offsets, strict=True):
        if first == last:  # white space that the tokenizer trims off its offsets; it stands before them
            first -= 1
        while first >= end and (span := next(following, None)) is not None:
            start, end = span
        # A special token before an answer may swallow the white space that the answer begins with.
        learned = last > start and first < end and not (first < start and token in special)
        labels.append(token if learned else IGNORED)
    return labels


def _count(report: DataReport, row: Rendered, labels: list[int], max_length: int, ends: set[int]) -> bool:
    """Count a row that will be cut at max_length; whether one of its answers ends with a token of `ends`.

    Raises DataError if nothing in the row is learned.
    """
    if all(label == IGNORED for label in labels[1:]):
        raise DataError(f"{row.place}: no token of the row would be learned")
    report.longest = max(report.longest, len(labels))
    report.truncated += len(labels) > max_length
    report.answers += len(row.spans)
    last = [
        index
        for index, label in enumerate(labels)
        if label != IGNORED and (index + 1 == len(labels) or labels[index + 1] == IGNORED)
    ]
    # A line break may follow the end token where everything is learned.
    ended = [index for index in last if any(token in ends for token in labels[max(index - 1, 0) : index + 1])]
    report.ends_learned += sum(index < max_length for index in ended)
    return bool(ended)
