"""The two recipes of a comparison, and what differs between their values."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.diff.git import Revision, open_revision, run, split_revision
from lorafit.errors import UsageError
from lorafit.outcome import Outcome, Outcomes
from lorafit.recipe import Recipe, load
from lorafit.recipe.load import section_at
from lorafit.text import printable
from lorafit.tree import differences, dotted
from lorafit.written import expanded


@dataclass(frozen=True)
class Opened:
    """A recipe that was read.

    Attributes:
        name: as it was typed.
        revision: None for a file on the disk.
        outcome: what it comes to.
    """

    name: str
    revision: Revision | None
    outcome: Outcome

    @property
    def recipe(self) -> Recipe:
        return self.outcome.recipe

    def content_hash(self, path: str) -> str | None:
        """What the content of a file is told by, at the revision or on the disk; None if it isn't kept there."""
        file = expanded(path)
        try:
            if self.revision is not None:
                return self.revision.hash_of(Path(os.path.abspath(file)))
            if not file.is_file() or "\n" in path:
                return None
            return run("hash-object", "--stdin-paths", given=f"{os.path.abspath(file)}\n".encode()).decode().strip()
        except (UsageError, OSError, ValueError):
            return None


def open_recipe(text: str, outcomes: Outcomes) -> Opened:
    """A file, or `REV:path`. A file of that very name comes first. Raises UsageError and RecipeError."""
    parts = None if os.path.lexists(text) else split_revision(text)
    if parts is not None:
        revision, path = open_revision(text, *parts)
        return Opened(text, revision, outcomes.of(load(path, store=revision), path.stem))
    if not os.path.exists(text):
        raise UsageError(f"{printable(text)}: there is no such file")
    return Opened(text, None, outcomes.of(load(text), Path(text).stem))


Kind = Literal["changed", "added", "removed"]
UNORDERED = {
    "lora.target_modules",
    "lora.exclude_modules",
    "lora.modules_to_save",
    "lora.layers_to_transform",
    "quantization.llm_int8_skip_modules",
    "training.report_to",
    "eval.gates",
    "eval.forgetting",
    "eval.lm_eval.tasks",
}
"""Lists of which the order means nothing."""
_NAMED_BY = {"dataset.train": ("path", "name", "split"), "dataset.validation": ("path", "name", "split")}


@dataclass(frozen=True)
class Change:
    """A value that differs.

    Attributes:
        key: dotted; an item of a list by its name, such as dataset.train[data/a.jsonl].weight.
        path: the key without items, such as dataset.train.weight.
        before, after: as the recipes say; None also where there is nothing.
        meant_before, meant_after: what that comes to, where it is another value (such as that of auto).
    """

    key: str
    path: str
    before: Any
    after: Any
    kind: Kind = "changed"
    meant_before: Any = None
    meant_after: Any = None


ABSENT, ORDER = object(), object()
"""What stands for a value that is not there, and for the order of a list beside its items."""


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The changes between two recipes' resolved values, in the recipe's order."""
    found = (_change(*each) for each in differences(before, after, items=_items, absent=ABSENT))
    return [one for one in found if one.path not in UNORDERED or _sorted(one.before) != _sorted(one.after)]


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _change(steps: tuple[Any, ...], before: Any, after: Any) -> Change:
    key = ""
    for step in steps:
        if isinstance(step, str):
            key += f".{step}" if key else step
        else:
            key += " (order)" if step is ORDER else f"[{step[0]}]"
    kind: Kind = "changed"
    if before is ABSENT or (before is None and after is not ABSENT):
        kind = "added"
    elif after is ABSENT or after is None:
        kind = "removed"
    if steps[-1] is ORDER:
        before, after = ([name[0] for name in names] for names in (before, after))
    old, new = (None if value is ABSENT else value for value in (before, after))
    return Change(key, dotted(step for step in steps if isinstance(step, str)), old, new, kind)


def _items(steps: tuple[Any, ...], before: Any, after: Any) -> tuple[Any, Any]:
    """Lists of sections by what names their items; one that is left of each list makes a pair, too."""
    path = tuple(step for step in steps if isinstance(step, str))
    are_sections = isinstance(before, list) and isinstance(after, list) and section_at(path) is not None
    if not are_sections or steps[-1] is ORDER:
        return before, after
    by = _NAMED_BY.get(dotted(path), ("name",))
    old, new = _named(before, by), _named(after, by)
    removed, added = [name for name in old if name not in new], [name for name in new if name not in old]
    if len(removed) == len(added) == 1:
        old = {added[0] if name in removed else name: item for name, item in old.items()}
        removed = []
    first = {name: old[name] for name in (*removed, *(name for name in new if name in old))}
    first |= {name: ABSENT for name in new if name not in old}
    if dotted(path) in _NAMED_BY and [name for name in old if name in new] != [name for name in new if name in old]:
        return first | {ORDER: [*_named(before, by)]}, new | {ORDER: [*new]}
    return first, new


def _named(items: list[Any], by: tuple[str, ...]) -> dict[Any, Any]:
    """Items by their names, those of the same name numbered."""
    names = [tuple(item[field] for field in by) for item in items]
    return {(*name, names[:number].count(name)): items[number] for number, name in enumerate(names)}
