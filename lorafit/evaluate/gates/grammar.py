"""The language of gates.

    gate       = expression (">=" | "<=" | ">" | "<" | "==" | "!=") expression ["(ci)"]
    expression = term {("+" | "-") term}
    term       = factor {("*" | "/") factor}
    factor     = ["-"] (number ["%"] | figure | "(" expression ")")
    figure     = ["baseline."] SET.METRIC.MODEL

Names may have a `-` in them, so a minus beside a figure has spaces around it: `1-a.loss.base` is the set `1-a`. With
`(ci)` the comparison must hold for the whole 95% interval of left minus right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from lorafit.errors import UsageError, printable
from lorafit.evaluate.gates.demand import BASELINE, Demand, Node

MOST_DEPTH = 50
_TOKEN = re.compile(
    r"\s*(?:(?P<figure>[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*"
    # a set may begin with a digit, a metric does not: 1.5-2.5 and 1.2.3 are no figures
    r"|[0-9][A-Za-z0-9_-]*\.[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)+)"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?%?)(?![\w.])"
    r"|(?P<comparison>>=|<=|==|!=|>|<)|(?P<sign>[-+*/()]))"
)
_CI = re.compile(r"\(\s*ci\s*\)\s*$")


def parse(text: str) -> Demand:
    """Read a gate. Raises UsageError, in one line with the column."""
    return _Parser(text).gate()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        found = _CI.search(text)
        self.by_interval = found is not None
        self.body = text[: found.start()] if found else text
        self.place = 0
        self.depth = 0

    def gate(self) -> Demand:
        if len(self.text) > 2000:
            raise UsageError(f"the gate {printable(self.text[:40])!r} … is too long ({len(self.text)} characters)")
        left = self.expression()
        before = self.place
        kind, comparison = self.take()
        if kind != "comparison":
            self.place = before
            raise self.wrong("a comparison such as >= or <")
        right = self.expression()
        if self.body[self.place :].strip():
            raise self.wrong("the end, or (ci)")
        demand = Demand(self.text, left, comparison, right, self.by_interval)
        if not demand.figures():
            raise UsageError(f"{printable(self.text)!r}: names no figure, so it says nothing of the model")
        if self.by_interval and comparison in ("==", "!="):
            raise UsageError(f"{printable(self.text)!r}: (ci) goes with >=, <=, > and <, not with {comparison}")
        return demand

    def expression(self) -> Node:
        return self._chain("+-", lambda: self._chain("*/", self.factor))

    def _chain(self, signs: str, part: Callable[[], Node]) -> Node:
        node = part()
        while True:
            before = self.place
            kind, sign = self.take()
            if kind != "sign" or sign not in signs:
                self.place = before
                return node
            node = Node(sign=sign, parts=(node, part()))

    def factor(self) -> Node:
        before = self.place
        kind, token = self.take()
        if kind == "number":
            value = float(token.rstrip("%")) / (100 if token.endswith("%") else 1)
            if not math.isfinite(value):
                raise UsageError(f"{printable(self.text)!r}: the number {token} is out of range")
            return Node(number=value)
        if kind == "figure":
            if token.count(".") != 2 + token.startswith(BASELINE):
                raise UsageError(
                    f"{printable(self.text)!r}: {token} is no figure; a figure is SET.METRIC.MODEL, such as "
                    "heldout.loss.adapter"
                )
            return Node(figure=token)
        if token in ("-", "("):
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise UsageError(f"{printable(self.text[:40])!r} …: is nested more than {MOST_DEPTH} deep")
            if token == "-":
                node = Node(sign="-", parts=(Node(number=0.0), self.factor()))
            else:
                node = self.expression()
                before = self.place
                if self.take()[1] != ")":
                    self.place = before
                    raise self.wrong("a closing parenthesis")
            self.depth -= 1
            return node
        self.place = before
        raise self.wrong("a figure or a number")

    def take(self) -> tuple[str, str]:
        """The kind and the text of the next token; empty ones at the end, or at what is none."""
        found = _TOKEN.match(self.body, self.place)
        if found is None or found.lastgroup is None:
            return "", ""
        self.place = found.end()
        return found.lastgroup, found[found.lastgroup]

    def wrong(self, expected: str) -> UsageError:
        column = len(self.body) - len(self.body[self.place :].lstrip()) + 1
        return UsageError(f"{printable(self.text)!r}: expected {expected} at column {column}")
