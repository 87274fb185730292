"""Metrics of an answer as text: equal, contained, matched, its length, and what it shares with the expected one."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections import Counter
from typing import Any

from lorafit.bounds import within
from lorafit.errors import UsageError
from lorafit.evaluation.metrics.metric import PairScore, load_extra
from lorafit.text import first_line

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


_TOKEN = re.compile("[a-z0-9]+")


def rouge_1(answer: str, expected: str) -> float | None:
    """ROUGE-1: F1 of the words (a-z and 0-9, no stems) in common. None where the expected answer has no such word."""
    return _rouge_n(answer, expected, 1)


def rouge_2(answer: str, expected: str) -> float | None:
    """ROUGE-2: F1 of the pairs of neighbouring words in common. None where the expected answer has no two words."""
    return _rouge_n(answer, expected, 2)


def rouge_l(answer: str, expected: str) -> float | None:
    """ROUGE-L: F1 of the longest sequence of words in common. None where the expected answer has no such word."""
    given, wanted = _tokens(answer), _tokens(expected)
    return _f1(_common_length(given, wanted), len(given), len(wanted))


def chrf(answer: str, expected: str) -> float | None:
    """chrF of sacrebleu, answer by answer: runs of up to six characters in common. None where nothing is expected."""
    return _sacrebleu_score("chrf", answer, expected)


def bleu(answer: str, expected: str) -> float | None:
    """BLEU of sacrebleu, answer by answer: runs of up to four words in common. None where nothing is expected.

    With exponential smoothing and effective order, as sacrebleu's sentence BLEU. The mean over answers is not the BLEU
    of the whole set.
    """
    return _sacrebleu_score("bleu", answer, expected)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _rouge_n(answer: str, expected: str, size: int) -> float | None:
    given, wanted = (_grams(_tokens(text), size) for text in (answer, expected))
    return _f1((given & wanted).total(), given.total(), wanted.total())


def _grams(tokens: list[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(size)), strict=False))


def _f1(common: int, given: int, wanted: int) -> float | None:
    return 2 * common / (given + wanted) if wanted else None


def _common_length(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel, after Hyyrö (2004): a row of the usual table is one integer, whose zero bits count the length.
    """
    places: dict[str, int] = {}
    for index, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << index
    everything = (1 << len(one)) - 1
    row = everything
    for token in other:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(one) - row.bit_count()


def _sacrebleu_score(name: str, answer: str, expected: str) -> float | None:
    if not expected.strip():
        return None
    # A perfect score comes out a rounding error above 100.
    return min(float(_scorer(name).sentence_score(answer, [expected]).score) / 100, 1.0)


@functools.cache
def _scorer(name: str) -> Any:
    metrics = load_extra("sacrebleu.metrics", name)
    return metrics.CHRF() if name == "chrf" else metrics.BLEU(effective_order=True)
