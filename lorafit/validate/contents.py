"""The first rows of a recipe's data: whether they are there and have what their format needs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorafit.errors import DataError
from lorafit.recipe import Recipe, Source
from lorafit.recipe.schema import EvalSet
from lorafit.rows import Row, data_files, detect_format, is_local, read_rows, to_example
from lorafit.rows.cells import Shape
from lorafit.rows.row import Fault as RowFault
from lorafit.tree import KeyPath, dotted
from lorafit.validate.findings import Findings

FIRST_ROWS = 20
"""Rows of each file that are read."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
Rows = Callable[[str, int], tuple[Row, ...]]
"""The first rows of a local source. Raises DataError."""


def first_rows(path: str, most: int) -> tuple[Row, ...]:
    """The first rows of a local source. Raises DataError."""
    return tuple(itertools.islice(read_rows(path), most))


def check_contents(found: Findings, rows: Rows) -> None:
    """Note the first row of each source that can't be used, and files that are missing."""
    faulty = {fault.mistake.path.rpartition(".")[0] for fault in found.faults if fault.exit_code == DataError.exit_code}
    for path, file, source in _named(found.recipe):
        if dotted(path) in faulty:
            continue
        if not is_local(file):
            _check_hub(found, (*path, "path"), file)
            continue
        try:
            _check_rows(dotted(path), file, source, rows, dict(found.recipe.dataset.audit))
        except DataError as error:
            found.wrong(place_of_fault(found, (*path, "path"), error, rows), error)


def place_of_fault(found: Findings, path: KeyPath, error: DataError, rows: Rows) -> KeyPath:
    """Where what is wrong with a source's rows was most likely written: a column's name or template, the format, or
    the path."""
    source = next((source for place, _, source in _named(found.recipe) if place == path[:-1]), None)
    if source is None:
        return path
    place, said = path[:-1], str(error)
    if isinstance(source, EvalSet) and isinstance(source.options, str) and f"{source.options!r} must be" in said:
        return (*place, "options")
    if made := re.search(r"\.template \((\w+)\): ", said):
        return (*place, "template", made[1])
    for column, name in source.columns.items():
        if f" {name!r} is missing" in said:
            return (*place, "columns", column)
    try:
        fields = rows(source.path or "", 1)[0].fields
    except (DataError, IndexError):
        return path
    for column, name in source.columns.items():
        if name not in fields and name.split(".")[0] not in fields:
            return (*place, "columns", column)
    return (*place, "format") if source.format != "auto" else path


def _named(recipe: Recipe) -> Iterator[tuple[KeyPath, str, Source | EvalSet]]:
    """The rows that a recipe names: where, the path, and all that is said of them."""
    dataset = recipe.dataset
    validation = dataset.validation if isinstance(dataset.validation, tuple) else ()
    for name, sources in (("train", dataset.train), ("validation", validation)):
        for number, source in enumerate(sources):
            yield ("dataset", name, number), source.path, source
    for number, one in enumerate(recipe.eval.sets):
        if one.path is not None:
            yield ("eval", "sets", number), one.path, one


def _check_rows(key: str, path: str, source: Source | EvalSet, rows: Rows, limits: dict[str, float | None]) -> None:
    """Raises DataError for the first row of a file that can't be read as its format wants it."""
    template = dict(source.template) if isinstance(source.template, dict) else source.template
    left, format = source.max_rows, source.format
    for file in data_files(path):
        first = rows(str(file), min(FIRST_ROWS, left or FIRST_ROWS))
        if first and format == "auto":
            format, _ = detect_format(first[0], source.columns, template, key)
        for row in first:
            try:
                to_example(row, Shape(format, source.columns, template, key))  # type: ignore[arg-type]
            except RowFault as error:
                if limits.get(error.rule) == 0:
                    raise DataError(f"{error} (dataset.audit.{error.rule} lets none pass)") from None
            if isinstance(source, EvalSet) and isinstance(source.options, str):
                _check_options(source.options, row)
        if left is not None:
            return  # later files may not be reached
    if format == "auto":
        raise DataError(f"{path}: there are no rows")


def _check_options(asked: str, row: Row) -> None:
    """Raises DataError where the column of a set's options holds none."""
    value: Any = row.fields
    for part in asked.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) for item in value):
        raise DataError(f"{row.place}: {asked!r} must be a list of two or more texts, the options of the row")


def _check_hub(found: Findings, path: KeyPath, name: str) -> None:
    """What isn't here may be on the hub, if it can be a name there."""
    if not _HUB_NAME.fullmatch(name):
        found.wrong(path, DataError(f"{name}: no such file or folder (looked in {Path.cwd()})"))
        return
    what = f"{name} is not here, so it is a hub data set, read when training begins"
    found.unchecked(path, DataError(f"was not checked: {what}"))
