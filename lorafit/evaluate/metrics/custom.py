"""Metrics of the user's own: a Python function named in the recipe as `module:function`."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

from lorafit.errors import UsageError, first_line, printable
from lorafit.evaluate.metrics.types import AnswerMetric, Judged
from lorafit.evaluate.results import Metric

_SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[A-Za-z_][A-Za-z0-9_]*")
_SHOWN = 60


def custom_metric(spec: str) -> AnswerMetric:
    """The metric of a function that is named `module:function`, found from the working directory as by `python -m`.

    This imports and runs the user's own code, with all rights of this process: the recipe names it, and says that it is
    trusted (eval.trust_code), as lorafit.recipe.checks sees to.
    It is called with (answer, expected, row) if it takes three arguments, else with (answer, expected), and returns a
    number, a bool or None (the row has no value). The figure has the function's name. It is called once for an answer
    to a row, so that figures and samples agree even if it asks a service or draws lots.

    Raises UsageError if it can't be imported; the metric does if it fails, or returns anything else.
    """
    if not _SPEC.fullmatch(spec):
        raise UsageError(f"metric '{spec}': a metric of your own is named module:function, in letters, digits and _")
    function = _load(spec)
    takes_row = _takes(function, 3)
    if not takes_row and not _takes(function, 2):
        raise UsageError(f"metric {spec}: it has to take (answer, expected) or (answer, expected, row)")

    known: dict[tuple[str, ...], float | None] = {}
    types: set[type] = set()

    def score(judged: Judged) -> float | None:
        key = (judged.answer, judged.expected, judged.prompt, repr(judged.row))
        if key not in known:
            known[key] = fresh(judged)
        return known[key]

    def fresh(judged: Judged) -> float | None:
        given = (judged.answer, judged.expected, judged.row)[: 3 if takes_row else 2]
        try:
            value = function(*given)
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"metric {spec} failed on {_place(judged)}: {what}") from error
        types.update({type(value)} if value is not None else ())
        return _number(value, spec, judged)

    name = spec.partition(":")[2]
    info = Metric(name=name, label=name.replace("_", " "), unit="number", better=None)
    return AnswerMetric(info, score, lambda: types == {bool})


def _load(spec: str) -> Callable[..., Any]:
    module, _, name = spec.partition(":")
    try:
        with _working_directory():
            found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"metric {spec}: {module} can't be imported: {what}") from error
    if not callable(found):
        raise UsageError(f"metric {spec}: {module} has no function {name}")
    return found


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _number(value: Any, spec: str, judged: Judged) -> float | None:
    if value is None:
        return None
    with contextlib.suppress(OverflowError):
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
    shown = printable(repr(value))[:_SHOWN]
    raise UsageError(
        f"metric {spec} returned {shown} on {_place(judged)}; it must return a finite number, bool or None"
    )


def _place(judged: Judged) -> str:
    prompt = printable(" ".join(judged.prompt.split()))
    return f"the row with the prompt '{prompt[:_SHOWN]}{'…' if len(prompt) > _SHOWN else ''}'"
