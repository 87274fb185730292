"""Several processes: the same curve as one with the whole batch, one voice, and an orderly stop."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RecipeMaker, Train, write_jsonl
from rich.console import Console

from lorafit.engine.evaluate.run import evaluate
from lorafit.options import EvalOptions
from lorafit.run.directory import RunDir
from lorafit.run.memory import calibrate
from lorafit.text import GIB

QUIET = Console(file=io.StringIO())


def torchrun(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(
        [*command, "-m", "lorafit", "train", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_two_processes_learn_from_pairs_as_one_does(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    words = ["red", "green", "blue", "one", "two"]
    rows = [
        {"prompt": f"{one} {other}:", "chosen": f" {other}", "rejected": f" {one} no"}
        for one in words
        for other in words
    ]
    data = {"train": [{"path": str(write_jsonl(tmp_path / "pairs.jsonl", rows))}], "validation": 0.28}
    steps = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-3}
    each = [
        recipe(name, dataset=data, preference={}, training=steps | {"per_device_train_batch_size": size})
        for name, size in (("pairs-one", 4), ("pairs-two", 2))
    ]
    one = train(each[0])
    process = torchrun(str(each[1]))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    two = RunDir(one.path.parent / "pairs-two")
    for name in ("loss", "eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        curves = [[e[name] for e in run.metrics_until(99) if name in e] for run in (one, two)]
        assert curves[0]
        assert curves[1] == pytest.approx(curves[0], rel=1e-4, abs=1e-6), name


def test_two_processes_equal_one_with_twice_the_batch(recipe: RecipeMaker, train: Train, rows: Path) -> None:
    settings = {"dataset": {"train": [{"path": str(rows)}], "validation": 0.25}}
    one = train(recipe("one", **settings, training={"per_device_train_batch_size": 6, "max_steps": 6}))
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 10}
    path = recipe(
        "two",
        **settings,
        training={"per_device_train_batch_size": 3, "per_device_eval_batch_size": 2, "max_steps": 6, **saving}
        | {"metric_for_best_model": "heldout.loss"},
    )
    process = torchrun(str(path))
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    two = RunDir(one.path.parent / "two")
    curves = [[e["loss"] for e in run.metrics_until(99) if "loss" in e] for run in (one, two)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    validation = [[e["eval_loss"] for e in run.metrics_until(99) if "eval_loss" in e] for run in (one, two)]
    assert validation[1] == pytest.approx(validation[0], rel=1e-4)  # six rows, in uneven parts of 2 x 2
    manifests = [run.load_manifest() for run in (one, two)]
    for key in ("model", "data"):
        assert manifests[1][key] == manifests[0][key], key
    assert manifests[1]["result"]["steps"] == 6
    assert manifests[1]["result"]["best_metric"] == pytest.approx(min(validation[1]))
    [row] = calibrate([two.path]).rows
    assert row.measured == manifests[1]["memory"]["measured"]["resident"]
    told = [float(size) for size in re.findall(r"peak ([0-9.]+) GiB", errors)]
    assert max(told) <= row.measured / GIB + 0.051
    results, _ = evaluate(EvalOptions(two.path, overrides=("eval.forgetting=[]",), max_new_tokens=1))
    assert results.figures["heldout.loss.adapter"].value == pytest.approx(min(validation[1]), abs=1e-5)
    assert errors.count("tokens, ") == 1, "only the first process may speak"
    assert output.splitlines() == [str(two.adapter)]
    assert [e["step"] for e in two.metrics_until(99) if "loss" in e] == [1, 2, 3, 4, 5, 6]
    for checkpoint in two.checkpoints.iterdir():
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in checkpoint.iterdir()}, checkpoint.name


def test_sigterm_to_the_launcher_saves_a_checkpoint_that_resumes(recipe: RecipeMaker, tmp_path: Path) -> None:
    path = recipe(training={"max_steps": 100000, "save_strategy": "no"})
    run = RunDir(tmp_path / "runs" / "recipe")
    process = torchrun(str(path))
    while not (run.metrics.is_file() and run.metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    checkpoint = run.last_checkpoint()
    assert checkpoint is not None, errors
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= {f.name for f in checkpoint.iterdir()}
    assert errors.count("go on with --resume") == 1
