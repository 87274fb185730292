"""Recipes of other tools -> lorafit's: which tool's one is, and the conversion, by a table of keys for each tool."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, get_args

from lorafit.errors import UsageError
from lorafit.init.peers import axolotl, llamafactory, trl
from lorafit.init.peers.convert import Conversion, Kind, Rules, find, read_peer
from lorafit.recipe.yaml import Located
from lorafit.text import near

KINDS: tuple[Kind, ...] = get_args(Kind)


class Peer(Protocol):
    """What a tool's module has."""

    TITLE: str
    MARKS: tuple[str, ...]
    """Keys that only its recipes have, or nearly so."""
    NAMED: str
    """The key that names the model."""
    RULES: Rules

    def assemble(self, c: Conversion) -> None:
        """Decide what several keys decide together, after the table."""


PEERS: dict[Kind, Peer] = {"axolotl": axolotl, "llamafactory": llamafactory, "trl": trl}


def whose(root: Located, file: Path) -> Kind:
    """Tell by its keys which tool's recipe it is. Raises UsageError where they don't tell."""
    keys = {*root.value}
    scores = {
        kind: 3 * len(keys & {*peer.MARKS}) + sum(find(peer.RULES, key) is not None for key in keys)
        for kind, peer in PEERS.items()
    }
    best = max(KINDS, key=lambda kind: scores[kind])
    alike = [kind for kind in KINDS if scores[kind] == scores[best]]
    if not keys & {*PEERS[best].MARKS} or len(alike) > 1:
        raise UsageError(f"{file}: its keys don't tell whose it is; say it with --kind {', '.join(KINDS)}")
    return best


def convert(file: Path, output: Path, kind: str | None = None) -> tuple[Kind, Conversion]:
    """A tool's recipe as one of lorafit's, to be written to `output`. Raises UsageError and RecipeError."""
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {kind}: not one of {', '.join(KINDS)}{near(kind, list(KINDS))}")
    root = read_peer(file)
    found = next((known for known in KINDS if known == kind), None) or whose(root, file)
    peer = PEERS[found]
    conversion = Conversion(peer.TITLE, file, output, root.value, peer.RULES)
    conversion.apply()
    if "model.name_or_path" not in conversion.lines:
        raise UsageError(f"{file}: {peer.NAMED}: is missing, or --kind is wrong (this was read as {peer.TITLE}'s)")
    peer.assemble(conversion)
    conversion.settle()
    return found, conversion
