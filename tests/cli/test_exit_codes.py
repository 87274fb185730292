"""Every exit code of the table, from a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, write_jsonl

from lorafit.errors import EXIT_CODES

RECIPE = """\
model:
  name_or_path: Qwen/Qwen3-8B
quantization:
  load_in_4bit: true
lora: {}
dataset:
  train:
    - path: rows.jsonl
"""
COMMAND = [sys.executable, "-m", "lorafit"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "rows.jsonl", [conversation(f"question {i}", "an answer") for i in range(12)])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "other.yaml").write_text(RECIPE.replace("lora: {}", "lora: {r: 8}"))
    return tmp_path


def run(
    folder: Path, *arguments: str, command: list[str] = COMMAND, **options: Any
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False, **options
    )


LIGHT = {
    0: ["validate", "recipe.yaml"],
    2: ["validate", "recipe.yaml", "--set", "lora.rank=8"],
    3: ["validate", "recipe.yaml", "--set", "dataset.train.0.path=none.jsonl"],
    4: ["validate", "recipe.yaml", "--set", "model.name_or_path=./none"],
    5: ["validate", "recipe.yaml", "--set", "hardware={vram: 4GiB}"],
    7: ["diff", "recipe.yaml", "other.yaml"],
}


@pytest.mark.parametrize("code", LIGHT)
def test_codes_of_checks(code: int, folder: Path) -> None:
    done = run(folder, *LIGHT[code])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_a_bug_is_1_and_has_its_traceback(folder: Path) -> None:
    code = "import lorafit.cli.schema as docs; docs.json_schema = None; from lorafit.cli import main; main()"
    done = run(folder, "schema", command=[sys.executable, "-c", code])
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_loss_that_is_not_finite_is_6(folder: Path, tiny_model: Path) -> None:
    settings = ["quantization=null", f"model.name_or_path={tiny_model}", "training.learning_rate=1e30"]
    settings += ["training.max_length=64", "model.dtype=float32", "training.warmup_steps=0"]
    done = run(folder, "train", "recipe.yaml", *(word for setting in settings for word in ("--set", setting)))
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: signal.Signals, folder: Path) -> None:
    code = (
        "import time, lorafit.cli.schema as docs\n"
        "docs.json_schema = lambda: (print('at work', flush=True), time.sleep(60))\n"
        "from lorafit.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "schema"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in complaint


def test_the_table_is_covered() -> None:
    assert {*LIGHT, 1, 6, 130, 143} == set(EXIT_CODES)
