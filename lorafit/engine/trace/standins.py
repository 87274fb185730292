"""What CUDA kernels allocate, imitated on `meta` tensors, where torch would take another path.

Each stand-in makes the tensors that the kernel makes, in its order, and saves for the backward pass
what the kernel saves. Sources are named at each.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import bitsandbytes.functional
import bitsandbytes.nn
import torch
from torch.nn import functional
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl.kernels import chunked_logprob

from lorafit.engine.trace.log import Recorder
from lorafit.memory.decoder import FUSED_ROWS
from lorafit.memory.estimate import Setup

Tensor = torch.Tensor
FLASH = "lorafit_fused_attention"


@contextlib.contextmanager
def standing_in(setup: Setup, recorder: Recorder, model: Any) -> Iterator[Autocast]:
    """Within, operations on meta tensors keep and borrow what they do on the setup's device."""
    cuda = setup.device == "cuda"
    with contextlib.ExitStack() as stack:

        def put(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value))

        # masks: what depends on values is decided by the setup
        put(masking_utils, "fast_all", lambda mask: not setup.masked)
        packed_indices = masking_utils.find_packed_sequence_indices
        put(masking_utils, "is_tracing", lambda *_: True)
        put(masking_utils, "find_packed_sequence_indices", lambda ids: packed_indices(ids) if setup.packed else None)
        put(masking_utils, "_ignore_causal_mask_sdpa", _ignores_mask)
        # attention
        attend = _Attention(setup, recorder)
        put(functional, "scaled_dot_product_attention", attend.sdpa)
        ALL_ATTENTION_FUNCTIONS.register(FLASH, attend.flash)
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, lambda **_: None)
        # loss
        put(chunked_logprob, "_forward_tile", lambda *_, **__: None)
        put(chunked_logprob, "_backward_tile", lambda *_, **__: None)
        put(chunked_logprob, "_addmm_fp32", lambda *_: None)
        if cuda:
            put(functional, "dropout", _dropout)
        if setup.quantization is not None and setup.quantization.get("load_in_4bit"):
            put(torch.ops.bitsandbytes.gemm_4bit, "default", functools.partial(_gemm_4bit, recorder, cuda))
            put(bitsandbytes.functional, "dequantize_4bit", _dequantize_4bit)
        if setup.quantization is not None and setup.quantization.get("load_in_8bit"):
            int8 = functools.partial(_int8, recorder)
            put(bitsandbytes.nn.Linear8bitLt, "forward", lambda module, x: run_kernel(int8, x, module.weight))
        autocast = Autocast(getattr(torch, setup.stack.autocast or setup.dtype))
        put(torch, "is_autocast_enabled", lambda *_: autocast.on and bool(setup.stack.autocast))
        put(torch, "get_autocast_dtype", lambda *_: autocast.dtype)
        if setup.stack.autocast:
            for target, name in ((functional, "linear"), (torch, "matmul"), (torch, "bmm")):
                put(target, name, autocast.casting(getattr(target, name)))
        for target, name, value in fuse(model, setup.stack.kernels):
            put(target, name, value)
        yield autocast


# --- kernels --------------------------------------------------------------------------------------

Made = tuple[Tensor, tuple[Tensor | None, ...], Callable[..., tuple[Tensor | None, ...]]]
"""What a kernel makes; what it keeps for the backward pass; and what it makes there, of the gradient and what it kept:
the gradients of its inputs."""


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Made], *inputs: Tensor | None) -> Tensor:
        made, kept, ctx.back = kernel(*inputs)
        ctx.save_for_backward(*kept)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.back(*gradients, *ctx.saved_tensors)


def run_kernel(kernel: Callable[..., Made], *inputs: Tensor | None) -> Tensor:
    """What a kernel makes of its inputs, as one operation of autograd's. It must hold no tensor but what it returns."""
    made: Tensor = _Kernel.apply(kernel, *inputs)
    return made


def _dropped(x: Tensor) -> Made:
    """CUDA's dropout keeps a mask of one byte (aten/native/cuda/Dropout.cu: fused_dropout_cuda); a CPU's one of its
    input's type."""
    mask = torch.empty_like(x, dtype=torch.bool)
    return torch.empty_like(x), (mask,), lambda gradient, _: (torch.empty_like(gradient),)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return run_kernel(_dropped, input) if training and p else input


# --- attention ------------------------------------------------------------------------------------


def _ignores_mask(
    padding_mask: Any, q_length: int, *_: Any, local_attention_size: int | None = None, **__: Any
) -> bool:
    return padding_mask is None and (local_attention_size is None or q_length < local_attention_size)


class _Attention:
    def __init__(self, setup: Setup, recorder: Recorder) -> None:
        self.setup = setup
        self.recorder = recorder
        self.half = getattr(torch, setup.stack.autocast or "bfloat16")

    def sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """torch's choice for half precision on CUDA: flash without a mask, memory-efficient with one.

        A boolean mask becomes one of the query's type in every call, kept for the backward pass
        (aten/native/transformers/attention.cpp: convert_boolean_attn_mask).
        """
        if self.setup.stack.autocast:  # one of autocast's operations in 16 bits
            query, key, value = (x.to(self.half) for x in (query, key, value))
        bias = None
        if attn_mask is not None:
            bias = torch.empty_like(attn_mask, dtype=query.dtype) if attn_mask.dtype == torch.bool else attn_mask
        return run_kernel(self._kernel, query, key, value, bias)

    def flash(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        """flash-attn's function: in 16 bits, keys and values shared by their queries."""
        if query.dtype == torch.float32:
            query, key, value = (x.to(self.half) for x in (query, key, value))
        return run_kernel(self._kernel, query, key, value, None).transpose(1, 2), None

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Made:
        """Flash and memory-efficient attention: q, k, v, the output and the log-sum-exp are kept.

        Shapes: (batch, heads, length, head_dim) whatever the strides. In the backward pass both accumulate the query's
        gradient in float32 (flash-attention: csrc/flash_attn/flash_api.cpp: mha_bwd, dq_accum, softmax_d; torch:
        aten/native/transformers/cuda/attention_backward.cu, the kernel's workspace). Flash expands the gradients of
        shared keys and values to the queries' heads.
        """
        batch, heads, length, dim = q.shape

        def back(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Tensor) -> tuple[Tensor | None, ...]:
            made = [x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3])).transpose(1, 2) for x in (q, k, v)]
            sums = batch * heads * math.ceil(length / 128) * 128 * 4
            expanded = [batch * length * heads * dim * q.element_size()] * 2 if k.shape[1] != heads else []
            self.recorder.hidden(sums, sums * dim, *expanded)
            return *made, None

        out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
        lse = q.new_empty((batch, heads, length), dtype=torch.float32)
        return out, (q, k, v, bias, out, lse), back


