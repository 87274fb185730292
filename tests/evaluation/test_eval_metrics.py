"""Metrics of answers give what a user would count by hand, and refuse what can't be measured."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit import bounds
from lorafit.errors import UsageError
from lorafit.evaluation.answers import Judged
from lorafit.evaluation.metrics import METRICS, MetricSpec, default_metrics, make_metric, make_metrics

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

# Computed once with rouge_score 0.1.2, RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False), F-measures.
ROUGE = [
    ("the cat sat on the mat", "the cat sat on the mat", 1.000000, 1.000000, 1.000000),
    ("the cat lay on the mat", "the cat sat on the mat", 0.833333, 0.600000, 0.833333),
    ("on the mat sat the cat", "the cat sat on the mat", 1.000000, 0.600000, 0.500000),
    ("The CAT, the cat; the-cat!", "a cat the size of the mat", 0.461538, 0.181818, 0.461538),
    ("police killed the gunman", "police kill the gunman", 0.750000, 0.333333, 0.750000),
    ("the gunman kill police", "police kill the gunman", 1.000000, 0.333333, 0.500000),
    ("version 3.5 of x_y isn't out", "Version 3 5 of X Y is not out", 0.777778, 0.625000, 0.777778),
    ("naïve Straße résumé", "naive strasse resume", 0.000000, 0.000000, 0.000000),
    ("a b c d e f g a b c d e f g", "g f e d c b a a b c d e f g", 1.000000, 0.461538, 0.571429),
    ("", "the cat", 0.000000, 0.000000, 0.000000),
    ("— 北京 ...", "the cat", 0.000000, 0.000000, 0.000000),
    ("one", "one two three four five six seven eight", 0.222222, 0.000000, 0.222222),
]
SHARES = [name for name, known in METRICS.items() if known.plain and known.info.unit == "share"]
OVERLAPS = ["exact_match", "exact_match_normalized", "token_f1", "rouge_1", "rouge_2", "rouge_l", "chrf", "bleu"]


def score(spec: MetricSpec, answer: str, expected: str = "") -> float | None:
    return make_metric(spec).score(Judged(answer, expected))


SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "results.schema.json"


@pytest.fixture
def schema(tmp_path: Path) -> Any:
    def write(content: Any) -> dict[str, str]:
        path = tmp_path / "schema.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return {"json_schema": str(path)}

    return write


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module of the user's into the working directory; gives its name."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(code: str, name: str = "my_own_metrics") -> str:
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("my_own"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "answer", "expected", "value"),
    [
        ("exact_match", " Paris\n", "Paris", 1),
        ("exact_match", "paris", "Paris", 0),
        ("exact_match", "Paris.", "Paris", 0),
        ("exact_match", "", "", 1),
        ("exact_match_normalized", "The  Eiffel Tower!", "eiffel tower", 1),
        ("exact_match_normalized", "theatre", "atre", 0),
        ("exact_match_normalized", "STRASSE", "Straße", 1),
        ("exact_match_normalized", "ｆｕｌｌ　ｗｉｄｔｈ", "full width", 1),
        ("exact_match_normalized", "cafe\u0301", "café", 1),
        ("exact_match_normalized", "«Да», — ответил", "да ответил", 1),
        ("exact_match_normalized", "$5", "5", 1),
        ("exact_match_normalized", "1.5", "15", 1),
        ("exact_match_normalized", "the", "", 1),
        ("token_f1", "the cat sat", "a cat sat down", 0.8),
        ("token_f1", "cat cat", "cat", 2 / 3),
        ("token_f1", "sat cat", "cat sat", 1),
        ("token_f1", "dog", "cat", 0),
        ("token_f1", "", "cat", 0),
        ("token_f1", "", "the", 1),
        ("contains", "I think it is Paris, France.", "paris france", 1),
        ("contains", "Rome", "Paris", 0),
        ("contains", "I know", "no", 1),
        ("contains", "anything", " The ", None),
        ("json_valid", '{"a": [1, null]}', "", 1),
        ("json_valid", " [] \n", "", 1),
        ("json_valid", '"text"', "", 0),
        ("json_valid", "12", "", 0),
        ("json_valid", "", "", 0),
        ("json_valid", '{"a": NaN}', "", 0),
        ("json_valid", "[-Infinity]", "", 0),
        ("json_valid", '{"a": 1, "a": 1}', "", 0),
        ("json_valid", "[1,]", "", 0),
        ("json_valid", '```json\n{"a": 1}\n```', "", 0),
        ("json_valid", "[" * 100_000, "", 0),
        ("json_match", '{"b": [1, {"x": "é"}], "a": 2}', '{"a":2,"b":[1.0,{"x":"\\u00e9"}]}', 1),
        ("json_match", "[1, 2]", "[2, 1]", 0),
        ("json_match", '{"a": 1}', '{"a": 1, "b": null}', 0),
        ("json_match", '{"a": true}', '{"a": 1}', 0),
        ("json_match", "[0]", "[false]", 0),
        ("json_match", '["1"]', "[1]", 0),
        ("json_match", "no JSON", "[1]", 0),
        ("json_match", "12", "12.0", 1),
        ("json_match", "[1]", "no JSON", None),
        ("words", "one  two\nthree", "", 3),
        ("words", "", "", 0),
        ("repetition", "a b c d", "", 0),
        ("repetition", "a b c d a b c d", "", 0.2),
        ("repetition", "no no no no no no", "", 2 / 3),
        ("repetition", "no no no", "", 0),
        ("repetition", "", "", 0),
        ("rouge_1", "anything", "北京", None),
        ("rouge_2", "one", "one", None),
        ("rouge_l", "anything", "", None),
        ("chrf", "anything", " ", None),
        ("bleu", "anything", "", None),
        ("bleu", "", "the cat", 0),
        ("chrf", "", "the cat", 0),
    ],
)
def test_score(name: str, answer: str, expected: str, value: float | None) -> None:
    found = score(name, answer, expected)
    assert found == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(("answer", "expected", "one", "two", "longest"), ROUGE)
def test_rouge_is_that_of_rouge_score(answer: str, expected: str, one: float, two: float, longest: float) -> None:
    assert score("rouge_1", answer, expected) == pytest.approx(one, abs=1e-6)
    assert score("rouge_l", answer, expected) == pytest.approx(longest, abs=1e-6)
    assert score("rouge_2", answer, expected) == pytest.approx(two, abs=1e-6)


def test_rouge_of_long_answers() -> None:
    """Computed with rouge_score, as ROUGE."""
    one = " ".join(str(i * i % 97) for i in range(1000))
    two = " ".join(str(i**3 % 89) for i in range(800))
    found = [score(name, one, two) for name in ("rouge_1", "rouge_2", "rouge_l")]
    assert found == pytest.approx([0.428888888889, 0.010011123471, 0.168888888889])


def test_chrf_and_bleu_are_shares_of_sacrebleu() -> None:
    """Computed once with sacrebleu 2.6.0: sentence_chrf 61.0887 and sentence_bleu 37.9918."""
    pair = "the cat lay on the mat", "the cat sat on the mat"
    assert score("chrf", *pair) == pytest.approx(0.610887, abs=1e-6)
    assert score("bleu", *pair) == pytest.approx(0.379918, abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "answer", "value"),
    [
        ({"contains": "Paris"}, "It is Paris.", 1),
        ({"contains": "Paris"}, "It is paris.", 0),
        ({"regex": r"^\d+$"}, "42", 1),
        ({"regex": r"^\d+$"}, "42 apples", 0),
        ({"regex": "(?i)ÄPFEL"}, "viele äpfel", 1),
    ],
)
def test_score_with_argument(spec: MetricSpec, answer: str, value: float) -> None:
    assert score(spec, answer, "something else") == value


GSM8K = r"#### (-?[0-9.,]+)"


@pytest.mark.parametrize(
    ("pattern", "answer", "expected", "value"),
    [
        (GSM8K, "so\n#### 42", "thus\n#### 42.0", 1),
        (GSM8K, "#### 1,042.", "#### 1042", 1),
        (GSM8K, "#### 7, no: #### 42", "#### 42", 1),  # the last one counts
        (GSM8K, "#### 42, no: #### 7", "#### 42", 0),
        (GSM8K, "it is 42", "#### 42", 0),
        (GSM8K, "#### 42", "it is 42", None),
        (GSM8K, "#### 1,5", "#### 15", 0),  # no comma between thousands
        (GSM8K, "#### 1,5", "#### 1,5", 1),
        (r"\d+", "5 and 042", "42", 1),  # no group: all of it
        ("answer: (yes|no)", "answer: yes", "answer: no", 0),
        ("answer: (.*)", "answer: \N{MINUS SIGN}0.50", "answer: -.5 ", 1),
        (r"(\d+)", "12345678901234567890", "12345678901234567891", 0),
        ("(.*)e", "1e99999999999999999999e", "1e99999999999999999999e", 1),
    ],
)
def test_what_is_extracted_is_compared(pattern: str, answer: str, expected: str, value: float | None) -> None:
    assert score({"extract": pattern}, answer, expected) == value


@settings(deadline=None)
@given(answer=st.text(), expected=st.text())
def test_shares_are_shares(answer: str, expected: str) -> None:
    for name in SHARES:
        value = score(name, answer, expected)
        assert value is None or 0 <= value <= 1, name


@settings(deadline=None)
@given(words=st.lists(st.text("abcxyzé北9", min_size=1), min_size=1))
def test_a_text_against_itself_is_1(words: list[str]) -> None:
    text = " ".join(words)
    for name in OVERLAPS:
        found = score(name, text, text)
        assert found == pytest.approx(1) or (found is None and name.startswith("rouge")), name


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    )
)
def test_json_matches_however_it_is_written(value: Any) -> None:
    assert score("json_match", json.dumps(value, indent=3), json.dumps(value, sort_keys=True, ensure_ascii=False)) == 1
    assert score("json_valid", json.dumps(value)) == isinstance(value, dict | list)


def test_json_schema(schema: Any) -> None:
    spec = schema(CITY)
    answers = ['{"city": "Rome"}', '{"city": 5}', "{}", "Rome", '{"city": "a", "city": "b"}', "[" * 100_000]
    assert [score(spec, answer) for answer in answers] == [1, 0, 0, 0, 0, 0]


def test_json_schema_has_the_draft_that_it_names(schema: Any) -> None:
    """A list under `items` is of the first elements up to draft 2019-09; later ones call it prefixItems."""
    assert score(schema({"$schema": DRAFT_7, "items": [{"type": "string"}]}), '["a", 1]') == 1
    with pytest.raises(UsageError, match=r"JSON Schema.* \$\.items"):
        make_metric(schema({"items": [{"type": "string"}]}))


def test_json_schema_follows_references_in_its_file(schema: Any) -> None:
    spec = schema({"$ref": "#/$defs/city", "$defs": {"city": CITY}})
    assert [score(spec, answer) for answer in ('{"city": "Rome"}', "{}")] == [1, 0]


@pytest.mark.parametrize(
    "where",
    [
        lambda reference: {"$ref": reference},
        lambda reference: {"$schema": DRAFT_7, "properties": {"a": {"items": {"$ref": reference}}}},
        lambda reference: {"$dynamicRef": reference},
        lambda reference: {"unknown": {"$ref": reference}, "$ref": "#/unknown"},
    ],
)
def test_json_schema_fetches_nothing(where: Any, schema: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: connected.append(address))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(CITY), encoding="utf-8")
    for reference in ("http://127.0.0.1:9/schema.json", other.as_uri(), "other.json"):
        with pytest.raises(UsageError, match=r"(other|9/schema)\.json .*\bfile\b"):
            make_metric(schema(where(reference)))
    assert not connected


def test_json_schema_reference_seen_only_by_some_answers(schema: Any) -> None:
    """A reference in a place that no draft knows is found when an answer leads there."""
    metric = make_metric(
        schema({"unknown": {"$ref": "http://127.0.0.1:9/x"}, "properties": {"a": {"$ref": "#/unknown"}}})
    )
    assert metric.score(Judged("{}", "")) == 1
    with pytest.raises(UsageError, match=r"9/x .*\bfile\b"):
        metric.score(Judged('{"a": 1}', ""))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "schema.json .*not JSON"),
        ("5", "schema.json .*JSON Schema"),
        ({"type": "objekt"}, r"JSON Schema.* \$\.type: 'objekt'"),
        ({"pattern": "("}, r"JSON Schema.* \$\.pattern"),
        ({"$schema": "http://example.com/own"}, "draft .*http://example.com/own"),
        ({"$schema": 5}, "draft .*: 5"),
        ({"$ref": "#/$defs/nothing"}, "nothing .*file"),
        ({"$ref": "#"}, "leads to itself"),
    ],
)
def test_wrong_json_schema(content: Any, message: str, schema: Any) -> None:
    with pytest.raises(UsageError, match=message):
        make_metric(schema(content))


def test_missing_json_schema(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json .*No such file"):
        make_metric({"json_schema": str(tmp_path / "none.json")})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_macth", "no metric 'exact_macth'.* exact_match.*rouge_1"),
        ("zzzz", "no metric 'zzzz'.*exact_match.*module:function"),
        ({"zzzz": "x"}, "no metric 'zzzz'"),
        ("regex", "regex .*argument.*`regex: PATTERN`"),
        ("json_schema", "json_schema .*argument.*`json_schema: PATH`"),
        ({"regex": "(a"}, r"'\(a' .*regular expression.*position 0"),
        ({"extract": "(a"}, r"'\(a' .*regular expression.*position 0"),
        ({"extract": "(a)(b)"}, "2 groups"),
        ("extract", "extract .*argument.*`extract: PATTERN`"),
        ({"contains": ""}, "contains: .*argument .*empty"),
        ({"exact_match": "x"}, "exact_match .*argument.*`exact_match`"),
        ({"regex": "a", "contains": "b"}, "`name: argument`.* {'regex': 'a', 'contains': 'b'}"),
        ({}, "`name: argument`.* {}"),
        ("regex:^a", "argument .*quotes.*`regex: \\^a`"),
        ({"my_own:f": "x"}, "your own .*argument"),
        ("my own:f", "named module:function"),
        (".my_own:f", "named module:function"),
        ("my_own:größe", "named module:function"),
        ("my_own:exact_match", "figure exact_match already"),
        ("my_own:length", "figure length already"),
        ("my_own_missing:f", "my_own_missing .*import.*ModuleNotFoundError"),
        ("json:nothing", "json .*function nothing"),
        ("json:dumps", r"\(answer, expected\) .*\(answer, expected, row\)"),
    ],
)
def test_refused(spec: MetricSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        make_metric(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "module", "package"),
    [
        ("bleu", "sacrebleu.metrics", "sacrebleu"),
        ("chrf", "sacrebleu.metrics", "sacrebleu"),
        ({"json_schema": str(SCHEMA)}, "jsonschema.validators", "jsonschema"),
    ],
)
def test_missing_package(spec: MetricSpec, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"package {package}.*pip install 'lorafit\[eval\]'"):
        make_metric(spec)


def test_two_of_one_name() -> None:
    assert [metric.info.name for metric in make_metrics(["words", {"regex": "a"}])] == ["words", "regex"]
    with pytest.raises(UsageError, match=r"two metrics .*regex"):
        make_metrics([{"regex": "a"}, {"regex": "b"}])


def test_own_metrics(own: Any) -> None:
    module = own(
        "def shorter(answer, expected):\n    return len(answer) < len(expected)\n"
        "def of_topic(answer, expected, row):\n    return row['topic'] in answer\n"
        "def sometimes(answer, expected):\n    return len(answer) / 2 if answer else None\n"
    )
    path = list(sys.path)
    shorter, of_topic, sometimes = make_metrics([f"{module}:{name}" for name in ("shorter", "of_topic", "sometimes")])
    assert sys.path == path
    assert (of_topic.info.name, of_topic.info.label) == ("of_topic", "of topic")
    assert [shorter.score(Judged("a", expected)) for expected in ("ab", "a")] == [1, 0]
    assert of_topic.score(Judged("all about cats", "", row={"topic": "cats"})) == 1
    assert [sometimes.score(Judged(answer, "")) for answer in ("abc", "")] == [1.5, None]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('x')", "failed .*'How are you\\? aaaa.*…'.*KeyError: 'x'"),
        ("return '1'", "returned '1' .*finite.*None"),
        ("return [1]", r"returned \[1\] .*row"),
        ("return 1j", "returned 1j .*row"),
        ("return float('nan')", "returned nan .*row"),
        ("return float('inf')", "returned inf .*row"),
        ("return 10**400", "returned 1000.* .*row"),
    ],
)
def test_own_metric_that_fails(body: str, message: str, own: Any) -> None:
    metric = make_metric(own(f"def f(answer, expected):\n    {body}\n") + ":f")
    with pytest.raises(UsageError, match=f"metric my_own_metrics:f {message}") as raised:
        metric.score(Judged("answer", "", prompt="How are\nyou? " + "a" * 500))
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "import.*SyntaxError"),
        (
            "import nothing_of_this_name",
            "import.*ModuleNotFoundError.*'nothing_of_this_name'",
        ),
        ("1 / 0", "import.*ZeroDivisionError"),
        ("f = 5", "function f"),
        ("def f(answer): return 1", "take .*answer, expected"),
        ("def f(a, b, c, d): return 1", "take .*answer, expected"),
    ],
)
def test_own_metric_that_can_not_be_had(code: str, message: str, own: Any) -> None:
    path = list(sys.path)
    with pytest.raises(UsageError, match=rf"metric my_own_metrics:f: .*{message}"):
        make_metric(own(code) + ":f")
    assert sys.path == path


@pytest.mark.parametrize(
    ("expected", "has_json"),
    [
        (["{}", ' ["a"] '], True),
        (["{}", "yes"], False),
        (["1", "2"], False),
        ([], False),
    ],
)
def test_defaults(expected: list[str], has_json: bool) -> None:
    names = [metric.info.name for metric in make_metrics(default_metrics(iter(expected)))]
    always = {"exact_match", "exact_match_normalized", "token_f1", "repetition"}
    assert set(names) == always | ({"json_match", "json_valid"} if has_json else set())


def test_table() -> None:
    assert all(name == known.info.name for name, known in METRICS.items())
    for name, known in METRICS.items():
        assert known.about.endswith("."), name
        assert known.argument if known.bind else known.plain, name
    assert {name for name, known in METRICS.items() if known.info.better != "higher"} == {"words", "repetition"}


def test_no_metric_has_the_name_of_another_figure() -> None:
    from lorafit.evaluation.figures import OWN

    for metric in OWN:
        assert metric.name not in METRICS
        with pytest.raises(UsageError, match=f"figure {metric.name} already"):
            make_metric(f"my_own:{metric.name}")


def test_an_expression_that_takes_too_long_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "LONGEST", 0.2)
    metric = make_metric({"regex": "(a+)+$"})
    assert metric.score(Judged(answer="aaa", expected="")) == 1
    with pytest.raises(UsageError, match=r"'\(a\+\)\+\$'.* 0.2 seconds"):
        metric.score(Judged(answer="a" * 60 + "b", expected=""))
    assert metric.score(Judged(answer="b", expected="")) == 0
    with pytest.raises(UsageError, match=r"extract.* 0.2 seconds"):
        make_metric({"extract": "(a+)+$"}).score(Judged(answer="a", expected="a" * 60 + "b"))


def test_own_metric_is_called_once_for_an_answer_to_a_row(own: Any) -> None:
    """Figures and samples ask for it, each by themselves."""
    module = own(
        "calls = []\ndef nth(answer, expected):\n    calls.append(answer)\n    return len(calls)\n", "my_own_nth"
    )
    metric = make_metric(f"{module}:nth")
    judged = [Judged(answer="a", expected="b", row={"number": number}) for number in (1, 2)]
    assert [metric.score(one) for one in (*judged, *judged)] == [1, 2, 1, 2]
