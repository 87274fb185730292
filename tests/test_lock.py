"""`lorafit lock`, and runs that are held to a lock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import conversation, write_jsonl
from typer.testing import CliRunner, Result
from wording import Like

from lorafit.cli import app
from lorafit.files import file_digest, own_digest

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"


class Project:
    """A folder of its own with everything that a lock holds."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        shutil.copytree(model, folder / "model")
        rows = [conversation(f"question {i}", "an answer") for i in range(24)]
        write_jsonl(folder / "rows.jsonl", rows)
        write_jsonl(folder / "own.jsonl", rows[:3])
        (folder / "parent.yaml").write_text("lora:\n  r: 4\n  lora_dropout: 0.1\n")
        self.config = folder / "recipe.yaml"
        self.write()

    def write(self, **changes: Any) -> None:
        content: dict[str, Any] = {
            "extends": "parent.yaml",
            "model": {"name_or_path": "model", "dtype": "float32"},
            "dataset": {"train": [{"path": "rows.jsonl"}], "validation": 0.2},
            "training": {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 64, "learning_rate": 1e-2},
            "eval": {"sets": [{"name": "own", "path": "own.jsonl"}], "forgetting": []},
            "output_dir": "runs/locked",
        }
        for section, values in changes.items():
            content[section] = content[section] | values if isinstance(values, dict) else values
        self.config.write_text(yaml.safe_dump(content))

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    def drift(self) -> list[str]:
        """What `lock --check` lists, without the lock's name."""
        checked = self("lock", "--check", "recipe.yaml")
        if checked.exit_code == 0:
            return []
        assert checked.exit_code == 7, checked.output
        lines = checked.stderr.splitlines()
        assert "lorafit lock" in lines.pop()
        return [line.removeprefix("recipe.yaml.lock: ") for line in lines]

    def process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
        command = [sys.executable, "-m", "lorafit", *arguments]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    folder = tmp_path / "a project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Project(folder, tiny_model)


def edit(lock: Path, **changes: Any) -> None:
    """Change parts of a lock, and its digest with them."""
    content = json.loads(lock.read_text()) | changes
    lock.write_text(json.dumps(content | {"sha256": own_digest(content)}))


