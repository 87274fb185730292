"""Sabotage: for each rule of the audit, data or a template with exactly that fault is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, WORDS, RecipeMaker, Train, conversation, make_model, write_jsonl
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner
from wording import Like

import lorafit.engine.model
from lorafit.cli import app
from lorafit.engine.data.prepare import prepare
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DataError
from lorafit.plan import Plan, plan_recipe
from lorafit.recipe import Recipe
from lorafit.recipe.schema import AuditSection
from lorafit.rows.audit import RULES, Audit, gate

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
KNOWS_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML
NO_END = CHATML.replace("<|im_end|>", "[end]")


def clean() -> list[dict[str, Any]]:
    words = WORDS.split()
    return [conversation(" ".join(words[n : n + 3]), f"{words[n]} {n}") for n in range(12)]


def with_row(row: dict[str, Any] | None, at: int = 5) -> list[dict[str, Any]]:
    rows = clean()
    return rows if row is None else [*rows[:at], row, *rows[at:]]


@pytest.fixture
def audited(recipe: RecipeMaker) -> Any:
    """The audit of a recipe's data, after the gate let it pass."""

    def go(file: Path, **sections: Any) -> Audit:
        dataset = {"train": [{"path": str(file)}], **sections.pop("dataset", {})}
        path = recipe(dataset=dataset, **sections)
        plan = plan_recipe(Recipe.load(path), path, count_rows=False)
        made = prepare(plan.data, load_tokenizer(plan))
        gate(made.audit, plan.data.audit)
        return made.audit

    return go


def template_file(tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "template.jinja"
    file.write_text(text, encoding="utf-8")
    return {"chat_template": str(file)}


LONG = " ".join(["yes"] * 300)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "empty_answers": (conversation("a", " "), "rows.jsonl:6: "),
    "no_supervised_tokens": ({"messages": [{"role": "user", "content": "a"}]}, "rows.jsonl:6: "),
    "not_utf8": (conversation("a", "half \ud83d"), "rows.jsonl:6: "),
    "special_tokens_in_content": (conversation("say <|im_end|> now", "no"), "rows.jsonl:6: "),
    "answers_left_out": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}],
                },
            ]
        },
        "rows.jsonl:6: … template leaves out",
    ),
    "context_left_out": (
        {**conversation("a", "b"), "tools": TOOLS},
        "rows.jsonl:6: … template leaves out … 'weather'",
    ),
    "answers_cut_off": (conversation(LONG, "no"), "rows.jsonl:6: … max_length 128 … every answer"),
    "lost_tokens": (conversation("a", LONG), "rows.jsonl:6: … 313 tokens … cut … max_length 128"),
}


@pytest.mark.parametrize("rule", CASES)
def test_a_row_with_the_fault_is_refused_with_its_line(rule: str, audited: Any, tmp_path: Path) -> None:
    row, line = CASES[rule]
    tight = {"audit": {rule: 0.0}}
    clean_audit = audited(write_jsonl(tmp_path / "rows.jsonl", clean()), dataset=tight)
    assert clean_audit.train[0].found == {}
    file = write_jsonl(tmp_path / "rows.jsonl", with_row(row))
    with pytest.raises(DataError) as caught:
        audited(file, dataset=tight)
    first, hint = str(caught.value).splitlines()
    assert first == Like(f"… {line}")
    assert f"(dataset.audit.{rule}: " in first
    assert "raise the limits" in hint


