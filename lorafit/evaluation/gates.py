"""Gates: what must hold of an evaluation's figures, in a small language of comparisons."""

from __future__ import annotations

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from lorafit.bounds import read_text
from lorafit.errors import UsageError
from lorafit.evaluation.results import RESULTS_VERSION, Figure, Gate, Results, Set
from lorafit.files import check_file
from lorafit.text import first_line, printable

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


MOST_DEPTH = 50
_TOKEN = re.compile(
    r"\s*(?:(?P<figure>[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*"
    # a set may begin with a digit, a metric does not: 1.5-2.5 and 1.2.3 are no figures
    r"|[0-9][A-Za-z0-9_-]*\.[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)+)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?)(?![\w.])"
    r"|(?P<comparison>>=|<=|==|!=|>|<)|(?P<sign>[-+*/()]))"
)
_CI = re.compile(r"\(\s*ci\s*\)\s*$")


def parse(text: str) -> Demand:
    """Read a gate. Raises UsageError, in one line with the column."""
    return _Parser(text).gate()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        found = _CI.search(text)
        self.by_interval = found is not None
        self.body = text[: found.start()] if found else text
        self.place = 0
        self.depth = 0

    def gate(self) -> Demand:
        if len(self.text) > 2000:
            raise UsageError(f"the gate {printable(self.text[:40])!r} … is too long ({len(self.text)} characters)")
        left = self.expression()
        before = self.place
        kind, comparison = self.take()
        if kind != "comparison":
            self.place = before
            raise self.wrong("a comparison such as >= or <")
        right = self.expression()
        if self.body[self.place :].strip():
            raise self.wrong("the end, or (ci)")
        demand = Demand(self.text, left, comparison, right, self.by_interval)
        if not demand.figures():
            raise UsageError(f"{printable(self.text)!r}: names no figure, so it says nothing of the model")
        if self.by_interval and comparison in ("==", "!="):
            raise UsageError(f"{printable(self.text)!r}: (ci) goes with >=, <=, > and <, not with {comparison}")
        return demand

    def expression(self) -> Node:
        return self._chain("+-", lambda: self._chain("*/", self.factor))

    def _chain(self, signs: str, part: Callable[[], Node]) -> Node:
        node = part()
        while True:
            before = self.place
            kind, sign = self.take()
            if kind != "sign" or sign not in signs:
                self.place = before
                return node
            node = Node(sign=sign, parts=(node, part()))

    def factor(self) -> Node:
        before = self.place
        kind, token = self.take()
        if kind == "number":
            value = float(token.rstrip("%")) / (100 if token.endswith("%") else 1)
            if not math.isfinite(value):
                raise UsageError(f"{printable(self.text)!r}: the number {token} is out of range")
            return Node(number=value)
        if kind == "figure":
            if token.count(".") != 2 + token.startswith(BASELINE):
                raise UsageError(
                    f"{printable(self.text)!r}: {token} is no figure; a figure is SET.METRIC.MODEL, such as "
                    "heldout.loss.adapter"
                )
            return Node(figure=token)
        if token in ("-", "("):
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise UsageError(f"{printable(self.text[:40])!r} …: is nested more than {MOST_DEPTH} deep")
            if token == "-":
                node = Node(sign="-", parts=(Node(number=0.0), self.factor()))
            else:
                node = self.expression()
                before = self.place
                if self.take()[1] != ")":
                    self.place = before
                    raise self.wrong("a closing parenthesis")
            self.depth -= 1
            return node
        self.place = before
        raise self.wrong("a figure or a number")

    def take(self) -> tuple[str, str]:
        """The kind and the text of the next token; empty ones at the end, or at what is none."""
        found = _TOKEN.match(self.body, self.place)
        if found is None or found.lastgroup is None:
            return "", ""
        self.place = found.end()
        return found.lastgroup, found[found.lastgroup]

    def wrong(self, expected: str) -> UsageError:
        column = len(self.body) - len(self.body[self.place :].lstrip()) + 1
        return UsageError(f"{printable(self.text)!r}: expected {expected} at column {column}")


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}
_DEMANDED = {
    ">=": "{} or more",
    "<=": "{} or less",
    ">": "more than {}",
    "<": "less than {}",
    "==": "{}",
    "!=": "another value than {}",
}


