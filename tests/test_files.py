"""Folders are whole or absent, are told from what others wrote by their seal, and are read as they were written."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.errors import DoesNotFitError, DriftError, UsageError
from lorafit.files import (
    LOCK,
    SEAL,
    check,
    claim,
    claim_file,
    damage,
    discard,
    foreign,
    held,
    read_seal,
    settle,
    staged,
    write_text,
    writing,
)


def made(folder: Path, kind: str = "evaluation") -> Path:
    with staged(folder, kind) as partial:
        (partial / "results.json").write_text("{}")
        (partial / "deep").mkdir()
        (partial / "deep" / "rows.jsonl").write_text("1\n2\n")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


class TestStaged:
    def test_it_is_sealed_and_whole(self, tmp_path: Path) -> None:
        folder = made(tmp_path / "out")
        seal = read_seal(folder)
        assert seal is not None
        assert seal.kind == "evaluation"
        assert set(seal.files or {}) == {"results.json", "deep/rows.jsonl"}
        assert damage(folder) == []
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    def test_it_replaces_its_own_kind(self, tmp_path: Path) -> None:
        made(tmp_path / "out")
        with staged(tmp_path / "out", "evaluation") as partial:
            (partial / "other.txt").write_text("new")
        assert set(tree(tmp_path / "out")) == {SEAL, "other.txt"}
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("content", ["", "{}", '{"lorafit": "evaluation"}', '{"lorafit": 5, "files": {}}', "[["])
    def test_what_only_looks_like_it_stays(self, content: str, tmp_path: Path) -> None:
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / "results.json").write_text("mine")
        (folder / SEAL).write_text(content)
        before = tree(tmp_path)
        with pytest.raises(UsageError, match=r"out: .*exists"):
            made(folder)
        discard(folder)
        assert tree(tmp_path) == before

    def test_a_file_added_meanwhile_stays(self, tmp_path: Path) -> None:
        made(tmp_path / "out")
        with pytest.raises(UsageError, match=r"out: holds thesis\.txt"), staged(tmp_path / "out", "evaluation"):
            (tmp_path / "out" / "thesis.txt").write_text("precious")
        assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"
        assert (tmp_path / "out" / "results.json").exists()

    def test_what_a_killed_process_left_is_taken_away(self, tmp_path: Path) -> None:
        partial = tmp_path / ".out.partial"
        made(partial)
        made(tmp_path / ".out.removing")
        made(made(tmp_path / "out"))
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    def test_names_that_are_taken_by_others_are_left_to_them(self, tmp_path: Path) -> None:
        for name in (".out.partial", ".out.removing"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text(name)
        made(made(tmp_path / "out"))
        assert {entry.name for entry in tmp_path.iterdir()} == {"out", ".out.partial", ".out.removing"}
        assert (tmp_path / ".out.partial" / "mine").read_text() == ".out.partial"

    def test_a_kill_between_the_two_renames_loses_nothing(self, tmp_path: Path) -> None:
        before = tree(made(tmp_path / "out"))
        (tmp_path / "out").rename(tmp_path / ".out.replaced")
        with pytest.raises(OSError, match="no room"), staged(tmp_path / "out", "evaluation") as partial:
            raise OSError(f"no room in {partial}")
        assert tree(tmp_path / "out") == before
        assert [entry.name for entry in made(tmp_path / "out").parent.iterdir()] == ["out"]

    def test_a_failure_leaves_what_there_was(self, tmp_path: Path) -> None:
        before = tree(made(tmp_path / "out"))
        with pytest.raises(OSError, match="no room"), staged(tmp_path / "out", "evaluation") as partial:
            raise OSError(f"no room in {(partial / 'half').write_text('h')}")
        assert tree(tmp_path / "out") == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["out"]

    def test_a_full_disk_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(DoesNotFitError), staged(tmp_path / "out", "evaluation"):
            raise OSError(28, "No space left on device")


class TestClaim:
    def test_what_is_needed_is_not_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = made(tmp_path / "out")
        claim(folder, "evaluation", "an evaluation")
        with pytest.raises(UsageError, match=r"results\.json is in it"):
            claim(folder, "evaluation", "an evaluation", [folder / "results.json"])
        with pytest.raises(UsageError, match="would be replaced"):
            claim(folder, "evaluation", "an evaluation", [folder])
        monkeypatch.chdir(folder / "deep")
        with pytest.raises(UsageError, match="would be replaced"):
            claim(folder, "evaluation", "an evaluation")

    def test_another_kind_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="not a merge"):
            claim(made(tmp_path / "out"), "merge", "a merge")

    def test_a_file_or_a_broken_link_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("nowhere")
        for name in ("file", "link"):
            with pytest.raises(UsageError, match="is a file"):
                claim(tmp_path / name, "merge", "a merge")

    @pytest.mark.parametrize("other", ["notes.txt", "deep/notes.txt", "new/notes.txt", "link", "empty"])
    def test_others_things_are_named(self, other: str, tmp_path: Path) -> None:
        folder = made(tmp_path / "out")
        (folder / other).parent.mkdir(exist_ok=True)
        if other == "link":
            (folder / other).symlink_to(tmp_path)
        elif other == "empty":
            (folder / other).mkdir()
        else:
            (folder / other).write_text("mine")
        with pytest.raises(UsageError, match=f"holds {other.removesuffix('/notes.txt') if 'new' in other else other}"):
            claim(folder, "evaluation", "an evaluation")

    def test_single_files(self, tmp_path: Path) -> None:
        file = tmp_path / "report.md"
        claim_file(file, "# Speed of")
        file.write_text("my notes")
        with pytest.raises(UsageError, match="was not written"):
            claim_file(file, "# Speed of")
        for text in ("my notes\n# Speed of runs/a\n", '["bench_version"]', '{"mine": {"bench_version": 1}}'):
            file.write_text(text)
            for mark in ("# Speed of", "bench_version"):
                with pytest.raises(UsageError, match="was not written"):
                    claim_file(file, mark)
        file.write_text("# Speed of runs/a\n")
        claim_file(file, "# Speed of")
        for text in ('{"bench_version": 1}', '{\n<<<<<<< ours\n  "bench_version": 1,\n', ""):
            file.write_text(text)
            claim_file(file, "bench_version")
        with pytest.raises(UsageError, match="is a folder"):
            claim_file(tmp_path, "# Speed of")


class TestDiscard:
    def test_only_what_is_listed_goes(self, tmp_path: Path) -> None:
        folder = made(tmp_path / "out")
        (folder / "deep" / "mine.txt").write_text("precious")
        discard(folder)
        assert tree(folder) == {"deep/mine.txt": b"precious"}

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        folder = made(tmp_path / "out")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "rows.jsonl").write_text("precious")
        (folder / "deep" / "rows.jsonl").unlink()
        (folder / "deep").rmdir()
        (folder / "deep").symlink_to(elsewhere)
        discard(folder)
        assert (elsewhere / "rows.jsonl").read_text() == "precious"
        (tmp_path / "link").symlink_to(made(tmp_path / "two"))
        discard(tmp_path / "link")
        assert damage(tmp_path / "two") == []

    @pytest.mark.parametrize("name", ["../thesis.txt", "/etc/passwd", "deep/../../thesis.txt", "", ".", "a\0b"])
    def test_a_seal_that_leads_out_is_none(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("precious")
        folder = made(tmp_path / "out")
        (folder / SEAL).write_text(json.dumps({"lorafit": "evaluation", "files": {name: None}}))
        assert read_seal(folder) is None
        discard(folder)
        assert (tmp_path / "thesis.txt").exists()
        assert (folder / "results.json").exists()


names = st.sampled_from(["results.json", "rows.jsonl", "thesis.txt", "deep", "a", SEAL, ".x.partial", LOCK])
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(trees=st.dictionaries(paths, st.binary(min_size=1, max_size=4), max_size=5), when=st.sampled_from("bda"))
def test_every_foreign_byte_stays(trees: dict[str, bytes], when: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever lies in a folder, before it is sealed or after, and whatever is done with it."""
    folder = tmp_path_factory.mktemp("any") / "out"
    if when == "a":
        made(folder)
    own = set(tree(folder)) if folder.exists() else set()
    planted = {}
    for name, content in trees.items():
        file = folder / name
        parts = [folder, *(folder.joinpath(*Path(name).parts[:n]) for n in range(1, len(Path(name).parts)))]
        if name in own or file.exists() or any(part.is_file() for part in parts):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        planted[name] = content
    if when == "d":
        discard(folder)
    for _ in range(2):
        try:
            made(folder)
        except (UsageError, OSError):
            assert planted
    discard(folder)
    assert planted.items() <= (tree(folder) if folder.exists() else {}).items()


