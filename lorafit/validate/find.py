"""The recipes that paths name: files, folders and patterns."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorafit.bounds import expand, opened
from lorafit.errors import UsageError
from lorafit.recipe import Recipe
from lorafit.recipe.source import not_a_folder

ENDINGS = (".yaml", ".yml")
NOT_SEARCHED = ("node_modules", "__pycache__", "venv")
FILE_KEYS = {"extends", *Recipe.model_fields}
_TOP_KEY = re.compile(r"^(?:[\"']?)([A-Za-z_][\w-]*)(?:[\"']?)\s*:", re.MULTILINE)
_MOST_BYTES = 256 * 1024


@dataclass(frozen=True)
class Found:
    """Recipes in order, each once, and the YAML files of folders and patterns that are none."""

    recipes: tuple[str, ...]
    skipped: tuple[str, ...]


def find(paths: Iterable[str]) -> Found:
    """What the paths name. A file is taken as it is; a folder is searched. Raises UsageError where there is nothing."""
    recipes: dict[str, str] = {}
    skipped: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            inside = [os.path.normpath(file) for file in _inside(path)]
        elif not os.path.exists(path) and glob.has_magic(path):
            inside = sorted(filter(_is_yaml, expand(path, UsageError)))
        else:
            recipes.setdefault(_identity(path), path)
            continue
        chosen = [file for file in inside if _is_recipe(file)]
        if not chosen and os.path.isfile(os.path.join(path, "plan.json")):
            raise UsageError(f"{path}: {not_a_folder(Path(path))}")
        if not chosen:
            raise UsageError(f"{path}: there are no recipes ({len(inside)} YAML files)")
        for file in chosen:
            recipes.setdefault(_identity(file), file)
        skipped |= dict.fromkeys(file for file in inside if file not in chosen)
    return Found(tuple(recipes.values()), tuple(file for file in skipped if _identity(file) not in recipes))


def _identity(file: str) -> str:
    """The same for all ways to write a path. A link in another folder is another recipe: its parents are others."""
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name)


def _is_yaml(file: str) -> bool:
    return file.endswith(ENDINGS) and (
        os.path.isfile(file) or not os.path.exists(file)
    )  # a broken link is for the check


def _inside(folder: str) -> Iterator[str]:
    """The YAML files below a folder, but for hidden ones, run directories, and what tools keep."""
    for where, folders, files in os.walk(folder):
        if "plan.json" in files:  # a run keeps a copy of its recipe
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NOT_SEARCHED)
        inside = (os.path.join(where, name) for name in sorted(files) if not name.startswith("."))
        yield from filter(_is_yaml, inside)


def _is_recipe(file: str) -> bool:
    """Whether a YAML file has one of a recipe's keys at its top. One without any keys is for the check to report."""
    try:
        with opened(Path(file)) as stream:
            text = stream.read(_MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return True
    keys = _TOP_KEY.findall(text)
    return not keys or not FILE_KEYS.isdisjoint(keys)
