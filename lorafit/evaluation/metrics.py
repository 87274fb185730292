"""METRICS, the metrics that a recipe may name; and the user's own functions, `module:function`."""

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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from importlib.machinery import ModuleSpec, PathFinder
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from lorafit.bounds import read_bytes
from lorafit.errors import UsageError
from lorafit.evaluation import answers
from lorafit.evaluation.answers import AnswerMetric, Judged, PairScore, load_extra
from lorafit.evaluation.results import Better, Metric
from lorafit.text import first_line, near, printable

MetricSpec = str | Mapping[str, str]
"""`exact_match`, `{'regex': PATTERN}` or `module:function`."""

DEFAULTS = ("exact_match", "exact_match_normalized", "token_f1")
JSON_DEFAULTS = ("json_match", "json_valid")
POSSIBLE_DEFAULTS = (*DEFAULTS, *JSON_DEFAULTS, "repetition")
"""All that may be measured where a recipe names none; of which, the expected answers decide."""
RESERVED = frozenset(
    {"loss", "perplexity", "bits_per_byte", "token_accuracy", "kl", "accuracy", "accuracy_per_byte", "macro_f1"}
    | {"preference_accuracy", "preference_margin", "chosen_logp", "rejected_logp", "reward_accuracy"}
    | {"ended", "length", "agreement", "judge"}
)
"""Names of an evaluation's other figures, which a metric of the user's own must not take."""


@dataclass(frozen=True)
class KnownMetric:
    """A metric that comes with lorafit.

    Attributes:
        plain: its score without an argument; None: it needs one.
        bind: makes its score from an argument; None: it takes none.
        argument: what the argument is, such as PATTERN.
        needs: a package of the extra `eval`, which a score with an argument loads itself.
    """

    name: str
    label: str
    plain: PairScore | None = None
    _: KW_ONLY
    unit: Literal["share", "number"] = "share"
    better: Better = "higher"
    bind: Callable[[str], PairScore] | None = None
    argument: str = ""
    needs: str | None = None

    @property
    def info(self) -> Metric:
        return Metric(name=self.name, label=self.label, unit=self.unit, better=self.better)

    @property
    def about(self) -> str:
        """A sentence about it: the first line of its function's docstring, or of both if its argument is optional."""
        functions = [function for function in (self.plain, self.bind) if function is not None]
        return " With an argument: ".join((inspect.getdoc(function) or "").partition("\n")[0] for function in functions)

    def check(self, argument: str | None) -> None:
        """Raises UsageError if an argument is missing, one too many, or wrong, as far as it alone can tell."""
        name = self.name
        if argument is None:
            if self.plain is None:
                raise UsageError(f"metric {name} needs an argument: write `{name}: {self.argument}`")
        elif self.bind is None:
            raise UsageError(f"metric {name} takes no argument: write `{name}` instead of `{name}: {argument}`")
        elif not argument:
            raise UsageError(f"metric {name}: the argument is empty: write `{name}: {self.argument}`")
        elif not self.needs:
            self.bind(argument)

    def make(self, argument: str | None) -> PairScore:
        """Its score. Raises UsageError as `check`, or if the file that is its argument is wrong; MissingError."""
        self.check(argument)
        if self.bind is not None and argument is not None:
            return self.bind(argument)
        if self.needs:
            load_extra(self.needs, self.name)
        assert self.plain is not None
        return self.plain


METRICS: Mapping[str, KnownMetric] = {
    known.name: known
    for known in (
        KnownMetric("exact_match", "exact match", answers.exact_match),
        KnownMetric("exact_match_normalized", "exact match, normalized", answers.exact_match_normalized),
        KnownMetric("token_f1", "token F1", answers.token_f1),
        KnownMetric("contains", "contains", answers.contains, bind=answers.contains_text, argument="TEXT"),
        KnownMetric("regex", "matches the expression", bind=answers.regex, argument="PATTERN"),
        KnownMetric("extract", "same final answer", bind=answers.extract, argument="PATTERN"),
        KnownMetric("json_valid", "is JSON", answers.json_valid),
        KnownMetric("json_match", "same JSON", answers.json_match),
        KnownMetric(
            "json_schema", "fits the schema", bind=answers.json_schema, argument="PATH", needs="jsonschema.validators"
        ),
        KnownMetric("rouge_1", "ROUGE-1", answers.rouge_1),
        KnownMetric("rouge_2", "ROUGE-2", answers.rouge_2),
        KnownMetric("rouge_l", "ROUGE-L", answers.rouge_l),
        KnownMetric("chrf", "chrF", answers.chrf, needs="sacrebleu.metrics"),
        KnownMetric("bleu", "BLEU", answers.bleu, needs="sacrebleu.metrics"),
        KnownMetric("words", "words", answers.words, unit="number", better=None),
        KnownMetric("repetition", "repetition", answers.repetition, better="lower"),
    )
}
"""Metrics by name, in the order of the documentation."""


