"""The shape of rows whose columns are called otherwise than a format's: by names, by what is in them, or left open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from lorafit.errors import DataError
from lorafit.rows import Format, Row, detect_format
from lorafit.rows.cells import Cells, brief, is_turn, names

NAMES: dict[str, tuple[str, ...]] = {
    "instruction": (
        *("question", "query", "instruction", "prompt", "problem", "task", "request", "user", "human", "q", "title"),
        *("frage", "anweisung", "aufgabe", "anfrage", "pregunta", "instruccion", "consulta", "demande", "consigne"),
    ),
    "output": (
        *("answer", "response", "output", "completion", "solution", "reply", "target", "assistant", "answers", "a"),
        *("summary", "antwort", "ausgabe", "lösung", "loesung", "respuesta", "salida", "réponse", "reponse", "sortie"),
    ),
    "input": (
        *("context", "input", "passage", "document", "article", "body", "kontext", "eingabe", "zusammenhang", "text"),
        *("contexto", "entrada", "contexte", "entrée", "entree"),
    ),
    "system": ("system", "system_prompt", "system_message"),
}
"""What columns are called by a question and its answer (in English, German, Spanish and French), likeliest first."""
OPEN = "???"
"""Stands for a column that only a person can name: no file has one of that name, so that `validate` refuses it."""
FINAL = "#### (-?[0-9.,]+)"
"""How GSM8K and data sets like it mark the number that an answer comes to."""


NO_TEXTS = ("id", "uid", "uuid", "idx", "index", "url", "date", "timestamp", "source", "split", "lang", "language")
"""What columns are called that hold text which is not to be learned."""
DEEPEST = 3


@dataclass(frozen=True)
class Guess:
    """How rows are to be read.

    Attributes:
        why: why the format is so.
        check: what a person should look at, for no name says it; empty where names do.
        remarks: what of the rows is not read, a sentence each.
    """

    format: Format
    columns: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    check: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether a column is left for a person to name."""
        return OPEN in self.columns.values()


def guess(rows: Sequence[Row], format: str | None, columns: Mapping[str, str], template: str | None) -> Guess:
    """How the first rows of a source are to be read, by what was said of them and what they are.

    Raises DataError where what was said does not fit the rows.
    """
    cells = Cells(rows[0], columns, None, "--columns")
    for name, path in columns.items():
        if not cells.has(name):
            there = names(path for path, _ in _leaves(rows[0].fields))
            raise DataError(f"{rows[0].place}: --columns {name}={path}: there is no such column (there are {there})")
    if format == "alpaca" and not {"instruction", "output"} <= {*columns, *rows[0].fields} and (pair := _pair(rows)):
        columns = {**pair.columns, **columns}
    if format is not None:
        return Guess(cast(Format, format), columns, "as --format says")
    try:
        found, why = detect_format(rows[0], columns, template)
    except DataError:
        if columns or template:
            raise
        return _chat(rows) or _pair(rows) or _text(rows) or _open(rows)
    return Guess(found, columns, why)


def _chat(rows: Sequence[Row]) -> Guess | None:
    for path, value in _leaves(rows[0].fields):
        turns = value if isinstance(value, list) else []
        if turns and all(isinstance(turn, dict) and is_turn(turn) for turn in turns):
            return Guess("messages", {"messages": path}, f"turns of a conversation are in {brief(path)}")
    return None


def _pair(rows: Sequence[Row]) -> Guess | None:
    """A question and its answer, by the names of their columns; of two texts without, the longer is the answer."""
    texts = dict(_texts(rows))
    columns = dict(_named(rows))
    if "instruction" not in columns and "input" in columns:
        columns["instruction"] = columns.pop("input")
    check = ""
    if not {"instruction", "output"} <= columns.keys():
        if len(texts) != 2:
            return None
        by_length = sorted(texts, key=lambda path: texts[path])
        question = columns.get("instruction") or next(one for one in by_length if one != columns.get("output"))
        answer = columns.get("output") or next(one for one in reversed(by_length) if one != question)
        columns = {"instruction": question, "output": answer}
        check = "check: their names don't say which is the question and which the answer"
    said = " and ".join(brief(columns[name]) for name in ("instruction", "output"))
    return Guess("alpaca", columns, f"a question and its answer: {said}", check, tuple(_lost(rows, columns.values())))


