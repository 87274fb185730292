"""The data as the model will see it, without weights: rows by loss mask, lengths, packing, the audit; and `validate
--deep`."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lorafit.engine import hush_progress
from lorafit.engine.data.encode import IGNORED, Tokens
from lorafit.engine.data.prepare import Prepared, pack, prepare
from lorafit.engine.data.render import special_tokens
from lorafit.engine.evaluate.run import rehearse
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DataError, LorafitError, UsageError
from lorafit.hardware import Hardware
from lorafit.plan import Plan, plan_recipe, with_audit
from lorafit.rows import place_of
from lorafit.rows.audit import Audit, Limits, Share, breaches, findings, source_findings
from lorafit.tree import KeyPath
from lorafit.validate.findings import Findings

BARS = 10
PACKED_ROWS = 10_000
"""Rows that packing is tried on where it is off."""


def preview(plan: Plan, wanted: list[int], strict: bool, validation: bool, ids: bool) -> dict[str, Any]:
    """What `lorafit preview` shows, as JSON-able values.

    Args:
        wanted: numbers of the rows to show, from 1, in the order of the sources.
        strict: whether a number without a row is an error.
        validation: whether the rows are validation rows.
        ids: whether token ids and labels are given as well.

    Returns `audit`, `breaches` (lines, empty if training may begin), `lengths`, `packing` and `rows`,
    each with its `segments`: texts that are `learned` or not, of `special` tokens or not; of a pair they are
    those of the chosen answer, and `rejected` the other answer's. Raises DataError, and UsageError for a row that is
    not there.
    """
    hush_progress()
    tokenizer = load_tokenizer(plan)
    data = prepare(plan.data, tokenizer)
    plan = with_audit(plan, data.audit)
    rows = shown_rows(data, validation, max(wanted, default=0))
    chosen = [number for number in wanted if number <= len(rows)]
    if strict and chosen != wanted:
        missing = next(number for number in wanted if number > len(rows))
        raise UsageError(f"--row {missing}: there are {len(rows)} {'validation' if validation else 'training'} rows")
    return {
        "preview_version": 1,
        "run": plan.output_dir,
        "loss_on": plan.data.loss_on,
        "chat_template": {key: dataclasses.asdict(c) for key, c in plan.choices.items() if key == "chat template"},
        "steps": plan.schedule.total_steps if plan.schedule else None,
        "audit": data.audit.as_dict(),
        "limits": plan.data.audit,
        "remarks": list(plan.remarks),
        "breaches": breaches(findings(data.audit, plan.data.audit)),
        "lengths": lengths(data.lengths, plan.data.max_length),
        "packing": packing(plan, data),
        "part": "validation" if validation else "training",
        "rows": [shown_row(rows[number - 1], number, tokenizer, ids) for number in chosen],
    }


def shown_rows(data: Prepared, validation: bool, count: int) -> Dataset:
    """The rows to choose from; of a stream, the first `count`."""
    if validation:
        if data.validation is None:
            raise UsageError("--validation: the recipe has no validation rows")
        return data.validation
    if data.rows is not None:
        return data.rows
    return Dataset.from_list(list(itertools.islice(data.train, count)))


def shown_row(row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase, ids: bool) -> dict[str, Any]:
    shown = {
        "number": number,
        "place": place_of(row["file"], row["number"]) if "file" in row else None,
        "tokens": len(row["input_ids"]),
        "learned": sum(label != IGNORED for label in row["labels"][1:]),
        "segments": list(segments(row["input_ids"], row["labels"], tokenizer)),
    }
    if row.get("rejected_ids"):
        answer = segments(row["rejected_ids"], row["rejected_labels"], tokenizer)
        shown["rejected"] = [segment for segment in answer if segment["learned"]]
    names = ("input_ids", "labels", *(("rejected_ids", "rejected_labels") if "rejected" in shown else ()))
    return shown | ({name: row[name] for name in names} if ids else {})


def segments(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Runs of tokens of one kind, as text. Together they are the row."""
    special = set(special_tokens(tokenizer).values())
    kinds = [(label != IGNORED, token in special) for token, label in zip(ids, labels, strict=True)]
    whole = tokenizer.decode(ids)
    end = shown = 0
    for (learned, control), run in itertools.groupby(kinds):
        end += len(list(run))
        # A token's text may depend on those before it, so the whole beginning is decoded. A character
        # that the beginning ends within belongs to the next run.
        beginning = tokenizer.decode(ids[:end])
        if not whole.startswith(beginning):
            beginning = beginning.rstrip("\ufffd")
        begin, shown = shown, max(shown, len(beginning))
        yield {"text": whole[begin:shown], "learned": learned, "special": control}


