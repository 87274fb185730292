"""An evaluation gives the numbers of a plain loop, refuses what doesn't belong together, and leaves whole reports."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RecipeMaker, Train, as_planned, conversation, make_model, resealed, write_jsonl
from jsonschema import Draft202012Validator
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from wording import Like
from yaml import safe_dump

from lorafit.cli import app
from lorafit.engine.data.encode import IGNORED
from lorafit.engine.evaluate.measure import speeds
from lorafit.engine.evaluate.run import evaluate
from lorafit.engine.evaluate.sets import held_out_rows
from lorafit.engine.merge.run import merge
from lorafit.engine.train import train as run_training
from lorafit.errors import DataError, DriftError, GateError, Interrupted, ModelError, UsageError
from lorafit.evaluation.results import Records, Results, Sample
from lorafit.files import SEAL, seal
from lorafit.options import EvalOptions, MergeOptions, Named
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe, RecipeError
from lorafit.run.directory import RunDir
from lorafit.run.manifest import Start

QUIET = Console(file=io.StringIO())
ROOT = Path(__file__).resolve().parents[3]
PLAIN = ("eval.forgetting=[]",)
WORDS = ["red", "green", "blue", "one", "two", "three", "four", "cat", "mat", "dog"]


def evaluated(run: RunDir | Path, **options: Any) -> Results:
    path = run.path if isinstance(run, RunDir) else run
    overrides = options.pop("overrides", PLAIN)
    return evaluate(EvalOptions(path, overrides=tuple(overrides), **options))[0]


def value(results: Results, name: str) -> float:
    found = results.figures[name].value
    assert found is not None
    return found


def samples(folder: Path) -> list[Sample]:
    return [Sample.model_validate_json(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def run_of(folder: Path, model: Path, **sections: Any) -> RunDir:
    """Train a small run that learns to answer a word with the next one; keyword arguments are recipe sections."""
    folder.mkdir(exist_ok=True)
    pairs = [(word, other) for word in WORDS for other in WORDS]
    data = [conversation(f"{one} {two}", WORDS[(WORDS.index(one) + 1) % len(WORDS)]) for one, two in pairs]
    rows = write_jsonl(folder / "rows.jsonl", data)
    content: dict[str, Any] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {"r": 16, "lora_dropout": 0.0},
        "dataset": {"train": [{"path": str(rows)}], "validation": 0.2},
        "training": {"max_steps": 150, "learning_rate": 5e-3, "max_length": 128, "per_device_train_batch_size": 16},
        "output_dir": str(folder / "run"),
    }
    for section, values in sections.items():
        content[section] = {**content.get(section, {}), **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(safe_dump({key: part for key, part in content.items() if part is not None}))
    plan = plan_recipe(Recipe.load(path, ()), path)
    return run_training(plan, path.read_bytes(), Start(), QUIET)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A run with its merged model, made once."""
    run = run_of(tmp_path_factory.mktemp("eval") / "one", tiny_model)
    merge(MergeOptions(run.path), QUIET)
    return run.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDir:
    """A copy of it, to be evaluated or broken."""
    return RunDir(shutil.copytree(trained, tmp_path / "runs" / "one"))


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """A whole evaluation of it."""
    folder = tmp_path_factory.mktemp("whole") / "eval"
    options = EvalOptions(
        trained, output=folder, max_new_tokens=6, fail_under=("heldout.loss.adapter < heldout.loss.base (ci)",)
    )
    return evaluate(options)


def row_losses(model: Any, rows: Any) -> list[float]:
    """One row at a time, without padding, by the definition."""
    found = []
    model.eval()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        found.append(functional.cross_entropy(logits, labels, ignore_index=IGNORED).item())
    return found


def test_figures_equal_a_plain_loop(whole: tuple[Results, Path], trained: Path, tiny_model: Path) -> None:
    results, folder = whole
    run = RunDir(trained)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    rows = held_out_rows(run.load_plan(), tokenizer, None)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(tiny_model),
        "adapter": AutoPeftModelForCausalLM.from_pretrained(run.adapter),
        "merged": AutoModelForCausalLM.from_pretrained(run.merged),
    }
    assert list(results.models) == list(models)
    held_out = [sample for sample in samples(folder) if sample.set == "heldout"]
    assert len(held_out) == len(rows) == results.sets["heldout"].rows
    tokens = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    for name, model in models.items():
        losses = row_losses(model, rows)
        assert [sample.answers[name].scores["loss"] for sample in held_out] == pytest.approx(losses, rel=1e-5, abs=1e-6)
        mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
        assert value(results, f"heldout.loss.{name}") == pytest.approx(mean, rel=1e-5)
        assert value(results, f"heldout.perplexity.{name}") == pytest.approx(math.exp(mean), rel=1e-4)
        right = []
        for row, sample in zip(rows, held_out, strict=True):
            start = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
            prompt = torch.tensor([row["input_ids"][:start]])
            made = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
            text = tokenizer.decode(made[0, start:], skip_special_tokens=True).strip()
            assert sample.answers[name].text == text
            right.append(text == sample.expected)
        assert value(results, f"heldout.exact_match.{name}") == pytest.approx(sum(right) / len(right))