def metric_info(spec: MetricSpec) -> Metric:
    """The description of a metric. No file is read, and no code imported.

    Raises UsageError if there is no such metric, or its argument is wrong, as far as the recipe alone can tell.
    """
    name, argument = _parted(spec)
    if ":" in name:
        return _own(name)
    if name not in METRICS:
        raise _unknown(name)
    METRICS[name].check(argument)
    return METRICS[name].info


def check_metric(spec: MetricSpec) -> None:
    """Raises UsageError for what `make_metric` would refuse, as far as files tell, and MissingError. Runs no code."""
    metric_info(spec)
    name, argument = _parted(spec)
    if ":" in name:
        check_function(name)
    else:
        METRICS[name].make(argument)


def make_metric(spec: MetricSpec) -> AnswerMetric:
    """The metric that a recipe names.

    Raises UsageError if there is no such metric, or its argument is wrong; MissingError.
    """
    info = metric_info(spec)
    name, argument = _parted(spec)
    if ":" in name:
        return custom_metric(name)
    score = METRICS[name].make(argument)
    return AnswerMetric(info, lambda judged: score(judged.answer, judged.expected))


def _parted(spec: MetricSpec) -> tuple[str, str | None]:
    """The name of a metric and its argument."""
    if isinstance(spec, str):
        return spec, None
    if len(spec) != 1:
        raise UsageError(f"a metric is one name or one `name: argument`, not {dict(spec)}")
    ((name, argument),) = spec.items()
    if ":" in name:
        raise UsageError(f"metric {name}: a metric of your own takes no argument")
    return name, argument


def _own(spec: str) -> Metric:
    first, _, name = spec.partition(":")
    known = METRICS.get(first.strip())
    if known is not None:
        how = f"an argument stands outside of quotes: `{first.strip()}: {name.strip()}`"
        raise UsageError(f"metric '{spec}': {how if known.bind else f'{first.strip()} takes no argument'}")
    if name in METRICS or name in RESERVED:
        raise UsageError(f"metric {spec}: there is a figure {name} already; give the function another name")
    return custom_info(spec)


def _unknown(name: str) -> UsageError:
    hint = near(name, METRICS)
    known = f" There are {', '.join(METRICS)}" if "did you mean" in hint else ""
    return UsageError(f"there is no metric '{name}'{hint}{known}; or your own, as module:function")


def make_metrics(specs: Iterable[MetricSpec]) -> tuple[AnswerMetric, ...]:
    """The metrics of a set. Raises UsageError as make_metric does, and if two have the same name."""
    made: dict[str, AnswerMetric] = {}
    for spec in specs:
        metric = make_metric(spec)
        if metric.info.name in made:
            raise UsageError(f"two metrics of a set are named {metric.info.name}: leave one out")
        made[metric.info.name] = metric
    return tuple(made.values())


def default_metrics(expected: Iterable[str]) -> tuple[MetricSpec, ...]:
    """The metrics where a recipe names none: those of JSON too if every expected answer is a JSON object or array."""
    given = list(expected)
    is_json = bool(given) and all(map(answers.is_json, given))
    return (*DEFAULTS, *(JSON_DEFAULTS if is_json else ()), "repetition")


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
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        found: object = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"metric {spec}: {module} can't be imported: {what}") from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
    if not callable(found):
        raise UsageError(f"metric {spec}: {module} has no function {name}")
    return found


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
