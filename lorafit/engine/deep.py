"""The whole data of a recipe, tokenized and audited as for training. Loads torch, but no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lorafit.engine.data.prepare import prepare
from lorafit.engine.evaluate.run import rehearse
from lorafit.engine.quiet import hush_progress
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DataError, LorafitError, UsageError
from lorafit.hardware import meant_hardware
from lorafit.plan import plan_recipe, with_audit
from lorafit.rows.audit import Audit, Limits, Share, findings, source_findings
from lorafit.tree import KeyPath
from lorafit.validate.findings import Findings


def check_deep(found: Findings, file: str) -> None:
    """Note what an audit finds beyond its limits, and a tokenizer or template that does not work."""
    hush_progress()
    recipe = found.recipe
    try:
        plan = plan_recipe(recipe, file, found.options.hardware or meant_hardware(recipe), count_rows=False)
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
