"""Benchmarks of lm-evaluation-harness, on a model that is in memory already, quietly and without a trace on it."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorafit.engine.evaluate.arithmetic import autocast
from lorafit.engine.evaluate.tasks import Benchmarks, Task, kept_templates, load, manager_of, resolve
from lorafit.errors import DataError, DoesNotFitError, MissingError, UsageError, is_out_of_memory
from lorafit.evaluation.results import Metric
from lorafit.progress import counting, stage
from lorafit.text import first_line

Values: TypeAlias = list[tuple[int, float, float]]
"""(document, numerator, denominator), documents from 0."""
Transform = Literal["identity", "exp"]


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


def check(benchmarks: Benchmarks) -> list[str]:
    """Load the tasks and their documents once, before a model is; their names. Raises UsageError, DataError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingError("eval.lm_eval: lm-evaluation-harness is not installed: pip install 'lorafit[lm-eval]'")
    with stage("reading the benchmarks"), _quiet(), kept_templates(benchmarks):
        return list(load(benchmarks))


def look(benchmarks: Benchmarks) -> None:
    """See that the tasks are known, and bring no code that isn't trusted. Raises UsageError, DataError."""
    with stage("looking for the benchmarks"), _quiet():
        resolve(benchmarks)


def run(benchmarks: Benchmarks, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[TaskResult]:
    """Ask a model, which may have an adapter. It and the tokenizer stay as they are.

    Raises UsageError, DataError, DoesNotFitError.
    """
    if benchmarks.apply_chat_template and not tokenizer.chat_template:
        raise UsageError(
            "eval.lm_eval.apply_chat_template: the model's tokenizer has no chat template; set it to false"
        )
    with _quiet(), kept_templates(benchmarks):
        tasks = load(benchmarks)
    told = stage(f"running {len(tasks)} benchmark{'s' * (len(tasks) > 1)}")
    with told, _counted(), _quiet(), kept_templates(benchmarks), _without_inventory(), _untied(model), autocast(model):
        found = _simple_evaluate(benchmarks, list(tasks.values()), model, copy.deepcopy(tokenizer))
    return [result_of(name, task, found) for name, task in tasks.items()]


def _simple_evaluate(
    benchmarks: Benchmarks, tasks: list[Task], model: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    size = benchmarks.batch_size
    while True:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)
        try:
            found: dict[str, Any] = simple_evaluate(
                model=lm,
                tasks=tasks,
                task_manager=manager_of((), False),
                num_fewshot=benchmarks.num_fewshot,
                limit=benchmarks.limit,
                apply_chat_template=benchmarks.apply_chat_template,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=benchmarks.seed,
                numpy_random_seed=benchmarks.seed,
                torch_random_seed=benchmarks.seed,
                fewshot_random_seed=benchmarks.seed,
                confirm_run_unsafe_code=benchmarks.trust_code,
            )
        except TemplateError as error:
            raise DataError(f"eval.lm_eval: a template refuses a document: {first_line(error)}") from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise DoesNotFitError("eval.lm_eval: a single document does not fit into memory") from error
        else:
            return found
        size //= 2


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's bars, logs and prints go nowhere."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_inventory() -> Iterator[None]:
    """The harness lists the machine's packages, and runs git in the current folder, which complains on the screen."""
    from lm_eval import evaluator

    before = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash, evaluator.add_env_info = lambda: None, lambda _: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = before


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """The harness's requests count for the stage."""
    from lm_eval.api import task
    from lm_eval.models import huggingface

    with counting((huggingface, "tqdm"), (task, "tqdm")):
        yield


@contextlib.contextmanager
def _untied(model: Any) -> Iterator[None]:
    """The harness ties a model's weights, which would undo an output head that an adapter trained."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights
