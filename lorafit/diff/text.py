"""A difference for terminals and for pull requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from lorafit.diff.consequences import Consequence, Difference, Many
from lorafit.diff.recipes import Change
from lorafit.recipe.load import section_at
from lorafit.text import brief, gib, markdown_table, printable
from lorafit.text import markdown as escaped
from lorafit.written import hidden_in

MOST_VALUE, MOST_ROWS = 160, 150
"""Characters of a value and rows of a table for a pull request, whose comments have room for 65,536 characters."""
WIDEST = 40
"""Columns of a cell in a terminal."""
UNKNOWN, NONE = "not known", "none"


def text(found: Difference) -> str:
    """Lines for a terminal or a log."""
    head = f"{printable(found.before)} -> {printable(found.after)}"
    if not found.changes:
        return "\n".join([f"{head}: the same after extends and defaults", *_indented(found.remarks)])
    lines = [head, "", "changes"]
    lines += _changes(found.changes)
    lines += ["", "consequences"]
    lines += _columns(
        [(one.name, figure(one, one.before), "->", figure(one, one.after), change(one)) for one in found.consequences]
    )
    lines += [f"  {line}" for line in found.unknown]
    if found.followers:
        lines += ["", "what auto makes of it"]
        lines += _columns([(one.key, brief(one.before), "->", brief(one.after), one.reason) for one in found.followers])
    if found.warnings:
        lines += ["", "warnings", *(f"  {printable(one.text)}" for one in found.warnings)]
    return "\n".join([*lines, *([""] if found.remarks else []), *_indented(found.remarks)])


def markdown(found: Difference) -> str:
    """For a comment on a pull request. Everything that comes from recipes is escaped."""
    head = f"### Recipe: {_code(found.before)} → {_code(found.after)}"
    remarks = [f"<sub>{_safe(line)}</sub>" for line in found.remarks]
    if not found.changes:
        return "\n".join([f"{head}", "", "The same after `extends` and defaults.", *_apart(remarks)]) + "\n"
    rows = [[_code(one.key), *_sides(one, _code)] for one in found.changes]
    lines = [head, "", *_table(["changed", "before", "after"], rows)]
    figures = [
        [_safe(one.name), _safe(figure(one, one.before)), _safe(figure(one, one.after)), _safe(change(one))]
        for one in found.consequences
    ]
    lines += ["", *_table(["consequence", "before", "after", "change"], figures)]
    lines += _apart([_safe(line) for line in found.unknown])
    if found.followers:
        rows = [
            [_code(one.key), _code(brief(one.before)), _code(brief(one.after)), _safe(one.reason)]
            for one in found.followers
        ]
        lines += ["", *_table(["follows from auto", "before", "after", "because"], rows)]
    if found.warnings:
        lines += ["", "**Warnings**", "", *(f"- {_safe(one.text, 1000)}" for one in found.warnings)]
    return "\n".join([*lines, *_apart(remarks)]) + "\n"


def figure(one: Consequence, value: Any) -> str:
    """A value in its unit."""
    if value is None:
        return UNKNOWN
    if one.unit == "bytes":
        return f"{gib(value)} GiB"
    if one.unit == "text":
        return printable(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def change(one: Consequence) -> str:
    """How much more or less, in percent."""
    if one.before is None or one.after is None:
        return ""
    if one.before == one.after:
        return "same"
    return "" if one.change is None else f"{one.change:+.1%}"


def _sides(one: Change, dress: Callable[[str], str] = str) -> tuple[str, str]:
    """What a value was, and what it is."""
    before = _dressed(one, one.before, one.after, one.meant_before, dress)
    return before, _dressed(one, one.after, one.before, one.meant_after, dress)


def _dressed(one: Change, value: Any, other: Any, meant: Any, dress: Callable[[str], str]) -> str:
    """A value, without what is at its default; of two lists only the items that the other doesn't have."""
    path = tuple(one.path.split("."))
    if isinstance(value, list) and isinstance(other, list) and section_at(path) is None:
        own = [item for item in value if item not in other]
        rest = ["…"] if own and len(own) < len(value) else []
        value = [*own, *rest] or value
    shown = NONE if value is None else dress(brief(without_defaults(value, path)))
    return shown + (f" (= {dress(brief(meant))})" if meant is not None else "")


def without_defaults(value: Any, path: tuple[str, ...]) -> Any:
    """A section, or a list of them, with what was written alone."""
    section = section_at(path)
    if isinstance(value, list) and section is not None:
        return [without_defaults(item, path) for item in value]
    if not isinstance(value, dict) or section is None:
        return value
    kept = {}
    for name, item in value.items():
        field = section.model_fields[name]
        default = ... if field.is_required() else field.get_default(call_default_factory=True)
        if item != _plain(default):
            kept[name] = without_defaults(item, (*path, name))
    return kept


def _plain(default: Any) -> Any:
    """A default as a recipe's JSON has it."""
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json")
    return list(default) if isinstance(default, tuple) else default


def _changes(changes: tuple[Change, ...]) -> Iterator[str]:
    """Each on a line, or on two where they would be long."""
    rows = [(one.key, before, "->", after) for one in changes for before, after in [_sides(one)]]
    short = [row for row in rows if max(map(len, row)) <= WIDEST]
    aligned = dict(zip((row[0] for row in short), _columns(short), strict=True))
    for key, before, _, after in rows:
        if key in aligned:
            yield aligned[key]
        else:
            yield from (f"  {key}", f"    before  {before}", f"    after   {after}")


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows as aligned columns; the last column is as wide as it likes."""
    widths = [min(max(len(row[n]) for row in rows), WIDEST) for n in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        yield f"  {'  '.join([*cells, row[-1]])}".rstrip()


def _indented(lines: tuple[str, ...]) -> list[str]:
    return [f"note: {line}" for line in lines]


def _apart(lines: list[str]) -> list[str]:
    return [part for line in lines for part in ("", line)]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    more = len(rows) - MOST_ROWS
    shown = markdown_table(head, rows[:MOST_ROWS])
    return shown + ([f"| … and {more} more |{' |' * (len(head) - 1)}"] if more > 0 else [])


def _safe(value: str, most: int = 300) -> str:
    return escaped(printable(" ".join(value.split())), most)


def _code(value: str) -> str:
    """Text in the type of code, as HTML: a backtick in it would end Markdown's own, and a bar a cell."""
    return f"<code>{_safe(value, MOST_VALUE)}</code>"


FORMATS = ("text", "markdown", "json")


def shown(found: Difference | Many, format: str) -> str:
    """One or many differences in one of FORMATS."""
    if format == "json":
        return json.dumps(hidden_in(found.as_dict()), indent=2, ensure_ascii=False)
    if isinstance(found, Many):
        return many_text(found) if format == "text" else many_markdown(found)
    return text(found) if format == "text" else markdown(found).rstrip("\n")


def many_text(found: Many) -> str:
    parts = [text(one) for one in found.changed]
    lines = [f"{printable(file)}: {what}" for file, what in found.others]
    lines += [f"{printable(file)}: the same" for file in found.same]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def many_markdown(found: Many) -> str:
    if not found.differs:
        return f"### Recipes\n\nNone differs from `{printable(found.revision)}`."
    parts = [markdown(one).rstrip("\n") for one in found.changed]
    lines = [f"- `{printable(file).replace('`', '')}`: {what}" for file, what in found.others]
    return "\n\n".join([*parts, *(["### Other recipes\n\n" + "\n".join(lines)] if lines else [])])
