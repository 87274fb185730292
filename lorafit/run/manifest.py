"""The start of a run (what may stand where it is written, when it goes on), and the manifest: what it was made of
and how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lorafit.errors import ModelError, UsageError
from lorafit.facts import fingerprint
from lorafit.facts.fingerprint import Fingerprint, listed, summary
from lorafit.files import check_own, file_digest
from lorafit.plan import Plan, Schedule, dated
from lorafit.plan.chain import base_before
from lorafit.recipe.start import place_of
from lorafit.rows import data_files
from lorafit.rows.audit import Audit
from lorafit.run.directory import RunDir, located
from lorafit.run.fingerprint import changed_base, changed_source
from lorafit.tree import differences, dotted
from lorafit.written import as_written

STACK = (
    *("lorafit", "torch", "transformers", "trl", "peft"),
    *("bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors"),
)


def build_manifest(
    plan: Plan,
    base: Fingerprint,
    audit: Audit,
    trainer: Any,
    schedule: Schedule,
    began: float,
    memory: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything but secrets: nothing that the recipe takes from the environment, no tokens, no user names.

    Args:
        base: the fingerprint of the base, as the run began.
        began: when, in seconds since 1970.
    """
    state, template = trainer.state, trainer.processing_class.chat_template
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    local = [source for source in (*plan.data.train, *plan.data.validation) if source.hub is None]
    ended = datetime.datetime.now(datetime.UTC)
    manifest = {
        "manifest_version": 1,
        "name": plan.name,
        "versions": versions(),
        "git": git_state(),
        "hardware": dataclasses.asdict(plan.hardware),
        "model": dataclasses.asdict(plan.model) | {"fingerprint": summary(base)},
        "chain": [dataclasses.asdict(stage) for stage in plan.chain],
        "data": {
            "files": {str(file): file_digest(file) for source in local for file in data_files(source.path)},
            "audit": audit.as_dict(),
        },
        "tokenizer": {
            "chat_template_sha256": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
            "eos_token": trainer.processing_class.eos_token,
            "pad_token": trainer.processing_class.pad_token,
        },
        "schedule": dataclasses.asdict(schedule),
        "result": {
            "steps": state.global_step,
            "epochs": state.epoch,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "best_metric": state.best_metric,
            "best_step": state.best_global_step,
            "stopped_early": state.global_step < state.max_steps,
        },
        "memory": memory,
        "seconds": round(ended.timestamp() - began, 3),
        "finished": ended.isoformat(timespec="seconds"),
    }
    return as_written(manifest, plan.references)


def hashes(run: RunDir, result: Path, name: str) -> dict[str, str]:
    """SHA-256 of what a finished run holds, by path in it; the result will be called `name`, wherever it is now."""
    own = [run.recipe, run.lock_file, run.plan_file, run.metrics, run.fingerprint]
    files = {file.name: file for file in own if file.is_file()}
    inside = sorted(file for file in result.rglob("*") if file.is_file())
    files |= {f"{name}/{file.relative_to(result).as_posix()}": file for file in inside}
    return {path: file_digest(file) for path, file in files.items()}


def versions() -> dict[str, str]:
    """Versions of what lorafit stands on, by package, as far as it is installed."""
    found = {}
    for name in STACK:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the working directory's repository, and whether it has uncommitted changes."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


ANEW = "bring that back, or start anew with --overwrite"


@dataclass(frozen=True)
class Start:
    """A way to begin, and to treat what already stands at the run directory.

    Attributes:
        lock: the text of the lock that the run is held to, which it keeps.
        recipe: the file that the recipe was read from, which must not go with an older run.
        steps: stop after so many, of a schedule for all: to repeat the beginning of a run.
    """

    resume: bool = False
    overwrite: bool = False
    lock: str | None = None
    steps: int | None = None
    recipe: str | None = None


def as_begun(run: RunDir, plan: Plan, start: Start) -> Plan:
    """The plan with the day on which the run that goes on was begun, for chat templates that write it."""
    if not start.resume or not run.is_run or plan.data.date is None:
        return plan
    return dated(plan, run.load_plan().data.date)


