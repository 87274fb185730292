"""Two recipes compared."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from lorafit.diff.consequences import Consequence, Follower, consequences, followers, unknowns
from lorafit.diff.side import Examiner, Opened, Side, content_hash, open_side
from lorafit.diff.values import Change, compare
from lorafit.diff.warnings import Warned, warnings
from lorafit.explain import defaults_of
from lorafit.hardware import Hardware
from lorafit.rows import is_local
from lorafit.text import printable
from lorafit.written import at_keys


@dataclass(frozen=True)
class Difference:
    """What differs, and what follows.

    Attributes:
        before, after: names, as typed.
        unknown: why figures are missing, a sentence each.
        remarks: what else to know, a sentence each.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    consequences: tuple[Consequence, ...] = ()
    followers: tuple[Follower, ...] = ()
    warnings: tuple[Warned, ...] = ()
    unknown: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

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
    """Compare two recipes, each a file or `REV:path`. Raises UsageError and RecipeError.

    Args:
        hardware: to plan both for; None: what each is meant for.
    """
    return between(open_side(before), open_side(after), Examiner(hardware))


def between(before: Opened, after: Opened, examiner: Examiner) -> Difference:
    """Compare two recipes that were read."""
    changes = [*compare(before.recipe.resolved(), after.recipe.resolved()), *_template_text(before, after)]
    differing = _differing_data(before, after)
    if not changes:
        return Difference(before.name, after.name, (), remarks=tuple(differing))
    old, new = examiner.examine(before), examiner.examine(after)
    changes = [_as_written(_with_meaning(change, old, new), old, new) for change in changes]
    return Difference(
        before.name,
        after.name,
        tuple(changes),
        tuple(consequences(old, new)),
        tuple(followers(old, new, changes)),
        tuple(warnings(old, new, changes)),
        tuple(unknowns(old, new)),
        (*_as_now(old, new), *differing),
    )


def _with_meaning(change: Change, before: Side, after: Side) -> Change:
    """The change with what the plan makes of its values."""
    found = []
    for side, value in ((before, change.before), (after, change.after)):
        choice = (side.plan.choices | defaults_of(side.recipe, side.plan)).get(change.key)
        found.append(choice.value if choice is not None and choice.value != value else None)
    return dataclasses.replace(change, meant_before=found[0], meant_after=found[1])


def _as_written(change: Change, before: Side, after: Side) -> Change:
    """The change with references where they were written."""
    old, new = before.recipe.references, after.recipe.references
    return dataclasses.replace(
        change, before=at_keys(change.before, old, change.key), after=at_keys(change.after, new, change.key)
    )


def _template_text(before: Opened, after: Opened) -> list[Change]:
    """A chat template's file of the same name and other content is another template."""
    path = before.recipe.model.chat_template
    if path is None or path != after.recipe.model.chat_template:
        return []
    old, new = (content_hash(side, path) for side in (before, after))
    if old is None or new is None or old == new:
        return []
    return [Change("model.chat_template (text)", "model.chat_template", f"{path} {old[:8]}", f"{path} {new[:8]}")]


def _as_now(*sides: Opened) -> list[str]:
    """What was read from the disk although a side is of a revision."""
    names = " and ".join(printable(side.name) for side in sides if side.revision is not None)
    return [f"Data, models and templates are those on the disk now, for {names} as well."] if names else []


def _differing_data(before: Opened, after: Opened) -> list[str]:
    """Data files that are in the repository, and are others at the one side than at the other."""
    if before.revision is None and after.revision is None:
        return []
    paths = [{source.path for source in side.recipe.dataset.train if is_local(source.path)} for side in (before, after)]
    remarks = []
    for path in sorted(paths[0] & paths[1]):
        hashes = [content_hash(side, path) for side in (before, after)]
        if None not in hashes and hashes[0] != hashes[1]:
            remarks.append(f"{printable(path)} itself differs between the two; its rows are counted as they are now.")
    return remarks
