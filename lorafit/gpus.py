"""Known GPUs, and what is typed to name one or an amount of memory.

Memory is what the driver says is there (nvidia-smi's memory.total), less than what the box says where ECC or the
driver itself takes a part. Each value was found in published nvidia-smi output of drivers 525 and later; drivers
before that report up to 2% less on some cards (an RTX 3090 24268 MiB, a V100 16160 MiB). torch's total_memory is
somewhat less again, since the driver reserves some.

Peaks are dense tensor-core TFLOPS with float32 accumulation, which training uses, from NVIDIA's own papers: the
GA102 (Ampere), Ada and RTX Blackwell architecture papers for GeForce and RTX cards (GeForce cards run at half the
rate of the same chip in a workstation card), and the data sheets of P100, V100, T4, A10, A30, A40, A100, L4, L40, L40S,
H100, H200, HGX B200, HGX B300 and GH200 (halved where only a number with sparsity is given), and AWS's for A10G.
Where no paper names a GeForce card (3060, 4060 Ti, 4070, SUPER, 5070 Ti), it is twice its float32 peak, as on its
siblings. The V100 is the SXM2 one (PCIe: 112), the P100 the PCIe one, without tensor cores.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from lorafit.errors import UsageError
from lorafit.text import GIB, printable

MOST = 10 << 40
"""Bytes above which an amount of memory is taken for a slip."""


@dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
        name: for people, without the vendor.
        nominal_gb: what the box says.
        memory_bytes: what the driver reports.
        bf16_tflops: dense peak, in 10^12 operations a second; None where the hardware has no bfloat16.
        fp16_tflops: the same for float16.
        aliases: other names for it, such as the driver's. What several GPUs have is ambiguous.
    """

    name: str
    nominal_gb: int
    memory_bytes: int
    compute_capability: tuple[int, int]
    bf16_tflops: float | None
    fp16_tflops: float
    aliases: tuple[str, ...] = ()

    @property
    def peak_tflops(self) -> float:
        """Speed in the 16-bit type that is trained in: bfloat16 where there is one."""
        return self.bf16_tflops or self.fp16_tflops


@dataclass(frozen=True)
class Device:
    """What a training has to fit into: a known GPU, or only an amount of memory."""

    name: str
    memory_bytes: int
    gpu: Gpu | None = None


def _gpu(name: str, gb: int, mib: int, capability: tuple[int, int], tflops: float, *aliases: str) -> Gpu:
    bf16 = tflops if capability >= (8, 0) else None
    return Gpu(name, gb, mib << 20, capability, bf16, tflops, aliases)


_AMPERE, _ADA, _BLACKWELL = (8, 6), (8, 9), (12, 0)

