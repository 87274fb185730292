"""Keys that exclude each other: what is set in a later layer takes the place of its rivals in an earlier one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lorafit.recipe.source import Located, Position
from lorafit.tree import dotted

_PAIRS = (
    ("training.max_steps", "training.num_train_epochs"),
    ("training.warmup_steps", "training.warmup_ratio"),
    ("training.global_batch_size", "training.gradient_accumulation_steps"),
    ("training.lr_scheduler_kwargs.min_lr", "training.lr_scheduler_kwargs.min_lr_rate"),
    ("quantization.load_in_4bit", "quantization.load_in_8bit"),
)
_OF_4_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
_Path = tuple[str, ...]


def _rivals() -> Iterator[tuple[_Path, _Path, tuple[object, ...] | None]]:
    """A key, another that it takes the place of, and the values with which it does so (None: any that turns it on)."""
    for one, other in _PAIRS:
        yield _path(one), _path(other), None
        yield _path(other), _path(one), None
    for name in _OF_4_BITS:
        yield ("quantization", "load_in_8bit"), ("quantization", name), None
    yield ("quantization", "load_in_4bit"), ("quantization", "llm_int8_threshold"), None
    for name in ("gpu", "vram"):
        yield ("hardware", "device"), ("hardware", name), ("cpu",)
        yield ("hardware", name), ("hardware", "device"), None
    for what in ("eval", "save"):
        yield ("training", f"{what}_strategy"), ("training", f"{what}_steps"), ("no", "epoch", "auto")


def _path(key: str) -> _Path:
    return tuple(key.split("."))


def give_way(earlier: Located, later: Located) -> Located:
    """The earlier layer without what rivals of the later one displace: as if a null had been written over it there."""
    for winner, loser, values in _rivals():
        new, old = _at(later, winner), _at(earlier, loser)
        if new is None or old is None or _at(later, loser) is not None:
            continue
        before = _at(earlier, winner)
        if values is None and before is not None and not _is_off(before.value):
            continue  # both in one layer, which is a mistake; or they go together
        wins = new.value in values if values else not _is_off(new.value)
        if wins and not _is_off(old.value):
            earlier = _removed(earlier, loser, new.key or new.position)
    return earlier


def _is_off(value: object) -> bool:
    return value is None or value is False or value == "auto"


def _at(node: Located, path: _Path) -> Located | None:
    found, reached = node.find(path)
    return found if reached == path else None


def _removed(node: Located, path: _Path, where: Position) -> Located:
    if not path:
        return Located(None, where, where).over(node)
    return replace(node, value={**node.value, path[0]: _removed(node.value[path[0]], path[1:], where)})


def displaced(root: Located) -> Iterator[str]:
    """What gave way, to what, in words."""
    for winner, loser, _ in _rivals():
        new, old = _at(root, winner), _at(root, loser)
        if new is None or old is None or not old.removes or old.position != (new.key or new.position):
            continue
        was = next((one for one in old.earlier if one.value is not None), None)
        if was is not None:
            place = f"{dotted(winner)} ({new.position})"
            yield f"{dotted(loser)}: {was.value} ({was.position}) gives way to {place}, which is set later."
