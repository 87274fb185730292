"""scripts/gpu_check runs from end to end without a GPU, and says of what needs one that it was not run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out of it"
    command = [sys.executable, str(ROOT / "scripts/gpu_check"), "--device", "cpu", "--tiny", "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    report = json.loads((out / "gpu_check.json").read_text())
    failed = {f"{one['stage']}: {one['name']}": one["reason"] for one in report["checks"] if one["status"] == "failed"}
    assert (failed, done.returncode) == ({}, 0), done.stderr
    stages = {one["stage"] for one in report["checks"]}
    assert stages == {"environment", "gpu tests", "correctness", "memory", "speed"}
    needing = {one["name"] for one in report["checks"] if one["status"] == "not run"}
    assert needing == {
        *("pytest -m gpu", "LoRA, bf16 weights", "LoRA, fp16 autocast", "flash attention", "NF4 of a GPU and of a CPU")
    }
    assert "not run: needs a CUDA GPU" in (out / "gpu_check.md").read_text()
    assert list(csv.DictReader((out / "memory.csv").open())) == [], "a CPU's memory is no GPU's"
    assert {file.name for file in out.iterdir()} == {"gpu_check.json", "gpu_check.md", "memory.csv"}


def test_a_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/gpu_check"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 2
    assert "nvidia-smi" in done.stderr
    assert not (tmp_path / "out").exists()
