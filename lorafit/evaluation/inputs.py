"""The files that decide what an evaluation finds: schemas, metrics of one's own and benchmark tasks. Nothing is run."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.bounds import read_bytes

if TYPE_CHECKING:
    from lorafit.recipe.schema import EvalSection, MetricSpec

LARGEST_MODULE = 1 << 20
"""Bytes of a Python file that is looked into."""


def judging_files(section: EvalSection) -> dict[str, Path]:
    """Every such file that the section names, by its path; of an installed module by the module's name."""
    found: dict[str, Path] = {}
    for specs in (section.metrics, *(one.metrics for one in section.sets)):
        for spec in specs or ():
            found |= _of_metric(spec)
    if section.lm_eval is not None:
        found |= {str(file): file for file in task_files(section.lm_eval.tasks, section.lm_eval.include_path)}
    return found


def task_files(tasks: Iterable[str], include_path: str | None) -> Iterator[Path]:
    """The files of own benchmark tasks: those that are named, and all in the folders of them."""
    for place in (*tasks, *filter(None, [include_path])):
        if place.endswith((".yaml", ".yml")):
            yield Path(place)
        elif Path(place).is_dir():
            yield from sorted(
                file for file in Path(place).rglob("*") if file.is_file() and "__pycache__" not in file.parts
            )


def _of_metric(spec: MetricSpec) -> dict[str, Path]:
    if isinstance(spec, dict):
        return {path: Path(path) for name, path in spec.items() if name == "json_schema"}
    module, colon, _ = spec.partition(":")
    if not colon or not all(map(str.isidentifier, module.split("."))):
        return {}
    found = dict(_of_module(module, set()))
    installed = [spec for spec in module_specs(module) if spec.name == module] if not found else []
    return found or {f"module {module}": Path(spec.origin or "") for spec in installed} or {module: Path(module)}


def _of_module(name: str, seen: set[str]) -> Iterator[tuple[str, Path]]:
    """The file of a module in the working directory, those of the packages around it, and of what it imports there.

    What is installed is left to the versions of packages.
    """
    if name in seen or name.partition(".")[0] in sys.stdlib_module_names:
        return
    seen.add(name)
    for spec in module_specs(name):
        file = Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
        if file is None or not file.is_file() or not _is_own(file):
            continue
        yield file.relative_to(Path.cwd()).as_posix(), file
        for other in _imported(file, spec):
            yield from _of_module(other, seen)


def _is_own(file: Path) -> bool:
    """Whether a file is in the working directory, and not in an environment that is."""
    here = Path.cwd()
    environments = [Path(prefix) for prefix in (sys.prefix, sys.base_prefix) if Path(prefix) != here]
    return file.is_relative_to(here) and not any(map(file.is_relative_to, environments))


def module_specs(name: str) -> Iterator[ModuleSpec]:
    """Where a dotted name is found, outermost first, as `python -m` looks for it. No package is imported."""
    places: list[str] | None = [str(Path.cwd()), *sys.path]
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:length]), places)
        if spec is None and length == 1:  # such as an editable install's own finder
            with contextlib.suppress(ValueError):
                spec = importlib.util.find_spec(parts[0])
        if spec is None:
            return
        yield spec
        places = list(spec.submodule_search_locations or ())


def _imported(file: Path, spec: ModuleSpec) -> Iterator[str]:
    """The names that a module's code imports, if it is any, and what stands beside them."""
    try:
        tree = ast.parse(read_bytes(file, LARGEST_MODULE))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*filter(None, above), *filter(None, [node.module])])
            yield from (name for alias in node.names for name in (base, f"{base}.{alias.name}") if base)
            if not base:
                yield from (alias.name for alias in node.names)
