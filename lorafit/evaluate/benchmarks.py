"""Benchmarks of lm-evaluation-harness, on a model that is in memory already.

The names of the harness's own tasks take some seconds to read, so that is only done where a task is not local.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import importlib.util
import io
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from jinja2 import BaseLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lorafit.errors import DataError, DoesNotFitError, LorafitError, UsageError, first_line, is_out_of_memory
from lorafit.evaluate.engine.arithmetic import autocast
from lorafit.evaluate.results import Metric
from lorafit.targets import near

Task: TypeAlias = Any
"""A task of the harness, its documents loaded."""
Manager: TypeAlias = Any
"""A TaskManager of the harness."""
Values: TypeAlias = list[tuple[int, float, float]]
"""(document, numerator, denominator), documents from 0."""
Transform = Literal["identity", "exp"]

LONGEST = 20_000
"""Characters of a text in a sample."""
_SHARES = re.compile(r"(acc|exact_match|em|f1|pass)(\W|_|$)")
_EXTRA = "pip install 'lorafit[lm-eval]'"


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


def check(benchmarks: Benchmarks) -> None:
    """Load the tasks and their documents once, before a model is. Raises UsageError, DataError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(f"eval.lm_eval: lm-evaluation-harness is not installed; {_EXTRA}")
    with _quiet(), _templates(benchmarks):
        load(benchmarks)


def run(benchmarks: Benchmarks, model: Any, tokenizer: PreTrainedTokenizerBase, console: Console) -> list[TaskResult]:
    """Ask a model, which may have an adapter. It and the tokenizer stay as they are.

    Raises UsageError, DataError, DoesNotFitError.
    """
    if benchmarks.apply_chat_template and not tokenizer.chat_template:
        raise UsageError(
            "eval.lm_eval.apply_chat_template: the model's tokenizer has no chat template; set it to false"
        )
    with _quiet(), _templates(benchmarks):
        tasks = load(benchmarks)
    console.print(f"running {len(tasks)} benchmark{'s' * (len(tasks) > 1)}", highlight=False)
    with _quiet(), _templates(benchmarks), _without_inventory(), _untied(model), autocast(model):
        found = _simple_evaluate(benchmarks, list(tasks.values()), model, copy.deepcopy(tokenizer))
    return [_result(name, task, found) for name, task in tasks.items()]


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
                task_manager=_manager((), False),
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


# Tasks


def load(benchmarks: Benchmarks) -> dict[str, Task]:
    """The tasks by their names in figures; groups and tags are their tasks. Raises UsageError, DataError."""
    manager, specs = _resolve(benchmarks)
    found: dict[str, Task] = {}
    for spec in specs:
        for task in _load_one(manager, spec).values():
            name = re.sub(r"[^A-Za-z0-9_-]", "_", task.task_name)
            other = found.setdefault(name, task)
            if other is not task and _source(other) != _source(task):
                raise UsageError(f"eval.lm_eval.tasks: {spec}: there are two tasks that figures would call {name}")
            if getattr(task, "UNSAFE_CODE", False) and not benchmarks.trust_code:
                raise UsageError(
                    f"eval.lm_eval.tasks: {name} runs code that the model writes; eval.lm_eval.trust_code allows it"
                )
            if getattr(task, "MULTIMODAL", False):
                raise UsageError(f"eval.lm_eval.tasks: {name} needs images or sound; only text can be asked")
    return found


def _source(task: Task) -> Any:
    return (task.task_name, (task.get_config("metadata") or {}).get("config_source"))


def _load_one(manager: Manager, spec: str) -> dict[str, Task]:
    """The tasks of one name or file."""
    where = f"eval.lm_eval.tasks: {spec}"
    try:
        return dict(manager.load(spec)["tasks"])
    except LorafitError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{where}: its data is not on this machine and can't be downloaded; run it once where there is a network, "
            f"or leave it out ({first_line(error)})"
        ) from error
    except OSError as error:
        raise DataError(f"{where}: its data can't be read: {first_line(error)}") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"{where}: needs the package {error.name}, which is not installed") from error
    except Exception as error:
        raise DataError(f"{where}: can't be loaded: {type(error).__name__}: {first_line(error)}") from error


@functools.lru_cache(maxsize=1)
def _every_task(folders: tuple[str, ...]) -> Manager:
    return _manager(folders, True)


def _manager(folders: tuple[str, ...], defaults: bool) -> Manager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def _resolve(benchmarks: Benchmarks) -> tuple[Manager, list[str]]:
    """Who knows the tasks, and their names or files; all looked at for code before any is loaded."""
    folders = tuple(folder for folder in (*benchmarks.tasks, benchmarks.include_path) if folder and _is_folder(folder))
    if benchmarks.include_path and benchmarks.include_path not in folders:
        raise UsageError(f"eval.lm_eval.include_path: there is no folder {benchmarks.include_path}")
    manager = _manager(folders, False)
    specs = [spec for task in benchmarks.tasks for spec in _specs(task, manager)]
    files, missing = _reach(specs, manager)
    for name in missing:
        if Path(name).suffix in (".yaml", ".yml"):
            raise UsageError(f"eval.lm_eval.tasks: there is no file {name}")
    if missing:
        manager = _every_task(folders)
        files, missing = _reach(specs, manager)
    for name in missing:
        close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
        hint = near(name, close) if close else ""
        raise UsageError(f"eval.lm_eval.tasks: {name} is no task of lm-evaluation-harness, nor a file{hint}")
    if not benchmarks.trust_code:
        for file in files:
            _refuse_code(file)
    return manager, specs


