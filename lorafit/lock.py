"""`lorafit lock`: what a recipe came to when it was approved, in a file beside it, and what drifted since. No torch.

A lock (version 1) is JSON:

    lock_version    1
    recipe          values: every value after `extends` and defaults; comments and order are none. And references: of
                    text that is read from the environment, `${NAME}` as it is written and the value's SHA-256
    model           name, and of a hub model its commit, else its fingerprint (see lorafit.run.fingerprint)
    tokenizer       SHA-256 of each of its files; empty for a hub model, which the commit pins
    chat_template   SHA-256 of the template that is used; null where it is not known here
    date            the day that the template writes into every row, for templates that do
    data            by path as in the recipe: SHA-256 of each file, or the commit of a hub data set
    versions        of lorafit, what it stands on, and Python
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.bounds import read_text
from lorafit.errors import DataError, DriftError, ModelError, UsageError
from lorafit.facts import TOKENIZER_FILES, ModelFacts, UnreachableError, hub_unreachable, read_facts, weight_files
from lorafit.facts.template import uses_date
from lorafit.files import claim_file, file_digest, own_digest, write_text
from lorafit.hardware import detect_cpu
from lorafit.plan.data import read_chat_template
from lorafit.plan.evaluation import judging_files
from lorafit.plan.values import Context
from lorafit.recipe import Recipe, RecipeError, Source
from lorafit.recipe.yaml import shorten
from lorafit.rows import data_files, is_local
from lorafit.run.directory import RunDir
from lorafit.run.fingerprint import damaged_in_cache, whole_digest
from lorafit.run.manifest import versions
from lorafit.text import first_line
from lorafit.written import Reference, as_written, at_keys, expanded, read_back, require

VERSION = 2
_PARTS: dict[str, type | tuple[type, ...]] = {
    "recipe": dict,
    "model": dict,
    "judging": dict,
    "tokenizer": dict,
    "chat_template": (str, type(None)),
    "date": (str, type(None)),
    "data": dict,
    "versions": dict,
}


@dataclass(frozen=True)
class Lock:
    """What a lock holds, see lorafit.lock."""

    content: dict[str, Any]

    @property
    def text(self) -> str:
        whole = {"lock_version": VERSION, **self.content}
        return json.dumps(whole | {"sha256": own_digest(whole)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode("utf-8", "surrogateescape")).hexdigest()

    def write(self, path: Path) -> None:
        """Write it, or nothing."""
        write_text(path, self.text)

    @staticmethod
    def read(path: Path) -> Lock:
        """Raises UsageError for a file that is missing or no lock of this version."""
        try:
            content = json.loads(read_text(path))
        except FileNotFoundError:
            raise UsageError(f"{path}: there is no lock; `lorafit lock` writes it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: can't be read as a lock: {first_line(error)}; write it anew") from None
        if not isinstance(content, dict) or content.get("lock_version") != VERSION:
            found = content.get("lock_version") if isinstance(content, dict) else None
            raise UsageError(f"{path}: is no lock of version {VERSION} (lock_version: {found}); write it anew")
        wrong = [name for name, kind in _PARTS.items() if not isinstance(content.get(name, ...), kind)]
        if wrong or not _is_whole(content):
            raise UsageError(f"{path}: is no lock: {', '.join(wrong) or 'a part'} can't be read; write it anew")
        if content.get("sha256") != own_digest(content):
            raise UsageError(f"{path}: was edited: its sha256 is not that of its content; write it anew")
        return Lock({name: content[name] for name in _PARTS})


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether the parts hold what they should, as far as their readers count on it."""
    data, model = content["data"], content["model"]
    files = [entry.get("files") for entry in data.values() if isinstance(entry, dict)]
    held = content["recipe"].get("references", {})
    return (
        len(files) == len(data)
        and isinstance(held, dict)
        and all(isinstance(one, dict) and one.keys() == {"text", "sha256"} for one in held.values())
        and all(isinstance(part, dict | None) for part in (*files, model.get("files")))
        and all(isinstance(entry.get("commit"), str | None) for entry in (model, *data.values()))
        and all(
            isinstance(text, str) for part in ("versions", "tokenizer", "judging") for text in content[part].values()
        )
    )


def lock_path(config: Path) -> Path:
    """recipe.yaml -> recipe.yaml.lock"""
    return config.with_name(f"{config.name}.lock")