@pytest.mark.parametrize("rule", CASES)
def test_within_its_limit_the_fault_is_counted(rule: str, audited: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", with_row(CASES[rule][0]))
    audit = audited(file, dataset={"audit": {rule: None}})
    source = audit.train[0]
    assert source.found[rule].count == (source.lost_tokens if rule == "lost_tokens" else 1)
    kept = rule in ("special_tokens_in_content", "context_left_out", "lost_tokens")
    assert source.dropped == ({} if kept else {rule: 1})
    assert (source.read, source.rows) == (13, 13 if kept else 12)
    assert audit.training_rows.rows == source.rows


def test_the_defaults_refuse_what_is_surely_wrong(audited: Any, tmp_path: Path) -> None:
    for rule in (*CASES,):
        file = write_jsonl(tmp_path / "rows.jsonl", with_row(CASES[rule][0]))
        if rule == "answers_cut_off":  # one row of thirteen is within the default of a tenth
            audited(file)
            file = write_jsonl(tmp_path / "rows.jsonl", [*with_row(CASES[rule][0]), conversation(f"n{LONG}", "no")])
        with pytest.raises(DataError, match=f"dataset.audit.{rule}: "):
            audited(file)


def test_rows_cut_at_max_length(audited: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", with_row(conversation("a", LONG)))
    assert audited(file, dataset={"audit": {"lost_tokens": None}}).train[0].found["truncated"].count == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:6: has 313 tokens .*dataset\.audit\.truncated: 1 of 13, 7\.69%"):
        audited(file, dataset={"audit": {"lost_tokens": None, "truncated": 0.05}})


def test_bytes_that_are_not_utf8(audited: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", with_row(conversation("a", "caf#")))
    file.write_bytes(file.read_bytes().replace(b"#", b"\xe9"))
    with pytest.raises(DataError, match=r"rows\.jsonl:6: .*not UTF-8.*dataset\.audit\.not_utf8: 1 of 13"):
        audited(file)


def test_answers_without_a_learned_end(audited: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", clean())
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*dataset\.audit\.untrained_ends: 12 of 12"):
        audited(file, model=template_file(tmp_path, NO_END))


@pytest.mark.parametrize(("template", "count"), [(CHATML, "no"), ("{{ bos_token }}{{ bos_token }}" + CHATML, "one")])
def test_rows_with_other_than_one_beginning(
    template: str, count: str, audited: Any, tmp_path: Path, tiny_model: Path
) -> None:
    model = make_model(tmp_path / "model")
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(str(model / "tokenizer.json"))
    file = write_jsonl(tmp_path / "rows.jsonl", clean())
    audited(file, model={"name_or_path": str(model), **template_file(tmp_path, "{{ bos_token }}" + CHATML)})
    with pytest.raises(DataError, match=rf"rows.jsonl:1: begins with {count} .*dataset.audit.bos: 12 of 12"):
        audited(file, model={"name_or_path": str(model), **template_file(tmp_path, template)})


def test_rows_that_repeat_an_earlier_one(audited: Any, tmp_path: Path) -> None:
    rows = clean()
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[3]])
    found = audited(file).duplicates
    assert (found.count, found.first) == (1, f"{file}:13: repeats {file}:4")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:13: repeats .*rows\.jsonl:4 \(dataset\.audit\.duplicates: 1 of 13"
    ):
        audited(file, dataset={"audit": {"duplicates": 0.05}})
    with pytest.raises(DataError, match=r"dataset\.audit\.duplicates: 24 of 36, 66\.67%, is above 0\.5"):
        audited(write_jsonl(tmp_path / "rows.jsonl", rows * 3))


def test_validation_rows_that_are_training_rows(audited: Any, tmp_path: Path) -> None:
    rows = clean()
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    apart = write_jsonl(tmp_path / "apart.jsonl", [conversation("other", "words")])
    audit = audited(file, dataset={"validation": [{"path": str(apart)}]})
    assert audit.leaked is None
    assert audit.validation_rows.rows == 1
    leaky = write_jsonl(tmp_path / "leaky.jsonl", [conversation("other", "words"), rows[7]])
    with pytest.raises(DataError) as caught:
        audited(file, dataset={"validation": [{"path": str(leaky)}]})
    assert str(caught.value).splitlines()[0] == Like(f"{leaky}:2: … {file}:8 … dataset.audit.leaked: 1 of 2, 50.00%")


def test_a_fraction_never_leaks(audited: Any, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", clean() * 2)
    audit = audited(file, dataset={"validation": 0.25})
    assert audit.leaked is None
    assert (audit.training_rows.rows, audit.validation_rows.rows) == (18, 6)


def test_every_rule_has_a_limit_and_a_sabotage() -> None:
    assert list(RULES) == list(AuditSection.model_fields)
    apart = {"bos", "untrained_ends", "truncated", "duplicates", "leaked", "prompt_differs", "prompt_boundary"}
    assert set(RULES) == {*CASES, *apart}


def test_every_source_is_held_to_the_limits(audited: Any, tmp_path: Path) -> None:
    """A small broken source is not hidden by a large good one, and all limits are reported at once."""
    good = write_jsonl(tmp_path / "good.jsonl", clean() * 10)
    rows = [conversation("a", ""), conversation("<|im_end|>", "b"), conversation("c", "d")]
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    sources = [{"path": str(good)}, {"path": str(bad)}]
    limits = {"empty_answers": 0.1, "special_tokens_in_content": 0.1, "duplicates": None}
    with pytest.raises(DataError) as caught:
        audited(good, dataset={"train": sources, "audit": limits})
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()[:-1]] == [f"{bad}:1:", f"{bad}:2:"]


# --- the gate -------------------------------------------------------------------------------------


def test_training_stops_before_weights_load(
    recipe: RecipeMaker, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", with_row(conversation("a", "")))

    def load(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(lorafit.engine.model, "load_base", load)
    with pytest.raises(DataError, match=r"rows\.jsonl:6: .*empty_answers"):
        train(recipe(dataset={"train": [{"path": str(file)}]}))
    assert not (tmp_path / "runs" / "recipe").exists()


def test_the_audit_is_in_the_plan_and_the_manifest(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", with_row(conversation("a", "")))
    path = recipe(dataset={"train": [{"path": str(file)}], "audit": {"empty_answers": 0.1}})
    before = plan_recipe(Recipe.load(path), path)
    assert before.audit is None
    run = train(path)
    saved: Plan = run.load_plan()
    assert saved.audit is not None
    assert saved.audit["train"][0]["found"]["empty_answers"]["count"] == 1
    assert run.load_manifest()["data"]["audit"] == saved.audit
    # A dry run knows the audit of data that has not changed, and the exact number of steps.
    after = plan_recipe(Recipe.load(path), path)
    assert after.audit == saved.audit
    assert after.schedule == saved.schedule


def test_train_and_preview_exit_with_3(recipe: RecipeMaker, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", with_row(conversation("a", "")))
    path = recipe(dataset={"train": [{"path": str(file)}]})
    for command in ("train", "preview"):
        done = CliRunner().invoke(app, [command, str(path)])
        assert done.exit_code == 3
        assert f"{file}:6: " in done.stderr
    done = CliRunner().invoke(app, ["preview", str(path), "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == 3
    assert report["breaches"][0].startswith(f"{file}:6: ")
