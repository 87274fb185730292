"""Recipes compared, two or all of a working tree with a revision: what follows in sizes, memory, steps and from
`auto`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.diff.recipes import Change, Opened, Revision, compare, open_recipe, open_tree
from lorafit.diff.warnings import Warned, warnings
from lorafit.explain import defaults_of
from lorafit.hardware import Hardware
from lorafit.outcome import Outcome, Outcomes
from lorafit.plan.adapters import adapter_of
from lorafit.recipe import RecipeError, load
from lorafit.recipe.layers import Disk, read_recipe
from lorafit.rows import is_local
from lorafit.text import first_line, printable
from lorafit.validate.check import ENDINGS, find
from lorafit.written import at_keys

Unit = Literal["count", "bytes", "number", "text"]
_NO_VALUES = {"steps"}


@dataclass(frozen=True)
class Consequence:
    """A figure before and after; None where it isn't known."""

    name: str
    before: Any
    after: Any
    unit: Unit = "count"

    @property
    def change(self) -> float | None:
        """Relative, such as 0.5 for half as much again; None where that says nothing."""
        if self.unit == "text" or self.before is None or self.after is None or not self.before:
            return None
        return float(self.after) / float(self.before) - 1


@dataclass(frozen=True)
class Follower:
    """A value that the recipe leaves open and that changed with others."""

    key: str
    before: Any
    after: Any
    reason: str


def consequences(before: Outcome, after: Outcome) -> list[Consequence]:
    """The figures of both recipes; those that neither has are left out."""
    both = [Consequence(name, old, new, unit) for name, old, new, unit in _figures(before, after)]
    return [one for one in both if one.before is not None or one.after is not None]


def followers(before: Outcome, after: Outcome, changes: list[Change]) -> list[Follower]:
    """The plan's choices that differ although the recipe's own value is the same."""
    changed = {change.key for change in changes}
    old, new = before.choices, after.choices
    return [
        Follower(key, old[key].value, new[key].value, new[key].reason)
        for key in new
        if key in old and key not in changed and key not in _NO_VALUES and old[key].value != new[key].value
    ]


def unknowns(before: Opened, after: Opened) -> list[str]:
    """Why figures are missing, a sentence for each reason."""
    reasons: dict[str, list[str]] = {}
    uncounted = [one.name for one in (before, after) if _tokens(one.outcome) is None]
    if len(uncounted) == 1:
        reasons["tokens: `lorafit preview` counts them"] = uncounted
    for one in (before, after):
        for what, reason in _missing(one.outcome):
            reasons.setdefault(f"{what}: {reason.rstrip('.')}", []).append(one.name)
    return [
        f"Not known{'' if len(names) == 2 else f' for {printable(names[0])}'}: {reason}."
        for reason, names in reasons.items()
    ]


def _missing(found: Outcome) -> Iterator[tuple[str, str]]:
    model = first_line(found.no_model) if found.no_model else found.refused
    if model:
        yield "trained parameters and memory", model
    elif found.no_peak:
        yield "memory", found.no_peak
    if found.no_steps and found.no_steps == found.no_rows:
        yield "rows and steps", found.no_steps
    elif reason := found.no_rows or found.no_steps:
        yield "rows" if found.no_rows else "steps", reason


def _figures(before: Outcome, after: Outcome) -> Iterator[tuple[str, Any, Any, Unit]]:
    def of_plan(one: Outcome, key: str) -> int | None:
        return getattr(one.plan.model, key) or None if one.plan else None

    on_gpu = {before.hardware.device, after.hardware.device} == {"cuda"}
    yield "parameters", of_plan(before, "parameters"), of_plan(after, "parameters"), "count"
    trained = "trainable_parameters"
    yield "trained parameters", of_plan(before, trained), of_plan(after, trained), "count"
    yield "scale of the update", adapter_of(before.recipe).scale, adapter_of(after.recipe).scale, "number"
    name = "peak GPU memory" if on_gpu else "peak memory"
    yield name, before.peak and before.peak.total, after.peak and after.peak.total, "bytes"
    if before.fits or after.fits:
        yield "in the stated memory", _fits(before), _fits(after), "text"
    yield "rows per step", before.rows_per_step, after.rows_per_step, "count"
    yield "training rows", before.rows, after.rows, "count"
    yield "tokens of an epoch", _tokens(before), _tokens(after), "count"
    yield "passes over the rows", _rounded(before.epochs), _rounded(after.epochs), "number"
    yield "optimizer steps", before.steps, after.steps, "count"
    if before.hardware != after.hardware:
        yield "planned for", before.hardware.name, after.hardware.name, "text"


