"""The run directory: its files, its lock, its checkpoints (the newest first), and what of it is whole.

A file or folder in it is whole or absent: everything is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit import files
from lorafit.bounds import known_json, read_json, read_text
from lorafit.errors import DriftError, ModelError, UsageError
from lorafit.facts.fingerprint import weights_digest
from lorafit.plan import Plan
from lorafit.text import first_line, printable
from lorafit.written import expanded

FILES = ("recipe.yaml", "plan.json", "metrics.jsonl", "fingerprint.json", "manifest.json")
"""What every run writes beside its folders."""
FILES_LOCKED = (*FILES, "recipe.lock")
"""What a run with --locked writes beside its folders."""
_MADE = ("eval", "merged", "merged-adapter", "merged-gguf", "merged-nf4", "merged-fp4")
BEGUN = "run.json"
"""Name of the file in a checkpoint that says which run it is of."""
FOLDERS = ("adapter", "model", "base", "start", *_MADE)
"""What lorafit makes in a run beside checkpoints."""
_RUN = ("run", "moving")
"""The seals of a run, and of one that is being set aside."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class _Inside:
    """A path in a run directory, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunDir, _: type[RunDir]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunDir:
    """Paths of a run, and what is in them."""

    path: Path

    recipe = _Inside("recipe.yaml")
    """What the user wrote, byte for byte."""
    lock_file = _Inside("recipe.lock")
    """The recipe's lock, of a run with --locked."""
    plan_file = _Inside("plan.json")
    fingerprint = _Inside("fingerprint.json")
    """What the base was as the run began, see lorafit.facts.fingerprint."""
    manifest = _Inside("manifest.json")
    metrics = _Inside("metrics.jsonl")
    """One JSON object per logged step."""
    checkpoints = _Inside("checkpoints")
    adapter = _Inside("adapter")
    """The result of a run with an adapter."""
    model = _Inside("model")
    """The result of a run that trained in full."""
    base = _Inside("base")
    """The base that a GGUF file was dequantized to."""
    start = _Inside("start")
    """The untrained adapter, kept for starts that change the base (PiSSA, OLoRA) or read data."""
    eval = _Inside("eval")
    merged = _Inside("merged")
    replaced = _Inside(".replaced")
    """Where `--overwrite` keeps the run before until the new one is finished."""

    @property
    def result(self) -> Path | None:
        """The finished adapter or model, if there is one."""
        return next((folder for folder in (self.adapter, self.model) if folder.is_dir()), None)

    @property
    def is_run(self) -> bool:
        return self.is_begun and self.plan_file.is_file()

    @property
    def is_begun(self) -> bool:
        """Whether lorafit wrote it, if only its seal: a start that was killed goes no further."""
        return any((seal := files.read_seal(path)) and seal.kind in _RUN for path in (self.path, self.replaced))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was trained or kept here yet."""
        return self.result is None and not self.all_checkpoints()

    def load_plan(self) -> Plan:
        """Raises UsageError if this is no run."""
        try:
            plan = Plan.from_json(read_text(self.plan_file))
        except FileNotFoundError:
            raise UsageError(f"{self.path}: not a run directory (it has no plan.json)") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{self.plan_file}: can't be read as a plan of this version: {error}") from None
        if not self.is_begun:
            raise UsageError(f"{self.path}: not a run directory of lorafit's (it has no {files.SEAL})")
        return plan

    def read_manifest(self) -> dict[str, Any]:
        """The manifest as it is now; an empty one if there is none that can be read."""
        return known_json(self.manifest) or {}

    def load_manifest(self) -> dict[str, Any]:
        """The manifest of a finished run. Raises DriftError if it is missing or was edited."""
        manifest = self.read_manifest()
        if manifest.get("sha256") != files.own_digest(manifest):
            what = "was edited (its sha256 is not that of its content)" if manifest else "is missing or can't be read"
            raise DriftError(f"{self.manifest}: {what}; bring it back, or train anew")
        return manifest

    def check(self) -> None:
        """See that what a finished run is read for is as it was written. Raises DriftError.

        That is all that its manifest lists but the card, and nothing beside it that a model or a tokenizer is read of.
        """
        recorded = self.load_manifest().get("files")
        if not isinstance(recorded, dict) or self.result is None:
            raise DriftError(f"{self.manifest}: has no hashes of the run's files")
        name = self.result.name
        # the seal has the hashes of the rest
        inside = (f"{name}/{files.SEAL}", *(file for file in recorded if "/" not in file))
        wrong = [line for file in inside if (line := self.changed(file, recorded.get(file)))]
        wrong += [f"{name}/{line}" for line in files.damage(self.result, files.CARD)]
        if wrong:
            raise DriftError(
                f"{self.path}: is not as it was trained: {', '.join(wrong[:5])}{' …' * (len(wrong) > 5)}; bring that "
                "back, or train anew"
            )

    def changed(self, name: str, digest: Any) -> str | None:
        """What is wrong with a file of the run that had a SHA-256; None if nothing is."""
        file = self.path / name
        if not file.is_file():
            return f"{name} is missing"
        return None if files.file_digest(file) == digest else f"{name} has changed"

    def added(self, recorded: Container[str]) -> Iterator[str]:
        """The result's files that are not recorded."""
        for file in sorted(self.result.rglob("*")) if self.result else ():
            name = file.relative_to(self.path).as_posix()
            if file.is_file() and name not in recorded:
                yield name

    def begun_with(self) -> dict[str, str]:
        """SHA-256 of what was written as the run began, by name, which each checkpoint keeps."""
        begun = (self.recipe, self.plan_file, self.fingerprint)
        return {file.name: files.file_digest(file) for file in begun if file.is_file()}

    def write_begun(self, checkpoint: Path, step: int) -> None:
        """Say in a checkpoint which run and step it is of."""
        files.write_text(checkpoint / BEGUN, json.dumps({"step": step, "files": self.begun_with()}) + "\n")

    def check_begun(self) -> None:
        """See that the run is still what its newest checkpoint is of. Raises DriftError."""
        last = next(iter(self.all_checkpoints()), None)
        if last is None:
            return
        try:
            before = dict(json.loads(read_text(last / BEGUN)))
            then, step = dict(before["files"]), int(before["step"])
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return  # a damaged checkpoint, which is told as such
        now = self.begun_with()
        if changed := [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]:
            raise DriftError(
                f"{self.path}: {', '.join(changed)}: not what {last.name} was trained with; bring that back, or start "
                "anew with --overwrite"
            )
        if last.name != f"checkpoint-{step}":
            raise DriftError(f"{last}: is of step {step}; give it its name back, or remove it")

    def all_checkpoints(self) -> list[Path]:
        """Every checkpoint, whole or damaged, the newest first."""
        found = [
            (int(match[1]), folder)
            for folder in (self.checkpoints.iterdir() if self.checkpoints.is_dir() else ())
            if (match := _CHECKPOINT.fullmatch(folder.name)) and folder.is_dir()
        ]
        return [folder for _, folder in sorted(found, reverse=True)]

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint. Raises DriftError if it is damaged, and names the one before it that is whole."""
        found = self.all_checkpoints()
        if not found or not (wrong := files.damage(found[0])):
            return found[0] if found else None
        whole = next((number for number, folder in enumerate(found) if number and not files.damage(folder)), None)
        if whole is None:
            way = "none before it is whole: remove them, and start anew"
        else:
            gone = " and ".join(str(folder) for folder in found[:whole])
            way = f"remove {gone}, and --resume goes on from {found[whole].name}, which is whole"
        raise DriftError(f"{found[0]}: the checkpoint is damaged: {', '.join(wrong)}; {way}")

    def made(self) -> list[Path]:
        """What was made of the run: evaluation, merged models, exports."""
        return [folder for name in _MADE if (folder := self.path / name).is_dir()]

    # --- beginning and ending

    def refuse_others(self) -> None:
        """See that the directory is not there, vacant, or a run. Raises UsageError."""
        if self.path.exists() and not self.is_begun and not (self.path.is_dir() and files.is_vacant(self.path)):
            raise UsageError(f"{self.path}: exists and is not a run; choose another output_dir")

    def in_the_way(self, locked: bool) -> str | None:
        """The first thing where a new run would write that is not lorafit's; None if there is none."""
        seal = files.read_seal(self.path)
        ours = (files.SEAL, *seal.names) if seal else ()
        for name in (files.SEAL, *(FILES_LOCKED if locked else FILES)):
            if name not in ours and os.path.lexists(self.path / name):
                return str(name)
        if os.path.lexists(self.replaced) and not files.is_ours(self.replaced):
            return str(self.replaced.name)
        for folder in (self.adapter, self.model, self.base, self.start, *self.all_checkpoints(), *self._sealed()):
            if os.path.lexists(folder):
                is_folder = folder.is_dir() and not folder.is_symlink()
                kept = folder.parent != self.checkpoints
                other = next(files.foreign(folder, changed=kept), None) if is_folder else ""
                if other is not None:
                    return (folder.relative_to(self.path) / other).as_posix()
        is_other = self.checkpoints.is_symlink() or self.checkpoints.is_file()
        return self.checkpoints.name if is_other else None

    def holds(self, path: Path) -> bool:
        """Whether a path is in what lorafit wrote here, and would go with it."""
        return any(path.resolve().is_relative_to(entry.resolve()) for entry in self._entries())

    def begin(self, plan: Plan, recipe_text: bytes, lock_text: str | None = None) -> None:
        """Make the directory of a new run, or fill a vacant one, with the recipe, its lock and the plan."""
        self.path.mkdir(parents=True, exist_ok=True)
        names = FILES if lock_text is None else FILES_LOCKED
        files.Seal("run", dict.fromkeys(names)).write(self.path)  # makes it lorafit's, so it comes first
        files.write_bytes(self.recipe, recipe_text)
        if lock_text is not None:
            files.write_text(self.lock_file, lock_text)
        files.write_text(self.plan_file, plan.to_json())  # makes it a run, so it comes last

    def clear(self) -> None:
        """Take out what lorafit wrote, but for the seal: the directory stays, as it may be a mount point."""
        for entry in self._entries():
            if entry.is_dir():
                files.discard(entry)
            else:
                entry.unlink()
        with contextlib.suppress(OSError):  # there is none, or something else is in it
            self.checkpoints.rmdir()

    def set_aside(self) -> None:
        """Make way for a new run: keep this one until that is finished, if it holds anything."""
        if self.result is not None:
            self.forget_replaced()  # this one replaced it
        if self.is_empty or files.read_seal(self.replaced) is not None:
            self.clear()
            return
        self.replaced.mkdir(exist_ok=True)
        seal = files.read_seal(self.path)
        files.Seal("moving", seal.files if seal else {}).write(self.replaced)
        self._move(self, RunDir(self.replaced))
        (self.path / files.SEAL).replace(self.replaced / files.SEAL)  # last: until then `restore` undoes it

    def restore(self) -> None:
        """Undo a `set_aside` that was killed half-way. Raises UsageError if another process is at it."""
        if self._is_moving:
            with self.lock():
                if self._is_moving:
                    self._move(RunDir(self.replaced), self)
                    files.discard(self.replaced)

    @property
    def _is_moving(self) -> bool:
        seal = files.read_seal(self.replaced)
        return seal is not None and seal.kind == "moving"

    @staticmethod
    def _move(here: RunDir, there: RunDir) -> None:
        """Move what lorafit wrote, but for the seal, from one directory to another."""
        for entry in [*here._entries()]:
            target = there.path / entry.relative_to(here.path)
            target.parent.mkdir(exist_ok=True)
            entry.rename(target)
        with contextlib.suppress(OSError):
            here.checkpoints.rmdir()

    def forget_replaced(self) -> None:
        """Remove the run that the finished one replaces."""
        if (before := RunDir(self.replaced)).is_begun:
            before.clear()
            files.discard(before.path)

    def _entries(self) -> Iterator[Path]:
        """What lorafit wrote, but for the seal: files (those that the seal lists), sealed folders, checkpoints."""
        seal = files.read_seal(self.path)
        names = [files.SEAL, *(seal.names if seal else ())]
        for entry in self._listed():
            if not entry.is_dir() and (entry.name in names[1:] or files.is_left(entry.name, names)):
                yield entry
        yield from self._sealed()
        if self.checkpoints.is_dir() and not self.checkpoints.is_symlink():
            for folder in sorted(self.checkpoints.iterdir()):
                if _CHECKPOINT.fullmatch(files.plain_name(folder)) and _seal_of(folder):
                    yield folder

    def _sealed(self) -> list[Path]:
        """The folders that lorafit makes in a run, those of killed processes too; copies of other names are not its."""
        named = [folder for folder in self._listed() if files.plain_name(folder) in FOLDERS]
        return [folder for folder in named if _seal_of(folder) not in (None, *_RUN)]

    def _listed(self) -> list[Path]:
        return sorted(self.path.iterdir()) if self.path.is_dir() else []

    def base_files(self) -> dict[str, Any] | None:
        """The base's fingerprint (see lorafit.facts.fingerprint) that `write_base_files` wrote; None if it did not.

        Raises UsageError for a file that is broken.
        """
        try:
            return dict(json.loads(read_text(self.fingerprint)))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UsageError(f"{self.fingerprint}: can't be read as a fingerprint: {first_line(error)}") from None

    def write_base_files(self, fingerprint: dict[str, Any]) -> None:
        files.write_text(self.fingerprint, json.dumps(fingerprint, indent=2) + "\n")

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        whole = manifest | {"sha256": files.own_digest(manifest)}
        files.write_text(self.manifest, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")

    def metrics_until(self, step: int) -> list[dict[str, Any]]:
        """The metrics up to a step; a line that was cut off by a kill is left out."""
        kept = []
        with contextlib.suppress(FileNotFoundError):
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, AttributeError, TypeError):
                    entry = json.loads(line)
                    if entry.get("step", 0) <= step:
                        kept.append(entry)
        return kept

    @contextlib.contextmanager
    def lock(self, shared: bool = False) -> Iterator[None]:
        """Hold the run: alone to write it, or with others to read it. Raises UsageError if a writer has it."""
        made = not self.path.exists()
        if not shared:
            self.path.mkdir(parents=True, exist_ok=True)
        busy = f"{self.path}: another process is at work on this run"
        with files.held(self.path / files.LOCK, busy, shared):
            try:
                yield
            finally:
                if made and files.is_vacant(self.path):  # nothing was begun
                    with contextlib.suppress(OSError):
                        (self.path / files.LOCK).unlink()
                        self.path.rmdir()

    def refuse_busy(self, shared: bool = False) -> None:
        """Say that another process is at work on a run, before anything heavy is imported. Raises UsageError."""
        if (self.path / files.LOCK).is_file():
            with self.lock(shared):
                pass


