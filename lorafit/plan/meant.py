"""The hardware that a recipe is meant for, wherever it is read, and the packages that its training needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from lorafit.hardware import Hardware, detect_cpu, detect_gpu_or_assume
from lorafit.recipe import Recipe
from lorafit.vram.gpus import Device, Gpu, find_gpu, known_gpu, parse_memory

PACKAGES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}
"""Modules of which one is needed by a tracker, where it isn't called like the tracker, or by an attention."""
INSTALLS = {"tensorboard": "'lorafit[tensorboard]'", "azure_ml": "azureml-mlflow", "flash_attention_2": "flash-attn"}
"""What pip installs for them, where that isn't called like the module."""


def missing_packages(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What a training by the recipe needs and this machine doesn't have, as (path in the recipe, message)."""
    asked: dict[tuple[str | int, ...], str] = {("model", "attn_implementation"): recipe.model.attn_implementation}
    asked |= {("training", "report_to", number): name for number, name in enumerate(recipe.training.report_to)}
    for path, name in asked.items():
        modules = PACKAGES.get(name, (name,) if path[0] == "training" else ())
        if modules and not any(map(is_installed, modules)):
            install = f"pip install {INSTALLS.get(name, modules[0])}"
            yield path, f"{name} needs the package {' or '.join(modules)}, which is not here: {install}"


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def meant_hardware(recipe: Recipe) -> Hardware:
    """What a recipe is checked for: what it states, else the GPU that is here, else an assumed one with bfloat16."""
    stated = recipe.hardware
    if stated is not None and stated.device == "cpu":
        return detect_cpu()
    if stated is not None and stated.gpu is not None:
        return hardware_of(find_gpu(stated.gpu))
    return detect_gpu_or_assume()


def meant_device(recipe: Recipe) -> Device | None:
    """What a recipe has to fit, if it states that."""
    stated = recipe.hardware
    if stated is None or (stated.gpu is None and stated.vram is None):
        return None
    gpu = find_gpu(stated.gpu) if stated.gpu is not None else None
    if stated.vram is not None:
        return Device(gpu.name if gpu else f"a GPU with {stated.vram}", parse_memory(stated.vram), gpu)
    assert gpu is not None
    return Device(gpu.name, gpu.memory_bytes, gpu)


def hardware_of(gpu: Gpu, world_size: int = 1) -> Hardware:
    """A machine with that GPU, or several."""
    capability = gpu.compute_capability
    return Hardware("cuda", gpu.name, gpu.memory_bytes, capability, capability >= (8, 0), world_size)


def elsewhere(recipe: Recipe, here: Hardware) -> str | None:
    """A remark where a plan is made for another machine than the recipe is meant for."""
    stated = recipe.hardware
    if stated is None:
        return None
    device = stated.device or "cuda"
    gpu = known_gpu(here.name, here.memory_bytes) if here.memory_bytes else None
    if device == here.device and (stated.gpu is None or find_gpu(stated.gpu) == gpu):
        return None
    kind = "a CUDA GPU" if device == "cuda" else "a CPU"
    meant = stated.gpu or (f"a GPU with {stated.vram}" if stated.vram else kind)
    return f"The recipe is meant for {meant}; this plan is for {here.name}."
