"""Benchmarks of lm-evaluation-harness on a model that is in memory. Needs the extra `lm-eval`."""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lorafit.errors import DataError, UsageError, first_line
from lorafit.evaluate.results import Metric

MOST_TEXT = 20_000
"""Characters of a text that is kept of a sample."""
_FUNCTION = re.compile(r"!function\b|!!python|^\s*class\s*:", re.MULTILINE)
_INCLUDE = re.compile(r"^\s*include\s*:\s*['\"]?([^'\"\s#]+)", re.MULTILINE)
_PERPLEXITY = ("word_perplexity", "byte_perplexity", "perplexity")


@dataclass(frozen=True)
class Benchmarks:
    """What is asked of the harness; see LmEvalSection of the recipe."""

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    trust_code: bool = False
    seed: int = 0


@dataclass(frozen=True)
class TaskResult:
    """A task on one model.

    Attributes:
        task: its name, fit for figures.
        metrics: by name: (document, numerator, denominator), which are summed over documents.
        exponential: metrics that are exp of that quotient, such as perplexity.
        samples: by document, what was asked and answered, and its scores.
        remarks: metrics that are left out, and why.
    """

    task: str
    rows: int
    metrics: dict[str, list[tuple[int, float, float]]]
    infos: tuple[Metric, ...]
    exponential: tuple[str, ...] = ()
    samples: list[dict[str, Any]] = field(default_factory=list)
    remarks: tuple[str, ...] = ()


def check(asked: Benchmarks) -> None:
    """Before a model is loaded: that the harness is installed and the tasks and their data are there.

    Raises UsageError, and DataError for data that can't be had, such as a hub's when offline.
    """
    with _silent():
        _load(asked)


def run(asked: Benchmarks, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> list[TaskResult]:
    """All tasks on a model, which may be a PeftModel. Raises as `check`."""
    with _silent():
        tasks, manager = _load(asked)
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=asked.num_fewshot,
            limit=asked.limit,
            apply_chat_template=asked.apply_chat_template,
            bootstrap_iters=0,  # the intervals are our own
            log_samples=True,
            random_seed=asked.seed,
            numpy_random_seed=asked.seed,
            torch_random_seed=asked.seed,
            fewshot_random_seed=asked.seed,
        )
    assert found is not None
    return [_result(name, found) for name in found["samples"]]


def _load(asked: Benchmarks) -> tuple[tuple[str, ...], Any]:
    """The names of the tasks, groups expanded, and the manager that knows them."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError("eval.lm_eval: needs the package lm_eval: pip install 'lorafit[lm-eval]'") from None
    if asked.include_path is not None and not Path(asked.include_path).is_dir():
        raise UsageError(f"eval.lm_eval.include_path: {asked.include_path}: no such folder")
    files = [Path(task) for task in asked.tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not file.is_file():
            raise UsageError(f"eval.lm_eval.tasks: {file}: no such file")
    if not asked.trust_code:
        _refuse_code([*files, *_yaml_below(asked.include_path)])
    # The harness's own tasks take many seconds to list, so they are only where one of them is asked for.
    manager = TaskManager(include_path=asked.include_path, include_defaults=False)
    own = {*manager.all_tasks, *map(str, files)}
    if not set(asked.tasks) <= own:
        manager = TaskManager(include_path=asked.include_path)
    known = {*manager.all_tasks, *map(str, files)}
    for task in asked.tasks:
        if task not in known:
            alike = difflib.get_close_matches(task, sorted(known), 3)
            hint = f"; did you mean {', '.join(alike)}?" if alike else ""
            raise UsageError(f"eval.lm_eval.tasks: {task}: no such task of lm-evaluation-harness or file{hint}")
    for task in asked.tasks:
        try:
            manager.load([task])
        except Exception as error:  # noqa: BLE001 - data sets and YAML files fail in many ways
            raise DataError(f"eval.lm_eval.tasks: {task}: can't be loaded: {first_line(error)}") from None
    return asked.tasks, manager


def _yaml_below(folder: str | None) -> list[Path]:
    return sorted(Path(folder).rglob("*.y*ml")) if folder else []


def _refuse_code(files: list[Path]) -> None:
    """Raises UsageError for a task of the user's that runs Python, also by a file that it includes."""
    seen: set[Path] = set()
    left = [file.resolve() for file in files]
    while left:
        file = left.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        if _FUNCTION.search(text):
            raise UsageError(
                f"{file}: names Python code that would run (`!function`); allow it with eval.lm_eval.trust_code: true"
            )
        left += [(file.parent / name).resolve() for name in _INCLUDE.findall(text)]


