"""`lorafit validate`: faulty recipes of the kinds that people write, each found at its line, and no false alarm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, write_jsonl
from typer.testing import CliRunner, Result

from lorafit.cli import app
from lorafit.validate.check import Checker
from lorafit.validate.findings import Options
from lorafit.validate.types import Report

ROOT = Path(__file__).parent.parent
HERE = "#!"
"""Marks the line of a recipe in which the fault stands."""

GOOD = """\
extends: base.yaml
model:
  name_or_path: MODEL
dataset:
  train:
    - path: chat.jsonl
      format: messages
  validation: 0.1
  loss_on: assistant
training:
  max_length: 64
  num_train_epochs: 2
  learning_rate: 2e-4
  per_device_train_batch_size: 2
"""


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def added(section: str, line: str) -> str:
    """A line at the end of a section that the recipe has, or a new section."""
    if f"\n{section}:\n" not in GOOD:
        return f"{GOOD}{section}:\n  {line}\n"
    return GOOD.replace(f"\n{section}:\n", f"\n{section}:\n  {line}\n", 1)


FOUR_BITS = "quantization:\n  load_in_4bit: true\n"
FAULTS: dict[str, tuple[str, int, str]] = {
    # what people did: the recipe, the exit code, a part of the message
    "misspelt section": (GOOD.replace("training:", f"trainig: {HERE}"), 2, "did you mean 'training'?"),
    "misspelt key": (added("training", f"lerning_rate: 1e-4 {HERE}"), 2, "did you mean 'learning_rate'?"),
    "misspelt key in a source": (
        changed("      format: messages", f"      fromat: messages {HERE}"), 2, "did you mean 'format'?"
    ),
    "misspelt key in an eval set": (
        f"{GOOD}eval:\n  sets:\n    - name: own\n      path: chat.jsonl\n      rol: task {HERE}\n", 2, "'role'"
    ),
    "misspelt audit rule": (added("dataset", f"audit: {{trunkated: 0.1}} {HERE}"), 2, "did you mean 'truncated'?"),
    "another tool's name": (added("training", f"max_seq_length: 64 {HERE}"), 2, "did you mean 'max_length'?"),
    "key of another section": (added("training", f"lora_alpha: 16 {HERE}"), 2, "did you mean 'lora.lora_alpha'?"),
    "dotted key": (f"{GOOD}lora.r: 8 {HERE}\n", 2, "a dot does not nest"),
    "wrong type": (changed("num_train_epochs: 2", f"num_train_epochs: two {HERE}"), 2, "got 'two'"),
    "number as text": (changed("learning_rate: 2e-4", f'learning_rate: "1e-4" {HERE}'), 2, "expected a number"),
    "yes for true": (added("training", f"packing: yes {HERE}"), 2, "expected true or false, got 'yes'"),
    "float for a whole number": (added("lora", f"r: 8.5 {HERE}"), 2, "expected a whole number"),
    "negative rate": (changed("learning_rate: 2e-4", f"learning_rate: -1e-4 {HERE}"), 2, "above 0"),
    "dropout of 1": (added("lora", f"lora_dropout: 1.0 {HERE}"), 2, "below 1"),
    "unknown scheduler": (added("training", f"lr_scheduler_type: cosin {HERE}"), 2, "did you mean 'cosine'?"),
    "unknown optimizer": (added("training", f"optim: adamw_bnb_8bit {HERE}"), 2, "expected auto | adamw_torch"),
    "key twice": (added("training", "seed: 1\n  seed: 2 #!"), 2, "given twice"),
    "empty section": (f"{GOOD}lora: {HERE}\n", 2, "is empty"),
    "tab": (f"{GOOD}lora:\n\tr: 8 {HERE}\n", 2, "indent with spaces"),
    "unset variable": (changed("MODEL", f"${{NO_SUCH_VARIABLE}} {HERE}"), 2, "NO_SUCH_VARIABLE is not set"),
    "missing section": (GOOD.partition("dataset:")[0].replace("base.yaml", f"base.yaml {HERE}"), 2, "is missing"),
    "parent that is not there": (changed("extends: base.yaml", f"extends: bse.yaml {HERE}"), 2, "does not exist"),
    "4 bits, trained in full": (
        GOOD.replace("extends: base.yaml\n", "") + FOUR_BITS.replace(":\n", f": {HERE}\n", 1),
        2,
        "can't be trained"
    ),
    "both 4 and 8 bits": (
        f"{GOOD}quantization:\n  load_in_4bit: true {HERE}\n  load_in_8bit: true\n", 2, "exactly one"
    ),
    "4-bit settings with 8 bits": (
        f"{GOOD}quantization:\n  load_in_8bit: true\n  bnb_4bit_quant_type: fp4 {HERE}\n", 2, "has no effect"
    ),
    "epochs and steps": (added("training", f"max_steps: 10 {HERE}"), 2, "either max_steps or num_train_epochs"),
    "stopping early without validation": (
        added("training", f"early_stopping_patience: 2 {HERE}").replace("  validation: 0.1\n", ""),
        2,
        "needs validation",
    ),
    "steps that are never reached": (added("training", f"eval_steps: 10 {HERE}"), 2, "has no effect without"),
    "resume path": (
        added("training", f"resume_from_checkpoint: runs/old/checkpoint-10 {HERE}"), 2, "lorafit train --resume"
    ),
    "targets that match nothing": (added("lora", f"target_modules: [query_key_value] {HERE}"), 2, "query_key_value"),
    "one target of several": (added("lora", f"target_modules: [q_proj, v_porj] {HERE}"), 2, "v_porj"),
    "expression that matches nothing": (added("lora", f'target_modules: ".*attention.*" {HERE}'), 2, "no linear layer"),
    "adapter on the head": (added("lora", f"target_modules: [q_proj, lm_head] {HERE}"), 2, "lm_head"),
    "saved module that is not there": (added("lora", f"modules_to_save: [embed_token] {HERE}"), 2, "embed_token"),
    "layer beyond the last": (
        added("lora", f"layers_to_transform: [0, 7] {HERE}\n  target_modules: [q_proj]"), 2, "7"
    ),
    "paged optimizer on a CPU": (
        f"{GOOD}hardware:\n  device: cpu\n".replace("training:\n", f"training:\n  optim: paged_adamw_8bit {HERE}\n"),
        2,
        "needs a CUDA GPU",
    ),
    "flash attention on a T4": (
        f"{GOOD}hardware:\n  gpu: T4\n".replace("MODEL\n", f"MODEL\n  attn_implementation: flash_attention_2 {HERE}\n"),
        2,
        "compute capability 8.0",
    ),
    "max_length above the model's": (changed("max_length: 64", f"max_length: 4096 {HERE}"), 2, "context of 512 tokens"),
    "gate without a figure": (
        f"{GOOD}eval:\n  gates:\n    - exact_match >= 0.8 {HERE}\n", 2, "exact_match"
    ),
    "unknown GPU": (f"{GOOD}hardware:\n  gpu: RTX 4099 {HERE}\n", 2, "not a known GPU"),
    "data that is not there": (changed("path: chat.jsonl", f"path: chats.jsonl {HERE}"), 3, "no such file"),
    "pattern that matches nothing": (changed("path: chat.jsonl", f"path: 'train-*.jsonl' {HERE}"), 3, "matches no"),
    "validation that is not there": (
        changed("validation: 0.1", f"validation:\n    - path: held/out.csv {HERE}"), 3, "no such file"
    ),
    "missing column": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: questions.csv\n      format: alpaca {HERE}"),
        3,
        "'instruction' is missing",
    ),
    "misspelt mapped column": (
        changed(
            "- path: chat.jsonl\n      format: messages",
            "- path: questions.csv\n      format: alpaca\n      columns:\n        instruction: question\n"
            f"        output: answr {HERE}",
        ),
        3,
        "'answr' is missing",
    ),
    "wrong format": (
        changed("format: messages", f"format: prompt_completion {HERE}"), 3, "'prompt' is missing"
    ),
    "no known format": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: questions.csv {HERE}"), 3, "fit no format"
    ),
    "broken JSON": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: broken.jsonl {HERE}"), 3, "broken.jsonl:2"
    ),
    "empty file": (
        changed("- path: chat.jsonl\n      format: messages", f"- path: empty.jsonl {HERE}"), 3, "no rows"
    ),
    "empty answer": (changed("path: chat.jsonl", f"path: unanswered.jsonl {HERE}").replace(
        "      format: messages\n", ""), 3, "nothing to learn"),
    "eval set that is not there": (
        f"{GOOD}eval:\n  sets:\n    - name: own\n      path: own.jsonl {HERE}\n", 3, "no such file"
    ),
    "set of options without its column": (
        f"{GOOD}eval:\n  sets:\n    - name: own\n      path: chat.jsonl\n      options: choices {HERE}\n",
        3,
        "'choices' must be a list",
    ),
    "gate on a set that there is none of": (
        f"{GOOD}eval:\n  gates:\n    - helout.exact_match.adapter >= 0.8 {HERE}\n", 2, "did you mean heldout?"
    ),
    "judge without a scheme": (
        f"{GOOD}eval:\n  judge:\n    base_url: localhost:8000 {HERE}\n    model: own\n", 2, "http://localhost:8000/v1"
    ),
    "judge that is shown no answers": (
        f"{GOOD}eval:\n  judge:\n    base_url: http://localhost:8000\n    model: own\n    prompt: Better? {HERE}\n",
        2,
        "has no {first}",
    ),
    "chat template that is no Jinja": (
        GOOD.replace("MODEL\n", f"MODEL\n  chat_template: broken.jinja {HERE}\n"), 2, "broken.jinja:2: no Jinja"
    ),
    "misspelt mapped path": (
        changed(
            "- path: chat.jsonl\n      format: messages",
            "- path: nested.jsonl\n      format: alpaca\n      columns:\n        instruction: task.text\n"
            f"        output: task.answr {HERE}",
        ),
        3,
        "'task.answr' is missing",
    ),
    "misspelt column in a template": (
        changed(
            "- path: chat.jsonl\n      format: messages",
            "- path: questions.csv\n      format: prompt_completion\n      template:\n"
            f"        prompt: '{{{{ qestion }}}}' {HERE}\n        completion: '{{{{ answer }}}}'",
        ),
        3,
        "'qestion' is undefined",
    ),
    "folder that is not there": (changed("path: chat.jsonl", f"path: shards/ {HERE}"), 3, "no such file"),
    "path that is no hub id": (changed("path: chat.jsonl", f"path: data/all/train {HERE}"), 3, "no such file"),
    "argument of another schedule": (
        added("training", f"lr_scheduler_kwargs: {{min_lr_rate: 0.1}} {HERE}"), 2, "is no argument of cosine"
    ),
    "schedule without its argument": (
        added("training", f"lr_scheduler_type: cosine_with_min_lr {HERE}"), 2, "min_lr_rate"
    ),
    "decay without its steps": (
        added("training", f"lr_scheduler_type: warmup_stable_decay {HERE}"), 2, "needs num_decay_steps"
    ),
    "model that is not there": (changed("MODEL", f"./models/none {HERE}"), 4, "no such folder"),
    "quantized model": (changed("MODEL", f"GPTQ {HERE}"), 2, "stored quantized (gptq)"),
    "too little memory": (f"{GOOD}hardware:\n  vram: 100MiB {HERE}\n", 5, "does not fit"),
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with data, a model's files, and a parent recipe."""
    folder = tmp_path_factory.mktemp("a project")
    write_jsonl(folder / "chat.jsonl", [conversation(f"question {i}", "an answer") for i in range(30)])
    write_jsonl(folder / "unanswered.jsonl", [conversation("hello", "")])
    (folder / "questions.csv").write_text("question,answer\nhow,so\n")
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jinja").write_text("{% for one in messages %}\n{{ one.role }")
    (folder / "marked.jinja").write_text(
        "{% for one in messages %}{{ one.role }}{% generation %}{{ one.content }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    )
    write_jsonl(folder / "nested.jsonl", [{"task": {"text": "how", "answer": "so"}}])
    write_jsonl(folder / "choices.jsonl", [{"instruction": "how", "output": "so", "asked": {"of": ["so", "not so"]}}])
    (folder / "base.yaml").write_text("lora:\n  r: 4\n")
    gptq = folder / "gptq"
    gptq.mkdir()
    for file in tiny_model.iterdir():
        (gptq / file.name).write_bytes(file.read_bytes())
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return folder


@pytest.fixture
def written(project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which `write` writes recipes."""
    monkeypatch.chdir(project)
    for file in project.glob("recipe*.yaml"):
        file.unlink()
    return project


def write(text: str, tiny_model: Path, name: str = "recipe.yaml") -> str:
    Path(name).write_text(text.replace("MODEL", str(tiny_model)).replace("GPTQ", "./gptq"))
    return name


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["validate", *arguments])


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_found_at_its_line_and_nothing_else(name: str, written: Path, tiny_model: Path) -> None:
    text, code, message = FAULTS[name]
    file = write(text, tiny_model)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if HERE in line)
    checked = Checker(Options()).check(file)
    assert [(f.mistake.position.file, f.mistake.position.line, f.exit_code) for f in checked.faults] == [
        (file, line, code)
    ], checked.faults
    assert message in str(checked.faults[0].mistake)
    assert Report((checked,)).exit_code == code


def test_the_faults_are_many() -> None:
    assert len(FAULTS) >= 30


SOUND = {
    "plain": GOOD,
    "4 bits": GOOD + FOUR_BITS,
    "paged optimizer for a GPU": added("training", "optim: paged_adamw_8bit"),
    "chat template with marks": GOOD.replace("MODEL\n", "MODEL\n  chat_template: marked.jinja\n"),
    "schedule with its argument": added(
        "training", "lr_scheduler_type: cosine_with_min_lr\n  lr_scheduler_kwargs: {min_lr_rate: 0.1}"
    ),
    "what is measured": f"{GOOD}eval:\n  sets:\n    - {{name: own, path: choices.jsonl, options: asked.of}}\n"
    "  gates: [heldout.loss.adapter < baseline.heldout.loss.adapter, own.accuracy.base > 0, chat.kl.adapter < 1]\n"
    "  judge: {base_url: 'https://judge.example/v1', model: own, api_key_env: NO_SUCH_VARIABLE}\n",
    "gate on a task": f"{GOOD}eval:\n  lm_eval: {{tasks: [arc_easy]}}\n  gates: [arc_easy.acc.adapter > 0.3]\n",
    "room enough": f"{GOOD}hardware:\n  gpu: RTX 4090\n  vram: 8GiB\n",
    "on a CPU": f"{GOOD}hardware:\n  device: cpu\n",
    "own columns": changed(
        "- path: chat.jsonl\n      format: messages",
        "- path: questions.csv\n      columns: {instruction: question, output: answer}",
    ),
    "a template": changed(
        "- path: chat.jsonl\n      format: messages",
        "- path: questions.csv\n      template: 'Q {{ question }} A {{ answer }}'",
    ),
    "an empty answer that may be": changed("path: chat.jsonl", "path: unanswered.jsonl").replace(
        "  loss_on: assistant\n", "  loss_on: assistant\n  audit: {empty_answers: null}\n"
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name: str, written: Path, tiny_model: Path) -> None:
    checked = Checker(Options(strict=True)).check(write(SOUND[name], tiny_model))
    assert checked.faults == ()


def test_the_shipped_recipes_have_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ran = run("configs", "recipes", "--json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    kinds = {one["file"]: one["kind"] for one in report["recipes"]}
    assert kinds["configs/llama3-qlora.yaml"] == "recipe"
    assert kinds["recipes/qlora.yaml"] == "part"
    fits = {one["file"]: one["facts"].get("fits") for one in report["recipes"]}
    assert fits["configs/llama3-70b-qlora.yaml"] == "fits"


def test_torch_is_not_imported(written: Path, tiny_model: Path) -> None:
    file = write(f"{GOOD}hardware:\n  vram: 8GiB\n", tiny_model)
    code = (
        "import sys; sys.argv = ['lorafit', 'validate', sys.argv[1]]\n"
        "from lorafit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_a_fault_of_a_parent_is_reported_in_its_file(written: Path, tiny_model: Path) -> None:
    Path("parent.yaml").write_text("lora:\n  rr: 4\n")
    for name in ("recipe1.yaml", "recipe2.yaml"):
        write(changed("base.yaml", "parent.yaml"), tiny_model, name)
    ran = run("recipe1.yaml", "recipe2.yaml", "--format", "github")
    assert ran.exit_code == 2
    errors = [line for line in ran.stdout.splitlines() if line.startswith("::error")]
    assert errors == [
        "::error file=parent.yaml,line=2,col=3,title=lorafit%3A recipe::lora.rr: unknown key; did you mean 'r'?"
    ]
    Path("parent.yaml").unlink()


# --- paths ----------------------------------------------------------------------------------------


def test_folders_patterns_and_what_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/one.yaml", "a/b/two.yml", "a/.hidden/three.yaml", "a/run/recipe.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("lora: {}\n")
    Path("a/run/plan.json").write_text("{}")
    Path("a/compose.yaml").write_text("services: {}\n")
    report = json.loads(run("a", "--json").stdout)
    assert {one["file"]: one["kind"] for one in report["recipes"]} == {"a/one.yaml": "part", "a/b/two.yml": "part"}
    assert report["skipped"] == ["a/compose.yaml"]
    report = json.loads(run("a/**/*.yml", "a/one.yaml", "--json").stdout)
    assert [one["file"] for one in report["recipes"]] == ["a/b/two.yml", "a/one.yaml"]
    named = run("a/compose.yaml")
    assert named.exit_code == 2
    assert "a/compose.yaml:1:1: is no recipe" in named.stdout


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.yaml", "none.yaml: can't be read: No such file"),
        ("nothing", "nothing: there are no recipes (0 YAML files)"),
        ("*.yaml", "*.yaml: there are no recipes"),
    ],
)
def test_paths_without_recipes(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    ran = run(path)
    assert ran.exit_code == 2
    assert message in ran.output


# --- options --------------------------------------------------------------------------------------


def test_parts_that_are_elsewhere_can_be_left_out(written: Path, tiny_model: Path) -> None:
    text = GOOD.replace("MODEL", "/models/llama").replace("chat.jsonl", "/data/chat.jsonl")
    file = write(text, tiny_model)
    assert run(file).exit_code == 3
    assert run(file, "--skip", "data").exit_code == 4
    assert run(file, "--skip", "data", "--skip", "model").exit_code == 0
    wrong = run(file, "--skip", "date")
    assert wrong.exit_code == 2
    assert "did you mean data?" in wrong.output


def test_for_which_machine(written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    file = write(added("training", "optim: paged_adamw_8bit"), tiny_model)
    assert run(file).exit_code == 0
    assert run(file, "--gpu", "T4").exit_code == 0
    here = run(file, "--here")
    assert here.exit_code == 2
    assert "needs a CUDA GPU" in here.stdout
    assert run(file, "--here", "--gpu", "T4").exit_code == 2


def test_what_cannot_be_checked_is_said(written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(written / "no cache"))
    file = write(GOOD.replace("MODEL", "somebody/some-model"), tiny_model)
    ran = run(file)
    assert ran.exit_code == 0
    assert "note: the model was not checked: somebody/some-model" in ran.stdout
    assert run(file, "--strict").exit_code == 4


def test_deep_audits_the_data(written: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(written / "cache"))
    rows = [conversation(f"question {i}", "an answer") for i in range(40)]
    rows[30] = conversation("question", " ")  # beyond the first rows
    write_jsonl(written / "late.jsonl", rows)
    file = write(changed("path: chat.jsonl", "path: late.jsonl"), tiny_model)
    assert run(file).exit_code == 0
    ran = run(file, "--deep")
    assert ran.exit_code == 3
    assert re.search(r"recipe.yaml:6:\d+: dataset.train.0.path: late.jsonl:31: .*nothing to learn", ran.stdout)
    fine = json.loads(run(write(GOOD, tiny_model), "--deep", "--json").stdout)
    assert fine["recipes"][0]["facts"]["rows"] == 27


# --- formats --------------------------------------------------------------------------------------


@pytest.fixture
def two_faults(written: Path, tiny_model: Path) -> str:
    text = added("training", "packing: yes, 100%").replace("chat.jsonl", "chäts.jsonl")
    return write(text, tiny_model, "recipe with spaces.yaml")


def test_json(two_faults: str) -> None:
    found: dict[str, Any] = json.loads(run(two_faults, "--format", "json").stdout)
    assert (found["ok"], found["exit_code"]) == (False, 2)
    (fault,) = found["recipes"][0]["faults"]
    assert (fault["line"], fault["column"], fault["key"], fault["rule"]) == (11, 12, "training.packing", "recipe")


def test_github(two_faults: str) -> None:
    (line,) = (line for line in run(two_faults, "--format", "github").stdout.splitlines() if line.startswith("::"))
    assert line == (
        "::error file=recipe with spaces.yaml,line=11,col=12,title=lorafit%3A recipe::"
        "training.packing: expected true or false, got 'yes, 100%25'"
    )


def test_junit(two_faults: str, written: Path, tiny_model: Path) -> None:
    suite = ElementTree.fromstring(run(two_faults, write(GOOD, tiny_model), "--format", "junit").stdout)
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failed, fine = suite.findall("testcase")
    failure = failed.find("failure")
    assert failure is not None
    assert "recipe with spaces.yaml:11:12: training.packing" in str(failure.get("message"))
    assert fine.find("failure") is None


def test_sarif(two_faults: str) -> None:
    log = json.loads(run(two_faults, "--format", "sarif").stdout)
    assert log["version"] == "2.1.0"
    (result,) = log["runs"][0]["results"]
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "recipe%20with%20spaces.yaml"
    assert place["region"] == {"startLine": 11, "startColumn": 12}
    assert result["ruleId"] in {rule["id"] for rule in log["runs"][0]["tool"]["driver"]["rules"]}


def test_an_unknown_format(two_faults: str) -> None:
    ran = run(two_faults, "--format", "yaml")
    assert ran.exit_code == 2
    assert "not one of text, json, github, junit, sarif" in ran.output


def test_a_tracker_that_is_only_missing_here_is_no_fault(written: Path, tiny_model: Path) -> None:
    file = write(added("training", "report_to: [dvclive]"), tiny_model)
    checked = Checker(Options()).check(file)
    assert checked.faults == ()
    assert "the package dvclive is not installed here" in checked.notes[0]
    assert run(file, "--here").exit_code == 2
    assert run(file, "--strict").exit_code == 2


def test_a_recipe_is_checked_once_however_it_is_named(written: Path, tiny_model: Path) -> None:
    file = write(GOOD, tiny_model)
    found = run(file, f"./{file}", str(written / file), "recipe*.yaml", "--json")
    assert [one["file"] for one in json.loads(found.output)["recipes"]] == [file]


def test_what_is_no_file_is_left_out_of_a_folder(written: Path, tiny_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "recipe.yaml").write_text("model: {}\n")
    for path in (str(tmp_path), str(tmp_path / "*.yaml")):
        assert "1 file: " in run(path).output


def test_a_fault_of_a_parent_is_shown_by_its_plain_path(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("base.yaml").write_text("lora:\n  r: 0\n")
    Path("recipes/own.yaml").write_text("extends: ../base.yaml\n")
    assert "::error file=base.yaml,line=2," in run(str(tmp_path / "recipes/own.yaml"), "--format", "github").output
    sarif = json.loads(run("recipes/own.yaml", "--format", "sarif").output)
    places = [result["locations"][0]["physicalLocation"] for result in sarif["runs"][0]["results"]]
    assert places[0]["artifactLocation"]["uri"] == "base.yaml"


def test_a_fault_of_the_command_line_is_in_no_file(written: Path, tiny_model: Path) -> None:
    arguments = (write(GOOD, tiny_model), "--set", "lora.r=0")
    assert "::error title=lorafit%3A recipe::lora.r: " in run(*arguments, "--format", "github").output
    assert json.loads(run(*arguments, "--format", "sarif").output)["runs"][0]["results"][0]["locations"] == []


def test_json_goes_with_no_other_format(written: Path, tiny_model: Path) -> None:
    assert run(write(GOOD, tiny_model), "--json", "--format", "junit").exit_code == 2
