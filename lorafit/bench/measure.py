"""One model on one shape: a timed pass over the prompts and timed greedy steps; and what a model holds in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorafit.bench import Shape
from lorafit.errors import ModelError
from lorafit.evaluate.engine.arithmetic import autocast

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
    keep = _keeps_last(model)
    held = _begin_peak(ids.device)
    chosen = []
    with autocast(model):
        began = _now(clock, ids.device)
        output = model(input_ids=ids, use_cache=True, **keep)
        filled = _now(clock, ids.device)
        cache = output.past_key_values
        if cache is None:
            raise ModelError(f"{model.config.model_type} models keep no KV cache, so decoding can't be timed")
        for _ in range(new_tokens):
            newest = output.logits[:, -1:].argmax(-1)
            chosen.append(newest)
            output = model(input_ids=newest, past_key_values=cache, use_cache=True, **keep)
            cache = output.past_key_values
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
    """Of the parameters and buffers that a model holds, each once; of quantized ones as stored, with their scales."""
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


def _keeps_last(model: Runnable) -> dict[str, int]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


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
    """Of tensors, each counted once, such as tied ones."""
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