class TestDamage:
    @pytest.mark.parametrize("how", ["flipped", "cut", "emptied", "gone", "folder"])
    def test_it_is_named(self, how: str, tmp_path: Path) -> None:
        folder = made(tmp_path / "out")
        file = folder / "deep" / "rows.jsonl"
        content = file.read_bytes()
        file.unlink()
        if how == "folder":
            file.mkdir()
        elif how != "gone":
            file.write_bytes({"flipped": b"0" + content[1:], "cut": content[:2], "emptied": b""}[how])
        with pytest.raises(DriftError, match=r"deep/rows\.jsonl"):
            check(folder)

    def test_a_seal_that_is_gone_is_damage_of_what_must_have_one(self, tmp_path: Path) -> None:
        folder = made(tmp_path / "out")
        (folder / SEAL).unlink()
        assert SEAL in damage(folder)[0]
        check(folder)  # for all that can be told it is somebody else's

    def test_what_was_not_finished(self, tmp_path: Path) -> None:
        with staged(tmp_path / "out", "merge") as partial:
            assert damage(partial)
            settle(partial, tmp_path / "aside", "merge")
        assert damage(tmp_path / "aside") == []
        assert not (tmp_path / "out").exists()


def hold(lock: Path, shared: bool, ready: Any, stop: Any) -> None:
    with held(lock, "busy", shared):
        ready.set()
        stop.wait(30)


