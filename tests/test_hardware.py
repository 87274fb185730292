"""The machine is found without torch: the first visible GPU, else the CPU."""

from __future__ import annotations

import importlib.util
import os
import stat
from pathlib import Path

import pytest

from lorafit import hardware
from lorafit.errors import UsageError
from lorafit.hardware import Hardware, detect, detect_gpu_or_assume


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for nvidia-smi: prints the file `out`, and notes its arguments in `asked`."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\ncat "{tmp_path}/out"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB, 81920, 8.0, Disabled", ("NVIDIA A100-SXM4-80GB", 81920 << 20, (8, 0), True)),
        ("Tesla T4, 15360, 7.5, [N/A]", ("Tesla T4", 15360 << 20, (7, 5), False)),
        ("NVIDIA GB10, [N/A], 12.1, [N/A]", ("NVIDIA GB10", None, (12, 1), True)),
        ("Odd, Name, 1024, 9.0, [N/A]", ("Odd, Name", 1024 << 20, (9, 0), True)),
    ],
)
def test_a_gpu(smi: Path, line: str, expected: tuple[str, int | None, tuple[int, int], bool]) -> None:
    (smi / "out").write_text(f"0, {line}\n1, another, 1, 3.5, [N/A]\n")
    assert detect() == Hardware("cuda", *expected)


