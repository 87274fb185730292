"""What is merged: a run's adapter or one from elsewhere, and the base it belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.bounds import read_json
from lorafit.engine.tokenizer import reading
from lorafit.errors import ModelError, UsageError
from lorafit.facts.fingerprint import comparable, differences, fingerprint_of, listed
from lorafit.files import check
from lorafit.plan import Plan
from lorafit.run.directory import RunDir, located, open_run
from lorafit.written import expanded

BASE_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*", "*.py", "*.bin"]
"""What is fetched of a hub model."""


@dataclass(frozen=True)
class Source:
    """An adapter and what is known of its training.

    Attributes:
        adapter: the folder with adapter_config.json.
        run: the run that trained it; None for an adapter from elsewhere.
        base_name: as the run or the adapter names it.
    """

    adapter: Path
    run: RunDir | None
    plan: Plan | None
    config: dict[str, Any]
    base_name: str
    revision: str | None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The recorded arguments of BitsAndBytesConfig, if the base was quantized for training."""
        return self.plan.quantization_kwargs if self.plan else None

    @property
    def manifest(self) -> dict[str, Any]:
        return self.run.load_manifest() if self.run else {}

    @property
    def shown(self) -> str:
        return str(self.run.path if self.run else self.adapter)


@contextlib.contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """A run, or a folder with an adapter. Raises UsageError, ModelError."""
    folder = located(path)
    if folder.name == "adapter" and RunDir(folder.parent).is_run:
        folder = folder.parent
    if (folder / "adapter_config.json").is_file() and not RunDir(folder).is_run:
        _check_weights(folder)
        check(folder)
        config = read_json(folder / "adapter_config.json")
        name = config.get("base_model_name_or_path") or ""
        yield Source(folder, None, None, config, str(name), config.get("revision"))
        return
    with open_run(folder) as (run, plan):
        if plan.adapter.trains_base:
            raise UsageError(f"{run.path}: trained in full, so there is nothing to merge; the model is {run.model}")
        config = read_json(run.adapter / "adapter_config.json")
        _check_weights(run.adapter)
        yield Source(run.adapter, run, plan, config, plan.model.name_or_path, plan.revision)


def _check_weights(adapter: Path) -> None:
    """Raises ModelError for an adapter without its weights: PEFT takes the folder for a hub id then."""
    if not any((adapter / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise ModelError(f"{adapter}: has no adapter_model.safetensors")


@dataclass(frozen=True)
class Base:
    """The model that is merged into.

    Attributes:
        checked: how it is known to be the one of the training.
        remark: what the user should know; None if nothing.
    """

    folder: Path
    name: str
    checked: str
    remark: str | None = None


def find_base(source: Source, asked: str | None, allow_other: bool) -> Base:
    """The base on this machine, fetched from the hub if need be. Raises ModelError for another one than in training."""
    run, plan = source.run, source.plan
    if asked is None and run is not None and run.base.is_dir():
        folder, name = run.base, source.base_name
    else:
        name = asked or source.base_name
        if not name:
            raise UsageError(f"{source.adapter}: does not name its base model; name it with --base")
        folder = local_folder(name, source.revision if asked is None else None)
    if expanded(name).is_dir():  # of a folder in the hub's cache, not all was fetched
        check(folder)
    if run is None or plan is None:
        return Base(folder, name, "known by name and shapes only", _stranger(source, name, asked))
    recorded, now = run.base_files() or {}, fingerprint_of(folder)
    if run.base.is_dir() and asked is None:
        recorded = recorded.get("dequantized") or {}
    changed = differences(recorded, now)
    if not changed and not comparable(recorded, now):
        remark = (
            f"{name}: whether it is the base that {run.path} was trained on can't be told: its record has no weights"
        )
        return Base(folder, name, "not known", remark)
    if not changed:
        return Base(folder, name, "yes, by fingerprint")
    what = f"{name}: is not the base that {run.path} was trained on (differs in {listed(changed, 3)})"
    if not allow_other:
        raise ModelError(f"{what}; bring that back, or insist with --allow-other-base")
    return Base(folder, name, "no, another base was allowed", f"{what}; it was allowed")


def _stranger(source: Source, name: str, asked: str | None) -> str:
    remark = (
        f"{source.adapter}: not trained by lorafit, so nothing but names and shapes tells whether {name} is the base "
        "it was trained on"
    )
    if asked and source.base_name and expanded(asked).name.lower() != expanded(source.base_name).name.lower():
        remark += f"; the adapter itself names {source.base_name}"
    return remark


def local_folder(name: str, revision: str | None) -> Path:
    """The folder of a base: as named, or the hub's in the cache. Raises ModelError."""
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: the folder has no config.json, so it is no model")
        return path
    if path.is_file():
        raise ModelError(f"{name}: a single file can't be merged into; the base must be a folder or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(f"{name}: the base is not there (no such folder); name the folder with --base")
    from huggingface_hub import snapshot_download

    with reading("base", name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=BASE_FILES))


def same_base(first: Source, other: Source) -> None:
    """Two adapters can be combined if they are for one base. Raises ModelError."""
    one = first.run.base_files() if first.run else None
    two = other.run.base_files() if other.run else None
    changed = differences(one, two) if one and two else []
    if changed or (not (one and two) and expanded(first.base_name).name != expanded(other.base_name).name):
        raise ModelError(
            f"{other.shown}: was trained on another base than {first.shown} ({other.base_name} and {first.base_name}"
            + (f"; differs in {changed[0]})" if changed else ")")
        )