def _tokens(found: Outcome) -> int | None:
    """Tokens of an epoch, where an audit knows them."""
    return found.audit.training_rows.tokens if found.audit and found.audit.whole else None


def _fits(found: Outcome) -> str | None:
    stated = found.recipe.hardware
    return found.fits or (None if stated and (stated.gpu or stated.vram) else "none is stated")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


@dataclass(frozen=True)
class Difference:
    """What differs between two recipes, named as typed, and what follows; `unknown` and `remarks` are sentences."""

    before: str
    after: str
    changes: tuple[Change, ...]
    consequences: tuple[Consequence, ...] = ()
    followers: tuple[Follower, ...] = ()
    warnings: tuple[Warned, ...] = ()
    unknown: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        return bool(self.changes)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, as `--format json` prints them."""
        return {
            "before": self.before,
            "after": self.after,
            "same": not self.changes,
            "changes": [dataclasses.asdict(one) for one in self.changes],
            "consequences": [dataclasses.asdict(one) | {"change": one.change} for one in self.consequences],
            "followers": [dataclasses.asdict(one) for one in self.followers],
            "warnings": [dataclasses.asdict(one) for one in self.warnings],
            "unknown": list(self.unknown),
            "remarks": list(self.remarks),
        }


def difference(before: str, after: str, hardware: Hardware | None = None) -> Difference:
    """Compare two recipes, each a file or `REV:path`, planned for a machine or for what each is meant for.

    Raises UsageError and RecipeError.
    """
    outcomes = Outcomes(hardware)
    return between(open_recipe(before, outcomes), open_recipe(after, outcomes))


def between(before: Opened, after: Opened) -> Difference:
    """Compare two recipes that were read."""
    changes = [*compare(before.recipe.resolved(), after.recipe.resolved()), *_template_text(before, after)]
    differing = _differing_data(before, after)
    if not changes:
        return Difference(before.name, after.name, (), remarks=tuple(differing))
    old, new = before.outcome, after.outcome
    changes = [_as_shown(change, old, new) for change in changes]
    return Difference(
        before.name,
        after.name,
        tuple(changes),
        tuple(consequences(old, new)),
        tuple(followers(old, new, changes)),
        tuple(warnings(old, new, changes)),
        tuple(unknowns(before, after)),
        (*_as_now(before, after), *differing),
    )


def _as_shown(change: Change, before: Outcome, after: Outcome) -> Change:
    """The change with what the plan makes of its values, and with references where they were written."""
    meant = []
    for one, value in ((before, change.before), (after, change.after)):
        choice = (one.choices | defaults_of(one)).get(change.key)
        meant.append(choice.value if choice is not None and choice.value != value else None)
    return dataclasses.replace(
        change,
        before=at_keys(change.before, before.recipe.references, change.key),
        after=at_keys(change.after, after.recipe.references, change.key),
        meant_before=meant[0],
        meant_after=meant[1],
    )


def _template_text(before: Opened, after: Opened) -> list[Change]:
    """A chat template's file of the same name and other content is another template."""
    path = before.recipe.model.chat_template
    if path is None or path != after.recipe.model.chat_template:
        return []
    old, new = (one.content_hash(path) for one in (before, after))
    if old is None or new is None or old == new:
        return []
    return [Change("model.chat_template (text)", "model.chat_template", f"{path} {old[:8]}", f"{path} {new[:8]}")]


