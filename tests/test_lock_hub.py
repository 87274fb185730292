"""Locks of hub models and data sets, from the client's cache: no hub is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorafit.cli import app
from lorafit.facts import hub_unreachable

OLD, NEW = "a" * 40, "b" * 40
RECIPE = """\
model: {name_or_path: owner/name, dtype: float32}
lora: {r: 4}
dataset: {train: [{path: owner/rows, format: messages}]}
training: {max_length: 64}
"""


@pytest.fixture
def cache(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A client's cache with a model and the commit of a data set; the recipe is in the working directory."""
    import huggingface_hub.constants

    folder = tmp_path / "hub"
    shutil.copytree(tiny_model, folder / "models--owner--name" / "snapshots" / OLD)
    for name in ("models--owner--name", "datasets--owner--rows"):
        point(folder / name, OLD)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    hub_unreachable.cache_clear()
    yield folder
    hub_unreachable.cache_clear()


def point(repository: Path, commit: str) -> None:
    """Have main be at a commit."""
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments])


def test_commits_are_locked(cache: Path) -> None:
    made = run("lock", "recipe.yaml")
    assert made.exit_code == 0, made.output
    content = json.loads(Path("recipe.yaml.lock").read_text())
    assert content["model"] == {"name": "owner/name", "commit": OLD}
    assert content["data"] == {"owner/rows": {"commit": OLD}}
    assert run("lock", "--check", "recipe.yaml").exit_code == 0


def test_a_branch_that_moves_changes_nothing(cache: Path) -> None:
    """The plan of a locked run names the locked commits."""
    run("lock", "recipe.yaml")
    for repository in cache.iterdir():
        point(repository, NEW)
    assert run("lock", "--check", "recipe.yaml").exit_code == 0
    planned = run("train", "recipe.yaml", "--locked", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["model_kwargs"]["revision"] == OLD
    assert plan["data"]["train"][0]["hub"]["revision"] == OLD


def test_another_revision_is_drift(cache: Path) -> None:
    run("lock", "recipe.yaml")
    Path("recipe.yaml").write_text(RECIPE.replace("owner/name,", f"owner/name, revision: {NEW},"))
    checked = run("lock", "--check", "recipe.yaml")
    assert checked.exit_code == 7
    assert f'model.revision: locked null, now "{NEW}"' in checked.stderr
    assert f"model: locked commit {OLD}, now {NEW}" in checked.stderr


@pytest.mark.parametrize(("name", "code"), [("models--owner--name", 4), ("datasets--owner--rows", 3)])
def test_a_commit_that_cannot_be_told_is_one_line(name: str, code: int, cache: Path) -> None:
    (cache / name / "refs" / "main").unlink()
    made = run("lock", "recipe.yaml")
    assert made.exit_code == code
    assert len(made.stderr.splitlines()) == 1
    assert not Path("recipe.yaml.lock").exists()


def test_a_named_commit_needs_no_cache(cache: Path) -> None:
    shutil.rmtree(cache / "datasets--owner--rows")
    Path("recipe.yaml").write_text(RECIPE.replace("owner/rows,", f"owner/rows, revision: {NEW},"))
    assert run("lock", "recipe.yaml").exit_code == 0
    assert json.loads(Path("recipe.yaml.lock").read_text())["data"] == {f"owner/rows@{NEW}": {"commit": NEW}}
