"""The pipeline of docs/ci.md and the steps of action.yml, run command by command in a repository of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import conversation, write_jsonl
from typer.testing import CliRunner

from lorafit.cli import app

ROOT = Path(__file__).parents[2]
RECIPE = """\
model:
  name_or_path: {model}
  dtype: float32
lora:
  r: 4
dataset:
  train:
    - path: data/train.jsonl
  validation: 0.2
training:
  max_length: 64
  max_steps: 2
  learning_rate: 1e-4
  per_device_train_batch_size: 2
  global_batch_size: 2
hardware:
  gpu: RTX 4090
eval:
  forgetting: []
  limit: 2
  max_new_tokens: 4
  gates:
    - heldout.loss.adapter <= 20
merge:
  rows: 4
output_dir: runs/support
"""


HEAVY = ("smoke", "train", "eval", "merge")
"""Commands that take seconds to import, so they run in this process where a line is nothing but one of them."""


class Project:
    """A repository with a recipe on main, and a branch that changes it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder / "a project"
        self.tools = folder / "tools"
        (self.folder / "configs").mkdir(parents=True)
        (self.folder / "data").mkdir()
        self.tools.mkdir()
        write_jsonl(self.folder / "data/train.jsonl", [conversation(f"question {i}", "an answer") for i in range(30)])
        self.recipe = self.folder / "configs/support.yaml"
        self.recipe.write_text(RECIPE.format(model=model))
        (self.folder / ".gitignore").write_text("runs/\n")
        gh = self.tools / "gh"
        gh.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> "{self.tools}/gh.log"\n')
        gh.chmod(0o755)
        self.git("init", "-q", "-b", "main")
        self.git("add", ".")
        self.git("commit", "-qm", "A recipe")
        self.base = self.git("rev-parse", "HEAD").strip()
        self.git("switch", "-qc", "faster")
        self.recipe.write_text(RECIPE.format(model=model).replace("1e-4", "5e-4"))
        self.sh("lorafit lock configs/support.yaml")
        self.sh("lorafit smoke --record configs/support.yaml")
        self.git("add", ".")
        self.git("commit", "-qm", "A higher learning rate")

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join((str(self.tools), str(Path(sys.executable).parent), os.environ["PATH"]))
        who = {f"GIT_{who}_{what}": "you" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        own = {"XDG_CACHE_HOME": str(self.tools / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return os.environ | {"PATH": path, "RUNNER_TEMP": str(self.tools)} | who | own

    def git(self, *arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True
        ).stdout

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """As a runner does it."""
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(
            shell, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, check=False
        )

    def sh(self, script: str, **environment: str) -> str:
        words = script.split()
        if words[0] == "lorafit" and words[1] in HEAVY:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(self.folder)
                patch.setenv("XDG_CACHE_HOME", self.environment["XDG_CACHE_HOME"])
                ran = CliRunner().invoke(app, words[1:])
            assert ran.exit_code == 0, f"{script}\n{ran.output}"
            return ran.stdout
        done = self.run(script, **environment)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def commented(self) -> str:
        return (self.tools / "gh.log").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Project:
    return Project(tmp_path_factory.mktemp("ci"), tiny_model)


def steps(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_every_command_of_the_pipeline(project: Project) -> None:
    page = (ROOT / "docs/ci.md").read_text()
    pipeline = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])
    commands = [*steps(pipeline["jobs"]["check"]), *steps(pipeline["jobs"]["train"])]
    assert commands.pop(0) == "pip install lorafit"
    for command in commands:
        project.sh(command, BASE=project.base, NUMBER="7")
    for name in ("validate", "diff", "lock", "smoke", "estimate-vram", "train", "verify", "eval", "merge"):
        assert any(f"lorafit {name} " in command for command in commands)
    assert (project.folder / "runs/support/merged/model.safetensors").is_file()
    assert project.git("status", "--porcelain").split() == ["??", "diff.md"]
    assert "0.0005" in (project.folder / "diff.md").read_text()
    assert "--body-file\ndiff.md" in project.commented()


class TestTheAction:
    ACTION = yaml.safe_load((ROOT / "action.yml").read_text())

    def step(self, name: str) -> str:
        return str(next(step["run"] for step in self.ACTION["runs"]["steps"] if step.get("name") == name))

    def outputs(self, project: Project, base: str) -> dict[str, str]:
        files = {name: project.tools / name for name in ("summary", "output")}
        for file in files.values():
            file.write_text("")
        where = {"GITHUB_STEP_SUMMARY": str(files["summary"]), "GITHUB_OUTPUT": str(files["output"])}
        project.sh(self.step("Compare"), RECIPES="configs", BASE=base, **where)
        lines = (line.partition("=") for line in files["output"].read_text().splitlines())
        return {key: value for key, _, value in lines} | {"summary": files["summary"].read_text()}

    def test_faults_are_annotated(self, project: Project) -> None:
        project.sh(self.step("Validate"), RECIPES="configs", OPTIONS="--strict --skip memory")
        wrong = project.run(self.step("Validate"), RECIPES="configs", OPTIONS="--set lora.rank=8")
        assert wrong.returncode == 2
        assert "::error " in wrong.stdout

    def test_a_change_is_reported_and_commented(self, project: Project) -> None:
        found = self.outputs(project, project.base)
        assert found["changed"] == "true"
        assert "0.0005" in found["summary"]
        where = {"REPORT": found["report"], "PULL_REQUEST": "7", "GITHUB_REPOSITORY": "you/yours"}
        project.sh(self.step("Comment"), **where)
        assert f"--body-file\n{found['report']}" in project.commented()

    def test_no_change_is_none(self, project: Project) -> None:
        assert self.outputs(project, "HEAD")["changed"] == "false"

    def test_drift_stops_it(self, project: Project) -> None:
        project.sh(self.step("Locks"), RECIPES="configs/support.yaml")
        rows = project.folder / "data/train.jsonl"
        before = rows.read_text()
        rows.write_text(before.replace("question 3", "question 4"))
        drifted = project.run(self.step("Locks"), RECIPES="configs/support.yaml")
        rows.write_text(before)
        assert drifted.returncode == 7
        assert "data/train.jsonl" in drifted.stderr

    def test_what_is_read_is_declared(self) -> None:
        text = (ROOT / "action.yml").read_text()
        asked = {part.split("}}")[0].strip() for part in text.split("inputs.")[1:]}
        names = {name.split()[0].rstrip("'") for name in asked}
        assert names == set(self.ACTION["inputs"])


def test_the_hooks_run_validate(project: Project) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert {hook["entry"] for hook in hooks} == {"lorafit validate"}
    for hook in hooks:
        assert json.loads(project.sh(f"{hook['entry']} configs/support.yaml --json"))["ok"]
