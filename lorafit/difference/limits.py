"""Demands on data and results that a change makes weaker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from lorafit.audit import RULES
from lorafit.recipe import Recipe

_GATE = re.compile(r"(?P<left>.*?)\s*(?P<sign>>=|<=|==|!=|>|<)\s*(?P<right>.*?)\s*(?P<ci>\(\s*ci\s*\))?\s*")
_MERGE = {"max_kl": False, "min_top1": True, "max_loss_increase": False, "max_logit_difference": False}
"""The merge's limits, and whether a lower one is the weaker."""


class _Gate(NamedTuple):
    left: str
    sign: str
    right: str
    by_interval: bool


def loosened(before: Recipe, after: Recipe) -> Iterator[tuple[str, str]]:
    """A key and a sentence for each gate and limit that was removed or made weaker."""
    yield from _gates(before.eval.gates, after.eval.gates)
    for name, lower_is_weaker in _MERGE.items():
        old, new = getattr(before.merge, name), getattr(after.merge, name)
        if _is_weaker(old, new, lower_is_weaker):
            yield f"merge.{name}", f"A limit of the merge was loosened: {name} {_shown(old)} to {_shown(new)}."
    if after.merge.verify == "none" and before.merge.verify != "none":
        yield "merge.verify", f"The merged model is no longer checked: verify {before.merge.verify} to none."
    for rule, counts in RULES.items():
        old, new = getattr(before.dataset.audit, rule), getattr(after.dataset.audit, rule)
        if _is_weaker(old, new, False):
            yield (
                f"dataset.audit.{rule}",
                f"The data may be worse than before: {rule} ({counts}) {_shown(old)} to {_shown(new)}.",
            )


def _is_weaker(old: float | None, new: float | None, lower_is_weaker: bool) -> bool:
    if old is None or old == new:
        return False
    return new is None or (new < old if lower_is_weaker else new > old)


def _shown(limit: float | None) -> str:
    return "no limit" if limit is None else f"{limit:g}"


def _gates(before: tuple[str, ...], after: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    kept = {_read(text) for text in after}
    free = [text for text in after if _read(text) not in {_read(old) for old in before}]
    for text in before:
        old = _read(text)
        if old in kept:
            continue
        instead = next((other for other in free if _read(other)[:2] == old[:2]), None)
        if instead is None:
            yield "eval.gates", f"A gate was removed: {text}."
            continue
        free.remove(instead)
        if not _is_stricter(old, _read(instead)):
            yield "eval.gates", f"A gate was loosened: {text} became {instead}."


def _read(text: str) -> _Gate:
    found = _GATE.fullmatch(text)
    if found is None:
        return _Gate(text, "", "", False)
    left, right = (" ".join(found[part].split()) for part in ("left", "right"))
    return _Gate(left, found["sign"], right, found["ci"] is not None)


def _is_stricter(old: _Gate, new: _Gate) -> bool:
    """Whether the new gate lets nothing pass that the old one didn't, as far as plain numbers tell."""
    if old.by_interval and not new.by_interval:
        return False
    if old.right == new.right:
        return True
    numbers = [_number(old.right), _number(new.right)]
    if numbers[0] is None or numbers[1] is None or old.sign in ("==", "!="):
        return False
    return numbers[1] >= numbers[0] if old.sign.startswith(">") else numbers[1] <= numbers[0]


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
