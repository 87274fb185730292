"""One figure, all its places: what is shown twice is the same, whatever the batch, the method and the packing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeMaker, Train, conversation, write_jsonl
from rich.console import Console

from lorafit.evaluate.make import evaluate
from lorafit.evaluate.options import Options as EvalOptions
from lorafit.plan import plan_recipe
from lorafit.preview import preview
from lorafit.recipe import Recipe
from lorafit.rundir import RunDir

QUIET = Console(file=io.StringIO())
NF4 = {"load_in_4bit": True}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"quantization": NF4},
    "full": {"lora": ...},
    "packed": {"training": {"packing": True}},
}
BATCHES = [("lora", 1), ("lora", 3), ("lora", 7), ("qlora", 3), ("full", 3), ("packed", 1), ("packed", 3)]


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Eight rows whose answers differ in length by far: means of batches are no mean over tokens."""
    answers = ["yes", "no", "the cat sat on a mat and saw one two three four red green blue dogs"]
    rows = [conversation(f"say {number} hello", answers[number % 3]) for number in range(8)]
    return write_jsonl(tmp_path / "unequal.jsonl", rows)


@pytest.mark.parametrize(("method", "batch"), BATCHES)
def test_the_validation_loss(recipe: RecipeMaker, train: Train, unequal: Path, method: str, batch: int) -> None:
    sections = dict(METHODS[method])
    training = {"per_device_eval_batch_size": batch, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    sections["training"] = sections.get("training", {}) | training | {"save_strategy": "steps", "save_steps": 1}
    run: RunDir = train(recipe(dataset={"validation": [{"path": str(unequal)}]}, **sections))
    curve = {entry["step"]: entry["eval_loss"] for entry in run.metrics_until(99) if "eval_loss" in entry}
    best = min(curve, key=lambda step: curve[step])
    result = run.load_manifest()["result"]
    assert (result["best_step"], result["best_validation_loss"]) == (best, curve[best])
    options = EvalOptions(run.path, overrides=("eval.forgetting=[]",), max_new_tokens=1)
    results, _ = evaluate(options, QUIET)
    name = list(results.models)[-1]
    assert results.figures[f"heldout.loss.{name}"].value == pytest.approx(curve[best], abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "packed"])
def test_tokens_rows_and_steps(recipe: RecipeMaker, train: Train, unequal: Path, method: str) -> None:
    path = recipe(dataset={"validation": [{"path": str(unequal)}]}, **METHODS[method])
    run: RunDir = train(path)
    plan, manifest = run.load_plan(), run.load_manifest()
    shown = preview(plan_recipe(Recipe.load(path), path), [], False, False, False, QUIET)
    assert plan.audit == manifest["data"]["audit"] == shown["audit"]
    assert plan.schedule is not None
    assert plan.schedule.total_steps == manifest["result"]["steps"] == shown["steps"]
    logged = [entry for entry in run.metrics_until(99) if "loss" in entry]
    assert len(logged) == plan.schedule.total_steps
    assert json.loads(run.plan_file.read_text())["model"]["trainable_parameters"] == plan.trainable_parameters
