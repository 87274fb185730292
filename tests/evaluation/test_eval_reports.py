"""The terminal, report.md and junit.xml say what was found, at any width and of any text."""

from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report_html import example_results, example_samples
from wording import Like

import lorafit.engine.evaluate
from lorafit.evaluation.report.text import as_junit, as_markdown, print_results, verdict
from lorafit.evaluation.results import Gate, Results

TEXTS = Path(lorafit.engine.evaluate.__file__).parent / "texts"
HOSTILE = "a|b <script>x</script> [bold red]c[/] `d` \x1b[31m\x00 \u202e\n# e"


def printed(results: Results, width: int = 200, samples: Any = ()) -> str:
    out = io.StringIO()
    print_results(results, list(samples), Console(file=out, width=width, force_terminal=True, color_system=None))
    return out.getvalue()


@pytest.fixture(scope="module")
def results() -> Results:
    return example_results()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_has_the_figures_at_any_width(results: Results, width: int) -> None:
    text = printed(results, width)
    for name, info in results.sets.items():
        assert f"{name}" in text
        assert f"{info.rows} rows" in text
    figure = results.figures["heldout.exact_match.adapter"].value
    assert figure is not None
    assert f"{100 * figure:.1f}%" in text
    for gate in results.gates:
        assert gate.gate in " ".join(text.split())
        assert gate.sentence in " ".join(text.split())  # folded between words
    assert text.count("FAILED") == len(results.failed)


def test_a_sample_stands_beside_what_was_expected(results: Results) -> None:
    sample = example_samples()[0]
    text = printed(results, samples=[sample])
    assert sample.prompt.splitlines()[0] in text
    for name, answer in sample.answers.items():
        mark = "=" if answer.text == sample.expected else "≠"
        assert re.search(rf"{name}\s+{mark}", text)


def test_the_verdict_says_noise_where_it_is(results: Results) -> None:
    (first, *others) = (one for one in results.differences if (one.set, one.metric) == ("heldout", "exact_match"))
    clear = first.model_copy(update={"value": 0.3, "low": 0.1, "high": 0.5})
    unclear = first.model_copy(update={"value": 0.1, "low": -0.1, "high": 0.3})
    said = [verdict(results.model_copy(update={"differences": (one, *others)})) for one in (clear, unclear)]
    assert "+30.0 points" in said[0]
    assert "more than noise" in said[0]
    assert "within noise" in said[1]
    assert f"{len(results.failed)} of {len(results.gates)} gates failed" in said[0]
    few = clear.model_copy(update={"wins": 5, "losses": 0})
    alone = few.model_copy(update={"low": None, "high": None})
    for one in (few, alone):
        said = verdict(results.model_copy(update={"differences": (one, *others)}))
        assert "too few rows" in said
        assert ("95% interval" in said) == (one.low is not None)


def test_markdown_tables_are_whole(results: Results) -> None:
    text = as_markdown(results)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) > len(results.sets)
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1, table
    for gate in results.gates:
        assert ("**failed**" if not gate.passed else "passed") in text
    assert text.count("<details>") == text.count("</details>") == 1
    assert len(text.encode()) < 60_000


def test_junit_counts_and_names_failures(results: Results) -> None:
    root = ElementTree.fromstring(as_junit(results).encode())
    suite = root[0]
    assert suite.get("tests") == str(len(suite.findall("testcase"))) == str(len(results.gates))
    assert suite.get("failures") == str(len(suite.findall("testcase/failure"))) == str(len(results.failed))
    properties = {one.get("name"): one.get("value") for one in suite.findall("properties/property")}
    assert set(properties) == set(results.figures)
    message = suite.find("testcase/failure")
    assert message is not None
    assert message.get("message") == results.failed[0].sentence


