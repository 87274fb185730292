"""Metrics of summaries and translations: what an answer shares with the expected one.

ROUGE is written out here: rouge_score takes seconds to import (it loads nltk for stems, which are not used here), and
the classic definition is short. The tests hold figures that were computed with rouge_score.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import Any

from lorafit.evaluate.metrics.types import load_extra

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
