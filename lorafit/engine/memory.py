"""Memory of a training: measured as it runs, kept within what is free, and what is said when it runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafit.console import Console
from lorafit.errors import DoesNotFitError, is_out_of_memory
from lorafit.hardware import held_memory, return_memory
from lorafit.memory.static import base_bytes, trained_bytes
from lorafit.plan import Plan
from lorafit.plan.values import PASSES
from lorafit.run.memory import Foreseen, shortage
from lorafit.text import GIB, gib
from lorafit.vram.advice import relief


@dataclass
class Meter:
    """Measures this process's memory, from when it is made or, on a CPU, from when its model is loaded.

    Attributes:
        device: "cuda" or "cpu".
        baseline: bytes in use at the start: allocated on the GPU, or resident.
        resets: whether the peak can be counted anew; else it is that of the whole process.
        held: bytes allocated on the GPU once the model was loaded.
    """

    device: str
    baseline: int
    resets: bool
    held: int = 0

    @staticmethod
    def start(device: str) -> Meter:
        if device == "cuda":
            return Meter(device, 0, True)  # CUDA has not started yet
        resets = _reset_peak()
        return Meter(device, held_memory() or _peak(), resets)

    def loaded(self) -> None:
        """Count the peak from now on: files that a loading maps count as resident, but can be dropped at any time."""
        if self.device == "cpu" and self.resets:
            _reset_peak()
        elif self.device == "cuda":
            self.held = int(torch.cuda.memory_allocated())

    def measured(self) -> dict[str, int]:
        """Peak bytes."""
        if self.device == "cuda":
            return {
                "allocated": int(torch.cuda.max_memory_allocated()),
                "reserved": int(torch.cuda.max_memory_reserved()),
            }
        peak = (held_memory("VmHWM") if self.resets else None) or _peak()
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
    return held_memory("VmHWM") is not None


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_within(plan: Plan, foreseen: Foreseen, console: Console | None) -> Foreseen:
    """Have freed memory returned at once on a CPU, which takes time, where it is short or checkpointing is to save it.

    Short memory is said on the console. Returns what is foreseen then.
    """
    short = shortage(foreseen)
    if short is None:
        if plan.hardware.device == "cpu" and plan.training.gradient_checkpointing:
            return_memory()
        return foreseen
    returned = return_memory()
    if console is not None:
        console.print(short.line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    return dataclasses.replace(foreseen, estimate=short.least) if returned else foreseen


@contextlib.contextmanager
def explained_out_of_memory(plan: Plan, foreseen: Foreseen, meter: Meter) -> Iterator[None]:
    """Turn running out of memory into a DoesNotFitError that says what was more than foreseen, and what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows = plan.training.per_device_train_batch_size
        what = f"out of memory in training with {rows} rows of up to {plan.data.max_length} tokens at once"
        raise DoesNotFitError(
            f"{what}{grown(plan, foreseen, meter, error)}; {remedy(plan, foreseen, meter)}"
        ) from error


def grown(plan: Plan, foreseen: Foreseen, meter: Meter, error: BaseException) -> str:
    """What is held on the GPU beside what was foreseen: the weights, or else what a step adds to them."""
    known, setup = foreseen.estimate, foreseen.setup
    if known is None or setup is None or meter.device != "cuda":
        return ""
    told, held = base_bytes(setup) + trained_bytes(setup) * (not setup.adapter.trains_base), meter.held
    now = meter.peak() + asked_for(error)
    line = f": {gib(now)} GiB were needed where {gib(known.allocated)} were foreseen"
    room = plan.hardware.memory_bytes
    if room is not None and known.total > room:
        return f": {gib(known.total)} GiB were foreseen, and the card has {gib(room)}"
    if now <= known.allocated:
        return f"{line}, and the rest of the card is taken by others, or in pieces"
    if held > told * 1.02:
        return f"{line}; it is the weights, of {gib(held)} GiB instead of {gib(told)}"
    most = max((term for term in known.terms if "weights" not in term.name), key=lambda term: term.bytes, default=None)
    step = (
        f"{line}; it is what a step adds to the weights, {gib(now - held)} GiB instead of {gib(known.allocated - told)}"
    )
    return f"{step} (the most: {most.name}, {gib(most.bytes)})" if most else step


def asked_for(error: BaseException) -> int:
    """Bytes of the allocation that failed, by torch's message; 0 where it names none."""
    found = re.search(r"Tried to allocate ([0-9.]+) (GiB|MiB|KiB)", str(error))
    return int(float(found[1]) * {"GiB": GIB, "MiB": 1 << 20, "KiB": 1 << 10}[found[2]]) if found else 0


def remedy(plan: Plan, foreseen: Foreseen, meter: Meter) -> str:
    """The mildest change that fits, by the estimator, which is told how far off it was; else what helps in general."""
    known, room = foreseen.estimate, plan.hardware.memory_bytes
    found = None
    if known is not None and room is not None:
        share = max(meter.peak() / known.allocated, 1.0) if meter.device == "cuda" else 1.0
        with contextlib.suppress(Exception):  # whatever it is, it must not hide that memory ran out
            found = relief(plan, min(int(room / share), known.total - 1))
    if found is None:
        return (
            "lower training.per_device_train_batch_size (with global_batch_size, accumulation makes up for it), turn "
            "on gradient_checkpointing, shorten max_length, or quantize the base"
        )
    names = {override.partition("=")[0].removeprefix("training.") for override in found.change.overrides}
    way = "go on with --resume and it" if names <= set(PASSES) else "start anew with it"
    return f"{found.change.does} would do ({found.change.options}): {way}"
