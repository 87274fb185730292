"""The recipes that paths name: files, folders and patterns."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lorafit.bounds import expand, opened
from lorafit.errors import UsageError
from lorafit.recipe import Recipe
from lorafit.recipe.layers import not_a_folder
from lorafit.recipe.yaml import MAX_BYTES
from lorafit.validate.findings import Skipped

ENDINGS = (".yaml", ".yml")
NOT_SEARCHED = ("node_modules", "__pycache__", "venv")
NO_FILE = "is no file"
MOST_LOOKED_AT = 10_000
"""Files behind a link that are looked at for recipes; where there are more, there may be some."""
FILE_KEYS = {"extends", "<<", *Recipe.model_fields}


@dataclass(frozen=True)
class Found:
    """Recipes in order, each once, and what folders and patterns hold besides."""

    recipes: tuple[str, ...]
    skipped: tuple[Skipped, ...]


def find(paths: Iterable[str]) -> Found:
    """What the paths name. A file is taken as it is; a folder is searched. Raises UsageError where there is nothing."""
    recipes: dict[str, str] = {}
    left_out: dict[str, Skipped] = {}
    for path in paths:
        if os.path.isdir(path):
            inside = list(_inside(path))
        elif not os.path.exists(path) and glob.has_magic(path):
            inside = [
                one
                for match in sorted(expand(path, UsageError))
                for one in (_inside(match) if os.path.isdir(match) else [(match, None)] * _is_yaml(match))
            ]
        else:
            recipes.setdefault(_identity(path), path)
            continue
        chosen = 0
        for file, reason in inside:
            is_recipe = os.path.isdir(file) or _is_recipe(file, reason is None)
            if is_recipe and reason is None:
                recipes.setdefault(_identity(file), file)
                chosen += 1
            elif is_recipe or reason in (None, NO_FILE):
                why = Skipped(file, reason or "has none of a recipe's keys", is_recipe)
                left_out.setdefault(_identity(file), why)
        if not chosen and os.path.isfile(os.path.join(path, "plan.json")):
            raise UsageError(f"{path}: {not_a_folder(Path(path))}")
        if not chosen:
            raise UsageError(f"{path}: there are no recipes ({len(inside)} YAML files)")
    return Found(tuple(recipes.values()), tuple(one for key, one in left_out.items() if key not in recipes))


def _identity(file: str) -> str:
    """One name for all ways to write a path. A link in another folder is another recipe: its parents are others."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name)


def _is_yaml(file: str) -> bool:
    return file.lower().endswith(ENDINGS) and (
        os.path.isfile(file) or not os.path.exists(file)
    )  # a broken link is for the check


def _inside(folder: str) -> Iterator[tuple[str, str | None]]:
    """The YAML files below a folder and the links to other folders, each with the reason why it is not checked."""
    reasons: dict[str, str | None] = {os.path.normpath(folder): None}
    unread: list[OSError] = []
    for where, folders, files in os.walk(folder, onerror=unread.append):
        where = os.path.normpath(where)
        reason, is_run = reasons[where], {"plan.json", "recipe.yaml"} <= set(files)
        for name in sorted(folders):
            path = os.path.normpath(os.path.join(where, name))
            if os.path.islink(path) and _leads_to_recipes(path, folder):
                yield path, reason or "is a link to a folder, which is not followed"
            hidden = "is in a hidden folder" if name.startswith(".") else None
            reasons[path] = reason or hidden or (f"is in a folder {name}" if name in NOT_SEARCHED else None)
        folders.sort()
        for name in sorted(files):
            file = os.path.join(where, name)
            if not file.lower().endswith(ENDINGS):
                continue
            if not _is_yaml(file):
                yield file, reason or NO_FILE
                continue
            own = (
                "is hidden" if name.startswith(".") else "is a run's copy" if is_run and name == "recipe.yaml" else None
            )
            yield file, reason or own
    for error in unread:
        yield os.path.normpath(str(error.filename)), f"can't be read: {error.strerror}"


def _leads_to_recipes(link: str, folder: str) -> bool:
    """Whether a link leads out of the folder that is searched, to where there may be recipes."""
    target = os.path.realpath(link)
    if target.startswith(os.path.join(os.path.realpath(folder), "")):
        return False
    inside = (os.path.join(where, name) for where, _, files in os.walk(target) for name in files)
    looked_at = list(itertools.islice(inside, MOST_LOOKED_AT))
    found = (file for file in looked_at if file.lower().endswith(ENDINGS) and _is_recipe(file, False))
    return len(looked_at) == MOST_LOOKED_AT or next(found, None) is not None


def _is_recipe(file: str, doubtful: bool) -> bool:
    """Whether a YAML file has one of a recipe's keys at its top; `doubtful` for one that can't be read so."""
    try:
        with opened(Path(file)) as stream:
            text = stream.read(MAX_BYTES + 1)
        keys = [] if len(text) > MAX_BYTES else list(_top_keys(text.decode("utf-8-sig")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return doubtful
    return not FILE_KEYS.isdisjoint(keys) or (doubtful and (len(text) > MAX_BYTES or None in keys))


def _top_keys(text: str) -> Iterator[str | None]:
    """The keys of the documents in a text; None for one that is no text, and for a document without keys."""
    depth, is_key = 0, False
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.NodeEvent) and depth == 0 and not isinstance(event, yaml.MappingStartEvent):
            yield None
        if depth == 1 and isinstance(event, yaml.NodeEvent):
            is_key = not is_key
            if is_key and isinstance(event, yaml.ScalarEvent):
                yield event.value
            elif is_key:
                yield None
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
