"""The merge in memory, by PEFT, where tensor by tensor is impossible; and several adapters as one, nearest to their
sum."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorafit.engine.merge.edits import LayerEdit
from lorafit.engine.merge.folder import combined, copy_tokenizer, write_json
from lorafit.engine.merge.skeleton import attach, empty_model
from lorafit.engine.merge.stream import combined_delta
from lorafit.engine.merge.task import RoundTrip
from lorafit.engine.model import loading
from lorafit.engine.tokenizer import reading
from lorafit.errors import GateError, ModelError, UsageError
from lorafit.files import staged
from lorafit.plan.adapters import check_adapter
from lorafit.progress import each
from lorafit.run.manifest import versions
from lorafit.text import first_line
from lorafit.written import as_written

if TYPE_CHECKING:
    from lorafit.engine.merge.run import Merging


def merge_in_memory(
    base: Path, adapter: Path, folder: Path, round_trip: RoundTrip | None, dtype: torch.dtype | None
) -> tuple[int, bool]:
    """Load the base, merge with PEFT in float32, round once, and save.

    Returns:
        how many layers were merged, and whether tied embeddings had to be untied. Raises ModelError, GateError.
    """
    with reading("base", base), loading(base):
        model = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto", trust_remote_code=False)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(
            f"{base}: is stored quantized, so it can't be merged into in memory; name the model that it was made of "
            "with --base"
        )
    types = {name: dtype or p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    for name, parameter in model.named_parameters():
        if round_trip is not None and name in round_trip.parameters:
            parameter.data = round_trip(name, parameter.data)
    model = model.float()
    check_adapter(adapter, (name for name, _ in model.named_modules()))
    with reading("adapter", adapter), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        found = peft.load_adapter(str(adapter), "default", torch_device="cpu")  # again, for it tells what it finds
    if peft.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{adapter}: is of PEFT's type {peft.active_peft_config.peft_type.value}, which no weights hold"
        )
    if found.missing_keys:
        raise ModelError(f"{adapter}: lacks {len(found.missing_keys)} of its tensors, such as {found.missing_keys[0]}")
    if found.unexpected_keys:
        raise ModelError(
            f"{adapter}: holds {len(found.unexpected_keys)} tensors that the base has no place for, such as "
            f"{found.unexpected_keys[0]}; it belongs to another model"
        )
    merged_layers = _check(peft, adapter)
    _separate_tied(peft)
    try:
        merged: PreTrainedModel = peft.merge_and_unload(safe_merge=False)
    except Exception as error:
        raise ModelError(f"{adapter}: PEFT can't merge it into this base: {first_line(error)}") from error
    untied = _is_untied(merged)
    if untied:
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}
    last = dtype or next(iter(types.values()), torch.float32)
    for name, parameter in merged.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(types.get(name, last))
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise GateError(
                f"{name}: the merged weight holds numbers that are not finite in {str(parameter.dtype)[6:]}; the "
                "adapter is broken, or --dtype float32 is needed"
            )
    merged.save_pretrained(folder)
    return merged_layers, untied


def _check(peft: PeftModel, adapter: Path) -> int:
    """How many layers the adapter has. Raises GateError for one that changes nothing or is not finite."""
    for name, parameter in peft.named_parameters():
        if "lora_" in name and not torch.isfinite(parameter).all():
            raise GateError(f"{adapter}: {name} holds numbers that are not finite; the adapter is broken")
    count = 0
    for name, module in peft.named_modules():
        if isinstance(module, BaseTunerLayer):
            count += 1
            size = math.inf
            with torch.no_grad(), contextlib.suppress(AttributeError, NotImplementedError, TypeError):
                size = float(torch.linalg.vector_norm(module.get_delta_weight("default")))
            if size == 0:
                raise GateError(
                    f"{name}: the adapter changes nothing here, so it is untrained or broken; nothing was kept"
                )
    return count


def _separate_tied(peft: PeftModel) -> None:
    """Give a tied parameter a copy of its own if a layer adds to one of the two: PEFT adds in place, to both."""
    inner = peft.base_model.model
    for target, source in getattr(inner, "all_tied_weights_keys", {}).items():
        owners = [inner.get_submodule(name.rpartition(".")[0]) for name in (target, source)]
        if any(isinstance(owner, BaseTunerLayer) for owner in owners):
            mine = owners[0].get_base_layer() if isinstance(owners[0], BaseTunerLayer) else owners[0]
            if isinstance(getattr(mine, "weight", None), nn.Parameter):
                mine.weight = nn.Parameter(mine.weight.detach().clone(), requires_grad=False)


def _is_untied(model: PreTrainedModel) -> bool:
    pairs = getattr(model, "all_tied_weights_keys", {}).items()
    return any(not torch.equal(model.get_parameter(target), model.get_parameter(source)) for target, source in pairs)


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
        _check_nearest(merging, folder, tensors)
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


def _check_nearest(merging: Merging, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """PEFT must find a layer for every tensor, with the scale that was meant. Raises GateError."""
    attached = attach(empty_model(merging.config), folder)
    for name, edits in attached.edits.items():
        layer = next(edit.layer for edit in edits if isinstance(edit, LayerEdit))
        if layer.scaling["default"] != 1:
            raise GateError(f"{name}: the adapter's scale is {layer.scaling['default']}, not 1; please report it")
    if 2 * len(attached.edits) != len(tensors):
        raise GateError(f"{folder}: PEFT reads {len(attached.edits)} layers of {len(tensors) // 2}; please report it")
