"""`lorafit verify`: a run's hashes, and its first steps once more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeMaker, Train, make_model
from typer.testing import CliRunner, Result
from wording import Like

from lorafit.cli import app
from lorafit.run.directory import RunDir


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its data and its model, trained once."""
    from conftest import conversation, write_jsonl
    from rich.console import Console

    from lorafit.engine.train import train as run_training
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe
    from lorafit.run.manifest import Start

    folder = tmp_path_factory.mktemp("verified")
    make_model(folder / "model")
    write_jsonl(folder / "rows.jsonl", [conversation(f"question {i}", "an answer") for i in range(24)])
    config = folder / "recipe.yaml"
    settings = ("training.eval_strategy=steps", "training.eval_steps=2")
    config.write_text(
        f"model: {{name_or_path: '{folder}/model', dtype: float32}}\n"
        "lora: {r: 4, lora_dropout: 0.2}\n"
        f"dataset: {{train: [{{path: '{folder}/rows.jsonl'}}], validation: 0.2}}\n"
        "training: {max_steps: 6, per_device_train_batch_size: 2, max_length: 64}\n"
        f"output_dir: '{folder}/run'\n"
    )
    plan = plan_recipe(Recipe.load(config, settings), config)
    run_training(plan, config.read_bytes(), Start(), Console(stderr=True))
    return folder


@pytest.fixture
def folder(trained: Path) -> Any:
    """The same, put back as it was afterwards."""
    kept = trained.with_name("kept")
    shutil.copytree(trained, kept)
    yield trained
    shutil.rmtree(trained)
    kept.rename(trained)


def verify(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["verify", str(folder / "run"), *options])


def status(folder: Path) -> dict[str, str]:
    report = json.loads(verify(folder, "--json").stdout)
    return {check["what"].removeprefix(f"{folder}/"): check["status"] for check in report["checks"]}


def test_a_run_is_what_its_manifest_says(trained: Path) -> None:
    found = verify(trained)
    assert found.exit_code == 0, found.output
    checks = status(trained)
    assert set(checks.values()) == {"ok"}
    assert {"recipe.yaml", "plan.json", "metrics.jsonl", "rows.jsonl", "adapter/adapter_model.safetensors"} <= set(
        checks
    )


@pytest.mark.parametrize(
    "name", ["run/recipe.yaml", "run/plan.json", "run/metrics.jsonl", "run/adapter/adapter_config.json", "rows.jsonl"]
)
def test_a_changed_byte_is_found(name: str, folder: Path) -> None:
    file = folder / name
    file.write_text(file.read_text() + " ")
    found = verify(folder)
    assert found.exit_code == 7
    assert f"{name.removeprefix('run/')} has changed" in found.stderr


def test_changed_weights_of_the_base_are_found(folder: Path) -> None:
    file = folder / "model/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    found = verify(folder)
    assert found.exit_code == 7
    assert found.stderr == Like("… model … changed … tensor")


def test_what_is_missing_is_found(folder: Path) -> None:
    (folder / "rows.jsonl").unlink()
    (folder / "run/adapter/tokenizer.json").unlink()
    found = verify(folder)
    assert found.exit_code == 7
    assert "rows.jsonl is missing" in found.stderr
    assert "adapter/tokenizer.json is missing" in found.stderr


def test_a_run_without_hashes(folder: Path) -> None:
    run = RunDir(folder / "run")
    manifest = run.load_manifest()
    del manifest["files"]
    run.write_manifest(manifest)
    assert verify(folder).exit_code == 7
    assert status(folder)["the run's own files"] == "not recorded"


def test_an_edited_figure_is_found(folder: Path) -> None:
    file = folder / "run/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["result"]["best_metric"] = 0.0
    file.write_text(json.dumps(manifest))
    assert verify(folder).exit_code == 7
    assert {what for what, found in status(folder).items() if found != "ok"} == {"manifest.json"}


def test_the_first_steps_repeat_exactly(folder: Path) -> None:
    """With dropout, and an evaluation between the steps; the run itself is left alone."""
    before = {file: file.read_bytes() for file in (folder / "run").rglob("*") if file.is_file()}
    found = verify(folder, "--retrain", "4", "--json")
    assert found.exit_code == 0, found.stderr
    again = json.loads(found.stdout)["retrained"]
    assert list(again["steps"]) == ["1", "2", "3", "4"]
    assert again["largest_difference"] == again["tolerance"] == 0
    assert {file: file.read_bytes() for file in (folder / "run").rglob("*") if file.is_file()} == before


def test_other_losses_are_found(folder: Path) -> None:
    metrics = folder / "run/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[1]["loss"] *= 1.01
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = verify(folder, "--retrain", "2")
    assert found.exit_code == 7
    assert found.stderr == Like("… trained again … differs … 0.0099")
    assert verify(folder, "--retrain", "2", "--tolerance", "0.1").stderr.count("differs") == 0


def test_a_broken_manifest_is_one_line(folder: Path) -> None:
    file = folder / "run/manifest.json"
    manifest = json.loads(file.read_text())
    for broken in (manifest | {"tokenizer": []}, manifest | {"data": {"files": 5}}, {}):
        file.write_text(json.dumps(broken))
        found = verify(folder)
        assert found.exit_code == 2
        assert len(found.stderr.splitlines()) == 1


def test_steps_that_do_not_come_again_are_a_difference(folder: Path) -> None:
    metrics = folder / "run/metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([*lines, json.dumps({"step": 7, "loss": 1.0})]) + "\n{torn")
    found = verify(folder, "--retrain", "7", "--json")
    assert found.exit_code == 7
    assert json.loads(found.stdout)["retrained"]["largest_difference"] is None


def test_what_is_no_finished_run_is_one_line(tmp_path: Path, recipe: RecipeMaker, train: Train) -> None:
    run = RunDir(tmp_path / "none")
    for path, message in ((run.path, "no such run"), (tmp_path, "not a run")):
        found = CliRunner().invoke(app, ["verify", str(path)])
        assert found.exit_code == 2
        assert message in found.stderr