def test_bits_per_byte_counts_the_bytes_of_the_words(whole: tuple[Results, Path]) -> None:
    results, folder = whole
    found = [sample for sample in samples(folder) if sample.set == "heldout"]
    size = sum(len(sample.expected.encode()) for sample in found)
    base = [(sample.answers["base"].scores["bits_per_byte"], len(sample.expected.encode())) for sample in found]
    assert value(results, "heldout.bits_per_byte.base") == pytest.approx(sum(b * n for b, n in base) / size, rel=1e-6)


def test_base_against_adapter_against_merged(whole: tuple[Results, Path]) -> None:
    results, _ = whole
    assert value(results, "heldout.exact_match.base") == 0
    assert value(results, "heldout.exact_match.adapter") >= 0.8
    assert value(results, "heldout.agreement.merged") >= 0.99
    found = {(d.metric, d.model, d.against): d for d in results.differences if d.set == "heldout"}
    gain = found["exact_match", "adapter", "base"]
    assert gain.is_clear
    assert gain.value == pytest.approx(value(results, "heldout.exact_match.adapter"))
    assert gain.wins + gain.ties + gain.losses == results.sets["heldout"].rows
    same = found["loss", "merged", "adapter"]
    assert abs(same.value or 0) < 1e-5
    assert results.gates[0].passed


def test_what_was_forgotten_is_a_figure(whole: tuple[Results, Path]) -> None:
    results, _ = whole
    for name in ("general", "chat"):
        assert results.sets[name].role == "forgetting"
        assert value(results, f"{name}.kl.adapter") > 0
        assert f"{name}.kl.base" not in results.figures
        assert value(results, f"{name}.bits_per_byte.adapter") != value(results, f"{name}.bits_per_byte.base")


def test_all_reports_are_written(whole: tuple[Results, Path]) -> None:
    results, folder = whole
    assert {file.name for file in folder.iterdir()} == {
        SEAL,
        "results.json",
        "samples.jsonl",
        "report.md",
        "report.html",
        "junit.xml",
    }
    written = json.loads((folder / "results.json").read_text())
    assert Results.model_validate(written) == results
    schema = json.loads((ROOT / "docs" / "results.schema.json").read_text())
    Draft202012Validator(schema).validate(written)
    assert ElementTree.parse(folder / "junit.xml").getroot().findall(".//testcase")
    for report in ("report.md", "report.html"):
        assert "heldout" in (folder / report).read_text()
    assert not list(folder.parent.glob(".eval*"))


def test_other_rows_and_a_limit(run: RunDir, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "more rows.jsonl", [conversation(f"red {i}", "green") for i in range(5)])
    results = evaluated(run, data=data, limit=2, max_new_tokens=4)
    assert (results.sets["heldout"].rows, results.sets["heldout"].answered) == (5, 2)
    found = samples(run.eval)
    assert found[0].prompt == "red 0"
    assert found[0].expected == "green"
    assert found[0].place == f"{data}:1"
    assert found[0].answers["base"].text is not None
    assert found[2].answers["base"].text is None


def test_a_model_trained_in_full(tmp_path: Path, tiny_model: Path) -> None:
    run = run_of(tmp_path / "full", tiny_model, lora=None, training={"learning_rate": 3e-3, "max_steps": 8})
    results = evaluated(run, limit=3, max_new_tokens=4)
    assert list(results.models) == ["base", "trained"]
    assert value(results, "heldout.loss.trained") < value(results, "heldout.loss.base")
    with pytest.raises(UsageError, match="is called trained"):
        evaluated(run, compare=("base", "adapter"))


def test_a_quantized_run_is_evaluated_quantized(tmp_path: Path, tiny_model: Path) -> None:
    run = run_of(tmp_path / "q", tiny_model, quantization={"load_in_4bit": True}, training={"max_steps": 8})
    results = evaluated(run, limit=2, max_new_tokens=4)
    last = [entry["eval_loss"] for entry in run.metrics_until(99) if "eval_loss" in entry][-1]
    assert value(results, "heldout.loss.adapter") == pytest.approx(last, rel=2e-2)
    assert results.models["adapter"].quantization == "nf4"