def _is_folder(path: str) -> bool:
    return Path(path).expanduser().is_dir()


def _specs(task: str, manager: Manager) -> list[str]:
    """A task as it is, or the tasks of a folder."""
    if not _is_folder(task) or task in manager.task_index:
        return [task]
    root = Path(task).expanduser().resolve()
    index = manager.task_index
    found = [name for name in manager.all_subtasks if root in index[name].yaml_path.resolve().parents]
    if not found:
        raise UsageError(f"eval.lm_eval.tasks: the folder {task} has no task (a .yaml file with `task:`)")
    return found


def _reach(specs: Iterable[str], manager: Manager) -> tuple[list[Path], list[str]]:
    """The YAML files that are read for tasks, and the names that nobody knows."""
    index, files, missing, seen = manager.task_index, [], [], set()
    left = list(specs)
    while left:
        name = left.pop(0)
        if name in seen:
            continue
        seen.add(name)
        entry = index.get(name)
        file = entry.yaml_path if entry else Path(name).expanduser()
        if entry is None and not file.is_file():
            missing.append(name)
            continue
        if file is not None:
            files.append(file)
        config = entry.cfg if entry else _plain_yaml(file)
        left += sorted(entry.tags) if entry and file is None else _children(config or {})
    return files, missing


def _children(config: dict[str, Any]) -> list[str]:
    """The names that a group refers to."""
    members = config.get("task")
    found: list[str] = []
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            found.append(member)
        elif isinstance(member, dict) and isinstance(member.get("task"), list):
            found += _children(member)
        elif isinstance(member, dict) and "dataset_path" not in member:
            found += [name for name in (member.get("group", member.get("task")),) if isinstance(name, str)]
    return found


# Code in tasks


def _plain_yaml(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(file, resolve_func=False))
    except Exception as error:
        raise DataError(f"{file}: can't be read: {first_line(error)}") from error


def _refuse_code(file: Path, seen: frozenset[Path] = frozenset()) -> None:
    """Raises UsageError if a local task would run code that comes with it, in the file or one that it includes.

    Code comes in by tags (`!function` and others), and by metrics that the harness doesn't have, which it looks for as
    scripts. Templates are kept to text by `_templates`, and `datasets` runs no scripts since 4.0.
    """
    import lm_eval

    file = file.expanduser().resolve()
    if file in seen or file.is_relative_to(Path(lm_eval.__file__).resolve().parent):
        return
    allow = "set eval.lm_eval.trust_code: true if you trust it"
    try:
        text = file.read_bytes()
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            tag = getattr(event, "tag", None)
            if tag and not re.fullmatch(r"!|tag:yaml\.org,2002:[a-z]+", tag):
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise UsageError(f"{file}:{line}: {first_line(tag)} would run Python code; {allow}")
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{file}: can't be read: {first_line(error)}") from error
    for name in _metrics(config):
        raise UsageError(
            f"{file}: the metric {name} is none of lm-evaluation-harness, so its code would be run; {allow}"
        )
    includes = config.get("include", []) if isinstance(config, dict) else []
    for include in includes if isinstance(includes, list) else [includes]:
        _refuse_code(file.parent / str(include), seen | {file})


def _metrics(config: Any) -> Iterator[str]:
    """Metrics anywhere in a file that are not registered."""
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import METRIC_REGISTRY

    if isinstance(config, list):
        for value in config:
            yield from _metrics(value)
    elif isinstance(config, dict):
        for value in config.values():
            yield from _metrics(value)
        listed = config.get("metric_list")
        for metric in listed if isinstance(listed, list) else []:
            if isinstance(metric, dict) and (metric.get("hf_evaluate") or metric.get("metric") not in METRIC_REGISTRY):
                yield first_line(metric.get("metric"))


@contextlib.contextmanager
def _templates(benchmarks: Benchmarks) -> Iterator[None]:
    """Templates of tasks that can reach nothing but their document: the harness's own can call any Python."""
    from lm_eval import utils

    before = utils.env
    if not benchmarks.trust_code:
        utils.env = SandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
        utils.env.filters.update(before.filters)
    try:
        yield
    finally:
        utils.env = before


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
def _untied(model: Any) -> Iterator[None]:
    """The harness ties a model's weights, which would undo an output head that an adapter trained."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights


# Results


def _result(name: str, task: Task, found: dict[str, Any]) -> TaskResult:
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
