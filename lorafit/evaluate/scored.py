"""Sets as their scores need them, and what is measured of them: known before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorafit.evaluate.assemble import BASE, Question, Rows, set_metrics
from lorafit.evaluate.metrics import MetricSpec, default_metrics, make_metrics, metric_info
from lorafit.evaluate.results import Metric
from lorafit.evaluate.results import Set as SetInfo
from lorafit.evaluate.sets import EvalRows, OptionRow, raw_rows
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
