"""Words and figures that are needed in many places: amounts, values on one line, and names that are near another."""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

MIB = 1 << 20
GIB = 1 << 30


_HARMLESS = "\n\t\u200c\u200d"
"""What is no printable character, and harmless: line breaks, tabs, and what holds scripts and emojis together."""


def printable(text: str) -> str:
    """The text on one line: control characters, line breaks and lone surrogates are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def harmless(text: str) -> str:
    """The text with control characters escaped, as a terminal may act on them; line breaks, tabs and spaces stay."""
    if text.isprintable():
        return text
    return "".join(c if c in _HARMLESS or unicodedata.category(c) == "Zs" else printable(c) for c in text)


def first_line(error: object) -> str:
    """The first line of an error's text, printable."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__))


def near(name: str, modules: Iterable[str]) -> str:
    """A question after names like this one, or the list of those that there are."""
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    near = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else f"; there are {', '.join(leaves)}"


def gib(size: int) -> str:
    """An amount of bytes in GiB, without the unit."""
    return f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def clipped(text: str, most: int) -> str:
    """The text, or so many characters of it, of which the last says that there is more."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def markdown(text: str, most: int = 300) -> str:
    """Text that is nothing but text in a cell of a Markdown table."""
    text = clipped(" ".join(text.split()), most)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#@!])", r"\\\1", text)


def markdown_table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table, whose cells are Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


_MOST = 300
"""Characters of a value in a table."""


def brief(value: Any) -> str:
    """A value as YAML would have it, on one line."""
    if isinstance(value, str):
        plain = value.isprintable() and value != "" and value == value.strip()
        text = value if plain else json.dumps(value, ensure_ascii=False)
    elif isinstance(value, dict) and value:
        text = f"{{{', '.join(f'{key}: {brief(item)}' for key, item in value.items())}}}"
    elif isinstance(value, list) and value:
        text = f"[{', '.join(map(brief, value))}]"
    elif isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    else:
        text = json.dumps(value, ensure_ascii=False)
    return clipped(printable(text), _MOST)
