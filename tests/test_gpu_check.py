"""scripts/gpu_check runs from end to end without a GPU, and says of what needs one that it was not run."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from lorafit.facts import read_facts
from lorafit.hardware import Hardware
from lorafit.memory import estimate, setup_of
from lorafit.plan import make_plan
from lorafit.recipe import Recipe

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
        *("pytest -m gpu", "LoRA, bf16 weights", "LoRA, fp16 autocast", "flash attention", "NF4 of a GPU and of a CPU"),
        "Qwen3-0.6B (2 layers), lora, use_kernels",
    }
    assert "not run: needs a CUDA GPU" in (out / "gpu_check.md").read_text()
    assert list(csv.DictReader((out / "memory.csv").open())) == [], "a CPU's memory is no GPU's"
    assert {file.name for file in out.iterdir()} == {"gpu_check.json", "gpu_check.md", "memory.csv"}


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    """A file of somebody else's, a folder that can't be made, a stage that isn't there: a line, and nothing done."""
    command = [sys.executable, str(ROOT / "scripts/gpu_check"), "--device", "cpu", "--tiny", "-o"]
    (tmp_path / "gpu_check.md").write_text("my own notes\n")
    for words in ((str(tmp_path),), (str(tmp_path / "gpu_check.md"),), (str(tmp_path / "new"), "--stage", "nope")):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["gpu_check.md"]
    assert (tmp_path / "gpu_check.md").read_text() == "my own notes\n"


def test_a_machine_without_a_gpu_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/gpu_check"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 2
    assert "nvidia-smi" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "dora", "qlora", "int8", "full"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_measured_row_is_read_as_the_plan_that_ran(
    method: str, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/validate_vram.py makes of a row what the recipe that was measured makes of a card."""
    gpu_check, validate_vram = loaded("gpu_check"), loaded("validate_vram.py")
    setting = gpu_check.Setting(gpu_check.B1, 16, method, packing=packing, optimizer="paged_adamw_8bit")
    check = gpu_check.Check(tmp_path, "cuda", tiny=True, quick=False)
    sections = setting.sections()
    sections["model"]["name_or_path"] = setting.shape
    file = check.recipe("asked", **sections, dataset={"validation": None})
    card = Hardware("cuda", "NVIDIA A100-SXM4-80GB", 80 << 30, (8, 0), True)
    plan = make_plan(Recipe.load(file), read_facts(setting.shape), card, read_data=False)
    ran = setup_of(plan, read_facts(setting.shape))
    figures = {"setting": dataclasses.asdict(setting), "measured": {"allocated": 7 << 30, "reserved": 8 << 30}}
    check.results.append(gpu_check.Result("memory", setting.name, "passed", 1.0, figures=figures))
    versions = dict.fromkeys(("torch", "transformers", "trl", "peft"), "1")
    (row,) = gpu_check.csv_rows(check, versions | {"name": "NVIDIA A100-80GB"})
    case = validate_vram.case_of({name: str(value) for name, value in row.items()})
    assert case.measured == 7 << 30
    assert case.also == {"reserved": 8 << 30}
    named = ("batch", "length", "dtype", "adapter_dtype", "optimizer", "checkpointing", "attention", "masked", "packed")
    assert {name: getattr(case.setup, name) for name in named} == {name: getattr(ran, name) for name in named}
    (as_read, as_ran) = (estimate(setup).allocated for setup in (case.setup, ran))
    assert as_read == as_ran


def loaded(name: str) -> Any:
    """A script as a module."""
    loader = SourceFileLoader(name.partition(".")[0], str(ROOT / "scripts" / name))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = module_from_spec(spec)
    loader.exec_module(module)
    return module
