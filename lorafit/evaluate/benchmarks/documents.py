"""What the harness found, taken apart into documents."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from lorafit.evaluate.benchmarks.types import Task, TaskResult, Transform, Values
from lorafit.evaluate.results import Metric

LONGEST = 20_000
"""Characters of a text in a sample."""
_SHARES = re.compile(r"(acc|exact_match|em|f1|pass)(\W|_|$)")


def result_of(name: str, task: Task, found: dict[str, Any]) -> TaskResult:
    key = task.task_name
    samples: list[dict[str, Any]] = found["samples"][key]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    metrics: dict[str, Values] = {}
    transforms: dict[str, Transform] = {}
    infos, left_out = [], []
    shown: dict[int, dict[str, Any]] = {}
    for sample in samples:
        shown.setdefault(sample["doc_id"], _shown(task, sample))
    for kept in filters:
        of_filter = [sample for sample in samples if sample["filter"] == kept]
        for metric in dict.fromkeys(name for sample in of_filter for name in sample["metrics"]):
            label = metric if len(filters) == 1 else f"{metric} ({kept})"
            called = re.sub(r"[^A-Za-z0-9_-]+", "_", label).strip("_")
            values, transform = _values(task, metric, of_filter)
            if not _agrees(values, transform, found["results"][key].get(f"{metric},{kept}")):
                left_out.append(label)
                continue
            metrics[called], transforms[called] = values, transform
            infos.append(_info(called, label, found["higher_is_better"].get(key, {}).get(metric)))
            for document, numerator, denominator in values:
                shown[document]["scores"][called] = numerator / denominator if denominator else None
    return TaskResult(name, len(shown), metrics, transforms, tuple(infos), list(shown.values()), tuple(left_out))


def _values(task: Task, metric: str, samples: list[dict[str, Any]]) -> tuple[Values, Transform]:
    """A metric taken apart into documents, in the way its aggregation adds them up."""
    how = getattr(task.aggregation().get(metric), "__name__", "mean")
    values: Values = []
    for sample in samples:
        if metric in sample and (pair := _parts(how, sample[metric])) is not None:
            values.append((sample["doc_id"], *pair))
    return values, "exp" if how in ("perplexity", "weighted_perplexity") else "identity"


def _parts(how: str, value: Any) -> tuple[float, float] | None:
    """Numerator and denominator of one document; None if it has none."""
    try:
        match how:
            case "weighted_perplexity":
                return -float(value[0]), float(value[1])
            case "bits_per_byte":
                return -float(value[0]) / math.log(2), float(value[1])
            case "perplexity":
                return -float(value), 1.0
            case "brier_score":
                right, shares = value
                return sum((float(p) - (i == right)) ** 2 for i, p in enumerate(shares)), 1.0
            case _:
                return None if math.isnan(float(value)) else (float(value), 1.0)
    except (TypeError, ValueError, IndexError):
        return None


def _agrees(values: Values, transform: Transform, aggregated: Any) -> bool:
    """Whether the documents add up to what the harness says: else it does something else than we know of."""
    count = sum(denominator for _, _, denominator in values)
    if not count or not isinstance(aggregated, int | float):
        return False
    made = sum(numerator for _, numerator, _ in values) / count
    made = math.exp(min(made, 700.0)) if transform == "exp" else made
    return math.isclose(made, float(aggregated), rel_tol=1e-6, abs_tol=1e-9)


def _info(name: str, label: str, is_higher_better: bool | None) -> Metric:
    better: Literal["higher", "lower"] | None = None
    if is_higher_better is not None:
        better = "higher" if is_higher_better else "lower"
    unit: Literal["share", "bits", "number"] = "number"
    if _SHARES.match(name):
        unit = "share"
    elif name.startswith("bits_per_byte"):
        unit = "bits"
    return Metric(name=name, label=label.replace("_", " "), unit=unit, better=better)


def _shown(task: Task, sample: dict[str, Any]) -> dict[str, Any]:
    """A document for people."""
    arguments = [list(each) for each in sample["arguments"]]
    target: Any = sample["target"]
    replies = [reply[0] for reply in sample["resps"]]
    if task.OUTPUT_TYPE == "multiple_choice":
        options = [str(each[1]).strip() for each in arguments]
        best = max(range(len(replies)), key=lambda index: float(replies[index][0]))
        answer = options[best]
        if isinstance(target, int) and 0 <= target < len(options):
            target = options[target]
    elif task.OUTPUT_TYPE == "generate_until":
        answer = str(replies[0])
    else:
        answer = ""
    return {
        "doc_id": int(sample["doc_id"]),
        "prompt": str(arguments[0][0])[:LONGEST],
        "target": str(target)[:LONGEST],
        "answer": answer[:LONGEST],
        "scores": {},
    }
