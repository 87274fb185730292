"""Metrics of the user's own: a Python function named in the recipe as `module:function`."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from numbers import Real
from pathlib import Path
from typing import Any

from lorafit.bounds import read_bytes
from lorafit.errors import UsageError
from lorafit.evaluation.metrics.answers import AnswerMetric, Judged
from lorafit.evaluation.results import Metric
from lorafit.text import first_line, printable

LARGEST_MODULE = 1 << 20
"""Bytes of a Python file that is looked into."""
_SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[A-Za-z_][A-Za-z0-9_]*")
_SHOWN = 60
_NOT_CALLED = (ast.Constant, ast.List, ast.Dict, ast.Set, ast.Tuple, ast.JoinedStr, ast.Compare)
_TAKES = "it has to take (answer, expected) or (answer, expected, row)"
_RETURNS = "it has to return its score; it is async, or a generator"


def custom_metric(spec: str) -> AnswerMetric:
    """The metric of a function that is named `module:function`, found from the working directory as by `python -m`.

    This imports and runs the user's own code, with all rights of this process: the recipe names it, and says that it is
    trusted (eval.trust_code), as lorafit.recipe.rules sees to.
    It is called with (answer, expected, row) if it takes three arguments, else with (answer, expected), and returns a
    number, a bool or None (the row has no value). The figure has the function's name. It is called once for an answer
    to a row, so that figures and samples agree even if it asks a service or draws lots.

    Raises UsageError if it can't be imported; the metric does if it fails, or returns anything else.
    """
    info = custom_info(spec)
    function = _load(spec)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise UsageError(f"metric {spec}: {_RETURNS}")
    takes_row = _takes(function, 3)
    if not takes_row and not _takes(function, 2):
        raise UsageError(f"metric {spec}: {_TAKES}")

    known: dict[tuple[str, ...], float | None] = {}
    types: set[type] = set()

    def score(judged: Judged) -> float | None:
        key = (judged.answer, judged.expected, judged.prompt, repr(judged.row))
        if key not in known:
            known[key] = fresh(judged)
        return known[key]

    def fresh(judged: Judged) -> float | None:
        given = (judged.answer, judged.expected, judged.row)[: 3 if takes_row else 2]
        try:
            value = function(*given)
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"metric {spec} failed on {_place(judged)}: {what}") from error
        types.update({type(value)} if value is not None else ())
        return _number(value, spec, judged)

    return AnswerMetric(info, score, lambda: types == {bool})


def custom_info(spec: str) -> Metric:
    """The figure of `module:function`. Raises UsageError for what is not written so."""
    if not _SPEC.fullmatch(spec):
        raise UsageError(f"metric '{spec}': a metric of your own is named module:function, in letters, digits and _")
    name = spec.partition(":")[2]
    return Metric(name=name, label=name.replace("_", " "), unit="number", better=None)


def check_function(spec: str) -> None:
    """Raises UsageError where a module, or its function, can't be what a metric needs, as its text tells.

    Nothing of it is imported or run: the code may be that of a pull request.
    """
    module, _, name = spec.partition(":")
    found = list(module_specs(module))
    if not found or found[-1].name != module:
        if module.partition(".")[0] in sys.stdlib_module_names:
            return
        where = f"in {found[-1].name}" if found else "in the working directory, nor installed"
        raise UsageError(f"metric {spec}: there is no module {module} {where}")
    origin = found[-1].origin
    if origin is not None and not origin.endswith(".py"):
        return  # compiled: its names are known once it is imported
    defined = _definition(origin, name, spec) if origin else None
    if defined is None:
        raise UsageError(f"metric {spec}: {module} has no function {name}")
    if isinstance(defined, _NOT_CALLED) or (isinstance(defined, ast.ClassDef) and not defined.bases):
        raise UsageError(f"metric {spec}: {name} is no function in {module}")
    if isinstance(defined, ast.Lambda) and not any(_accepts(defined.args, count) for count in (2, 3)):
        raise UsageError(f"metric {spec}: {_TAKES}")
    if isinstance(defined, ast.FunctionDef | ast.AsyncFunctionDef) and not defined.decorator_list:
        if isinstance(defined, ast.AsyncFunctionDef) or any(map(_yields, defined.body)):
            raise UsageError(f"metric {spec}: {_RETURNS}")
        if not any(_accepts(defined.args, count) for count in (2, 3)):
            raise UsageError(f"metric {spec}: {_TAKES}")


def _definition(file: str, name: str, spec: str) -> ast.AST | None:
    """The node that gives a module's global name its last value; any node where that can't be told; None: none does."""
    try:
        tree = ast.parse(read_bytes(Path(file), LARGEST_MODULE))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        place = f"{file}:{line}" if line else file
        raise UsageError(f"metric {spec}: {place}: can't be read as Python: {first_line(error)}") from None
    if any(isinstance(node, ast.Global) and name in node.names for node in ast.walk(tree)):
        return tree  # some function may set it
    found: ast.AST | None = None
    left: list[ast.stmt] = list(reversed(tree.body))
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = node if node.name in (name, "__getattr__") else found
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound = (alias.asname or alias.name.partition(".")[0] for alias in node.names)
            found = node if not {name, "*"}.isdisjoint(bound) else found
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound = (one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))
            if name in bound and node.value is not None:  # of `a, b = ...` the value is not a's
                found = node.value if all(isinstance(target, ast.Name) for target in targets) else node
        elif isinstance(node, ast.Delete):
            found = None if any(isinstance(one, ast.Name) and one.id == name for one in node.targets) else found
        else:
            stored = (one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
            found = node if name in stored else found  # of a loop, a `with` or a `:=`
            inside = (child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node)
            left += reversed(list(inside))
        if found is None and _writes_names(node):
            return node
    return found


def _writes_names(node: ast.stmt) -> bool:
    """Whether a statement may define any name, such as `globals()[...] = ...`."""
    return any(isinstance(one, ast.Name) and one.id in ("globals", "exec", "setattr", "vars") for one in ast.walk(node))


def _yields(node: ast.AST) -> bool:
    """Whether a part of a function makes it a generator; functions within are their own."""
    if isinstance(node, ast.Yield | ast.YieldFrom):
        return True
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
        return False
    return any(map(_yields, ast.iter_child_nodes(node)))


def _accepts(arguments: ast.arguments, count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    most = len(arguments.posonlyargs) + len(arguments.args)
    least = most - len(arguments.defaults)
    named = any(default is None for default in arguments.kw_defaults)
    return not named and least <= count and (arguments.vararg is not None or count <= most)


def _load(spec: str) -> Callable[..., Any]:
    module, _, name = spec.partition(":")
    try:
        with _working_directory():
            found: object = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"metric {spec}: {module} can't be imported: {what}") from error
    if not callable(found):
        raise UsageError(f"metric {spec}: {module} has no function {name}")
    return found


@contextlib.contextmanager
def _working_directory() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        return False
    return True


def _number(value: Any, spec: str, judged: Judged) -> float | None:
    if value is None:
        return None
    with contextlib.suppress(OverflowError):
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
    shown = printable(repr(value))[:_SHOWN]
    raise UsageError(
        f"metric {spec} returned {shown} on {_place(judged)}; it must return a finite number, bool or None"
    )


def _place(judged: Judged) -> str:
    prompt = printable(" ".join(judged.prompt.split()))
    return f"the row with the prompt '{prompt[:_SHOWN]}{'…' if len(prompt) > _SHOWN else ''}'"


def code_files(spec: str) -> dict[str, Path]:
    """The files of the working directory that `module:function` runs, by path; of an installed module by its name."""
    module = spec.partition(":")[0]
    if not all(map(str.isidentifier, module.split("."))):
        return {}
    if found := dict(_of_module(module, set())):
        return found
    installed = [one.origin for one in module_specs(module) if one.name == module]
    return {f"module {module}": Path(installed[0] or "")} if installed else {module: Path(module)}


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
