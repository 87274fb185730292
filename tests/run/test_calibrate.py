"""What a run says about its memory, and how far off the prediction was."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeMaker, Train, make_model
from typer.testing import CliRunner
from wording import Like

from lorafit.cli import app
from lorafit.errors import ModelError
from lorafit.facts import read_facts
from lorafit.hardware import Hardware
from lorafit.memory import estimate, setup_of
from lorafit.plan import make_plan, plan_recipe
from lorafit.recipe import Recipe
from lorafit.run.memory import Foreseen, Shortage, shortage
from lorafit.text import GIB, MIB


def calibrate(*words: object) -> tuple[int, str, str]:
    command = ["estimate-vram", *(str(word) for word in words)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def manifest(folder: Path, memory: Any) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"memory": memory}))
    return folder


def on_gpu(allocated: int, reserved: int, told: int) -> dict[str, Any]:
    return {
        "device": "cuda",
        "predicted": {"allocated": told, "reserved": told, "method": "closed form"},
        "measured": {"allocated": allocated, "reserved": reserved},
        "baseline": 0,
    }


def test_a_training_records_both(recipe: RecipeMaker, train: Train) -> None:
    run = train(recipe())
    memory = run.load_manifest()["memory"]
    assert memory["device"] == "cpu"
    assert memory["measured"]["resident"] >= memory["baseline"] > 0
    assert memory["predicted"] is None or memory["predicted"]["allocated"] > 0
    assert ("reason" in memory) == (memory["predicted"] is None)
    assert memory["setup"]["batch"] == 4
    assert memory["setup"]["length"] < 128, "the longest row, as the audit counted it"
    assert 0 < memory["setup"]["supervised"] < 1
    assert calibrate("--calibrate", run.path)[0] == 0


@pytest.mark.parametrize(
    ("error", "reason"), [(ModelError("of a kind unknown"), "of a kind unknown"), (KeyError("x"), "KeyError: 'x'")]
)
def test_a_training_survives_a_failed_prediction(
    error: Exception, reason: str, recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("lorafit.memory.estimate", fail)
    run = train(recipe())
    assert run.result is not None
    memory = run.load_manifest()["memory"]
    assert memory["predicted"] is None
    assert memory["reason"] == reason
    code, out, _ = calibrate("--calibrate", run.path)
    assert code == 0
    assert f"nothing was predicted: {reason}" in out


def test_predicted_against_measured(tmp_path: Path) -> None:
    first = manifest(tmp_path / "first", on_gpu(100 << 20, 200 << 20, 110 << 20))
    cpu = {
        "device": "cpu",
        "predicted": {"allocated": 200, "reserved": 300, "method": "closed form"},
        "measured": {"resident": 1000},
        "baseline": 600,
    }
    second = manifest(tmp_path / "second", cpu)
    code, out, _ = calibrate("--calibrate", first, "--calibrate", second / "manifest.json", "--json")
    assert code == 0
    found = json.loads(out)
    errors = {row["quantity"]: row["error"] for row in found["runs"]}
    assert errors == pytest.approx({"allocated": 0.1, "reserved": -0.45, "resident": -0.1})
    assert found["summary"]["allocated"] == pytest.approx(
        {"runs": 1, "median_error": 0.1, "largest_error": 0.1, "bias": 0.1}
    )
    code, out, _ = calibrate("--calibrate", first, "--calibrate", second)
    assert code == 0
    assert "+10.0%" in out
    assert out == Like("… allocated: 1 run, median … 10.0%")


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        (None, "no memory figures"),
        ({"device": "cuda"}, "can't be read"),
        ({"device": "cuda", "predicted": {"allocated": "much"}, "measured": {}}, "can't be read"),
        ({"device": "cuda", "predicted": None, "measured": {}, "reason": "of a kind unknown"}, "of a kind unknown"),
        (on_gpu(0, 0, 5), "nothing was measured"),
    ],
)
def test_runs_without_figures_are_named(memory: Any, reason: str, tmp_path: Path) -> None:
    run = manifest(tmp_path / "run", memory)
    code, out, _ = calibrate("--calibrate", run)
    assert code == 0
    assert f"{run}: " in out.replace("\n", "")
    assert reason in out
    [skipped] = json.loads(calibrate("--calibrate", run, "--json")[1])["skipped"]
    assert skipped["run"] == str(run)


def test_paths_that_are_no_runs(tmp_path: Path) -> None:
    code, _, err = calibrate("--calibrate", tmp_path / "nowhere")
    assert code == 2
    assert err == f"{tmp_path / 'nowhere'}: no such run\n"
    code, out, _ = calibrate("--calibrate", tmp_path)
    assert code == 0
    assert "has no manifest" in out


def test_it_needs_no_recipe(tmp_path: Path, recipe: RecipeMaker) -> None:
    code, _, err = calibrate(recipe(), "--calibrate", tmp_path)
    assert code == 2
    assert "goes with --json alone" in err


# --- a machine whose memory is short --------------------------------------------------------------


@pytest.mark.parametrize(("free", "said"), [(100 * GIB, False), (200 * MIB, True), (1 * MIB, True)])
def test_short_memory_is_said_before_training_and_in_the_plan(
    free: int, said: bool, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned: list[bool] = []
    monkeypatch.setattr("lorafit.run.memory.available_memory", lambda: free)
    monkeypatch.setattr("lorafit.run.memory.held_memory", lambda: 0)
    monkeypatch.setattr("lorafit.engine.memory.return_memory", lambda: returned.append(True))
    path = recipe()
    plan = CliRunner().invoke(app, ["train", str(path), "--dry-run"], catch_exceptions=False)
    assert plan.exit_code == 0
    assert ("GiB are free" in plan.stderr) == said
    assert not returned
    trained = CliRunner().invoke(app, ["train", str(path)], catch_exceptions=False)
    assert trained.exit_code == 0, trained.stderr
    assert ("GiB are free" in trained.stderr) == said
    assert bool(returned) == said


def test_what_is_said_where_memory_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Enough with blocks returned at once; too little even so; in two processes."""
    values = {"model": {"name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "dtype": "float32"}, "lora": {}}
    values |= {"dataset": {"train": [{"path": "x.jsonl", "format": "text"}]}, "training": {"max_length": 512}}
    facts = read_facts("HuggingFaceTB/SmolLM2-135M-Instruct", None)
    here = Hardware("cpu", "a CPU", None, None, False)
    setup = setup_of(make_plan(Recipe.of(values, "test"), facts, here, read_data=False), facts)
    found = Foreseen(setup, estimate(setup))
    assert found.estimate is not None
    held, alive = found.estimate.total, found.estimate.total - found.estimate.reserved + found.estimate.allocated

    def told(free: int, own: int = 0, **changes: Any) -> Shortage | None:
        monkeypatch.setattr("lorafit.run.memory.available_memory", lambda: free)
        monkeypatch.setattr("lorafit.run.memory.held_memory", lambda: own)
        return shortage(replace(found, setup=replace(setup, **changes)))

    assert told(held) is None
    assert told(held - GIB, own=GIB) is None, "what this process holds is counted once"
    enough = told(round(alive * 1.1))
    assert enough is not None
    assert enough.least.served
    assert enough.least.total <= alive * 1.1
    short = told(GIB)
    assert short is not None
    assert not short.least.served
    assert "gradient_checkpointing" in short.line
    assert told(held + GIB, world=2) is not None
    one_row = told(GIB, checkpointing="non_reentrant", batch=1)
    assert one_row is None or "batch_size" not in one_row.line


def test_a_quantized_base_lets_go_of_its_file(recipe: RecipeMaker, tmp_path: Path) -> None:
    from lorafit.engine.model import load_base

    own = make_model(tmp_path / "own")  # other tests' models may be mapped still
    path = recipe(model={"name_or_path": str(own)}, quantization={"load_in_4bit": True})
    model = load_base(plan_recipe(Recipe.load(path), path, count_rows=False))
    embeddings = model.get_input_embeddings().weight
    assert (embeddings is model.get_output_embeddings().weight) == model.config.tie_word_embeddings
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert f"{own}/model.safetensors" not in maps.read_text()


def test_checkpointing_on_a_cpu_returns_memory_at_once(
    recipe: RecipeMaker, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there to save memory, and its short-lived blocks would leave holes."""
    returned: list[bool] = []
    monkeypatch.setattr("lorafit.engine.memory.return_memory", lambda: returned.append(True))
    train(recipe("usual"))
    assert not returned
    train(recipe("saving", training={"gradient_checkpointing": True}))
    assert returned


def test_a_training_is_the_same_where_memory_is_returned_at_once(
    recipe: RecipeMaker, train: Train, tmp_path: Path
) -> None:
    """In a process of its own: what is set stays set."""
    code = (
        "import sys, lorafit.run.memory as c\n"
        "c.available_memory = lambda: 1\n"
        "from lorafit.cli import app\napp(sys.argv[1:])\n"
    )
    short = ["train", str(recipe()), "--set", f"output_dir={tmp_path / 'short'}"]
    done = subprocess.run([sys.executable, "-c", code, *short], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "are free here" in done.stderr
    enough = train(recipe())
    weights = tmp_path / "short" / "adapter" / "adapter_model.safetensors"
    assert weights.read_bytes() == (enough.adapter / "adapter_model.safetensors").read_bytes()