def lengths(values: Tokens | None, max_length: int) -> dict[str, Any] | None:
    """How long the rows are, in tokens after cutting: a histogram, and some of the quantiles."""
    if values is None:
        return None
    edges = np.unique(np.linspace(0, min(int(values.max()), max_length), BARS + 1).astype(int))
    counts, _ = np.histogram(values, edges + 0.5)  # a bar counts what is above the edge before and up to its own
    return {
        "median": int(np.median(values)),
        "p90": int(np.quantile(values, 0.9)),
        "p99": int(np.quantile(values, 0.99)),
        "longest": int(values.max()),
        "histogram": [{"up_to": int(edge), "rows": int(count)} for edge, count in zip(edges[1:], counts, strict=True)],
    }


def packing(plan: Plan, data: Prepared) -> dict[str, Any] | None:
    """How full the packed rows are, and how much of the batches would be padding without packing."""
    rows, part = data.rows, data.audit.training_rows
    if rows is None or data.lengths is None or plan.method.sequences > 1:
        return None
    tokens, packs, tried = part.tokens, part.packs, part.rows
    values = data.lengths
    order = np.random.default_rng(plan.data.seed).permutation(len(values))
    if packs is None:
        chosen = (order if plan.data.shuffle else np.arange(len(values)))[:PACKED_ROWS]
        tried, tokens = len(chosen), int(values[chosen].sum())
        packs = len(pack(rows.select(chosen), plan.data.max_length))
    batch = plan.training.per_device_train_batch_size
    starts = np.arange(0, len(order), batch)
    longest = np.maximum.reduceat(values[order], starts).astype(np.int64)
    padded = int((longest * np.diff([*starts, len(order)])).sum())
    return {
        "on": plan.data.packing,
        "rows": tried,
        "packed_rows": packs,
        "efficiency": tokens / (packs * plan.data.max_length),
        "efficiency_without": int(values.sum()) / padded,
    }


def check_deep(found: Findings, file: str, hardware: Hardware) -> None:
    """Note what an audit finds beyond its limits, and a tokenizer or template that does not work."""
    hush_progress()
    recipe = found.recipe
    try:
        plan = plan_recipe(recipe, file, hardware, count_rows=False)
        tokenizer = load_tokenizer(plan)
        data = prepare(plan.data, tokenizer)
        known = len(plan.remarks)
        found.notes += with_audit(plan, data.audit).remarks[known:]
    except UsageError as error:  # a warm-up as long as a run of one step
        key = "warmup_ratio" if recipe.training.warmup_steps is None else "warmup_steps"
        found.wrong(("training", key), error)
        return
    except LorafitError as error:
        found.wrong(("dataset",) if isinstance(error, DataError) else ("model", "name_or_path"), error)
        return
    try:
        rehearse(plan, tokenizer, data)
    except LorafitError as error:
        where = re.match(r"eval\.gates\.(\d+): ", str(error))
        what = type(error)(str(error).removeprefix(where[0])) if where else error
        found.wrong(("eval", "gates", int(where[1])) if where else ("eval",), what)
    for place, one in _placed(data.audit, plan.data.audit):
        if one.is_breach:
            limited = one.rule in recipe.dataset.audit.model_fields_set
            path = ("dataset", "audit", one.rule) if limited else place
            found.wrong(path, DataError(f"{one.finding.first} (dataset.audit.{one}, is above {one.limit:.4g})"))
    rows = data.audit.training_rows
    found.facts |= {"rows": rows.rows, "tokens": rows.tokens}


def _placed(audit: Audit, limits: Limits) -> Iterator[tuple[KeyPath, Share]]:
    """What was found, with its source's place in the recipe."""
    for part, sources in (("train", audit.train), ("validation", audit.validation)):
        for number, source in enumerate(sources):
            for one in source_findings(source, limits):
                yield ("dataset", part, number, "path"), one
    for one in findings(audit, limits):
        if one.rule in ("duplicates", "leaked"):  # of all sources together
            yield ("dataset", "train"), one
