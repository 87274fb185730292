"""Several adapters as one: the low-rank adapter nearest to the sum of their full deltas."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from lorafit.engine.merge.edits import LayerEdit
from lorafit.engine.merge.folder import combined, copy_tokenizer, write_json
from lorafit.engine.merge.skeleton import attach, empty_model
from lorafit.engine.merge.stream import combined_delta
from lorafit.errors import GateError, UsageError
from lorafit.files import staged
from lorafit.progress import each
from lorafit.run.manifest import versions
from lorafit.written import as_written

if TYPE_CHECKING:
    from lorafit.engine.merge.run import Merging

EXACT_BELOW = 1024
"""Smaller side up to which the decomposition is exact; above, it is randomized (torch.svd_lowrank), with power
iterations. Randomized or not, the error that is reported is that of what is written."""


def make_adapter(merging: Merging, destination: Path) -> Path:
    """Write a plain LoRA adapter of one rank for the (combined) delta, and report what the truncation loses.

    The scale is 1 (lora_alpha = r), and the singular values are shared evenly by A and B. Raises UsageError for
    changes that are no matrices, such as biases, and GateError if the written adapter gives other deltas.
    """
    began = time.perf_counter()
    merging.prepare()
    if not merging.tasks:
        raise UsageError(f"{merging.source.shown}: can't be made a plain adapter: {merging.method_reason}")
    # DoRA's deltas depend on the base: that of the training, unless another one was asked for
    trained_on = "original" if merging.settings.base_weights == "original" else "dequantized"
    task, rank = merging.tasks.get(trained_on, merging.tasks["original"]), merging.options.rank
    assert rank is not None
    tensors: dict[str, torch.Tensor] = {}
    targets: list[dict[str, Any]] = []
    jobs = [job for job in task.jobs if job.edits]
    for job in each(jobs, "decomposing the changes", len(jobs), "weights"):
        module, _, leaf = job.parameter.rpartition(".")
        layer = next((edit.layer for edit in job.all_edits if isinstance(edit, LayerEdit)), None)
        if leaf != "weight" or len(job.shape) != 2 or layer is None:
            raise UsageError(
                f"{job.parameter}: is changed, and not by a low-rank matrix, so it can't be part of one adapter"
            )
        delta = combined_delta(job)
        turned = bool(getattr(layer, "fan_in_fan_out", False))
        embedding = len(layer.lora_embedding_A) > 0
        matrix = delta.T if turned or embedding else delta  # (out, in), or (width, vocabulary)
        u, s, v = _decomposed(matrix, rank)
        root = s.sqrt()
        b, a = u * root, root[:, None] * v.T
        error = torch.linalg.vector_norm(matrix - b @ a) / torch.linalg.vector_norm(matrix).clamp_min(1e-30)
        names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        for name, value in zip(names, (a, b), strict=True):
            tensors[f"base_model.model.{module}.{name}"] = value.contiguous()
        targets.append({"module": module, "rank": len(s), "truncation_error": float(error)})
    ranks = {target["module"]: target["rank"] for target in targets if target["rank"] != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=[target["module"] for target in targets],
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        base_model_name_or_path=as_written(merging.base.name, merging.references),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with staged(destination, "merge") as folder:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if merging.tokenizer is not None:
            copy_tokenizer(merging.tokenizer, folder)
        _check(merging, folder, tensors)
        errors = [target["truncation_error"] for target in targets]
        report = {
            "report_version": 2,
            "verdict": "One adapter of several; its layers give what was decomposed.",
            "adapter": merging.source.shown,
            "additions": [{"adapter": str(a.path), "weight": a.weight} for a in merging.options.additions],
            **combined(merging),
            "rank": rank,
            "truncation_error": {"largest": max(errors), "mean": math.fsum(errors) / len(errors)},
            "targets": targets,
            "seconds": round(time.perf_counter() - began, 3),
            "versions": versions(),
        }
        write_json(folder / "merge_report.json", as_written(report, merging.references))
    merging.console.print(
        f"rank {rank}: the truncation loses {report['truncation_error']['mean']:.2%} of a delta's norm in the mean, "
        f"{max(errors):.2%} at most",
        highlight=False,
        soft_wrap=True,
    )
    return destination


def _decomposed(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, k), (k,), (in, k): the largest singular values, no more than there are."""
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= EXACT_BELOW:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank].T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=6)
    return u[:, :rank], s[:rank], v[:, :rank]


def _check(merging: Merging, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """PEFT must find a layer for every tensor, with the scale that was meant. Raises GateError."""
    attached = attach(empty_model(merging.config), folder)
    for name, edits in attached.edits.items():
        layer = next(edit.layer for edit in edits if isinstance(edit, LayerEdit))
        if layer.scaling["default"] != 1:
            raise GateError(f"{name}: the adapter's scale is {layer.scaling['default']}, not 1; please report it")
    if 2 * len(attached.edits) != len(tensors):
        raise GateError(f"{folder}: PEFT reads {len(attached.edits)} layers of {len(tensors) // 2}; please report it")