def flip(file: Path) -> None:
    """Change one byte near the end."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_a_lock_is_the_same_twice_and_holds_no_machine(project: Project) -> None:
    made = project("lock", "recipe.yaml")
    assert made.exit_code == 0, made.output
    assert made.stdout == "recipe.yaml.lock\n"
    first = Path("recipe.yaml.lock").read_bytes()
    assert project("lock", "recipe.yaml").exit_code == 0
    assert Path("recipe.yaml.lock").read_bytes() == first
    assert str(project.folder).encode() not in first
    content = json.loads(first)
    assert content["data"]["rows.jsonl"]["files"] == {"rows.jsonl": file_digest(Path("rows.jsonl"))}
    assert content["data"]["own.jsonl"]["files"] == {"own.jsonl": file_digest(Path("own.jsonl"))}
    assert content["tokenizer"]["tokenizer.json"] == file_digest(Path("model/tokenizer.json"))
    assert content["recipe"]["values"]["lora"]["r"] == 4
    assert {"lorafit", "torch", "peft", "python"} <= content["versions"].keys()
    assert project.drift() == []


def test_comments_and_order_are_no_drift(project: Project) -> None:
    project("lock", "recipe.yaml")
    Path("parent.yaml").write_text("# as before\nlora: {lora_dropout: 0.1, r: 4}\n")
    assert project.drift() == []


def edit_template(folder: Path) -> None:
    file = folder / "model" / "chat_template.jinja"
    file.write_text(file.read_text().replace("message", "massage", 1))


DRIFTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "data": (lambda folder: flip(folder / "rows.jsonl"), ["rows.jsonl: its bytes changed"]),
    "data that is gone": (lambda folder: (folder / "own.jsonl").unlink(), ["own.jsonl: is gone"]),
    "template": (
        edit_template,
        ["tokenizer chat_template.jinja: its bytes changed", "chat template: its text changed"],
    ),
    "tokenizer": (
        lambda folder: (folder / "model/tokenizer.json").open("a").write(" "),
        ["tokenizer tokenizer.json: its bytes changed"],
    ),
    "recipe": (
        lambda folder: (folder / "parent.yaml").write_text("lora:\n  r: 8\n  lora_dropout: 0.1\n"),
        ["lora.r: locked 4, now 8"],
    ),
}


@pytest.mark.parametrize("what", DRIFTS)
def test_a_changed_byte_is_caught_by_name(what: str, project: Project) -> None:
    change, expected = DRIFTS[what]
    project("lock", "recipe.yaml")
    change(project.folder)
    assert project.drift() == expected


def test_changed_weights_are_caught_by_name(project: Project) -> None:
    project("lock", "recipe.yaml")
    flip(project.folder / "model/model.safetensors")
    assert project.drift() == [Like("model: model.safetensors: … bytes")]


def test_other_versions_are_drift(project: Project) -> None:
    project("lock", "recipe.yaml")
    file = Path("recipe.yaml.lock")
    versions = json.loads(file.read_text())["versions"]
    before = versions["peft"]
    edit(file, versions=versions | {"peft": "0.0.1"})
    assert project.drift() == [f"peft: locked 0.0.1, now {before}"]


def test_the_template_of_the_recipe_counts(project: Project) -> None:
    Path("own.jinja").write_text(TEMPLATE)
    project.write(model={"name_or_path": "model", "chat_template": "own.jinja"})
    project("lock", "recipe.yaml")
    flip(project.folder / "own.jinja")
    assert project.drift() == [Like("chat template: … text")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "`lorafit lock`"),
        ("{", "can't be read"),
        ("", "can't be read"),
        ("[]", "version 2"),
        ('{"lock_version": 9}', "(lock_version: 9)"),
        ('{"lock_version": 2, "recipe": []}', "no lock: recipe"),
        ("[" * 100_000, "can't be read"),
    ],
)
def test_broken_locks_are_one_line(content: str | None, message: str, project: Project) -> None:
    if content is not None:
        Path("recipe.yaml.lock").write_text(content)
    checked = project("lock", "--check", "recipe.yaml")
    assert checked.exit_code == 2
    assert message in checked.stderr
    assert len(checked.stderr.splitlines()) == 1


def test_a_lock_that_was_edited_is_none(project: Project) -> None:
    project("lock", "recipe.yaml")
    file = Path("recipe.yaml.lock")
    file.write_text(file.read_text().replace('"learning_rate": 0.01', '"learning_rate": 0.02'))
    checked = project("lock", "--check", "recipe.yaml")
    assert checked.exit_code == 2
    assert "was edited" in checked.stderr


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("data", {"rows.jsonl": 5}),
        ("data", {"rows.jsonl": {"files": []}}),
        ("model", {"files": "x"}),
        ("tokenizer", {"a": 1}),
        ("versions", {"torch": None}),
        ("date", 5),
        ("chat_template", {}),
    ],
)
def test_parts_of_another_kind_are_one_line(part: str, value: Any, project: Project) -> None:
    project("lock", "recipe.yaml")
    file = Path("recipe.yaml.lock")
    edit(file, **{part: value})
    checked = project("lock", "--check", "recipe.yaml")
    assert checked.exit_code == 2
    assert "is no lock" in checked.stderr
    assert len(checked.stderr.splitlines()) == 1


def test_the_day_that_a_template_writes_is_the_locks(project: Project) -> None:
    template = project.folder / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    assert project("lock", "recipe.yaml").exit_code == 0
    file = Path("recipe.yaml.lock")
    content = json.loads(file.read_text())
    assert content["date"] is not None
    edit(file, date="2001-02-03")
    assert project.drift() == []
    plan = json.loads(project("train", "recipe.yaml", "--locked", "--dry-run", "--json").stdout)
    assert plan["data"]["date"] == "2001-02-03"


def test_a_folder_in_the_place_of_the_lock(project: Project) -> None:
    Path("recipe.yaml.lock").mkdir()
    assert project("lock", "--check", "recipe.yaml").exit_code == 2
    made = project("lock", "recipe.yaml")
    assert made.exit_code == 2
    assert "is a folder" in made.stderr


def test_what_is_missing_is_not_locked(project: Project) -> None:
    Path("rows.jsonl").unlink()
    made = project("lock", "recipe.yaml")
    assert made.exit_code == 3
    assert "rows.jsonl: " in made.stderr
    for model in ("./elsewhere", "elsewhere.gguf"):
        project.write(model={"name_or_path": model})
        assert project("lock", "recipe.yaml").exit_code == 4
    assert not Path("recipe.yaml.lock").exists()


def test_a_new_lock_says_what_it_changes(project: Project) -> None:
    project("lock", "recipe.yaml")
    project.write(training={"max_steps": 5, "learning_rate": 1e-3})
    made = project("lock", "recipe.yaml", "--json")
    assert "training.learning_rate: locked 0.01, now 0.001" in json.loads(made.stdout)["changed"]


def test_two_processes_from_one_lock_make_the_same_adapter(project: Project) -> None:
    """Bit for bit; the run keeps its lock, and is held to it later."""
    assert project("lock", "recipe.yaml").exit_code == 0
    hashes = []
    for _ in range(2):
        done = project.process("train", "recipe.yaml", "--locked", "--overwrite")
        assert done.returncode == 0, done.stderr
        adapter = project.folder / "runs/locked/adapter"
        hashes.append({file.name: file_digest(file) for file in adapter.glob("adapter_*")})
    assert hashes[0] == hashes[1]
    assert "adapter_model.safetensors" in hashes[0]
    kept = project.folder / "runs/locked/recipe.lock"
    assert kept.read_bytes() == Path("recipe.yaml.lock").read_bytes()
    manifest = json.loads((project.folder / "runs/locked/manifest.json").read_text())
    assert manifest["files"]["recipe.lock"] == file_digest(kept)

    flip(project.folder / "own.jsonl")
    for command in (["train", "recipe.yaml", "--overwrite"], ["eval", "runs/locked"], ["merge", "runs/locked"]):
        refused = project(*command, "--locked")
        assert refused.exit_code == 7, refused.output
        assert "own.jsonl: its bytes changed" in refused.stderr
    assert not (project.folder / "runs/locked/eval").exists()


def test_overrides_are_drift(project: Project) -> None:
    project("lock", "recipe.yaml")
    refused = project("train", "recipe.yaml", "--locked", "--set", "training.seed=7", "--dry-run")
    assert refused.exit_code == 7
    assert "training.seed: locked 42, now 7" in refused.stderr
    assert project("train", "recipe.yaml", "--locked", "--dry-run").exit_code == 0


def test_a_run_without_a_lock_is_held_to_none(project: Project) -> None:
    (project.folder / "runs/locked").mkdir(parents=True)
    refused = project("eval", "runs/locked", "--locked")
    assert refused.exit_code == 2
    assert "--locked" in refused.stderr
