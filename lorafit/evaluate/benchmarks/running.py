"""The harness run on a model that is in memory, quietly and without a trace on the model."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorafit.console import Console
from lorafit.errors import DataError, DoesNotFitError, UsageError, first_line, is_out_of_memory
from lorafit.evaluate.benchmarks.code import kept_templates
from lorafit.evaluate.benchmarks.documents import result_of
from lorafit.evaluate.benchmarks.tasks import load, manager_of
from lorafit.evaluate.benchmarks.types import Benchmarks, Task, TaskResult
from lorafit.evaluate.engine.arithmetic import autocast

EXTRA = "pip install 'lorafit[lm-eval]'"


def check(benchmarks: Benchmarks) -> list[str]:
    """Load the tasks and their documents once, before a model is; their names. Raises UsageError, DataError."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(f"eval.lm_eval: lm-evaluation-harness is not installed; {EXTRA}")
    with _quiet(), kept_templates(benchmarks):
        return list(load(benchmarks))


def run(benchmarks: Benchmarks, model: Any, tokenizer: PreTrainedTokenizerBase, console: Console) -> list[TaskResult]:
    """Ask a model, which may have an adapter. It and the tokenizer stay as they are.

    Raises UsageError, DataError, DoesNotFitError.
    """
    if benchmarks.apply_chat_template and not tokenizer.chat_template:
        raise UsageError(
            "eval.lm_eval.apply_chat_template: the model's tokenizer has no chat template; set it to false"
        )
    with _quiet(), kept_templates(benchmarks):
        tasks = load(benchmarks)
    console.print(f"running {len(tasks)} benchmark{'s' * (len(tasks) > 1)}", highlight=False)
    with _quiet(), kept_templates(benchmarks), _without_inventory(), _untied(model), autocast(model):
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
def _untied(model: Any) -> Iterator[None]:
    """The harness ties a model's weights, which would undo an output head that an adapter trained."""
    model.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del model.tie_weights
