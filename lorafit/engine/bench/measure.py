"""One model on one shape, timed; and the models of a run that are measured, as they are in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit.bounds import read_json
from lorafit.engine.evaluate.batches import autocast, cache_of, placed, takes, with_cache
from lorafit.engine.evaluate.models import NamedModel, base_of, from_disk, merged_at, result_of
from lorafit.engine.model import load_adapter
from lorafit.errors import ModelError, UsageError
from lorafit.files import check
from lorafit.hardware import available_memory
from lorafit.options import Shape, copy_of
from lorafit.plan import Plan
from lorafit.run.directory import RunDir

Clock: TypeAlias = Callable[[], float]
"""Seconds from any start, such as time.perf_counter."""
Runnable: TypeAlias = Any
"""A PreTrainedModel, or a PeftModel around one."""


@dataclass(frozen=True)
class Pass:
    """What was timed.

    Attributes:
        tokens: (batch, new_tokens) greedy tokens.
        cached_tokens: of each row, in the cache at the end: those of the prompt and the new ones.
        cache_bytes: of the cache's tensors at the end.
        above_bytes: the most that CUDA had allocated above what was allocated at the start; None on a CPU.
    """

    prefill_seconds: float
    decode_seconds: float
    tokens: torch.Tensor
    cached_tokens: int
    cache_bytes: int
    above_bytes: int | None


@torch.inference_mode()
def run_pass(model: Runnable, ids: torch.Tensor, new_tokens: int, clock: Clock) -> Pass:
    """Prefill and decode, timed apart. Raises ModelError for a model without a KV cache.

    Prefill is one pass over the prompts that fills the cache and, where the model can be told so, computes the logits
    of the last position only. A step of decoding takes the most likely token of each row, ending or not, and runs the
    model on it with the cache; so all steps are timed, and nothing else.

    Args:
        ids: (batch, prompt tokens), all of one length, on the model's device.
    """
    keep = {"logits_to_keep": 1} if "logits_to_keep" in takes(model) else {}
    held = _begin_peak(ids.device)
    chosen = []
    with autocast(model):
        began = _now(clock, ids.device)
        output = model(input_ids=ids, use_cache=True, **keep)
        filled = _now(clock, ids.device)
        cache = cache_of(output)
        if cache is None:
            raise ModelError(f"{model.config.model_type} models keep no KV cache, so decoding can't be timed")
        for _ in range(new_tokens):
            newest = output.logits[:, -1:].argmax(-1)
            chosen.append(newest)
            output = model(input_ids=newest, use_cache=True, **with_cache(model, cache), **keep)
            cache = cache_of(output)
        ended = _now(clock, ids.device)
    return Pass(
        filled - began,
        ended - filled,
        torch.cat(chosen, dim=1),
        int(cache.get_seq_length()),
        _bytes(_cache_tensors(cache)),
        None if held is None else torch.cuda.max_memory_allocated(ids.device) - held,
    )


def tensor_bytes(model: Runnable) -> int:
    """Bytes of the parameters and buffers that a model holds, each once; quantized ones as stored, with scales."""
    return _bytes(_model_tensors(model))


def draw_tokens(tokenizer: PreTrainedTokenizerBase, vocabulary: int, shape: Shape, seed: int) -> torch.Tensor:
    """Random prompts of the tokenizer's plain tokens, (batch, prompt tokens): the same ones for a seed and a shape.

    Args:
        vocabulary: ids from here on are left out, since the model has no embeddings for them.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    plain = sorted(token for token in set(tokenizer.get_vocab().values()) - special if token < vocabulary)
    drawn = np.random.default_rng([seed, shape.prompt_tokens, shape.batch]).choice(
        np.asarray(plain, dtype=np.int64), (shape.batch, shape.prompt_tokens)
    )
    return torch.from_numpy(drawn)


def _now(clock: Clock, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _begin_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each counted once, such as tied ones."""
    sizes = {(tensor.device, tensor.data_ptr()): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(sizes.values())


def _model_tensors(model: Runnable) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter
        yield from _held(getattr(parameter, "quant_state", None))
        yield from _held([getattr(parameter, name, None) for name in ("CB", "SCB")])
    yield from model.buffers()
    for module in model.modules():  # bitsandbytes moves 8-bit weights to a state as they first run
        state = getattr(module, "state", None)
        yield from _held([getattr(state, name, None) for name in ("CB", "SCB")])


def _held(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in lists and in bitsandbytes' quantization states, which are nested where scales are quantized too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _held(part)
    elif type(value).__name__ == "QuantState":
        yield from _held(list(vars(value).values()))


def _cache_tensors(cache: Any) -> Iterator[torch.Tensor]:
    for layer in getattr(cache, "layers", ()):
        yield from (value for value in vars(layer).values() if isinstance(value, torch.Tensor))


QUANTIZED = ("nf4", "fp4")
"""Kinds of 4-bit copies that `lorafit merge --quantize` makes, in folders of these endings."""


def models_of(run: RunDir, plan: Plan, names: tuple[str, ...]) -> list[NamedModel]:
    """The models to measure, by name; all that the run has if none is named. Raises UsageError, ModelError."""
    result = result_of(run, plan)
    other = {"adapter": "trained", "trained": "adapter"}[result.kind]
    if other in names:
        raise UsageError(f"--model {other}: {run.path} has none; its result is called {result.kind}")
    found: dict[str, NamedModel] = {"base": base_of(run, plan), result.kind: result}
    if "merged" in names or (not names and run.merged.is_dir()):
        found["merged"] = merged_at("merged", run.merged, run, plan)
    copy = next((folder for kind in QUANTIZED if (folder := copy_of(run.merged, kind)).is_dir()), None)
    if "quantized" in names and copy is None:
        raise UsageError(
            f"{run.path}: has no quantized merge; make it with `lorafit merge {run.path} --quantize {QUANTIZED[0]}`"
        )
    if copy is not None and (not names or "quantized" in names):
        found["quantized"] = _quantized_at(copy, run, plan)
    return [contender for name, contender in found.items() if not names or name in names]


def _quantized_at(folder: Path, run: RunDir, plan: Plan) -> NamedModel:
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


class SharedBase:
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
    parameters = plan.model.parameters
    if loadings == 1 or free is None or parameters is None:
        return loadings == 1
    size = getattr(torch, plan.dtype).itemsize
    return bool(loadings * parameters * size <= free / 2)


@contextlib.contextmanager
def loaded(group: list[NamedModel]) -> Iterator[SharedBase]:
    """Models that share a base, as an evaluation loads them, but with their own heads; until the block ends."""
    base, plan = from_disk(group[0])
    adapter = next((Path(one.path) for one in group if one.kind == "adapter"), None)
    shared = SharedBase(placed(base, plan.hardware.device), adapter)
    del base
    try:
        yield shared
    finally:
        del shared
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
