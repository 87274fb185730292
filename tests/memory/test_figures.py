"""One figure, all its places: what is shown twice is the same, whatever the batch, the method and the packing."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeMaker, Train, conversation, make_model, write_jsonl
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.engine.evaluate.run import evaluate
from lorafit.engine.memory import Meter
from lorafit.engine.merge.run import merge
from lorafit.engine.merge.verify import Figures, Proof, Reference
from lorafit.engine.preview import preview
from lorafit.engine.train import train as run_training
from lorafit.errors import UsageError
from lorafit.evaluation.answers import Judged
from lorafit.evaluation.metrics import custom_metric
from lorafit.options import EvalOptions, MergeOptions
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe, RecipeError
from lorafit.run.directory import RunDir
from lorafit.run.manifest import Start
from lorafit.run.memory import calibrate
from lorafit.text import GIB

QUIET = Console(file=io.StringIO())
NF4 = {"load_in_4bit": True}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"quantization": NF4},
    "full": {"lora": ...},
    "packed": {"training": {"packing": True}},
}
BATCHES = [("lora", 1), ("lora", 3), ("qlora", 3), ("full", 3), ("packed", 3)]


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
    assert (result["best_step"], result["best_metric"]) == (best, curve[best])
    options = EvalOptions(run.path, overrides=("eval.forgetting=[]",), max_new_tokens=1)
    results, _ = evaluate(options)
    name = list(results.models)[-1]
    assert results.figures[f"heldout.loss.{name}"].value == pytest.approx(curve[best], abs=1e-5)


@pytest.mark.parametrize(("method", "batch"), BATCHES)
def test_tokens_rows_parameters_and_steps(
    recipe: RecipeMaker, train: Train, unequal: Path, method: str, batch: int
) -> None:
    sections = dict(METHODS[method])
    one_pass = {"per_device_train_batch_size": batch, "max_steps": None, "num_train_epochs": 1}
    sections["training"] = sections.get("training", {}) | one_pass
    path = recipe(dataset={"validation": [{"path": str(unequal)}]}, **sections)
    run: RunDir = train(path)
    plan, manifest = run.load_plan(), run.load_manifest()
    shown = preview(plan_recipe(Recipe.load(path), path), list(range(1, 100)), False, False, False)
    assert plan.audit == manifest["data"]["audit"] == shown["audit"]
    assert plan.audit is not None
    part = plan.audit["training_rows"]
    assert part["supervised_tokens"] == sum(row["learned"] for row in shown["rows"])
    assert part["tokens"] == sum(row["tokens"] for row in shown["rows"])
    assert plan.schedule is not None
    steps = plan.schedule.total_steps
    assert steps == manifest["result"]["steps"] == shown["steps"]
    logged = [entry for entry in run.metrics_until(99) if "loss" in entry]
    assert len(logged) == steps
    assert logged[-1]["num_tokens"] == part["tokens"], "what the trainer saw, in one pass over all rows"
    assert run.result is not None
    [weights] = run.result.glob("*.safetensors")
    saved = sum(math.prod(tensor.shape) for name, tensor in load_file(weights).items())
    estimated = CliRunner().invoke(app, ["estimate-vram", str(path), "--set", "hardware.device=cpu", "--json"])
    assert saved == plan.trainable_parameters == manifest["model"]["trainable_parameters"]
    assert saved == json.loads(estimated.stdout)["model"]["trainable_parameters"]
    assert f"{saved:,}" in (run.result / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_peak_memory(recipe: RecipeMaker, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the log's last line, the manifest and --calibrate; the prediction in the last two."""
    monkeypatch.setattr(Meter, "measured", lambda _: {"resident": 77 * GIB + 12345})
    path, said = recipe(**METHODS[method]), io.StringIO()
    run = run_training(plan_recipe(Recipe.load(path), path), path.read_bytes(), Start(), Console(file=said, width=999))
    memory = run.load_manifest()["memory"]
    told = re.findall(r"peak ([0-9.]+) GiB", said.getvalue())
    assert set(told) == {"77.0"}
    assert memory["measured"]["resident"] == 77 * GIB + 12345
    [row] = calibrate([run.path]).rows
    assert (row.measured, row.predicted) == (
        memory["measured"]["resident"],
        memory["predicted"]["reserved"] + memory["baseline"],
    )


