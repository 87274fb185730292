"""Intervals are those of scipy's bootstrap, and differences are paired, counted and covered as they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lorafit.evaluation import figures
from lorafit.evaluation.figures import RESAMPLES, Bootstrap, Classes, Series, difference, interval, value_of
from lorafit.evaluation.results import Difference

Array = np.ndarray[Any, Any]
ROWS = 80


def resampled(bootstrap: Bootstrap, series: Series | Classes) -> Array:
    return bootstrap.resampled({0: series})[0]


def drawn(seed: int = 0) -> tuple[Array, Array, Array]:
    """Losses of two models on the same rows, and the tokens of each."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 40, ROWS).astype(float)
    one = tokens * random.gamma(4.0, 0.3, ROWS)
    return one, one * random.normal(0.95, 0.2, ROWS), tokens


def scipys(statistic: Callable[..., Any], *columns: Array) -> tuple[float, float, float]:
    """The percentile interval by scipy, with other random numbers, and the standard error."""
    found = stats.bootstrap(
        columns,
        statistic,
        n_resamples=10_000,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(99),
    )
    low, high = found.confidence_interval
    return float(low), float(high), float(found.standard_error)


def tolerance(error: float) -> float:
    """How far two bootstraps' ends may be apart by chance.

    The 2.5% quantile of n = 10,000 values that are about normal has a standard deviation of
    sqrt(0.025 * 0.975 / n) / density = 0.00156 / 0.0584 = 0.0267 standard errors; the difference of two independent
    ones has 0.038. Five of those are 0.19: a correct interval fails once in two million, and the seeds are fixed. An
    interval at 90% is off by 0.32 at each end, and one of an unpaired difference by more, so they don't pass; one at
    94% or 96% is off by 0.08 to 0.09 and might.
    """
    return 0.19 * error


def ratio(of: Array, by: Array, axis: int = -1) -> Any:
    return of.sum(axis=axis) / by.sum(axis=axis)


def compare(found: tuple[float | None, float | None], its: tuple[float, float, float]) -> None:
    assert found == pytest.approx(its[:2], abs=tolerance(its[2]))


# --- intervals ------------------------------------------------------------------------------------


def test_the_interval_of_a_mean() -> None:
    values, _, _ = drawn()
    bootstrap, series = Bootstrap(ROWS, 1), Series(values, np.ones(ROWS))
    assert value_of(series) == pytest.approx(values.mean())
    compare(interval(resampled(bootstrap, series)), scipys(np.mean, values))


@pytest.mark.parametrize("transform", ["identity", "exp"])
def test_the_interval_of_a_ratio_of_sums(transform: Any) -> None:
    nll, _, tokens = drawn()
    of = np.exp if transform == "exp" else np.positive
    bootstrap, series = Bootstrap(ROWS, 1), Series(nll, tokens, transform=transform)
    assert value_of(series) == pytest.approx(of(nll.sum() / tokens.sum()))
    its = scipys(lambda a, b, axis=-1: of(ratio(a, b, axis)), nll, tokens)
    compare(interval(resampled(bootstrap, series)), its)


def compared(a: Series | Classes, b: Series | Classes, seed: int = 1) -> Difference:
    rows = len(a.expected if isinstance(a, Classes) else a.numerator)
    made = Bootstrap(rows, seed).resampled({"a": a, "b": b})
    return difference("heldout", "loss", "adapter", "base", a, b, made["a"], made["b"])


@pytest.mark.parametrize("transform", ["identity", "exp"])
def test_the_interval_of_a_paired_difference(transform: Any) -> None:
    one, other, tokens = drawn()
    of = np.exp if transform == "exp" else np.positive
    found = compared(Series(one, tokens, transform), Series(other, tokens, transform))
    its = scipys(lambda a, b, t, axis=-1: of(ratio(a, t, axis)) - of(ratio(b, t, axis)), one, other, tokens)
    compare((found.low, found.high), its)
    assert found.value == pytest.approx(of(ratio(one, tokens)) - of(ratio(other, tokens)))
    # far narrower than of two models on different rows
    apart = math.hypot(scipys(ratio, one, tokens)[2], scipys(ratio, other, tokens)[2])
    assert its[2] < 0.5 * apart * (math.exp(2) if transform == "exp" else 1)
    assert found.detectable == pytest.approx(2.8016 * its[2], rel=0.04)  # an error of 10,000 has an error of 0.7%


