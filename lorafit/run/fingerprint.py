"""Fingerprints of a run's base (see lorafit.facts.fingerprint), and a run's hashes, computed once more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.errors import LorafitError, UsageError
from lorafit.facts.fingerprint import (
    Fingerprint,
    base_fingerprint,
    comparable,
    damaged_in_cache,
    differences,
    fingerprint_of,
    summary,
    weights_digest,
)
from lorafit.files import damage, file_digest, foreign, is_read, own_digest, read_seal
from lorafit.plan import Plan
from lorafit.recipe.start import place_of
from lorafit.rows import data_files
from lorafit.run.directory import RunDir
from lorafit.text import first_line
from lorafit.written import as_written, expanded


def model_fingerprint(plan: Plan) -> Fingerprint:
    """The fingerprint of the base that a plan names; only its names for a hub model that was not downloaded yet.

    Raises ModelError for weight files that are missing or cut off.
    """
    return base_fingerprint(plan.model.name_or_path, plan.revision)


def run_fingerprint(plan: Plan, run: RunDir) -> Fingerprint:
    """What a run records of its base: the fingerprint, and that of the folder which a GGUF file became."""
    found = model_fingerprint(plan)
    if key := plan.references.get("model.name_or_path"):
        found |= {"model": key.text}
    return found | {"dequantized": fingerprint_of(run.base)} if run.base.is_dir() else found


def changed_base(plan: Plan, run: RunDir) -> list[str]:
    """What of a run's base is not as it was when the run began, as far as both are known.

    That is the base that the run would load again: of a GGUF file, the folder in the run. Raises ModelError.
    """
    if not run.base.is_dir():
        return changed_source(plan, run)
    recorded = (run.base_files() or {}).get("dequantized")
    return differences(recorded, fingerprint_of(run.base)) if recorded else []


def changed_source(plan: Plan, run: RunDir) -> list[str]:
    """What has changed in the base that the recipe names, such as a GGUF file itself. Raises ModelError."""
    recorded = run.base_files()
    return differences(recorded, model_fingerprint(plan)) if recorded else []


Status = Literal["ok", "changed", "missing", "not recorded", "not here"]
FAILED: tuple[Status, ...] = ("changed", "missing", "not recorded")


@dataclass(frozen=True)
class Check:
    """One thing that a manifest has a hash of.

    Attributes:
        status: `not recorded`: there is nothing to compare with; `not here`: can't be told on this machine.
    """

    what: str
    status: Status
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.status in FAILED


def verify(run: RunDir) -> list[Check]:
    """Every hash of a finished run's manifest. Raises UsageError for what is no finished run."""
    if not run.path.is_dir():
        raise UsageError(f"{run.path}: no such run directory")
    plan = run.load_plan()
    if run.result is None:
        raise UsageError(f"{run.path}: the run is not finished; go on with `lorafit train … --resume`")
    manifest = run.read_manifest()
    if not manifest:
        raise UsageError(f"{run.manifest}: is missing or can't be read, so there is nothing to verify by")
    try:
        own = [*_own_files(run, manifest), *_template(run, manifest)]
        return [*own, *_made(run), *_data(plan, manifest), *_start(plan), *_base(run, plan, manifest)]
    except (AttributeError, TypeError) as error:
        raise UsageError(f"{run.manifest}: can't be read as a manifest of this version: {first_line(error)}") from None


def _own_files(run: RunDir, manifest: dict[str, Any]) -> Iterator[Check]:
    whole = manifest.get("sha256") == own_digest(manifest)
    yield Check("manifest.json", "ok" if whole else "changed", "" if whole else "its sha256 is not that of its content")
    recorded = manifest.get("files")
    if not isinstance(recorded, dict):
        yield Check("the run's own files", "not recorded")
        return
    for name, digest in recorded.items():
        yield _file(name, run.path / name, digest)
    yield from (Check(name, "changed", "was added after the training") for name in run.added(recorded))


def _file(name: str, file: Path, digest: str) -> Check:
    if not file.is_file():
        return Check(name, "missing")
    return Check(name, "ok" if file_digest(file) == digest else "changed")


def _made(run: RunDir) -> Iterator[Check]:
    """What was made of the run: evaluations, merged models and exports, by their seals."""
    for folder in run.made():
        name, known = f"{folder.name}/", read_seal(folder)
        if known is None or known.files is None:
            yield Check(name, "not recorded", "it has no seal of lorafit's")
            continue
        if unknown := [file for file, digest in known.files.items() if digest is None]:
            yield Check(name, "not recorded", f"{', '.join(unknown)}: the exports were not finished; merge again")
            continue
        wrong = [*damage(folder), *(f"{other} was added" for other in foreign(folder) if not is_read(other))]
        yield Check(name, "changed" if wrong else "ok", ", ".join(wrong[:5]))


def _template(run: RunDir, manifest: dict[str, Any]) -> Iterator[Check]:
    recorded = manifest.get("tokenizer", {}).get("chat_template_sha256")
    file = (run.result or run.adapter) / "chat_template.jinja"
    if recorded is None:
        return
    if not file.is_file():
        yield Check("chat template", "not here", "the tokenizer keeps it elsewhere")
        return
    found = hashlib.sha256(file.read_bytes().decode("utf-8", "replace").encode()).hexdigest()
    yield Check("chat template", "ok" if found == recorded else "changed")


def _data(plan: Plan, manifest: dict[str, Any]) -> Iterator[Check]:
    recorded = manifest.get("data", {}).get("files", {})
    for name, digest in recorded.items():
        yield _file(name, expanded(name), digest)
    for source in (*plan.data.train, *plan.data.validation):
        if source.hub is not None:
            yield Check(source.path, "not here", "a hub data set; `lorafit lock` pins its commit")
            continue
        try:
            files = data_files(source.path)
        except LorafitError:
            continue  # its files are listed as missing
        for name in (as_written(str(file), plan.references) for file in files):
            if name not in recorded:
                yield Check(name, "changed", "was added after the training")


def _start(plan: Plan) -> Iterator[Check]:
    """The adapter that the training started from, where it still is."""
    if plan.start_from is None:
        return
    what = f"start {plan.start_from}"
    try:
        now = weights_digest(place_of(plan.start_from).folder)
    except (LorafitError, OSError) as error:
        yield Check(what, "not here", first_line(error))
        return
    yield Check(what, "ok" if now == plan.chain[-1].sha256 else "changed")


def _base(run: RunDir, plan: Plan, manifest: dict[str, Any]) -> Iterator[Check]:
    what = f"base {plan.model.name_or_path}"
    recorded = run.base_files()
    if recorded is None:
        yield Check(what, "not recorded")
        return
    in_manifest = manifest.get("model", {}).get("fingerprint")
    if in_manifest is not None and in_manifest != summary(recorded):
        yield Check("fingerprint.json", "changed", "is not the one of the manifest")
    try:
        changed = changed_source(plan, run)
        known = comparable(recorded, model_fingerprint(plan))
    except LorafitError as error:
        yield Check(what, "missing", str(error))
        return
    changed += damaged_in_cache(plan.model.name_or_path, plan.revision)
    if changed:
        yield Check(what, "changed", ", ".join(changed[:5]))
    else:
        yield Check(what, "ok" if known else "not here", "" if known else "its weights are not on this machine")
