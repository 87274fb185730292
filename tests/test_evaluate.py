"""Evaluation gives the numbers and answers of a plain loop."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import RecipeMaker, Train, as_planned, conversation, make_model, write_jsonl
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.data import IGNORED
from lorafit.errors import DataError, ModelError, UsageError
from lorafit.evaluate import evaluate, held_out_rows, models
from lorafit.merge import Options
from lorafit.merge.make import merge
from lorafit.rundir import RunDir

QUIET = Console(file=io.StringIO())


@pytest.fixture
def run(recipe: RecipeMaker, train: Train, rows: Path) -> RunDir:
    settings = {"max_steps": 30, "learning_rate": 2e-2, "per_device_eval_batch_size": 4}
    return train(recipe(dataset={"train": [{"path": str(rows)}], "validation": 0.4}, training=settings))


def plain_loss(model, rows) -> float:
    """One row at a time, without padding, by the definition."""
    total, count = 0.0, 0
    model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return total / count


def test_losses_and_answers_equal_a_plain_loop(run: RunDir, tiny_model: Path) -> None:
    report = evaluate(run.path, None, 100, 12, QUIET)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    rows = held_out_rows(run.load_plan(), tokenizer, None)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(tiny_model),
        "adapter": AutoPeftModelForCausalLM.from_pretrained(run.adapter),
    }
    assert report["rows"] == len(rows) == 10
    for name, model in models.items():
        expected = plain_loss(model, rows)
        assert report["models"][name]["loss"] == pytest.approx(expected, rel=1e-5)
        assert report["models"][name]["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        for row, sample in zip(rows, report["samples"], strict=True):
            start = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
            prompt = torch.tensor([row["input_ids"][:start]])
            made = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
            text = tokenizer.decode(made[0, start:], skip_special_tokens=True).strip()
            assert sample["answers"][name] == text
    assert report["models"]["adapter"]["loss"] < report["models"]["base"]["loss"]
    assert json.loads((run.eval / "results.json").read_text()) == report


def test_other_rows_and_a_limit(run: RunDir, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "more rows.jsonl", [conversation(f"say {i}", "yes") for i in range(5)])
    report = evaluate(run.path, data, 2, 4, QUIET)
    assert report["rows"] == 5
    assert report["generated"] == len(report["samples"]) == 2
    assert report["samples"][0]["prompt"] == "say 0"
    assert report["samples"][0]["expected"] == "yes"


def test_a_model_trained_in_full(recipe: RecipeMaker, train: Train, rows: Path) -> None:
    run = train(
        recipe(lora=..., dataset={"train": [{"path": str(rows)}], "validation": 0.4}, training={"learning_rate": 3e-3})
    )
    report = evaluate(run.path, None, 3, 4, QUIET)
    assert list(report["models"]) == ["base", "trained"]
    assert report["models"]["trained"]["loss"] < report["models"]["base"]["loss"]


def test_a_quantized_run_is_evaluated_quantized(recipe: RecipeMaker, train: Train, rows: Path) -> None:
    dataset = {"train": [{"path": str(rows)}], "validation": 0.4}
    run = train(recipe(quantization={"load_in_4bit": True}, dataset=dataset))
    report = evaluate(run.path, None, 2, 4, QUIET)
    last = [e["eval_loss"] for e in run.metrics_until(99) if "eval_loss" in e][-1]
    assert report["models"]["adapter"]["loss"] == pytest.approx(last, rel=2e-2)


def test_without_held_out_rows(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    run = train(recipe())
    with pytest.raises(DataError, match="--data"):
        evaluate(run.path, None, 1, 1, QUIET)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match="there are no rows"):
        evaluate(run.path, empty, 1, 1, QUIET)


def test_trained_biases_are_not_the_bases(recipe: RecipeMaker, train: Train, rows: Path, tiny_model: Path) -> None:
    biased = make_model(rows.parent / "biased", attention_bias=True)
    run = train(
        recipe(
            model={"name_or_path": str(biased)},
            lora={"bias": "all"},
            dataset={"train": [{"path": str(rows)}], "validation": 0.4},
            training={"learning_rate": 0.1},
        )
    )
    report = evaluate(run.path, None, 1, 1, QUIET)
    held_out = held_out_rows(run.load_plan(), AutoTokenizer.from_pretrained(run.adapter), None)
    base = AutoModelForCausalLM.from_pretrained(biased)
    assert report["models"]["base"]["loss"] == pytest.approx(plain_loss(base, held_out), rel=1e-5)
    assert report["models"]["adapter"]["loss"] != pytest.approx(report["models"]["base"]["loss"], rel=1e-3)


def test_a_run_of_a_gpu_on_a_machine_without_one(run: RunDir) -> None:
    before = evaluate(run.path, None, 2, 4, QUIET)
    as_planned(run, hardware={"device": "cuda"}, model_kwargs={"attn_implementation": "flash_attention_2"})
    assert evaluate(run.path, None, 2, 4, QUIET)["models"] == before["models"]


def test_the_model_is_moved_to_the_plans_device(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    as_planned(run, hardware={"device": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("lorafit.model.PreTrainedModel.to", lambda self, device: moved.append(device) or self)
    next(models(run, run.load_plan()))
    assert moved == ["cuda"]


def test_another_base_than_the_one_trained_on(recipe: RecipeMaker, train: Train, rows: Path) -> None:
    base = make_model(rows.parent / "base")
    dataset = {"train": [{"path": str(rows)}], "validation": 0.4}
    run = train(recipe(model={"name_or_path": str(base)}, dataset=dataset))
    make_model(base, seed=1)
    with pytest.raises(ModelError, match=r"is not the base that .* was trained on \(changed: tensor lm_head.weight, "):
        evaluate(run.path, None, 1, 1, QUIET)
    with pytest.raises(ModelError, match="is not the base"):
        merge(Options(run.path), QUIET)


def test_one_process_at_a_time(run: RunDir) -> None:
    for command in (lambda: evaluate(run.path, None, 1, 1, QUIET), lambda: merge(Options(run.path), QUIET)):
        with run.lock(), pytest.raises(UsageError, match="another process"):
            command()
