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
Expression = tuple[float | str, ...]
"""Numbers, figures and signs in postfix order: `a.b.c + 2 * d.e.f` is ("a.b.c", 2.0, "d.e.f", "*", "+")."""
_SIGNS: dict[Any, tuple[int, Callable[[Any, Any], Any]]] = {
    "+": (1, operator.add),
    "-": (1, operator.sub),
    "*": (2, operator.mul),
    "/": (2, operator.truediv),
}
"""What a sign does, and how strongly it binds."""


def compute(expression: Expression, look_up: Callable[[str], Value]) -> Value:
    """The value of an expression, or its values by resample; not finite where it divides by zero."""
    stack: list[Any] = []
    with np.errstate(all="ignore"):
        for token in expression:
            if token in _SIGNS:
                right = stack.pop()
                stack.append(_SIGNS[token][1](stack.pop(), right))
            else:
                stack.append(np.asarray(token if isinstance(token, float) else look_up(token), dtype=np.float64))
    found: Value = stack[0]
    return found


@dataclass(frozen=True)
class Demand:
    """A gate that was read."""

    text: str
    left: Expression
    comparison: str
    right: Expression
    by_interval: bool

    def figures(self) -> list[str]:
        """The names in it, each once."""
        tokens = (*self.left, *self.right)
        return list(dict.fromkeys(one for one in tokens if isinstance(one, str) and one not in _SIGNS))

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
    if len(text) > 2000:
        raise UsageError(f"the gate {printable(text[:40])!r} … is too long ({len(text)} characters)")
    found = _CI.search(text)
    parser = _Parser(text, text[: found.start()] if found else text)
    left = parser.expression()
    comparison = parser.take("comparison", "a comparison such as >= or <")
    right = parser.expression()
    parser.take("end", "the end, or (ci)")
    demand = Demand(text, tuple(left), comparison, tuple(right), found is not None)
    if not demand.figures():
        raise UsageError(f"{printable(text)!r}: names no figure, so it says nothing of the model")
    if demand.by_interval and comparison in ("==", "!="):
        raise UsageError(f"{printable(text)!r}: (ci) goes with >=, <=, > and <, not with {comparison}")
    return demand


