"""A run's memory, predicted and measured: what `lorafit train` writes into its manifest, and what comes of it."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.errors import LorafitError, UsageError
from lorafit.hardware import available_memory
from lorafit.text import first_line

if TYPE_CHECKING:
    from lorafit.memory import Estimate, Setup
    from lorafit.plan import Plan


@dataclass(frozen=True)
class Meter:
    """Measures this process's memory, from when it is made or, on a CPU, from when its model is loaded.

    Attributes:
        device: "cuda" or "cpu".
        baseline: bytes in use at the start: allocated on the GPU, or resident.
        resets: whether the peak can be counted anew; else it is that of the whole process.
    """

    device: str
    baseline: int
    resets: bool

    @staticmethod
    def start(device: str) -> Meter:
        if device == "cuda":
            return Meter(device, 0, True)  # CUDA has not started yet
        resets = _reset_peak()
        return Meter(device, _status("VmRSS") or _peak(), resets)

    def loaded(self) -> None:
        """Count the peak from now on: files that a loading maps count as resident, but can be dropped at any time."""
        if self.device == "cpu" and self.resets:
            _reset_peak()

    def measured(self) -> dict[str, int]:
        """Peak bytes."""
        if self.device == "cuda":
            import torch

            return {
                "allocated": int(torch.cuda.max_memory_allocated()),
                "reserved": int(torch.cuda.max_memory_reserved()),
            }
        peak = (_status("VmHWM") if self.resets else None) or _peak()
        return {"resident": max(peak, self.baseline)}  # Linux counts the pages of threads late

    def peak(self) -> int:
        """Peak bytes as people are told: allocated on the GPU, or resident."""
        return next(iter(self.measured().values()))


def _reset_peak() -> bool:
    """Have Linux count the peak anew (proc(5): clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _status("VmHWM") is not None


def _status(name: str) -> int | None:
    """Bytes of a line in /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    values = (line.split() for line in lines if line.startswith(f"{name}:"))
    return next((int(words[1]) * 1024 for words in values), None)


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- what a run's manifest says -------------------------------------------------------------------


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
    from lorafit.text import gib

    free, known, setup = available_memory(), found.estimate, found.setup
    if free is None or known is None or setup is None or setup.device != "cpu":
        return None
    room = free // setup.world + (_status("VmRSS") or 0)
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


def memory_record(found: Foreseen, meter: Meter, measured: dict[str, int]) -> dict[str, Any]:
    """Predicted and measured peak, with what the prediction was made from."""
    known, setup = found.estimate, found.setup
    record: dict[str, Any] = {
        "device": meter.device,
        "predicted": None,
        "measured": measured,
        "baseline": meter.baseline,
    }
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
    from lorafit.vram.answer import known_tensors

    facts = known_tensors(read_facts(plan.model.name_or_path, plan.revision))
    setup = setup_of(plan, facts)
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
    """A run's peak in bytes, predicted and measured.

    Attributes:
        quantity: allocated or reserved on a GPU, resident on a CPU (which holds what was there before).
    """

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
        """By quantity: the number of runs, their median error without sign, the greatest, and the mean with sign."""
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