GPUS: tuple[Gpu, ...] = (
    _gpu("RTX 3060 8GB", 8, 8192, _AMPERE, 25.5),
    _gpu("RTX 3060 12GB", 12, 12288, _AMPERE, 25.5),
    _gpu("RTX 3080 10GB", 10, 10240, _AMPERE, 59.5),
    _gpu("RTX 3080 12GB", 12, 12288, _AMPERE, 61.3),
    _gpu("RTX 3090", 24, 24576, _AMPERE, 71.0),
    _gpu("RTX 3090 Ti", 24, 24564, _AMPERE, 80.0),
    _gpu("RTX 4060 Ti 8GB", 8, 8188, _ADA, 44.1),
    _gpu("RTX 4060 Ti 16GB", 16, 16380, _ADA, 44.1),
    _gpu("RTX 4070", 12, 12282, _ADA, 58.3),
    _gpu("RTX 4070 Ti SUPER", 16, 16376, _ADA, 88.2),
    _gpu("RTX 4080", 16, 16376, _ADA, 97.5),
    _gpu("RTX 4080 SUPER", 16, 16376, _ADA, 104.4),
    _gpu("RTX 4090", 24, 24564, _ADA, 165.2),
    _gpu("RTX 5070 Ti", 16, 16303, _BLACKWELL, 87.9),
    _gpu("RTX 5080", 16, 16303, _BLACKWELL, 112.6),
    _gpu("RTX 5090", 32, 32607, _BLACKWELL, 209.5),
    _gpu("RTX A4000", 16, 16376, _AMPERE, 76.7),
    _gpu("RTX A5000", 24, 24564, _AMPERE, 111.1),
    _gpu("RTX A6000", 48, 49140, _AMPERE, 154.8),
    _gpu("RTX 6000 Ada", 48, 49140, _ADA, 364.2),
    _gpu(
        "RTX PRO 6000 Blackwell", 96, 97887, _BLACKWELL, 503.8,
        "RTX PRO 6000 Workstation", "RTX PRO 6000 Server", "RTX PRO 6000 Max-Q Workstation", "RTX 6000 PRO",
    ),
    _gpu("P100 16GB", 16, 16384, (6, 0), 18.7, "P100 PCIe"),
    _gpu("T4", 16, 15360, (7, 5), 65.0, "T4 15GB"),
    _gpu("V100 16GB", 16, 16384, (7, 0), 125.0, "V100 SXM2", "V100 PCIe"),
    _gpu("V100 32GB", 32, 32768, (7, 0), 125.0, "V100 SXM2", "V100 PCIe"),
    _gpu("A10", 24, 23028, _AMPERE, 125.0),
    _gpu("A10G", 24, 23028, _AMPERE, 70.0),
    _gpu("A30", 24, 24576, (8, 0), 165.0),
    _gpu("A40", 48, 46068, _AMPERE, 149.7),
    _gpu("A100 40GB", 40, 40960, (8, 0), 312.0, "A100 SXM4", "A100 SXM", "A100 PCIe"),
    _gpu("A100 80GB", 80, 81920, (8, 0), 312.0, "A100 SXM4", "A100 SXM", "A100 PCIe"),
    _gpu("L4", 24, 23034, _ADA, 121.0),
    _gpu("L40", 48, 46068, _ADA, 181.0),
    _gpu("L40S", 48, 46068, _ADA, 362.0),
    _gpu("H100 SXM 80GB", 80, 81559, (9, 0), 989.4, "H100 80GB", "H100 SXM5", "H100 80GB HBM3"),
    _gpu("H100 PCIe 80GB", 80, 81559, (9, 0), 756.0, "H100"),
    _gpu("H100 NVL 94GB", 94, 95830, (9, 0), 835.5, "H100"),
    _gpu("GH200 96GB", 96, 97871, (9, 0), 989.4, "GH200 480GB", "GH200 120GB"),
    _gpu("H200", 141, 143771, (9, 0), 989.4, "H200 SXM"),
    _gpu("H200 NVL", 141, 143771, (9, 0), 835.5),
    _gpu("B200", 180, 183359, (10, 0), 2250.0, "B200 192GB"),
    _gpu("B300", 288, 275040, (10, 3), 2250.0, "B300 SXM6 AC"),
)  # fmt: skip

_SIZE = re.compile(r"(?<![a-z0-9.])([0-9]+)[\s_-]*g(?:i?b)?(?![a-z0-9.])")
_IDLE = re.compile(r"\b(gpu|generation|edition|blackwell)\b")
_MAKER = re.compile(r"^(nvidia|geforce|quadro|tesla|rtx)+")
_MEMORY = re.compile(r"([+-]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)")
_UNITS = {"m": 1 << 20, "g": GIB, "t": 1 << 40}
_UNITS |= {f"{letter}{end}": size for letter, size in _UNITS.items() for end in ("b", "ib")}


def _key(text: str) -> str:
    """A name as it is compared: without maker, case, spaces and hyphens."""
    return _MAKER.sub("", re.sub(r"[^a-z0-9]", "", _IDLE.sub("", text.lower())))


def _short_key(text: str) -> str:
    """The same, without a size."""
    return _key(_SIZE.sub(" ", text.lower()))


def _index(key: Callable[[str], str]) -> dict[str, list[Gpu]]:
    index: dict[str, list[Gpu]] = {}
    for gpu in GPUS:
        for name in {key(name) for name in (gpu.name, *gpu.aliases)}:
            index.setdefault(name, []).append(gpu)
    return index


_BY_KEY = _index(_key)
_BY_SHORT_KEY = _index(_short_key)


