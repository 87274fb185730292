"""The audit: what is counted of the data while it is tokenized, and the limits that gate training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafit.errors import DataError


@dataclass(frozen=True)
class Finding:
    """How often something was found, and the first place as a complete line (`file:line: what is wrong`)."""

    count: int
    first: str


@dataclass
class SourceAudit:
    """What became of a source's rows.

    Attributes:
        masks: how the answers were found.
        read: rows read.
        rows: rows that can be trained on.
        tokens: their tokens, after cutting at max_length.
        supervised_tokens: those of them that are in the loss.
        answers: answers to learn, before cutting.
        ends_learned: answers whose end is in the loss, after cutting.
        lost_tokens: supervised tokens that cutting lost, those of dropped rows included.
        longest: tokens of the longest row, before cutting.
        reasoning: rows with reasoning before an answer that is learned.
        empty_reasoning: rows in which the chat template writes an empty block of it there, which is not learned.
        dropped: rows left out, by reason.
        found: by the name of the audit's rule, how often it was broken.
        sequences: what a row has of them, each of which can break a rule.
    """

    path: str
    masks: str = ""
    read: int = 0
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    answers: int = 0
    ends_learned: int = 0
    lost_tokens: int = 0
    longest: int = 0
    reasoning: int = 0
    empty_reasoning: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    found: dict[str, Finding] = field(default_factory=dict)
    sequences: int = 1

    def count(self, rule: str, line: str, times: int = 1) -> None:
        """Count a finding; `line` is kept for the first."""
        before = self.found.get(rule)
        self.found[rule] = Finding(before.count + times, before.first) if before else Finding(times, line)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def of(self, rule: str) -> int:
        """How many there are of what the rule counts a share of."""
        return {
            "empty_answers": self.read,  # found as a row is read, once for all that it has
            "not_utf8": self.read,
            "untrained_ends": self.answers,
            "lost_tokens": self.supervised_tokens + self.lost_tokens,
        }.get(rule, self.read * self.sequences)

    def take_in(self, other: SourceAudit) -> None:
        """Add what was counted of the rejected answers of this source's pairs."""
        self.sequences = 2
        for name in ("answers", "ends_learned", "lost_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        for reason, times in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + times
        for rule, finding in other.found.items():
            self.count(rule, f"{finding.first} (the rejected answer)", finding.count)


@dataclass(frozen=True)
class PartAudit:
    """The training or the validation rows as they will be used: split, mixed, repeated and packed into `packs`."""

    rows: int
    tokens: int
    supervised_tokens: int
    packs: int | None = None


@dataclass(frozen=True)
class Audit:
    """What the data is, as counted.

    Attributes:
        train, validation: the sources, in the recipe's order.
        training_rows, validation_rows: what is made of them; None without validation.
        duplicates: training rows that repeat an earlier one.
        leaked: validation rows that are training rows as well.
        unweighted_rows: training rows before sources are repeated or thinned by their weights.
        whole: whether every row was looked at (a stream is looked at in part).
    """

    train: tuple[SourceAudit, ...]
    validation: tuple[SourceAudit, ...]
    training_rows: PartAudit
    validation_rows: PartAudit | None = None
    duplicates: Finding | None = None
    leaked: Finding | None = None
    whole: bool = True
    unweighted_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values, as `from_dict` takes them."""
        raw = dataclasses.asdict(self)
        return raw | {"train": list(raw["train"]), "validation": list(raw["validation"])}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Audit:
        """Raises ValueError for what `as_dict` did not give."""
        found: Audit = _adapter(Audit).validate_python(raw)
        return found

    @property
    def masks(self) -> str:
        return ", ".join(dict.fromkeys(source.masks for source in self.train))


def source_from_dict(raw: Mapping[str, Any]) -> SourceAudit:
    """A source's part of `Audit.as_dict`."""
    found: SourceAudit = _adapter(SourceAudit).validate_python(raw)
    return found


@functools.cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


RULES: dict[str, str] = {
    "empty_answers": "rows with an empty answer",
    "not_utf8": "rows with text that is not UTF-8",
    "no_supervised_tokens": "rows with nothing to learn",
    "answers_left_out": "rows of which the chat template leaves out an answer",
    "context_left_out": "rows of which the chat template leaves out a turn, the tools or reasoning",
    "special_tokens_in_content": "rows with control tokens in their words",
    "prompt_differs": "rows that learn an answer after another text than a server asks with",
    "prompt_boundary": "rows whose prompt ends within a token once the answer follows",
    "bos": "rows with other than one beginning-of-sequence token",
    "untrained_ends": "answers whose end token is not learned",
    "truncated": "rows cut at max_length",
    "lost_tokens": "learned tokens lost to max_length",
    "answers_cut_off": "rows whose answers max_length cuts off whole",
    "duplicates": "training rows that repeat an earlier one",
    "leaked": "validation rows that are training rows, too",
}
"""What each rule counts, for tables and messages. The recipe's section `dataset.audit` has their limits."""

Limits = Mapping[str, float | None]


@dataclass(frozen=True)
class Share:
    """A finding with the number of what could have been found, and its limit (None: there is none)."""

    rule: str
    finding: Finding
    total: int
    limit: float | None

    @property
    def share(self) -> float:
        return self.finding.count / max(self.total, 1)

    @property
    def is_breach(self) -> bool:
        return self.limit is not None and self.share > self.limit

    def __str__(self) -> str:
        percent = f"{self.share:.2%}" if self.share >= 0.0001 else f"{self.share:.2g}"
        return f"{self.rule}: {self.finding.count:,} of {self.total:,}, {percent}"


def findings(audit: Audit, limits: Limits) -> Iterator[Share]:
    """Everything that was found: per source where a source can break the rule."""
    for source in (*audit.train, *audit.validation):
        yield from source_findings(source, limits)
    if audit.duplicates:
        yield Share("duplicates", audit.duplicates, audit.unweighted_rows, limits.get("duplicates"))
    if audit.leaked and audit.validation_rows:
        yield Share("leaked", audit.leaked, audit.validation_rows.rows, limits.get("leaked"))


def source_findings(source: SourceAudit, limits: Limits) -> Iterator[Share]:
    for rule, finding in source.found.items():
        yield Share(rule, finding, source.of(rule), limits.get(rule))


def breaches(found: Iterable[Share]) -> list[str]:
    """A line for every limit that is exceeded, with the first place."""
    return [f"{one.finding.first} (dataset.audit.{one}, is above {one.limit:.4g})" for one in found if one.is_breach]


def gate(audit: Audit, limits: Limits) -> None:
    """Raises DataError with a line for every limit of `dataset.audit` that the data exceeds."""
    lines = breaches(findings(audit, limits))
    if lines:
        hint = "mend the data, or raise the limits under dataset.audit; `lorafit preview` shows the rows"
        raise DataError("\n".join([*lines, hint]))
