"""This machine, found without importing torch, and the one that a recipe is meant for."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorafit.errors import UsageError
from lorafit.gpus import Device, Gpu, find_gpu, known_gpu, parse_memory

if TYPE_CHECKING:
    from lorafit.recipe import Recipe

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # count GPUs as nvidia-smi does: CUDA starts after this

BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""CPU flags for bfloat16 arithmetic. Measured on a CPU with avx512_bf16: a training step of SmolLM2-135M
takes half as long in bfloat16 as in float32; without such instructions it is emulated, and slower."""


@dataclass(frozen=True)
class Hardware:
    """What decides about types, kernels and batch sizes.

    Attributes:
        device: where the training runs, as torch calls it: cuda is AMD's GPUs (ROCm) too, mps an Apple GPU.
        name: for people.
        memory_bytes: of one GPU, or of the machine; None if it can't be told.
        compute_capability: of an NVIDIA GPU, such as (8, 0).
        fast_bf16: whether bfloat16 arithmetic is done by the hardware.
        world_size: processes that train together, as torchrun or accelerate say.
    """

    device: Literal["cpu", "cuda", "mps"]
    name: str
    memory_bytes: int | None
    compute_capability: tuple[int, int] | None
    fast_bf16: bool
    world_size: int = 1


def detect() -> Hardware:
    """This machine: its first visible GPU, else its CPU.

    Where several processes train here, it is the least of as many GPUs: every one has to hold the plan.
    """
    world_size = processes()
    here = processes("LOCAL_WORLD_SIZE") if os.environ.get("LOCAL_WORLD_SIZE") else world_size
    gpus = _nvidia(here) or _amd(here)
    if not gpus:
        return _apple(world_size) or detect_cpu(world_size)
    sizes = [gpu.memory_bytes for gpu in gpus]
    least = min(gpus, key=lambda one: (one.compute_capability or (0, 0), one.fast_bf16, one.memory_bytes or 0))
    memory = None if None in sizes else min(size for size in sizes if size is not None)
    return replace(least, memory_bytes=memory, world_size=world_size)


def detect_gpu_or_assume() -> Hardware:
    """The GPU that is here, or one with bfloat16 where there is none: what memory is estimated for."""
    here = detect()
    return here if here.device == "cuda" else Hardware("cuda", "an assumed GPU", None, (8, 0), True, here.world_size)


def available_memory() -> int | None:
    """Bytes that a process can still take without swapping, here and in its container; None if it can't be told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    return min([free, *_left_in_groups()])


def held_memory(kind: str = "VmRSS") -> int | None:
    """Bytes that this process has resident, or had at most ("VmHWM"), by proc(5); None where Linux doesn't say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    values = (line.split() for line in lines if line.startswith(f"{kind}:"))
    return next((int(words[1]) << 10 for words in values), None)


def _left_in_groups() -> Iterator[int]:
    """Bytes left in each control group with a limit that this process is in, of either version (cgroups(7))."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            folder, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folder, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            left = _left(folder / group, *names)
            if left is not None:
                yield left


def _left(group: Path, most: str, now: str, cached: str) -> int | None:
    """Bytes left in a group, what can be dropped of its cache included; None where it has no limit."""
    try:
        limit = int((group / most).read_text(encoding="ascii"))
        words = (group / "memory.stat").read_text(encoding="ascii").split()
        used = int((group / now).read_text(encoding="ascii")) - int(words[words.index(cached) + 1])
    except (OSError, ValueError, IndexError):  # as of "max"
        return None
    return max(limit - used, 0)


RETURNED_AT_ONCE = 1 << 20
"""Blocks from this size on are returned when they are freed, once `return_memory` was called."""


def return_memory() -> bool:
    """Have the C library return every large block at once; whether it can (glibc, by mallopt(3)).

    Otherwise glibc keeps most of what a training step frees for later, and much of it in pieces that fit nothing: some
    30% more is resident than what is alive. Every block is mapped anew then, which takes time.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mmap_threshold = -3  # malloc.h: M_MMAP_THRESHOLD
        return bool(ctypes.CDLL("libc.so.6").mallopt(mmap_threshold, RETURNED_AT_ONCE))
    return False


