"""The rows that models are compared on: held-out ones, sets of the recipe's, and the texts that come with lorafit."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorafit.engine.data.encode import IGNORED, Lengths, TokenRow, tokenize
from lorafit.engine.data.prepare import Prepared, prepare, rows_of, with_shape
from lorafit.engine.data.render import Renderer, special_tokens
from lorafit.engine.evaluate.likelihood import Choice, common
from lorafit.errors import DataError
from lorafit.evaluation.answers import AnswerMetric
from lorafit.evaluation.figures import HELD_OUT
from lorafit.evaluation.results import Metric
from lorafit.evaluation.results import Set as SetInfo
from lorafit.facts.template import REASONING, opens_reasoning, without_header, without_reasoning
from lorafit.plan import Plan, SourcePlan
from lorafit.plan.evaluation import sets_of
from lorafit.plan.methods import SFT
from lorafit.recipe.schema import BUILT_IN_SETS, EvalSection, EvalSet
from lorafit.rows import Example, Fault, Format, Row, digest, place_of, to_example, with_rejected
from lorafit.rows.audit import RULES, SourceAudit, gate
from lorafit.rows.cells import options_in
from lorafit.text import first_line

TEXTS = Path(__file__).parent / "texts"
_SHOWN = {
    HELD_OUT: "rows that the run kept out of training",
    "general": "texts that come with lorafit",
    "chat": "conversations that come with lorafit",
}


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, and the answer that is expected.

    Attributes:
        end: the last learned token, by which the answer ends.
        length: of the expected answer, in tokens.
    """

    prompt: list[int]
    shown: str
    expected: str
    end: int
    length: int


@dataclass(frozen=True)
class OptionRow:
    """A row as a choice between options.

    Attributes:
        row: its index in the set.
        expected: the index of the right option; -1 if the row's answer is none of them.
    """

    row: int
    options: tuple[str, ...]
    expected: int
    choice: Choice


@dataclass(frozen=True)
class EvalRows:
    """A set, tokenized, with what is measured of it.

    Attributes:
        spec: the recipe's section for the set, with defaults.
        source: a path, or what the rows are in words.
        rows: with `input_ids`, `labels`, `question`, `file` and `number`.
        sources: what they were read from.
        asked: indices of the rows for which answers are generated.
        options: by row, of a set with options.
        rejected: by row, of preference rows, tokens and labels with the rejected answer in place of the chosen one.
        metrics: what is measured.
        scorers: the metrics among them that score an answer.
        raw: by row, its fields as they are in the file, where a scorer looks at them.
    """

    spec: EvalSet
    source: str
    rows: Dataset
    sources: tuple[SourcePlan, ...]
    asked: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    options: Mapping[int, OptionRow] = field(default_factory=dict)
    rejected: Mapping[int, TokenRow] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    scorers: tuple[AnswerMetric, ...] = ()
    raw: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def info(self) -> SetInfo:
        """The set in results; once answers are scored, it is known which metrics of the user's own are shares."""
        shares = {metric.info.name for metric in self.scorers if metric.says_yes_or_no()}
        metrics = (m.model_copy(update={"unit": "share"}) if m.name in shares else m for m in self.metrics)
        return SetInfo(
            role=self.spec.role,
            source=self.source,
            rows=len(self),
            answered=len(self.asked),
            sha256=self.sha256,
            metrics=tuple(metrics),
        )

    def question(self, row: int) -> Question:
        found = as_question(self.rows[row], self.tokenizer)
        assert found is not None
        return found

    def place(self, row: int) -> str:
        """File and line."""
        return place_of(self._places[row]["file"], self._places[row]["number"])

    def shown(self, row: int) -> tuple[str, str]:
        """The prompt and the answer; of a row that is learned whole, the text as the answer."""
        if row in self._asked:
            question = self.question(row)
            return question.shown, question.expected
        found = self.rows[row]
        learned = [token for token, label in zip(found["input_ids"], found["labels"], strict=True) if label != IGNORED]
        return str(found["question"]).strip(), self.tokenizer.decode(learned, skip_special_tokens=True).strip()

    @property
    def sizes(self) -> np.ndarray[Any, Any]:
        """(rows, 2): the learned tokens that are predicted, and the bytes of their text, control tokens left out."""
        return self._read_through[0]

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens, labels and prompts."""
        return self._read_through[1]

    @property
    def sha256(self) -> str:
        """SHA-256 of what the rows were read from and how, and of their numbers: whatever the model makes of them."""
        read = [
            [source.hub or _digest(source), source.format, source.columns, source.template, source.max_rows]
            for source in self.sources
        ]
        text = json.dumps([read, list(self.rows["number"])], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def _places(self) -> Dataset:
        return self.rows.select_columns(["file", "number"])

    @cached_property
    def _asked(self) -> frozenset[int]:
        return frozenset(self.asked)

    @cached_property
    def _read_through(self) -> tuple[np.ndarray[Any, Any], str]:
        sizes, digest = np.zeros((len(self.rows), 2)), hashlib.sha256()
        for index, row in enumerate(self.rows.select_columns(["input_ids", "labels", "asked", "prompt"])):
            digest.update(np.array([row["input_ids"], row["labels"]], dtype=np.int32).tobytes())
            digest.update(np.array([row["asked"], *row["prompt"]], dtype=np.int32).tobytes())
            learned = [i for i, label in enumerate(row["labels"]) if label != IGNORED and i]
            sizes[index, 0] = len(learned)
            for _, span in itertools.groupby(enumerate(learned), key=lambda pair: pair[1] - pair[0]):
                ids = [row["input_ids"][i] for _, i in span]
                text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                sizes[index, 1] += len(text.encode("utf-8", "surrogatepass"))
        return sizes, digest.hexdigest()


def _digest(source: SourcePlan) -> str:
    known = source.sha256
    return digest(source.path) if known is None or known.startswith("unread:") else known


def held_out_rows(plan: Plan, tokenizer: PreTrainedTokenizerBase, data: Path | None) -> Dataset:
    """Tokenized held-out rows: of a file, else those that the run kept out of training. Raises DataError."""
    return _held_out(plan, tokenizer, data, None).rows


@dataclass(frozen=True)
class _Read:
    """Rows, what they were read from, and what became of each source's rows where all of them are in the set."""

    rows: Dataset
    sources: tuple[SourcePlan, ...]
    audits: tuple[SourceAudit, ...] = ()


