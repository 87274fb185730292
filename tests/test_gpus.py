"""GPUs and amounts of memory as people type them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorafit.errors import UsageError
from lorafit.gpus import GPUS, Gpu, find_gpu, known_gpu, parse_device, parse_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "name", "mebibytes"),
    [
        ("RTX 4090", "RTX 4090", 24564),
        ("rtx4090", "RTX 4090", 24564),
        ("4090", "RTX 4090", 24564),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24564),
        ("rtx-4090 24GB", "RTX 4090", 24564),
        ("3090 ti", "RTX 3090 Ti", 24564),
        ("3060 12g", "RTX 3060 12GB", 12288),
        ("rtx_4060_ti_16gb", "RTX 4060 Ti 16GB", 16380),
        ("4070 Ti Super", "RTX 4070 Ti SUPER", 16376),
        ("A10", "A10", 23028),
        ("a10g", "A10G", 23028),
        ("Tesla T4", "T4", 15360),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB", 81920),
        ("NVIDIA A100 80GB PCIe", "A100 80GB", 81920),
        ("A100-PCIE-40GB", "A100 40GB", 40960),
        ("a100 40 GiB", "A100 40GB", 40960),
        ("Tesla V100-SXM2-16GB", "V100 16GB", 16384),
        ("v100-32gb", "V100 32GB", 32768),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB", 81559),
        ("H100-80GB", "H100 SXM 80GB", 81559),
        ("h100 pcie", "H100 PCIe 80GB", 81559),
        ("H100 94GB", "H100 NVL 94GB", 95830),
        ("NVIDIA H200", "H200", 143771),
        ("NVIDIA B300 SXM6 AC", "B300", 275040),
        ("NVIDIA GH200 480GB", "GH200 96GB", 97871),
        ("L40", "L40", 46068),
        ("l40s", "L40S", 46068),
        ("A6000", "RTX A6000", 49140),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", 49140),
        ("RTX PRO 6000", "RTX PRO 6000 Blackwell", 97887),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Blackwell", 97887),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell", 97887),
    ],
)
def test_a_gpu_by_the_names_it_goes_by(text: str, name: str, mebibytes: int) -> None:
    gpu = find_gpu(text)
    assert (gpu.name, gpu.memory_bytes) == (name, mebibytes << 20)
    assert parse_device(text).gpu == gpu


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_found_by_its_name_and_makes_sense(gpu: Gpu) -> None:
    assert find_gpu(gpu.name) is gpu
    assert find_gpu(f"nvidia {gpu.name.lower().replace(' ', '-')}") is gpu
    assert 0.93 * gpu.nominal_gb * GIB < gpu.memory_bytes <= 1.03 * gpu.nominal_gb * GIB
    assert (gpu.bf16_tflops is None) == (gpu.compute_capability < (8, 0))
    assert gpu.peak_tflops > 10


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A100", ["A100 40GB", "A100 80GB"]),
        ("nvidia v100", ["V100 16GB", "V100 32GB"]),
        ("H100", ["H100 SXM 80GB", "H100 PCIe 80GB", "H100 NVL 94GB"]),
        ("3060", ["RTX 3060 8GB", "RTX 3060 12GB"]),
        ("RTX 4060 Ti", ["RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"]),
    ],
)
def test_a_name_of_several_gpus_is_refused_with_all_of_them(text: str, named: list[str]) -> None:
    for parse in (find_gpu, parse_device):
        with pytest.raises(UsageError) as error:
            parse(text)
        assert "\n" not in str(error.value)
        assert all(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RTX 4900", "RTX 4090"),
        ("4091", "RTX 4090"),
        ("A100 64GB", "A100 40GB, A100 80GB"),
        ("RTX 4090 48GB", "RTX 4090 (24 GB)"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "laptop GPUs"),
        ("RTX 4070 Ti", "RTX 4070 Ti SUPER"),
        ("toaster", "known GPU"),
        ("", "known GPU"),
        ("nan", "known GPU"),
        ("a\nb" * 500, "known GPU"),
        ("4090 " + "9" * 5000 + "GB", "RTX 4090 (24 GB)"),
    ],
)
def test_an_unknown_gpu_is_one_line_that_helps(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_device(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250
    assert "GiB" in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24GB", 24 * GIB),
        (" 24 gb ", 24 * GIB),
        ("24g", 24 * GIB),
        ("24576MiB", 24 * GIB),
        ("24576 MB", 24 * GIB),
        ("1.5GiB", GIB + GIB // 2),
        (".5GiB", GIB // 2),
        ("+8GiB", 8 * GIB),
        ("10TiB", 10 << 40),
    ],
)
def test_memory(text: str, expected: int) -> None:
    assert parse_memory(text) == expected
    device = parse_device(text)
    assert (device.memory_bytes, device.gpu) == (expected, None)
    assert "GiB" in device.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("24", "unit is missing"),
        ("-24GiB", "more than zero"),
        ("0GiB", "more than zero"),
        ("0.0000001MiB", "more than zero"),
        ("11TiB", "more than 10 TiB"),
        ("9" * 5000 + "GiB", "more than 10 TiB"),
        ("24GIG", "not an amount"),
        ("24KiB", "not an amount"),
    ],
)
def test_memory_that_makes_no_sense_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_memory(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("text", ["", "nan", "nanGiB", "infGiB", "1e3GiB", "٢٤GiB", "24,5GiB", "24GiB 1", "--5GiB"])
def test_what_is_no_number_is_refused(text: str) -> None:
    for parse in (parse_memory, parse_device):
        with pytest.raises(UsageError):
            parse(text)


@pytest.mark.parametrize(
    ("name", "mebibytes", "expected"),
    [
        ("NVIDIA GeForce RTX 3060", 12288, "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060", 12053, "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060", 8192, "RTX 3060 8GB"),
        ("Tesla V100-SXM2-16GB", 16160, "V100 16GB"),
        ("Tesla T4", 15109, "T4"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", 81559, "H100 PCIe 80GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, None),
        ("NVIDIA GeForce RTX 4090", 49140, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9856, None),
        ("Some GPU", 1024, None),
    ],
)
def test_the_driver_s_name_and_memory_tell_the_card(name: str, mebibytes: int, expected: str | None) -> None:
    found = known_gpu(name, mebibytes << 20)
    assert (found and found.name) == expected


def test_it_is_light() -> None:
    code = (
        "import sys, lorafit.gpus, lorafit.vram.cost, lorafit.vram.plot;"
        "print({'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
