"""All recipes of a working tree, compared with those of a revision: what a pull request changes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorafit.diff.compare import Difference, between
from lorafit.diff.git import Revision, open_tree
from lorafit.diff.side import Examiner, Opened
from lorafit.diff.text import FORMATS
from lorafit.hardware import Hardware
from lorafit.recipe import RecipeError, load
from lorafit.recipe.layers import Disk, read_recipe
from lorafit.text import printable
from lorafit.validate.find import ENDINGS, find
from lorafit.written import hidden_in

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Many:
    """Recipes by what became of them since a revision.

    Attributes:
        new, gone: files.
        unreadable: files whose recipe in the revision had mistakes.
    """

    revision: str
    changed: tuple[Difference, ...]
    same: tuple[str, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    unreadable: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return bool(self.changed or self.new or self.gone or self.unreadable)

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
    examiner = Examiner(hardware)
    changed: list[Difference] = []
    kinds: dict[str, list[str]] = {"same": [], "new": [], "unreadable": []}
    here = [file for file in find(given).recipes if _is_whole(Path(file))]
    for file in here:
        after = Opened(file, Path(file).stem, None, load(file))
        place = Path(os.path.realpath(file))
        if not tree.is_file(place):
            kinds["new"].append(file)
            continue
        try:
            before = Opened(f"{short}:{file}", Path(file).stem, tree, load(place, store=tree))
        except RecipeError:
            kinds["unreadable"].append(file)
            continue
        found = between(before, after, examiner)
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


def shown(found: Many, format: str) -> str:
    return {"text": text, "markdown": markdown, "json": as_json}[format](found)


def text(found: Many) -> str:
    parts = [FORMATS["text"](one).rstrip("\n") for one in found.changed]
    lines = [f"{printable(file)}: {what}" for file, what in found.others]
    lines += [f"{printable(file)}: the same" for file in found.same]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def markdown(found: Many) -> str:
    if not found.differs:
        return f"### Recipes\n\nNone differs from `{printable(found.revision)}`."
    parts = [FORMATS["markdown"](one).rstrip("\n") for one in found.changed]
    lines = [f"- `{printable(file).replace('`', '')}`: {what}" for file, what in found.others]
    return "\n\n".join([*parts, *(["### Other recipes\n\n" + "\n".join(lines)] if lines else [])])


def as_json(found: Many) -> str:
    whole = {"revision": found.revision, "changed": [one.as_dict() for one in found.changed]}
    rest = {name: list(getattr(found, name)) for name in ("same", "new", "gone", "unreadable")}
    return json.dumps(hidden_in(whole | rest), indent=2, ensure_ascii=False)
