"""The command line: exit codes, one clear line for each mistake, machine-readable output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeMaker, conversation, write_jsonl
from typer.testing import CliRunner
from wording import Like

from lorafit import __version__
from lorafit import plan as lorafit_plan
from lorafit.cli import app
from lorafit.errors import (
    EXIT_CODES,
    DataError,
    DoesNotFitError,
    GateError,
    Interrupted,
    LorafitError,
    ModelError,
    UsageError,
)
from lorafit.files import LOCK
from lorafit.recipe import RecipeError

ROOT = Path(__file__).resolve().parents[2]


def lorafit(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_every_exit_code_is_documented() -> None:
    errors = (LorafitError, UsageError, RecipeError, DataError, ModelError, DoesNotFitError, GateError)
    assert {error.exit_code for error in errors} | {0, 7, 130, 143} == set(EXIT_CODES)
    page = (ROOT / "docs" / "commands.md").read_text()
    assert all(f"| {code} | {meaning} |" in page for code, meaning in EXIT_CODES.items())
    assert Interrupted("", 2).signal_number == 2


def test_a_whole_story(recipe: RecipeMaker, rows: Path, tmp_path: Path) -> None:
    path = recipe(dataset={"train": [{"path": str(rows)}], "validation": 0.25})
    code, plan, _ = lorafit("train", path, "--dry-run", "--json")
    assert code == 0
    assert json.loads(plan)["schedule"]["total_steps"] == 4
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"
    code, result, said = lorafit("train", path, "--json")
    assert code == 0, said
    assert json.loads(result)["steps"] == 4
    run = json.loads(result)["run"]
    assert "18 training rows, " in said
    code, report, _ = lorafit("eval", run, "--json", "--max-new-tokens", 4)
    assert code == 0
    assert set(json.loads(report)["models"]) == {"base", "adapter"}
    code, merged, _ = lorafit("merge", run, "--json")
    assert code == 0
    assert Path(json.loads(merged)["merged"]).is_dir()
    code, estimate, _ = lorafit("estimate-vram", path, "--json")
    assert code == 0
    assert json.loads(estimate)["total"] > 0
    code, calibration, _ = lorafit("estimate-vram", "--calibrate", run, "--json")
    assert code == 0
    assert json.loads(calibration)["runs"] or json.loads(calibration)["skipped"]


def test_the_tables_for_people(recipe: RecipeMaker, rows: Path) -> None:
    path = recipe(dataset={"train": [{"path": str(rows)}], "validation": 0.25})
    code, plan, _ = lorafit("train", path, "--dry-run")
    assert code == 0
    assert "24 rows" in plan
    assert "because" in plan
    code, memory, _ = lorafit("estimate-vram", path)
    assert code == 0
    assert " GiB " in memory.splitlines()[0]
    assert "does not fit" in lorafit("estimate-vram", path, "--vram", "1MiB")[1]


class TestMistakes:
    def test_a_recipe_with_several(self, recipe: RecipeMaker) -> None:
        path = recipe(lora={"lora_alpah": 3}, training={"learning_rate": "fast"})
        code, out, err = lorafit("train", path)
        assert code == 2
        assert out == ""
        lines = err.strip().splitlines()
        assert len(lines) == 2
        assert all(line.startswith(f"{path}:") for line in lines)
        assert "did you mean 'lora_alpha'?" in err

    @pytest.mark.parametrize("command", ["train", "estimate-vram"])
    def test_a_missing_file(self, command: str, tmp_path: Path) -> None:
        code, _, err = lorafit(command, tmp_path / "no such recipe.yaml")
        assert code == 2
        assert "no such recipe.yaml" in err
        assert len(err.strip().splitlines()) == 1

    def test_set_is_checked_like_the_file(self, recipe: RecipeMaker) -> None:
        code, _, err = lorafit("train", recipe(), "--set", "training.learning_rat=1")
        assert code == 2
        assert err.startswith("--set training.learning_rat=1: training.learning_rat: unknown key")

    def test_a_row_without_its_column(self, recipe: RecipeMaker, tmp_path: Path) -> None:
        data = write_jsonl(
            tmp_path / "data.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "response": "b"}]
        )
        code, _, err = lorafit("train", recipe(dataset={"train": [{"path": str(data)}]}))
        assert code == 3
        assert err == Like(f"… {data}:2: 'output' … missing … instruction, response")

    @pytest.mark.parametrize(("content", "code"), [("", 3), ("{", 3), ("[]\n", 3)])
    def test_a_bad_data_file(self, content: str, code: int, recipe: RecipeMaker, tmp_path: Path) -> None:
        data = tmp_path / "my data.jsonl"
        data.write_text(content)
        got, _, err = lorafit("train", recipe(dataset={"train": [{"path": str(data)}]}))
        assert got == code
        assert str(data) in err
        assert len(err.strip().splitlines()) == 1

    def test_a_model_that_is_not_there(self, recipe: RecipeMaker) -> None:
        code, _, err = lorafit("train", recipe(model={"name_or_path": "./nowhere"}))
        assert code == 4
        assert "./nowhere: no such folder" in err

    def test_a_hub_model_offline(self, recipe: RecipeMaker) -> None:
        code, _, err = lorafit("train", recipe(model={"name_or_path": "someone/some-model"}))
        assert code == 4
        assert "someone/some-model" in err
        assert "HF_HUB_OFFLINE is set" in err
        assert len(err.strip().splitlines()) == 1

    def test_a_hub_data_set_offline(self, recipe: RecipeMaker) -> None:
        code, _, err = lorafit("train", recipe(dataset={"train": [{"path": "someone/some-data"}]}))
        assert code == 3
        assert err.strip().splitlines()[-1].startswith("someone/some-data: ")

    def test_commands_on_what_is_no_run(self, tmp_path: Path) -> None:
        for command in ("eval", "merge"):
            code, _, err = lorafit(command, tmp_path)
            assert code == 2
            assert "run directory" in err

    def test_a_bug_keeps_its_traceback(self, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lorafit.plan.plan_recipe", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lorafit("train", recipe(), "--dry-run")

    def test_resume_and_overwrite_exclude_each_other(self, recipe: RecipeMaker) -> None:
        assert lorafit("train", recipe(), "--resume", "--overwrite")[0] == 2

    def test_a_full_disk(self, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise RuntimeError("writing failed") from OSError(28, "No space left on device")

        monkeypatch.setattr("lorafit.run.directory.RunDir.begin", full)
        code, _, err = lorafit("train", recipe())
        assert code == 5
        assert "disk is full" in err

    @pytest.mark.parametrize(
        "error", [MemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=["py", "cpp"]
    )
    @pytest.mark.parametrize("where", ["train.prepare", "methods.sft.build"])
    def test_too_little_memory_outside_the_steps(
        self, where: str, error: Exception, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def big(*_: object) -> None:
            raise error

        monkeypatch.setattr(f"lorafit.engine.{where}", big)
        code, _, err = lorafit("train", recipe())
        assert code == 5
        assert "out of memory" in err

    def test_paths_that_can_not_be(self, recipe: RecipeMaker, tmp_path: Path) -> None:
        for output_dir in (tmp_path / ("x" * 300), "/proc/nowhere/run"):
            code, _, err = lorafit("train", recipe(output_dir=str(output_dir)))
            assert code == 2
            assert len(err.strip().splitlines()) == 1
            assert str(output_dir)[:10] in err

    def test_a_recipe_that_is_edited_while_it_is_read(
        self, recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe()
        original = lorafit_plan.plan_recipe

        def slow(*args: Any, **more: Any) -> Any:
            path.write_text(path.read_text() + "# a remark\n")
            return original(*args, **more)

        monkeypatch.setattr("lorafit.plan.plan_recipe", slow)
        code, _, err = lorafit("train", path)
        assert code == 2
        assert "has changed" in err
        assert not (path.parent / "runs").exists()

    def test_what_only_another_process_meets(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setattr("lorafit.cli.exits.HEAD_START", 0)
        code, _, err = lorafit("train", tmp_path / "nowhere.yaml")
        assert code == 2
        assert err.startswith("process 3: ")


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("train", "lorafit.engine.model.AutoTokenizer.from_pretrained"),
        ("train", "lorafit.engine.model.AutoModelForCausalLM.from_pretrained"),
        ("merge", "lorafit.engine.model.PeftModel.from_pretrained"),
        ("merge", "lorafit.engine.merge.stream._edited"),
        ("merge", "lorafit.engine.merge.verify.load_merged"),
        ("eval", "lorafit.engine.evaluate.measure.likelihoods"),
    ],
)
def test_sigterm_outside_the_steps(
    command: str, where: str, recipe: RecipeMaker, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a library is loading, which is not that library's error; and nothing is left half written."""
    path = recipe(dataset={"train": [{"path": str(rows)}], "validation": 0.25})
    run = tmp_path / "runs" / "recipe"
    if command != "train":
        assert lorafit("train", path)[0] == 0
    monkeypatch.setattr(where, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = lorafit(command, path if command == "train" else run)
    assert code == 143
    kept = "interrupted; " if command == "eval" else "terminated; "
    assert err.strip().splitlines()[-1].startswith(kept)
    assert {file.name for file in run.glob(".*")} - {LOCK} == ({".eval.work"} if command == "eval" else set())


@pytest.mark.parametrize("asked", [None, "FASTEST_FIRST"])
def test_gpus_are_counted_as_nvidia_smi_counts_them(asked: str | None) -> None:
    """The plan is made for the GPU that nvidia-smi calls the first, so it must be torch's first too."""
    done = subprocess.run(
        [sys.executable, "-c", "import os, lorafit.hardware; print(os.environ['CUDA_DEVICE_ORDER'])"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)} | ({"CUDA_DEVICE_ORDER": asked} if asked else {}),
    )
    assert done.stdout.strip() == (asked or "PCI_BUS_ID")


def test_version() -> None:
    assert lorafit("--version")[1].strip() == __version__


def test_generated_docs_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_docs"), "--check"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr


def test_nothing_but_the_result_on_stdout(recipe: RecipeMaker, tmp_path: Path) -> None:
    """Not even from the libraries: stdout is data."""
    more = write_jsonl(tmp_path / "some.jsonl", [conversation("one", word) for word in ("a", "b", "c", "d")])
    path = recipe(dataset={"train": [{"path": str(more)}]}, quantization={"load_in_4bit": True})
    done = subprocess.run(
        [sys.executable, "-m", "lorafit", "train", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "runs" / "recipe" / "adapter")]
    noise = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "4 training rows, "))]
    assert noise == []