def _as_now(*recipes: Opened) -> list[str]:
    """What was read from the disk although a recipe is of a revision."""
    names = " and ".join(printable(one.name) for one in recipes if one.revision is not None)
    return [f"Data, models and templates are those on the disk now, for {names} as well."] if names else []


def _differing_data(before: Opened, after: Opened) -> list[str]:
    """Data files that are in the repository, and are others for the one recipe than for the other."""
    if before.revision is None and after.revision is None:
        return []
    paths = [{source.path for source in one.recipe.dataset.train if is_local(source.path)} for one in (before, after)]
    remarks = []
    for path in sorted(paths[0] & paths[1]):
        hashes = [one.content_hash(path) for one in (before, after)]
        if None not in hashes and hashes[0] != hashes[1]:
            remarks.append(f"{printable(path)} itself differs between the two; its rows are counted as they are now.")
    return remarks


_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Many:
    """Recipes by what became of them since a revision, in which the unreadable ones had mistakes."""

    revision: str
    changed: tuple[Difference, ...]
    same: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    unreadable: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return bool(self.changed or self.new or self.gone or self.unreadable)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, as `--format json` prints them."""
        whole = {"revision": self.revision, "changed": [one.as_dict() for one in self.changed]}
        return whole | {name: list(getattr(self, name)) for name in ("same", "new", "gone", "unreadable")}

    @property
    def others(self) -> Iterator[tuple[str, str]]:
        """Files that were not compared, with what they are."""
        for files, what in (
            (self.new, "new"),
            (self.gone, "gone"),
            (self.unreadable, f"new, as what {self.revision} has there is no recipe"),
        ):
            yield from ((file, what) for file in files)


def compare_all(revision: str, paths: Iterable[str], hardware: Hardware | None = None) -> Many:
    """Compare the recipes that paths name with their like in a revision. Raises UsageError and RecipeError."""
    given = tuple(paths)
    tree = open_tree(revision)
    short = revision[:10] if _COMMIT.fullmatch(revision) else revision
    outcomes = Outcomes(hardware)
    changed: list[Difference] = []
    kinds: dict[str, list[str]] = {"same": [], "new": [], "unreadable": []}
    here = [file for file in find(given).recipes if _is_whole(Path(file))]
    for file in here:
        name = Path(file).stem
        after = Opened(file, None, outcomes.of(load(file), name))
        place = Path(os.path.realpath(file))
        if not tree.is_file(place):
            kinds["new"].append(file)
            continue
        try:
            before = Opened(f"{short}:{file}", tree, outcomes.of(load(place, store=tree), name))
        except RecipeError:
            kinds["unreadable"].append(file)
            continue
        found = between(before, after)
        if found.changes:
            changed.append(found)
        else:
            kinds["same"].append(file)
    gone = tuple(_gone(tree, given))
    return Many(short, tuple(changed), tuple(kinds["same"]), tuple(kinds["new"]), gone, tuple(kinds["unreadable"]))


def _is_whole(file: Path, store: Revision | None = None) -> bool:
    """Whether a file is a recipe rather than a part of some, which they extend."""
    try:
        root = read_recipe(file, (), lambda _: True, store=store or Disk()).root.value
    except RecipeError:
        return True  # for whoever reads it next to report
    return bool({"model", "dataset"} & set(root))


def _gone(tree: Revision, paths: Iterable[str]) -> Iterator[str]:
    """Recipes below the given folders that only the revision has."""
    if tree.top is None:
        return
    folders = [Path(os.path.realpath(path)) for path in paths if os.path.isdir(path)]
    for name in tree.files():
        file = tree.top / name
        inside = file.suffix.lower() in ENDINGS and any(file.is_relative_to(folder) for folder in folders)
        if inside and not file.exists() and _is_whole(file, tree):
            yield os.path.relpath(file, os.path.realpath("."))
