"""The harness's tasks that were asked for: found, loaded, and refused if they bring code that isn't trusted."""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import yaml
from jinja2 import BaseLoader, StrictUndefined

from lorafit.bounds import Environment, read_bytes, within
from lorafit.errors import DataError, LorafitError, UsageError
from lorafit.recipe.schema import EvalSection
from lorafit.text import first_line, near
from lorafit.written import expanded

Task: TypeAlias = Any
"""A task of the harness, its documents loaded."""
Manager: TypeAlias = Any
"""A TaskManager of the harness."""


def refuse_code(file: Path, seen: frozenset[Path] = frozenset()) -> None:
    """Raises UsageError if a local task would run code that comes with it, in the file or one that it includes.

    Code comes in by tags (`!function` and others), by metrics that the harness doesn't have, which it looks for as
    scripts, and by pickles, which `datasets` 4 reads. Templates are kept to text by `kept_templates`, and `datasets`
    runs no scripts since 4.0.
    """
    import lm_eval
    import lm_eval.api.metrics  # takes seconds, and registers them

    file = expanded(file).resolve()
    if file in seen or file.is_relative_to(Path(lm_eval.__file__).resolve().parent):
        return
    try:
        with within(DataError, f"{file}: it"):
            includes = _includes(file)
    except RecursionError:
        raise DataError(f"{file}: is nested too deeply") from None
    for include in includes:
        refuse_code(file.parent / str(include), seen | {file})


def _includes(file: Path) -> list[Any]:
    """The files that a file includes, if it would run no code."""
    allow = "set eval.trust_code: true if you trust it"
    try:
        text = read_bytes(file)
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            tag = getattr(event, "tag", None)
            if tag and not re.fullmatch(r"!|tag:yaml\.org,2002:[a-z]+", tag):
                line = event.start_mark.line + 1 if event.start_mark else "?"
                raise UsageError(f"{file}:{line}: {first_line(tag)} would run Python code; {allow}")
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"{file}: can't be read: {first_line(error)}") from error
    for name in _metrics(config):
        raise UsageError(
            f"{file}: the metric {name} is none of lm-evaluation-harness, so its code would be run; {allow}"
        )
    if "pandas" in _values_of(config, "dataset_path"):
        raise UsageError(f"{file}: dataset_path: pandas reads pickles, which may run any code; {allow}")
    found = config.get("include", []) if isinstance(config, dict) else []
    return found if isinstance(found, list) else [found]


def _metrics(config: Any) -> Iterator[str]:
    """Metrics anywhere in a file that are not registered."""
    from lm_eval.api.registry import METRIC_REGISTRY

    for listed in _values_of(config, "metric_list"):
        for metric in listed if isinstance(listed, list) else []:
            if isinstance(metric, dict) and (metric.get("hf_evaluate") or metric.get("metric") not in METRIC_REGISTRY):
                yield first_line(metric.get("metric"))


def _values_of(config: Any, key: str) -> Iterator[Any]:
    """The values of a key anywhere in a file."""
    values = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    for value in values:
        yield from _values_of(value, key)
    if isinstance(config, dict) and key in config:
        yield config[key]


def kept_templates(trusted: bool) -> contextlib.AbstractContextManager[Any]:
    """Unless trusted, templates of tasks reach nothing but their document: the harness's own can call any Python."""
    from lm_eval import utils

    if trusted:
        return contextlib.nullcontext()
    kept = Environment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    kept.filters |= {name: own for name, own in utils.env.filters.items() if name not in kept.filters}
    return mock.patch.object(utils, "env", kept)


def load(section: EvalSection) -> dict[str, Task]:
    """The tasks by their names in figures; groups and tags are their tasks. Raises UsageError, DataError."""
    manager, specs = resolve(section)
    found: dict[str, Task] = {}
    for spec in specs:
        for task in _load_one(manager, spec).values():
            name = re.sub(r"[^A-Za-z0-9_-]", "_", task.task_name)
            other = found.setdefault(name, task)
            if other is not task and _source(other) != _source(task):
                raise UsageError(f"eval.lm_eval.tasks: {spec}: there are two tasks that figures would call {name}")
            if getattr(task, "UNSAFE_CODE", False) and not section.trust_code:
                raise UsageError(
                    f"eval.lm_eval.tasks: {name} runs code that the model writes; eval.trust_code allows it"
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
    return manager_of(folders, True)


def manager_of(folders: tuple[str, ...], defaults: bool) -> Manager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def resolve(section: EvalSection) -> tuple[Manager, list[str]]:
    """Who knows the tasks, and their names or files; all looked at for code before any is loaded."""
    asked = section.lm_eval
    assert asked is not None
    folders = tuple(folder for folder in (*asked.tasks, asked.include_path) if folder and expanded(folder).is_dir())
    if asked.include_path and asked.include_path not in folders:
        raise UsageError(f"eval.lm_eval.include_path: there is no folder {asked.include_path}")
    manager = manager_of(folders, False)
    specs = [spec for task in asked.tasks for spec in _specs(task, manager)]
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
    if not section.trust_code:
        for file in files:
            refuse_code(file)
    return manager, specs


def _specs(task: str, manager: Manager) -> list[str]:
    """A task as it is, or the tasks of a folder."""
    root = expanded(task).resolve()
    if not root.is_dir() or task in manager.task_index:
        return [task]
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
        file = entry.yaml_path if entry else expanded(name)
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


def _plain_yaml(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        with within(DataError, f"{file}: it"):
            return dict(load_yaml(file, resolve_func=False))
    except LorafitError:
        raise
    except Exception as error:
        raise DataError(f"{file}: can't be read: {first_line(error)}") from error
