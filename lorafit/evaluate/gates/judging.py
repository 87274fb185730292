"""Whether a gate's demand is met, by the figures or by their resamples."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorafit.errors import UsageError
from lorafit.evaluate.gates.demand import BASELINE, Array, Demand, Value
from lorafit.evaluate.results import Gate, Results

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