@pytest.mark.parametrize(
    ("theirs", "ours", "allowed"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_readers_share_and_writers_do_not(theirs: bool, ours: bool, allowed: bool, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready, stop = spawn.Event(), spawn.Event()
    lock = tmp_path / LOCK
    lock.write_bytes(b"mine")
    process = spawn.Process(target=hold, args=(lock, theirs, ready, stop))
    process.start()
    try:
        assert ready.wait(30)
        if allowed:
            with held(lock, "busy", ours):
                pass
        else:
            with pytest.raises(UsageError, match="busy"), held(lock, "busy", ours):
                pass
    finally:
        stop.set()
        process.join()
    with held(lock, "busy"):
        assert lock.read_bytes() == b"mine", "a lock's file is never written"


def test_a_writer_leaves_no_lock_behind(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with writing(out), pytest.raises(UsageError, match="another process"), writing(out):
        pass
    assert os.listdir(tmp_path / "deep") == []


def test_files_beside_are_not_overwritten(tmp_path: Path) -> None:
    """Of this process or of one that had its number."""
    taken = tmp_path / f".a.txt.{os.getpid()}-0.partial"
    taken.write_text("mine")
    write_text(tmp_path / "a.txt", "new")
    assert taken.read_text() == "mine"
    assert (tmp_path / "a.txt").read_text() == "new"


def test_foreign_of_an_unsealed_folder_is_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("")
    assert list(foreign(tmp_path)) == ["a", "a/b"]
