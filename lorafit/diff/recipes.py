"""The two recipes of a comparison, and what differs between their values."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.diff.git import Revision, open_revision, run, split_revision
from lorafit.errors import UsageError
from lorafit.explain import Key
from lorafit.outcome import Outcome, Outcomes
from lorafit.recipe import Recipe, load
from lorafit.recipe.load import section_at
from lorafit.text import printable
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


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The changes between two recipes' resolved values, in the recipe's order."""
    return list(_compare(before, after, "", ()))


def _compare(before: Any, after: Any, key: str, path: Key) -> Iterator[Change]:
    name = ".".join(map(str, path))
    if isinstance(before, dict) and isinstance(after, dict):
        for step in dict.fromkeys((*before, *after)):
            inner, inner_path = f"{key}.{step}" if key else step, (*path, step)
            if step not in after:
                yield Change(inner, ".".join(map(str, inner_path)), before[step], None, "removed")
            elif step not in before:
                yield Change(inner, ".".join(map(str, inner_path)), None, after[step], "added")
            else:
                yield from _compare(before[step], after[step], inner, inner_path)
    elif isinstance(before, list) and isinstance(after, list) and section_at(path) is not None:
        yield from _items(before, after, key, path)
    elif not _same(before, after, name):
        kind: Kind = "added" if before is None else "removed" if after is None else "changed"
        yield Change(key, name, before, after, kind)


def _same(before: Any, after: Any, name: str) -> bool:
    if name in UNORDERED and isinstance(before, list) and isinstance(after, list):
        return sorted(map(str, before)) == sorted(map(str, after))
    return bool(before == after) and isinstance(before, bool) == isinstance(after, bool)


def _items(before: list[Any], after: list[Any], key: str, path: Key) -> Iterator[Change]:
    """Items of a list of sections, paired by what names them; one that is left on each side makes a pair, too."""
    name = ".".join(map(str, path))
    fields = _NAMED_BY.get(name, ("name",))
    waiting: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(before):
        waiting[tuple(item[field] for field in fields)].append(index)
    pairs: list[tuple[int, int]] = []
    added: list[int] = []
    for index, item in enumerate(after):
        same = waiting[tuple(item[field] for field in fields)]
        pairs += [(same.pop(0), index)] if same else []
        added += [] if pairs and pairs[-1][1] == index else [index]
    removed = sorted(index for indices in waiting.values() for index in indices)
    if len(removed) == len(added) == 1:
        pairs.append((removed.pop(), added.pop()))
    for index in removed:
        yield Change(f"{key}[{before[index][fields[0]]}]", name, before[index], None, "removed")
    for old, new in sorted(pairs, key=lambda pair: pair[1]):
        yield from _compare(before[old], after[new], f"{key}[{after[new][fields[0]]}]", path)
    for index in added:
        yield Change(f"{key}[{after[index][fields[0]]}]", name, None, after[index], "added")
    in_order = [old for old, _ in sorted(pairs, key=lambda pair: pair[1])]
    if name in _NAMED_BY and in_order != sorted(in_order):
        yield Change(f"{key} (order)", name, [item[fields[0]] for item in before], [item[fields[0]] for item in after])