Kind = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(name: str, revision: str | None, kind: Kind) -> str:
    """The commit that a branch, a tag or None (main) is at. Raises ModelError or DataError where it can't be told."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    unreachable = hub_unreachable()
    if unreachable is None:
        return _commit_on_hub(name, revision, kind)
    reference = _cached(name, kind) / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except OSError:
        commit = ""
    if _COMMIT.fullmatch(commit):
        return commit
    raise _error(kind)(
        f"{name}: its commit at {revision or 'main'} is not in the cache and {unreachable}; download it first, or name "
        "a commit as the revision"
    )


def _commit_on_hub(name: str, revision: str | None, kind: Kind) -> str:
    from huggingface_hub import HfApi

    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
    except Exception as error:  # noqa: BLE001 - the client raises dozens of types
        raise _error(kind)(f"{name}: the hub does not tell its commit: {first_line(error)}") from None
    if info.sha is None:
        raise _error(kind)(f"{name}: the hub does not tell its commit")
    return str(info.sha)


def _cached(name: str, kind: Kind) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)


def _error(kind: Kind) -> type[ModelError] | type[DataError]:
    return ModelError if kind == "model" else DataError


CONFIGURATION = ("config.json", "generation_config.json", "model.safetensors.index.json")
"""What a model folder has beside its weights and its tokenizer."""


MISSING = "missing"
"""Instead of the digest of a file that judges and is not there."""


def state_of(recipe: Recipe, known: Lock | None = None) -> Lock:
    """Hash and look up everything. Raises LorafitError where something is missing.

    Args:
        known: a lock whose commits hold for what is asked for as it was then, so that no hub is asked.
    """
    values = at_keys(recipe.resolved(), recipe.references)
    held = {key: dataclasses.asdict(one) for key, one in recipe.references.items()}
    model = _model(recipe, known)
    template = _chat_template(recipe, known)
    content = {
        "recipe": {"values": values, "references": held},
        "model": model,
        "tokenizer": _tokenizer(recipe),
        "chat_template": hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        "date": _date(template, known),
        "data": dict(_data(recipe, known)),
        "judging": dict(_judging(recipe)),
        "versions": versions() | {"python": ".".join(platform.python_version_tuple()[:2])},
    }
    return Lock(as_written(content, recipe.references))


def recipe_of(lock: Lock, file: Path) -> Recipe:
    """The recipe of a lock, with what it takes from the environment as that is now. Raises UsageError, RecipeError."""
    locked = lock.content["recipe"]
    references = {key: Reference(**one) for key, one in locked.get("references", {}).items()}
    require(references)
    return Recipe.restored(read_back(locked["values"], references), str(file), references=references)


def pinned(recipe: Recipe, lock: Lock) -> Recipe:
    """The recipe with the locked commits as its revisions."""
    model, dataset = recipe.model, recipe.dataset
    commit = lock.content["model"].get("commit")
    if commit is not None:
        model = model.model_copy(update={"revision": commit})
    changes: dict[str, Any] = {"train": tuple(_pinned(recipe, source, lock) for source in dataset.train)}
    if isinstance(dataset.validation, tuple):
        changes["validation"] = tuple(_pinned(recipe, source, lock) for source in dataset.validation)
    return recipe.model_copy(update={"model": model, "dataset": dataset.model_copy(update=changes)})


def _pinned(recipe: Recipe, source: Source, lock: Lock) -> Source:
    commit = lock.content["data"].get(_data_key(recipe, source), {}).get("commit")
    return source.model_copy(update={"revision": commit}) if commit is not None else source


def _is_hub(name: str) -> bool:
    return not name.endswith(".gguf") and not expanded(name).exists()


def _model(recipe: Recipe, known: Lock | None) -> dict[str, Any]:
    name, revision = recipe.model.name_or_path, recipe.model.revision
    if not _is_hub(name):
        read_facts(name, revision)  # a model that isn't there is told as everywhere
        return {"name": name, "files": _model_files(expanded(name))}
    with contextlib.suppress(UnreachableError):  # what can't be a hub id is told as everywhere
        read_facts(name, revision)
    before = known.content["model"] if known else {}
    if damaged := damaged_in_cache(name, before.get("commit") or revision):
        wrong = ", ".join(damaged)
        raise DriftError(f"{name}: {wrong} in the hub's cache is damaged; remove it, and download it again")
    if known is not None and _asked_for(known) == _asked(recipe) and before.get("commit"):
        return {"name": name, "commit": before["commit"]}
    return {"name": name, "commit": commit_of(name, revision, "model")}


def _model_files(path: Path) -> dict[str, str]:
    """SHA-256 of a local base's weights and configuration, each read whole; its tokenizer is listed by itself."""
    small = [path / name for name in (*CONFIGURATION, *sorted(file.name for file in path.glob("*.py")))]
    weights = [path] if path.is_file() else weight_files(path) or sorted(path.glob("pytorch_model*.bin"))
    with ThreadPoolExecutor() as pool:
        digests = pool.map(whole_digest, weights)
        return {file.name: digest for file, digest in zip(weights, digests, strict=True)} | {
            file.name: file_digest(file) for file in small if file.is_file()
        }


def _asked_for(lock: Lock) -> tuple[Any, Any]:
    model = lock.content["recipe"]["values"].get("model", {})
    return model.get("name_or_path"), model.get("revision")


def _asked(recipe: Recipe) -> tuple[Any, Any]:
    """The model as a lock has it. A reference of another value is drift, whatever its commit."""
    asked = {"model": {"name_or_path": recipe.model.name_or_path, "revision": recipe.model.revision}}
    shown = as_written(at_keys(asked, recipe.references), recipe.references)["model"]
    return shown["name_or_path"], shown["revision"]


