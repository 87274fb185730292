"""Changes of a recipe that usually surprise, and weaker demands on data and results, in a sentence each."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lorafit.diff.recipes import Change
from lorafit.evaluation.gates import Demand, compute, parse
from lorafit.outcome import Outcome
from lorafit.plan.adapters import adapter_of
from lorafit.recipe import Recipe
from lorafit.rows.audit import RULES
from lorafit.text import brief, gib


@dataclass(frozen=True)
class Warned:
    """A sentence, and the key that it is about."""

    key: str
    text: str


@dataclass(frozen=True)
class Both:
    """Two recipes and their changes."""

    before: Outcome
    after: Outcome
    changes: list[Change]

    @property
    def outcomes(self) -> tuple[Outcome, Outcome]:
        return self.before, self.after

    def changed(self, path: str) -> list[Change]:
        """The changes of a key, or of anything below it."""
        return [one for one in self.changes if one.path == path or one.path.startswith(f"{path}.")]

    def steps(self) -> str:
        """How the number of steps changes, as an end of a sentence; empty where that is not known, or the same."""
        before, after = self.before.steps, self.after.steps
        return f": {before:,} optimizer steps become {after:,}" if before and after and before != after else ""


_asked = operator.attrgetter("left", "comparison")
"""What a gate is about, whatever it demands."""
_MERGE = {"max_kl": False, "min_top1": True, "max_loss_increase": False, "max_logit_difference": False}
"""The merge's limits, and whether a lower one is the weaker."""


def _loosened(both: Both) -> Iterator[Warned]:
    """Gates and limits that were removed or made weaker."""
    before, after = both.before.recipe, both.after.recipe
    yield from (Warned("eval.gates", text) for text in _gates(before.eval.gates, after.eval.gates))
    for name, lower_is_weaker in _MERGE.items():
        old, new = getattr(before.merge, name), getattr(after.merge, name)
        if _is_weaker(old, new, lower_is_weaker):
            what = f"{name} {_shown(old)} to {_shown(new)}"
            yield Warned(f"merge.{name}", f"A limit of the merge was loosened: {what}.")
    if after.merge.verify == "none" and before.merge.verify != "none":
        what = f"verify {before.merge.verify} to none"
        yield Warned("merge.verify", f"The merged model is no longer checked: {what}.")
    for rule, counts in RULES.items():
        old, new = getattr(before.dataset.audit, rule), getattr(after.dataset.audit, rule)
        if _is_weaker(old, new, False):
            what = f"{rule} ({counts}) {_shown(old)} to {_shown(new)}"
            yield Warned(f"dataset.audit.{rule}", f"The data may be worse than before: {what}.")


def _is_weaker(old: float | None, new: float | None, lower_is_weaker: bool) -> bool:
    if old is None or old == new:
        return False
    return new is None or (new < old if lower_is_weaker else new > old)


def _shown(limit: float | None) -> str:
    return "no limit" if limit is None else f"{limit:g}"


def _gates(before: tuple[str, ...], after: tuple[str, ...]) -> Iterator[str]:
    kept = {_read(text) for text in after}
    free = [text for text in after if _read(text) not in {_read(old) for old in before}]
    for text in before:
        old = _read(text)
        if old in kept:
            continue
        instead = next((other for other in free if _asked(_read(other)) == _asked(old)), None)
        if instead is None:
            yield f"A gate was removed: {text}."
            continue
        free.remove(instead)
        if not _is_stricter(old, _read(instead)):
            yield f"A gate was loosened: {text} became {instead}."


def _read(text: str) -> Demand:
    """A gate but for how it is written."""
    return dataclasses.replace(parse(text), text="")


def _is_stricter(old: Demand, new: Demand) -> bool:
    """Whether the new gate lets nothing pass that the old one didn't, as far as plain numbers tell."""
    if old.by_interval and not new.by_interval:
        return False
    if old.right == new.right:
        return True
    before, after = (float(compute(one.right, lambda _: math.nan)) for one in (old, new))
    return after >= before if old.comparison.startswith(">") else old.comparison.startswith("<") and after <= before


def is_on(recipe: Recipe, key: str) -> bool:
    """Whether a switch, which may stand in an absent section, is on."""
    found: Any = recipe
    for step in key.split("."):
        found = getattr(found, step, None)
    return found is True


def quantized(recipe: Recipe) -> str:
    """How the base is kept, for a sentence."""
    section = recipe.quantization
    if section is None:
        return "not quantized"
    return f"quantized to 4 bits ({section.bnb_4bit_quant_type})" if section.load_in_4bit else "quantized to 8 bits"


def trained(both: Both) -> str:
    """How the number of trained parameters changes, as an end of a sentence; empty where it doesn't."""
    plans = [one.plan for one in both.outcomes]
    counts = [plan.trainable_parameters if plan else 0 for plan in plans]
    return f", {counts[0]:,} trained parameters become {counts[1]:,}" if all(counts) and counts[0] != counts[1] else ""


