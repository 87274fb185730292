"""Running the models on the sets, into records; and what scores need of a set, known before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from lorafit.engine.data.render import special_tokens
from lorafit.engine.evaluate.choices import choices
from lorafit.engine.evaluate.greedy import end_tokens, generate
from lorafit.engine.evaluate.likelihood import divergences, likelihoods
from lorafit.engine.evaluate.models import Contender, Loaded
from lorafit.engine.evaluate.sets import EvalRows, OptionRow, Prompts, raw_rows, said
from lorafit.evaluation.figures import BASE, Question, Rows, set_metrics
from lorafit.evaluation.metrics import MetricSpec, default_metrics, make_metrics, metric_info
from lorafit.evaluation.records import Records
from lorafit.evaluation.results import Metric
from lorafit.evaluation.results import Set as SetInfo
from lorafit.progress import each
from lorafit.rows import place_of


class _Questions(Mapping[int, Question]):
    """The questions of a set by row, read when they are asked for."""

    def __init__(self, rows: EvalRows, raw: Mapping[int, Mapping[str, Any]]) -> None:
        self.rows, self.raw, self.known = rows, raw, frozenset(rows.questions)

    def __getitem__(self, row: int) -> Question:
        if row not in self.known:
            raise KeyError(row)
        question = self.rows.question(row)
        return Question(question.shown, question.expected, self.raw.get(row, {}))

    def __iter__(self) -> Any:
        return iter(self.rows.questions)

    def __len__(self) -> int:
        return len(self.rows.questions)


def metrics_of(rows: EvalRows, section: dict[str, Any], compared: bool) -> tuple[Metric, ...]:
    """What is measured of a set, without a word of the user's own code. See `set_metrics`. Raises UsageError."""
    answers = map(metric_info, _specs(rows, section)) if rows.questions else None
    return set_metrics(rows.role, answers, rows.spec["options"], compared, bool(section["judge"]))


def _specs(rows: EvalRows, section: dict[str, Any]) -> tuple[MetricSpec, ...]:
    asked = rows.spec["metrics"] or section["metrics"]
    return tuple(asked or default_metrics(rows.question(row).expected for row in rows.questions))


def scored_rows(
    rows: EvalRows, section: dict[str, Any], options: Iterable[OptionRow], main: str | None, names: list[str]
) -> Rows:
    """A set with its metrics, for the models of these names. Raises UsageError for a metric that there is none of."""
    specs = _specs(rows, section) if rows.questions else ()
    own = any(isinstance(spec, str) and ":" in spec for spec in specs)
    raw = {index: row.fields for index, row, _ in raw_rows(rows)} if own else {}
    compared = main is not None and bool(set(names) - {BASE, main})
    judged = section if BASE in names else section | {"judge": None}
    places = rows.rows.select_columns(["file", "number"])

    def place(row: int) -> str:
        return place_of(places[row]["file"], places[row]["number"])

    def shown(row: int) -> tuple[str, str]:
        """The prompt and the answer; of a row that is learned whole, the text as the answer."""
        found = rows.rows[row]
        if row in questions:
            return questions[row].prompt, questions[row].expected
        learned = [token for token, label in zip(found["input_ids"], found["labels"], strict=True) if label != -100]
        return str(found["question"]).strip(), rows.tokenizer.decode(learned, skip_special_tokens=True).strip()

    questions = _Questions(rows, raw)
    return Rows(
        name=rows.name,
        info=SetInfo(
            role=rows.role,
            source=rows.source,
            rows=len(rows.rows),
            answered=len(rows.questions),
            sha256=rows.sha256,
            metrics=metrics_of(rows, judged, compared),
        ),
        count=len(rows.rows),
        sizes=rows.sizes,
        questions=questions,
        options={option.row: (option.options, option.expected) for option in options},
        fixed=tuple(rows.spec["options"]) if isinstance(rows.spec["options"], list) else None,
        answer_metrics=make_metrics(specs),
        main=main,
        place=place,
        shown=shown,
    )


T = TypeVar("T")


def measure(
    loaded: Loaded,
    contender: Contender,
    rows: EvalRows,
    options: list[OptionRow],
    max_new_tokens: int,
    records: Records,
) -> None:
    """Everything about one model on one set that is not in the records yet."""
    model = loaded.use(contender.name if contender.kind == "adapter" else BASE)
    name, pad = (rows.name, contender.name), rows.tokenizer.pad_token_id
    shows = rows.role == "forgetting" and contender.kind == "adapter"
    with torch.inference_mode():
        if shows:
            _divergences(loaded, model, rows, name, pad, records)
        else:
            _likelihoods(model, rows, name, pad, records)
        if options:
            _options(model, options, name, pad, records)
        if rows.questions:
            _answers(model, rows, name, max_new_tokens, records)


def _likelihoods(model: Any, rows: EvalRows, name: tuple[str, str], pad: int, records: Records) -> None:
    names = (*name, "likelihood")
    done = records.done(*names)
    if len(done) == len(rows.rows):
        return
    with records.writer(*names) as add:
        made = likelihoods(model, rows.rows, pad, done)
        for one in _each(made, len(rows.rows) - len(done), names):
            add({"row": one.row, "nll": one.nll, "tokens": one.tokens, "hits": one.hits})


def _divergences(loaded: Loaded, model: Any, rows: EvalRows, name: tuple[str, str], pad: int, records: Records) -> None:
    names = (*name, "divergence")
    done = records.done(*names)
    if len(done) == len(rows.rows):
        return
    with records.writer(*name, "likelihood", timed=False) as add_own, records.writer(*names) as add:
        made = divergences(loaded.base, model, rows.rows, pad, done)
        for one in _each(made, len(rows.rows) - len(done), names):
            own = one.likelihood
            add_own({"row": own.row, "nll": own.nll, "tokens": own.tokens, "hits": own.hits})
            add({"row": one.row, "kl": one.kl, "tokens": one.tokens})


def _options(model: Any, options: list[OptionRow], name: tuple[str, str], pad: int, records: Records) -> None:
    names = (*name, "options")
    known = records.done(*names)
    left = [option for option in options if option.row not in known]
    if not left:
        return
    with records.writer(*names) as add:
        made = choices(model, [option.choice for option in left], pad)
        for one in _each(made, len(left), names):
            add({"row": left[one.row].row, "logprobs": one.logprobs})


def _answers(model: Any, rows: EvalRows, name: tuple[str, str], max_new_tokens: int, records: Records) -> None:
    names = (*name, "answers")
    known = records.done(*names)
    done = {number for number, row in enumerate(rows.questions) if row in known}
    if len(done) == len(rows.questions):
        return
    special = set(special_tokens(rows.tokenizer).values())
    lengths, ends = [], set()
    for row in rows.questions:
        question = rows.question(row)
        lengths.append(question.length)
        ends |= {question.end} & special
    with records.writer(*names) as add:
        made = generate(
            model,
            Prompts(rows),
            end_tokens(model, rows.tokenizer, ends),
            rows.tokenizer.pad_token_id,
            max_new_tokens,
            done,
            lengths,
        )
        for one in _each(made, len(rows.questions) - len(done), names):
            row = rows.questions[one.row]
            add(
                {
                    "row": row,
                    "text": said(one.ids, rows.question(row).prompt, rows.tokenizer),
                    "tokens": len(one.ids) + one.ended,
                    "ended": one.ended,
                    "seconds": one.seconds,
                }
            )


def _each(made: Iterable[T], total: int, names: tuple[str, ...]) -> Iterator[T]:
    return each(made, f"{names[2]} of {names[1]} on {names[0]}", total)
