"""Messages as tests see them: the places, keys, values and figures that a user relies on, not the sentences."""

from __future__ import annotations

import re


class Like:
    """Equal to a text that begins with `told` and holds its parts between ` … ` as whole words, in this order.

    What stands at a gap, or after the last part, is wording. A gap lies within a line; one at the beginning, as in
    `… part`, may cross lines.
    """

    def __init__(self, told: str) -> None:
        self.told = told
        parts = (re.escape(part) for part in told.removeprefix("… ").split(" … "))
        bounded = (re.sub(r"\w$", r"\g<0>\\b", re.sub(r"^\w", r"\\b\g<0>", part)) for part in parts)
        self.pattern = re.compile(("(?s:.*?)" if told.startswith("… ") else "") + ".*?".join(bounded))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.pattern.match(other) is not None

    def __hash__(self) -> int:
        return hash(self.told)

    def __repr__(self) -> str:
        return f"Like({self.told!r})"