def macro_f1(predicted: Array, expected: Array) -> float:
    """The mean F1 of the classes that occur."""
    found = []
    for one in set(predicted[predicted >= 0]) | set(expected[expected >= 0]):
        both = ((predicted == one) & (expected == one)).sum()
        found.append(2 * both / ((predicted == one).sum() + (expected == one).sum()))
    return float(np.mean(found))


def test_the_interval_of_macro_f1() -> None:
    random = np.random.default_rng(4)
    expected = random.integers(0, 3, ROWS)
    predicted = np.where(random.random(ROWS) < 0.7, expected, random.integers(0, 3, ROWS))
    bootstrap, classes = Bootstrap(ROWS, 1), Classes(predicted, expected, 3)
    assert value_of(classes) == pytest.approx(macro_f1(predicted, expected))
    found = stats.bootstrap(
        (predicted, expected),
        macro_f1,
        n_resamples=2000,  # ours has 10,000: the ends are apart by 0.065 standard errors, and not 0.038
        paired=True,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(99),
    )
    its = (*found.confidence_interval, found.standard_error)
    ends = interval(resampled(bootstrap, classes))
    assert ends == pytest.approx(its[:2], abs=5 * 0.065 * float(its[2]))


def test_macro_f1_by_hand() -> None:
    expected = np.array([0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 0, 1, 1, -1, 1])
    # class 0: 2 right of 2 said and 3 there, 4/5; class 1: 1 of 3 and 2, 2/5; class 2: never said, 0; 3: not there
    assert value_of(Classes(predicted, expected, 4)) == pytest.approx((4 / 5 + 2 / 5 + 0) / 3)
    assert value_of(Classes(np.array([1, 0]), np.array([1, 0]), 2)) == 1
    assert value_of(Classes(np.array([1, -1]), np.array([0, 0]), 2)) == 0
    assert value_of(Classes(np.array([-1, -1]), np.array([-1, -1]), 2)) is None


def test_a_difference_of_macro_f1_is_counted_by_right_rows() -> None:
    expected = np.array([0, 1, 0, 1, -1])
    one = Classes(np.array([0, 1, 1, 0, -1]), expected, 2)
    other = Classes(np.array([1, 1, 0, 0, -1]), expected, 2)
    found = compared(one, other)
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)
    assert found.value == pytest.approx(macro_f1(one.predicted, expected) - macro_f1(other.predicted, expected))


# --- seeds and chunks -----------------------------------------------------------------------------


def test_a_seed_gives_the_same_and_another_seed_others() -> None:
    nll, _, tokens = drawn()
    series = Series(nll, tokens)
    made = [resampled(Bootstrap(ROWS, seed), series) for seed in (1, 1, 2)]
    assert made[0].shape == (RESAMPLES,)
    assert np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_chunks_and_companions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, tokens = drawn()
    series: dict[str, Series | Classes] = {
        "a": Series(one, tokens),
        "b": Series(other, tokens),
        "c": Classes(tokens, tokens, 40),
    }
    alone = resampled(Bootstrap(ROWS, 1), series["b"])
    monkeypatch.setattr(figures, "_CHUNK_CELLS", ROWS * 999)
    made = Bootstrap(ROWS, 1).resampled(series)
    assert list(made) == ["a", "b", "c"]
    assert made["b"] == pytest.approx(alone, rel=1e-12)
    assert Bootstrap(ROWS, 1).resampled({}) == {}


def test_more_rows_than_a_chunk_has_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_CHUNK_CELLS", 5)
    monkeypatch.setattr(figures, "RESAMPLES", 20)
    made = resampled(Bootstrap(ROWS, 1), Series(np.ones(ROWS), np.full(ROWS, 2.0)))
    assert made.tolist() == [0.5] * 20


# --- rows without a value, few rows, and none -----------------------------------------------------


