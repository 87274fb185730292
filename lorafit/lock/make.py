"""Locks written, checked, and held to by runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import DataError, DriftError, UsageError
from lorafit.files import claim_file
from lorafit.lock.compare import drift
from lorafit.lock.file import Lock, lock_path
from lorafit.lock.state import MISSING, recipe_of, state_of
from lorafit.recipe import Recipe
from lorafit.rundir import RunDir


def write_lock(config: Path, overrides: Sequence[str] = ()) -> tuple[Path, Lock, list[str]]:
    """Lock a recipe as it is now; returns the file, the lock, and what changed against the one before.

    Raises LorafitError where something that the recipe names is missing, or something else is in the lock's place;
    then nothing is written.
    """
    path = lock_path(config)
    claim_file(path, "lock_version")
    recipe = Recipe.load(config, overrides)
    lock = state_of(recipe)
    missing = [path for path, entry in lock.content["data"].items() if "files" in entry and not entry["files"]]
    missing += [name for name, digest in lock.content["judging"].items() if digest == MISSING]
    if missing:
        raise DataError("\n".join(f"{path}: there are no such files, so they can't be locked" for path in missing))
    try:
        changed = drift(Lock.read(path), lock)
    except UsageError:
        changed = []  # none before, or one that can't be read
    lock.write(path)
    return path, lock, changed


def check_lock(config: Path, overrides: Sequence[str] = ()) -> Lock:
    """The recipe's lock, if everything is as it says. Raises DriftError with a line for each thing that is not."""
    return held_lock(config, Recipe.load(config, overrides))


def held_lock(config: Path, recipe: Recipe) -> Lock:
    """The same for a recipe that was read."""
    path = lock_path(config)
    lock = Lock.read(path)
    _refuse_drift(path, lock, state_of(recipe, lock))
    return lock


def check_run(run: RunDir) -> None:
    """See that everything is as the lock says that a run was made with. Raises UsageError and DriftError."""
    if not run.path.is_dir():
        raise UsageError(f"{run.path}: no such run directory")
    if not run.lock_file.is_file():
        raise UsageError(f"{run.path}: was not trained with --locked, so there is no lock to hold to")
    lock = Lock.read(run.lock_file)
    _refuse_drift(run.lock_file, lock, state_of(recipe_of(lock, run.lock_file), lock))


def _refuse_drift(path: Path, lock: Lock, now: Lock) -> None:
    changed = drift(lock, now)
    if changed:
        hint = f"bring back what changed, or write {path} anew with `lorafit lock`, as a change to review"
        raise DriftError("\n".join([*(f"{path}: {line}" for line in changed), hint]))
