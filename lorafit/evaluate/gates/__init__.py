"""Gates: what must hold of an evaluation's figures, in a small language of comparisons."""

from __future__ import annotations

from lorafit.evaluate.gates.baseline import check_comparable, load_results, no_longer_measured, regression_gates
from lorafit.evaluate.gates.demand import Demand
from lorafit.evaluate.gates.grammar import parse
from lorafit.evaluate.gates.judging import judge

__all__ = ["Demand", "check_comparable", "judge", "load_results", "no_longer_measured", "parse", "regression_gates"]