def check_start(run: RunDir, plan: Plan, start: Start) -> None:
    """Refuse what would lose or confuse a run. Raises UsageError."""
    path = run.path
    run.refuse_others()
    if not run.is_run and start.resume:
        raise UsageError(f"{path}: there is no run to resume; leave out --resume")
    if not run.is_run or is_anew(run, start):
        return
    if run.result is not None:
        raise UsageError(f"{path}: the run is finished; use --overwrite to start anew, or another output_dir")
    if start.resume:
        run.check_begun()
    before, now = run.load_plan().decides(), plan.decides()
    if before["data"]["tokenizer_sha256"] is None:  # the first run downloaded it
        now["data"]["tokenizer_sha256"] = None
    changed = changed_keys(before["recipe"], now["recipe"])
    if changed:
        raise UsageError(
            f"{path}: holds a run of another recipe ({', '.join(changed[:5])}{' …' * (len(changed) > 5)}); use "
            "--overwrite to start anew, or another output_dir"
        )
    if before["hardware"] == now["hardware"] and before["rows_per_step"] != now["rows_per_step"]:
        raise UsageError(
            f"{path}: a step has {now['rows_per_step']} rows now, and {before['rows_per_step']} in the run; "
            "per_device_train_batch_size and gradient_accumulation_steps may change together only"
        )
    changed = changed_keys(before, now)
    if changed and start.resume:
        raise UsageError(
            f"{path}: the recipe is the same, but the data or the machine is not ({', '.join(changed[:5])}), so the "
            "run can't go on exactly; bring back what changed, or start anew with --overwrite"
        )
    if not start.resume:
        raise UsageError(f"{path}: holds an unfinished run; go on with --resume, or start anew with --overwrite")
    changed = changed_source(plan, run) or (changed_base(plan, run) if run.base.is_dir() else [])
    if changed:
        raise UsageError(
            f"{path}: the base {plan.model.name_or_path} is not the one that the run began with (changed: "
            f"{listed(changed)}); bring it back, or start anew with --overwrite"
        )


def is_anew(run: RunDir, start: Start) -> bool:
    """Whether a start takes the place of what a run holds."""
    return start.overwrite or (run.is_empty and not start.resume)


def check_way(run: RunDir, plan: Plan, start: Start) -> None:
    """See that nothing but lorafit's own is where a new run will be, and nothing that is needed. Raises UsageError."""
    if not run.is_begun or (run.is_run and not is_anew(run, start)):
        return
    if other := run.in_the_way(start.lock is not None):
        raise UsageError(
            f"{run.path}: {other} is in the way, which lorafit did not write; move it, or choose another output_dir"
        )
    sources = [source.path for source in (*plan.data.train, *plan.data.validation)]
    sets = [one["path"] for one in plan.eval["sets"] if one["path"]]
    named = [plan.model.name_or_path, *sources, *sets, *filter(None, [start.recipe]), os.getcwd()]
    named += [str(place_of(plan.start_from).folder)] if plan.start_from else []
    inside = next((name for name in named if run.holds(located(name))), None)
    if inside is not None:
        raise UsageError(f"{run.path}: would be replaced, and {inside} is in it; choose another output_dir")


def check_base_of_start(plan: Plan, run: RunDir) -> None:
    """See that the base, which is whole here by now, is that of the adapter that goes on. Raises ModelError."""
    if plan.start_from is None:
        return
    if changed := fingerprint.differences(base_before(place_of(plan.start_from)), run.base_files() or {}):
        raise ModelError(
            f"model.name_or_path: {plan.model.name_or_path} is not the base that {plan.start_from} was trained on "
            f"(differs in {listed(changed, 3)}); bring that back"
        )


def check_checkpoints(run: RunDir) -> None:
    """See that the checkpoints that a run goes on with are as they were written. Raises DriftError."""
    last = run.last_checkpoint()
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8")) if last else {}
    best = Path(state.get("best_model_checkpoint") or "").name
    for folder in {*([run.checkpoints / best] if best else []), run.start} - {last}:
        if folder.is_dir():
            check_own(folder, ANEW)


def changed_keys(before: Any, after: Any) -> list[str]:
    """The keys at which two resolved recipes or plans differ."""
    return [dotted(key) for key in sorted(key for key, _, _ in differences(before, after))]


def make_run(run: RunDir, plan: Plan, recipe_text: bytes, start: Start) -> None:
    """Write the directory of a new run, in place of an older one where that was asked for."""
    if start.resume and not run.is_empty:
        return
    if start.overwrite:
        run.set_aside()
    else:
        run.clear()
    run.begin(plan, recipe_text, start.lock)
