"""Metrics of an answer as text: equal, contained, matched by an expression, its length and repetitions."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter

from lorafit.bounds import within
from lorafit.errors import UsageError, first_line
from lorafit.evaluate.metrics.types import PairScore

_ARTICLES = frozenset(("a", "an", "the"))
_GRAM = 4


def normalize(text: str) -> str:
    """The text as SQuAD compares answers, for all of Unicode.

    Compatibility forms are unified (NFKC), case is folded, punctuation and the words a, an and the are taken away, and
    white space becomes one space. Punctuation goes without a space in its place, as in SQuAD: `1.5` becomes `15`.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(character for character in folded if not _is_punctuation(character))
    return " ".join(word for word in kept.split() if word not in _ARTICLES)


def _is_punctuation(character: str) -> bool:
    # SQuAD takes away ASCII's symbols too, such as $ and +, which are no punctuation to Unicode.
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: str, expected: str) -> float:
    """Share of answers that are the expected one, but for white space at the ends."""
    return float(answer.strip() == expected.strip())


def exact_match_normalized(answer: str, expected: str) -> float:
    """Share of answers that are the expected one after SQuAD's normalization: no case, punctuation and a, an, the."""
    return float(normalize(answer) == normalize(expected))


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words in common, in any order, after SQuAD's normalization. Two without words: 1."""
    given, wanted = Counter(normalize(answer).split()), Counter(normalize(expected).split())
    if not given and not wanted:
        return 1.0
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def contains(answer: str, expected: str) -> float | None:
    """Share of answers that the expected one is a part of, both normalized as SQuAD does.

    A part of a word counts: `no` is in `know`. None where nothing of the expected answer is left.
    """
    wanted = normalize(expected)
    return float(wanted in normalize(answer)) if wanted else None


def contains_text(text: str) -> PairScore:
    """Share of answers that contain TEXT, exactly as it is written."""
    return lambda answer, expected: float(text in answer)


def regex(pattern: str) -> PairScore:
    """Share of answers in which Python's re.search finds PATTERN.

    Raises UsageError if it is none; the metric does if an answer takes it too long, as `(a+)+$` may.
    """
    try:
        with within(UsageError, f"metric regex: '{pattern}'"):
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"metric regex: '{pattern}' is no regular expression: {first_line(error)}") from None

    def score(answer: str, expected: str) -> float:
        with within(UsageError, f"metric regex: '{pattern}': an answer"):
            return float(compiled.search(answer) is not None)

    return score


def words(answer: str, expected: str) -> float:
    """Words of the answer, as white space parts them."""
    return float(len(answer.split()))


def repetition(answer: str, expected: str) -> float:
    """Share of the answer's runs of four words that stood in it before. An answer of fewer than four words: 0."""
    found = answer.split()
    grams = [tuple(found[start : start + _GRAM]) for start in range(len(found) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
