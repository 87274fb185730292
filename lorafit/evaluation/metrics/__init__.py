"""Metrics of generated answers against expected ones, row by row. Light."""

from __future__ import annotations

from lorafit.evaluation.metrics.known import (
    METRICS,
    POSSIBLE_DEFAULTS,
    KnownMetric,
    MetricSpec,
    check_metric,
    default_metrics,
    make_metric,
    make_metrics,
    metric_info,
)
from lorafit.evaluation.metrics.metric import AnswerMetric, Judged

__all__ = [
    "METRICS",
    "POSSIBLE_DEFAULTS",
    "AnswerMetric",
    "Judged",
    "KnownMetric",
    "MetricSpec",
    "check_metric",
    "default_metrics",
    "make_metric",
    "make_metrics",
    "metric_info",
]