# --- bitsandbytes ---------------------------------------------------------------------------------


def _gemm_4bit(
    recorder: Recorder, cuda: bool, a: Tensor, b: Tensor, shape: Any, *_: Any, absmax_8bit: Any = None, **__: Any
) -> Tensor:
    rows, (out, inputs) = a.numel() // a.shape[-1], shape
    if rows > FUSED_ROWS or not cuda:
        constants = [] if absmax_8bit is None else [absmax_8bit.numel() * 4] * 2
        recorder.hidden(*constants, out * inputs * a.element_size(), rows * out * a.element_size())
    return a.new_empty((*a.shape[:-1], out))


def _dequantize_4bit(b: Tensor, state: Any, *_: Any, **__: Any) -> Tensor:
    """The weight, and for a moment its float32 constants if they are quantized too."""
    if state.nested:
        absmax = torch.empty_like(state.absmax, dtype=torch.float32)
        absmax = absmax + state.offset
    return b.new_empty(tuple(state.shape), dtype=state.dtype)


def _int8(recorder: Recorder, x: Tensor, weight: Tensor) -> Made:
    """A product in 8 bits, without outliers: the input is quantized and kept as it was
    (bitsandbytes/autograd/_functions.py: MatMul8bitLt)."""

    def back(_: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, None]:
        whole = torch.empty_like(weight, dtype=x.dtype)
        result = torch.empty_like(x)
        del whole
        return result, None

    half = x if x.dtype == torch.float16 else torch.empty_like(x, dtype=torch.float16)
    quantized = torch.empty_like(x, dtype=torch.int8)
    recorder.hidden(x.numel() // x.shape[-1] * weight.shape[0] * 4)
    result = x.new_empty((*x.shape[:-1], weight.shape[0]))
    del half, quantized
    return result, (x, weight), back


# --- fused kernels --------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor) -> Made:
    """A fused RMS norm keeps its input as it is and one number a row (Liger, Unsloth, foak)."""
    is_trained = weight.requires_grad

    def back(gradient: Tensor, x: Tensor, weight: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None]:
        return gradient, torch.empty_like(weight) if is_trained else None

    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x), (x, weight, rstd), back


def _swiglu(gate: Tensor, up: Tensor) -> Made:
    """silu(gate) * up in one kernel: both inputs are kept, their gradients take their place."""
    return torch.empty_like(gate), (gate, up), lambda _, gate, up: (gate, up)


def fuse(model: Any, kernels: frozenset[str]) -> Iterator[tuple[Any, str, Any]]:
    """What to put where, so that fused kernels take the place of a model's modules and functions."""
    for module in model.modules():
        name = type(module).__name__
        source = sys.modules[type(module).__module__]
        if "rope" in kernels and hasattr(source, "apply_rotary_pos_emb"):
            yield source, "apply_rotary_pos_emb", lambda q, k, *_, **__: (q, k)  # in place
        if "rms_norm" in kernels and name.endswith("RMSNorm"):
            yield module, "forward", functools.partial(_fused_norm, module)
        if "swiglu" in kernels and name.endswith("MLP"):
            yield module, "forward", functools.partial(_fused_mlp, module)


def _fused_norm(module: Any, x: Tensor) -> Tensor:
    return run_kernel(_rms_norm, x, module.weight)


def _fused_mlp(module: Any, x: Tensor) -> Tensor:
    result: Tensor = module.down_proj(run_kernel(_swiglu, module.gate_proj(x), module.up_proj(x)))
    return result


# --- autocast -------------------------------------------------------------------------------------


class Autocast:
    """torch.autocast, which meta tensors don't take part in: matrix products in 16 bits, and the copies of weights
    that are kept until the forward pass ends (aten/autocast_mode.cpp: cached_cast)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.on = False
        self.caching = True
        self.cache: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def enabled(self) -> Iterator[None]:
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before
            if not before:
                self.cache.clear()

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """In a backward pass, only recomputed layers take products; their copies of weights end with them."""
        before, self.on, self.caching = self.on, True, False
        try:
            yield
        finally:
            self.on, self.caching = before, True

    def cast(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == self.dtype:
            return x
        if self.caching and x.requires_grad and x.is_leaf and x.dtype == torch.float32 and x._base is None:
            if id(x) not in self.cache:
                self.cache[id(x)] = x.to(self.dtype)
            return self.cache[id(x)]
        return x.to(self.dtype)

    def casting(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def cast_first(*args: Any, **kwargs: Any) -> Tensor:
            if self.on:
                args = tuple(self.cast(arg) for arg in args)
                kwargs = {key: self.cast(value) for key, value in kwargs.items()}
            return function(*args, **kwargs)

        return cast_first
