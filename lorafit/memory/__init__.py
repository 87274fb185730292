"""Memory of a training step, from tensor shapes alone: no torch, no weights, no GPU."""

from __future__ import annotations

from lorafit.memory.estimate import (
    Band,
    Estimate,
    Kernel,
    LossPath,
    Setup,
    Sharding,
    Stack,
    Term,
    check_size,
    fits,
    judged,
    known_tensors,
    setup_of,
)

__all__ = [
    "Band",
    "Estimate",
    "Kernel",
    "LossPath",
    "Setup",
    "Sharding",
    "Stack",
    "Term",
    "check_size",
    "estimate",
    "fits",
    "judged",
    "known_tensors",
    "setup_of",
]


def estimate(setup: Setup, capacity: int | None = None) -> Estimate:
    """The closed form's estimate, on a card with so many bytes. Raises ModelError for layers that aren't known."""
    from lorafit.memory.closed import closed_form

    return closed_form(setup, capacity)