def judge(
    demand: Demand,
    where: str,
    figures: Mapping[str, float | None],
    resamples: Callable[[str], Array | None],
    baseline: Results | None = None,
) -> Gate:
    """Whether a demand is met.

    Args:
        where: it was written.
        resamples: of a figure: its value on each bootstrap resample. Figures of the baseline are fixed values.

    With `(ci)`, resamples in which a figure has no value are left out. Those in which only the expression has none, as
    it divides by zero, count against the demand: left out, they would make the interval better than it is.

    A figure that there is none of fails the gate: what was measured by then is not thrown away for it. `check` refuses
    it before.
    """
    try:
        demand.check(where, figures.keys(), baseline)
    except UsageError as error:
        return _gate(demand, where, False, str(error).removeprefix(f"{where}: "))

    def value_of(name: str) -> float:
        if name.startswith(BASELINE):
            assert baseline is not None
            found = baseline.figures[name.removeprefix(BASELINE)].value
        else:
            found = figures[name]
        return math.nan if found is None else found

    def drawn(name: str) -> Value:
        values = None if name.startswith(BASELINE) else resamples(name)
        return value_of(name) if values is None else values

    left, right = float(demand.left.compute(value_of)), float(demand.right.compute(value_of))
    missing = [name for name in demand.figures() if not math.isfinite(value_of(name))]
    if missing:
        return _gate(demand, where, False, f"{missing[0]} has no value")
    if not (math.isfinite(left) and math.isfinite(right)):
        return _gate(demand, where, False, "can't be computed: it divides by zero, or is out of range")
    if not demand.by_interval:
        passed = bool(_COMPARE[demand.comparison](left, right))
        return _gate(demand, where, passed, _sentence(demand, left, right, value_of))
    gap = _gap(demand, drawn)
    if not len(gap):
        return _gate(demand, where, False, "has no interval")
    with np.errstate(all="ignore"):
        low, high = (float(end) for end in np.percentile(gap, [2.5, 97.5]))
    if not (math.isfinite(low) and math.isfinite(high)):
        share = 1 - np.isfinite(gap).mean()
        what = f"has no 95% interval: it divides by zero, or is out of range, in {share:.2g} of the resamples"
        return _gate(demand, where, False, what)
    passed = all(bool(_COMPARE[demand.comparison](end, 0.0)) for end in (low, high))
    side = {">=": "0 or more", "<=": "0 or less", ">": "above 0", "<": "below 0"}[demand.comparison]
    shown = _sentence(demand, left, right, value_of)
    alike = " (without width, as no row differs from the others)" if low == high else ""
    return _gate(
        demand,
        where,
        passed,
        f"{shown}; the 95% interval of left - right is [{low:.4g}, {high:.4g}]{alike}, which is "
        f"{'' if passed else 'not '}whole {side}",
    )


def _gap(demand: Demand, drawn: Callable[[str], Value]) -> Array:
    """(resamples,) left minus right where all figures have a value; infinite on the failing side if it has none."""
    values = {name: drawn(name) for name in demand.figures()}
    with np.errstate(all="ignore"):
        gap = np.atleast_1d(demand.left.compute(values.__getitem__) - demand.right.compute(values.__getitem__))
    there = np.ones(gap.shape, dtype=bool)
    for value in values.values():
        there &= np.isfinite(value)
    worst = -math.inf if demand.comparison in (">", ">=") else math.inf
    return np.where(np.isfinite(gap), gap, worst)[there]


def _sentence(demand: Demand, left: float, right: float, value_of: Callable[[str], float]) -> str:
    if demand.left.figure and demand.right.number is not None:
        return (
            f"{demand.left.figure} is {left:.4g}, and {_DEMANDED[demand.comparison].format(f'{right:g}')} was demanded"
        )
    shown = ", ".join(f"{name} is {value_of(name):.4g}" for name in demand.figures())
    if demand.left.figure and demand.right.figure:
        return shown
    return f"{shown}{': ' if shown else ''}left is {left:.4g}, right is {right:.4g}"


def _gate(demand: Demand, where: str, passed: bool, sentence: str) -> Gate:
    return Gate(gate=demand.text, where=where, passed=passed, sentence=sentence)