def _seal_of(folder: Path) -> str | None:
    """The kind of a folder that lorafit sealed; links are followed by nobody."""
    seal = None if folder.is_symlink() else files.read_seal(folder)
    return seal.kind if seal else None


def located(path: str | Path) -> Path:
    """A path as it was written if that is plain; what it means if it has a `~`, links, `.` or `..` in it.

    Raises UsageError for what is none: with a NUL or a line break, or a link to itself.
    """
    try:
        if any(character < " " for character in str(path)):
            raise ValueError("it has a control character in it")
        written = expanded(path)
        real = written.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{printable(str(path))}: is no path that can be followed: {first_line(error)}") from None
    return written if written.name and written.absolute() == real else real


@contextlib.contextmanager
def open_run(path: str | Path) -> Iterator[tuple[RunDir, Plan]]:
    """A finished run and its plan, as they were written, held until the block ends, as other readers may hold it.

    Raises UsageError, and DriftError for a run that was edited.
    """
    run = RunDir(located(path))
    if not run.path.is_dir():
        raise UsageError(f"{path}: no such run directory")
    run.restore()
    with run.lock(shared=True):
        plan = run.load_plan()
        if run.result is None:
            raise UsageError(f"{path}: the run is not finished; go on with `lorafit train … --resume`")
        run.check()
        yield run, plan


def proved_merge(merged: Path, adapter: Path | None = None) -> dict[str, Any]:
    """The report of a merged model that is as it was written, was proved, and is of that adapter (None: of any).

    Raises UsageError, ModelError, DriftError.
    """
    if not merged.is_dir():
        raise UsageError(f"{merged}: there is no merged model; make it with `lorafit merge {merged.parent}`")
    files.check_own(merged, "merge again, with --overwrite")
    report = read_json(merged / "merge_report.json")
    proof = report.get("verification", {})  # none of an adapter that was made of several
    if proof.get("level") == "none" or proof.get("breaches"):
        raise UsageError(f"{merged}: {report['verdict']} That is no proof; merge again, with --overwrite")
    if adapter is not None and report["adapter_sha256"] != weights_digest(adapter):
        raise ModelError(f"{merged}: is the merge of another adapter ({report['adapter']}); use --overwrite")
    return report
