"""A run's memory: what `lorafit train` foresees and records of it, and how far off that was."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import LorafitError, UsageError
from lorafit.hardware import available_memory, held_memory
from lorafit.text import first_line, gib

if TYPE_CHECKING:
    from lorafit.memory import Estimate, Setup
    from lorafit.plan import Plan


@dataclass(frozen=True)
class Foreseen:
    """What a run's memory should be, from its audited data; or the reason why that isn't known."""

    setup: Setup | None = None
    estimate: Estimate | None = None
    reason: str | None = None


def foresee(plan: Plan) -> Foreseen:
    """Never raises: a training is not lost for want of a prediction."""
    from lorafit import memory

    setup = None
    try:
        setup = setup_of_run(plan)
        return Foreseen(setup, memory.estimate(setup))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is said in the manifest
        reason = first_line(error)
        return Foreseen(setup, None, reason if isinstance(error, LorafitError) else f"{type(error).__name__}: {reason}")


@dataclass(frozen=True)
class Shortage:
    """A run on a CPU that needs more than this machine has free.

    Attributes:
        line: that says so.
        least: the estimate with every large block returned at once; `served` says whether that is enough.
    """

    line: str
    least: Estimate


def shortage(found: Foreseen) -> Shortage | None:
    """None where the memory is enough, or nobody knows. What this process holds already is part of what it needs."""
    from lorafit.memory import estimate

    free, known, setup = available_memory(), found.estimate, found.setup
    if free is None or known is None or setup is None or setup.device != "cpu":
        return None
    room = free // setup.world + (held_memory() or 0)
    if known.total <= room:
        return None
    least = estimate(setup, room)
    each = f" for each of {setup.world} processes" if setup.world > 1 else ""
    line = (
        f"the training needs about {gib(known.total)} GiB of memory ({gib(known.least)} to {gib(known.most)}), and "
        f"{gib(room)} GiB are free here{each}; large blocks are returned at once, which is slower"
    )
    if least.served:
        return Shortage(f"{line} and needs about {gib(least.total)} GiB", least)
    changes = [
        "lower training.per_device_train_batch_size (accumulation makes up for it)" * (setup.batch > 1),
        "lower max_length",
        "turn on gradient_checkpointing" * (setup.checkpointing == "none"),
    ]
    return Shortage(f"{line}, and may still swap or be killed: {', or '.join(filter(None, changes))}", least)


def memory_record(found: Foreseen, device: str, baseline: int, measured: dict[str, int]) -> dict[str, Any]:
    """Predicted and measured peak, with what the prediction was made from."""
    known, setup = found.estimate, found.setup
    record: dict[str, Any] = {"device": device, "predicted": None, "measured": measured, "baseline": baseline}
    if known is not None:
        record["predicted"] = {"allocated": known.allocated, "reserved": known.reserved, "method": known.method}
    if setup is not None:
        record["setup"] = {
            "batch": setup.batch,
            "length": setup.length,
            "supervised": setup.supervised,
            "dtype": setup.dtype,
            "loss": setup.stack.loss,
            "sharding": setup.sharding,
        }
    if found.reason is not None:
        record["reason"] = found.reason
    return record


def setup_of_run(plan: Plan) -> Setup:
    """The setup of a run whose data is audited: its longest row may be shorter than max_length.

    Raises ModelError.
    """
    from lorafit.facts import read_facts
    from lorafit.memory import setup_of

    setup = setup_of(plan, read_facts(plan.model.name_or_path, plan.revision))
    if plan.audit is None:
        return setup
    part = plan.audit["training_rows"]
    sources = (*plan.audit["train"], *plan.audit["validation"])
    longest = max((source["longest"] for source in sources), default=0)
    length = setup.length if plan.data.packing or not longest else min(setup.length, longest)
    share = part["supervised_tokens"] / part["tokens"] if part["tokens"] else 1.0
    return dataclasses.replace(setup, length=length, supervised=share)


# --- runs against their predictions ---------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A run's peak in bytes: allocated and reserved on a GPU, on a CPU resident, with what was there before."""

    run: str
    device: str
    quantity: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Calibration:
    """Runs against their predictions, and those that have none, with the reason."""

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]

    def summary(self) -> dict[str, dict[str, float]]:
        """Errors by quantity: the number of runs, their median without sign, the greatest, and the mean with sign."""
        found = {}
        for quantity in dict.fromkeys(row.quantity for row in self.rows):
            errors = [row.error for row in self.rows if row.quantity == quantity]
            sizes = [abs(error) for error in errors]
            found[quantity] = {
                "runs": len(errors),
                "median_error": statistics.median(sizes),
                "largest_error": max(sizes),
                "bias": statistics.fmean(errors),
            }
        return found

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": [dataclasses.asdict(row) | {"error": row.error} for row in self.rows],
            "skipped": [{"run": run, "reason": reason} for run, reason in self.skipped],
            "summary": self.summary(),
        }


def calibrate(runs: Sequence[Path]) -> Calibration:
    """Read the manifests of runs, given as directories or files. Raises UsageError for a path that isn't there."""
    rows: list[Row] = []
    skipped: list[tuple[str, str]] = []
    for run in runs:
        try:
            rows += _rows(run)
        except _NoFiguresError as error:
            skipped.append((str(run), str(error)))
    return Calibration(tuple(rows), tuple(skipped))


class _NoFiguresError(Exception):
    """Why a run can't be compared."""


def _rows(run: Path) -> list[Row]:
    memory = _memory_of(run)
    try:
        device, guess, measured = memory["device"], memory["predicted"], memory["measured"]
        if guess is None:
            raise _NoFiguresError(f"nothing was predicted: {memory.get('reason', 'no reason is given')}")
        if device == "cuda":
            pairs = [(name, guess[name], measured[name]) for name in ("allocated", "reserved")]
        else:
            pairs = [("resident", guess["reserved"] + memory["baseline"], measured["resident"])]
        rows = [Row(str(run), str(device), name, int(told), int(real)) for name, told, real in pairs]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _NoFiguresError("its manifest's memory figures can't be read") from None
    if any(row.measured <= 0 for row in rows):
        raise _NoFiguresError("nothing was measured")
    return rows


def _memory_of(run: Path) -> dict[str, Any]:
    if not run.exists():
        raise UsageError(f"{run}: no such run")
    file = run / "manifest.json" if run.is_dir() else run
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _NoFiguresError("has no manifest: not a run, or not a finished one") from None
    except (OSError, ValueError):
        raise _NoFiguresError("its manifest can't be read") from None
    memory = manifest.get("memory") if isinstance(manifest, dict) else None
    if not isinstance(memory, dict):
        raise _NoFiguresError("its manifest has no memory figures: made by an earlier version, or resumed when done")
    return memory
