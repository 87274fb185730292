"""Merging: an adapter and its base -> one model that transformers loads alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorafit.errors import GateError, UsageError
from lorafit.model import base_source, load_adapter, load_base, on_cpu
from lorafit.plan import Plan
from lorafit.quiet import hush_progress
from lorafit.rundir import RunDir, located, open_run
from lorafit.staging import staged
from lorafit.tokenizer import load_tokenizer

PROBE = (
    "The cat sat on the mat. Write a function that adds 12 and 30, and explain in one sentence why it is right: "
    "def add(a, b): return a + b\n"
)
"""The text whose logits are compared."""
OF_CHANGE, OF_SPREAD = 1e-2, 1e-4
"""How far two models that are the same may differ in float32: as a part of what the adapter changes, and of the
spread of the logits (for an adapter that changes next to nothing). All logits are computed in float32, so nothing
else than the order of sums makes a difference: a mean of about 1e-6 of the spread in large models. An adapter that
is left out of one of 200 matrices makes one of 1/sqrt(200), about 7e-2 of the change."""


def merge(path: Path, output: Path | None, console: Console) -> Path:
    """Merge a run's adapter with PEFT and save it with its tokenizer, whole or not at all.

    The base is the unquantized one. It is merged in float32 and rounded to the run's type once. The
    merged model must give the logits that base and adapter give together, and the saved one, loaded
    again, those of what was saved. Raises UsageError for a run that was trained in full, GateError
    if the logits differ.
    """
    hush_progress()
    with open_run(path) as (run, plan):
        destination = located(output or run.merged)
        _merge(run, plan, destination, console)
    return destination


def _merge(run: RunDir, plan: Plan, destination: Path, console: Console) -> None:
    if plan.lora_kwargs is None:
        raise UsageError(f"{run.path}: trained in full, so there is nothing to merge; the model is {run.model}")
    if destination.exists() and not (destination / "merge_report.json").is_file():
        raise UsageError(f"{destination}: exists and is not a merged model; choose another --output")
    if plan.quantization_kwargs is not None:
        console.print(
            "The adapter was trained on a quantized base and is merged into the unquantized one; answers can differ "
            "slightly from those in training.",
            style="yellow",
            soft_wrap=True,
        )
    tokenizer = load_tokenizer(plan, run.adapter)
    probe = _probe(tokenizer)
    unquantized = dataclasses.replace(on_cpu(plan), quantization_kwargs=None)
    base = load_base(unquantized, base_source(plan, run))
    stored, tied = base.dtype, plan.lora_kwargs["modules_to_save"] and base.config.get_text_config().tie_word_embeddings
    types = {name: parameter.dtype for name, parameter in base.named_parameters()}
    of_base = _logits(base.float(), probe)
    model = load_adapter(base, run.adapter)
    expected = _logits(model, probe)
    change = _distance(expected, of_base)
    allowed = OF_CHANGE * change + OF_SPREAD * expected.std().item()
    merged = model.merge_and_unload(safe_merge=False)
    difference = _distance(_logits(merged, probe), expected)
    if not difference <= allowed:
        raise GateError(
            f"{destination}: the merged model's logits differ from the adapter's by {difference:.2g} (allowed: "
            f"{allowed:.2g}), so it was not kept; please report it"
        )
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(types.get(name, stored))
    merged.config.use_cache = True
    merged.generation_config = _generation(merged, tokenizer.eos_token_id)
    with staged(destination) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        saved = _logits(merged.float(), probe)
        del base, model, merged
        reloaded = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype="auto", trust_remote_code=plan.model_kwargs["trust_remote_code"]
        )
        dtype = str(reloaded.dtype).removeprefix("torch.")
        lost = _distance(_logits(reloaded.float(), probe), saved)
        if not lost <= OF_SPREAD * saved.std().item():
            why = "; a head that is tied to embeddings which the adapter trained can't be merged yet" if tied else ""
            raise GateError(
                f"{destination}: the saved model, loaded again, gives logits that differ by {lost:.2g} from what was "
                f"saved, so it was not kept{why}"
            )
        rounding = _distance(saved, expected)
        if rounding > change / 2:
            console.print(
                f"Rounding the merged weights to {dtype} moves the logits by {rounding:.2g}, and the adapter moves "
                f"them by {change:.2g}: the adapter's work is partly lost in the merged model. Use the adapter itself, "
                "or train with model.dtype: float32.",
                style="yellow",
                soft_wrap=True,
            )
        report = {
            "run": str(run.path),
            "base": plan.model["name_or_path"],
            "method": "peft merge_and_unload",
            "base_weights": "original",
            "dtype": dtype,
            "logit_change_by_adapter": change,
            "logit_change_by_rounding": rounding,
            "logit_difference": difference,
            "allowed": allowed,
        }
        (folder / "merge_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _probe(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(1, length) token ids of ordinary text."""
    return torch.tensor([tokenizer(PROBE)["input_ids"]])


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(1, length, vocabulary)."""
    model.eval()
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean difference; NaN if the shapes differ or either is not finite."""
    return (one - other).abs().mean().item() if one.shape == other.shape else float("nan")


def _generation(model: PreTrainedModel, eos: int | None) -> GenerationConfig:
    """The base's generation settings, stopping at the tokenizer's end token too."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(token for token in (*known, eos) if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return config
