"""Evaluation: base and adapter side by side on held-out rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from lorafit.audit import gate
from lorafit.data import IGNORED, prepare, special_tokens
from lorafit.errors import DataError
from lorafit.loss import settle_head
from lorafit.model import base_source, load_adapter, load_base, on_cpu
from lorafit.plan import Plan, SourcePlan
from lorafit.quiet import hush_progress
from lorafit.rows import digest
from lorafit.rundir import RunDir, open_run
from lorafit.staging import staged
from lorafit.tokenizer import load_tokenizer

Model: TypeAlias = Any
"""A PreTrainedModel, or a PeftModel around one."""


def evaluate(path: Path, data: Path | None, limit: int, max_new_tokens: int, console: Console) -> dict[str, Any]:
    """Score a run's base and result on held-out rows, and write eval/results.json.

    Losses are means over the learned tokens of all rows; answers are greedy, for the first `limit`
    rows that have a prompt. The base runs as it did in training (type and quantization).

    Returns what is written: `models` (scores of base and adapter), `samples`, and counts. Raises
    DataError without held-out rows.
    """
    hush_progress()
    with open_run(path) as (run, plan):
        report = _evaluate(run, plan, data, limit, max_new_tokens, console)
        with staged(run.eval) as folder:
            text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
            (folder / "results.json").write_text(text, encoding="utf-8")
    return report


def _evaluate(
    run: RunDir, plan: Plan, data: Path | None, limit: int, max_new_tokens: int, console: Console
) -> dict[str, Any]:
    tokenizer = load_tokenizer(plan, run.result)
    rows = held_out_rows(plan, tokenizer, data, console)
    questions = [question for row in rows if (question := as_question(row, tokenizer))][:limit]
    batch_size = plan.training_kwargs["per_device_eval_batch_size"]
    scores: dict[str, dict[str, float | None]] = {}
    answers: dict[str, list[str]] = {}
    for name, model in models(run, plan):
        scores[name] = token_scores(model, rows, tokenizer, batch_size, console, name)
        answers[name] = generate(model, questions, tokenizer, batch_size, max_new_tokens, console, name)
        right = [answer == question.expected for answer, question in zip(answers[name], questions, strict=True)]
        scores[name]["exact_match"] = sum(right) / len(right) if right else None
    return {
        "results_version": 1,
        "run": str(run.path),
        "rows": len(rows),
        "generated": len(questions),
        "models": scores,
        "samples": [
            {
                "prompt": question.shown,
                "expected": question.expected,
                "answers": {name: answers[name][index] for name in answers},
            }
            for index, question in enumerate(questions)
        ],
    }


def models(run: RunDir, plan: Plan) -> Iterator[tuple[str, Model]]:
    """The base, then the adapter on it (or the fully trained model), each ready for inference.

    The base is scored before the adapter is on it: an adapter that is turned off leaves the biases it trained.
    """
    if plan.hardware.device == "cuda" and not torch.cuda.is_available():
        plan = on_cpu(plan)
    base = _ready(load_base(plan, base_source(plan, run)), plan)
    yield "base", base
    if plan.lora_kwargs is None:
        del base
        yield "trained", _ready(load_base(plan, run.model), plan)
    else:
        yield "adapter", load_adapter(base, run.adapter)


def _ready(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """On the device it was trained on, with the head that the training used, so that losses mean the same."""
    if plan.quantization_kwargs is None:  # else it is there already
        model.to(plan.hardware.device)
    model.config.use_cache = True
    model.eval()
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    with _autocast(model):
        settle_head(model)
    return model


def held_out_rows(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, data: Path | None, console: Console | None = None
) -> Dataset:
    """Tokenized held-out rows: of a file, else those that the run kept out of training. Raises DataError."""
    if data is not None:
        first = plan.data.train[0]
        source = SourcePlan(str(data), "--data", columns=first.columns, template=first.template)
        alone = dataclasses.replace(
            plan.data, train=(source,), validation=(), validation_fraction=None, packing=False, streaming=False
        )
        made = prepare(alone, tokenizer, console)
        gate(made.audit, plan.data.audit | dict.fromkeys(("duplicates", "truncated", "lost_tokens")))
        rows = made.rows
    elif not plan.data.validation and plan.data.validation_fraction is None:
        raise DataError("the run held no rows out of training; name some with --data")
    else:
        check_unchanged(plan)
        rows = prepare(plan.data, tokenizer, console).validation
    assert rows is not None
    return rows


def check_unchanged(plan: Plan) -> None:
    """The held-out rows are those of the training only if the files are. Raises DataError."""
    for source in (*plan.data.train, *plan.data.validation):
        if source.hub is None and source.sha256 and not plan.data.streaming and digest(source.path) != source.sha256:
            raise DataError(
                f"{source.path}: has changed since the run, so its held-out rows are not known; bring the file back, "
                "or name rows with --data"
            )


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as tokens, and the answer that is expected."""

    prompt: list[int]
    shown: str
    expected: str
    end: int