def test_rows_without_a_value_are_left_out() -> None:
    nll, _, tokens = drawn()
    has = np.arange(ROWS) % 4 != 0
    bootstrap, series = Bootstrap(ROWS, 1), Series(nll * has, tokens * has)
    assert value_of(series) == pytest.approx(nll[has].sum() / tokens[has].sum())
    compare(interval(resampled(bootstrap, series)), scipys(ratio, nll * has, tokens * has))
    # a row that only one of them has is neither won nor lost
    found = compared(Series(nll, tokens, better="lower"), Series(nll * has + has, tokens * has, better="lower"))
    assert (found.wins, found.ties, found.losses) == (60, 0, 0)


def test_resamples_without_a_value_are_left_out() -> None:
    values, asked = np.array([3.0, 3.0, 0, 0]), np.array([1.0, 1.0, 0, 0])
    bootstrap = Bootstrap(4, 1)
    made = resampled(bootstrap, Series(values, asked))
    assert np.isnan(made).mean() == pytest.approx(0.5**4, abs=0.02)
    assert interval(made) == (3.0, 3.0)


def test_where_no_row_has_a_value() -> None:
    nothing = Series(np.zeros(5), np.zeros(5))
    bootstrap = Bootstrap(5, 1)
    assert value_of(nothing) is None
    assert interval(resampled(bootstrap, nothing)) == (None, None)
    found = compared(nothing, Series(np.ones(5), np.ones(5)))
    assert (found.value, found.low, found.high, found.detectable) == (None, None, None, None)
    assert (found.wins, found.ties, found.losses) == (0, 0, 0)
    assert not found.is_clear


@pytest.mark.parametrize("others", [0, 7])
def test_one_row_has_no_interval(others: int) -> None:
    """All resamples are that row: an interval without width would say that there is no doubt at all."""
    without = np.zeros(others)
    one = Series(np.append(6.0, without), np.append(3.0, without))
    other = Series(np.append(3.0, without), np.append(3.0, without))
    bootstrap = Bootstrap(1 + others, 1)
    assert value_of(one) == 2.0
    assert interval(resampled(bootstrap, one)) == (None, None)
    found = compared(one, other)
    assert (found.value, found.low, found.high, found.is_clear) == (1.0, None, None, False)
    assert found.detectable == pytest.approx(0.8)  # 1 - 0.2 ** 1
    right = Classes(np.zeros(1, dtype=int), np.zeros(1, dtype=int), 2)
    assert interval(resampled(Bootstrap(1, 1), right)) == (None, None)


@pytest.mark.parametrize(("wins", "clear"), [(5, False), (6, True)])
def test_a_difference_is_clear_only_if_enough_rows_differ(wins: int, clear: bool) -> None:
    """Five rows of sixty, all won: the bootstrap leaves out zero, and a coin does as well one time in 16."""
    better, rows = np.zeros(60), np.ones(60)
    better[:wins] = 1
    found = compared(Series(better, rows, better="higher"), Series(np.zeros(60), rows, better="higher"))
    assert found.low is not None
    assert found.low > 0
    assert found.is_clear is clear


@pytest.mark.parametrize(
    "nothing",
    [Series(np.zeros(0), np.zeros(0)), Classes(np.zeros(0, dtype=int), np.zeros(0, dtype=int), 3)],
    ids=["series", "classes"],
)
def test_no_rows(nothing: Series | Classes) -> None:
    bootstrap = Bootstrap(0, 1)
    assert value_of(nothing) is None
    assert interval(resampled(bootstrap, nothing)) == (None, None)
    found = compared(nothing, nothing)
    assert (found.value, found.low, found.detectable) == (None, None, None)


@pytest.mark.filterwarnings("error")
def test_values_out_of_range_have_no_interval() -> None:
    huge = Series(np.full(3, 1e4), np.ones(3), transform="exp")
    bootstrap = Bootstrap(3, 1)
    assert interval(resampled(bootstrap, huge)) == (None, None)
    found = compared(huge, huge)
    assert (found.value, found.low, found.high) == (None, None, None)
    found = compared(huge, Series(np.ones(3), np.ones(3), transform="exp"))
    assert (found.value, found.low, found.high) == (None, None, None)