def _candidates(text: str) -> tuple[list[Gpu], list[Gpu]]:
    """The GPUs that a text names, and those it would name if it gave no size."""
    alike = _BY_SHORT_KEY.get(_short_key(text), [])
    size = _SIZE.search(text.lower())
    if size is None:
        return alike, alike
    exact = _BY_KEY.get(_key(text), [])
    return exact or [gpu for gpu in alike if len(size[1]) < 6 and gpu.nominal_gb == int(size[1])], alike


def find_gpu(text: str) -> Gpu:
    """The GPU that a text names: "RTX 4090", "4090", "nvidia-a100-80gb", or what nvidia-smi calls it.

    Case, spaces, hyphens, the maker's words and the nominal size don't matter, except that a size decides where a
    name alone is of several cards. Raises UsageError, with what may have been meant.
    """
    shown = _shown(text)
    found, alike = _candidates(text)
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{shown}: there is more than one; name one of {_names_of(found)}")
    if alike:
        raise UsageError(f"{shown}: known with that name: {_sizes_of(alike)}; or give its memory, such as 24GiB")
    if re.search(r"laptop|mobile", text.lower()):
        raise UsageError(f"{shown}: laptop GPUs differ from cards and are not known; give its memory, such as 16GiB")
    key = _short_key(text)
    near = [name for name in _BY_SHORT_KEY if len(key) > 1 and name.startswith(key)]
    near += difflib.get_close_matches(key, _BY_SHORT_KEY, n=3, cutoff=0.6)
    meant = list(dict.fromkeys(gpu for key in near for gpu in _BY_SHORT_KEY[key]))[:4]
    hint = f"; did you mean {_names_of(meant)}?" if meant else ""
    raise UsageError(f"{shown}: not a known GPU{hint} (or give its memory, such as 24GiB)")


def known_gpu(name: str, memory_bytes: int) -> Gpu | None:
    """The GPU that a driver names, told from its siblings by its memory; None if it isn't known."""
    _, alike = _candidates(name)
    near = [gpu for gpu in alike if abs(gpu.memory_bytes - memory_bytes) <= 0.05 * gpu.memory_bytes]
    exact = [gpu for gpu in _BY_KEY.get(_key(name), []) if gpu in near]
    return next(iter(exact or near), None)


def parse_memory(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "24g" or "24576MiB".

    GB is read as GiB, and MB as MiB, as is meant where memory of GPUs is spoken of. Raises UsageError.
    """
    shown = _shown(text)
    match = _MEMORY.fullmatch(text.strip().lower())
    if match is None or (match[3] and match[3] not in _UNITS):
        raise UsageError(f"{shown}: not an amount of memory; give it such as 24GiB or 24576MiB")
    sign, number, unit = match.groups()
    if not unit:
        raise UsageError(f"{shown}: the unit is missing; give memory such as 24GiB or 24576MiB")
    amount = float(number) * _UNITS[unit]
    if sign == "-" or amount < 1:
        raise UsageError(f"{shown}: memory has to be more than zero")
    if amount > MOST or math.isinf(amount):
        raise UsageError(f"{shown}: more than 10 TiB in one GPU; is the unit right?")
    return int(amount)


def parse_device(text: str) -> Device:
    """A known GPU by name, or an amount of memory. Raises UsageError."""
    match = _MEMORY.fullmatch(text.strip().lower())
    named = bool(_candidates(text)[0]) or match is None
    if match is not None and not named:
        plain = match[3] == "" and not match[1] and len(match[2]) == 4 and match[2].isdecimal()  # as in 4091
        named = plain or (match[3] != "" and match[3][0] not in _UNITS)
    if named:
        gpu = find_gpu(text)
        return Device(gpu.name, gpu.memory_bytes, gpu)
    return sized(parse_memory(text))


def sized(memory: int, kind: str = "GPU") -> Device:
    """Something with so many bytes, of which no more is known."""
    return Device(f"a {kind} with {memory / GIB:.4g} GiB", memory)


def _shown(text: str) -> str:
    shown = printable(text.strip())
    return f"'{shown}'" if len(shown) <= 60 else f"'{shown[:57]}...'"


def _names_of(gpus: list[Gpu]) -> str:
    return ", ".join(gpu.name for gpu in gpus)


def _sizes_of(gpus: list[Gpu]) -> str:
    return ", ".join(gpu.name if "GB" in gpu.name else f"{gpu.name} ({gpu.nominal_gb} GB)" for gpu in gpus)
