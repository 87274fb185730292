"""`lorafit diff`: recipes compared by meaning, also with a revision of git, with what follows and what surprises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHATML, RecipeMaker, conversation, write_jsonl
from typer.testing import CliRunner, Result
from wording import Like

from lorafit.cli import app
from lorafit.diff.recipes import compare

BASE = """\
lora:
  r: 8
  lora_alpha: 16
training:
  learning_rate: 1e-3
"""
RECIPE = """\
extends: ../recipes/base.yaml
model:
  name_or_path: MODEL
dataset:
  train:
    - path: data/chat.jsonl
training:
  max_length: 64
  num_train_epochs: 2
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 1
"""
GATES = ("heldout.loss.adapter < heldout.loss.base (ci)", "heldout.exact_match.adapter >= 80%")


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a recipe, its parent and its data committed; the working directory."""
    for folder in ("recipes", "configs", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes" / "base.yaml").write_text(BASE)
    (tmp_path / "configs" / "a.yaml").write_text(RECIPE.replace("MODEL", str(tiny_model)))
    write_jsonl(tmp_path / "data" / "chat.jsonl", [conversation(f"say {n}", "yes") for n in range(20)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    git("init", "-q", "-b", "main")
    git("config", "user.name", "Test")
    git("config", "user.email", "test@example.org")
    commit("first")
    return tmp_path


def commit(message: str) -> None:
    git("add", "-A")
    git("commit", "-q", "-m", message)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["diff", *arguments])


def compared(before: str | Path, after: str | Path, *options: str) -> dict[str, Any]:
    result = run(str(before), str(after), "--format", "json", *options)
    assert result.exit_code in (0, 7), result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["same"] == (result.exit_code == 0)
    return found


def changes(found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By key, without the output directory, which the fixture names by the recipe."""
    return {one["key"]: (one["before"], one["after"]) for one in found["changes"] if one["key"] != "output_dir"}


def figures(found: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {one["name"]: (one["before"], one["after"]) for one in found["consequences"]}


def warned(found: dict[str, Any]) -> str:
    return "\n".join(one["text"] for one in found["warnings"])


# --- git ------------------------------------------------------------------------------------------


def test_a_change_since_a_revision_with_its_consequences(repository: Path) -> None:
    edit(repository / "configs" / "a.yaml", "batch_size: 2", "batch_size: 4")
    found = compared("main:configs/a.yaml", "configs/a.yaml")
    assert changes(found) == {"training.per_device_train_batch_size": (2, 4)}
    assert figures(found)["rows per step"] == (2, 4)
    assert figures(found)["optimizer steps"] == (20, 10)
    assert figures(found)["training rows"] == (20, 20)
    memory = figures(found)["peak GPU memory"]
    assert memory[0] < memory[1]
    assert "main:configs/a.yaml" in " ".join(found["remarks"])


def test_parents_are_those_of_the_revision(repository: Path) -> None:
    edit(repository / "recipes" / "base.yaml", "r: 8", "r: 4")
    assert changes(compared("main:configs/a.yaml", "configs/a.yaml")) == {"lora.r": (8, 4)}
    commit("second")
    assert changes(compared("main~1:configs/a.yaml", "main:configs/a.yaml")) == {"lora.r": (8, 4)}
    assert run("main:configs/a.yaml", "configs/a.yaml").exit_code == 0


def test_a_parent_that_is_gone_now_is_still_in_the_revision(repository: Path) -> None:
    text = (repository / "configs" / "a.yaml").read_text().replace("extends: ../recipes/base.yaml\n", BASE)
    merged = text.replace("training:\n  learning_rate: 1e-3\n", "", 1).replace(
        "training:\n", "training:\n  learning_rate: 0.001 # the same\n", 1
    )
    (repository / "configs" / "a.yaml").write_text(merged)
    (repository / "recipes" / "base.yaml").unlink()
    result = run("HEAD:configs/a.yaml", "configs/a.yaml")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert "the same" in result.stdout


def test_comments_order_and_defaults_written_out_are_no_difference(repository: Path) -> None:
    path = repository / "configs" / "a.yaml"
    content = yaml.safe_load(path.read_text())
    content["training"] |= {"weight_decay": 0.0, "optim": "auto"}
    content["lora"] = {"r": 8.0 if False else 8, "lora_alpha": 16.0, "target_modules": "all-linear"}
    content["dataset"]["train"][0]["weight"] = 1
    path.write_text("# reordered\n" + yaml.safe_dump(dict(reversed(content.items()))))
    assert run("main:configs/a.yaml", "configs/a.yaml").exit_code == 0


def test_a_renamed_recipe_is_the_same(repository: Path) -> None:
    git("mv", "configs/a.yaml", "configs/b.yaml")
    assert run("main:configs/a.yaml", "configs/b.yaml").exit_code == 0
    commit("renamed")
    assert run("main~1:configs/a.yaml", "main:configs/b.yaml").exit_code == 0
    result = run("main:configs/a.yaml", "configs/b.yaml")
    assert result.exit_code == 2
    assert result.stderr == Like("… configs/a.yaml … main; … 'main:configs/b.yaml'")


def test_paths_as_git_users_write_them(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(repository / "recipes" / "base.yaml", "r: 8", "r: 4")
    monkeypatch.chdir(repository / "configs")
    for name in ("main:configs/a.yaml", "main:./a.yaml", "main:a.yaml", "main:../configs/a.yaml"):
        assert changes(compared(name, "a.yaml")) == {"lora.r": (8, 4)}, name
    outside = run("main:../../a.yaml", "a.yaml")
    assert outside.exit_code == 2
    assert len(outside.stderr.splitlines()) == 1


def test_branches_tags_detached_heads_and_the_index(repository: Path) -> None:
    git("tag", "v1")
    git("switch", "-q", "-c", "topic/faster")
    edit(repository / "recipes" / "base.yaml", "r: 8", "r: 4")
    assert changes(compared("HEAD:configs/a.yaml", "configs/a.yaml")) == {"lora.r": (8, 4)}
    git("add", "-A")
    assert changes(compared("HEAD:configs/a.yaml", ":configs/a.yaml")) == {"lora.r": (8, 4)}
    commit("second")
    git("switch", "-q", "--detach", "HEAD")
    for old in ("v1", "main", "HEAD~1", "HEAD^{/first}", git("rev-parse", "--short", "v1")):
        assert changes(compared(f"{old}:configs/a.yaml", "topic/faster:configs/a.yaml")) == {"lora.r": (8, 4)}, old


def test_paths_with_spaces_and_other_letters(repository: Path) -> None:
    odd = repository / "configs" / "mein Rezept – ü.yaml"
    shutil.copy(repository / "configs" / "a.yaml", odd)
    commit("odd")
    edit(odd, "num_train_epochs: 2", "num_train_epochs: 3")
    found = compared("HEAD:configs/mein Rezept – ü.yaml", "configs/mein Rezept – ü.yaml")
    assert changes(found) == {"training.num_train_epochs": (2.0, 3.0)}


def test_a_file_with_a_colon_in_its_name_comes_first(repository: Path) -> None:
    (repository / "main:configs").mkdir()
    shutil.copy(repository / "configs" / "a.yaml", repository / "main:configs" / "a.yaml")
    edit(repository / "main:configs" / "a.yaml", "max_length: 64", "max_length: 32")
    assert changes(compared("main:configs/a.yaml", "configs/a.yaml")) == {"training.max_length": (32, 64)}


def test_links_in_the_repository_are_followed(repository: Path) -> None:
    (repository / "configs" / "link.yaml").symlink_to("a.yaml")
    (repository / "configs" / "out.yaml").symlink_to("/etc/hostname")
    commit("links")
    assert run("HEAD:configs/link.yaml", "configs/a.yaml").exit_code == 0
    assert run("HEAD:configs/out.yaml", "configs/a.yaml").exit_code == 2


@pytest.mark.parametrize(
    ("side", "says"),
    [
        ("nowhere:configs/a.yaml", "revision 'nowhere'"),
        ("main:configs/aa.yaml", "did you mean 'main:configs/a.yaml'?"),
        ("main:configs", "no file"),
        ("main:", "expected REV:path"),
        ("--output=x:configs/a.yaml", "revision '--output=x'"),
        ("-p:configs/a.yaml", "revision '-p'"),
        ("main\nHEAD:configs/a.yaml", "expected REV:path"),
        ("configs/none.yaml", "no such file"),
    ],
)
def test_what_is_not_there_is_one_clear_line(repository: Path, side: str, says: str) -> None:
    result = run("--", side, "configs/a.yaml")
    assert result.exit_code == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(os.listdir(repository)) == [".git", "configs", "data", "recipes"]


def test_an_unborn_branch_has_no_revision(tmp_path: Path, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    monkeypatch.chdir(tmp_path)
    assert "git repository" in run("HEAD:recipe.yaml", path.name).stderr
    git("init", "-q", "-b", "main")
    result = run("HEAD:recipe.yaml", path.name)
    assert result.exit_code == 2
    assert "revision 'HEAD'" in result.stderr


def test_without_git_it_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    result = run("main:configs/a.yaml", "configs/a.yaml")
    assert result.exit_code == 2
    assert result.stderr == Like("… git … installed")
    assert run("configs/a.yaml", "configs/a.yaml").exit_code == 0


def test_mistakes_stand_at_their_lines_in_the_revision(repository: Path) -> None:
    edit(repository / "recipes" / "base.yaml", "r: 8", "r: eight")
    commit("broken")
    edit(repository / "recipes" / "base.yaml", "r: eight", "r: 8")
    result = run("main:configs/a.yaml", "configs/a.yaml")
    assert result.exit_code == 2
    assert "main:recipes/base.yaml:2:6: lora.r" in result.stderr
    git("rm", "-q", "--cached", "recipes/base.yaml")
    git("commit", "-q", "-m", "no parent")
    result = run("main:configs/a.yaml", "configs/a.yaml")
    assert result.exit_code == 2
    assert result.stderr == Like("main:configs/a.yaml:1:10: extends: … main:recipes/base.yaml")


def test_data_that_is_another_in_the_revision_is_noted(repository: Path) -> None:
    edit(repository / "configs" / "a.yaml", "max_length: 64", "max_length: 32")
    assert "itself differs" not in run("main:configs/a.yaml", "configs/a.yaml").stdout
    write_jsonl(repository / "data" / "chat.jsonl", [conversation("say", "no")] * 10)
    found = compared("main:configs/a.yaml", "configs/a.yaml")
    assert "data/chat.jsonl itself differs" in " ".join(found["remarks"])
    assert figures(found)["training rows"] == (10, 10)


def test_a_chat_template_of_the_same_name_and_other_text_is_a_difference(repository: Path) -> None:
    template = repository / "configs" / "chat.jinja"
    template.write_text(CHATML)
    edit(repository / "configs" / "a.yaml", "dataset:", "  chat_template: configs/chat.jinja\ndataset:")
    commit("template")
    assert run("HEAD:configs/a.yaml", "configs/a.yaml").exit_code == 0
    template.write_text(CHATML + " ")
    found = compared("HEAD:configs/a.yaml", "configs/a.yaml")
    assert list(changes(found)) == ["model.chat_template (text)"]
    assert "chat template" in warned(found)


# --- the comparison -------------------------------------------------------------------------------


def test_sources_are_compared_one_by_one(recipe: RecipeMaker, rows: Path, tmp_path: Path) -> None:
    more, third = (shutil.copy(rows, tmp_path / name) for name in ("more.jsonl", "third.jsonl"))
    one, two, other = ({"path": str(path)} for path in (rows, more, third))
    before = recipe("before", dataset={"train": [one, two]})
    reweighted = compared(before, recipe("after", dataset={"train": [one, two | {"weight": 2.0}]}))
    assert changes(reweighted) == {f"dataset.train[{more}].weight": (1.0, 2.0)}
    assert "48 training rows become 72" in warned(reweighted)
    removed = compared(before, recipe("after", dataset={"train": [two]}))
    assert [(c["key"], c["kind"]) for c in removed["changes"]][:1] == [(f"dataset.train[{rows}]", "removed")]
    swapped = compared(before, recipe("after", dataset={"train": [two, one]}))
    assert list(changes(swapped)) == ["dataset.train (order)"]
    renamed = compared(before, recipe("after", dataset={"train": [one, other]}))
    assert changes(renamed) == {f"dataset.train[{third}].path": (str(more), str(third))}
    added = compared(before, recipe("after", dataset={"train": [one, other, two]}))
    assert [(c["key"], c["kind"]) for c in added["changes"]][:1] == [(f"dataset.train[{third}]", "added")]


def test_an_explicit_value_that_auto_comes_to_is_shown_as_such(recipe: RecipeMaker) -> None:
    before, after = recipe("before"), recipe("after", training={"optim": "adamw_torch_fused"})
    result = run(str(before), str(after))
    assert result.exit_code == 7
    assert "auto (= adamw_torch_fused)  ->  adamw_torch_fused" in result.stdout


def test_both_sides_are_planned_for_a_gpu_if_asked(recipe: RecipeMaker) -> None:
    before = recipe("before", model={"dtype": "auto"}, hardware={"gpu": "T4"})
    after = recipe("after", model={"dtype": "auto"}, hardware={"gpu": "A100 80GB"})
    found = compared(before, after)
    assert {one["key"]: (one["before"], one["after"]) for one in found["followers"]} == {
        "model.dtype": ("float16", "bfloat16")
    }
    assert figures(found)["in the stated memory"][1] == "fits (A100 80GB)"
    assert compared(before, after, "--gpu", "RTX 4090")["followers"] == []


def test_what_cannot_be_known_is_said_and_the_rest_is_shown(recipe: RecipeMaker) -> None:
    before = recipe("before", model={"name_or_path": "no/such-model"})
    after = recipe("after", model={"name_or_path": "no/such-model"}, training={"per_device_train_batch_size": 8})
    found = compared(before, after)
    assert figures(found)["rows per step"] == (4, 8)
    assert figures(found)["training rows"] == (24, 24)
    assert "peak GPU memory" not in figures(found)
    assert any("memory" in line and "no/such-model" in line for line in found["unknown"])
    gone = recipe("gone", dataset={"train": [{"path": "gone.jsonl"}]})
    found = compared(recipe("before"), gone)
    assert figures(found)["training rows"] == (24, None)
    assert any("gone.jsonl" in line for line in found["unknown"])
    assert figures(found)["peak GPU memory"][1] is not None


def test_audited_tokens_are_shown(recipe: RecipeMaker) -> None:
    before, after = recipe("before"), recipe("after", training={"max_length": 18})
    for path in (before, after):
        limits = "dataset.audit={answers_cut_off: null, lost_tokens: null}"
        CliRunner().invoke(app, ["preview", str(path), "--set", limits])
    found = compared(before, after)
    old, new = figures(found)["tokens of an epoch"]
    assert old > new > 0
    assert "of 24 rows" in warned(found)


# --- the warnings ---------------------------------------------------------------------------------

Sections = dict[str, Any]
WARNINGS: dict[str, tuple[Sections, Sections, list[str]]] = {
    "batch alone": (
        {},
        {"training": {"per_device_train_batch_size": 16}},
        ["from 4 to 16 rows a step (x4)", "stays at 0.01", "linear rule would make it 0.04", "square-root rule 0.02"],
    ),
    "learning rate alone": (
        {},
        {"training": {"learning_rate": 2e-2}},
        ["0.01 to 0.02 (x2)", "stays at 4 rows", "a batch of 8", "with 16"],
    ),
    "both, by no rule": (
        {},
        {"training": {"learning_rate": 1e-3, "gradient_accumulation_steps": 2}},
        ["by no usual rule", "linear one would make it 0.02", "square-root one 0.0141"],
    ),
    "r alone": ({}, {"lora": {"r": 8}}, ["Only r changed", "lora_alpha / r) goes from 2 to 1 (x0.5)"]),
    "alpha alone": ({}, {"lora": {"lora_alpha": 32}}, ["Only lora_alpha changed", "from 2 to 8 (x4)"]),
    "rslora": ({}, {"lora": {"use_rslora": True}}, ["lora_alpha / r, then lora_alpha / sqrt(r)", "from 2 to 4"]),
    "chat template": ({}, {"model": {"chat_template": "qwen3"}}, ["chat template is another, none to qwen3"]),
    "max_length": ({}, {"training": {"max_length": 64}}, ["max_length goes from 128 to 64", "cut at the end"]),
    "max_length, dropped": (
        {"dataset": {"excess_length_strategy": "drop"}},
        {"dataset": {"excess_length_strategy": "drop"}, "training": {"max_length": 64}},
        ["rows longer than that are left out"],
    ),
    "loss_on": ({}, {"dataset": {"loss_on": "all"}}, ["Other tokens are learned, loss_on assistant to all"]),
    "quantization added": (
        {},
        {"quantization": {"load_in_4bit": True}},
        ["The base was not quantized, and is quantized to 4 bits (nf4) now", "GiB"],
    ),
    "quantization removed": (
        {"quantization": {"load_in_8bit": True}},
        {},
        ["The base was quantized to 8 bits, and is not quantized now"],
    ),
    "another model": ({}, {"model": {"name_or_path": "other/model"}}, ["The base model is another", "other/model"]),
    "another revision": ({}, {"model": {"revision": "abc"}}, ["revision is another, none to abc"]),
    "seed": (
        {"dataset": {"validation": 0.25}},
        {"dataset": {"validation": 0.25}, "training": {"seed": 7}},
        ["The seed changed, 42 to 7", "other rows are held out"],
    ),
    "targets": (
        {},
        {"lora": {"target_modules": "qv"}},
        ["14 adapted modules become 4", "trained parameters become"],
    ),
    "no adapter": ({}, {"lora": ...}, ["lora section was removed: all parameters are trained"]),
    "packing": ({}, {"training": {"packing": True}}, ["packing was turned on", "more tokens"]),
    "steps": ({}, {"training": {"max_steps": 8}}, ["max_steps 4 to 8", "4 optimizer steps become 8"]),
    "epochs": (
        {"training": {"max_steps": ..., "num_train_epochs": 1}},
        {"training": {"max_steps": ..., "num_train_epochs": 3}},
        ["num_train_epochs 1 to 3", "6 optimizer steps become 18", "1, then 3"],
    ),
    "validation": ({}, {"dataset": {"validation": 0.25}}, ["The validation rows changed (dataset.validation)"]),
    "gate removed": (
        {"eval": {"gates": [*GATES]}},
        {"eval": {"gates": [GATES[0]]}},
        ["A gate was removed: " + GATES[1]],
    ),
    "gate loosened": (
        {"eval": {"gates": [*GATES]}},
        {"eval": {"gates": [GATES[0], GATES[1].replace("80%", "0.7")]}},
        [f"A gate was loosened: {GATES[1]} became heldout.exact_match.adapter >= 0.7"],
    ),
    "gate without its interval": (
        {"eval": {"gates": [*GATES]}},
        {"eval": {"gates": [GATES[0].removesuffix(" (ci)"), GATES[1]]}},
        [f"A gate was loosened: {GATES[0]} became"],
    ),
    "merge limit": ({}, {"merge": {"max_kl": 0.5}}, ["A limit of the merge was loosened: max_kl 0.1 to 0.5"]),
    "merge limit removed": ({}, {"merge": {"min_top1": None}}, ["min_top1 0.9 to no limit"]),
    "merge unchecked": ({}, {"merge": {"verify": "none"}}, ["no longer checked"]),
    "code": ({}, {"model": {"trust_remote_code": True}}, ["trust_remote_code was turned on"]),
    "code of a benchmark": (
        {},
        {"eval": {"trust_code": True}},
        ["eval.trust_code was turned on"],
    ),
    "too little memory": (
        {"hardware": {"vram": "24GiB"}},
        {"hardware": {"vram": "200MiB"}},
        ["Peak memory is", "does not fit (a GPU with 200MiB), and fits (a GPU with 24GiB) before"],
    ),
    "audit limit": (
        {},
        {"dataset": {"audit": {"leaked": 0.1}}},
        ["leaked (validation rows that are training rows, too) 0 to 0.1"],
    ),
    "audit limit removed": ({}, {"dataset": {"audit": {"bos": None}}}, ["0 to no limit"]),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_a_change_that_surprises_is_warned_of(case: str, recipe: RecipeMaker) -> None:
    before, after, expected = WARNINGS[case]
    found = compared(recipe("before", **before), recipe("after", **after))
    sentences = warned(found)
    for part in expected:
        assert part in sentences
    assert all(one["text"].endswith(".") and "\n" not in one["text"] for one in found["warnings"])


HARMLESS: dict[str, tuple[Sections, Sections]] = {
    "scaled by the linear rule": ({}, {"training": {"learning_rate": 4e-2, "per_device_train_batch_size": 16}}),
    "scaled by the square root": ({}, {"training": {"learning_rate": 2e-2, "per_device_train_batch_size": 16}}),
    "the same batch in other parts": (
        {},
        {"training": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
    ),
    "r and alpha together": ({}, {"lora": {"r": 8, "lora_alpha": 16}}),
    "longer rows": ({}, {"training": {"max_length": 256}}),
    "stricter gates": ({"eval": {"gates": [GATES[1]]}}, {"eval": {"gates": [GATES[1].replace("80", "90"), GATES[0]]}}),
    "stricter limits": ({}, {"merge": {"max_kl": 0.01}, "dataset": {"audit": {"lost_tokens": 0.1}}}),
    "logging": ({}, {"training": {"logging_steps": 5}}),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_other_changes_are_shown_without_a_warning(case: str, recipe: RecipeMaker) -> None:
    before, after = HARMLESS[case]
    found = compared(recipe("before", **before), recipe("after", **after))
    assert found["changes"]
    assert warned(found) == ""


# --- output ---------------------------------------------------------------------------------------


def test_markdown_is_a_comment_with_tables_and_escapes(recipe: RecipeMaker) -> None:
    evil = "a|b`c <img src=x onerror=y> **bold** [x](http://y)"
    before = recipe("before", lora={"target_modules": ["q_proj", "v_proj"]})
    after = recipe("after", lora={"target_modules": ["q_proj", evil]}, training={"per_device_train_batch_size": 8})
    result = run(str(before), str(after), "--format", "markdown")
    assert result.exit_code == 7
    lines = result.stdout.splitlines()
    assert lines[0].startswith("### ")
    assert "**Warnings**" in lines
    assert "| consequence | before | after | change |" in lines
    assert "+100.0%" in result.stdout
    tables = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} <= {4, 5}
    assert "<img" not in result.stdout
    assert "**bold**" not in result.stdout
    assert re.search(r"(?<!\\)\]\(", result.stdout) is None
    assert "\\`c" in result.stdout


def test_the_same_is_one_line_in_each_format(recipe: RecipeMaker) -> None:
    before, after = str(recipe("before", output_dir="x")), str(recipe("after", output_dir="x"))
    for format in ("text", "markdown"):
        result = run(before, after, "--format", format)
        assert result.exit_code == 0
        assert "the same after" in result.stdout.lower()
        assert "|" not in result.stdout
    assert compared(before, after)["changes"] == []


def test_an_unknown_format_is_refused(recipe: RecipeMaker) -> None:
    path = str(recipe())
    assert "text, markdown, json" in run(path, path, "--format", "yaml").stderr


def test_long_values_do_not_break_the_columns(recipe: RecipeMaker) -> None:
    before = recipe("before", eval={"gates": [*GATES]})
    after = recipe("after", eval={"gates": [GATES[0]]}, training={"seed": 1})
    text = run(str(before), str(after)).stdout
    assert f"    before  [{GATES[1]}, …]\n" in text
    assert "  training.seed  42  ->  1\n" in text


# --- a whole working tree -------------------------------------------------------------------------


def against(*arguments: str) -> tuple[int, dict[str, Any]]:
    ran = CliRunner().invoke(app, ["diff", "--against", "main", *arguments, "--json"])
    return ran.exit_code, json.loads(ran.stdout)


def test_every_recipe_is_compared_with_the_revision(repository: Path) -> None:
    text = (repository / "configs" / "a.yaml").read_text()
    for name in ("same", "gone"):
        (repository / "configs" / f"{name}.yaml").write_text(text + f"output_dir: runs/{name}\n")
    (repository / "configs" / "broken.yaml").write_text("lora: 5\nmodel: 5\n")
    commit("second")
    edit(repository / "recipes" / "base.yaml", "1e-3", "2e-3")  # what a changes by its parent
    edit(repository / "configs" / "same.yaml", "training:\n", "training:\n  learning_rate: 1e-3\n")
    (repository / "configs" / "gone.yaml").unlink()
    (repository / "configs" / "new.yaml").write_text(text)
    (repository / "configs" / "broken.yaml").write_text(text)
    code, found = against("configs", "recipes")
    assert code == 7
    (changed,) = found["changed"]
    assert (changed["before"], changed["after"]) == ("main:configs/a.yaml", "configs/a.yaml")
    assert [change["key"] for change in changed["changes"]] == ["training.learning_rate"]
    assert (found["same"], found["new"]) == (["configs/same.yaml"], ["configs/new.yaml"])
    assert (found["gone"], found["unreadable"]) == (["configs/gone.yaml"], ["configs/broken.yaml"])
    shown = CliRunner().invoke(app, ["diff", "--against", "main", "configs", "--format", "markdown"]).stdout
    assert "- `configs/gone.yaml`: gone" in shown


def test_nothing_changed_against_the_revision(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = against("configs")
    assert (code, found["changed"], found["same"]) == (0, [], ["configs/a.yaml"])
    monkeypatch.chdir(repository / "configs")
    assert against("a.yaml")[1]["same"] == ["a.yaml"]
    shown = CliRunner().invoke(app, ["diff", "--against", "main", ".", "--format", "markdown"])
    assert shown.stdout == "### Recipes\n\nNone differs from `main`.\n"


def test_what_is_asked_amiss(repository: Path) -> None:
    one = CliRunner().invoke(app, ["diff", "configs/a.yaml"])
    assert one.exit_code == 2
    assert one.stderr == Like("… two … 1")
    nowhere = CliRunner().invoke(app, ["diff", "--against", "nowhere", "configs"])
    assert nowhere.exit_code == 2
    assert "revision 'nowhere'" in nowhere.stderr


def test_the_order_of_sources_with_one_path_counts() -> None:
    sources = [{"path": "owner/set", "name": name, "split": "train"} for name in ("en", "de")]
    (change,) = compare({"dataset": {"train": sources}}, {"dataset": {"train": sources[::-1]}})
    assert change.key == "dataset.train (order)"