REGRESSED = ("loss", "exact_match", "bits_per_byte")
"""Metrics that must not be worse than in the baseline."""


def load_results(path: Path) -> Results:
    """An earlier results.json. Raises UsageError, and DriftError if it was edited."""
    check_file(path, "take another baseline")
    try:
        raw = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: can't be read as results of an evaluation: {first_line(error)}") from None
    version = raw.get("results_version") if isinstance(raw, dict) else None
    if version != RESULTS_VERSION:
        raise UsageError(f"{path}: has results_version {version!r}, and this lorafit reads {RESULTS_VERSION}")
    try:
        return Results.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UsageError(f"{path}: {printable('.'.join(map(str, fault['loc'])))}: {fault['msg']}") from None


def no_longer_measured(
    known: Collection[str], sets: Mapping[str, Set], tasks: Collection[str], baseline: Results
) -> Iterator[tuple[str, str]]:
    """What a baseline measured of models other than the base and an evaluation doesn't, or on other rows: (name, why).

    Args:
        known: the evaluation's figures.
        tasks: benchmarks, of which it is not known yet what is measured.
    """
    for figure, was in baseline.figures.items():
        name, _, rest = figure.partition(".")
        its = baseline.models.get(rest.rpartition(".")[2])
        if was.value is None or its is None or its.kind == "base" or name in tasks:
            continue
        if name not in sets:
            yield name, f"the set {name} was measured and is not any more; measure it, or take a new baseline"
        elif (then := baseline.sets.get(name)) is None or sets[name].sha256 != then.sha256:
            yield name, f"the set {name} had other rows; take a baseline of the same rows"
        elif figure not in known:
            yield figure, f"{figure} was measured and is not any more; measure it, or take a new baseline"


def check_comparable(known: Collection[str], baseline: Results) -> None:
    """Raises UsageError where a baseline has a value of none of an evaluation's main figures."""
    for name, was in baseline.figures.items():
        _, _, rest = name.partition(".")
        metric, _, model = rest.partition(".")
        its = baseline.models.get(model)
        if name in known and metric in REGRESSED and was.value is not None and its is not None and its.kind != "base":
            return
    raise UsageError("--baseline: has none of this evaluation's figures, so there is nothing to compare")


def regression_gates(current: Results, baseline: Results) -> list[Gate]:
    """A gate for each main figure of the baseline: still measured, on the same rows, and not worse.

    What is allowed is the root of the summed squares of the two half widths: they are of different runs of chance.
    """
    gone = dict(no_longer_measured(current.figures, current.sets, (), baseline))
    found = [_failed(name, why) for name, why in gone.items()]
    for set_name, info in current.sets.items():
        for metric in info.metrics:
            for model, its in current.models.items():
                if metric.name not in REGRESSED or its.kind == "base" or metric.better is None:
                    continue
                now, before = (results.figure(set_name, metric.name, model) for results in (current, baseline))
                if now is not None and before is not None and before.value is not None:
                    name = f"{set_name}.{metric.name}.{model}"
                    found.append(_regression(name, now, before, before.value, metric.better == "lower"))
    return found


def _regression(name: str, now: Figure, before: Figure, then: float, is_lower_better: bool) -> Gate:
    gate, was = f"{name} no worse than before", f"was {then:.4g}"
    if now.value is None:
        return _failed(name, f"{name} has no value and {was}")
    allowed = math.hypot(_half_width(now), _half_width(before))
    worse = (now.value - then) * (1 if is_lower_better else -1)
    sentence = f"{name} is {now.value:.4g} and {was}; {allowed:.2g} is within noise"
    if now.rows != before.rows:
        return _failed(name, f"{sentence} (other rows: {now.rows} now, {before.rows} then)")
    return Gate(gate=gate, where="--baseline", passed=worse <= allowed, sentence=sentence)


def _failed(name: str, sentence: str) -> Gate:
    return Gate(gate=f"{name} no worse than before", where="--baseline", passed=False, sentence=sentence)


def _half_width(figure: Figure) -> float:
    return (figure.high - figure.low) / 2 if figure.low is not None and figure.high is not None else 0.0
