"""Sets as their scores need them, and the figures that will come of them: known before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorafit.evaluate.assemble import (
    ACCURACY,
    ACCURACY_NORM,
    AGREEMENT,
    ENDED,
    JUDGE,
    KL,
    LENGTH,
    LIKELIHOOD,
    MACRO_F1,
    Question,
    Rows,
)
from lorafit.evaluate.contenders import BASE, Contender
from lorafit.evaluate.metrics import default_metrics, make_metrics
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


def scored_rows(
    rows: EvalRows, section: dict[str, Any], options: Iterable[OptionRow], main: str | None, names: list[str]
) -> Rows:
    """A set with its metrics, for the models of these names. Raises UsageError for a metric that there is none of."""
    asked = rows.spec["metrics"] or section["metrics"]
    specs = asked or default_metrics(rows.question(row).expected for row in rows.questions)
    metrics = make_metrics(specs) if rows.questions else ()
    own = any(isinstance(spec, str) and ":" in spec for spec in specs)
    raw = {index: row.fields for index, row, _ in raw_rows(rows)} if own and rows.questions else {}
    fixed = tuple(rows.spec["options"]) if isinstance(rows.spec["options"], list) else None
    infos: list[Metric] = [*LIKELIHOOD]
    if rows.role == "forgetting":
        infos.append(KL)
    if rows.spec["options"] and rows.questions:
        infos += [ACCURACY, ACCURACY_NORM, *([MACRO_F1] if fixed else [])]
    if rows.questions:
        infos += [metric.info for metric in metrics] + [ENDED, LENGTH]
        infos += [AGREEMENT] if main and set(names) - {BASE, main} else []
        infos += [JUDGE] if section["judge"] and BASE in names else []
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
            metrics=tuple(infos),
        ),
        count=len(rows.rows),
        sizes=rows.sizes,
        questions=questions,
        options={option.row: (option.options, option.expected) for option in options},
        fixed=fixed,
        answer_metrics=metrics,
        main=main,
        place=place,
        shown=shown,
    )


def expected_figures(sets: list[Rows], contenders: list[Contender], main: str | None) -> list[str]:
    """The names of all figures that the sets will have."""
    found, names = [], [contender.name for contender in contenders]
    for rows in sets:
        for metric in rows.info.metrics:
            for contender in contenders:
                if metric == KL and contender.kind != "adapter":
                    continue
                if metric == AGREEMENT and contender.name in (BASE, main):
                    continue
                if metric == JUDGE and (contender.name == BASE or BASE not in names):
                    continue
                found.append(f"{rows.name}.{metric.name}.{contender.name}")
    return found