def values(change: Change) -> str:
    """The values of a change, for a sentence."""
    return f"{_value(change.before)} to {_value(change.after)}"


def _value(value: Any) -> str:
    return "none" if value is None else brief(value)


def times(ratio: float) -> str:
    return f"x{ratio:.3g}"


def listed(names: list[str]) -> str:
    shown = names[:3] + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
    return ", ".join(shown)


NEAR = 0.01
"""Relative difference below which two ratios are the same."""


def warnings(before: Outcome, after: Outcome, changes: list[Change]) -> list[Warned]:
    both = Both(before, after, changes)
    return [one for check in _CHECKS for one in check(both)]


def _rate(both: Both) -> Iterator[Warned]:
    """A learning rate belongs to a batch: linear rule (arXiv:1706.02677) or square root (arXiv:1404.5997)."""
    old, new = (one.training.learning_rate for one in both.outcomes)
    old_rows, new_rows = (one.rows_per_step for one in both.outcomes)
    key, rate, batch = "training.learning_rate", new / old, new_rows / old_rows
    if rate == 1 and batch != 1:
        yield Warned(
            key,
            f"The batch goes from {old_rows} to {new_rows} rows a step ({times(batch)}) while learning_rate stays at "
            f"{old:g}: the linear rule would make it {old * batch:.3g}, the square-root rule {old * batch**0.5:.3g}.",
        )
    elif rate != 1 and batch == 1:
        yield Warned(
            key,
            f"learning_rate goes from {old:g} to {new:g} ({times(rate)}) while the batch stays at {old_rows} rows a "
            f"step: the linear rule has such a change with a batch of {old_rows * rate:.3g}, the square-root rule with "
            f"{old_rows * rate**2:.3g}.",
        )
    elif rate != 1 and not any(abs(rate / usual - 1) < NEAR for usual in (batch, batch**0.5)):
        yield Warned(
            key,
            f"learning_rate ({old:g} to {new:g}, {times(rate)}) and batch ({old_rows} to {new_rows} rows a step, "
            f"{times(batch)}) change by no usual rule: the linear one would make it {old * batch:.3g}, the "
            f"square-root one {old * batch**0.5:.3g}.",
        )


def _scale(both: Both) -> Iterator[Warned]:
    was, now = (adapter_of(one.recipe) for one in both.outcomes)
    old, new, section = was.scale, now.scale, now.name
    if old is None or new is None or abs(new / old - 1) < NEAR:
        return
    touched = [name for name in now.scaling if both.changed(f"{section}.{name}")]
    only = f"Only {touched[0]} changed, so" if len(touched) == 1 else f"With {listed(touched)},"
    how = [was.formula, now.formula]
    formula = how[0] if how[0] == how[1] else f"{how[0]}, then {how[1]}"
    yield Warned(
        f"{section}.{touched[0]}" if touched else section,
        f"{only} the scale of the update ({formula}) goes from {old:.4g} to {new:.4g} ({times(new / old)}), which "
        "acts much as another learning rate does.",
    )


def _adapter(both: Both) -> Iterator[Warned]:
    (was, now), size = (adapter_of(one.recipe) for one in both.outcomes), trained(both)
    if was.trains_base != now.trains_base:
        what = "an adapter is trained instead of all parameters" if was.trains_base else "all parameters are trained"
        section = now.name if was.trains_base else was.name
        yield Warned(section, f"The {section} section was {'added' if was.trains_base else 'removed'}: {what}{size}.")
        return
    if was.name != now.name:
        yield Warned(now.name, f"Another kind of adapter is trained, {now.name} in place of {was.name}{size}.")
        return
    for change in both.changed(f"{now.name}.target_modules"):
        plans = [one.plan for one in both.outcomes]
        meant = [{*plan.choices[change.key].value} if plan and change.key in plan.choices else None for plan in plans]
        if meant[0] is not None and meant[0] == meant[1]:
            continue
        counts = [plan.model.adapted_modules if plan else 0 for plan in plans]
        modules = f": {counts[0]} adapted modules become {counts[1]}" if all(counts) else ""
        yield Warned(change.key, f"Other modules are adapted{modules}{size}.")


def _start(both: Both) -> Iterator[Warned]:
    for change in both.changed("start_from"):
        yield Warned(change.key, f"Training starts from another adapter, {values(change)}: losses don't compare.")