def test_several_adapters_on_one_base(run: RunDir, trained: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Swapped on the same base, each has the figures that it has alone, whatever came before it."""
    other = run_of(tmp_path / "two", tiny_model, lora={"use_dora": True}, training={"seed": 7, "max_steps": 5})
    zero = shutil.copytree(trained / "adapter", tmp_path / "zero", ignore=shutil.ignore_patterns(SEAL))
    weights = load_file(zero / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(w) for name, w in weights.items()}, zero / "adapter_model.safetensors")
    results = evaluated(
        run, compare=("base", "adapter", str(other.path)), adapters=(Named("run", zero),), limit=4, max_new_tokens=4
    )
    assert list(results.models) == ["base", "adapter", "run_2", "run"], "the folder's name is taken by the adapter"
    alone = evaluated(other, data=None, compare=("adapter",), limit=4, max_new_tokens=4)
    for metric in ("loss", "exact_match", "token_accuracy"):
        assert value(results, f"heldout.{metric}.run") == pytest.approx(value(results, f"heldout.{metric}.base"))
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    rows = held_out_rows(run.load_plan(), tokenizer, None)
    losses = row_losses(AutoPeftModelForCausalLM.from_pretrained(other.adapter), rows)
    found = [sample.answers["run_2"].scores["loss"] for sample in samples(run.eval)]
    assert found == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert list(alone.models) == ["adapter"]


def test_trained_biases_are_not_the_bases(tmp_path: Path) -> None:
    biased = make_model(tmp_path / "biased", attention_bias=True)
    run = run_of(tmp_path / "one", biased, lora={"bias": "all"}, training={"learning_rate": 0.1, "max_steps": 8})
    results = evaluated(run, limit=1, max_new_tokens=1, overrides=("eval.forgetting=[chat]",))
    rows = held_out_rows(run.load_plan(), AutoTokenizer.from_pretrained(run.adapter), None)
    losses = row_losses(AutoModelForCausalLM.from_pretrained(biased), rows)
    found = [sample.answers["base"].scores["loss"] for sample in samples(run.eval) if sample.set == "heldout"]
    assert found == pytest.approx(losses, rel=1e-5)
    assert value(results, "heldout.loss.adapter") != pytest.approx(value(results, "heldout.loss.base"), rel=1e-3)


def test_options(run: RunDir, tmp_path: Path) -> None:
    """The model's choice is the option with the highest likelihood after the prompt, ended as in training."""
    data = write_jsonl(
        tmp_path / "rows.jsonl", [conversation(f"{word} cat", WORDS[i + 1]) for i, word in enumerate(WORDS[:-1])]
    )
    sets = f"eval.sets=[{{name: heldout, options: [{', '.join(WORDS)}]}}]"
    results = evaluated(run, data=data, overrides=(*PLAIN, sets), max_new_tokens=4)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    for sample in samples(run.eval):
        scores = []
        for option in WORDS:
            text = tokenizer.apply_chat_template(conversation(sample.prompt, option)["messages"], tokenize=False)
            question = tokenizer.apply_chat_template(
                conversation(sample.prompt, option)["messages"][:1], tokenize=False, add_generation_prompt=True
            )
            ids = tokenizer(text.rstrip("\n"), return_tensors="pt")["input_ids"]
            start = len(tokenizer(question)["input_ids"])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(logprobs[start - 1 :].gather(-1, ids[0, start:, None]).sum().item())
        assert sample.answers["adapter"].chosen == WORDS[max(range(len(WORDS)), key=scores.__getitem__)]
    right = [sample.answers["adapter"].chosen == sample.expected for sample in samples(run.eval)]
    assert value(results, "heldout.accuracy.adapter") == pytest.approx(sum(right) / len(right))
    assert 0 <= value(results, "heldout.macro_f1.base") <= 1


def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    asked = [{"role": "user", "content": question}]
    return {"prompt": asked} | {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }


def log_likelihood(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> float:
    """Of the last turn, with its end."""
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    ids, start = tokenizer(text, return_tensors="pt")["input_ids"], len(tokenizer(asked)["input_ids"])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(logprobs[start - 1 :].gather(-1, ids[0, start:, None]).sum())


def test_pairs_of_a_chosen_and_a_rejected_answer(run: RunDir, tmp_path: Path) -> None:
    pairs = [pair(f"{word} cat", WORDS[i + 1], WORDS[i]) for i, word in enumerate(WORDS[:-1])]
    pairs[2] = pairs[2] | {"prompt": conversation("red", "green")["messages"] + pairs[2]["prompt"]}
    too_long = pair("blue", "green", "one two three " * 100)
    data = write_jsonl(tmp_path / "pairs.jsonl", [*pairs, too_long])
    sets = f"eval.sets=[{{name: likes, path: '{data}'}}]"
    results = evaluated(run, overrides=(*PLAIN, sets), max_new_tokens=2)
    assert any("1 of" in remark and "likes" in remark for remark in results.remarks)
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter).eval()
    found: dict[str, list[list[float]]] = {}
    for name, context in (("adapter", contextlib.nullcontext()), ("base", model.disable_adapter())):
        with context:
            found[name] = [
                [log_likelihood(model, tokenizer, [*one["prompt"], *one[side]]) for side in ("chosen", "rejected")]
                for one in pairs
            ]
    margins = {name: [one - other for one, other in values] for name, values in found.items()}
    for name, values in found.items():
        columns = {"chosen_logp": 0, "rejected_logp": 1}
        for metric, column in columns.items():
            mean = sum(one[column] for one in values) / len(values)
            assert value(results, f"likes.{metric}.{name}") == pytest.approx(mean, rel=1e-4)
        assert value(results, f"likes.preference_margin.{name}") == pytest.approx(
            sum(margins[name]) / len(pairs), rel=1e-3, abs=1e-4
        )
        right = sum(margin > 0 for margin in margins[name]) / len(pairs)
        assert value(results, f"likes.preference_accuracy.{name}") == pytest.approx(right)
    more = sum(mine > its for mine, its in zip(margins["adapter"], margins["base"], strict=True)) / len(pairs)
    assert value(results, "likes.reward_accuracy.adapter") == pytest.approx(more)
    assert "likes.reward_accuracy.base" not in results.figures
    assert results.figures["likes.preference_margin.adapter"].rows == len(pairs)
    assert results.figures["likes.loss.adapter"].rows == len(pairs) + 1
    assert not any(".preference" in name for name in results.figures if name.startswith("heldout."))


def test_a_gate_on_pairs(run: RunDir, tmp_path: Path) -> None:
    """It is known before a model runs, also of rows that have none."""
    data = write_jsonl(tmp_path / "pairs.jsonl", [pair("red", "green", "blue"), pair("one", "two", "cat")])
    sets = f"eval.sets=[{{name: likes, path: '{data}'}}]"
    gate = "likes.preference_margin.adapter > likes.preference_margin.base"
    results = evaluated(run, overrides=(*PLAIN, sets), max_new_tokens=2, fail_under=(gate,))
    assert [one.gate for one in results.gates] == [gate]
    with pytest.raises(UsageError, match=r"heldout\.preference_margin\.adapter"):
        evaluated(run, overrides=PLAIN, fail_under=("heldout.preference_margin.adapter > 0",))


def test_options_of_each_row(run: RunDir, tmp_path: Path) -> None:
    rows = [
        conversation("red cat", "green") | {"choices": ["green", "blue"]},
        conversation("one cat", "two") | {"choices": ["two"]},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows[:1])
    setting = (*PLAIN, "eval.sets=[{name: heldout, options: choices}]")
    results = evaluated(run, data=data, overrides=setting, max_new_tokens=4)
    assert results.figures["heldout.accuracy.adapter"].rows == 1
    assert "heldout.macro_f1.adapter" not in results.figures
    with pytest.raises(DataError, match=r"rows.jsonl:2: 'choices' .*two"):
        evaluated(run, data=write_jsonl(data, rows), overrides=setting)


def test_sets_and_metrics_of_the_recipe(run: RunDir, tmp_path: Path) -> None:
    own = write_jsonl(
        tmp_path / "own.jsonl", [{"prompt": "red ", "completion": "green"}, {"prompt": "a ", "completion": "b"}]
    )
    sets = f"eval.sets=[{{name: own, path: '{own}', metrics: [token_f1, {{regex: 'g.+n'}}], max_new_tokens: 3}}]"
    results = evaluated(run, overrides=(*PLAIN, sets, "eval.metrics=[contains]"), limit=3)
    names = [metric.name for metric in results.sets["own"].metrics]
    assert {"token_f1", "regex", "ended"} <= set(names)
    assert "exact_match" not in names
    assert "contains" in [metric.name for metric in results.sets["heldout"].metrics]
    assert results.sets["own"].rows == 2


def test_a_benchmark_is_a_set_like_others(run: RunDir, tmp_path: Path) -> None:
    """Its figures have intervals, differences and gates; its documents are among the samples."""
    documents = [
        {"question": f"{word} cat", "choices": [" green", " dog"], "answer": i % 2} for i, word in enumerate(WORDS)
    ]
    data = write_jsonl(tmp_path / "documents.jsonl", documents)
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "colours.yaml").write_text(safe_dump(task))
    setting = (*PLAIN, f"eval.lm_eval={{tasks: [{tmp_path / 'colours.yaml'}]}}")
    gate = "colours.acc.adapter >= 2"
    results = evaluated(
        run, overrides=setting, compare=("base", "adapter"), limit=1, max_new_tokens=2, fail_under=(gate,)
    )
    figure = results.figures["colours.acc.adapter"]
    assert figure.rows == 10
    assert figure.low is not None
    assert results.sets["colours"].role == "benchmark"
    assert ("colours", "acc") in {(one.set, one.metric) for one in results.differences}
    assert [one.passed for one in results.gates] == [False]
    found = [sample for sample in samples(run.eval) if sample.set == "colours"]
    right = sum(sample.answers["adapter"].text == sample.expected for sample in found)
    assert figure.value == pytest.approx(right / 10)
    with pytest.raises(UsageError, match="colors"):
        evaluated(run, overrides=(*PLAIN, "eval.lm_eval={tasks: [colors.yaml]}"))


