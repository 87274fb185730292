"""What a recipe comes to here and now, in the shape of a lock."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorafit.errors import DataError, DriftError
from lorafit.evaluate.judging import judging_files
from lorafit.facts import TOKENIZER_FILES, ModelFacts, UnreachableError, read_facts, weight_files
from lorafit.files import file_digest
from lorafit.fingerprint import damaged_in_cache, whole_digest
from lorafit.hardware import detect_cpu
from lorafit.lock.commits import Kind, commit_of
from lorafit.lock.file import Lock
from lorafit.manifest import versions
from lorafit.plan.context import Context
from lorafit.plan.data import read_chat_template
from lorafit.recipe import Recipe, RecipeError, Source
from lorafit.rows import data_files, is_local
from lorafit.template import uses_date
from lorafit.written import Reference, as_written, at_keys, expanded, read_back, require

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
