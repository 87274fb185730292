"""The part of Go's templates that our Modelfiles use, rendered here so that they can be checked.

Text; `{{ .Field }}`, `{{ $.Field }}`, `{{ "text" }}`; `if`, `else if`, `else`, `range $i, $_ := .List`, `end`; the
functions eq, and, not, len, slice, sub-expressions in parentheses. Meanings: https://pkg.go.dev/text/template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ACTION = re.compile(r'\{\{((?:"(?:\\.|[^"\\])*"|[^"{}])*)\}\}', re.DOTALL)
_WORD = re.compile(r'"(?:\\.|[^"\\])*"|[()]|[^\s()]+')


def quoted(text: str) -> str:
    """Text as it stands in a template: as it is, with `{{` written as an action."""
    return text.replace("{{", '{{ "{{" }}')


def render(template: str, data: dict[str, Any]) -> str:
    """Render a template with fields. Raises ValueError for what isn't in the part."""
    parts = list(_split(template))
    end, nodes = _parse(parts, 0)
    if end != len(parts):
        raise ValueError("an end or else without its if")
    return "".join(_render(nodes, data, {"$": data}))


@dataclass
class _Text:
    text: str


@dataclass
class _Show:
    words: list[str]


@dataclass
class _If:
    branches: list[tuple[list[str] | None, list[Any]]]


@dataclass
class _Range:
    names: list[str]
    words: list[str]
    body: list[Any]


def _split(template: str) -> Iterator[str | list[str]]:
    """Texts, and actions as lists of words."""
    at = 0
    for match in _ACTION.finditer(template):
        if match.start() > at:
            yield template[at : match.start()]
        yield _WORD.findall(match[1])
        at = match.end()
    if at < len(template):
        yield template[at:]


def _parse(parts: list[str | list[str]], at: int) -> tuple[int, list[Any]]:
    """Nodes up to the `else` or `end` at the place that is returned."""
    nodes: list[Any] = []
    while at < len(parts):
        part = parts[at]
        if isinstance(part, str):
            nodes.append(_Text(part))
        elif part[:1] in (["else"], ["end"]):
            break
        elif part[0] == "if":
            branches: list[tuple[list[str] | None, list[Any]]] = []
            condition: list[str] | None = part[1:]
            while True:
                at, body = _parse(parts, at + 1)
                branches.append((condition, body))
                word = parts[at]
                if word == ["end"]:
                    break
                condition = list(word[2:]) if word[1:2] == ["if"] else None
            nodes.append(_If(branches))
        elif part[0] == "range":
            head, _, source = " ".join(part[1:]).rpartition(":=")
            at, body = _parse(parts, at + 1)
            nodes.append(_Range([name for name in re.split(r"[,\s]+", head) if name], source.split(), body))
        else:
            nodes.append(_Show(part))
        at += 1
    return at, nodes


def _render(nodes: list[Any], dot: Any, names: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, _Text):
            yield node.text
        elif isinstance(node, _Show):
            yield str(_value(list(node.words), dot, names))
        elif isinstance(node, _If):
            for condition, body in node.branches:
                if condition is None or _value(list(condition), dot, names):
                    yield from _render(body, dot, names)
                    break
        else:
            for index, item in enumerate(_value(list(node.words), dot, names)):
                inner = dict(zip(node.names, (index, item), strict=False))
                yield from _render(node.body, item, names | inner)


def _value(words: list[str], dot: Any, names: dict[str, Any]) -> Any:
    """One call or operand: takes its words from the list, up to its end or a closing parenthesis."""
    operands = []
    while words and words[0] != ")":
        word = words.pop(0)
        if word == "(":
            operands.append(_value(words, dot, names))
            words.pop(0)
        else:
            operands.append(_operand(word, dot, names))
    function, *given = operands
    return function(*given) if callable(function) else function


def _operand(word: str, dot: Any, names: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return json.loads(word)
    if word.isdigit():
        return int(word)
    if word.startswith("."):
        return dot[word[1:]]
    if word.startswith("$"):
        name, _, field = word.partition(".")
        return names[name][field] if field else names[name]
    if word in _FUNCTIONS:
        return _FUNCTIONS[word]
    raise ValueError(f"{word!r} is not known")


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


_FUNCTIONS: dict[str, Any] = {
    "eq": lambda first, *others: first in others,
    "and": _and,
    "not": lambda value: not value,
    "len": len,
    "slice": lambda values, begin: values[begin:],
}
