"""The light commands run where torch, and what stands on it, can't be imported: on every shipped recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LOCAL = "models/SmolLM2-135M-Instruct"
"""The base of the quickstart, which scripts/prepare_demo_model puts here; no part of the checkout."""

PROGRAM = """
import importlib.abc, importlib.machinery, json, sys

class Blocked(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"}
    def find_spec(self, name, path=None, target=None):
        if name not in self.heavy:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)  # files beside it may be read
        if spec is not None:
            spec.loader = self
        return spec
    def exec_module(self, module):
        raise AssertionError(f"{module.__name__} is imported")

sys.meta_path.insert(0, Blocked())
from typer.testing import CliRunner
from lorafit.cli import app

ran = []
for words in json.load(sys.stdin):
    done = CliRunner().invoke(app, words)
    failure = repr(done.exception) if done.exit_code == 1 else done.stderr
    ran.append([" ".join(words), done.exit_code, done.stdout[:200], failure])
unwanted = {"lorafit.recipe", "rich", "pyarrow", "matplotlib"} & set(sys.modules)
print(json.dumps([ran, sorted(unwanted)]))
"""


def run(
    commands: list[list[str]], folder: Path, **environment: str
) -> tuple[dict[str, int], dict[str, str], list[str]]:
    """Run commands in one process. Returns their exit codes, what each printed first, and large modules imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(commands),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ran: list[Any]
    ran, unwanted = json.loads(done.stdout)
    failed = [f"{words}: {code}: {failure}" for words, code, _, failure in ran if code == 1]
    assert not failed, "\n".join(failed)
    return {one[0]: one[1] for one in ran}, {one[0]: one[2] for one in ran}, unwanted


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the shipped recipes need of a checkout, so that a command may write."""
    for name in ("configs", "recipes", "data"):
        shutil.copytree(ROOT / name, tmp_path / name)
    if (ROOT / "models").is_dir():
        (tmp_path / "models").symlink_to((ROOT / "models").resolve())
    return tmp_path


def test_every_command_on_every_recipe(checkout: Path) -> None:
    has_local = (checkout / LOCAL).is_dir()
    commands, locks = [], []
    for config in CONFIGS:
        recipe, is_local = f"configs/{config.name}", LOCAL in config.read_text()
        bundled = ["--set", "model.name_or_path=HuggingFaceTB/SmolLM2-135M-Instruct"]
        model = bundled if is_local and not has_local else []
        commands.append(["diff", recipe, recipe])
        commands += [[name, recipe, *model] for name in ("validate", "explain", "estimate-vram")]
        commands.append(["train", recipe, "--dry-run", "--json", *model])
        locks.append((["lock", recipe, *model], 0 if is_local and has_local else 4))  # commits can't be had offline
    codes, _, unwanted = run([*commands, *(words for words, _ in locks)], checkout)
    expected = {" ".join(words): 0 for words in commands} | {" ".join(words): code for words, code in locks}
    assert codes == expected
    assert not {"pyarrow", "matplotlib"} & set(unwanted)


def test_every_help_is_quick_to_have(checkout: Path) -> None:
    """Neither the recipe's types nor what draws tables are loaded for it."""
    from lorafit.cli import COMMANDS

    names = [name for group in COMMANDS.values() for name in group]
    codes, said, unwanted = run([["--help"], *([name, "--help"] for name in names)], checkout)
    assert set(codes.values()) == {0}
    assert all(f" {name} [OPTIONS]" in said[f"{name} --help"] for name in names)
    assert unwanted == []


def test_recipes_are_written(checkout: Path) -> None:
    (checkout / "other.yml").write_text("model_name_or_path: Qwen/Qwen3-8B\ndataset_name: a/b\nuse_peft: true\n")
    ours = ["--model", "Qwen/Qwen3-8B", "--data", "data/quickstart/train.jsonl", "--gpu", "RTX 4090"]
    codes, said, _ = run(
        [["schema"], ["init", "one.yaml", *ours], ["init", "two.yaml", "--from", "other.yml"]], checkout
    )
    assert set(codes.values()) == {0}, codes
    assert said["schema"].startswith("{")
    assert (checkout / "one.yaml").is_file()


def test_completion(checkout: Path) -> None:
    program = PROGRAM.partition("from typer")[0] + (
        "sys.argv[0] = 'lorafit'\nfrom lorafit.cli import main\ntry:\n    main()\nfinally:\n"
        "    assert not {'rich', 'huggingface_hub'} & set(sys.modules)"
    )
    for words, offered in (("lorafit\ntrain\nconfigs/", "configs/"), ("lorafit\ntrain\nx\n--set\nlora.", "lora.r=")):
        environment = {
            "_LORAFIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count("\n")),
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=checkout,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert offered in done.stdout