def as_question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Question | None:
    """A row's last answer as a question; None for a row that is learned whole."""
    ids, labels = row["input_ids"], row["labels"]
    end = max(index for index, label in enumerate(labels) if label != IGNORED)
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    if start == 0:
        return None
    return Question(
        prompt=ids[:start],
        shown=row["question"].strip(),
        expected=tokenizer.decode(ids[start : end + 1], skip_special_tokens=True).strip(),
        end=ids[end],
    )


def _padded(rows: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """(rows, longest) from lists of different lengths."""
    longest = max(map(len, rows))
    return torch.tensor(
        [[value] * (longest - len(row)) + row if left else row + [value] * (longest - len(row)) for row in rows]
    )


@torch.no_grad()
def token_scores(
    model: Model, rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, console: Console, name: str
) -> dict[str, float | None]:
    """Mean loss, perplexity and accuracy over the learned tokens of all rows."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    total, hits, count = 0.0, 0, 0
    for start in _progress(range(0, len(order), batch_size), f"{name}: loss", console):
        batch = [rows[index] for index in order[start : start + batch_size]]
        inputs = _padded([row["input_ids"] for row in batch], tokenizer.pad_token_id)
        labels = _padded([row["labels"] for row in batch], IGNORED)
        mask = _padded([[1] * len(row["input_ids"]) for row in batch], 0)
        with _autocast(model):
            output = model(
                input_ids=inputs.to(model.device),
                attention_mask=mask.to(model.device),
                labels=labels.to(model.device),
                fused_lm_head=True,
            )
        total -= output.log_probs.double().sum().item()
        hits += int(output.is_top1.sum())
        count += int(output.label_mask.sum())
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": hits / count}


def _autocast(model: Model) -> contextlib.AbstractContextManager[Any]:
    """As in training: 16-bit weights with float32 adapters meet in 16-bit arithmetic."""
    dtype = model.dtype
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=dtype)


@torch.no_grad()
def generate(
    model: Model,
    questions: list[Question],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
    console: Console,
    name: str,
) -> list[str]:
    """Greedy answers, in the order of the questions. Stops at every end token that is known."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = set(special_tokens(tokenizer).values())
    ends = {token for token in (*known, tokenizer.eos_token_id) if token is not None}
    ends |= {question.end for question in questions if question.end in special}
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    answers = [""] * len(questions)
    for start in _progress(range(0, len(order), batch_size), f"{name}: answers", console):
        chosen = order[start : start + batch_size]
        prompts = [questions[index].prompt for index in chosen]
        inputs = _padded(prompts, tokenizer.pad_token_id, left=True).to(model.device)
        mask = _padded([[1] * len(prompt) for prompt in prompts], 0, left=True).to(model.device)
        with _autocast(model):
            output = model.generate(
                input_ids=inputs,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
        for index, ids in zip(chosen, output[:, inputs.shape[1] :].tolist(), strict=True):
            answers[index] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def _progress(steps: range, description: str, console: Console) -> Iterator[int]:
    if not console.is_terminal:
        return iter(steps)
    return iter(track(steps, description=description, console=console, transient=True))
