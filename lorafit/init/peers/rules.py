"""What becomes of another tool's keys: one rule a key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from lorafit.init.peers.dialect import text

Fate = Literal["becomes", "decides", "idle", "lost", "refused"]
"""`becomes`: the value is the recipe's. `decides`: together with other keys. `idle`: has no effect on what is learned.
`lost`: no equivalent, and listed. `refused`: no recipe is made, since it would train something else."""

_FALSE: tuple[Any, ...] = (False, "no", "false", "off")
OFF: tuple[Any, ...] = (None, "", 0, "none", [], {}, *_FALSE)


@dataclass(frozen=True)
class Rule:
    """What becomes of a key.

    Attributes:
        key: the tool's; `*` stands for anything, `datasets[].` for a data set's own.
        target: the recipe's key or keys.
        read: the value for the recipe. Raises ValueError.
        harmless: values with which a lost or refused key changes nothing, besides those that turn it off. Where true
            is one, as the tool's default, false is a choice and not "off".
        chosen: values that are a choice as well, though they look like "off".
    """

    key: str
    fate: Fate
    target: str = ""
    remark: str = ""
    read: Callable[[Any], Any] = text
    harmless: tuple[Any, ...] = ()
    chosen: tuple[Any, ...] = ()

    def is_off(self, value: Any) -> bool:
        chosen = (*self.chosen, *(_FALSE if True in self.harmless else ()))
        return _is_among(value, (*OFF, *self.harmless)) and not _is_among(value, chosen)


def _is_among(value: Any, known: Iterable[Any]) -> bool:
    """As `in`, but for upper case, and true and false are no numbers."""
    word = value.lower() if isinstance(value, str) else value
    return any(word == one and isinstance(word, bool) is isinstance(one, bool) for one in known)


Rules = tuple[Rule, ...]


def becomes(key: str, target: str, read: Callable[[Any], Any], remark: str = "") -> Rules:
    return (Rule(key, "becomes", target, remark, read),)


def decides(keys: str, target: str, remark: str = "") -> Rules:
    """For keys with spaces between."""
    return tuple(Rule(key, "decides", target, remark) for key in keys.split())


def idle(keys: str, remark: str) -> Rules:
    return tuple(Rule(key, "idle", "", remark) for key in keys.split())


def lost(keys: str, remark: str, *harmless: Any, chosen: tuple[Any, ...] = ()) -> Rules:
    return tuple(Rule(key, "lost", "", remark, harmless=harmless, chosen=chosen) for key in keys.split())


def refused(keys: str, remark: str, *harmless: Any) -> Rules:
    return tuple(Rule(key, "refused", "", remark, harmless=harmless) for key in keys.split())


def table(*groups: Iterable[Rule]) -> Rules:
    return tuple(rule for group in groups for rule in group)


def find(rules: Rules, key: str) -> Rule | None:
    """The rule of a key: its own, or that of a pattern."""
    own = next((rule for rule in rules if rule.key == key), None)
    return own or next((rule for rule in rules if "*" in rule.key and fnmatchcase(key, rule.key)), None)