@pytest.mark.parametrize("text", ["", "No devices were found\n", "a, b\n", "x, 1, y, z\n"])
def test_without_a_gpu_it_is_the_cpu(smi: Path, text: str) -> None:
    (smi / "out").write_text(text)
    assert detect().device == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_hidden_gpus_are_not_used(smi: Path, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (smi / "out").write_text("0, NVIDIA A100, 81920, 8.0, Disabled\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert detect().device == "cpu"


def test_the_first_visible_gpu_is_asked_for(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (smi / "out").write_text("0, NVIDIA A100, 81920, 8.0, Disabled\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert detect().world_size == 4
    assert "--id=3,1" in (smi / "asked").read_text()


def test_of_several_cards_the_least_decides(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process has to hold the plan, in arithmetic that its card has; cards that nobody uses do not count."""
    cards = ("NVIDIA A100, 81920, 8.0, Disabled", "NVIDIA RTX 4090, 24564, 8.9, [N/A]", "Tesla T4, 15360, 7.5, [N/A]")
    (smi / "out").write_text("".join(f"{index}, {card}\n" for index, card in enumerate(cards)))
    assert detect().memory_bytes == 81920 << 20
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (detect().name, detect().memory_bytes, detect().fast_bf16) == ("NVIDIA A100", 24564 << 20, True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert (detect().memory_bytes, detect().compute_capability, detect().fast_bf16) == (15360 << 20, (7, 5), False)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert (detect().memory_bytes, detect().world_size) == (81920 << 20, 8)


MIG = """\
GPU 0: Tesla T4 (UUID: GPU-0000)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-5c89)
  MIG 3g.40gb     Device  0: (UUID: MIG-aaaa)
  MIG 1g.10gb     Device  1: (UUID: MIG-bbbb)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-7777)
  MIG 2g.20gb     Device  0: (UUID: MIG-dddd)
"""
SMI = """\
#!/bin/sh
[ "$1" = -L ] && exec cat "{0}/list"
for word; do case $word in --id=*) exec grep -E "^(${{word#--id=}})," "{0}/out";; esac; done
cat "{0}/out"
"""


@pytest.mark.parametrize(
    ("visible", "name", "gigabytes", "capability"),
    [
        ("1", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", 40, (8, 0)),
        ("2", "NVIDIA H100 80GB HBM3 MIG 2g.20gb", 20, (9, 0)),
        ("MIG-bbbb", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 10, (8, 0)),
        ("MIG-dddd", "NVIDIA H100 80GB HBM3 MIG 2g.20gb", 20, (9, 0)),
        ("MIG-cccc", None, 0, None),
    ],
)
def test_a_slice_of_a_card(
    smi: Path,
    visible: str,
    name: str | None,
    gigabytes: int,
    capability: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A MIG slice has its own memory and its own card's arithmetic; one that isn't there is not planned for."""
    (smi / "list").write_text(MIG)
    cards = ("Tesla T4, 15360, 7.5, [N/A]", "NVIDIA A100-SXM4-80GB, 81920, 8.0, Enabled")
    cards += ("NVIDIA H100 80GB HBM3, 81559, 9.0, Enabled",)
    (smi / "out").write_text("".join(f"{index}, {card}\n" for index, card in enumerate(cards)))
    (smi / "nvidia-smi").write_text(SMI.format(smi))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect()
    if name is None:
        assert found.device == "cpu"
        return
    assert (found.name, found.compute_capability) == (name, capability)
    assert found.memory_bytes is not None
    assert 0.9 < found.memory_bytes / (gigabytes << 30) < 1


def built_for(monkeypatch: pytest.MonkeyPatch, folder: Path, hip: str) -> None:
    """Have the installed torch be a build that says so of HIP."""
    (folder / "version.py").write_text(f"cuda: Optional[str] = None\nhip: Optional[str] = {hip}\n")
    (folder / "__init__.py").touch()
    found = importlib.util.spec_from_file_location("torch", folder / "__init__.py")
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: found)


def test_an_amd_gpu_that_this_torch_can_not_use_is_none(
    kfd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor's own small GPU does not keep a machine from training on its CPU."""
    assert detect().device == "cuda"
    built_for(monkeypatch, tmp_path, "None")
    assert detect().device == "cpu"
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    assert detect().device == "cpu"


@pytest.fixture
def kfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Linux tells of a machine with a CPU and three AMD GPUs, and a torch for them."""
    nodes = tmp_path / "nodes"
    for place, target in enumerate((0, 90402, 100300, 110000)):
        (nodes / f"{place}/mem_banks/0").mkdir(parents=True)
        (nodes / f"{place}/properties").write_text(f"simd_count 304\ngfx_target_version {target}\n")
        (nodes / f"{place}/mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {place << 30}\n")
    monkeypatch.setattr(hardware, "KFD", nodes)
    built_for(monkeypatch, tmp_path, "'7.2.26015'")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return nodes


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ("AMD gfx942", 1 << 30, True)),
        ({"HIP_VISIBLE_DEVICES": "1,0"}, ("AMD gfx1030", 2 << 30, False)),
        ({"ROCR_VISIBLE_DEVICES": "1,2", "CUDA_VISIBLE_DEVICES": "1"}, ("AMD gfx1100", 3 << 30, True)),
        ({"WORLD_SIZE": "3"}, ("AMD gfx1030", 1 << 30, False)),
        ({"HIP_VISIBLE_DEVICES": "-1"}, None),
        ({"ROCR_VISIBLE_DEVICES": "GPU-abc"}, None),
    ],
)
def test_amd_gpus(
    kfd: Path, variables: dict[str, str], expected: tuple[str, int, bool] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are found without their tools, and have no compute capability by which anything could be decided."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = detect()
    if expected is None:
        assert found.device == "cpu"
    else:
        assert (found.name, found.memory_bytes, found.fast_bf16) == expected
        assert (found.device, found.compute_capability) == ("cuda", None)


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "arm64")
    assert detect().device == "mps"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert detect().device == "cpu"


@pytest.mark.parametrize("told", ["x", "0", "-2"])
def test_a_launcher_that_says_no_number(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", told)
    with pytest.raises(UsageError, match="WORLD_SIZE"):
        detect()


def test_a_gpu_is_assumed_where_there_is_none(smi: Path) -> None:
    (smi / "out").write_text("")
    assumed = detect_gpu_or_assume()
    assert (assumed.device, assumed.name, assumed.memory_bytes) == ("cuda", "an assumed GPU", None)
    (smi / "out").write_text("0, Tesla T4, 15360, 7.5, [N/A]\n")
    assert detect_gpu_or_assume().name == "Tesla T4"


@pytest.mark.parametrize(
    ("flags", "fast"),
    [("fpu sse avx2", False), ("avx512f amx_bf16", True), ("avx512_bf16", True), ("avx512_bf16x", False)],
)
def test_cpu_flags(flags: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    info = f"processor\t: 0\nmodel name\t: Some CPU @ 2: GHz\nflags\t\t: {flags}\n\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: info)
    found = hardware.detect_cpu(1)
    assert (found.name, found.fast_bf16) == ("Some CPU @ 2: GHz", fast)
    assert found.memory_bytes is None or found.memory_bytes > 1 << 28


def test_a_machine_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert hardware.detect_cpu(2) == Hardware("cpu", "CPU", hardware.detect_cpu(2).memory_bytes, None, False, 2)


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ("0::/", {"memory.max": "max"}, None),
        ("0::/", {"memory.max": "1000", "memory.current": "300", "memory.stat": "anon 5\ninactive_file 100\n"}, 800),
        ("0::/a/b", {"a/memory.max": "900", "a/memory.current": "1000", "a/memory.stat": "inactive_file 0"}, 0),
        (
            "9:name=systemd:/\n4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": "4096",
                "memory/job/memory.usage_in_bytes": "96",
                "memory/job/memory.stat": "total_inactive_file 6",
            },
            4006,
        ),
        ("nonsense", {}, None),
    ],
)
def test_the_limits_of_control_groups(
    lines: str, files: dict[str, str], left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both versions, and of every group above."""
    own, root = tmp_path / "cgroup", tmp_path / "root"
    own.write_text(lines + "\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    places = {"/proc/self/cgroup": own, "/sys/fs/cgroup": root}
    monkeypatch.setattr(hardware, "Path", lambda path: places.get(str(path), Path(path)))
    assert min(hardware._left_in_groups(), default=None) == left
