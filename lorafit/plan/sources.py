"""The data sources: their formats and columns, and how many rows they have."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from lorafit.errors import DataError
from lorafit.plan.values import Context, SourcePlan
from lorafit.progress import stage
from lorafit.recipe import Source
from lorafit.rows import COLUMNS, OPTIONAL, Format, Row, detect_format, digest, is_local, read_rows, size_digest
from lorafit.text import printable
from lorafit.tree import key_path

Reading = Literal["nothing", "formats", "digests"]
"""How far sources are looked into: not at all, their first rows, or whole for their hash."""


def plan_sources(context: Context, reading: Reading) -> tuple[list[SourcePlan], list[SourcePlan]]:
    """The sources of training rows and those of validation rows. Those that can't be read are noted as faults."""
    dataset = context.recipe.dataset
    validation = dataset.validation if isinstance(dataset.validation, tuple) else ()
    return (
        [_source(context, source, f"dataset.train.{i}", reading) for i, source in enumerate(dataset.train)],
        [_source(context, source, f"dataset.validation.{i}", reading) for i, source in enumerate(validation)],
    )


def counted(source: SourcePlan) -> SourcePlan:
    """The source with its number of rows, if it is local."""
    if source.hub is not None:
        return source
    found = itertools.islice(read_rows(source.path), source.max_rows)
    with stage(f"counting {source.path}", unit="rows") as counting:
        for _ in found:
            counting.done += 1
    return dataclasses.replace(source, rows=int(counting.done))


def unread_columns(row: Row, format: Format, source: SourcePlan) -> list[str]:
    """A row's columns that its format does not read. A template may read any."""
    if source.template is not None:
        return []
    known = {source.columns.get(name, name) for name in (*COLUMNS[format], *OPTIONAL[format])}
    read = known | {name.split(".")[0] for name in known}
    return [printable(name) for name in row.fields if name not in read]


def _source(context: Context, source: Source, key: str, reading: Reading) -> SourcePlan:
    asked = SourcePlan(
        source.path,
        key,
        _given(source.format),
        dict(source.columns),
        dict(source.template) if isinstance(source.template, dict) else source.template,
        source.weight,
        source.max_rows,
    )
    if not is_local(source.path):
        hub = {"split": source.split, "name": source.name, "revision": source.revision}
        return dataclasses.replace(asked, hub=hub)
    for name in ("split", "name", "revision"):
        if name in source.model_fields_set:
            context.wrong((*key_path(key), name), "is for hub data sets; this is a local path")
    if reading == "nothing":
        return asked
    try:
        return _looked_into(context, asked, reading)
    except DataError as error:
        context.faults.append(((*key_path(key), "path"), error))
        return asked


def _looked_into(context: Context, source: SourcePlan, reading: Reading) -> SourcePlan:
    """The source with its format and, if asked for, its hash. Raises DataError."""
    key = source.key
    first = next(read_rows(source.path), None)
    if first is None:
        raise DataError(f"{source.path}: there are no rows")
    format = source.format
    if format is None:
        format, reason = detect_format(first, source.columns, source.template, key)
        context.choose(f"{key}.format", format, reason)
    unread = unread_columns(first, format, source)
    if unread:
        context.remarks.append(f"{key}: not read: the column{'s' * (len(unread) > 1)} {', '.join(unread)}.")
    if format == "preference":
        context.remarks.append(f"{key}: of each pair the chosen answer is learned.")
    if format == "unpaired_preference":
        context.remarks.append(f"{key}: the rows whose label is false are left out.")
    streamed = context.recipe.dataset.streaming and key.startswith("dataset.train")
    if reading == "formats":
        return dataclasses.replace(source, format=format)
    sha256 = size_digest(source.path) if streamed else digest(source.path)
    return dataclasses.replace(source, format=format, sha256=sha256)


def _given(format: str) -> Format | None:
    return None if format == "auto" else format  # type: ignore[return-value]