class _Parser:
    """A gate's tokens, from left to right."""

    def __init__(self, text: str, body: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        self.at = self.depth = place = 0
        while (found := _TOKEN.match(body, place)) and (kind := found.lastgroup):
            self.tokens.append((kind, found[kind], found.start(kind)))
            place = found.end()
        rest = body[place:].lstrip()
        self.tokens.append(("end" if not rest else "unknown", "", len(body) - len(rest)))

    def take(self, kind: str, expected: str, token: str | None = None) -> str:
        """The next token, which has to be of that kind. Raises UsageError that says what was expected."""
        found, taken, place = self.tokens[self.at]
        if found != kind or token not in (None, taken):
            raise UsageError(f"{printable(self.text)!r}: expected {expected} at column {place + 1}")
        self.at += 1
        return taken

    def expression(self, least: int = 1) -> list[float | str]:
        """The expression that follows, up to a sign that binds less strongly than `least`."""
        found = self.factor()
        while (sign := self.tokens[self.at][1]) in _SIGNS and (strength := _SIGNS[sign][0]) >= least:
            self.at += 1
            found += [*self.expression(strength + 1), sign]
        return found

    def factor(self) -> list[float | str]:
        kind, token, _ = self.tokens[self.at]
        if kind == "number":
            self.at += 1
            return [self.number(token)]
        if token in ("-", "("):
            self.at += 1
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise UsageError(f"{printable(self.text[:40])!r} …: is nested more than {MOST_DEPTH} deep")
            if token == "-":
                found = [0.0, *self.factor(), "-"]
            else:
                found = self.expression()
                self.take("sign", "a closing parenthesis", ")")
            self.depth -= 1
            return found
        self.take("figure", "a figure or a number")
        if token.count(".") != 2 + token.startswith(BASELINE):
            what = f"{token} is no figure; a figure is SET.METRIC.MODEL, such as heldout.loss.adapter"
            raise UsageError(f"{printable(self.text)!r}: {what}")
        return [token]

    def number(self, token: str) -> float:
        value = float(token.rstrip("%")) / (100 if token.endswith("%") else 1)
        if not math.isfinite(value):
            raise UsageError(f"{printable(self.text)!r}: the number {token} is out of range")
        return value


_COMPARE: dict[str, tuple[Callable[[Any, Any], Any], str, str]] = {
    ">=": (operator.ge, "{} or more", "0 or more"),
    "<=": (operator.le, "{} or less", "0 or less"),
    ">": (operator.gt, "more than {}", "above 0"),
    "<": (operator.lt, "less than {}", "below 0"),
    "==": (operator.eq, "{}", ""),
    "!=": (operator.ne, "another value than {}", ""),
}
"""How two values are compared, what is demanded then, and on which side of 0 an interval has to be."""


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

    try:
        demand.check(where, figures.keys(), baseline)
    except UsageError as error:
        passed, sentence = False, str(error).removeprefix(f"{where}: ")
    else:
        passed, sentence = _outcome(demand, value_of, drawn)
    return Gate(gate=demand.text, where=where, passed=passed, sentence=sentence)


def _outcome(demand: Demand, value_of: Callable[[str], float], drawn: Callable[[str], Value]) -> tuple[bool, str]:
    """Whether a demand is met, and the sentence about it."""
    left, right = float(compute(demand.left, value_of)), float(compute(demand.right, value_of))
    missing = [name for name in demand.figures() if not math.isfinite(value_of(name))]
    if missing:
        return False, f"{missing[0]} has no value"
    if not (math.isfinite(left) and math.isfinite(right)):
        return False, "can't be computed: it divides by zero, or is out of range"
    compare, demanded, side = _COMPARE[demand.comparison]
    shown = _sentence(demand, left, right, demanded, value_of)
    if not demand.by_interval:
        return bool(compare(left, right)), shown
    gap = _gap(demand, drawn)
    if not len(gap):
        return False, "has no interval"
    with np.errstate(all="ignore"):
        low, high = (float(end) for end in np.percentile(gap, [2.5, 97.5]))
    if not (math.isfinite(low) and math.isfinite(high)):
        share = 1 - np.isfinite(gap).mean()
        return False, f"has no 95% interval: it divides by zero, or is out of range, in {share:.2g} of the resamples"
    passed = bool(compare(low, 0.0) and compare(high, 0.0))
    alike = " (without width, as no row differs from the others)" if low == high else ""
    return passed, (
        f"{shown}; the 95% interval of left - right is [{low:.4g}, {high:.4g}]{alike}, which is "
        f"{'' if passed else 'not '}whole {side}"
    )


def _gap(demand: Demand, drawn: Callable[[str], Value]) -> Array:
    """(resamples,) left minus right where all figures have a value; infinite on the failing side if it has none."""
    values = {name: drawn(name) for name in demand.figures()}
    with np.errstate(all="ignore"):
        left, right = (compute(side, values.__getitem__) for side in (demand.left, demand.right))
        gap = np.atleast_1d(left - right)
    there = np.ones(gap.shape, dtype=bool)
    for value in values.values():
        there &= np.isfinite(value)
    worst = -math.inf if demand.comparison in (">", ">=") else math.inf
    return np.where(np.isfinite(gap), gap, worst)[there]


def _sentence(demand: Demand, left: float, right: float, demanded: str, value_of: Callable[[str], float]) -> str:
    kinds = [type(side[0]) if len(side) == 1 else None for side in (demand.left, demand.right)]
    if kinds == [str, float]:
        return f"{demand.left[0]} is {left:.4g}, and {demanded.format(f'{right:g}')} was demanded"
    shown = ", ".join(f"{name} is {value_of(name):.4g}" for name in demand.figures())
    return shown if kinds == [str, str] else f"{shown}: left is {left:.4g}, right is {right:.4g}"


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
    """Figures that a baseline has and an evaluation doesn't, or has of other rows: (name, why). The base's don't count.

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
    found = [_regression_gate(name, why) for name, why in gone.items()]
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
    if now.value is None:
        return _regression_gate(name, f"{name} has no value and was {then:.4g}")
    allowed = math.hypot(_half_width(now), _half_width(before))
    worse = (now.value - then) * (1 if is_lower_better else -1)
    sentence = f"{name} is {now.value:.4g} and was {then:.4g}; {allowed:.2g} is within noise"
    if now.rows != before.rows:
        return _regression_gate(name, f"{sentence} (other rows: {now.rows} now, {before.rows} then)")
    return _regression_gate(name, sentence, worse <= allowed)


def _regression_gate(name: str, sentence: str, passed: bool = False) -> Gate:
    return Gate(gate=f"{name} no worse than before", where="--baseline", passed=passed, sentence=sentence)


def _half_width(figure: Figure) -> float:
    return (figure.high - figure.low) / 2 if figure.low is not None and figure.high is not None else 0.0
