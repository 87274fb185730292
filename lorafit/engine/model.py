"""Base models as a plan has them: loaded, quantized, of one device; and GGUF files dequantized into a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.utils.kernel_config import KernelConfig

from lorafit.engine.tokenizer import cannot_load, gguf, location
from lorafit.errors import LorafitError, ModelError
from lorafit.export.layout import query_scale
from lorafit.facts.fingerprint import listed
from lorafit.files import check, staged
from lorafit.plan import Plan
from lorafit.plan.adapters import check_adapter
from lorafit.progress import Counted, counting, is_first_process, stage
from lorafit.run.directory import RunDir
from lorafit.run.fingerprint import changed_base
from lorafit.text import first_line
from lorafit.written import expanded


def load_base(plan: Plan, source: str | Path | None = None) -> PreTrainedModel:
    """The base as the plan has it: type, attention, quantization. Raises ModelError, DoesNotFitError.

    DriftError for a folder that lorafit wrote and that has changed since.

    Args:
        source: a folder to load from instead of the plan's model, such as a dequantized GGUF file.
    """
    name = str(source or plan.model.name_or_path)
    kwargs: dict[str, Any] = {
        **plan.model_kwargs,
        "dtype": getattr(torch, plan.dtype),
    }
    if source is not None:
        kwargs["revision"] = None
    if plan.quantization_kwargs is not None:
        kwargs["quantization_config"] = quantization_config(plan.quantization_kwargs)
        kwargs["device_map"] = {"": _device(plan)}
    if source is None:  # else it was checked as it was found
        check(expanded(name))
    try:
        with loading(name):
            model = AutoModelForCausalLM.from_pretrained(*location(name), **gguf(name), **kwargs)
    except LorafitError:
        raise
    except Exception as error:
        raise cannot_load("model", name, error) from error
    model.config.use_cache = False
    keep_gradients(model)
    if plan.quantization_kwargs is not None and _device(plan) == "cpu":
        let_go_of_the_file(model)
    return model


def put_kernels(model: PreTrainedModel, kernels: Mapping[str, str]) -> None:
    """Put kernels of the hub, and no others, in the place of layers, and see that the model computes the same.

    transformers keeps a layer where a kernel can't be loaded, without a word. Raises ModelError for that, and where
    logits differ by more than rounding does: of their spread, 1e-3 in float32 and 5e-2 in 16 bits.
    """
    if not kernels:
        return
    replaced = [module for module in model.modules() if getattr(module, "kernel_layer_name", None) in kernels]
    plain, before = [module.forward for module in replaced], _probed(model)
    mapping = {}
    for layer, named in kernels.items():
        repository, _, rest = named.partition("@")
        commit, _, name = rest.partition(":")
        mapping[layer] = (f"{repository}:{name}", {"revision": commit, "trust_remote_code": True})
    model.train()
    try:
        with stage("fetching kernels"):
            model.set_use_kernels(True, KernelConfig(mapping, inherit_mapping=False))
    except Exception as error:
        raise ModelError(f"model.use_kernels: {first_line(error)}") from error
    for module, forward in zip(replaced, plain, strict=True):
        if module.forward == forward:
            layer = str(module.kernel_layer_name)
            raise ModelError(f"model.use_kernels.{layer}: {kernels[layer]} was not put there; is it for this GPU?")
    after = _probed(model)
    apart = float((after - before).abs().max() / (before.std() or 1.0))
    if not apart <= (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise ModelError(
            f"model.use_kernels: with these kernels the model's logits differ by {apart:.2g} of their spread"
        )


@torch.no_grad()
def _probed(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a short row, (tokens, vocabulary), in float32."""
    draw, training = torch.Generator().manual_seed(0), model.training
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, 16), generator=draw).to(model.device)
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    model.train(training)
    return found


@contextlib.contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Tell how far transformers is in reading a model's weights."""
    with stage(f"loading {name}"), counting((modeling_gguf_pytorch_utils, "tqdm")):
        before = transformers.logging.set_tqdm_hook(lambda _, args, kwargs: Counted(*args, **kwargs))
        try:
            yield
        finally:
            transformers.logging.set_tqdm_hook(before)


