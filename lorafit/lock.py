"""`lorafit lock`: what a recipe came to when it was approved, in a file beside it, and what drifted since. No torch.

A lock is JSON: `lock_version`, the fields of `Lock`, and `sha256` of all that, so that an edit shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from lorafit.bounds import read_text
from lorafit.errors import DataError, DriftError, ModelError, UsageError
from lorafit.facts import TOKENIZER_FILES, UnreachableError, hub_unreachable, weight_files
from lorafit.facts.fingerprint import damaged_in_cache, whole_digest
from lorafit.facts.template import uses_date
from lorafit.files import claim_file, file_digest, own_digest, write_text
from lorafit.hardware import detect_cpu
from lorafit.outcome import Outcomes, unknown_facts
from lorafit.plan.data import read_chat_template
from lorafit.plan.evaluation import judging_files
from lorafit.plan.values import Context
from lorafit.recipe import Recipe, RecipeError, Source
from lorafit.recipe.start import CONFIG, WEIGHTS, place_of
from lorafit.rows import data_files, is_local
from lorafit.run.directory import RunDir
from lorafit.run.manifest import versions
from lorafit.text import clipped, first_line
from lorafit.tree import differences, dotted
from lorafit.written import Reference, as_written, at_keys, expanded, read_back, require

VERSION = 2


class Asked(BaseModel, frozen=True):
    """A recipe as it is locked.

    Attributes:
        values: every value after `extends` and defaults; comments and order are none.
        references: of text that is read from the environment, `${NAME}` as it is written and the value's SHA-256.
    """

    values: dict[str, Any]
    references: dict[str, Reference]


class Pin(BaseModel, frozen=True):
    """What a model or a data set is told by: the commit on the hub, else SHA-256 of each file, None without files."""

    commit: str | None = None
    files: dict[str, str] | None = None


class NamedPin(Pin, frozen=True):
    """A model's."""

    name: str