def _result(task: str, found: Any) -> TaskResult:
    samples = found["samples"][task]
    reported, higher = found["results"][task], found["higher_is_better"].get(task, {})
    documents = {doc: row for row, doc in enumerate(sorted({sample["doc_id"] for sample in samples}))}
    metrics: dict[str, list[tuple[int, float, float]]] = {}
    infos, exponential, remarks = [], [], []
    for metric, kept in dict.fromkeys((name, s["filter"]) for s in samples for name in s["metrics"]):
        name = _named(metric if kept == "none" else f"{metric}_{kept}")
        parts = [
            (documents[s["doc_id"]], _quotient(metric, s[metric])) for s in samples if s["filter"] == kept and metric in s
        ]
        values = [(row, *part) for row, part in parts if part is not None]
        is_exponential = metric in _PERPLEXITY
        expected = reported.get(f"{metric},{kept}")
        if len(values) < len(parts) or not _agrees(values, is_exponential, expected):
            remarks.append(f"{task}: {metric} is no mean over documents, so it is left out")
            continue
        metrics[name] = values
        if is_exponential:
            exponential.append(name)
        infos.append(_info(name, metric, values, higher.get(metric, True)))
    return TaskResult(
        task=_named(task),
        rows=len(documents),
        metrics=metrics,
        infos=tuple(infos),
        exponential=tuple(exponential),
        samples=[_sample(sample) for sample in samples],
        remarks=tuple(remarks),
    )


def _quotient(metric: str, value: Any) -> tuple[float, float] | None:
    """A document's part of a metric as numerator and denominator; None for what is neither a number nor such a pair."""
    if isinstance(value, tuple | list):
        if len(value) != 2 or metric not in (*_PERPLEXITY, "bits_per_byte"):
            return None
        scale = math.log(2) if metric == "bits_per_byte" else 1.0
        return -float(value[0]) / scale, float(value[1])
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return (-number if metric == "perplexity" else number), 1.0


def _agrees(values: list[tuple[int, float, float]], is_exponential: bool, expected: Any) -> bool:
    """Whether the sums make what the harness reports itself."""
    below = sum(denominator for _, _, denominator in values)
    if not values or below <= 0:
        return False
    found = sum(numerator for _, numerator, _ in values) / below
    try:
        found = math.exp(found) if is_exponential else found
        return math.isclose(found, float(expected), rel_tol=1e-6, abs_tol=1e-9)
    except (TypeError, ValueError, OverflowError):
        return False


def _info(name: str, metric: str, values: list[tuple[int, float, float]], is_higher: bool) -> Metric:
    unit: Literal["share", "bits", "number"] = "number"
    if metric == "bits_per_byte":
        unit = "bits"
    elif all(denominator == 1 and 0 <= numerator <= 1 for _, numerator, denominator in values):
        unit = "share"
    return Metric(name=name, label=name.replace("_", " "), unit=unit, better="higher" if is_higher else "lower")


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What was asked and answered, as text."""
    first = sample["arguments"][0] if sample["arguments"] else ""
    scores = {name: sample[name] for name in sample["metrics"] if isinstance(sample.get(name), int | float)}
    return {
        "doc_id": sample["doc_id"],
        "prompt": str(first[0] if isinstance(first, tuple | list) else first)[:MOST_TEXT],
        "target": str(sample["target"])[:MOST_TEXT],
        "answer": str(sample["filtered_resps"])[:MOST_TEXT],
        "scores": {name: float(score) for name, score in scores.items()},
    }


def _named(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", text)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the harness's bars, notes, and what a git that it calls says. Errors are raised all the same."""
    with open(os.devnull, "w", encoding="utf-8") as sink, contextlib.ExitStack() as stack:
        logger = logging.getLogger("lm_eval")
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        kept = os.dup(2)
        stack.callback(os.close, kept)
        stack.callback(os.dup2, kept, 2)
        os.dup2(sink.fileno(), 2)
        yield
