"""Benchmarks of lm-evaluation-harness, on a model that is in memory already."""

from __future__ import annotations

from lorafit.evaluate.benchmarks.running import check, look, run
from lorafit.evaluate.benchmarks.types import Benchmarks, TaskResult

__all__ = ["Benchmarks", "TaskResult", "check", "look", "run"]