class Lock(BaseModel, frozen=True):
    """What a lock holds.

    Attributes:
        start: SHA-256 of the files of the adapter that goes on; empty where none does.
        tokenizer: SHA-256 of each of its files; empty for a hub model, which the commit pins.
        chat_template: SHA-256 of the template that is used; None where it is not known here.
        date: the day that the template writes into every row, for templates that do.
        data: by path as in the recipe.
        judging: SHA-256 of the files that decide what an evaluation finds.
        versions: of lorafit, what it stands on, and Python.
    """

    recipe: Asked
    model: NamedPin
    start: dict[str, str] = {}
    judging: dict[str, str]
    tokenizer: dict[str, str]
    chat_template: str | None
    date: str | None
    data: dict[str, Pin]
    versions: dict[str, str]

    @property
    def text(self) -> str:
        whole = {"lock_version": VERSION, **self.model_dump(exclude_unset=True)}
        return json.dumps(whole | {"sha256": own_digest(whole)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogateescape")).hexdigest()

    @staticmethod
    def read(path: Path) -> Lock:
        """Raises UsageError for a file that is missing or no lock of this version."""
        try:
            content = json.loads(read_text(path))
        except FileNotFoundError:
            raise UsageError(f"{path}: there is no lock; `lorafit lock` writes it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: can't be read as a lock: {first_line(error)}; write it anew") from None
        found = content.get("lock_version") if isinstance(content, dict) else None
        if found != VERSION:
            raise UsageError(f"{path}: is no lock of version {VERSION} (lock_version: {found}); write it anew")
        try:
            lock = Lock.model_validate(content)
        except ValidationError as error:
            wrong = ", ".join(dict.fromkeys(str(one["loc"][0]) for one in error.errors()))
            raise UsageError(f"{path}: is no lock: {wrong} can't be read; write it anew") from None
        if content.get("sha256") != own_digest(content):
            raise UsageError(f"{path}: was edited: its sha256 is not that of its content; write it anew")
        return lock


def lock_path(config: Path) -> Path:
    """recipe.yaml -> recipe.yaml.lock. Raises UsageError for what names no file."""
    if not config.name:
        raise UsageError(f"{config}: is no recipe's file")
    return config.with_name(f"{config.name}.lock")


Kind = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(name: str, revision: str | None, kind: Kind) -> str:
    """The commit that a branch, a tag or None (main) is at. Raises ModelError or DataError where it can't be told."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    failed = ModelError if kind == "model" else DataError
    unreachable = hub_unreachable()
    if unreachable is None:
        return _commit_on_hub(name, revision, kind, failed)
    commit = _commit_in_cache(name, revision, kind)
    if _COMMIT.fullmatch(commit):
        return commit
    raise failed(
        f"{name}: its commit at {revision or 'main'} is not in the cache and {unreachable}; download it first, or name "
        "a commit as the revision"
    )


def _commit_on_hub(name: str, revision: str | None, kind: Kind, failed: type[ModelError] | type[DataError]) -> str:
    from huggingface_hub import HfApi

    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
    except Exception as error:  # noqa: BLE001 - the client raises dozens of types
        raise failed(f"{name}: the hub does not tell its commit: {first_line(error)}") from None
    if info.sha is None:
        raise failed(f"{name}: the hub does not tell its commit")
    return str(info.sha)


def _commit_in_cache(name: str, revision: str | None, kind: Kind) -> str:
    """What the hub's client wrote down, if it did."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    try:
        return (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


CONFIGURATION = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""What a model folder has beside its weights and its tokenizer."""
MISSING = "missing"
"""Instead of the digest of a file that judges and is not there."""


def state_of(recipe: Recipe, known: Lock | None = None) -> Lock:
    """Hash and look up everything. Raises LorafitError where something is missing.

    Args:
        known: a lock whose commits hold for what is asked for as it was then, so that no hub is asked.
    """
    outcomes, references = Outcomes(), recipe.references
    asked = {
        "values": at_keys(recipe.resolved(), references),
        "references": {key: dataclasses.asdict(one) for key, one in references.items()},
    }
    asked = as_written(asked, references)
    model = _model(recipe, asked["values"]["model"], known, outcomes)
    template = _chat_template(recipe, known, outcomes)
    judging = judging_files(recipe.eval).items()
    rest = {
        "model": model,
        "start": _start(recipe),
        "tokenizer": _tokenizer(recipe),
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        "date": _date(template, known),
        "data": dict(_data(recipe, known)),
        "judging": {name: file_digest(file) if file.is_file() else MISSING for name, file in judging},
        "versions": versions() | {"python": ".".join(platform.python_version_tuple()[:2])},
    }
    return Lock.model_validate({"recipe": asked} | as_written(rest, references))


def recipe_of(lock: Lock, file: Path) -> Recipe:
    """The recipe of a lock, with what it takes from the environment as that is now. Raises UsageError, RecipeError."""
    references = lock.recipe.references
    require(references)
    return Recipe.restored(read_back(lock.recipe.values, references), str(file), references=references)


def pinned(recipe: Recipe, lock: Lock) -> Recipe:
    """The recipe with the locked commits as its revisions."""
    model, dataset = recipe.model, recipe.dataset
    if lock.model.commit is not None:
        model = model.model_copy(update={"revision": lock.model.commit})
    changes: dict[str, Any] = {"train": tuple(_pinned(recipe, source, lock) for source in dataset.train)}
    if isinstance(dataset.validation, tuple):
        changes["validation"] = tuple(_pinned(recipe, source, lock) for source in dataset.validation)
    return recipe.model_copy(update={"model": model, "dataset": dataset.model_copy(update=changes)})


def _pinned(recipe: Recipe, source: Source, lock: Lock) -> Source:
    commit = _locked_commit(_data_key(recipe, source), lock)
    return source if commit is None else source.model_copy(update={"revision": commit})


def _locked_commit(key: str, lock: Lock | None) -> str | None:
    """The commit of a data set."""
    return lock.data[key].commit if lock and key in lock.data else None


def _is_hub(name: str) -> bool:
    return not name.endswith(".gguf") and not expanded(name).exists()


def _model(recipe: Recipe, asked: dict[str, Any], known: Lock | None, outcomes: Outcomes) -> dict[str, Any]:
    """The model's pin; `asked` is the model as a lock has it: a reference of another value is drift."""
    name, revision = recipe.model.name_or_path, recipe.model.revision
    with contextlib.suppress(UnreachableError):  # a model that isn't there is told as everywhere
        outcomes.facts(name, revision)
    if not _is_hub(name):
        return {"name": name, "files": _model_files(expanded(name))}
    before, then = (known.model.commit, known.recipe.values.get("model", {})) if known else (None, {})
    if damaged := damaged_in_cache(name, before or revision):
        wrong = ", ".join(damaged)
        raise DriftError(f"{name}: {wrong} in the hub's cache is damaged; remove it, and download it again")
    if before is not None and all(then.get(key) == asked[key] for key in ("name_or_path", "revision")):
        return {"name": name, "commit": before}
    return {"name": name, "commit": commit_of(name, revision, "model")}


def _start(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of an adapter that goes on. Raises ModelError where it can't be had."""
    if recipe.start_from is None:
        return {}
    folder = place_of(recipe.start_from).folder
    return {name: file_digest(folder / name) for name in (CONFIG, WEIGHTS) if (folder / name).is_file()}


def _model_files(path: Path) -> dict[str, str]:
    """SHA-256 of a local base's weights and configuration, each read whole; its tokenizer is listed by itself."""
    small = [path / name for name in (*CONFIGURATION, *sorted(file.name for file in path.glob("*.py")))]
    weights = [path] if path.is_file() else weight_files(path) or sorted(path.glob("pytorch_model*.bin"))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(whole_digest, weights)
        return {file.name: digest for file, digest in zip(weights, digests, strict=True)} | {
            file.name: file_digest(file) for file in small if file.is_file()
        }


def _tokenizer(recipe: Recipe) -> dict[str, str]:
    folder = expanded(recipe.model.name_or_path)
    files = (folder / name for name in TOKENIZER_FILES)
    return {file.name: file_digest(file) for file in files if file.is_file()} if folder.is_dir() else {}


def _date(template: str | None, known: Lock | None) -> str | None:
    """The day that a template writes, if it writes one: that of the lock for ever."""
    if template is None or not uses_date(template):
        return None
    return (known.date if known else None) or datetime.date.today().isoformat()


def _chat_template(recipe: Recipe, known: Lock | None, outcomes: Outcomes) -> str | None:
    """The text of the template that is used; None where it isn't known here."""
    name = recipe.model.name_or_path
    revision = known.model.commit if known and _is_hub(name) else None
    try:
        facts = outcomes.facts(name, revision or recipe.model.revision)
    except UnreachableError:
        facts = unknown_facts(name)
    context = Context(recipe, facts, detect_cpu())
    template = read_chat_template(context)
    if context.mistakes:
        raise RecipeError(context.mistakes)
    if template is None and facts.tokenizer is not None:
        template = facts.tokenizer.chat_template
    return template


def _data(recipe: Recipe, known: Lock | None) -> Iterator[tuple[str, dict[str, Any]]]:
    dataset = recipe.dataset
    validation = dataset.validation if isinstance(dataset.validation, tuple) else ()
    for source in (*dataset.train, *validation):
        if is_local(source.path):
            yield source.path, {"files": _files(source.path)}
        else:
            key = _data_key(recipe, source)
            yield key, {"commit": _locked_commit(key, known) or commit_of(source.path, source.revision, "dataset")}
    for one in recipe.eval.sets:
        if one.path is not None and is_local(one.path):
            yield one.path, {"files": _files(one.path)}


def _data_key(recipe: Recipe, source: Source) -> str:
    """A hub data set as a lock names it."""
    path = source.path if source.revision is None else f"{source.path}@{source.revision}"
    return as_written(path, recipe.references)


def _files(path: str) -> dict[str, str] | None:
    """SHA-256 by file; None if there are none."""
    try:
        return {str(file): file_digest(file) for file in data_files(path)}
    except DataError:
        return None


def drift(locked: Lock, now: Lock) -> Iterator[str]:
    """A line for everything that is no longer as it was locked."""
    for key, before, after in differences(locked.recipe.values, now.recipe.values):
        yield f"{dotted(key)}: locked {_shown(before)}, now {_shown(after)}"
    before, after = locked.recipe.references, now.recipe.references
    for name in sorted(before.keys() & after.keys()):
        if before[name].sha256 != after[name].sha256:
            yield f"{name}: what it takes from the environment is not what was locked"
    if locked.model.name == now.model.name:  # else the recipe's values say so
        yield from _moved("model", locked.model, now.model, "model: ")
    if locked.recipe.values.get("start_from") == now.recipe.values.get("start_from"):
        yield from _changed_files(locked.start, now.start, "start_from: ")
    yield from _changed_files(locked.tokenizer, now.tokenizer, "tokenizer ")
    if locked.chat_template and now.chat_template and locked.chat_template != now.chat_template:
        yield "chat template: its text changed"
    for name, pin in locked.data.items():
        if name in now.data:  # else the recipe's values say so
            yield from _moved(name, pin, now.data[name])
    yield from _changed_files(locked.judging, now.judging, "eval: ")
    for name, before, after in _changed(locked.versions, now.versions):
        yield f"{name}: locked {before or 'none'}, now {after or 'none'}"


def _shown(value: Any) -> str:
    return clipped(json.dumps(value, ensure_ascii=False), 60)


def _moved(name: str, before: Pin, after: Pin, what: str = "") -> Iterator[str]:
    if before.commit != after.commit:
        yield f"{name}: locked commit {before.commit}, now {after.commit}"
    yield from _changed_files(before.files or {}, after.files or {}, what)


def _changed_files(before: dict[str, str], after: dict[str, str], what: str) -> Iterator[str]:
    for name, old, new in _changed(before, after):
        yield f"{what}{name}: {'is gone' if new is None else 'is new' if old is None else 'its bytes changed'}"


def _changed(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, str | None, str | None]]:
    """What differs, by name; None for what is missing."""
    return sorted((name, old, new) for (name,), old, new in differences(before, after))


def write_lock(config: Path, overrides: Sequence[str] = ()) -> tuple[Path, Lock, list[str]]:
    """Lock a recipe as it is now; returns the file, the lock, and what changed against the one before.

    Raises LorafitError where something that the recipe names is missing, or something else is in the lock's place;
    then nothing is written.
    """
    path = lock_path(config)
    claim_file(path, "lock_version")
    recipe = Recipe.load(config, overrides)
    lock = state_of(recipe)
    missing = [path for path, pin in lock.data.items() if pin.commit is None and not pin.files]
    missing += [name for name, digest in lock.judging.items() if digest == MISSING]
    if missing:
        raise DataError("\n".join(f"{path}: there are no such files, so they can't be locked" for path in missing))
    try:
        changed = list(drift(Lock.read(path), lock))
    except UsageError:
        changed = []  # none before, or one that can't be read
    write_text(path, lock.text)
    return path, lock, changed


def check_lock(config: Path, overrides: Sequence[str] = ()) -> Lock:
    """The recipe's lock, if everything is as it says. Raises DriftError with a line for each thing that is not."""
    return held_lock(config, Recipe.load(config, overrides))


def held_lock(config: Path, recipe: Recipe) -> Lock:
    """The lock of a recipe that was read, see `check_lock`."""
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
    changed = list(drift(lock, now))
    if changed:
        hint = f"bring back what changed, or write {path} anew with `lorafit lock`, as a change to review"
        raise DriftError("\n".join([*(f"{path}: {line}" for line in changed), hint]))