# --- differences ----------------------------------------------------------------------------------


def test_intervals_leave_out_zero_as_seldom_as_they_should() -> None:
    """300 times 60 rows whose two models do not differ: 5% are expected, and a little more as 60 rows are few."""
    random = np.random.default_rng(7)
    pairs: dict[tuple[int, str], Series] = {}
    for trial in range(300):
        hard = random.gamma(3.0, 1.0, 60)
        for model in "ab":
            pairs[trial, model] = Series(hard + random.normal(0, 0.5, 60), np.ones(60))
    made = Bootstrap(60, 3).resampled(pairs)
    found = [
        difference("s", "m", "a", "b", pairs[t, "a"], pairs[t, "b"], made[t, "a"], made[t, "b"]) for t in range(300)
    ]
    assert 0.02 <= sum(one.is_clear for one in found) / 300 <= 0.09


@pytest.mark.parametrize(("better", "counts"), [("higher", (2, 1, 3)), ("lower", (3, 1, 2)), (None, (2, 1, 3))])
def test_wins_ties_and_losses(better: Any, counts: tuple[int, int, int]) -> None:
    one, other = np.array([3.0, 2, 1, 0, 5, 4, 0]), np.array([1.0, 1, 1, 2, 6, 8, 0])
    asked = np.array([1.0, 2, 1, 1, 1, 1, 0])
    found = compared(Series(one, asked, better=better), Series(other, asked, better=better))
    assert (found.wins, found.ties, found.losses) == counts
    assert found.value == pytest.approx((15 - 19) / 7)  # whichever is better, it is the one minus the other


def test_a_model_against_itself_differs_in_nothing() -> None:
    """Also in the last bit, which would make the interval leave out zero, whatever stands beside it."""
    one, other, tokens = drawn()
    for beside in range(9):
        series = {str(place): Series(other, tokens) for place in range(beside)}
        made = Bootstrap(ROWS, 1).resampled({"a": Series(one, tokens), **series, "b": Series(one, tokens)})
        found = difference("s", "m", "a", "b", Series(one, tokens), Series(one, tokens), made["a"], made["b"])
        assert (found.value, found.low, found.high, found.is_clear) == (0, 0, 0, False)
        assert (found.wins, found.ties, found.losses) == (0, ROWS, 0)
        assert found.detectable == pytest.approx(1 - 0.2 ** (1 / ROWS))


def test_a_constant_difference_has_no_error_but_rounding() -> None:
    """No resample differs from another but in the last bits, which say nothing of what could be seen."""
    one, _, _ = drawn()
    found = compared(Series(one + 0.1, np.ones(ROWS)), Series(one, np.ones(ROWS)))
    assert found.value == pytest.approx(0.1)
    assert found.detectable == pytest.approx(1 - 0.2 ** (1 / ROWS))


def test_what_is_detectable_is_detected_four_times_in_five() -> None:
    """300 times 200 rows with a difference as large as was said to be detectable."""
    random = np.random.default_rng(5)
    noise = random.normal(0, 1, 200)
    said = compared(Series(noise, np.ones(200)), Series(np.zeros(200), np.ones(200))).detectable
    assert said is not None
    assert said == pytest.approx(2.8016 * noise.std() / math.sqrt(200), rel=0.04)
    trials = {trial: Series(random.normal(said, noise.std(), 200), np.ones(200)) for trial in range(300)}
    made = Bootstrap(200, 3).resampled(trials)
    clear = [low for low, _ in map(interval, made.values()) if low is not None and low > 0]
    assert 0.73 <= len(clear) / 300 <= 0.87  # 0.8, give or take three standard deviations of 300 trials


def test_where_all_agree_it_is_the_share_that_would_have_shown() -> None:
    right = Series(np.ones(20), np.ones(20), better="higher")
    found = compared(right, right)
    assert (found.value, found.low, found.high, found.ties) == (0, 0, 0, 20)
    assert found.detectable is not None
    assert found.detectable == pytest.approx(1 - 0.2 ** (1 / 20))
    assert 1 - (1 - found.detectable) ** 20 == pytest.approx(0.8)
