"""Pairs of answers, each asked about in both orders, some at a time."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from lorafit.evaluate.judge.endpoint import ask, endpoint_of
from lorafit.evaluate.judge.prompt import question_of
from lorafit.evaluate.judge.types import Judge, Pair, Verdict, score_of


def check(judge: Judge) -> None:
    """Whatever can be wrong before the first question. Raises UsageError."""
    endpoint_of(judge)


def compare(
    judge: Judge, pairs: Iterable[Pair], done: Container[int] = (), sleep: Callable[[float], None] = time.sleep
) -> Iterator[Verdict]:
    """Ask about each pair twice, the second time with the answers swapped; verdicts come in the order of the pairs.

    Raises UsageError at once, or if the endpoint refuses; ModelError if it fails.

    Args:
        done: rows of pairs that are not asked about again.
        sleep: waits between the tries of a question, in seconds.
    """
    endpoint = endpoint_of(judge)
    asked = (pair for pair in itertools.islice(pairs, judge.rows) if pair.row not in done)

    def decide(pair: Pair) -> Verdict:
        raw = tuple(
            ask(endpoint, question_of(judge, pair, first, second), sleep)
            for first, second in ((pair.one, pair.other), (pair.other, pair.one))
        )
        return Verdict(pair.row, score_of(raw[0], raw[1]), (raw[0], raw[1]))

    return _in_order(decide, asked, judge.concurrency)


def _in_order(decide: Callable[[Pair], Verdict], pairs: Iterable[Pair], at_once: int) -> Iterator[Verdict]:
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="judge")
    waiting: deque[Future[Verdict]] = deque()
    try:
        for pair in pairs:
            waiting.append(pool.submit(decide, pair))
            if len(waiting) >= at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