def _held_out(plan: Plan, tokenizer: PreTrainedTokenizerBase, data: Path | None, prepared: Prepared | None) -> _Read:
    if data is not None:
        first = plan.data.train[0]
        source = SourcePlan(str(data), "--data", columns=first.columns, template=first.template)
        return _read(plan, source, tokenizer)
    if _has_none(plan):
        raise DataError("the run held no rows out of training; name some with --data")
    if (made := prepared) is None:
        check_unchanged(plan)
        made = prepare(plan.data, tokenizer)
    assert made.validation is not None
    return _Read(made.validation, plan.data.validation or plan.data.train, made.audit.validation)


def _read(plan: Plan, source: SourcePlan, tokenizer: PreTrainedTokenizerBase) -> _Read:
    """A source's rows, all of them. Raises DataError for an audit beyond its limits."""
    alone = dataclasses.replace(
        plan.data,
        train=(source,),
        validation=(),
        validation_fraction=None,
        packing=False,
        streaming=False,
        method=SFT.name,  # of pairs the chosen answer; the rejected one is read for `rejected`
    )
    made = prepare(alone, tokenizer)
    # eval asks what a server asks, however the rows learn
    free = ("duplicates", "truncated", "lost_tokens", "prompt_differs", "prompt_boundary")
    gate(made.audit, plan.data.audit | dict.fromkeys(free))
    assert made.rows is not None
    return _Read(made.rows, (source,), made.audit.train)


def check_unchanged(plan: Plan) -> None:
    """The held-out rows are those of the training only if the files are. Raises DataError."""
    for source in (*plan.data.train, *plan.data.validation):
        if source.hub is None and source.sha256 and not plan.data.streaming and digest(source.path) != source.sha256:
            raise DataError(
                f"{source.path}: has changed since the run, so its held-out rows are not known; bring the file back, "
                "or name rows with --data"
            )


def read_sets(
    plan: Plan,
    section: EvalSection,
    tokenizer: PreTrainedTokenizerBase,
    data: Path | None,
    remarks: list[str],
    only: Collection[str] | None = None,
    prepared: Prepared | None = None,
) -> list[EvalRows]:
    """The sets of an eval section: the held-out rows, those it names, and the built-in ones. Raises DataError.

    Args:
        data: rows to take for the held-out ones.
        remarks: where it is noted what was left out, and why.
        only: the sets that are read; None: all.
        prepared: the run's own rows, if they are at hand.
    """
    found = []
    for name, spec in sets_of(section).items():
        if only is not None and name not in only:
            continue
        try:
            read = _rows_of(spec, plan, tokenizer, data, prepared)
        except DataError as error:
            if name in BUILT_IN_SETS:
                remarks.append(f"{name}: left out: {first_line(error)}")
                continue
            is_named = any(one.name == name for one in section.sets)
            if name == HELD_OUT and data is None and not is_named and section.sets and _has_none(plan):
                remarks.append(f"{HELD_OUT}: left out: the run held no rows out of training")
                continue
            raise
        cut = frozenset(_cut_off(read.rows, plan.data.max_length, set(special_tokens(tokenizer).values())))
        remarks.extend(_lost(name, read, len(cut), plan.data.max_length))
        chosen: Iterable[int] = ()
        if spec.role == "task":
            remarks.extend(_asked_otherwise(name, read))
            asked = enumerate(read.rows.select_columns(["asked"]))
            whole = (index for index, row in asked if row["asked"] and index not in cut)
            chosen = itertools.islice(whole, spec.limit or section.limit)
        shown = spec.path or (str(data) if data and name == HELD_OUT else _SHOWN[name])
        found.append(EvalRows(spec, shown, read.rows, read.sources, tuple(chosen), tokenizer))
    return found