def processes(variable: str = "WORLD_SIZE") -> int:
    """How many train together, as torchrun and accelerate say. Raises UsageError for what is no number."""
    told = os.environ.get(variable) or "1"
    if not told.isdecimal() or int(told) < 1:
        raise UsageError(f"{variable}: '{told}' is no number of processes; unset it, or let torchrun set it")
    return int(told)


def visible_devices(*variables: str) -> list[str] | None:
    """The GPUs that the first set of these variables names, in its order; None where none is set."""
    text = next((os.environ[name] for name in variables if name in os.environ), None)
    return None if text is None else [one.strip() for one in text.split(",") if one.strip() not in ("", "-1")]


def _nvidia(most: int) -> list[Hardware]:
    """The first visible NVIDIA GPUs.

    nvidia-smi does not take a MIG slice by its name, so the card that it is of is looked up among what it lists.
    """
    visible = visible_devices("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible == []:
        return []
    asked = (visible or [])[:most]
    sliced = _slices() if any(one.startswith("MIG-") for one in asked) else {}
    cards = [sliced[one].card if one in sliced else one for one in asked]
    query = "--query-gpu=index,name,memory.total,compute_cap,mig.mode.current"
    lines = _smi(query, "--format=csv,noheader,nounits", *([f"--id={','.join(dict.fromkeys(cards))}"] if cards else []))
    try:
        if sliced:
            by_card = {line.split(",")[0]: line for line in lines}
            return [_gpu(by_card[sliced[one].card], sliced[one]) for one in asked]
        return [_gpu(line) for line in lines[:most]]
    except (ValueError, LookupError):
        return []


AMD_BF16 = (90008, 90010)
"""gfx908 and gfx90a (MI100, MI200); all from gfx940 on have bfloat16 arithmetic too, but for RDNA 1 and 2 (gfx10)."""
KFD = Path("/sys/class/kfd/kfd/topology/nodes")


def _amd(most: int) -> list[Hardware]:
    """The first visible AMD GPUs, as Linux's amdkfd lists them; none for a torch that isn't ROCm's build.

    Many processors have a small one beside their cores, which nobody means who has another torch. Its
    gfx_target_version is 90402 for gfx942. ROCm numbers GPUs as they stand there; nothing is found where they are named
    by UUID.
    """
    gpus: list[Hardware] = []
    if not KFD.is_dir() or not _torch_is_for_amd():
        return gpus
    for node in sorted(KFD.glob("*"), key=lambda path: (len(path.name), path.name)):
        with contextlib.suppress(OSError, ValueError, KeyError):
            target = int(_fields(node / "properties")["gfx_target_version"])
            if target:  # 0 is a CPU
                banks = [_fields(bank) for bank in node.glob("mem_banks/*/properties")]
                memory = sum(int(bank["size_in_bytes"]) for bank in banks if bank["heap_type"] in ("1", "2"))
                major, minor, step = target // 10000, target // 100 % 100, target % 100
                fast = target in AMD_BF16 or (target >= 90400 and major != 10)
                gpus.append(Hardware("cuda", f"AMD gfx{major}{minor:x}{step:x}", memory or None, None, fast))
    for variables in (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")):  # one in the other
        visible = visible_devices(*variables)
        if visible is not None:
            gpus = [gpus[int(one)] for one in visible if one.isdecimal() and int(one) < len(gpus)]
    return gpus[:most]


def _torch_is_for_amd() -> bool:
    """Whether the torch that is installed is a build for ROCm, by its version.py: importing it takes seconds."""
    torch = importlib.util.find_spec("torch")
    try:
        text = Path(str(torch and torch.origin)).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return re.search(r"^hip\b[^=\n]*= *['\"]", text, re.MULTILINE) is not None


def _fields(path: Path) -> dict[str, str]:
    """A file of lines of a name and a value."""
    return dict(line.split(maxsplit=1) for line in path.read_text(encoding="ascii").splitlines() if " " in line)


def _apple(world_size: int) -> Hardware | None:
    """The GPU of a Mac with Apple's own chip, whose memory is the machine's; None if accelerate is told the CPU."""
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
    if told or platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    return replace(APPLE, memory_bytes=detect_cpu().memory_bytes, world_size=world_size)


APPLE = Hardware("mps", "an Apple GPU", None, None, True)
"""Metal has had bfloat16 since macOS 14, the oldest that torch supports."""


def _gpu(line: str, part: _Slice | None = None) -> Hardware:
    """A line that nvidia-smi answers; of a card in slices that one, or the first, which is what CUDA takes.

    Raises ValueError for another line, and LookupError where there is no slice.
    """
    index, rest = line.split(",", 1)
    name, mebibytes, capability, mig = (word.strip() for word in rest.rsplit(",", 3))
    major, minor = (int(word) for word in capability.split("."))
    memory = int(mebibytes) << 20 if mebibytes.isdecimal() else None  # [N/A] where it is the machine's
    gpu = Hardware("cuda", name, memory, (major, minor), major >= 8)
    if mig != "Enabled":
        return gpu
    part = part or next((one for one in _slices().values() if one.card == index.strip()), None)
    if part is None:
        raise LookupError(name)
    gigabytes = re.search(r"\.(\d+)gb", part.profile)  # an A100's 1g.10gb has 9,728 MiB, 95% of its name
    memory = int(0.95 * (int(gigabytes[1]) << 30)) if gigabytes else None
    return replace(gpu, name=f"{name} MIG {part.profile}", memory_bytes=memory)


@dataclass(frozen=True)
class _Slice:
    """A MIG slice: the number of its card, and its profile, such as 1g.10gb."""

    card: str
    profile: str


def _slices() -> dict[str, _Slice]:
    """The MIG slices of this machine by UUID, as `nvidia-smi -L` lists them below their cards."""
    found, card = {}, ""
    for line in _smi("-L"):
        if header := re.match(r"GPU (\d+):", line):
            card = header[1]
        elif part := re.search(r"MIG (\S+)\s.*\(UUID: (MIG-[^)]+)\)", line):
            found[part[2]] = _Slice(card, part[1])
    return found


def _smi(*words: str) -> list[str]:
    """The lines that nvidia-smi answers; none where it fails."""
    try:
        return subprocess.run(
            ["nvidia-smi", *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def detect_cpu(world_size: int = 1) -> Hardware:
    """This machine without its GPUs."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    lines = (line.partition(":") for line in info.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return Hardware(
        "cpu",
        fields.get("model name", "CPU"),
        memory,
        None,
        not BF16_FLAGS.isdisjoint(fields.get("flags", "").split()),
        world_size,
    )


PACKAGES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "use_kernels": ("kernels",),
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
    asked |= {("model", "use_kernels"): "use_kernels"} if recipe.model.use_kernels else {}
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
    if stated is not None and stated.device in ("cpu", "mps"):
        return detect_cpu() if stated.device == "cpu" else APPLE
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


def unmeasured(here: Hardware) -> str | None:
    """A remark where nothing of lorafit was ever run or measured on such a device."""
    if here.device == "mps":
        return "On an Apple GPU lorafit trains unmeasured; memory is predicted as for a CPU. It evaluates on the CPU."
    if here.device == "cuda" and here.compute_capability is None:
        return f"{here.name}: lorafit was never measured on AMD's GPUs; memory is predicted with NVIDIA's constants."
    return None


def elsewhere(recipe: Recipe, here: Hardware) -> str | None:
    """A remark where a plan is made for another machine than the recipe is meant for."""
    stated = recipe.hardware
    if stated is None:
        return None
    device = stated.device or "cuda"
    gpu = known_gpu(here.name, here.memory_bytes) if here.memory_bytes else None
    if device == here.device and (stated.gpu is None or find_gpu(stated.gpu) == gpu):
        return None
    kind = {"cuda": "a CUDA GPU", "mps": APPLE.name, "cpu": "a CPU"}[device]
    meant = stated.gpu or (f"a GPU with {stated.vram}" if stated.vram else kind)
    return f"The recipe is meant for {meant}; this plan is for {here.name}."