def test_a_task_of_the_harness_takes_no_sets_place(run: RunDir, tmp_path: Path) -> None:
    task = {"task": "heldout", "dataset_path": "json", "test_split": "train", "output_type": "loglikelihood"}
    rows = write_jsonl(tmp_path / "documents.jsonl", [{"question": "red", "answer": "green"}])
    more = {"dataset_kwargs": {"data_files": str(rows)}, "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    (tmp_path / "heldout.yaml").write_text(safe_dump(task | more))
    with pytest.raises(UsageError, match=r"heldout: .*\bset\b"):
        evaluated(run, overrides=(*PLAIN, f"eval.lm_eval={{tasks: [{tmp_path / 'heldout.yaml'}]}}"))


def test_a_single_row_says_nothing_of_others(run: RunDir, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "one.jsonl", [conversation("red cat", "green")])
    gate = "heldout.exact_match.adapter > heldout.exact_match.base (ci)"
    results = evaluated(run, data=data, max_new_tokens=4, compare=("base", "adapter"), fail_under=(gate,))
    assert value(results, "heldout.exact_match.adapter") > value(results, "heldout.exact_match.base")
    assert results.figures["heldout.exact_match.adapter"].low is None
    assert [(one.passed, one.sentence) for one in results.gates] == [(False, "has no interval")]
    assert "; 1 row)" in (run.eval / "report.md").read_text()


def test_answers_that_are_cut_off_are_not_asked_for(run: RunDir, tmp_path: Path) -> None:
    """No model can give half of an answer, so that would count against all of them."""
    long = " ".join(["cat"] * 400)
    rows = [("red cat", "green"), ("red dog", f"green {long}"), (f"red {long}", "green")]
    rows += [(f"red {number}", "green") for number in range(17)]
    data = write_jsonl(tmp_path / "long.jsonl", [conversation(*row) for row in rows])
    results = evaluated(run, data=data, max_new_tokens=4, compare=("base", "adapter"))
    assert (results.sets["heldout"].rows, results.sets["heldout"].answered) == (19, 18)
    assert [sample.answers["adapter"].text for sample in samples(run.eval)[:2]] == ["green", None]
    said = "\n".join(results.remarks)
    assert said == Like("… heldout: … max_length 128 … 1 of 19 rows")
    assert said == Like("… heldout: 1 of 20 rows … left out … 1")


def test_a_model_that_overflows_has_no_figures_and_passes_nothing(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one word only: as activations may overflow where the weights are finite."""
    monkeypatch.setattr("lorafit.engine.evaluate.models._check_finite", lambda *_: None)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    token = tokenizer(" mat", add_special_tokens=False)["input_ids"][0]
    file = run.merged / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, file, metadata={"format": "pt"})
    seal(run.merged, "merge")
    data = write_jsonl(tmp_path / "rows.jsonl", [conversation(f"red mat {number}", "green") for number in range(3)])
    gates = ("heldout.loss.merged < 99", "heldout.accuracy.merged == 0")
    setting = (*PLAIN, "eval.sets=[{name: heldout, options: [green, red]}]")
    results = evaluated(run, data=data, overrides=setting, max_new_tokens=3, fail_under=gates)
    assert [(gate.where, gate.passed) for gate in results.gates] == [
        ("--fail-under", False),
        ("--fail-under", True),
        ("eval", False),
    ]
    merged = samples(run.eval)[0].answers["merged"]
    assert (merged.chosen, "loss" in merged.scores) == (None, False)
    assert "loss" in samples(run.eval)[0].answers["adapter"].scores


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", ["adapter", "merged", "another"])
def test_weights_that_are_not_finite_are_refused(run: RunDir, broken: str, number: float, tmp_path: Path) -> None:
    """As merge refuses them; also where no gate is on a figure that they spoil."""
    folder = {"merged": run.merged, "adapter": run.adapter, "another": tmp_path / "another"}[broken]
    if broken == "another":
        shutil.copytree(run.adapter, folder)
    file = folder / ("model.safetensors" if broken == "merged" else "adapter_model.safetensors")
    weights = load_file(file)
    weights[list(weights)[-1]].view(-1)[-1] = number
    save_file(weights, file, metadata={"format": "pt"})
    resealed(run) if broken == "adapter" else seal(folder, "merge" if broken == "merged" else "adapter")
    adapters = (Named("x", folder),) if broken == "another" else ()
    compare = ("base", "merged") if broken == "merged" else ("base", "adapter")
    with pytest.raises(ModelError, match="not finite"):
        evaluated(run, compare=compare, adapters=adapters, fail_under=("heldout.repetition.base <= 1",))
    assert not (run.eval / "results.json").exists()


def test_the_same_option_twice(run: RunDir, tmp_path: Path) -> None:
    setting = (*PLAIN, "eval.sets=[{name: heldout, options: [green, 'green ']}]")
    with pytest.raises(DataError, match=r"option .*twice"):
        evaluated(run, overrides=setting)


def test_a_speed_is_of_answers_whose_time_is_known(tmp_path: Path) -> None:
    """A kill takes along the time of what was done before it."""
    names = ("heldout", "base", "answers")
    records = Records(tmp_path / "records", {}, False)
    killed = records.writer(*names)
    killed.__enter__()({"row": 0, "tokens": 3, "seconds": 0.1})
    assert records.timed(*names) == 0
    records = Records(tmp_path / "records", {}, True)
    rows: Any = SimpleNamespace(name="heldout")
    for model in ("base", "adapter"):
        with records.writer("heldout", model, "answers") as add:
            add({"row": 1, "tokens": 3, "seconds": 0.1})
    assert len(list(records.read(*names))) == 2
    assert [one.model for one in speeds(rows, ["base", "adapter"], records)] == ["adapter"]


SABOTAGE = (
    "heldout.exact_match.adapter >= 0.8",
    "heldout.loss.adapter < heldout.loss.base (ci)",
)


def test_sabotaged_adapters_are_told_apart(trained: Path, tmp_path: Path, tiny_model: Path) -> None:
    """One that does nothing, one that learned wrong answers, one that learned a single row by heart.

    What a real model forgets is in test_quickstart: the base here is random and has nothing to forget.
    """
    good = evaluated(trained, output=tmp_path / "good", fail_under=SABOTAGE, limit=20, max_new_tokens=4)
    assert not good.failed
    nothing = RunDir(shutil.copytree(trained, tmp_path / "zero"))
    file = nothing.adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(w) for name, w in load_file(file).items()}, file)
    shutil.rmtree(nothing.merged)
    resealed(nothing)
    zero = evaluated(nothing, fail_under=SABOTAGE, limit=20, max_new_tokens=4)
    assert [gate.passed for gate in zero.gates] == [False, False]
    assert all(d.value == 0 for d in zero.differences if d.metric in ("loss", "exact_match"))

    rows = [json.loads(line) for line in (trained.parent / "rows.jsonl").read_text().splitlines()]
    answers = [row["messages"][1]["content"] for row in rows]
    shuffled = [conversation(row["messages"][0]["content"], answers[i * 37 % 100]) for i, row in enumerate(rows)]
    wrong = write_jsonl(tmp_path / "shuffled.jsonl", shuffled)
    held_out = write_jsonl(tmp_path / "held out.jsonl", rows[::5])
    run = run_of(
        tmp_path / "shuffled", tiny_model, dataset={"train": [{"path": str(wrong)}]}, training={"max_steps": 30}
    )
    found = evaluated(run, data=held_out, fail_under=SABOTAGE, limit=20, max_new_tokens=4)
    assert not found.gates[0].passed, "it learned the form of an answer, not which"
    assert value(found, "heldout.exact_match.adapter") < 0.5

    single = write_jsonl(tmp_path / "single.jsonl", rows[:1] * 40)
    setting = {"train": [{"path": str(single)}], "validation": None, "audit": {"duplicates": None}}
    run = run_of(tmp_path / "single", tiny_model, dataset=setting, training={"max_steps": 40, "learning_rate": 5e-2})
    forgot = evaluated(run, data=held_out, fail_under=SABOTAGE, limit=20, max_new_tokens=4)
    assert not forgot.gates[0].passed


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fail_under": ("heldout.exact_matc.adapter > 0",)}, UsageError, "'heldout.exact_match.adapter'"),
        ({"fail_under": ("heldout.loss.adapter",)}, UsageError, "heldout.loss.adapter"),
        ({"overrides": ("eval.metrics=[exact_mach]",)}, RecipeError, r"exact_mach.*\bexact_match\b"),
        ({"overrides": ("eval.gates=[heldout.loss.base <]",)}, RecipeError, "eval.gates.0"),
        ({"overrides": ("lora.r=3",)}, UsageError, "eval section only"),
        ({"compare": ("base", "nowhere")}, UsageError, "--compare nowhere: "),
        ({"adapters": (Named("base", Path("x")),)}, UsageError, r"name .*taken"),
        ({"data": Path("nowhere.jsonl")}, UsageError, "--data nowhere.jsonl: no such file"),
        ({"baseline": Path("nowhere.json")}, UsageError, "--baseline nowhere.json: no such file"),
        ({"resume": True}, UsageError, "no interrupted evaluation"),
    ],
)
def test_refusals(run: RunDir, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        evaluated(run, **options)
    assert "\n" not in str(caught.value)
    assert not run.eval.exists()


def test_no_rows(recipe: RecipeMaker, train: Train, tmp_path: Path) -> None:
    run = train(recipe())
    with pytest.raises(DataError, match="--data"):
        evaluated(run)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl.* no rows"):
        evaluated(run, data=empty)


def test_a_template_that_is_missing(run: RunDir, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [conversation("a", "b")])
    settings = json.loads((run.adapter / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (run.adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    (run.adapter / "chat_template.jinja").unlink(missing_ok=True)
    as_planned(run, data={"tokenizer_sha256": None})
    with pytest.raises(DataError, match="chat template"):
        evaluated(run, data=rows)


def test_merged_models_of_something_else(run: RunDir, tmp_path: Path, tiny_model: Path) -> None:
    other = run_of(tmp_path / "two", tiny_model, training={"max_steps": 2})
    elsewhere = merge(MergeOptions(other.path, verify="weights"), QUIET)
    with pytest.raises(ModelError, match="another adapter"):
        evaluated(run, compare=("base", "adapter", str(elsewhere)))
    report = json.loads((run.merged / "merge_report.json").read_text())
    report["base"]["name"] = "models/another"
    (run.merged / "merge_report.json").write_text(json.dumps(report))
    seal(run.merged, "merge")
    with pytest.raises(ModelError, match=r"another base \(models/another\)"):
        evaluated(run)


def test_another_base_than_the_one_trained_on(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    run = run_of(tmp_path / "one", base, training={"max_steps": 2})
    make_model(base, seed=1)
    with pytest.raises(ModelError, match=r"not the base .*\(changed: tensor lm_head.weight, "):
        evaluated(run)
    other = run_of(tmp_path / "two", base, training={"max_steps": 2})
    with pytest.raises(ModelError, match="another base"):
        evaluated(other, compare=("base", "adapter", str(run.path)))


def test_a_run_of_a_gpu_on_a_machine_without_one(run: RunDir) -> None:
    before = evaluated(run, limit=2, max_new_tokens=4)
    as_planned(run, hardware={"device": "cuda"}, model_kwargs={"attn_implementation": "flash_attention_2"})
    assert evaluated(run, limit=2, max_new_tokens=4).figures == before.figures


def test_one_process_at_a_time(run: RunDir) -> None:
    with run.lock(), pytest.raises(UsageError, match="another process"):
        evaluated(run)


def test_a_recipe_evaluates_its_run_by_its_gates_of_now(run: RunDir, trained: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (trained.parent / "recipe.yaml").read_text().replace(str(trained), str(run.path))
    gates = "eval: {gates: [heldout.loss.adapter < 0], forgetting: [], limit: 2, max_new_tokens: 4}\n"
    recipe.write_text(text + gates)
    results = evaluated(recipe, overrides=())
    assert [gate.passed for gate in results.gates] == [False]
    assert results.gates[0].where == "eval.gates.0"
    recipe.write_text(text.replace("r: 16", "r: 4") + gates)
    assert any(remark == Like("… changed … (lora)") for remark in evaluated(recipe, overrides=()).remarks)


def test_a_baseline_of_something_else_is_told_before_a_model_is_loaded(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [{"instruction": f"red {word}", "output": word} for word in WORDS])
    rows = [conversation(f"{word} mat", "green") for word in WORDS]
    same = write_jsonl(tmp_path / "same.jsonl", rows)
    fewer = write_jsonl(tmp_path / "fewer.jsonl", rows[:-1])
    another = write_jsonl(tmp_path / "another.jsonl", [*rows[:-1], conversation("blue mat", "green")])
    options: dict[str, Any] = {
        "compare": ("base", "adapter"),
        "max_new_tokens": 3,
        "data": same,
        "overrides": (*PLAIN, f"eval.sets=[{{name: own, path: {own}}}]"),
    }
    evaluated(run, **options)
    options["baseline"] = Path(shutil.copy(run.eval / "results.json", tmp_path / "before.json"))
    assert not evaluated(run, **options).failed
    monkeypatch.setattr("lorafit.engine.evaluate.models.load_base", None)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"data": fewer}, "heldout"),
        ({"data": another}, "heldout"),
        ({"compare": ("base",)}, "heldout.loss.adapter"),
        ({"overrides": (*PLAIN, "eval.metrics=[words]")}, "heldout.exact_match.adapter"),
        ({"overrides": (*PLAIN, "eval.sets=[]")}, "own"),
        ({"overrides": (*PLAIN, f"eval.sets=[{{name: own, path: {own}, max_rows: 2}}]")}, "own"),
        ({"overrides": (*PLAIN, f"eval.sets=[{{name: own, path: {own}, columns: {{output: instruction}}}}]")}, "own"),
    ]
    for change, what in changes:
        with pytest.raises(GateError, match=rf"--baseline: .*\b{what}\b"):
            evaluated(run, **options | change)


def test_an_earlier_evaluation_as_the_baseline(run: RunDir, tmp_path: Path) -> None:
    evaluated(run, output=tmp_path / "before", limit=4, max_new_tokens=4)
    before = tmp_path / "before" / "results.json"
    gate = "heldout.loss.adapter <= baseline.heldout.loss.adapter + 0.001"
    same = evaluated(run, baseline=before, fail_under=(gate,), limit=4, max_new_tokens=4)
    assert not same.failed
    assert len(same.gates) > 1
    raw = json.loads(before.read_text())
    for name in ("heldout.loss.adapter", "heldout.exact_match.adapter"):
        better = -9.0 if "loss" in name else 2.0
        raw["figures"][name] |= {"value": better, "low": better, "high": better}
    before.write_text(json.dumps(raw))
    with pytest.raises(DriftError, match=r"results\.json has changed"):
        evaluated(run, baseline=before, limit=4, max_new_tokens=4)
    seal(before.parent, "evaluation")
    worse = evaluated(run, baseline=before, fail_under=(gate,), limit=4, max_new_tokens=4)
    assert {gate.where for gate in worse.failed} == {"--fail-under", "--baseline"}


def test_an_interrupted_evaluation_goes_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is not done again, and the result is that of an evaluation that was never stopped."""
    whole = evaluated(run, output=run.path.parent / "whole", limit=8, max_new_tokens=4)
    import lorafit.engine.evaluate.measure as module

    real, calls = module.likelihoods, []

    def stops(*args: Any) -> Any:
        calls.append(len(args[3]))
        for number, one in enumerate(real(*args)):
            if len(calls) == 2 and number == 3:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(module, "likelihoods", stops)
    with pytest.raises(Interrupted, match="--resume"):
        evaluated(run, limit=8, max_new_tokens=4)
    assert not run.eval.exists()
    with pytest.raises(UsageError, match=r"differs in max_new_tokens"):
        evaluated(run, limit=8, max_new_tokens=5, resume=True)
    calls.clear()
    monkeypatch.setattr(module, "likelihoods", lambda *args: calls.append(len(args[3])) or real(*args))
    again = evaluated(run, limit=8, max_new_tokens=4, resume=True)
    assert again.figures == whole.figures
    assert calls[0] == 3, "the base was not run again, and of the adapter's rows not those that were done"


def test_a_killed_evaluation_leaves_no_output_and_goes_on(run: RunDir) -> None:
    command = [
        sys.executable,
        "-m",
        "lorafit",
        "eval",
        str(run.path),
        "--set",
        "eval.forgetting=[]",
        "--max-new-tokens",
        "4",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    file = run.path / ".eval.work/heldout.adapter.answers.jsonl"
    while process.poll() is None and not file.exists():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not run.eval.exists(), "the evaluation was too quick to be killed"
    done = CliRunner().invoke(app, [*command[3:], "--resume"])
    assert done.exit_code == 0, done.output
    assert (run.eval / "results.json").is_file()
    assert not (run.path / ".eval.work").exists()


def test_a_folder_of_something_else_is_not_replaced(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an evaluation"):
        evaluated(run, output=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_command(run: RunDir, tmp_path: Path) -> None:
    runner = CliRunner()
    few = ["--set", "eval.forgetting=[]", "--limit", "3", "--max-new-tokens", "4"]
    done = runner.invoke(app, ["eval", str(run.path), *few, "--fail-under", "heldout.loss.adapter < 0"])
    assert done.exit_code == 6
    assert "heldout.loss.adapter < 0" in done.stderr
    assert "exact match" in done.stdout
    assert (run.eval / "report.html").is_file(), "the reports are there when a gate failed"
    done = runner.invoke(app, ["eval", str(run.path), *few, "--json", "--compare", "base,adapter"])
    assert done.exit_code == 0
    assert list(Results.model_validate_json(done.stdout).models) == ["base", "adapter"]
    for adapter in ("nopath", "a b=path"):
        done = runner.invoke(app, ["eval", str(run.path), "--adapter", adapter])
        assert done.exit_code == 2
        assert f"--adapter {adapter}: expected NAME=PATH" in done.stderr