@pytest.mark.parametrize(("method", "batch"), [case for case in BATCHES if case[0] != "full"])
def test_the_loss_of_a_merge(recipe: RecipeMaker, train: Train, unequal: Path, method: str, batch: int) -> None:
    """The adapter's, in the merge's report and in eval; the merged model's likewise."""
    sections = dict(METHODS[method])
    sections["training"] = sections.get("training", {}) | {"per_device_train_batch_size": batch, "max_steps": 3}
    run: RunDir = train(recipe(dataset={"validation": [{"path": str(unequal)}]}, **sections))
    report = json.loads((merge(MergeOptions(run.path), QUIET) / "merge_report.json").read_text())
    options = EvalOptions(run.path, overrides=("eval.forgetting=[]",), max_new_tokens=1)
    figures = evaluate(options)[0].figures
    proved = report["verification"]
    assert figures["heldout.loss.adapter"].value == pytest.approx(proved["adapter"]["loss"], abs=1e-4)
    assert figures["heldout.loss.merged"].value == pytest.approx(proved["figures"]["loss"], abs=1e-3)


GSM8K = [
    {"question": f"Sam has {n} red cats and sees {n + 1} more. How many?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"}
    for n in range(6)
]
SHAPES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "conversations": ([conversation(row["question"], row["answer"]) for row in GSM8K], {}),
    "columns": ([{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in GSM8K], {}),
    "a space at the end": ([{"prompt": row["question"] + " ", "completion": row["answer"]} for row in GSM8K], {}),
    "reasoning switched off": (
        [conversation(row["question"], row["answer"]) for row in GSM8K],
        {"model": {"chat_template": "qwen3"}},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_answers_are_those_of_the_saved_adapter_and_tokenizer_alone(
    recipe: RecipeMaker, train: Train, tmp_path: Path, shape: str
) -> None:
    """Row by row, in plain transformers and PEFT, as a server would ask."""
    data, sections = SHAPES[shape]
    rows = [{"path": str(write_jsonl(tmp_path / "gsm8k.jsonl", data))}]
    training = {"max_steps": 8, "per_device_train_batch_size": 6, "max_length": 256}
    audit = {"leaked": None, "prompt_boundary": None}
    dataset = {"train": rows, "validation": rows, "audit": audit}
    run: RunDir = train(recipe(dataset=dataset, training=training, **sections))
    options = EvalOptions(run.path, overrides=("eval.forgetting=[]",), max_new_tokens=12)
    _, folder = evaluate(options)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(run.adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter)
    for row, sample in zip(data, samples, strict=True):
        turns = {"tokenize": False, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(row["messages"][:1], **turns) if "messages" in row else row["prompt"]
        inputs = tokenizer(text, add_special_tokens="prompt" in row, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        alone = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["answers"]["adapter"]["text"] == alone.strip()
        assert sample["expected"] == (row["completion"] if "prompt" in row else row["messages"][1]["content"])
    if shape == "reasoning switched off":
        assert run.load_plan().data.chat_template_kwargs == {"enable_thinking": False}
        assert "prompt_differs" not in run.load_manifest()["data"]["audit"]["train"][0]["found"]


LEADING: dict[str, tuple[dict[str, Any], str]] = {
    "a space": ({"prompt": "say ", "completion": "yes"}, "prompt_boundary"),
    "two spaces": ({"prompt": "say  ", "completion": "yes"}, "prompt_boundary"),
    "within a word": ({"prompt": "say he", "completion": "llo"}, "prompt_boundary"),
    "an answer with a space": (conversation("say", "  yes"), ""),
    "a clean border": ({"prompt": "say", "completion": " yes"}, ""),
    "an empty block in a template": (conversation("say", "yes"), "prompt_differs"),
}


@pytest.mark.parametrize("what", LEADING)
def test_rows_that_ask_otherwise_than_they_learn(recipe: RecipeMaker, tmp_path: Path, what: str) -> None:
    row, rule = LEADING[what]
    path = write_jsonl(tmp_path / "odd.jsonl", [row] * 3)
    sections: dict[str, Any] = {"dataset": {"train": [{"path": str(path)}], "audit": {"duplicates": None}}}
    if rule == "prompt_differs":
        sections["model"] = {"chat_template": "qwen3", "chat_template_kwargs": {"enable_thinking": True}}
    file = recipe(**sections)
    report = preview(plan_recipe(Recipe.load(file), file), [], False, False, False)
    (source,) = report["audit"]["train"]
    found = {name: finding["count"] for name, finding in source["found"].items() if name.startswith("prompt_")}
    assert found == ({rule: 3} if rule else {})
    assert bool(report["breaches"]) == (rule == "prompt_differs")
    assert source["empty_reasoning"] == (3 if rule == "prompt_differs" else 0)


# --- what would not be learned --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"max_steps": 3, "warmup_steps": 10}, "remark"),
        ({"max_steps": 3, "warmup_steps": 3}, "remark"),
        ({"max_steps": 2, "warmup_ratio": 0.9}, "remark"),
        ({"max_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 1}, "remark"),
        ({"max_steps": ..., "num_train_epochs": 1, "per_device_train_batch_size": 12, "warmup_steps": 2}, "remark"),
        ({"max_steps": 1, "warmup_steps": 1}, "refused"),
        ({"max_steps": 1, "warmup_ratio": 0.1}, ""),
        ({"max_steps": ..., "num_train_epochs": 1, "per_device_train_batch_size": 24, "warmup_steps": 2}, "refused"),
        ({"max_steps": 10, "warmup_steps": 3}, ""),
        ({"max_steps": 10, "warmup_steps": 0.1}, ""),
        ({"max_steps": 1}, ""),
        ({"max_steps": ..., "num_train_epochs": 1, "per_device_train_batch_size": 24}, ""),
    ],
)
def test_a_warm_up_that_is_as_long_as_the_run(recipe: RecipeMaker, training: dict[str, Any], said: str) -> None:
    path = recipe(training=training)
    if said == "refused":
        with pytest.raises((RecipeError, UsageError), match=r"training\.warmup_"):
            plan_recipe(Recipe.load(path), path)
        return
    plan = plan_recipe(Recipe.load(path), path)
    assert bool([remark for remark in plan.remarks if "warm-up" in remark.lower()]) == (said == "remark")
    assert plan.schedule is not None
    if plan.schedule.total_steps == 1:
        assert plan.training.warmup_steps == plan.choices["training.warmup_ratio"].value == 0


@pytest.mark.parametrize("added", ["word", "padding"])
def test_ids_that_the_model_has_no_embedding_for(recipe: RecipeMaker, tmp_path: Path, added: str) -> None:
    """Refused before weights load, naming the row or the token, by everything that reads the data."""
    model = make_model(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"filler{number}" for number in range(384 - len(tokenizer))])  # as many as embeddings
    if added == "word":
        tokenizer.add_tokens(["zorkmid"])
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    rows = [conversation(f"one {number}", "a zorkmid" if number == 2 else "two") for number in range(4)]
    data = write_jsonl(tmp_path / "ids.jsonl", rows)
    path = recipe(dataset={"train": [{"path": str(data)}]}, model={"name_or_path": str(model)})
    code, where = (3, "ids.jsonl:3: ") if added == "word" else (4, "'<pad>'")
    for command in (["validate", "--deep"], ["preview"], ["train"]):
        done = CliRunner().invoke(app, [*command, str(path)])
        assert (done.exit_code, where in done.output, "384" in done.output) == (code, True, True), done.output
    assert not (tmp_path / "runs" / "recipe" / "adapter").exists()


# --- which is chosen, and what is said ------------------------------------------------------------


def figures(loss: float, kl: float) -> Figures:
    return Figures(loss, loss - 1.0, kl, kl, 1.0, 0.0)


@pytest.mark.parametrize(
    ("original", "dequantized", "chosen"),
    [
        ((0.9, 0.192), (1.0, 0.0008), "dequantized"),  # breaks max_kl with the lower loss
        ((0.9, 0.001), (1.0, 0.0008), "original"),  # both hold: the lower loss
        ((1.0, 0.002), (1.0, 0.001), "dequantized"),  # the lower divergence at equal loss
        ((0.9, 0.5), (1.0, 0.3), "original"),  # none holds
        ((1.0, math.nan), (1.2, 0.001), "dequantized"),
    ],
)
def test_the_candidate_that_holds_the_limits(
    original: tuple[float, float], dequantized: tuple[float, float], chosen: str
) -> None:
    proof = Proof("logits", "", Reference([], "rows", [], 1.0, 0.0))
    proof.figures = {"original": figures(*original), "dequantized": figures(*dequantized)}
    assert proof.better_of(["original", "dequantized"], {"max_kl": 0.01})[0] == chosen


def test_a_metric_that_says_yes_or_no_is_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_metrics_of_figures.py").write_text(
        "def right(answer, expected): return answer == expected\n"
        "def some(answer, expected): return None if answer == 'x' else True\n"
        "def length(answer, expected): return len(answer)\n"
        "def mixed(answer, expected): return True if answer == 'x' else 2\n"
        "def nothing(answer, expected): return None\n"
    )
    monkeypatch.chdir(tmp_path)
    shares = {}
    for name in ("right", "some", "length", "mixed", "nothing"):
        metric = custom_metric(f"my_metrics_of_figures:{name}")
        for answer in ("x", "y"):
            metric.score(Judged(answer=answer, expected="x"))
        shares[name] = metric.says_yes_or_no()
    assert shares == {"right": True, "some": True, "length": False, "mixed": False, "nothing": False}


def test_early_stopping_is_told(recipe: RecipeMaker, unequal: Path) -> None:
    training = {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 2}
    training |= {"learning_rate": 0.3, "warmup_steps": 0}
    path = recipe(dataset={"validation": [{"path": str(unequal)}]}, training=training)
    said = io.StringIO()
    console = Console(file=said, width=200)
    run = run_training(plan_recipe(Recipe.load(path), path), path.read_bytes(), Start(), console)
    result = run.load_manifest()["result"]
    assert result["stopped_early"]
    lines = [line for line in said.getvalue().splitlines() if line.startswith(("early stopping", "kept"))]
    assert f"step {result['steps']} of 40" in lines[0]
    assert f"step {result['best_step']}," in lines[1]
    assert f"{result['best_metric']:.4f}" in lines[1]


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>", "<think>\n</think>\n"])
def test_an_empty_block_in_the_rows_is_no_reasoning(recipe: RecipeMaker, tmp_path: Path, block: str) -> None:
    """It isn't learned, and the template's switch is set as for rows without."""
    rows = write_jsonl(tmp_path / "empty.jsonl", [conversation(f"say {n}", f"{block}yes") for n in range(3)])
    path = recipe(model={"chat_template": "qwen3"}, dataset={"train": [{"path": str(rows)}], "validation": None})
    plan = plan_recipe(Recipe.load(path), path)
    assert plan.data.chat_template_kwargs == {"enable_thinking": False}
    shown = preview(plan, [1, 2, 3], True, False, False)
    assert not shown["breaches"]
    for row in shown["rows"]:
        learned = "".join(part["text"] for part in row["segments"] if part["learned"])
        assert "think" not in learned
        assert learned.startswith("yes")
