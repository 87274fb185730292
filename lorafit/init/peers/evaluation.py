"""Held-out rows, and when a training evaluates and saves."""

from __future__ import annotations

import math
from typing import Any

from lorafit.errors import LorafitError
from lorafit.init.peers.convert import Conversion
from lorafit.init.peers.dialect import flag, number, whole
from lorafit.rows import is_local, read_rows


def evaluation(c: Conversion, per_epoch: tuple[str, str] = ("", ""), logged: int = 500) -> None:
    """When it evaluates and saves.

    Args:
        per_epoch: keys that say how often in an epoch.
        logged: steps between two lines of a log, by default, which evaluations follow.

    Of rows that are held out, tools of transformers make no use unless they are told to; lorafit would.
    """
    has_rows = c.value("dataset.validation") is not None
    for what, key in zip(("eval", "save"), per_epoch, strict=True):
        given = next((k for k in (f"{what}_strategy", "evaluation_strategy") if c.given(k)), f"{what}_strategy")
        strategy = _strategy(c.plain(given)) if what == "eval" or given == "save_strategy" else None
        steps = c.get(f"{what}_steps", number, 0.0)
        often = c.get(key, whole, 0) if key else 0
        if what == "eval" and not has_rows:
            for name in (given, "eval_steps", key):
                if c.given(name):
                    c.fates[name] = "no effect on what is learned: there are no validation rows"
            continue
        source = key if often else f"{what}_steps" if steps else given
        if often:
            _often(c, what, key, 1 / often, each_epoch=True)
        elif steps and strategy in (None, "steps"):
            if steps >= 1:
                _each(c, what, int(steps), source)
            else:
                _often(c, what, source, steps, each_epoch=False)
        elif strategy == "steps":
            _each(c, what, {"eval": c.value("training.logging_steps") or logged, "save": 500}[what], source)
        elif strategy is not None:
            known = strategy in ("no", "epoch")
            c.put(f"training.{what}_strategy", strategy if known else "auto", source)
            if not known:
                c.note(source, f"'{strategy}': no equivalent; lorafit chooses")


def _strategy(value: Any) -> str | None:
    return None if value is None else "no" if value is False else str(value)


def _each(c: Conversion, what: str, steps: int, source: str) -> None:
    c.put(f"training.{what}_strategy", "steps", source)
    c.put(f"training.{what}_steps", steps, source)


def _often(c: Conversion, what: str, key: str, share: float, each_epoch: bool) -> None:
    """A share of an epoch, or of the whole training, in steps, if the rows can be counted."""
    if each_epoch and share == 1:
        c.put(f"training.{what}_strategy", "epoch", key)
        return
    per_epoch = steps_per_epoch(c)
    if per_epoch is None:
        c.put(f"training.{what}_strategy", "epoch", key)
        c.note(key, f"in steps it depends on the number of rows, which is not known here; set training.{what}_steps")
        return
    total = per_epoch * (1.0 if each_epoch else float(c.value("training.num_train_epochs") or 1))
    total = total if each_epoch or not c.value("training.max_steps") else float(c.value("training.max_steps"))
    _each(c, what, max(math.ceil(total * share), 1), f"{key}, of {per_epoch} steps an epoch on one GPU")


def steps_per_epoch(c: Conversion) -> int | None:
    """On one GPU, of rows that are here and are not packed."""
    count = rows_here(c)
    if count is None or c.value("training.packing"):
        return None
    held_out = c.value("dataset.validation")
    count -= round(count * held_out) if isinstance(held_out, float) else 0
    batch = c.value("training.per_device_train_batch_size") or 1
    steps = c.value("training.gradient_accumulation_steps") or 1
    return max(math.ceil(math.ceil(count / batch) / steps), 1)


def rows_here(c: Conversion) -> int | None:
    """The number of training rows; None if not all are on this disk."""
    total = 0
    for source in c.value("dataset.train") or ():
        if not is_local(source["path"]):
            return None
        try:
            count = sum(1 for _ in read_rows(source["path"]))
        except LorafitError:
            return None
        total += min(count, source.get("max_rows", count))
    return total


def held_out(c: Conversion, key: str) -> None:
    """A share of the training rows, or a number of them."""
    size = c.get(key, number, 0.0)
    if not size:
        return
    if size < 1:
        c.put("dataset.validation", size, key)
        return
    count = rows_here(c)
    if count is None or count <= size:
        c.note(key, f"{size:g} rows: lorafit takes a share of them; 0.05 is written in its place")
        c.put("dataset.validation", 0.05, key)
    else:
        c.put("dataset.validation", round(size / count, 6), f"{key}: {size:g} of {count} rows")


def quiet_evaluation(c: Conversion) -> None:
    """transformers evaluates and keeps the best only if it is told to."""
    patience = c.value("training.early_stopping_patience")
    if c.value("dataset.validation") is None:
        for key in ("early_stopping_steps", "load_best_model_at_end", "per_device_eval_batch_size"):
            if c.given(key):
                c.fates[key] = "no effect on what is learned: there are no validation rows"
        c.lines.pop("training.early_stopping_patience", None)
        return
    if "training.eval_strategy" not in c.lines:
        c.put("training.eval_strategy", "no", f"{c.title}'s default")
    rows = c.get("per_device_eval_batch_size", whole, 0)
    if rows:
        c.put("training.per_device_eval_batch_size", rows, "per_device_eval_batch_size")
    if c.value("training.eval_strategy") == "no":
        if patience:
            c.lines.pop("training.early_stopping_patience")
            c.fates["early_stopping_steps"] = "no effect on what is learned: there are no evaluations"
        best = False
    else:
        best = c.get("load_best_model_at_end", flag, False)
    given = c.given("load_best_model_at_end")
    c.put("training.load_best_model_at_end", best, "load_best_model_at_end" if given else f"{c.title}'s default")
