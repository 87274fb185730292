"""Benchmarks of lm-evaluation-harness, on a model that is in memory already, quietly and without a trace on it."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias
from unittest import mock

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorafit.engine.evaluate.batches import autocast
from lorafit.engine.evaluate.measure import finite
from lorafit.engine.evaluate.models import Loaded, NamedModel
from lorafit.engine.evaluate.tasks import Task, kept_templates, load, manager_of, resolve
from lorafit.errors import DataError, DoesNotFitError, MissingError, UsageError, is_out_of_memory
from lorafit.evaluation.figures import Scores, Series
from lorafit.evaluation.results import Answer, Better, Metric, Part, Records, Sample
from lorafit.evaluation.results import Set as SetInfo
from lorafit.hardware import is_installed
from lorafit.plan.evaluation import sets_of
from lorafit.progress import counting, stage
from lorafit.recipe.schema import EvalSection
from lorafit.text import first_line

Values: TypeAlias = list[tuple[int, float, float]]
"""(document, numerator, denominator), documents from 0."""
Transform = Literal["identity", "exp"]


class TaskResult(Part):
    """The outcome of one model on one task."""

    task: str
    """Its name in figures."""
    rows: int
    """Documents that were asked."""
    metrics: dict[str, Values]
    """A figure is the sum of the numerators by that of the denominators, then `transforms`."""
    transforms: dict[str, Transform]
    """What is done to a metric's mean; `exp` for perplexities."""
    infos: tuple[Metric, ...]
    samples: tuple[dict[str, Any], ...]
    """A document each: doc_id, prompt, target, answer, scores (by metric)."""
    left_out: tuple[str, ...] = ()
    """Metrics that are no mean over documents, such as a corpus's BLEU."""


Benchmarked: TypeAlias = dict[str, list[TaskResult]]
"""What each model did on each task."""
BATCH = 16
"""Requests that the harness runs at once; fewer where they don't fit into memory."""
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
    return TaskResult(
        task=name,
        rows=len(shown),
        metrics=metrics,
        transforms=transforms,
        infos=tuple(infos),
        samples=tuple(shown.values()),
        left_out=tuple(left_out),
    )


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
    better: Better = None
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


def check(section: EvalSection) -> list[str]:
    """Load the tasks and their documents once, before a model is; their names. Raises UsageError, DataError."""
    if section.lm_eval is None:
        return []
    if not is_installed("lm_eval"):
        raise MissingError("eval.lm_eval: lm-evaluation-harness is not installed: pip install 'lorafit[lm-eval]'")
    with stage("reading the benchmarks"), _quiet(), kept_templates(section.trust_code):
        names = list(load(section))
    for name in names:
        if name in sets_of(section):
            raise UsageError(f"eval.lm_eval.tasks: {name}: there is a set of that name; rename the task or the set")
    return names


def look(section: EvalSection) -> None:
    """See that the tasks are known, and bring no code that isn't trusted; their data is not loaded.

    Raises UsageError, DataError.
    """
    if section.lm_eval is not None and is_installed("lm_eval"):
        with stage("looking for the benchmarks"), _quiet():
            resolve(section)


def run_recorded(
    loaded: Loaded, model: NamedModel, tokenizer: PreTrainedTokenizerBase, section: EvalSection, records: Records
) -> Benchmarked:
    """The benchmarks on one model, unless the records have them."""
    if section.lm_eval is None:
        return {}
    found = records.whole("benchmarks", model.name)
    if found is None:
        found = [task.model_dump() for task in run(section, loaded.use_model(model), tokenizer)]
        records.write(found, "benchmarks", model.name)
    return {model.name: [TaskResult.model_validate(task) for task in found]}


def run(section: EvalSection, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[TaskResult]:
    """Ask a model, which may have an adapter. It and the tokenizer stay as they are.

    Raises UsageError, DataError, DoesNotFitError.
    """
    if section.lm_eval and section.lm_eval.apply_chat_template and not tokenizer.chat_template:
        raise UsageError(
            "eval.lm_eval.apply_chat_template: the model's tokenizer has no chat template; set it to false"
        )
    with _quiet(), kept_templates(section.trust_code):
        from lm_eval import evaluator
        from lm_eval.api import task
        from lm_eval.models import huggingface

        tasks = load(section)
    with (
        stage(f"running {len(tasks)} benchmark{'s' * (len(tasks) > 1)}"),
        counting((huggingface, "tqdm"), (task, "tqdm")),
        _quiet(),
        kept_templates(section.trust_code),
        # It lists the machine's packages, and runs git in the current folder, which complains on the screen.
        mock.patch.multiple(evaluator, get_git_commit_hash=mock.Mock(return_value=None), add_env_info=mock.Mock()),
        # It ties a model's weights, which would undo an output head that an adapter trained.
        mock.patch.object(model, "tie_weights", return_value=None),
        autocast(model),
    ):
        found = _simple_evaluate(section, list(tasks.values()), model, copy.deepcopy(tokenizer))
    return [result_of(name, one, found) for name, one in tasks.items()]


def _simple_evaluate(
    section: EvalSection, tasks: list[Task], model: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    asked, seed, size = section.lm_eval, section.seed, BATCH
    assert asked is not None
    while True:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)
        try:
            found: dict[str, Any] = simple_evaluate(
                model=lm,
                tasks=tasks,
                task_manager=manager_of((), False),
                num_fewshot=asked.num_fewshot,
                limit=asked.limit,
                apply_chat_template=asked.apply_chat_template,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=section.trust_code,
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


def benchmark_scores(
    found: Benchmarked, names: list[str]
) -> tuple[dict[str, dict[str, dict[str, Scores]]], dict[str, SetInfo]]:
    """Each task as a set: its scores by model and metric, and what it is."""
    scores: dict[str, dict[str, dict[str, Scores]]] = {}
    infos: dict[str, SetInfo] = {}
    for model, task in ((name, task) for name in names for task in found.get(name, [])):
        better = {metric.name: metric.better for metric in task.infos}
        source = f"lm-evaluation-harness: {task.task}"
        infos[task.task] = SetInfo(role="benchmark", source=source, rows=task.rows, answered=0, metrics=task.infos)
        of_model = scores.setdefault(task.task, {}).setdefault(model, {})
        for name, values in task.metrics.items():
            made = np.zeros((2, task.rows))
            for index, *pair in values:
                made[:, index] = pair
            transform = task.transforms.get(name, "identity")
            of_model[name] = Series(made[0], made[1], transform=transform, better=better[name])
    return scores, infos


def benchmark_samples(found: Benchmarked) -> Iterator[Sample]:
    """Each document of each task, with what every model made of it."""
    for tasks in zip(*found.values(), strict=True):
        for row, documents in enumerate(zip(*(task.samples for task in tasks), strict=True)):
            first, name = documents[0], tasks[0].task
            yield Sample(
                set=name,
                row=row,
                place=f"{name}: document {first['doc_id']}",
                prompt=first["prompt"],
                expected=first["target"],
                answers={
                    model: Answer(text=one["answer"], scores=finite(one["scores"]))
                    for model, one in zip(found, documents, strict=True)
                },
            )


def benchmark_remarks(found: Benchmarked) -> list[str]:
    """The metrics that have no figure."""
    return [
        f"{task.task}: left out: {', '.join(task.left_out)}, which are no means over documents"
        for task in next(iter(found.values()), [])
        if task.left_out
    ]