def _by_name(paths: list[str]) -> Iterator[tuple[str, str]]:
    left = dict.fromkeys(paths)
    for column, known in NAMES.items():
        inner = {path: [part.lower() for part in reversed(path.split(".")) if not part.isdecimal()] for path in left}
        own = (path for name in known for path, parts in inner.items() if parts[0] == name)
        around = (path for name in known for path, parts in inner.items() if name in parts)
        if found := next(own, None) or next(around, None):
            del left[found]
            yield column, found


def _text(rows: Sequence[Row]) -> Guess | None:
    texts = list(_texts(rows))
    if len(texts) != 1 or not {"instruction", "output"}.isdisjoint(dict(_named(rows))):
        return None
    ((path, _),) = texts
    return Guess("text", {"text": path}, f"the only text is {brief(path)}", "check: is it to be learned as it is?")


def _open(rows: Sequence[Row]) -> Guess:
    """A recipe that `validate` refuses at the column that a person has to name."""
    known = {name: path for name, path in _named(rows) if name in ("instruction", "output")}
    columns = {"instruction": OPEN, "output": OPEN} | known
    check = f"open: name the columns of the question and the answer; there are {names(rows[0].fields)}"
    return Guess("alpaca", columns, "a guess: no column's name says what it is", check)


def _leaves(fields: Mapping[str, Any], before: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """The cells of a row by their paths; of a list, the first item's."""
    for name, value in fields.items():
        path = f"{before}{name}"
        yield path, value
        first = value[0] if isinstance(value, list) and value else None
        if depth < DEEPEST and isinstance(value, dict):
            yield from _leaves(value, f"{path}.", depth + 1)
        elif depth < DEEPEST and isinstance(first, dict) and not is_turn(first):
            yield from _leaves(first, f"{path}.0.", depth + 1)
        elif isinstance(first, str):
            yield f"{path}.0", first


def _named(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """The columns that are called as a format's are, of what is text or a number somewhere.

    An answer that is null or a number in some rows is an answer all the same: what is wrong with them is said.
    """
    found = [dict(_leaves(row.fields)) for row in rows]
    paths = dict.fromkeys(path for one in found for path, value in one.items() if isinstance(value, str | int | float))
    for column, path in _by_name(list(paths)):
        if column in ("instruction", "output") or all(path in one for one in found):
            yield column, path


def _texts(rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
    """The paths of what is text in most rows, with its average length."""
    lengths: dict[str, list[int]] = {}
    for row in rows:
        for path, value in _leaves(row.fields):
            if isinstance(value, str) and path.lower() not in NO_TEXTS:
                lengths.setdefault(path, []).append(len(value))
    for path, found in lengths.items():
        if 2 * len(found) > len(rows):
            yield path, sum(found) / len(found)


def _lost(rows: Sequence[Row], paths: Iterable[str]) -> Iterator[str]:
    """What is said of lists of which the first item alone is read."""
    for outer in dict.fromkeys(path.partition(".0")[0] for path in paths if ".0" in path):
        more = sum(len(value) > 1 for row in rows for path, value in _leaves(row.fields) if path == outer)
        if more:
            yield f"{more} of the first {len(rows)} rows have several {brief(outer)}, of which the first is read"


def final_answers(answers: Sequence[str]) -> str | None:
    """The expression that finds what answers come to, where most of them mark it as GSM8K does."""
    marked = sum(re.search(FINAL, answer) is not None for answer in answers)
    return FINAL if answers and marked > 0.9 * len(answers) else None
