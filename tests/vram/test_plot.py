"""Pictures of an estimate: complete or absent, the same each time, with the peak in sight."""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lorafit.errors import DoesNotFitError, UsageError
from lorafit.vram import plot
from lorafit.vram.plot import check, stacked_bar, thin

GIB = 1 << 30
TERMS = [("weights", 4 * GIB), ("nothing", 0), ("activations & $loss$ <x>", GIB // 2), ("adapters", 3 << 20)]
CAPACITY = [("T4", 15 * GIB), ("RTX 4090", 24564 << 20)]
TIMELINE = [(0, GIB, 2 * GIB), (1, 3 * GIB, 4 * GIB), (2, 2 * GIB, 4 * GIB)]
PHASES = [(0, "forward"), (1, "backward"), (9, "beyond the end")]


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


def texts(file: Path) -> str:
    return "\n".join(ElementTree.parse(file).getroot().itertext())


@pytest.mark.usefixtures("_matplotlib")
def test_an_svg_says_everything_in_text(tmp_path: Path) -> None:
    file = tmp_path / "out.svg"
    stacked_bar(TERMS, "Qwen3 & friends", CAPACITY, file, TIMELINE, PHASES)
    said = texts(file)
    for part in (
        "Qwen3 & friends",
        "weights  4.00 GiB",
        "activations & $loss$ <x>  0.50 GiB",
        "adapters  3.00 MiB",
        "T4: 15.00 GiB",
        "RTX 4090: 23.99 GiB",
        "4.50 GiB",
        "peak 3.00 GiB",
        "allocated",
        "reserved",
        "forward",
        "backward",
    ):
        assert part in said
    assert "nothing" not in said
    assert "beyond" not in said


@pytest.mark.usefixtures("_matplotlib")
def test_without_a_timeline_there_is_only_the_bar(tmp_path: Path) -> None:
    file = tmp_path / "out.svg"
    stacked_bar(TERMS, "title", [], file)
    assert "4.50 GiB" in texts(file)
    assert "allocated" not in texts(file)


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize("name", ["out.svg", "out.png", "out.PNG"])
def test_the_same_estimate_is_the_same_file(tmp_path: Path, name: str) -> None:
    files = [tmp_path / folder / name for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        stacked_bar(TERMS, "title", CAPACITY, file, TIMELINE, PHASES)
        assert [other.name for other in file.parent.iterdir()] == [name]
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert first.startswith(b"\x89PNG") == name.lower().endswith("png")
    assert not re.search(rb"<dc:date>", first)


@pytest.mark.usefixtures("_matplotlib")
@pytest.mark.parametrize(
    ("terms", "capacity", "timeline"),
    [
        ([], [], []),
        ([("a", 0)], [("b", 0)], [(0, 0, 0)]),
        ([(f"part {index}", GIB) for index in range(40)], CAPACITY, [(5, 1, 1), (5, 2, 2)]),
        ([("x" * 500, 1)], [("y" * 500, 2000 * GIB)], [(0.5, 10, 20), (1.5, 5, 20)]),
        ([("\ud800\n漢", GIB)], [("_z", GIB)] * 5, []),
    ],
)
@pytest.mark.filterwarnings("error")
def test_odd_estimates_are_drawn(tmp_path: Path, terms: list, capacity: list, timeline: list) -> None:
    for name in ("out.png", "out.svg"):
        stacked_bar(terms, "title " * 100, capacity, tmp_path / name, timeline, [(0.5, "p" * 300)] * 10)
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.usefixtures("_matplotlib")
def test_a_long_timeline_is_small_and_shows_its_peak(tmp_path: Path) -> None:
    timeline = [(index, GIB + index % 7, 2 * GIB) for index in range(200_000)]
    timeline[123_457] = (123_457, 9 * GIB, 10 * GIB)
    xs, allocated, reserved = thin(timeline)
    assert len(xs) == len(allocated) == len(reserved) <= plot.COLUMNS
    assert max(allocated) == 9 * GIB
    assert max(reserved) == 10 * GIB
    assert abs(xs[allocated.index(9 * GIB)] - 123_457) <= 200_000 / plot.COLUMNS
    assert xs == sorted(xs)
    file = tmp_path / "out.svg"
    stacked_bar(TERMS, "title", CAPACITY, file, timeline)
    assert "peak 9.00 GiB" in texts(file)
    assert file.stat().st_size < 500_000


def test_a_short_timeline_is_kept_whole() -> None:
    assert thin(TIMELINE) == ([0, 1, 2], [GIB, 3 * GIB, 2 * GIB], [2 * GIB, 4 * GIB, 4 * GIB])
    assert thin([]) == ([], [], [])


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.svg.gz"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        stacked_bar(TERMS, "title", [], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_places_that_take_no_file_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        check(tmp_path / "missing" / "out.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check(tmp_path / "folder.png")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"install lorafit\[plot\]") as error:
        stacked_bar(TERMS, "title", [], tmp_path / "out.png")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("_matplotlib")
def test_what_fails_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.png"
    old = b"\x89PNG " + plot.MADE_BY.encode()
    file.write_bytes(old)

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DoesNotFitError, match=r"out\.png: .*full"):
        stacked_bar(TERMS, "title", [], file)
    assert [(other.name, other.read_bytes()) for other in tmp_path.iterdir()] == [("out.png", old)]


@pytest.mark.usefixtures("_matplotlib")
def test_a_folder_without_permission_is_one_line_with_the_file_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(plot.Path, "open", refuse)
    with pytest.raises(UsageError, match=r"/out\.svg: Permission denied"):
        stacked_bar(TERMS, "title", [], tmp_path / "out.svg")


@pytest.mark.usefixtures("_matplotlib")
def test_the_caller_s_matplotlib_settings_neither_matter_nor_change(tmp_path: Path) -> None:
    import matplotlib

    stacked_bar(TERMS, "title", CAPACITY, tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True}):
        stacked_bar(TERMS, "title", CAPACITY, tmp_path / "b.svg")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