def _cut_off(rows: Dataset, max_length: int, special: Collection[int]) -> Iterator[int]:
    """The rows that max_length cuts within an answer: what is left of it is not what a model should answer."""
    for index, row in enumerate(rows.select_columns(["input_ids", "labels", "asked", "question"])):
        ids = row["input_ids"]
        within = row["labels"][-1] != IGNORED and ids[-1] not in special
        if len(ids) == max_length and (within or (row["question"] and not row["asked"])):
            yield index


def _lost(name: str, read: _Read, cut: int, max_length: int) -> Iterator[str]:
    """Remarks on rows that were read for a set and are not in it, or only in part."""
    if cut:
        yield (
            f"{name}: max_length {max_length} cuts {cut} of {len(read.rows)} rows in or before their last answer: "
            "likelihoods are of what is left, and it is not generated"
        )
    dropped = sum((Counter(audit.dropped) for audit in read.audits), Counter())
    if dropped:
        reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items())
        total = sum(audit.read for audit in read.audits)
        yield f"{name}: {dropped.total()} of {total} rows are left out ({reasons})"


def _asked_otherwise(name: str, read: _Read) -> Iterator[str]:
    for rule in ("prompt_differs", "prompt_boundary"):
        if count := sum(audit.found[rule].count for audit in read.audits if rule in audit.found):
            total = sum(audit.read for audit in read.audits)
            yield f"{name}: {count} of {total} {RULES[rule]}: likelihoods are as the rows have it, answers as asked"


def _has_none(plan: Plan) -> bool:
    return not plan.data.validation and plan.data.validation_fraction is None


def _rows_of(
    spec: EvalSet, plan: Plan, tokenizer: PreTrainedTokenizerBase, data: Path | None, prepared: Prepared | None
) -> _Read:
    if spec.name == HELD_OUT and (data is not None or not spec.path):
        return _held_out(plan, tokenizer, data, prepared)
    source = SourcePlan(
        spec.path or str(TEXTS / f"{spec.name}.jsonl"),
        f"eval.sets.{spec.name}",
        format=None if spec.format == "auto" else spec.format,
        columns=dict(spec.columns),
        template=spec.template,
        max_rows=spec.max_rows,
    )
    return _read(plan, source, tokenizer)


def _answer_span(row: dict[str, Any]) -> tuple[int, int]:
    """The first and the last position of a row's last answer; of a row without one the first is 0."""
    labels = row["labels"]
    end = start = max(index for index, label in enumerate(labels) if label != IGNORED)
    if row["asked"] > 0:
        return next(index for index in range(row["asked"], end + 1) if labels[index] != IGNORED), end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return start, end


def as_question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Question | None:
    """A row's last answer as a question: what a server would be asked; None for a row that asks nothing."""
    start, end = _answer_span(row)
    if row["asked"] == 0:
        return None
    ids, prompt = row["input_ids"], row["prompt"] or row["input_ids"][: row["asked"]]
    whole = row["asked"] > 0
    answer = ids[row["asked"] : end + 1] if whole else tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    return Question(
        prompt=prompt,
        shown=row["question"].strip(),
        expected=said(answer, prompt, tokenizer, made=False),
        end=ids[end],
        length=end + 1 - start,
    )


def said(ids: Sequence[int], prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase, made: bool = True) -> str:
    """The text of an answer: without the reasoning it begins with, control tokens, and the white space around it.

    Args:
        made: whether a model made it after that prompt. An expected answer may know nothing of reasoning.
    """
    is_open = opens_reasoning(str(tokenizer.decode(prompt[-8:])))
    answer = str(tokenizer.decode(ids))
    if made or any(end in answer for _, end in REASONING):
        answer = without_reasoning(answer, is_open)
    answer = without_header(answer)
    for token in special_tokens(tokenizer):
        answer = answer.replace(token, "")
    return answer.strip()


