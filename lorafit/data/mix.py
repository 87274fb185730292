"""Which rows are trained on, in which order, and which are held out: arithmetic on row indices."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Indices: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Keys: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
_ROWS_AT_ONCE = 1 << 18


def split(keys: Keys, count: int, seed: int) -> tuple[Indices, Indices]:
    """Training and validation indices, in order. `count` rows are held out, taken at random.

    Rows with equal keys stay together, so that no validation row is a training row as well; where
    that does not come out even, fewer than `count` are held out (but always some).
    """
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    held = np.zeros(len(sizes), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(sizes))
    missing = count
    for index in order:
        if sizes[index] <= missing:
            held[index] = True
            missing -= sizes[index]
        if not missing:
            break
    if not held.any() and len(sizes) > 1:
        held[order[int(np.argmin(sizes[order]))]] = True
    chosen = held[group]
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def weighted(indices: Indices, weight: float, seed: int) -> Indices:
    """The indices as often as the weight says: all of them for each whole, and a random part for the rest."""
    whole = int(weight)
    parts = [indices] * whole
    rest = round(weight * len(indices)) - whole * len(indices)
    if rest:
        parts.append(np.sort(np.random.default_rng(seed).choice(indices, rest, replace=False)))
    return np.concatenate(parts) if parts else indices[:0]


def repeated(keys: Keys) -> tuple[int, int, int]:
    """How many rows repeat an earlier one, the first that does, and the one that it repeats."""
    count = 0
    first: tuple[int, int] | None = None
    for part, places in _parts(keys):
        _, where, group = np.unique(part, return_index=True, return_inverse=True)
        again = np.ones(len(part), dtype=bool)
        again[where] = False
        count += int(again.sum())
        if again.any():
            one = int(np.argmax(again))
            found = int(places[one]), int(places[where[group[one]]])
            first = min(first, found) if first else found
    return (count, *first) if first else (0, 0, 0)


def shared(keys: Keys, others: Keys) -> tuple[int, int, int]:
    """How many rows are among the others too, the first that is, and the one that it equals."""
    mask = np.isin(keys, others)
    if not mask.any():
        return 0, 0, 0
    first = int(np.argmax(mask))
    return int(mask.sum()), first, int(np.argmax(others == keys[first]))


def _parts(keys: Keys) -> Any:
    """The keys in parts that hold all equal ones, so that sorting needs little memory."""
    parts = 1 + len(keys) // _ROWS_AT_ONCE
    for part in range(parts):
        places = np.flatnonzero(keys % parts == part)
        yield keys[places], places
