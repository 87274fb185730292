"""What is asked of lm-evaluation-harness, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lorafit.evaluate.results import Metric

Task: TypeAlias = Any
"""A task of the harness, its documents loaded."""
Manager: TypeAlias = Any
"""A TaskManager of the harness."""
Values: TypeAlias = list[tuple[int, float, float]]
"""(document, numerator, denominator), documents from 0."""
Transform = Literal["identity", "exp"]


@dataclass(frozen=True)
class Benchmarks:
    """What is asked for.

    Attributes:
        tasks: names of tasks, groups or tags; YAML files; folders of them.
        include_path: a folder with further tasks that are known by name.
        num_fewshot: solved examples before each document. None: as the task says.
        limit: documents of each task, from the first. None: all.
        trust_code: whether a local task may bring Python code.
        batch_size: at most; less where that doesn't fit into memory.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    trust_code: bool = False
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class TaskResult:
    """What a model did on a task.

    Attributes:
        task: as in figures.
        rows: documents that were asked.
        metrics: by metric: a figure is the sum of the numerators by that of the denominators, then `transforms`.
        transforms: by metric; `exp` of perplexities.
        samples: a document each: doc_id, prompt, target, answer, scores (by metric).
        left_out: metrics that are no mean over documents, such as a corpus's BLEU.
    """

    task: str
    rows: int
    metrics: dict[str, Values]
    transforms: dict[str, Transform]
    infos: tuple[Metric, ...]
    samples: list[dict[str, Any]]
    left_out: tuple[str, ...] = ()
