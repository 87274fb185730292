"""The tasks that were asked for, found and loaded.

The names of the harness's own tasks take some seconds to read, so that is only done where a task is not local.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorafit.bounds import within
from lorafit.errors import DataError, LorafitError, UsageError, first_line
from lorafit.evaluate.benchmarks.code import refuse_code
from lorafit.evaluate.benchmarks.types import Benchmarks, Manager, Task
from lorafit.targets import near
from lorafit.written import expanded


def load(benchmarks: Benchmarks) -> dict[str, Task]:
    """The tasks by their names in figures; groups and tags are their tasks. Raises UsageError, DataError."""
    manager, specs = resolve(benchmarks)
    found: dict[str, Task] = {}
    for spec in specs:
        for task in _load_one(manager, spec).values():
            name = re.sub(r"[^A-Za-z0-9_-]", "_", task.task_name)
            other = found.setdefault(name, task)
            if other is not task and _source(other) != _source(task):
                raise UsageError(f"eval.lm_eval.tasks: {spec}: there are two tasks that figures would call {name}")
            if getattr(task, "UNSAFE_CODE", False) and not benchmarks.trust_code:
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


def resolve(benchmarks: Benchmarks) -> tuple[Manager, list[str]]:
    """Who knows the tasks, and their names or files; all looked at for code before any is loaded."""
    folders = tuple(folder for folder in (*benchmarks.tasks, benchmarks.include_path) if folder and _is_folder(folder))
    if benchmarks.include_path and benchmarks.include_path not in folders:
        raise UsageError(f"eval.lm_eval.include_path: there is no folder {benchmarks.include_path}")
    manager = manager_of(folders, False)
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
            refuse_code(file)
    return manager, specs


def _is_folder(path: str) -> bool:
    return expanded(path).is_dir()


def _specs(task: str, manager: Manager) -> list[str]:
    """A task as it is, or the tasks of a folder."""
    if not _is_folder(task) or task in manager.task_index:
        return [task]
    root = expanded(task).resolve()
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
