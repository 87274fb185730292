"""Recipes of other tools -> lorafit's: which tool's one is, and the conversion, by a table of keys for each tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lorafit.errors import UsageError
from lorafit.init.peers import axolotl, llamafactory, trl
from lorafit.init.peers.convert import Conversion, Kind, Rules, find, read_peer
from lorafit.recipe.yaml import Located
from lorafit.text import near

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Peer:
    """A tool.

    Attributes:
        marks: keys that only its recipes have, or nearly so.
        assemble: decides what several keys decide together, after the table.
    """

    title: str
    marks: tuple[str, ...]
    rules: Rules
    assemble: Callable[[Conversion], None]


PEERS: dict[Kind, Peer] = {
    "axolotl": Peer(axolotl.TITLE, axolotl.MARKS, axolotl.RULES, axolotl.assemble),
    "llamafactory": Peer(llamafactory.TITLE, llamafactory.MARKS, llamafactory.RULES, llamafactory.assemble),
    "trl": Peer(trl.TITLE, trl.MARKS, trl.RULES, trl.assemble),
}
MAPPINGS: dict[Kind, Rules] = {kind: peer.rules for kind, peer in PEERS.items()}
"""What becomes of every key, by tool: for the documentation."""


def whose(root: Located, file: Path) -> Kind:
    """Whose recipe it is, by its keys. Raises UsageError where they don't tell."""
    keys = {*root.value}
    scores = {
        kind: 3 * len(keys & {*peer.marks}) + sum(find(peer.rules, key) is not None for key in keys)
        for kind, peer in PEERS.items()
    }
    marked = {kind: keys & {*PEERS[kind].marks} for kind in KINDS}
    best = max(KINDS, key=lambda kind: scores[kind])
    alike = [kind for kind in KINDS if scores[kind] == scores[best]]
    if not marked[best] or len(alike) > 1:
        raise UsageError(f"{file}: its keys don't tell whose it is; say it with --kind {', '.join(KINDS)}")
    return best


def convert(file: Path, output: Path, kind: str | None = None) -> tuple[Kind, Conversion]:
    """A tool's recipe as one of lorafit's, to be written to `output`. Raises UsageError and RecipeError."""
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {kind}: not one of {', '.join(KINDS)}{near(kind, list(KINDS))}")
    root = read_peer(file)
    found = next((known for known in KINDS if known == kind), None) or whose(root, file)
    peer = PEERS[found]
    conversion = Conversion(peer.title, file, output, root.value, peer.rules)
    conversion.apply()
    if "model.name_or_path" not in conversion.lines:
        name = "base_model" if found == "axolotl" else "model_name_or_path"
        raise UsageError(f"{file}: {name}: is missing, or --kind is wrong (this was read as {peer.title}'s)")
    peer.assemble(conversion)
    conversion.settle()
    return found, conversion