def _model(both: Both) -> Iterator[Warned]:
    for change in both.changed("model.name_or_path"):
        yield Warned(
            change.key,
            f"The base model is another, {values(change)}: adapters, losses and results of before don't compare.",
        )
    for change in both.changed("model.revision"):
        yield Warned(change.key, f"The base model's revision is another, {values(change)}: its weights may be, too.")
    for key, what in (("model.trust_remote_code", "the model's repository"), ("eval.trust_code", "a metric or a task")):
        if is_on(both.after.recipe, key) and not is_on(both.before.recipe, key):
            yield Warned(key, f"{key} was turned on: Python code of {what} runs on your machine.")
    old, new = (quantized(one.recipe) for one in both.outcomes)
    if old != new:
        memory = [one.peak.total / 2**30 if one.peak else None for one in both.outcomes]
        sizes = f"; peak memory goes from {memory[0]:.2f} to {memory[1]:.2f} GiB" if None not in memory else ""
        yield Warned("quantization", f"The base was {old}, and is {new} now: its losses shift{sizes}.")


def _room(both: Both) -> Iterator[Warned]:
    old, new, memory = both.before.fits, both.after.fits, both.after.peak
    if new is not None and new != old and memory is not None and not new.startswith("fits"):
        yield Warned(
            "hardware",
            f"Peak memory is {gib(memory.total)} GiB now: {new}{f', and {old} before' if old else ''}.",
        )


def _template(both: Both) -> Iterator[Warned]:
    changed = both.changed("model.chat_template")
    if not changed:
        return
    parts = []
    old, new = both.before.choices, both.after.choices
    for key, what in (("end of turn", "answers end with"), ("chat template", "masks:")):
        if key in old and key in new:
            before, after = ((c.value if key == "end of turn" else c.reason) for c in (old[key], new[key]))
            parts += [f"{what} {brief(before)}, then {brief(after)}"] if before != after else []
    detail = f" ({'; '.join(parts)})" if parts else ""
    yield Warned(
        changed[0].key,
        f"The chat template is another, {values(changed[0])}: the model is trained on other text around every turn, "
        f"and has to be served with it{detail}.",
    )


def _rows(both: Both) -> Iterator[Warned]:
    old, new = both.before.recipe.training.max_length, both.after.recipe.training.max_length
    if new < old:
        yield Warned("training.max_length", f"max_length goes from {old} to {new}: {_cut(both, new)}.")
    for change in both.changed("dataset.loss_on"):
        yield Warned(change.key, f"Other tokens are learned, loss_on {values(change)}: losses of before don't compare.")
    for change in both.changed("training.packing"):
        how = "rows now share a pass" if change.after else "each row now is a row of a batch"
        yield Warned(
            change.key,
            f"packing was turned {'on' if change.after else 'off'}: {how}, so a step has "
            f"{'more' if change.after else 'fewer'} tokens at the same learning rate{both.steps()}.",
        )
    sources = both.changed("dataset.train")
    if sources:
        counts = both.before.rows, both.after.rows
        rows = f": {counts[0]:,} training rows become {counts[1]:,}" if counts[0] and counts[1] else ""
        yield Warned("dataset.train", f"The training data changed ({listed([one.key for one in sources])}){rows}.")
    held_out = both.changed("dataset.validation")
    if held_out:
        yield Warned(
            "dataset.validation",
            f"The validation rows changed ({listed([one.key for one in held_out])}): their losses don't compare with "
            "those of before.",
        )


def _length(both: Both) -> Iterator[Warned]:
    length = both.changed("training.num_train_epochs") + both.changed("training.max_steps")
    if length:
        passes = both.before.epochs, both.after.epochs
        seen = f"; passes over the rows: {passes[0]:.3g}, then {passes[1]:.3g}" if passes[0] and passes[1] else ""
        what = listed([f"{change.path.split('.')[1]} {values(change)}" for change in length])
        yield Warned(length[0].key, f"The run's length changed, {what}{both.steps()}{seen}.")
    for change in both.changed("training.seed"):
        split = isinstance(both.after.recipe.dataset.validation, float)
        other = ", and other rows are held out for validation, so that its losses don't compare" if split else ""
        yield Warned(
            change.key, f"The seed changed, {values(change)}: the adapter's start and the order of rows differ{other}."
        )


_CHECKS: tuple[Callable[[Both], Iterator[Warned]], ...] = (
    _model, _start, _room, _adapter, _scale, _rate, _rows, _template, _length, _loosened
)  # fmt: skip


def _cut(both: Both, length: int) -> str:
    """What a shorter max_length does to the rows, by an audit where there is one."""
    drops = both.after.recipe.dataset.excess_length_strategy == "drop"
    if both.after.audit is not None:
        sources = both.after.audit.train
        cut = sum(source.found["truncated"].count for source in sources if "truncated" in source.found)
        read = sum(source.read for source in sources)
        left = sum(sum(source.dropped.values()) for source in sources)
        return f"{cut:,} of {read:,} rows are cut, and {left:,} are left out"
    what = "left out" if drops else "cut at the end, with the answers that stand there"
    if both.before.audit is not None:
        longest = max((source.longest for source in both.before.audit.train), default=0)
        if longest <= length:
            return f"no row is longer, the longest has {longest:,} tokens"
        return f"rows longer than that are {what}; the longest has {longest:,} tokens"
    return f"rows longer than that are {what}; `lorafit preview` counts them"