def _tokenizer(recipe: Recipe) -> dict[str, str]:
    folder = expanded(recipe.model.name_or_path)
    files = (folder / name for name in TOKENIZER_FILES)
    return {file.name: file_digest(file) for file in files if file.is_file()} if folder.is_dir() else {}


def _date(template: str | None, known: Lock | None) -> str | None:
    """The day that a template writes, if it writes one: that of the lock for ever."""
    if template is None or not uses_date(template):
        return None
    before = known.content["date"] if known else None
    return before or datetime.date.today().isoformat()


def _chat_template(recipe: Recipe, known: Lock | None) -> str | None:
    """The text of the template that is used; None where it isn't known here."""
    name = recipe.model.name_or_path
    revision = known.content["model"].get("commit") if known and _is_hub(name) else None
    try:
        facts = read_facts(name, revision or recipe.model.revision)
    except UnreachableError:
        facts = ModelFacts(name, "hub", "nothing", {}, ())
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
            yield key, {"commit": _commit(key, source.path, source.revision, "dataset", known)}
    for one in recipe.eval.sets:
        if one.path is not None and is_local(one.path):
            yield one.path, {"files": _files(one.path)}


def _judging(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """SHA-256 of each file that decides what an evaluation finds: schemas, own metrics and own benchmark tasks."""
    for name, file in judging_files(recipe.eval).items():
        yield name, file_digest(file) if file.is_file() else MISSING


def _data_key(recipe: Recipe, source: Source) -> str:
    """A hub data set as a lock names it."""
    path = source.path if source.revision is None else f"{source.path}@{source.revision}"
    return as_written(path, recipe.references)


def _commit(key: str, name: str, revision: str | None, kind: Kind, known: Lock | None) -> str:
    before = known.content["data"].get(key, {}) if known else {}
    return str(before.get("commit") or commit_of(name, revision, kind))


def _files(path: str) -> dict[str, str] | None:
    """SHA-256 by file; None if there are none."""
    try:
        return {str(file): file_digest(file) for file in data_files(path)}
    except DataError:
        return None


def drift(locked: Lock, now: Lock) -> list[str]:
    """A line for everything that is no longer as it was locked; empty if nothing drifted."""
    one, two = locked.content, now.content
    return [
        *_values(one["recipe"]["values"], two["recipe"]["values"]),
        *_references(one["recipe"], two["recipe"]),
        *_changed_model(one["model"], two["model"]),
        *_changed_files("tokenizer ", one["tokenizer"], two["tokenizer"]),
        *_template(one["chat_template"], two["chat_template"]),
        *_changed_data(one["data"], two["data"]),
        *_changed_files("eval: ", one["judging"], two["judging"]),
        *(f"{name}: locked {before}, now {after}" for name, before, after in _pairs(one["versions"], two["versions"])),
    ]


def _pairs(one: dict[str, Any], two: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What differs, by name; what is missing on a side is shown as such."""
    for name in sorted(one.keys() | two.keys()):
        before, after = one.get(name, "none"), two.get(name, "none")
        if before != after:
            yield name, before, after


def _values(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """By dotted key, down to single values and the items of lists of the same length."""
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        before, after = ({str(n): item for n, item in enumerate(items)} for items in (before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            yield from _values(before.get(name), after.get(name), f"{path}.{name}" if path else name)
    elif before != after:
        yield f"{path}: locked {_shown(before)}, now {_shown(after)}"


def _references(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    """The values that are still taken from the environment, and are others there now."""
    before, after = one.get("references", {}), two["references"]
    for key in sorted(before.keys() & after.keys()):
        if before[key]["sha256"] != after[key]["sha256"]:
            yield f"{key}: what it takes from the environment is not what was locked"


def _shown(value: Any) -> str:
    return shorten(json.dumps(value, ensure_ascii=False))


def _changed_model(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    if one.get("name") != two.get("name"):
        return  # the recipe's values say so
    if one.get("commit") != two.get("commit"):
        yield f"model: locked commit {one.get('commit')}, now {two.get('commit')}"
    yield from _changed_files("model: ", one.get("files") or {}, two.get("files") or {})


def _changed_files(what: str, one: dict[str, str], two: dict[str, str]) -> Iterator[str]:
    for name, before, after in _pairs(one, two):
        how = "is gone" if after == "none" else "is new" if before == "none" else "its bytes changed"
        yield f"{what}{name}: {how}"


def _template(before: str | None, after: str | None) -> Iterator[str]:
    if before and after and before != after:
        yield "chat template: its text changed"


def _changed_data(one: dict[str, Any], two: dict[str, Any]) -> Iterator[str]:
    for name in one:
        if name not in two:
            continue  # the recipe's values say so
        if one[name].get("commit") != two[name].get("commit"):
            yield f"{name}: locked commit {one[name].get('commit')}, now {two[name].get('commit')}"
        yield from _changed_files("", one[name].get("files") or {}, two[name].get("files") or {})


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