def test_hostile_text_is_text(results: Results) -> None:
    gate = Gate(gate=HOSTILE, where="--fail-under", passed=False, sentence=HOSTILE)
    changed = results.model_copy(update={"name": HOSTILE, "gates": (gate,), "remarks": (HOSTILE,)})
    sample = example_samples()[0].model_copy(update={"prompt": HOSTILE, "expected": HOSTILE})
    shown = printed(changed, samples=[sample])
    assert "\x1b" not in shown
    assert "\x00" not in shown
    assert "[bold red]c[/]" in shown
    text = as_markdown(changed)
    assert "<script>" not in text
    assert "\n# e" not in text
    assert r"a\|b" in text
    root = ElementTree.fromstring(as_junit(changed).encode())
    failure = root.find(".//failure")
    assert failure is not None
    assert "<script>" in (failure.text or "")


def test_what_has_no_value_is_a_dash(results: Results) -> None:
    figures = {
        name: one.model_copy(update={"value": None, "low": None, "high": None}) for name, one in results.figures.items()
    }
    nothing = results.model_copy(update={"figures": figures, "differences": (), "gates": ()})
    assert "nan" not in printed(nothing).lower()
    assert "None" not in as_markdown(nothing).split("<details>")[0]
    assert verdict(nothing) == "nothing to compare"


@pytest.mark.parametrize("width", [60, 80, 200])
def test_differences_stay_whole_in_a_narrow_terminal(results: Results, width: int) -> None:
    """Columns are left out before a figure would be folded or cut."""
    lines = printed(results, width).splitlines()
    assert any("exact match" in line and "+95.0 points" in line and "better" in line for line in lines)
    assert any("exact match" in line and "−1.7 points" in line and "within noise" in line for line in lines)
    assert any("bits per byte" in line and "0.0000" in line and "within noise" in line for line in lines)
    titled = [line for line in lines if "merged − adapter" in line]
    assert titled
    assert all(("95% interval" in line) is (width > 60) for line in titled)
    assert all(("detectable" in line) is (width == 200) for line in titled)


def test_models_that_do_not_fit_beside_each_other_stand_below_each_other(results: Results) -> None:
    names = {model: f"another-long-name-of-a-model-{model}" for model in results.models}
    renamed = results.model_copy(
        update={
            "models": {names[model]: info for model, info in results.models.items()},
            "figures": {
                f"{name.rpartition('.')[0]}.{names[name.rpartition('.')[2]]}": figure
                for name, figure in results.figures.items()
            },
            "differences": (),
        }
    )
    lines = printed(renamed, 80).splitlines()
    for model, value in (("base", "0.0%"), ("adapter", "95.0%"), ("merged", "93.3%")):
        assert any(f"exact match, {names[model]}" in line and value in line for line in lines)


def test_markdown_fits_in_a_comment(results: Results) -> None:
    """However many sets there are, and the table that is cut is still one."""
    many = {f"set{number}": results.sets["heldout"] for number in range(300)}
    figures = {
        f"{name}.loss.{model}": results.figures[f"heldout.loss.{model}"] for name in many for model in results.models
    }
    settings = {"eval": {"note": "&" * 100_000}}
    text = as_markdown(results.model_copy(update={"sets": many, "figures": figures, "settings": settings}))
    assert len(text.encode()) < 60_000
    assert text == Like("… rest … results.json")
    assert text.rstrip().endswith("```\n\n</details>")
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("name", ["general", "chat"])
def test_the_texts_that_come_with_lorafit(name: str) -> None:
    lines = (TEXTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 30
    rows = [json.loads(line) for line in lines]
    assert [json.dumps(row, ensure_ascii=False) for row in rows] == lines
    texts = [row["text"] if name == "general" else row["messages"][0]["content"] for row in rows]
    assert len(set(texts)) == len(texts)
    for row in rows:
        if name == "general":
            assert set(row) == {"text"}
            words = len(row["text"].split())
            assert 60 <= words <= 130 or (words == 1 and 150 <= len(row["text"]) <= 400), row["text"]
        else:
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
            assert 5 <= len(row["messages"][1]["content"].split()) <= 90, row["messages"]
