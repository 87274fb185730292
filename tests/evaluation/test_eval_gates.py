"""Gates are read as they are written, refused in one line that says why, and judged by figures or by intervals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wording import Like

from lorafit.errors import UsageError
from lorafit.evaluation.gates import Demand, check_comparable, compute, judge, load_results, parse, regression_gates
from lorafit.evaluation.results import Figure, Gate, Metric, Model, Results, Set

LOSS = Metric(name="loss", label="loss", unit="nats", better="lower")
MATCH = Metric(name="exact_match", label="exact match", unit="share", better="higher")
LENGTH = Metric(name="length", label="length", unit="tokens", better=None)
FIGURES = {
    "heldout.loss.base": 2.0,
    "heldout.loss.adapter": 1.5,
    "heldout.exact_match.adapter": 0.75,
    "my-set_2.rouge-l.run-b": 0.25,
    "a.b.c": 8.0,
    "a.b.c-d.e.f": 100.0,  # no name that can be had; a.b.c - d.e.f is
    "d.e.f": 3.0,
    "none.loss.base": None,
    "zero.loss.base": 0.0,
    "2024-q1.loss.base": 6.0,
    "3shot.b.c": 4.0,
    "1e5.b.c": 5.0,
}


def results(figures: dict[str, Any], metrics: tuple[Metric, ...] = (LOSS, MATCH, LENGTH)) -> Results:
    """Of figures by name: a value, or a value and the ends of its interval."""

    def figure(of: Any) -> Figure:
        value, low, high = of if isinstance(of, tuple) else (of, None, None)
        return Figure(value=value, low=low, high=high, rows=10)

    def model(kind: Any) -> Model:
        return Model(kind=kind, path="x", sha256=None, quantization=None, dtype="float32", seconds=1.0)

    info = Set(role="task", source="x.jsonl", rows=10, answered=10, sha256="0", metrics=metrics)
    return Results(
        run="runs/x",
        name="x",
        created="2026-01-01T00:00:00Z",
        versions={},
        hardware={},
        settings={},
        models={"base": model("base"), "adapter": model("adapter"), "merged": model("merged")},
        sets=dict.fromkeys((key.split(".")[0] for key in figures), info),
        figures={key: figure(of) for key, of in figures.items()},
        differences=(),
        gates=(),
    )


def judged(
    text: str, resamples: dict[str, Any] | None = None, baseline: Results | None = None, figures: Any = None
) -> Gate:
    return judge(parse(text), "eval.gates.0", figures or FIGURES, (resamples or {}).get, baseline)


def sides(text: str) -> tuple[float, float]:
    demand = parse(f"{text} + 0 * zero.loss.base")  # a gate needs a figure
    return tuple(float(compute(side, FIGURES.__getitem__)) for side in (demand.left, demand.right))  # type: ignore[return-value,arg-type]


# --- the grammar ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1", 1),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5),
        ("1e-3", 0.001),
        ("2.5E+2", 250),
        ("80%", 0.8),
        ("12.5%", 0.125),
        (".5%", 0.005),
        ("1 + 2 * 3", 7),
        ("1+2*3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 4 - 3", 3),
        ("10 - (4 - 3)", 9),
        ("100 / 10 / 5", 2),
        ("100 / 10 * 5", 50),
        ("2 * 3 + 4 * 5", 26),
        ("2 + 3 / 4 - 5", -2.25),
        ("-1", -1),
        ("--1", 1),
        ("-(1 + 2)", -3),
        ("-2 * -3", 6),
        ("2 - -3", 5),
        ("2--3", 5),
        ("-2 + 3", 1),
        ("6 / -2", -3),
        ("((((7))))", 7),
        ("50% * 50%", 0.25),
        ("1 - 5%", 0.95),
        ("heldout.loss.base", 2.0),
        ("-heldout.loss.base", -2.0),
        ("heldout.loss.base * 105%", 2.1),
        ("heldout.loss.base - heldout.loss.adapter", 0.5),
        ("(heldout.loss.base)-(heldout.loss.adapter)", 0.5),
        ("my-set_2.rouge-l.run-b", 0.25),
        ("a.b.c - d.e.f", 5.0),
        ("a.b.c -d.e.f", 5.0),
        ("a.b.c\t-\n1", 7.0),
        ("a.b.c*2", 16.0),
        ("1 - a.b.c", -7.0),
        ("1.5-a.b.c", -6.5),
        ("1.5-2.5", -1.0),
        ("2024-q1.loss.base", 6.0),
        ("-2024-q1.loss.base", -6.0),
        ("2024-q1.loss.base - 3shot.b.c", 2.0),
        ("1e5.b.c + 1e5", 100_005.0),
    ],
)
def test_what_an_expression_is(expression: str, value: float) -> None:
    assert sides(f"{expression} >= 4 - 1") == pytest.approx((value, 3))
    assert sides(f"3<{expression}") == pytest.approx((3, value))
    assert sides(f"  {expression}  ==  3  ") == pytest.approx((value, 3))


@pytest.mark.parametrize("comparison", [">=", "<=", ">", "<", "==", "!="])
def test_every_comparison(comparison: str) -> None:
    expected = {">=": (0, 1, 1), "<=": (1, 1, 0), ">": (0, 0, 1), "<": (1, 0, 0), "==": (0, 1, 0), "!=": (1, 0, 1)}
    for figure, passed in zip((7, 8, 9), expected[comparison], strict=True):
        assert judged(f"a.b.c {comparison} 8", figures={"a.b.c": float(figure)}).passed is bool(passed)


@pytest.mark.parametrize("end", ["(ci)", " (ci)", " ( ci ) ", "\t(ci)\n"])
def test_the_interval_is_asked_for_at_the_end(end: str) -> None:
    demand = parse(f"a.b.c > (d.e.f){end}")
    assert demand.by_interval
    assert demand.comparison == ">"
    assert demand.figures() == ["a.b.c", "d.e.f"]
    assert not parse("a.b.c > d.e.f").by_interval


def test_figures_are_named_once_and_in_order() -> None:
    assert parse("d.e.f + a.b.c * d.e.f < baseline.a.b.c - a.b.c").figures() == ["d.e.f", "a.b.c", "baseline.a.b.c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'': … figure … column 1"),
        ("   ", "'   ': … figure … column 4"),
        ("> 3", "'> 3': … figure … column 1"),
        ("a.b.c", "'a.b.c': … comparison … column 6"),
        ("a.b.c   7", "'a.b.c   7': … comparison … column 9"),
        ("a.b.c = 7", "'a.b.c = 7': … comparison … column 7"),
        ("a.b.c >", "'a.b.c >': … figure … column 8"),
        ("a.b.c > (ci)", "'a.b.c > (ci)': … figure … column 9"),
        ("a.b.c (ci) > 3", "'a.b.c (ci) > 3': … comparison … column 7"),
        ("a.b.c > 3 (ci) x", "'a.b.c > 3 (ci) x': … the end … column 11"),
        ("a.b.c > 3 > 2", "'a.b.c > 3 > 2': … the end … column 11"),
        ("a.b.c => 3", "'a.b.c => 3': … comparison … column 7"),
        ("a.b.c > 3)", "'a.b.c > 3)': … the end … column 10"),
        ("(a.b.c > 3", "'(a.b.c > 3': … closing … column 8"),
        ("(a.b.c 3) > 3", "'(a.b.c 3) > 3': … closing … column 8"),
        ("() > 3", "'() > 3': … figure … column 2"),
        ("a.b.c + * 2 > 3", "'a.b.c + * 2 > 3': … figure … column 9"),
        ("+1 > 3", "'+1 > 3': … figure … column 1"),
        ("3x > 3", "'3x > 3': … figure … column 1"),
        ("1.2.3 > 3", "'1.2.3 > 3': … figure … column 1"),
        ("a.b.c > 5 %", "'a.b.c > 5 %': … the end … column 11"),
        ("a.b.c% > 5", "'a.b.c% > 5': … comparison … column 6"),
        ("a.b.c > 1e999", "'a.b.c > 1e999': … 1e999 … out of range"),
        ("loss > 3", "'loss > 3': loss … SET.METRIC.MODEL"),
        ("a.b > 3", "'a.b > 3': a.b … SET.METRIC.MODEL"),
        ("a.b.c.d > 3", "'a.b.c.d > 3': a.b.c.d … SET.METRIC.MODEL"),
        ("baseline.b.c > 3", "'baseline.b.c > 3': baseline.b.c … SET.METRIC.MODEL"),
        ("a.b.c-d.e.f > 3", "'a.b.c-d.e.f > 3': a.b.c-d.e.f … SET.METRIC.MODEL"),
        ("a.b.c == 3 (ci)", "'a.b.c == 3 (ci)': (ci) … >=, <=, … =="),
        ("a.b.c != 3 (ci)", "'a.b.c != 3 (ci)': (ci) … >=, <=, … !="),
        ("a.b.c > é", "'a.b.c > é': … figure … column 9"),
        ("a.b.c > \n\x1b[31m", r"'a.b.c > \\n\\x1b[31m': … figure … column 10"),
    ],
)
def test_what_is_said_of_what_is_no_gate(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert message == Like(said)
    assert message.isprintable()


def test_a_gate_can_be_neither_too_long_nor_too_deep() -> None:
    for text in ("(" * 10_000, "(" * 10_000 + "1" + ")" * 10_000 + " > 0", "-" * 10_000 + "1 > 0"):
        with pytest.raises(UsageError, match=r"too long \(\d+ "):
            parse(text)
    for text in (
        "(" * 900 + "1" + ")" * 900 + " > 0",
        "-" * 900 + "1 > 0",
        "-(" * 500,
        "(" * 51 + "1" + ")" * 51 + ">0",
    ):
        with pytest.raises(UsageError, match=r"nested .*50"):
            parse(text)
    assert sides("(" * 50 + "1" + ")" * 50 + " > 0") == (1, 0)
    assert sides("(1) + " * 200 + "1 > " + "(0) + " * 100 + "0") == (201, 0)  # beside each other they are not deep


@pytest.mark.parametrize("sign", "+-*/")
def test_a_long_chain_is_not_deep(sign: str) -> None:
    """As many operators as a gate has room for; no recursion goes along them."""
    gate = judged(f"a.b.c {f'{sign}1' * 990} != 0.5")
    assert gate.passed
    assert "a.b.c is 8: left is " in gate.sentence
    assert parse("a.b.c > 1" + "+1" * 990).figures() == ["a.b.c"]


PIECES = ["a.b.c", "baseline.a.b.c", "d.e.f", "x", "1", "5%", "1e5", ".", "-", "+", "*", "/", "(", ")", "(ci)"]
PIECES += [">=", "<=", ">", "<", "==", "!=", "=", " ", "\n", "%", "é", "\x00", "1e999", "0"]


@settings(max_examples=400)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
@example("1" * 1999 + ">0")
@example("\ud800 > 1")
@example("١٢ > ²")
def test_any_text_is_a_gate_or_is_refused_in_one_line(text: str) -> None:
    drawn = {name: np.full(10, value) for name, value in FIGURES.items() if value is not None}
    try:
        said = judge(parse(text), "x", FIGURES, drawn.get, results({"a.b.c": 1.0})).sentence
    except UsageError as error:
        said = str(error)
    assert said.isprintable()


EXPRESSIONS = st.recursive(
    st.one_of(
        st.floats(0, 1e6).map(repr), st.sampled_from(["a.b.c", "d.e.f", "heldout.loss.base", "my-set_2.rouge-l.run-b"])
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("(-{})".format),
    ),
    max_leaves=12,
)


@given(EXPRESSIONS.filter(lambda text: len(text) < 1900))
def test_an_expression_is_what_python_makes_of_it(text: str) -> None:
    code = text
    for name, value in FIGURES.items():
        code = code.replace(name, f"np.float64({value})") if name.count(".") == 2 else code
    with np.errstate(all="ignore"):
        try:
            expected = float(eval(code, {"np": np}))
        except (ZeroDivisionError, OverflowError):
            expected = math.nan  # of Python's own numbers
    found = sides(f"{text} > 0")[0]
    if math.isfinite(expected):
        assert found == pytest.approx(expected, rel=1e-9)
    else:
        assert not math.isfinite(found)


# --- judging --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "passed", "sentence"),
    [
        (
            "heldout.exact_match.adapter >= 0.7",
            True,
            "heldout.exact_match.adapter is 0.75 … 0.7 or more",
        ),
        (
            "heldout.exact_match.adapter >= 80%",
            False,
            "heldout.exact_match.adapter is 0.75 … 0.8 or more",
        ),
        ("heldout.loss.adapter <= 1.4", False, "heldout.loss.adapter is 1.5 … 1.4 or less"),
        ("heldout.loss.adapter < 1.5", False, "heldout.loss.adapter is 1.5 … less than 1.5"),
        ("heldout.loss.adapter > 1", True, "heldout.loss.adapter is 1.5 … more than 1"),
        ("heldout.loss.adapter == 1.5", True, "heldout.loss.adapter is 1.5 … 1.5"),
        ("heldout.loss.adapter != 1.5", False, "heldout.loss.adapter is 1.5 … another … 1.5"),
        (
            "heldout.loss.adapter < heldout.loss.base",
            True,
            "heldout.loss.adapter is 1.5, heldout.loss.base is 2",
        ),
        (
            "heldout.loss.adapter <= heldout.loss.base * 70%",
            False,
            "heldout.loss.adapter is 1.5, heldout.loss.base is 2 … left … 1.5 … right … 1.4",
        ),
        ("0.5 < a.b.c", True, "a.b.c is 8 … left … 0.5 … right … 8"),
        ("none.loss.base < 3", False, "none.loss.base has no value"),
        ("none.loss.base * 0 == 0", False, "none.loss.base has no value"),
        ("a.b.c < 3 + none.loss.base (ci)", False, "none.loss.base has no value"),
        ("a.b.c / zero.loss.base > 3", False, "… divides by zero … out of range"),
        ("zero.loss.base / zero.loss.base == 0", False, "… divides by zero … out of range"),
        ("1 / 0 > a.b.c", False, "… divides by zero … out of range"),
        ("a.b.c > 1 / (2 - 2)", False, "… divides by zero … out of range"),
        ("1e200 * 1e200 > a.b.c", False, "… divides by zero … out of range"),
        ("1 / zero.loss.base > 0 (ci)", False, "… divides by zero … out of range"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_said_of_a_gate(text: str, passed: bool, sentence: str) -> None:
    gate = judged(text)
    assert gate == Gate(gate=text, where="eval.gates.0", passed=passed, sentence=gate.sentence)
    assert gate.sentence == Like(sentence)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_figure_that_is_not_finite_has_no_value(value: float) -> None:
    gate = judged("a.b.c > 0", figures={"a.b.c": value})
    assert (gate.passed, gate.sentence) == (False, "a.b.c has no value")


def correlated() -> dict[str, Any]:
    """Resamples of two figures that go up and down together: alone they overlap, their difference has one sign."""
    random = np.random.default_rng(0)
    hard = random.normal(0, 1.0, 10_000)
    return {"heldout.loss.base": 2.0 + hard, "heldout.loss.adapter": 1.5 + hard + random.normal(0, 0.1, 10_000)}


def test_an_interval_is_of_the_difference() -> None:
    made = correlated()
    ends = np.percentile(made["heldout.loss.adapter"] - made["heldout.loss.base"], [2.5, 97.5])
    gate = judged("heldout.loss.adapter < heldout.loss.base (ci)", made)
    assert gate.passed
    assert gate.sentence == Like(
        f"heldout.loss.adapter is 1.5, heldout.loss.base is 2 … 95% … [{ends[0]:.4g}, {ends[1]:.4g}] … below 0"
    )
    made["heldout.loss.base"] = np.random.default_rng(1).permutation(made["heldout.loss.base"])
    gate = judged("heldout.loss.adapter < heldout.loss.base (ci)", made)
    assert not gate.passed
    assert gate.sentence == Like("… not … below 0")
    assert judged("heldout.loss.adapter < heldout.loss.base", made).passed


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("heldout.loss.adapter < heldout.loss.base - 0.2 (ci)", True),
        ("heldout.loss.adapter < heldout.loss.base - 0.4 (ci)", False),
        ("heldout.loss.base > heldout.loss.adapter (ci)", True),
        ("heldout.loss.base >= heldout.loss.adapter (ci)", True),
        ("heldout.loss.base <= heldout.loss.adapter (ci)", False),
        ("heldout.loss.base - heldout.loss.adapter >= 25% (ci)", True),
        ("heldout.loss.base - heldout.loss.adapter >= 45% (ci)", False),
        ("heldout.loss.base - heldout.loss.base >= 0 (ci)", True),
        ("heldout.loss.base - heldout.loss.base > 0 (ci)", False),
        ("a.b.c > 7 (ci)", True),  # without resamples, fixed
        ("a.b.c > 9 (ci)", False),
        ("a.b.c > heldout.loss.base (ci)", True),
        ("a.b.c * 0.25 > heldout.loss.base (ci)", False),
    ],
)
def test_which_intervals_pass(text: str, passed: bool) -> None:
    assert judged(text, correlated()).passed is passed


@pytest.mark.filterwarnings("error")
def test_resamples_without_a_value_are_left_out_and_none_is_no_interval() -> None:
    made = np.array([math.nan, math.inf, 1.0, 2.0, 3.0])
    gate = judged("a.b.c > 0 (ci)", {"a.b.c": made})
    assert gate.passed
    assert "[1.05, 2.95]" in gate.sentence
    gate = judged("a.b.c > 0 (ci)", {"a.b.c": np.full(5, 2.0)})
    assert gate.passed
    assert gate.sentence == Like("… [2, 2] … width … above 0")
    gate = judged("a.b.c > 0 (ci)", {"a.b.c": np.full(5, math.nan)})
    assert (gate.passed, gate.sentence) == (False, "has no interval")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["1 / a.b.c {} 1 (ci)", "1 {} 1 / a.b.c (ci)", "1 / a.b.c {} 1 / a.b.c (ci)"])
@pytest.mark.parametrize("comparison", ["<", "<=", ">", ">="])
def test_resamples_that_divide_by_zero_count_against_a_gate(text: str, comparison: str) -> None:
    """The others say yes, or no; that some divide by zero never makes a yes of it."""
    made = np.where(np.arange(1000) < 400, 0.0, 8.0)
    gate = judged(text.format(comparison), {"a.b.c": made})
    assert (gate.passed, gate.sentence) == (
        False,
        Like("… no 95% interval … divides by zero … 0.4"),
    )


@pytest.mark.filterwarnings("error")
def test_few_resamples_that_divide_by_zero_leave_an_interval() -> None:
    """10 of 1000 are less than what an interval leaves out on one side."""
    made = np.where(np.arange(1000) < 10, 0.0, np.linspace(2, 10, 1000))
    for text, passed in (
        ("1 / a.b.c < 0.6 (ci)", True),
        ("1 / a.b.c < 0.2 (ci)", False),
        ("1 / a.b.c > 0.01 (ci)", True),
    ):
        gate = judged(text, {"a.b.c": made})
        assert gate.passed is passed
        assert gate.sentence == Like("… 95% interval … [")
    # the interval's end is that of all resamples, the infinite ones among them
    with np.errstate(divide="ignore"):
        end = np.percentile(1 / made, 97.5)
    assert f"{end:.4g}]" in judged("1 / a.b.c <= 0 (ci)", {"a.b.c": made}).sentence


# --- figures that there are none of ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("heldout.loss.adaptor < 1", "no figure 'heldout.loss.adaptor' … 'heldout.loss.adapter'"),
        ("test.f1.adapter < 1", "no figure 'test.f1.adapter' … set test … heldout, other"),
        ("other.rougue.base < 1", "no figure 'other.rougue.base' … metric rougue … loss, bleu"),
        ("other.loss.x < 1", "no figure 'other.loss.x' … model x … adapter, base"),
        ("other.bleu.adapter < 1", "no figure 'other.bleu.adapter'"),
        ("1 < baseline.heldout.loss.adapter", "baseline.heldout.loss.adapter: … no baseline"),
    ],
)
def test_a_figure_that_there_is_none_of(text: str, said: str) -> None:
    known = ["heldout.loss.adapter", "other.bleu.base"]
    with pytest.raises(UsageError) as caught:
        parse(text).check("eval.gates.3", known, None)
    assert str(caught.value) == Like(f"eval.gates.3: {said}")
    assert str(caught.value).isprintable()
    gate = judge(parse(text), "eval.gates.3", dict.fromkeys(known, 1.0), lambda _: None)
    assert not gate.passed, "what was measured by then is reported all the same"
    assert gate.sentence == Like(said)


def test_figures_of_the_baseline_are_fixed_values() -> None:
    before = results({"heldout.loss.adapter": 1.6, "heldout.exact_match.adapter": None})
    gate = judged("heldout.loss.adapter < baseline.heldout.loss.adapter", baseline=before)
    assert gate.passed
    assert gate.sentence == "heldout.loss.adapter is 1.5, baseline.heldout.loss.adapter is 1.6"
    made = {"heldout.loss.adapter": np.linspace(1.4, 1.62, 1000), "baseline.heldout.loss.adapter": np.full(1000, 9.0)}
    assert not judged("heldout.loss.adapter < baseline.heldout.loss.adapter (ci)", made, before).passed
    assert judged("heldout.loss.adapter < baseline.heldout.loss.adapter + 0.1 (ci)", made, before).passed
    gate = judged("baseline.heldout.exact_match.adapter > 0", baseline=before)
    assert (gate.passed, gate.sentence) == (False, "baseline.heldout.exact_match.adapter has no value")
    gate = judged("a.b.c > baseline.a.b.c", baseline=before)
    assert not gate.passed
    assert gate.sentence == Like("no figure 'baseline.a.b.c' … set a")


# --- an earlier evaluation ------------------------------------------------------------------------


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    made, path = results({"heldout.loss.adapter": (1.5, 1.0, 2.0)}), tmp_path / "results.json"
    path.write_text(made.model_dump_json(), encoding="utf-8")
    assert load_results(path) == made


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "can't be read … No such file"),
        (b"", "can't be read"),
        (b"loss: 3\n", "can't be read"),
        (b"\xff\xfe\x00", "can't be read … utf-8"),
        (b"[" * 100_000, "can't be read"),
        (b"[1, 2]", "… results_version None … 3"),
        (b"{}", "… results_version None … 3"),
        (b'{"results_version": 1}', "… results_version 1 … 3"),
        (b'{"results_version": "2"}', "… results_version '2' … 3"),
        (b'{"results_version": "a\\nb"}', r"… results_version 'a\nb' … 3"),
        (b'{"results_version": 3}', "run: Field required"),
    ],
)
def test_what_is_said_of_what_are_no_results(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_results(path)
    assert str(caught.value) == Like(f"{path}: {said}")
    assert str(caught.value).isprintable()


def test_a_field_that_is_wrong_is_named(tmp_path: Path) -> None:
    made, path = json.loads(results({"heldout.loss.adapter": 1.5}).model_dump_json()), tmp_path / "results.json"
    made["figures"] = {"heldout\n.loss.adapter": {"value": "high", "low": None, "high": None, "rows": 1}}
    path.write_text(json.dumps(made))
    with pytest.raises(UsageError) as caught:
        load_results(path)
    assert str(caught.value).startswith(rf"{path}: figures.heldout\n.loss.adapter.value: ")
    assert str(caught.value).isprintable()
    with pytest.raises(UsageError, match="can't be read"):
        load_results(tmp_path)


# --- regressions ----------------------------------------------------------------------------------


def regressed(now: dict[str, Any], before: dict[str, Any]) -> dict[str, bool]:
    gates = regression_gates(results(now), results(before))
    assert all(gate.where == "--baseline" for gate in gates)
    return {gate.gate.removesuffix(" no worse than before"): gate.passed for gate in gates}


@pytest.mark.parametrize(
    ("name", "now", "before", "passed"),
    [
        ("heldout.loss.adapter", 1.5, 1.5, True),
        ("heldout.loss.adapter", 1.4, 1.5, True),
        ("heldout.loss.adapter", 1.6, 1.5, False),
        ("heldout.exact_match.adapter", 0.5, 0.4, True),
        ("heldout.exact_match.adapter", 0.4, 0.5, False),
        # half widths of 0.3 and 0.4: 0.5 is within noise
        ("heldout.loss.adapter", (2.0, 1.7, 2.3), (1.51, 1.11, 1.91), True),
        ("heldout.loss.adapter", (2.0, 1.7, 2.3), (1.49, 1.09, 1.89), False),
        ("heldout.exact_match.merged", (0.1, -0.2, 0.4), (0.59, 0.19, 0.99), True),
        ("heldout.exact_match.merged", (0.1, -0.2, 0.4), (0.61, 0.21, 1.01), False),
        ("heldout.loss.adapter", (2.0, 1.7, 2.3), 1.75, True),
        ("heldout.loss.adapter", (2.0, None, None), (1.75, 1.45, 2.05), True),
    ],
)
def test_no_worse_than_before(name: str, now: Any, before: Any, passed: bool) -> None:
    assert regressed({name: now}, {name: before}) == {name: passed}


def test_what_was_before_is_said() -> None:
    (gate,) = regression_gates(
        results({"s.loss.adapter": (2.0, 1.7, 2.3)}), results({"s.loss.adapter": (1.5, 1.1, 1.9)})
    )
    assert gate.gate == Like("s.loss.adapter")
    assert gate.sentence == Like("s.loss.adapter … 2 … 1.5 … 0.5 … noise")


def test_only_main_figures_that_both_have_are_compared() -> None:
    now = {
        "heldout.loss.base": 9.0,  # no model of ours
        "heldout.loss.adapter": 1.5,
        "heldout.loss.merged": 1.5,  # new
        "heldout.length.adapter": 9.0,  # neither is better
        "heldout.exact_match.adapter": None,
        "fresh.loss.adapter": 9.0,  # a new set
        "chat.loss.adapter": 9.0,
    }
    before = {
        "heldout.loss.base": 1.0,
        "heldout.loss.adapter": 1.5,
        "heldout.length.adapter": 1.0,
        "heldout.exact_match.adapter": 1.0,
        "chat.loss.adapter": None,  # nothing to compare with
    }
    assert regressed(now, before) == {"heldout.loss.adapter": True, "heldout.exact_match.adapter": False}


def test_a_figure_that_lost_its_value_is_worse_than_before() -> None:
    """A loss that is no number any more, say."""
    (gate,) = regression_gates(results({"s.loss.adapter": None}), results({"s.loss.adapter": 1.5}))
    assert (gate.passed, gate.sentence) == (False, Like("s.loss.adapter … no value … 1.5"))


def test_other_rows_than_before_are_told() -> None:
    now, before = results({"s.loss.adapter": 1.5}), results({"s.loss.adapter": 1.5})
    fewer = now.figures["s.loss.adapter"].model_copy(update={"rows": 3})
    (gate,) = regression_gates(now.model_copy(update={"figures": {"s.loss.adapter": fewer}}), before)
    assert gate.sentence == Like("… rows … 3 … 10")


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"^--baseline: .*none .*figures"):
        check_comparable({"heldout.loss.adapter"}, results({"other.loss.adapter": 1.0, "heldout.loss.base": 1.0}))
    check_comparable({"heldout.loss.adapter"}, results({"heldout.loss.adapter": 1.0}))


@pytest.mark.parametrize(
    ("before", "lost"),
    [
        ({"b.loss.adapter": 1.0}, ["b"]),  # a set
        ({"a.exact_match.adapter": 1.0}, ["a.exact_match.adapter"]),
        ({"a.length.adapter": 1.0}, ["a.length.adapter"]),
        ({"a.loss.merged": 1.0, "a.exact_match.merged": 1.0}, ["a.loss.merged", "a.exact_match.merged"]),
        ({"a.exact_match.adapter": None, "a.exact_match.base": 1.0}, []),  # no value, and no model of ours
    ],
)
def test_what_is_no_longer_measured_fails(before: dict[str, Any], lost: list[str]) -> None:
    now, then = {"a.loss.adapter": 1.5}, {"a.loss.adapter": 1.5}
    assert regressed(now, then | before) == {"a.loss.adapter": True} | dict.fromkeys(lost, False)


def test_the_same_number_of_other_rows_fails() -> None:
    now, before = results({"a.loss.adapter": 1.5}), results({"a.loss.adapter": 1.5})
    others = before.model_copy(update={"sets": {"a": before.sets["a"].model_copy(update={"sha256": "1"})}})
    assert [gate.gate.split()[0] for gate in regression_gates(now, others) if not gate.passed] == ["a"]
    assert all(gate.passed for gate in regression_gates(now, before))
    nothing = before.model_copy(update={"sets": {}})
    assert [gate.gate.split()[0] for gate in regression_gates(now, nothing) if not gate.passed] == ["a"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "true", '"1.0"'])
@pytest.mark.parametrize("end", ["value", "low", "high"])
def test_a_baseline_is_of_finite_numbers(value: str, end: str, tmp_path: Path) -> None:
    made, path = json.loads(results({"a.loss.adapter": (1.5, 1.0, 2.0)}).model_dump_json()), tmp_path / "results.json"
    made["figures"]["a.loss.adapter"][end] = 12345
    path.write_text(json.dumps(made).replace("12345", value))
    with pytest.raises(UsageError) as caught:
        load_results(path)
    assert f"figures.a.loss.adapter.{end}" in str(caught.value)


@pytest.mark.parametrize("gate", ["1 < 2", "0 == 0", "-1 < 2 * 3", "1 < 2 (ci)", "(1) <= 50%", "1e-3 > 1e-4"])
def test_a_gate_names_a_figure(gate: str) -> None:
    with pytest.raises(UsageError, match="names no figure"):
        parse(gate)


def test_a_demand_keeps_its_text() -> None:
    text = " a.b.c>3  (ci) "
    demand = parse(text)
    assert isinstance(demand, Demand)
    assert demand.text == text
    assert judged(text, {"a.b.c": np.full(3, 8.0)}).gate == text