class Prompts(Sequence[list[int]]):
    """The prompts of a set's questions, read when they are asked for."""

    def __init__(self, rows: EvalRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows.asked)

    def __getitem__(self, index: Any) -> Any:
        return self.rows.question(self.rows.asked[index]).prompt


def option_rows(rows: EvalRows, plan: Plan) -> Iterator[OptionRow]:
    """The questions of a set with options: each option as the answer, in tokens as in training. Raises DataError."""
    renderer = Renderer(rows.tokenizer, plan.data.loss_on, plan.data.date)
    lengths = Lengths(plan.data.max_length)
    for index, raw, example in raw_rows(rows, rows.asked):
        options = _options(rows.spec.options, raw)
        if len({option.strip() for option in options}) < len(options):
            raise DataError(f"{raw.place}: an option is there twice, so which of the two is chosen would be chance")
        answers = [_with_answer(example, option) for option in options]
        made = [row for batch in tokenize(answers, renderer, lengths, SourceAudit("options")) for row in batch]
        if len(made) != len(options):
            raise DataError(f"{raw.place}: an option can't be an answer: the template leaves it out, or it is cut off")
        ids = [row.input_ids.tolist() for row in made]
        spans = [_answer_span({"labels": row.labels.tolist(), "asked": row.asked}) for row in made]
        shared = min(common(ids), *(start for start, _ in spans))
        parts = [row[shared : end + 1] for row, (_, end) in zip(ids, spans, strict=True)]
        own = _answer(example).strip()
        expected = next((number for number, option in enumerate(options) if option.strip() == own), -1)
        yield OptionRow(index, tuple(options), expected, Choice(ids[0][:shared], parts))


def rejected_rows(rows: EvalRows, plan: Plan, remarks: list[str]) -> dict[int, TokenRow]:
    """Preference rows with their rejected answers, in tokens as in training, by the row's index.

    A pair of which max_length cuts an answer has no such row, and is remarked on. Texts that might be forgotten are no
    pairs.
    """
    if rows.spec.role != "task":
        return {}
    cut = set(_cut_off(rows.rows, plan.data.max_length, set(special_tokens(rows.tokenizer).values())))
    places: dict[tuple[str, int], int] = {}

    def lost() -> Iterator[Example]:
        for index, row, example in raw_rows(rows, range(len(rows)), "preference"):
            places[row.file, row.number] = index
            yield with_rejected(example)

    renderer = Renderer(rows.tokenizer, plan.data.loss_on, plan.data.date)
    lengths = Lengths(plan.data.max_length, drop_excess=True)
    made = itertools.chain.from_iterable(tokenize(lost(), renderer, lengths, SourceAudit("rejected")))
    found = {places[row.file, row.number]: row for row in made}
    found = {index: row for index, row in found.items() if index not in cut}
    if len(found) < len(places):
        remarks.append(
            f"{rows.name}: {len(places) - len(found)} of {len(places)} pairs say nothing of preferences: max_length "
            f"{plan.data.max_length} cuts an answer, or the chat template leaves one out"
        )
    return found


def raw_rows(
    rows: EvalRows, indices: Iterable[int], format: Format | None = None
) -> Iterator[tuple[int, Row, Example]]:
    """Rows of a set as they are in their files, with their indices; of one format only, if it is given."""
    places = rows.rows.select_columns(["file", "number"])
    wanted = {(places[index]["file"], places[index]["number"]): index for index in indices}
    for source in rows.sources:
        found, shape = with_shape(rows_of(source), source)
        if shape is None or format not in (None, shape.format):
            continue
        for row in found:
            index = wanted.get((row.file, row.number))
            if index is not None:
                with contextlib.suppress(Fault):
                    yield index, row, to_example(row, shape)


def _options(asked: str | tuple[str, ...] | None, row: Row) -> list[str]:
    return options_in(row, asked) if isinstance(asked, str) else list(asked or ())


def _answer(example: Example) -> str:
    if example.messages:
        return str(next((m["content"] for m in reversed(example.messages) if m["role"] == "assistant"), ""))
    return example.completion or ""


def _with_answer(example: Example, answer: str) -> Example:
    """The example with its last answer replaced, after the same white space. Raises DataError for a plain text."""
    if example.completion is not None:
        space = example.completion[: len(example.completion) - len(example.completion.lstrip())]
        return dataclasses.replace(example, completion=space + answer.strip())
    last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=None)
    if last is None:
        raise DataError(f"{example.place}: is a plain text, so there is no answer to choose an option for")
    turn = {key: value for key, value in example.messages[last].items() if key != "tool_calls"} | {"content": answer}
    return dataclasses.replace(example, messages=(*example.messages[:last], turn))
