"""Training on pairs: TRL's losses, masks of both answers, a reference that is the start, and what is refused."""

from __future__ import annotations

import io
import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RecipeMaker, Train, make_model, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.console import Console
from lorafit.engine import pairs as pairs_module
from lorafit.engine.callbacks import StopRequest
from lorafit.engine.evaluate.run import evaluate
from lorafit.engine.merge.run import merge
from lorafit.errors import DataError, Interrupted, ModelError
from lorafit.options import EvalOptions, MergeOptions
from lorafit.plan.values import DataPlan, Preference
from lorafit.recipe import RecipeError
from lorafit.run.directory import RunDir

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dogs", "mat", "yes", "no", "or"]
STEPS = {"max_steps": 8, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """32 conversations whose rejected answers go on for two words more."""
    draw, rows = random.Random(0), []
    for _ in range(32):
        answer = " ".join(draw.sample(WORDS, 2))
        rows.append(
            {
                "prompt": turns(" ".join(draw.sample(WORDS, 3))),
                "chosen": turns("", answer)[1:],
                "rejected": turns("", f"{answer} no no")[1:],
            }
        )
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The same as plain text."""
    draw = random.Random(1)
    rows = [
        {
            "prompt": f"{draw.choice(WORDS)} {draw.choice(WORDS)}:",
            "chosen": f" {draw.choice(WORDS)}",
            "rejected": " no or",
        }
        for _ in range(32)
    ]
    return write_jsonl(tmp_path / "plain.jsonl", rows)


def of_pairs(path: Path, **sections: Any) -> dict[str, Any]:
    return {
        "dataset": {"train": [{"path": str(path)}], "validation": 0.25},
        "preference": {},
        "training": STEPS | {"eval_strategy": "steps", "eval_steps": 4},
    } | sections


def losses(run: RunDir) -> list[float]:
    return [entry["loss"] for entry in run.metrics_until(99) if "loss" in entry]


LOSSES: list[dict[str, Any]] = [
    {},
    {"loss_type": "ipo", "beta": 0.2},
    {"loss_type": "hinge"},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    {"loss_type": "robust", "label_smoothing": 0.1},
]


@pytest.mark.parametrize("asked", LOSSES, ids=str)
def test_losses_are_those_of_plain_trl(
    asked: dict[str, Any], recipe: RecipeMaker, train: Train, plain: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    training = STEPS | {"max_steps": 10, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    dataset = {"train": [{"path": str(plain)}]}
    run = train(recipe(dataset=dataset, preference=asked, training=training))
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    arguments = DPOConfig(
        str(tmp_path / "trl"),
        max_steps=10,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        seed=42,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        report_to=[],
        save_strategy="no",
        beta=asked.get("beta", 0.1),
        label_smoothing=asked.get("label_smoothing", 0.0),
        loss_type=asked.get("loss_type", "sigmoid"),
        loss_weights=asked.get("loss_weights"),
    )
    kwargs = run.load_plan().lora_kwargs or {}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        peft_config=LoraConfig(**kwargs),
    )
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses(run) == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert len(set(np.round(theirs, 3))) > 3


SOFT = {"robust": 0.1, "exo_pair": 0.001}


def formula(name: str, beta: float, smooth: float, c: np.ndarray, r: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A loss of each pair from log-ratios of the chosen and of the rejected answers, and their lengths in tokens."""

    def log_sigmoid(x: np.ndarray) -> np.ndarray:
        return -np.logaddexp(0, -x)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    d = beta * (c - r)
    mean = c / lengths[0] - r / lengths[1]
    mixed = sigmoid(d / 0.05)
    return {
        "sigmoid": -log_sigmoid(d),
        "hinge": np.maximum(0, 1 - d),
        "ipo": (mean - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": -log_sigmoid(beta * mean),
        "robust": (-(1 - smooth) * log_sigmoid(d) + smooth * log_sigmoid(-d)) / (1 - 2 * smooth),
        "exo_pair": sigmoid(d) * (log_sigmoid(d) - np.log1p(-smooth))
        + sigmoid(-d) * (log_sigmoid(-d) - np.log(smooth or 1)),
        "nca_pair": -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c) - 0.5 * log_sigmoid(-beta * r),
        "bco_pair": -log_sigmoid(beta * c) - log_sigmoid(-beta * r),
        "sppo_hard": (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2,
        "apo_zero": 1 - sigmoid(beta * c) + sigmoid(beta * r),
        "apo_down": sigmoid(beta * c) + 1 - sigmoid(beta * (c - r)),
        "discopop": -log_sigmoid(d) * (1 - mixed) + np.exp(-d) * mixed,
    }[name]


@pytest.fixture
def trainer(recipe: RecipeMaker, train: Train, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The trainer of a run, as it was before the first step."""
    kept: list[Any] = []
    check = pairs_module.check_start
    monkeypatch.setattr(pairs_module, "check_start", lambda made, plan: (kept.append(made), check(made, plan)))
    train(recipe(**of_pairs(pairs)))
    return kept[0]


def test_every_loss_is_its_formula(trainer: Any) -> None:
    """On log-probabilities made by hand; and the loss that is expected at the start is that of equal ones."""
    draw = np.random.default_rng(0)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    per_token = torch.tensor(-draw.random((4, 4)) * 3, dtype=torch.float64) * mask[:, 1:]
    ones = torch.ones(4, 4, dtype=torch.float64)
    output = type("Output", (), {"log_probs": per_token, "entropy": ones, "mean_logits": ones, "is_top1": ones > 0})()
    batch = {
        "input_ids": torch.ones(4, 5, dtype=torch.long),
        "attention_mask": torch.ones(4, 5, dtype=torch.long),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor([-3.0, -2.5], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor([-4.0, -6.5], dtype=torch.float64),
    }
    sums = per_token.sum(1).numpy().reshape(2, 2)
    ratios = sums - np.array([[-3.0, -2.5], [-4.0, -6.5]])
    lengths = mask.sum(1).numpy().reshape(2, 2)
    for beta in (0.1, 0.5):
        trainer.beta = beta
        for name in pairs_module.KNOWN_AT_START:
            trainer.label_smoothing = SOFT.get(name, 0.0)
            trainer.loss_types, trainer.loss_weights = [name], [1.0]
            found = trainer._compute_loss(lambda **_: output, batch, False).item()
            expected = formula(name, beta, SOFT.get(name, 0.0), *ratios, lengths).mean()
            assert found == pytest.approx(expected, rel=1e-6), (name, beta)
            zero = formula(name, beta, SOFT.get(name, 0.0), np.zeros(1), np.zeros(1), np.ones((2, 1))).mean()
            asked = Preference("dpo", (name,), (1.0,), beta, SOFT.get(name, 0.0), "start")
            assert pairs_module.at_start(asked) == pytest.approx(zero, rel=1e-6), (name, beta)
    assert pairs_module.at_start(Preference("dpo", ("sigmoid", "sft"), (1.0, 1.0), 0.1, 0.0, "start")) is None


def test_training_starts_at_the_reference_and_learns(recipe: RecipeMaker, train: Train, pairs: Path) -> None:
    run = train(recipe(**of_pairs(pairs)))
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    last = [entry for entry in run.metrics_until(99) if "eval_loss" in entry][-1]
    assert last["eval_rewards/accuracies"] == 1
    assert last["eval_loss"] < 0.66
    results, _ = evaluate(EvalOptions(run.path, overrides=("eval.forgetting=[]",), max_new_tokens=1))

    def value(name: str) -> float:
        found = results.figures[f"heldout.{name}"].value
        assert found is not None
        return found

    moved = value("preference_margin.adapter") - value("preference_margin.base")
    assert last["eval_rewards/margins"] == pytest.approx(0.1 * moved, rel=1e-3)
    assert last["eval_logps/chosen"] == pytest.approx(value("chosen_logp.adapter"), rel=1e-5)
    assert value("reward_accuracy.adapter") == 1


def test_both_answers_are_masked_with_their_ends(trainer: Any, pairs: Path) -> None:
    tokenizer = trainer.processing_class
    rows = {
        json.dumps([row["chosen"][0]["content"], row["rejected"][0]["content"]])
        for row in map(json.loads, pairs.open())
    }
    for row in trainer.train_dataset:
        said = []
        for ids, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels")):
            learned = [token for token, label in zip(row[ids], row[labels], strict=True) if label != -100]
            assert learned == [label for label in row[labels] if label != -100]
            assert tokenizer.decode(learned).endswith("<|im_end|>")
            said.append(tokenizer.decode(learned[:-1]))
        assert json.dumps(said) in rows
        start = next(index for index, label in enumerate(row["labels"]) if label != -100)
        assert row["input_ids"][:start] == row["rejected_ids"][:start]


@pytest.mark.parametrize(
    "sections",
    [
        {"quantization": {"load_in_4bit": True}, "model": {"dtype": "bfloat16"}},
        {"lora": {"use_dora": True}},
        {"lora": {"use_rslora": True, "bias": "all"}},
        {"lora": {"init_lora_weights": "pissa"}},
        {"lora": None},
    ],
    ids=str,
)
def test_whatever_is_trained_the_reference_is_the_start(
    sections: dict[str, Any], recipe: RecipeMaker, train: Train, pairs: Path
) -> None:
    run = train(recipe(**of_pairs(pairs, **sections)))
    assert losses(run)[0] == pytest.approx(math.log(2), abs=2e-3)
    assert losses(run)[-1] < losses(run)[0]


def test_a_stage_after_another(recipe: RecipeMaker, train: Train, rows: Path, pairs: Path) -> None:
    """The reference is the adapter that goes on, or the base; the merge of the one adapter answers as it does."""
    sft = train(
        recipe("sft", dataset={"train": [{"path": str(rows)}]}, training={"max_steps": 6, "learning_rate": 1e-2})
    )

    def onward(name: str, reference: str) -> RunDir:
        asked = {"lora": ..., "start_from": str(sft.path), "preference": {"reference": reference}}
        return train(recipe(name, **of_pairs(pairs, **asked)))

    start, base = onward("start", "auto"), onward("base", "base")
    assert losses(start)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses(base)[0] - math.log(2)) > 1e-3
    merge(MergeOptions(start.path), Console(file=io.StringIO()))
    report = json.loads((start.merged / "merge_report.json").read_text())
    assert report["verification"]["figures"]["kl"] < 1e-4
    assert [stage["path"] for stage in report["chain"]] == [str(sft.path)]


def test_a_run_that_was_stopped_goes_on_exactly(
    recipe: RecipeMaker, train: Train, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe("whole", **of_pairs(pairs)))
    path, asked = recipe("part", **of_pairs(pairs)), 0

    def agreed(_: StopRequest) -> int | None:
        nonlocal asked
        asked += 1
        return int(signal.SIGTERM) if asked == 3 else None

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "agreed", agreed)
        with pytest.raises(Interrupted):
            train(path)
    part = train(path, resume=True)
    assert losses(part) == losses(whole)
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (part, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("side", [0, 1])
def test_a_reference_that_is_not_the_start_is_caught(
    side: int, recipe: RecipeMaker, train: Train, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pairs_module.of_answers

    def other(*args: Any) -> Any:
        found = made(*args)
        found[:, side] += 0.01
        return found

    monkeypatch.setattr(pairs_module, "of_answers", other)
    with pytest.raises(ModelError, match=("chosen", "rejected")[side]):
        train(recipe(**of_pairs(pairs)))


def test_a_loss_that_is_not_its_formula_is_caught(
    recipe: RecipeMaker, train: Train, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pairs_module.KNOWN_AT_START, "sigmoid", lambda *_: 0.5)
    with pytest.raises(ModelError, match=r"0\.693147.*sigmoid"):
        train(recipe(**of_pairs(pairs)))


def test_pairs_that_can_not_be_compared(recipe: RecipeMaker, train: Train, pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    long = [*rows[:3], rows[3] | {"rejected": turns("", "no " * 200)[1:]}]
    path = write_jsonl(tmp_path / "long.jsonl", long)
    settings = of_pairs(path, training=STEPS | {"max_length": 64, "max_steps": 1})
    settings["dataset"] = {"train": [{"path": str(path)}], "audit": {"lost_tokens": None}}
    run = train(recipe("long", **settings))
    source = run.load_manifest()["data"]["audit"]["train"][0]
    assert (source["rows"], source["found"]["truncated"]["count"]) == (4, 1)
    assert source["found"]["truncated"]["first"].startswith(f"{path}:4: ")
    settings["dataset"] |= {"excess_length_strategy": "drop"}
    run = train(recipe("dropped", **settings))
    source = run.load_manifest()["data"]["audit"]["train"][0]
    assert (source["rows"], source["dropped"]) == (3, {"longer than max_length": 1})
    late = rows[3] | {side: turns("", f"{'no ' * 99}{side}")[1:] for side in ("chosen", "rejected")}
    settings["dataset"] = {"train": [{"path": str(write_jsonl(tmp_path / "late.jsonl", [*rows[:9], late]))}]}
    settings["dataset"] |= {"audit": {"lost_tokens": None}}
    run = train(recipe("late", **settings))
    source = run.load_manifest()["data"]["audit"]["train"][0]
    assert (source["rows"], source["dropped"]) == (9, {"answers_cut_off": 1})
    assert source["found"]["answers_cut_off"]["first"].startswith(f"{tmp_path}/late.jsonl:10: ")
    same = write_jsonl(tmp_path / "same.jsonl", [*rows[:2], rows[2] | {"rejected": rows[2]["chosen"]}])
    with pytest.raises(DataError, match=r"same\.jsonl:3: .*are the same"):
        train(recipe("same", **of_pairs(same)))
    single = write_jsonl(tmp_path / "single.jsonl", [{"prompt": "red", "completion": "blue"}])
    with pytest.raises(DataError, match=r"dataset\.train\.0: .*prompt_completion"):
        train(recipe("single", **of_pairs(single)))


def test_rows_whose_format_only_training_learns(tiny_model: Path) -> None:
    """As those of a hub: one without a rejected answer would be compared with itself."""
    from lorafit.engine.data.render import Renderer
    from lorafit.engine.methods import dpo
    from lorafit.rows import Row, Shape
    from lorafit.rows.audit import SourceAudit

    plan = DataPlan((), (), None, "assistant", 64, False, 0, None, False)
    row = Row("owner/rows", 7, {"prompt": "red", "completion": "blue"})
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_model), "assistant", None)
    with pytest.raises(DataError, match=r"owner/rows: row 7: .*rejected"):
        list(dpo.encode([row], Shape("prompt_completion", {}, None, ""), plan, renderer, SourceAudit("owner/rows")))


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"training": {"packing": True}}, r"training\.packing"),
        ({"lora": {"init_lora_weights": "eva"}}, r"lora\.init_lora_weights"),
        ({"preference": {"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}}, r"preference\.loss_weights"),
        ({"preference": {"label_smoothing": 0.1}}, r"preference\.label_smoothing"),
        ({"preference": {"loss_type": "exo_pair"}}, r"preference\.loss_type"),
        ({"preference": {"loss_type": "sigmod"}}, r"preference\.loss_type.*sigmoid"),
        ({"training": {"metric_for_best_model": "mean_token_accuracy"}}, r"training\.metric_for_best_model"),
        ({"preference": {"reference": "base"}, "lora": {"bias": "all"}}, r"preference\.reference"),
    ],
    ids=str,
)
def test_refusals(sections: dict[str, Any], key: str, recipe: RecipeMaker, train: Train, pairs: Path) -> None:
    with pytest.raises(RecipeError, match=key):
        train(recipe(**of_pairs(pairs) | sections))


def test_the_best_by_preference_accuracy(recipe: RecipeMaker, train: Train, pairs: Path) -> None:
    training = STEPS | {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rewards/accuracies"}
    run = train(recipe(**of_pairs(pairs, training=training)))
    found = {e["step"]: e["eval_rewards/accuracies"] for e in run.metrics_until(99) if "eval_loss" in e}
    result = run.load_manifest()["result"]
    assert result["best_metric"] == found[result["best_step"]] == max(found.values())


def test_preview_shows_both_answers(recipe: RecipeMaker, pairs: Path) -> None:
    from lorafit.engine.preview import preview
    from lorafit.plan import plan_recipe
    from lorafit.recipe import Recipe

    path = recipe(**of_pairs(pairs))
    plan = plan_recipe(Recipe.load(path, ()), path)
    report = preview(plan, [1], True, False, True)
    (row,) = report["rows"]
    said = "".join(segment["text"] for segment in row["rejected"])
    assert said.endswith(" no no<|im_end|>")
    assert all(segment["learned"] for segment in row["rejected"])
    assert len(row["rejected_ids"]) == len(row["rejected_labels"])
    assert report["packing"] is None


def test_sets_of_other_rows_after_a_training_on_pairs(
    recipe: RecipeMaker, train: Train, pairs: Path, rows: Path
) -> None:
    """Rows with one answer are measured as ever; of pairs, those that are repeated are duplicates."""
    run = train(recipe(**of_pairs(pairs, eval={"sets": [{"name": "chats", "path": str(rows)}], "forgetting": []})))
    results, _ = evaluate(EvalOptions(run.path, max_new_tokens=1))
    assert results.figures["chats.loss.adapter"].value
    assert "chats.preference_margin.adapter" not in results.figures
    lines = pairs.read_text().splitlines(keepends=True)
    same, other = (json.loads(lines[0]) for _ in range(2))
    other["rejected"] = turns("", "mat")[1:]
    again = write_jsonl(pairs.with_name("again.jsonl"), [*map(json.loads, lines), same, other])
    run = train(recipe("again", **of_pairs(again, dataset={"train": [{"path": str(again)}]}, training=STEPS)))
    found = run.load_manifest()["data"]["audit"]["duplicates"]
    assert (found["count"], found["first"].split(": ")[0]) == (1, f"{again}:33")


def test_a_model_with_a_head_of_its_own(recipe: RecipeMaker, train: Train, pairs: Path, tmp_path: Path) -> None:
    """The first loss is ln 2 also where the head's scores come in parts, and are computed anew backwards."""
    model = make_model(tmp_path / "tied", tie_word_embeddings=True)
    run = train(recipe(**of_pairs(pairs, model={"name_or_path": str(model)})))
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
