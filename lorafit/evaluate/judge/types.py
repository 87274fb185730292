"""Whom to ask, about what, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Judge:
    """Whom to ask, and how.

    Attributes:
        base_url: such as `https://host/v1`. Plain http only to this machine or a private address.
        api_key_env: the name of the environment variable that has the key.
        rows: pairs that are compared, from the first.
        prompt: what is asked, with {first} and {second}, and {question} and {expected} if it wants them. The reply's
            last line has to be A, B or TIE. None: PROMPT.
        timeout: seconds without a sign of the endpoint.
        concurrency: pairs that are asked about at a time.
        insecure: whether plain http may go anywhere. A key never does.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    rows: int = 50
    prompt: str | None = None
    timeout: float = 60.0
    max_tokens: int = 256
    concurrency: int = 4
    insecure: bool = False


@dataclass(frozen=True)
class Pair:
    row: int
    question: str
    expected: str
    one: str
    other: str


@dataclass(frozen=True)
class Verdict:
    """What the judge made of a pair.

    Attributes:
        score: 1 if `one` was preferred in both orders, 0 if `other` was, else 0.5; None if a reply was no vote.
        raw: the replies, `one` first and then `other` first.
    """

    row: int
    score: float | None
    raw: tuple[str, str]

    @property
    def is_contradiction(self) -> bool:
        """Whether the same place won both times, whatever answer stood there."""
        return vote_of(self.raw[0]) == vote_of(self.raw[1]) in ("A", "B")


def position_bias(verdicts: Iterable[Verdict]) -> float | None:
    """The share of contradictions among the verdicts with a score; None if there are none."""
    valid = [verdict.is_contradiction for verdict in verdicts if verdict.score is not None]
    return sum(valid) / len(valid) if valid else None


def vote_of(reply: str) -> str | None:
    """A, B or TIE if that is all of the last line, but for marks around it."""
    lines = reply.strip().splitlines()
    last = lines[-1].strip(" \t*_`'\"[](){}<>.:!") if lines else ""
    if last.upper() == "TIE":
        return "TIE"
    return last if last in ("A", "B") else None


def score_of(one_first: str, other_first: str) -> float | None:
    votes = vote_of(one_first), vote_of(other_first)
    if None in votes:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((str(votes[0]), str(votes[1])), 0.5)
