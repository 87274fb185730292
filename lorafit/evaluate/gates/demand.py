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
                    raise UsageError(f"{where}: {no_figure(name, known)}")
                continue
            if baseline is None:
                raise UsageError(f"{where}: {name}: there is no baseline; name an earlier results.json with --baseline")
            if name.removeprefix(BASELINE) not in baseline.figures:
                there = [BASELINE + figure for figure in baseline.figures]
                raise UsageError(f"{where}: {no_figure(name, there)}")


def no_figure(name: str, known: Collection[str]) -> str:
    """That there is none of a name, and what was probably meant."""
    mark = BASELINE * name.startswith(BASELINE)
    asked = name.removeprefix(BASELINE).split(".")
    figures = [found for figure in known if len(found := figure.removeprefix(BASELINE).split(".")) == 3]
    for index, part in enumerate(("set", "metric", "model")):
        there = list(dict.fromkeys(figure[index] for figure in figures))
        if asked[index] in there:
            continue
        meant = [*asked]
        meant[index : index + 1] = difflib.get_close_matches(asked[index], there, 1, 0.7)
        if meant in figures:
            return f"no figure '{name}'; did you mean '{mark}{'.'.join(meant)}'?"
        return f"no figure '{name}': there is no {part} {asked[index]} (there are: {', '.join(there)})"
    sets = dict.fromkeys(of_set for of_set, metric, model in figures if [metric, model] == asked[1:])
    models = dict.fromkeys(model for of_set, metric, model in figures if [of_set, metric] == asked[:2])
    where = [f"in the sets {', '.join(sets)}"] * bool(sets) + [f"of the models {', '.join(models)}"] * bool(models)
    return f"no figure '{name}': {asked[1]} is measured {' and '.join(where)}"
