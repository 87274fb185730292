"""Measures how much memory this process takes."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafit.hardware import held_memory


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
        return Meter(device, held_memory() or _peak(), resets)

    def loaded(self) -> None:
        """Count the peak from now on: files that a loading maps count as resident, but can be dropped at any time."""
        if self.device == "cpu" and self.resets:
            _reset_peak()

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
