"""`lorafit explain`: every value with its origin, and what was written before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeMaker, conversation, write_jsonl
from typer.testing import CliRunner, Result

from lorafit.cli import app

BASE = """\
lora:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.1
training:
  learning_rate: 2e-4
  optim: auto
"""
METHOD = """\
extends: base.yaml
lora:
  r: 32
training:
  learning_rate: 1e-4
"""
CHILD = """\
extends: [base.yaml, ../recipes/method.yaml]
model:
  name_or_path: MODEL
dataset:
  train:
    - path: chat.jsonl
lora:
  r: 8
training:
  max_steps: 3
"""


@pytest.fixture
def family(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with parents in two folders; returns its folder, the working directory."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "configs").mkdir()
    for folder in ("recipes", "configs"):
        (tmp_path / folder / "base.yaml").write_text(BASE)
    (tmp_path / "recipes" / "method.yaml").write_text(METHOD)
    (tmp_path / "configs" / "child.yaml").write_text(CHILD.replace("MODEL", str(tiny_model)))
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "chat.jsonl", [conversation("one two", "three")] * 5)
    return tmp_path


def run(*arguments: str, columns: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": columns}).invoke(app, ["explain", *arguments])


def values(*arguments: str) -> dict[str, dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return {one["key"]: one for one in json.loads(result.stdout)["values"]}


def places(one: dict[str, Any]) -> list[tuple[Any, str]]:
    return [(old["value"], old["place"]) for old in one["overridden"]]


def test_a_value_is_shown_with_all_that_it_was_written_over(family: Path) -> None:
    found = values("configs/child.yaml", "lora.r", "--set", "lora.r=4")["lora.r"]
    assert (found["value"], found["origin"], found["place"]) == (4, "--set", "--set lora.r=4")
    assert places(found) == [
        (8, "configs/child.yaml:8:6"),
        (32, "configs/../recipes/method.yaml:3:6"),
        (16, "configs/../recipes/base.yaml:2:6"),
        (16, "configs/base.yaml:2:6"),
    ]


def test_a_value_of_a_parent_names_the_parent(family: Path) -> None:
    found = values("configs/child.yaml")
    rate = found["training.learning_rate"]
    assert (rate["value"], rate["origin"], rate["place"]) == (1e-4, "file", "configs/../recipes/method.yaml:5:18")
    assert [old["value"] for old in rate["overridden"]] == [2e-4, 2e-4]
    assert found["lora.lora_dropout"]["place"] == "configs/../recipes/base.yaml:4:17"
    assert found["lora.bias"]["origin"] == "default"
    assert found["lora.bias"]["place"] is None


def test_a_parent_reached_twice_is_named_once(family: Path) -> None:
    (family / "configs" / "child.yaml").write_text(
        (family / "configs" / "child.yaml").read_text().replace("[base.yaml,", "[../recipes/base.yaml,")
    )
    found = values("configs/child.yaml", "lora.lora_alpha")["lora.lora_alpha"]
    assert found["place"] == "configs/../recipes/base.yaml:3:15"
    assert found["overridden"] == []


def test_a_null_gives_back_the_default_and_says_what_it_took_away(family: Path) -> None:
    child = family / "configs" / "child.yaml"
    child.write_text(child.read_text().replace("  r: 8\n", "  r: 8\n  lora_dropout: null\n"))
    found = values("configs/child.yaml", "lora.lora_dropout")["lora.lora_dropout"]
    assert (found["value"], found["origin"]) == (0.05, "default")
    assert places(found)[:2] == [(None, "configs/child.yaml:9:17"), (0.1, "configs/../recipes/base.yaml:4:17")]
    assert "was removed" in run("configs/child.yaml", "lora.lora_dropout").stdout


def test_a_section_that_is_taken_away_and_set_again_keeps_its_history(family: Path) -> None:
    child = family / "configs" / "child.yaml"
    child.write_text(child.read_text().replace("lora:\n  r: 8\n", "lora: null\n"))
    found = values("configs/child.yaml", "lora")["lora"]
    assert (found["value"], found["origin"], found["place"]) == (None, "file", "configs/child.yaml:7:7")
    assert found["overridden"][0]["value"]["r"] == 32
    again = values("configs/child.yaml", "lora.r", "--set", "lora.r=2")["lora.r"]
    assert again["value"] == 2
    assert [old["value"] for old in again["overridden"]] == [None, 32, 16, 16]


def test_a_whole_section_given_by_set_shows_what_it_replaced(family: Path) -> None:
    found = values("configs/child.yaml", "lora", "--set", "lora={r: 2}")
    assert found["lora.r"]["value"] == 2
    assert found["lora.lora_alpha"]["origin"] == "default"
    assert places(found["lora.lora_alpha"])[:2] == [
        (None, "--set lora={r: 2}"),
        (32, "configs/../recipes/base.yaml:3:15"),
    ]


def test_what_a_shorter_list_left_out_is_shown(family: Path) -> None:
    source = "dataset:\n  train:\n    - path: chat.jsonl\n    - path: more.jsonl\n"
    (family / "configs" / "base.yaml").write_text(source + BASE)
    (family / "configs" / "child.yaml").write_text(
        (family / "configs" / "child.yaml").read_text().replace("[base.yaml,", "[../configs/base.yaml,")
    )
    found = values("configs/child.yaml", "dataset.train")
    assert [item["path"] for item in found["dataset.train"]["overridden"][0]["value"]] == ["chat.jsonl", "more.jsonl"]
    assert places(found["dataset.train.0.path"]) == [("chat.jsonl", "configs/../configs/base.yaml:3:13")]


def test_values_from_the_environment_name_their_variable(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE", "5e-5")
    child = family / "configs" / "child.yaml"
    child.write_text(child.read_text() + "  learning_rate: ${RATE}\n  seed: ${SEED:-7}\n")
    found = values("configs/child.yaml", "training")
    assert found["training.learning_rate"]["value"] == 5e-5
    assert found["training.learning_rate"]["reference"] == "${RATE}"
    assert found["training.seed"]["reference"] == "${SEED:-7}"
    assert "configs/child.yaml:11:18 from ${RATE}" in run("configs/child.yaml", "training.learning_rate").stdout


def test_auto_is_shown_as_what_the_plan_makes_of_it(family: Path) -> None:
    found = values("configs/child.yaml", "--gpu", "RTX 4090")
    optim = found["training.optim"]
    assert (optim["value"], optim["origin"], optim["asked"]) == ("adamw_torch_fused", "plan", "auto")
    assert optim["place"] == "configs/../recipes/base.yaml:7:10"
    assert found["model.dtype"]["value"] == "bfloat16"
    assert "RTX 4090" in found["model.dtype"]["reason"]
    assert found["steps"]["value"] == 3
    assert found["dataset.train.0.format"]["value"] == "messages"
    assert found["output_dir"]["value"] == "runs/child"
    text = run("configs/child.yaml", "training.optim").stdout
    assert "auto (recipes/base.yaml:7:10): " in text


def test_it_plans_for_what_the_recipe_is_meant_for_or_for_this_machine(family: Path) -> None:
    cpu = "hardware={device: cpu}"
    batch = "training.per_device_train_batch_size"
    assert values("configs/child.yaml")[batch]["value"] == 4
    assert values("configs/child.yaml", "--set", cpu)[batch]["value"] == 8
    assert values("configs/child.yaml", "--set", cpu, "--gpu", "T4")[batch]["value"] == 4
    assert values("configs/child.yaml", "--here")[batch]["value"] in (4, 8)
    assert run("configs/child.yaml", "--here", "--gpu", "T4").exit_code == 2


def test_one_key_comes_with_its_documentation(family: Path) -> None:
    assert "Rank of the adapter." in run("configs/child.yaml", "lora.r").stdout
    assert "Rank of the adapter." not in run("configs/child.yaml").stdout
    assert "quantization is absent" in run("configs/child.yaml", "quantization.load_in_4bit").stdout
    assert run("configs/child.yaml", "dataset.train[0].path").stdout.splitlines()[1].split()[:2] == [
        "path",
        "chat.jsonl",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("lora.rr", "'lora.r'"),
        ("trainig", "'training'"),
        ("lr", "'training.learning_rate'"),
        ("nonsense", "there are model, "),
        ("dataset.train.4.path", "there are dataset.train.0"),
    ],
)
def test_a_misspelt_key_is_one_line_with_a_hint(family: Path, key: str, hint: str) -> None:
    result = run("configs/child.yaml", key)
    assert result.exit_code == 2
    assert hint in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_without_the_model_it_says_what_the_recipe_alone_says(family: Path) -> None:
    result = run("configs/child.yaml", "--set", "model.name_or_path=no/such-model")
    assert result.exit_code == 0
    assert "no/such-model" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "configs/child.yaml:8:6" in result.stdout
    found = values("configs/child.yaml", "--set", "model.name_or_path=no/such-model")
    assert found["lora.target_modules"]["value"] == "all-linear"
    assert found["training.optim"]["value"] == "adamw_torch_fused"


def test_without_the_data_only_the_data_is_unknown(family: Path) -> None:
    (family / "chat.jsonl").unlink()
    result = run("configs/child.yaml")
    assert result.exit_code == 0
    assert "chat.jsonl" in result.stderr
    assert values("configs/child.yaml")["lora.target_modules"]["origin"] == "plan"


def test_what_the_model_refuses_is_said(family: Path) -> None:
    result = run("configs/child.yaml", "--set", "lora.target_modules=[q_prj]")
    assert result.exit_code == 0
    assert "q_prj" in result.stderr


def test_an_invalid_recipe_is_refused_with_its_mistakes(family: Path) -> None:
    result = run("configs/child.yaml", "--set", "lora.r=none")
    assert result.exit_code == 2
    assert "lora.r" in result.stderr


def test_the_table_is_readable_in_a_narrow_terminal(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(quantization={"load_in_4bit": True}, dataset={"validation": 0.2})
    monkeypatch.chdir(path.parent)
    result = run(path.name, columns="80")
    words = [line for line in result.stdout.splitlines() if len(line) > 80 and len(line.split()) > 1]
    assert words == []
    piped = run(path.name, "lora")
    assert any("auto" in line or "all-linear" in line for line in piped.stdout.splitlines())
    assert len([line for line in piped.stdout.splitlines() if line.startswith("  target_modules")]) == 1


def test_what_gave_way_to_a_rival_is_said(family: Path) -> None:
    """In the explanation of both, and among the plan's remarks."""
    found = values("configs/child.yaml", "training", "--set", "training.num_train_epochs=2")
    steps = found["training.max_steps"]
    assert (steps["value"], steps["place"]) == (None, "--set training.num_train_epochs=2")
    assert places(steps) == [(3, "configs/child.yaml:10:14")]
    planned = CliRunner().invoke(
        app, ["train", "configs/child.yaml", "--dry-run", "--json", "--set", "training.num_train_epochs=2"]
    )
    (remark,) = [one for one in json.loads(planned.stdout)["remarks"] if one.startswith("training.max_steps: 3 ")]
    assert "configs/child.yaml:10:14" in remark
    assert "training.num_train_epochs (--set training.num_train_epochs=2)" in remark
