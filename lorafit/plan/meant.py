"""The hardware that a recipe is meant for, wherever it is read."""

from __future__ import annotations

from lorafit.hardware import Hardware, detect_cpu, detect_gpu_or_assume
from lorafit.recipe import Recipe
from lorafit.vram.gpus import Device, Gpu, find_gpu, known_gpu, parse_memory


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
