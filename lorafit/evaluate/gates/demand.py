"""A gate that was read: two expressions, and how they are compared."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorafit.errors import UsageError
from lorafit.evaluate.results import Results

Array = np.ndarray[Any, Any]
Value = float | Array
BASELINE = "baseline."
_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


@dataclass(frozen=True)
class Node:
    """An expression: a number, a figure, or two expressions with an operator between."""

    number: float | None = None
    figure: str | None = None
    sign: str = ""
    parts: tuple[Node, ...] = ()

    def figures(self) -> Iterator[str]:
        first, *rest = self._chain()
        if first.figure is not None:
            yield first.figure
        for node in rest:
            yield from node.parts[1].figures()

    def compute(self, look_up: Callable[[str], Value]) -> Value:
        first, *rest = self._chain()
        found: Value = look_up(first.figure) if first.figure is not None else first.number or 0.0
        for node in rest:
            other = node.parts[1].compute(look_up)
            with np.errstate(all="ignore"):
                found = _COMBINE[node.sign](np.float64(found) if isinstance(found, float) else found, other)
        return found

    def _chain(self) -> list[Node]:
        """The leftmost number or figure, and what is done to it step by step: in `a + b - c` that is a, a + b, all.

        A gate has room for hundreds of operators in a row, which are too many for a recursion.
        """
        nodes = [self]
        while nodes[-1].parts:
            nodes.append(nodes[-1].parts[0])
        return nodes[::-1]


@dataclass(frozen=True)
class Demand:
    """A gate that was read."""

    text: str
    left: Node
    comparison: str
    right: Node
    by_interval: bool

    def figures(self) -> list[str]:
        """The names in it, each once."""
        return list(dict.fromkeys((*self.left.figures(), *self.right.figures())))

    def check(self, where: str, known: Collection[str], baseline: Results | None) -> None:
        """Raises UsageError if a figure is not among the known ones, or not in the baseline."""
        for name in self.figures():
            if not name.startswith(BASELINE):
                if name not in known:
                    raise unknown_figure(where, name, known)
                continue
            if baseline is None:
                raise UsageError(f"{where}: {name}: there is no baseline; name an earlier results.json with --baseline")
            if name.removeprefix(BASELINE) not in baseline.figures:
                raise unknown_figure(where, name, [BASELINE + figure for figure in baseline.figures])


def unknown_figure(where: str, name: str, known: Collection[str]) -> UsageError:
    alike = difflib.get_close_matches(name, list(known), 1, 0.8)
    what = f"; did you mean '{alike[0]}'?" if alike else ""
    parts = [figure.removeprefix(BASELINE).split(".") for figure in known]
    for part, index in (("set", 0), ("metric", 1), ("model", 2)):
        value = name.removeprefix(BASELINE).split(".")[index]
        there = list(dict.fromkeys(figure[index] for figure in parts if len(figure) == 3))
        if value not in there:
            what = what or f": there is no {part} {value} (there are: {', '.join(there)})"
            break
    return UsageError(f"{where}: no figure '{name}'{what}")
