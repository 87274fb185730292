"""The models of a run that are measured: which they are, and as they are in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorafit.bench.measure import Runnable
from lorafit.errors import ModelError, UsageError
from lorafit.evaluate.contenders import Contender, base_of, merged_at, result_of
from lorafit.facts.folder import read_json
from lorafit.files import check
from lorafit.hardware import available_memory
from lorafit.model import base_source, load_adapter, load_base, on_cpu
from lorafit.plan import Plan
from lorafit.rundir import RunDir

QUANTIZED = ("nf4", "fp4")
"""Kinds of 4-bit copies that `lorafit merge --quantize` makes, in folders of these endings."""


def contenders_of(run: RunDir, plan: Plan, names: tuple[str, ...]) -> list[Contender]:
    """The models to measure, by name; all that the run has if none is named. Raises UsageError, ModelError."""
    result = result_of(run, plan)
    other = {"adapter": "trained", "trained": "adapter"}[result.kind]
    if other in names:
        raise UsageError(f"--model {other}: {run.path} has none; its result is called {result.kind}")
    found: dict[str, Contender] = {"base": base_of(run, plan), result.kind: result}
    if "merged" in names or (not names and run.merged.is_dir()):
        found["merged"] = merged_at("merged", run.merged, run, plan)
    copy = next((folder for kind in QUANTIZED if (folder := run.path / f"{run.merged.name}-{kind}").is_dir()), None)
    if "quantized" in names and copy is None:
        raise UsageError(
            f"{run.path}: has no quantized merge; make it with `lorafit merge {run.path} --quantize {QUANTIZED[0]}`"
        )
    if copy is not None and (not names or "quantized" in names):
        found["quantized"] = _quantized_at(copy, run, plan)
    return [contender for name, contender in found.items() if not names or name in names]


def _quantized_at(folder: Path, run: RunDir, plan: Plan) -> Contender:
    """The 4-bit copy of a run's merged model. Raises ModelError if it is not known to be that."""
    merged = merged_at("quantized", run.merged, run, plan)
    exported = read_json(run.merged / "merge_report.json").get("exported") or ()
    if folder.name not in (Path(one).name for one in exported):
        raise ModelError(
            f"{folder}: was not made of the model in {run.merged}; make it anew with "
            f"`lorafit merge {run.path} --quantize {folder.name.rpartition('-')[2]}`"
        )
    check(folder)
    return dataclasses.replace(merged, path=str(folder))


class Sides:
    """A base and an adapter on it, of which one runs at a time.

    The base runs as it was loaded, without PEFT's modules: those cost time even where the adapter is turned off.
    (Biases that an adapter trained are left in it; they change its answers, not its speed.)
    """

    def __init__(self, base: PreTrainedModel, adapter: Path | None = None) -> None:
        before = dict(base.named_modules())
        self._base = base
        self._adapter = load_adapter(base, adapter) if adapter else None
        places = [(before[name.rpartition(".")[0]], name.rpartition(".")[2], module) for name, module in before.items()]
        self._swaps = [
            (parent, leaf, module, parent.get_submodule(leaf))
            for parent, leaf, module in places
            if leaf and parent.get_submodule(leaf) is not module
        ]

    def use(self, with_adapter: bool) -> Runnable:
        """The base, or the adapter on it."""
        for parent, leaf, plain, adapted in self._swaps:
            setattr(parent, leaf, adapted if with_adapter else plain)
        return self._adapter if with_adapter else self._base


def fit_together(plan: Plan, loadings: int) -> bool:
    """Whether so many models of a plan's size and type take less than half of the free memory, or there is but one."""
    on_gpu = plan.hardware.device == "cuda" and torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else available_memory()
    parameters = plan.model["parameters"]
    if loadings == 1 or free is None or parameters is None:
        return loadings == 1
    size = getattr(torch, plan.model_kwargs["dtype"]).itemsize
    return bool(loadings * parameters * size <= free / 2)


@contextlib.contextmanager
def loaded(group: list[Contender]) -> Iterator[Sides]:
    """Models that share a base, as an evaluation loads them, but with their own heads; until the block ends."""
    first = group[0]
    plan = first.plan
    if plan.hardware.device == "cuda" and not torch.cuda.is_available():
        plan = on_cpu(plan)
    if first.kind in ("trained", "merged"):
        plan = dataclasses.replace(plan, quantization_kwargs=None)
        source: Path | None = Path(first.path)
    else:
        source = base_source(plan, first.run)
    base = load_base(plan, source)
    if getattr(base, "hf_quantizer", None) is None:  # else it is there already
        base.to(plan.hardware.device)
    base.config.use_cache = True
    base.eval()
    adapter = next((Path(one.path) for one in group if one.kind == "adapter"), None)
    sides = Sides(base, adapter)
    del base
    try:
        yield sides
    finally:
        del sides
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
