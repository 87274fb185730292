"""An earlier evaluation, and that nothing is worse than in it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from pydantic import ValidationError

from lorafit.bounds import read_text
from lorafit.errors import UsageError, first_line, printable
from lorafit.evaluate.results import RESULTS_VERSION, Figure, Gate, Results, Set
from lorafit.files import check_file

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