def let_go_of_the_file(model: PreTrainedModel) -> None:
    """Copy what isn't quantized: on a CPU it lies in the mapped file, all of which stays resident for its sake."""
    for parameter in model.parameters():
        if not isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params)):
            parameter.data = parameter.data.clone()


def keep_gradients(model: PreTrainedModel) -> None:
    """Have 4-bit layers compute the same in and outside of training.

    On CPUs with AVX512-BF16, bitsandbytes (nn/modules.py: Linear4bit.forward) repacks the weights at the first pass
    outside of training, such as an evaluation: from then on it computes in bfloat16, and no gradient passes the layer.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def on_cpu(plan: Plan) -> Plan:
    """The plan for its model on the CPU, with attention that runs there."""
    kwargs = dict(plan.model_kwargs)
    if kwargs["attn_implementation"].startswith("flash"):
        kwargs["attn_implementation"] = None  # transformers takes sdpa, or eager where that won't do
    hardware = dataclasses.replace(plan.hardware, device="cpu")
    return dataclasses.replace(plan, model_kwargs=kwargs, hardware=hardware)


def quantization_config(kwargs: dict[str, Any]) -> BitsAndBytesConfig:
    values = dict(kwargs)
    if "bnb_4bit_compute_dtype" in values:
        values["bnb_4bit_compute_dtype"] = getattr(torch, values["bnb_4bit_compute_dtype"])
    return BitsAndBytesConfig(**values)


def load_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """Put a saved adapter on its base, for inference. Raises ModelError."""
    check_adapter(adapter, (name for name, _ in base.named_modules()))
    try:
        model = PeftModel.from_pretrained(base, str(adapter))
    except Exception as error:
        raise cannot_load("adapter", str(adapter), error) from error
    model.eval()
    return model


def base_source(plan: Plan, run: RunDir) -> Path | None:
    """Where a run's base is, if not where its recipe says: a GGUF file's dequantized weights.

    Raises ModelError if what stands there is no longer what was trained on.
    """
    changed = changed_base(plan, run)
    where = run.base if run.base.is_dir() else None
    if changed:
        raise ModelError(
            f"{where or plan.model.name_or_path}: is not the base that {run.path} was trained on (changed: "
            f"{listed(changed)}); bring it back"
        )
    return where


def dequantize_gguf(file: str, destination: Path, dtype: str) -> None:
    """Write a GGUF file's weights and tokenizer as an ordinary model folder. Raises ModelError.

    transformers dequantizes while loading, but leaves the model marked as GGUF-quantized; without
    that mark it saves, and loads again, like any other.
    """
    try:
        with loading(file):
            model = AutoModelForCausalLM.from_pretrained(*location(file), **gguf(file), dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(*location(file), **gguf(file))
    except Exception as error:
        raise cannot_load("model", file, error) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "query_pre_attn_scalar"):  # transformers takes its class's
        model.config.query_pre_attn_scalar = query_scale(model.config.to_dict())
    model.hf_quantizer = None
    model.config.name_or_path = ""
    with stage(f"writing {destination}"), staged(destination, "base") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def dequantized_base(plan: Plan, run: RunDir) -> Path | None:
    """The folder that a GGUF base is loaded from; None for other bases. The first process makes it."""
    if plan.model.kind != "gguf":
        return None
    wait_for_everyone()  # until the run directory is the new run's: the one that it replaces has a base too
    if is_first_process() and not run.base.is_dir():
        dequantize_gguf(plan.model.name_or_path, run.base, plan.dtype)
    wait_for_everyone()
    return run.base


def wait_for_everyone() -> None:
    """Let the processes of one training come to the same place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _device(plan: Plan) -> str | int:
    if plan.hardware.device != "cuda":
        return plan.hardware.device
    return int(os.environ.get("LOCAL_RANK", "0"))
