"""A language model that compares two answers, asked over an OpenAI-compatible endpoint. Off unless a recipe names one.

A judge can be wrong, and it can be fooled: an answer may try to tell it how to vote. Answers stand between marks that
they can't foresee, which makes this harder but not impossible.
"""

from __future__ import annotations

from lorafit.evaluate.judge.asking import check, compare
from lorafit.evaluate.judge.types import Judge, Pair, Verdict, position_bias

__all__ = ["Judge", "Pair", "Verdict", "check", "compare", "position_bias"]
