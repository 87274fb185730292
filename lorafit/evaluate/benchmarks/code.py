"""Code that a local task would bring: refused, unless it is trusted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jinja2 import BaseLoader, StrictUndefined

from lorafit.bounds import Environment, read_bytes, within
from lorafit.errors import DataError, UsageError, first_line
from lorafit.evaluate.benchmarks.types import Benchmarks
from lorafit.written import expanded


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
    """What a file includes, if it would run no code."""
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


def _values_of(config: Any, key: str) -> Iterator[Any]:
    """What a key has anywhere in a file."""
    values = config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()
    for value in values:
        yield from _values_of(value, key)
    if isinstance(config, dict) and key in config:
        yield config[key]


@contextlib.contextmanager
def kept_templates(benchmarks: Benchmarks) -> Iterator[None]:
    """Templates of tasks that can reach nothing but their document: the harness's own can call any Python."""
    from lm_eval import utils

    before = utils.env
    if not benchmarks.trust_code:
        utils.env = Environment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
        utils.env.filters |= {name: own for name, own in before.filters.items() if name not in utils.env.filters}
    try:
        yield
    finally:
        utils.env = before
