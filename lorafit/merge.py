"""Merging: an adapter and its base -> one model that transformers loads alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lorafit.errors import GateError, UsageError
from lorafit.model import base_source, load_adapter, load_base, load_tokenizer
from lorafit.plan import Plan
from lorafit.quiet import hush_progress
from lorafit.rundir import RunDir, open_run
from lorafit.staging import staged

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of logits, relative to their spread, between adapter and merged model."""


def merge(path: Path, output: Path | None, console: Console) -> Path:
    """Merge a run's adapter with PEFT and save it with its tokenizer, whole or not at all.

    The base is the unquantized one, in the run's type. The saved model is loaded again and must
    give the logits that base and adapter give together. Raises UsageError for a run that was
    trained in full, GateError if the logits differ.
    """
    hush_progress()
    run, plan = open_run(path)
    if plan.lora_kwargs is None:
        raise UsageError(f"{path}: trained in full, so there is nothing to merge; the model is {run.model}")
    destination = output or run.merged
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
    model = load_adapter(_unquantized(plan, run), run.adapter)
    probe = torch.arange(min(64, model.config.get_text_config().vocab_size)).unsqueeze(0)
    expected = _logits(model, probe)
    merged = model.merge_and_unload(safe_merge=False)
    merged.config.use_cache = True
    merged.generation_config = _generation(merged, tokenizer.eos_token_id)
    with staged(destination) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model, merged
        reloaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
        difference = _difference(expected, _logits(reloaded, probe))
        tolerance = TOLERANCE[reloaded.dtype]
        if not difference <= tolerance:
            raise GateError(
                f"{destination}: the merged model's logits differ from the adapter's by {difference:.2g} of their "
                f"spread (allowed: {tolerance:g}), so it was not kept; embeddings or an output head that are tied in "
                "the base and trained in the adapter can't be merged yet"
            )
        report = {
            "run": str(run.path),
            "base": plan.model["name_or_path"],
            "method": "peft merge_and_unload",
            "base_weights": "original",
            "dtype": str(reloaded.dtype).removeprefix("torch."),
            "logit_difference": difference,
            "allowed": tolerance,
        }
        (folder / "merge_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return destination


def _unquantized(plan: Plan, run: RunDir) -> PreTrainedModel:
    import dataclasses

    return load_base(dataclasses.replace(plan, quantization_kwargs=None), base_source(run))


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(1, length, vocabulary) in float32."""
    model.eval()
    return model(input_ids=ids.to(model.device)).logits.float().cpu()


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference relative to the spread of the expected logits; NaN if either is not finite."""
    if expected.shape != actual.shape:
        return float("nan")
    return float((expected - actual).abs().max() / expected.std().clamp(min=1e-6))


def _generation(model: PreTrainedModel, eos: int | None) -> GenerationConfig:
    """The base's generation settings, stopping at the tokenizer's end token too."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(token for token in (*known, eos) if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return config
