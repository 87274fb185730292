"""Tokenized data is kept between runs: used again if nothing changed, made anew if anything did."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATML, RecipeMaker, conversation, write_jsonl
from typer.testing import CliRunner

import lorafit.engine.data.prepare
import lorafit.rows.cache
from lorafit.cli import app
from lorafit.engine.data.encode import repeated, shared, split, weighted
from lorafit.engine.data.prepare import Prepared, prepare
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DataError
from lorafit.files import SEAL, Seal, seal
from lorafit.plan import Plan, plan_recipe
from lorafit.recipe import Recipe
from lorafit.rows.cache import _shared_folder, cache_folder, code_version, in_use, prune


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own."""
    home = tmp_path / "cache home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    _shared_folder.cache_clear()
    yield home / "lorafit"
    _shared_folder.cache_clear()
    code_version.cache_clear()


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder that may be changed: config and tokenizer only."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the sources that were tokenized, as it happens."""
    done: list[str] = []
    original = lorafit.engine.data.prepare.tokenize_source

    def spy(plan: Any, source: Any, *rest: Any) -> Any:
        done.append(source.path)
        return original(plan, source, *rest)

    monkeypatch.setattr(lorafit.engine.data.prepare, "tokenize_source", spy)
    return done


def planned(path: Path, *overrides: str) -> Plan:
    return plan_recipe(Recipe.load(path, overrides), path, count_rows=False)


def prepared(path: Path, *overrides: str) -> Prepared:
    plan = planned(path, *overrides)
    return prepare(plan.data, load_tokenizer(plan))


def texts(path: Path, *overrides: str) -> list[str]:
    plan = planned(path, *overrides)
    tokenizer = load_tokenizer(plan)
    return [tokenizer.decode(row["input_ids"]) for row in prepare(plan.data, tokenizer).train]


def entries(cache: Path) -> list[Path]:
    return sorted(folder for folder in cache.glob("*/*") if folder.is_dir())


def written(cache: Path, kind: str, file: str) -> Path:
    (found,) = (cache / kind).glob(f"*/{file}")
    return found


# --- hits -----------------------------------------------------------------------------------------


def test_the_same_data_is_tokenized_once(
    recipe: RecipeMaker, tokenized: list[str], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(dataset={"validation": 0.25}, training={"packing": True})
    first = prepared(path)
    assert tokenized == [str(rows)]

    def fail(*_: Any) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(lorafit.engine.data.prepare, "tokenize_source", fail)
    monkeypatch.setattr(lorafit.engine.data.prepare, "make_set", fail)
    again = prepared(path)
    assert again.train.to_dict() == first.train.to_dict()
    assert again.rows is not None
    assert first.rows is not None
    assert again.rows.to_dict() == first.rows.to_dict()
    assert again.validation is not None
    assert first.validation is not None
    assert again.validation.to_dict() == first.validation.to_dict()
    assert again.audit == first.audit
    assert planned(path).audit == first.audit.as_dict()


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=elsewhere",
        "training.learning_rate=1e-3",
        "dataset.audit.empty_answers=0.5",
        "training.per_device_train_batch_size=2",
        "lora.r=2",
    ],
)
def test_what_does_not_shape_the_data_does_not_matter(
    recipe: RecipeMaker, tokenized: list[str], cache: Path, override: str
) -> None:
    path = recipe()
    first = texts(path)
    before = entries(cache)
    assert texts(path, override) == first
    assert len(tokenized) == 1
    assert entries(cache) == before


def test_a_new_mix_of_the_same_rows_is_not_tokenized_again(recipe: RecipeMaker, tokenized: list[str]) -> None:
    """Weights, the split and packing are arithmetic on rows that are there."""
    path = recipe()
    assert len(texts(path)) == 24
    assert len(texts(path, "dataset.validation=0.25")) == 18
    assert len(texts(path, "training.packing=true")) < 24
    assert len(tokenized) == 1


# --- misses ---------------------------------------------------------------------------------------


def test_a_changed_byte_of_the_data(recipe: RecipeMaker, tokenized: list[str], rows: Path) -> None:
    path = recipe()
    before = texts(path)
    stat = rows.stat()
    rows.write_bytes(rows.read_bytes().replace(b"the cat", b"the bat", 1))
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as sly as can be
    after = texts(path)
    assert len(tokenized) == 2
    assert "the bat" in after[0]
    assert after[1:] == before[1:]


@pytest.mark.parametrize("name", ["b.jsonl", "a.jsonl"])
def test_a_folder_with_another_file(recipe: RecipeMaker, tmp_path: Path, tokenized: list[str], name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [conversation("one", "two")])
    path = recipe(dataset={"train": [{"path": str(folder)}]})
    assert len(texts(path)) == 1
    write_jsonl(folder / name, [conversation("one", "three"), conversation("one", "four")])
    assert len(texts(path)) == (3 if name == "b.jsonl" else 2)
    assert len(tokenized) == 2


def test_a_changed_tokenizer(recipe: RecipeMaker, tokenized: list[str], model: Path) -> None:
    path = recipe(model={"name_or_path": str(model)})
    before = prepared(path).train["input_ids"][:]
    file = model / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["model"]["merges"] = raw["model"]["merges"][:20]
    file.write_text(json.dumps(raw))
    after = prepared(path).train["input_ids"][:]
    assert len(tokenized) == 2
    assert sum(map(len, after)) > sum(map(len, before))


def test_a_changed_tokenizer_config(recipe: RecipeMaker, tokenized: list[str], model: Path) -> None:
    data = write_jsonl(model.parent / "texts.jsonl", [{"text": "one two"}])
    path = recipe(model={"name_or_path": str(model)}, dataset={"train": [{"path": str(data)}]})
    assert texts(path) == ["one two<|im_end|>"]
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|endoftext|>"}))
    assert texts(path) == ["one two<|endoftext|>"]
    assert len(tokenized) == 2


def test_a_changed_template_of_the_model(recipe: RecipeMaker, tokenized: list[str], model: Path) -> None:
    path = recipe(model={"name_or_path": str(model)})
    assert "[hey]" not in texts(path)[0]
    (model / "chat_template.jinja").write_text("[hey]" + CHATML)
    assert all(text.startswith("[hey]") for text in texts(path))
    assert len(tokenized) == 2


def test_a_changed_template_of_the_recipe(recipe: RecipeMaker, tokenized: list[str], tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    path = recipe(model={"chat_template": str(file)})
    for words in ("[one]", "[two]", "[one]"):
        file.write_text(words + CHATML)
        assert all(text.startswith(words) for text in texts(path))
    assert len(tokenized) == 2


def test_another_day_in_a_template_that_writes_it(
    recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    path = recipe(model={"chat_template": str(file)})
    plan = planned(path)
    for day in ("2026-01-31", "2026-02-01"):
        data = lorafit.rows.cache.dataclasses.replace(plan.data, date=day)
        tokenizer = load_tokenizer(plan)
        assert tokenizer.decode(prepare(data, tokenizer).train[0]["input_ids"]).startswith(day)


SETTINGS: dict[str, Callable[[list[int], list[int]], bool]] = {
    "dataset.loss_on=all": lambda before, after: before == after,
    "training.max_length=20": lambda before, after: max(after) == 20 < max(before),
    "dataset.min_length=20": lambda before, after: min(before) < 20 <= min(after),
    "dataset.train.0.max_rows=5": lambda before, after: after == before[:5],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_changed_setting(recipe: RecipeMaker, tokenized: list[str], setting: str) -> None:
    path = recipe(dataset={"audit": {"truncated": None, "lost_tokens": None, "answers_cut_off": None}})
    before, changed, again = prepared(path), prepared(path, setting), prepared(path)
    assert len(tokenized) == 2
    lengths, others = ([len(row) for row in part.train["input_ids"]] for part in (before, changed))
    assert SETTINGS[setting](lengths, others)
    assert changed.audit != before.audit == again.audit


def test_dropping_instead_of_cutting(recipe: RecipeMaker, tokenized: list[str]) -> None:
    path = recipe(training={"max_length": 20})
    assert "longer than max_length" not in prepared(path).audit.train[0].dropped
    source = prepared(path, "dataset.excess_length_strategy=drop").audit.train[0]
    assert source.dropped["longer than max_length"] > 0
    assert len(tokenized) == 2


def test_another_way_to_read_the_rows(recipe: RecipeMaker, tokenized: list[str], tmp_path: Path) -> None:
    data = [{"text": "T one", "prompt": "P two", "completion": " C three", "other": "O four"}]
    file = write_jsonl(tmp_path / "all.jsonl", data)
    found = [
        texts(recipe(dataset={"train": [{"path": str(file), **how}]}))
        for how in (
            {"format": "text"},
            {"format": "prompt_completion"},
            {"format": "text", "columns": {"text": "other"}},
            {"format": "text", "template": "M {{ other }}"},
            {"format": "text", "template": "N {{ other }}"},
        )
    ]
    assert found == [[f"{text}<|im_end|>"] for text in ("T one", "P two C three", "O four", "M O four", "N O four")]
    assert len(tokenized) == 5


def test_another_version_of_a_library(
    recipe: RecipeMaker, tokenized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe()
    before = texts(path)
    for package in ("lorafit", "tokenizers", "transformers", "trl", "jinja2"):
        code_version.cache_clear()
        monkeypatch.setattr(lorafit.rows.cache, "version", lambda name, p=package: "0.0.0" if name == p else "1.0.0")
        assert texts(path) == before
    assert len(tokenized) == 6


def test_another_lorafit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "lorafit"
    shutil.copytree(Path(lorafit.rows.cache.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    here = code_version()
    monkeypatch.setattr(lorafit.rows.cache, "__file__", str(copy / "rows" / "cache.py"))

    def changed(file: Path) -> bool:
        code_version.cache_clear()
        before = code_version()
        with file.open("a") as stream:
            stream.write("# changed\n")
        code_version.cache_clear()
        return before != code_version()

    code_version.cache_clear()
    assert code_version() == here
    folders = ("rows", "engine/data", "engine/methods")
    shaping = [*(file for one in folders for file in (copy / one).glob("*.py")), copy / "facts/template.py"]
    assert len(shaping) > 10
    assert all(map(changed, shaping))
    assert not changed(copy / "run/summary.py")


# --- changes while it is read ---------------------------------------------------------------------


def test_a_file_that_changes_after_the_plan(recipe: RecipeMaker, rows: Path, cache: Path) -> None:
    """Its rows must not be kept, and found again, under the hash of what it was."""
    path = recipe()
    original = rows.read_bytes()
    plan = planned(path)
    rows.write_bytes(original.replace(b"the cat", b"the bat"))
    with pytest.raises(DataError, match=r"rows\.jsonl: .*changed") as caught:
        prepare(plan.data, load_tokenizer(plan))
    assert len(str(caught.value).splitlines()) == 1
    assert entries(cache) == []
    rows.write_bytes(original)
    assert "the cat" in texts(path)[0]


def test_rows_that_are_kept_do_not_need_the_file(recipe: RecipeMaker, rows: Path) -> None:
    path = recipe()
    before = texts(path)
    plan = planned(path)
    rows.unlink()
    assert len(prepare(plan.data, load_tokenizer(plan)).train) == len(before)


# --- damage ---------------------------------------------------------------------------------------


def cut(share: float) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, int(file.stat().st_size * share))


def flipped(place: float) -> Callable[[Path], None]:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(len(content) * place)] ^= 0x10
        file.write_bytes(content)

    return flip


def garbage(file: Path) -> None:
    file.write_bytes(b"\x7f" * file.stat().st_size)


DAMAGE: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    **{f"rows.arrow cut at {share}": ("rows", "rows.arrow", cut(share)) for share in (0, 0.02, 0.3, 0.6, 0.9, 0.99)},
    **{
        f"a bit of rows.arrow at {place}": ("rows", "rows.arrow", flipped(place))
        for place in (0.05, 0.3, 0.5, 0.7, 0.95)
    },
    **{f"a bit of {name}": ("sets", name, flipped(0.9)) for name in ("training.npy", "validation.npy", "packed.arrow")},
    "a bit of numbers.bin": ("rows", "numbers.bin", flipped(0.5)),
    "rows.arrow of garbage": ("rows", "rows.arrow", garbage),
    "no rows.arrow": ("rows", "rows.arrow", Path.unlink),
    "no numbers.bin": ("rows", "numbers.bin", Path.unlink),
    "an empty numbers.bin": ("rows", "numbers.bin", cut(0)),
    "half a numbers.bin": ("rows", "numbers.bin", cut(0.52)),
    "an empty audit of rows": ("rows", "audit.json", cut(0)),
    "another audit of rows": ("rows", "audit.json", lambda f: f.write_text("{}")),
    "an empty audit": ("sets", "audit.json", cut(0)),
    "another audit": ("sets", "audit.json", lambda f: f.write_text("[]")),
    "no training.npy": ("sets", "training.npy", Path.unlink),
    "an empty training.npy": ("sets", "training.npy", cut(0)),
    "half a training.npy": ("sets", "training.npy", cut(0.6)),
    "a short training.npy": ("sets", "training.npy", lambda f: np.save(f, np.arange(3))),
    "a wrong training.npy": ("sets", "training.npy", lambda f: np.save(f, np.arange(18) + 100)),
    "an empty validation.npy": ("sets", "validation.npy", cut(0)),
    "no packed.arrow": ("sets", "packed.arrow", Path.unlink),
    "half a packed.arrow": ("sets", "packed.arrow", cut(0.5)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_made_anew(recipe: RecipeMaker, cache: Path, what: str) -> None:
    path = recipe(dataset={"validation": 0.25}, training={"packing": True})
    before = prepared(path).train.to_dict()
    kind, name, damage = DAMAGE[what]
    file = written(cache, kind, name)
    whole = file.read_bytes()
    file.unlink()  # the old one is mapped into memory
    file.write_bytes(whole)
    damage(file)
    again = prepared(path)
    assert again.train.to_dict() == before
    assert len(written(cache, kind, name).read_bytes()) == len(whole)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("damage", [Path.unlink, cut(0.5), cut(0)])
def test_an_entry_without_its_seal_is_nobodys(damage: Any, recipe: RecipeMaker, cache: Path) -> None:
    """It is left alone, and neither read nor in the way."""
    path = recipe()
    before = prepared(path).train.to_dict()
    file = written(cache, "rows", "rows.arrow")
    damage(file.with_name(SEAL))
    assert prepared(path).train.to_dict() == before
    assert file.exists()
    assert len(entries(cache)) == 3


def test_a_damaged_audit_does_not_stop_a_plan(recipe: RecipeMaker, cache: Path) -> None:
    path = recipe()
    prepared(path)
    assert planned(path).audit is not None
    for text in ("", "{", "[]", "null", "{}", '{"train": 1}'):
        written(cache, "sets", "audit.json").write_text(text)
        assert planned(path).audit is None


def test_what_a_killed_writer_left_is_removed(recipe: RecipeMaker, cache: Path) -> None:
    path = recipe()
    before = texts(path)
    whole = entries(cache)
    for folder in whole:
        partial = folder.with_name(f".{folder.name}.partial")
        folder.rename(partial)
        os.truncate(next(file for file in partial.iterdir() if file.name != SEAL), 10)
    others = [cache / "rows" / name for name in (".other.partial", ".other.removing", "..other.partial.removing")]
    for other in others:
        other.mkdir()
        Seal("cache", None).write(other)
        (other / "rows.arrow").write_bytes(b"x" * 100)
    assert texts(path) == before
    assert entries(cache) == whole


def test_a_failure_leaves_nothing(recipe: RecipeMaker, cache: Path, rows: Path) -> None:
    rows.write_text(rows.read_text() + "{")
    with pytest.raises(DataError, match="not JSON"):
        prepared(recipe())
    assert entries(cache) == []


def test_an_interruption_leaves_nothing(recipe: RecipeMaker, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    original = lorafit.engine.data.prepare.tokenize_source

    def interrupted(*given: Any) -> Iterator[Any]:
        yield from original(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lorafit.engine.data.prepare, "tokenize_source", interrupted)
        done = CliRunner().invoke(app, ["preview", str(path)])
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")
    assert entries(cache) == []
    assert len(texts(path)) == 24


@pytest.mark.parametrize("full", ["write_table", "np.save", "json.dumps"])
def test_a_full_disk(recipe: RecipeMaker, cache: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    path = recipe()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if full == "write_table":
            patch.setattr(lorafit.engine.data.prepare, "write_table", fail)
        elif full == "np.save":
            patch.setattr(np, "save", fail)
        else:
            patch.setattr("lorafit.engine.data.encode.json.dumps", fail)
        done = CliRunner().invoke(app, ["preview", str(path)])
    assert done.exit_code == 5
    assert len(done.stderr.strip().splitlines()) == 1
    assert "disk is full" in done.stderr
    assert len(entries(cache)) == (1 if full == "np.save" else 0)
    assert len(texts(path)) == 24


# --- where it is, and how large -------------------------------------------------------------------


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/folder"):  # the specification has relative paths ignored
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        _shared_folder.cache_clear()
        assert cache_folder() == tmp_path / "home" / ".cache" / "lorafit"


@pytest.mark.parametrize("blocked", ["cache home", "cache home/lorafit", "cache home/lorafit/rows"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, recipe: RecipeMaker, rows: Path, blocked: str) -> None:
    """The data is kept in a temporary folder, which is gone when the process ends."""
    file = tmp_path / blocked
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("in the way")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from lorafit.rows.cache import *\n"
        "folder = cache_folder(); print(folder); assert folder is cache_folder()\n"
        "with in_use(entry('rows', 'key')): entry('rows', 'key').mkdir()"
    )
    root = str(Path(lorafit.rows.cache.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, root],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{temporary}/lorafit-")
    assert list(temporary.iterdir()) == []
    assert file.read_text() == "in the way"


def entry_of(cache: Path, name: str, size: int, used: int) -> Path:
    folder = cache / "rows" / name
    folder.mkdir(parents=True)
    (folder / "rows.arrow").write_bytes(b"x" * size)
    seal(folder, "cache")
    os.utime(folder, (used, used))
    return folder


def test_the_least_recently_used_makes_way(cache: Path) -> None:
    old, middle, new = (entry_of(cache, name, 100_000, used) for name, used in (("a", 1), ("b", 2), ("c", 3)))
    foreign = cache / "rows" / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("precious")
    other = cache / "other" / "thing"
    other.mkdir(parents=True)
    prune(set(), 301_000)
    assert entries(cache) == sorted([old, middle, new, other, foreign])
    prune(set(), 299_000)
    assert entries(cache) == sorted([middle, new, other, foreign])
    with in_use(middle):  # which is a use
        pass
    prune(set(), 150_000)
    assert entries(cache) == sorted([middle, other, foreign])
    prune({middle}, 0)
    assert entries(cache) == sorted([middle, other, foreign])
    prune(set(), 0)
    assert entries(cache) == sorted([other, foreign])


def test_what_another_process_uses_stays(cache: Path) -> None:
    old, new = entry_of(cache, "a", 100_000, 1), entry_of(cache, "b", 100_000, 2)
    partial = cache / "rows" / ".a.partial"
    partial.mkdir()
    with (cache / "rows" / ".a.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prune(set(), 101_000)
        assert entries(cache) == [partial, old]
    prune(set(), 101_000)
    assert entries(cache) == [old]
    assert not new.exists()


def test_preparing_prunes(recipe: RecipeMaker, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe()
    monkeypatch.setattr(lorafit.rows.cache, "LIMIT_BYTES", 1)
    first = prepared(path)
    assert len(entries(cache)) == 2  # what is in use stays, however large
    second = prepared(path, "dataset.loss_on=all")
    assert len(entries(cache)) == 2
    assert len(first.train[:]["input_ids"]) == len(second.train) == 24  # rows in memory stay readable


# --- two processes --------------------------------------------------------------------------------

PREPARE = """
import sys, time
from pathlib import Path
import lorafit.engine.data.prepare
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe

original = lorafit.engine.data.prepare.tokenize_source
def slow(*given):
    with open(sys.argv[3], "a") as stream:
        stream.write("tokenized\\n")
    for batch in original(*given):
        time.sleep(1)
        yield batch
lorafit.engine.data.prepare.tokenize_source = slow
path = Path(sys.argv[1])
plan = plan_recipe(Recipe.load(path), path)
tokenizer = load_tokenizer(plan)
ready = Path(sys.argv[2])
with ready.open("a") as stream:
    stream.write("x")
while len(ready.read_text()) < 2:
    time.sleep(0.01)
print(lorafit.engine.data.prepare.prepare(plan.data, tokenizer).train["input_ids"][:])
"""


def test_two_processes_at_once(recipe: RecipeMaker, tmp_path: Path, cache: Path) -> None:
    path = recipe()
    command = [sys.executable, "-c", PREPARE, str(path), str(tmp_path / "ready"), str(tmp_path / "log")]
    root = str(Path(lorafit.rows.cache.__file__).parents[2])
    both = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "tokenized\n"
    assert len(entries(cache)) == 2
    assert outputs[0] == outputs[1] == f"{prepared(path).train['input_ids'][:]}\n"


# --- weights, the split and duplicates ------------------------------------------------------------


@pytest.mark.parametrize(("weight", "count"), [(1, 10), (2, 20), (0.5, 5), (1.5, 15), (2.25, 22), (0.01, 0), (0.1, 1)])
def test_weighted_rows(weight: float, count: int) -> None:
    indices = np.arange(10) * 3
    chosen = weighted(indices, weight, 7)
    assert len(chosen) == count == round(weight * 10)
    times = Counter(chosen.tolist())
    assert set(times) <= set(indices.tolist())
    assert all(int(weight) <= times[index] <= int(weight) + (weight % 1 > 0) for index in indices.tolist())
    assert weighted(indices, weight, 7).tolist() == chosen.tolist()
    if weight % 1 and count:
        assert any(weighted(indices, weight, seed).tolist() != chosen.tolist() for seed in range(8))


@pytest.mark.parametrize("weight", [0.5, 1.5, 2.5, 0.3, 1.15])
@pytest.mark.parametrize("rows", range(1, 8))
def test_as_many_rows_as_the_plan_counts(rows: int, weight: float) -> None:
    assert len(weighted(np.arange(rows), weight, 0)) == round(rows * weight)


@pytest.fixture
def two(tmp_path: Path) -> list[dict[str, Any]]:
    """Two sources of texts: a0 … a9 and b0 … b9."""
    return [
        {"path": str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{n}"} for n in range(10)]))}
        for name in "ab"
    ]


def counted(path: Path, *overrides: str) -> Counter[str]:
    return Counter(text.removesuffix("<|im_end|>") for text in texts(path, *overrides))


def test_sources_by_weight(recipe: RecipeMaker, two: list[dict[str, Any]], tokenized: list[str]) -> None:
    path = recipe(dataset={"train": [two[0] | {"weight": 1.5}, two[1] | {"weight": 0.5, "max_rows": 4}]})
    times = counted(path)
    a, b = ([times[f"{name}{n}"] for n in range(10)] for name in "ab")
    assert (sum(a), sum(b)) == (15, 2)
    assert set(a) == {1, 2}
    assert b[4:] == [0] * 6
    assert counted(path) == times
    others = [counted(path, f"training.seed={seed}") for seed in range(4)]
    assert len({tuple(sorted(other.items())) for other in others}) == 4
    assert all(sum(other.values()) == 17 for other in others)
    assert len(tokenized) == 2
    plan = plan_recipe(Recipe.load(path, ["training.max_steps=null", "training.num_train_epochs=1"]), path)
    assert plan.schedule is not None
    assert plan.schedule.total_steps == 5  # 17 rows in batches of 4


def test_the_plan_counts_the_weighted_rows_before_they_are_tokenized(
    recipe: RecipeMaker, two: list[dict[str, Any]]
) -> None:
    path = recipe(dataset={"train": [source | {"weight": 1.3, "max_rows": 5} for source in two]})
    before = plan_recipe(Recipe.load(path), path).choices["steps"]
    assert len(texts(path)) == 12
    assert plan_recipe(Recipe.load(path), path).choices["steps"] == before


def test_validation_rows_are_not_repeated(recipe: RecipeMaker, two: list[dict[str, Any]]) -> None:
    path = recipe(dataset={"train": [source | {"weight": 3} for source in two], "validation": 0.2})
    made = prepared(path)
    assert made.validation is not None
    held_out = [tuple(row) for row in made.validation["input_ids"]]
    trained = Counter(tuple(row) for row in made.train["input_ids"])
    assert len(set(held_out)) == len(held_out) == 4
    assert set(trained.values()) == {3}
    assert len(trained) == 16
    assert not set(held_out) & set(trained)
    assert made.audit.duplicates is None  # repeats that are asked for
    assert made.audit.leaked is None


def test_weights_that_leave_nothing(recipe: RecipeMaker, two: list[dict[str, Any]]) -> None:
    path = recipe(dataset={"train": [source | {"weight": 0.01} for source in two]})
    with pytest.raises(DataError, match=r"^dataset\.train: .*weights .*no row"):
        prepared(path)


def test_duplicates_of_another_source(recipe: RecipeMaker, two: list[dict[str, Any]], tmp_path: Path) -> None:
    third = write_jsonl(tmp_path / "c.jsonl", [{"text": text} for text in ("c0", "b7", "a2", "c0")])
    made = prepared(recipe(dataset={"train": [*two, {"path": str(third)}]}))
    assert made.audit.duplicates is not None
    assert made.audit.duplicates.count == 3
    assert made.audit.duplicates.first == f"{third}:2: repeats {two[1]['path']}:8"


def test_a_source_of_which_no_row_is_left(recipe: RecipeMaker, two: list[dict[str, Any]], tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"text": "a b c d e f g h i j k"}])
    sources = [{"path": str(long)}, two[0] | {"weight": 2}, {"path": str(long)}]
    times = counted(recipe(dataset={"train": sources, "excess_length_strategy": "drop"}, training={"max_length": 6}))
    assert times == Counter({f"a{n}": 2 for n in range(10)})


def test_repeated_and_shared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).integers(-40, 40, 100)
    seen: dict[int, int] = {}
    again = [(at, seen[key]) for at, key in enumerate(keys.tolist()) if seen.setdefault(key, at) != at]
    for size in (1 << 21, 7, 1):
        monkeypatch.setattr("lorafit.engine.data.encode._ROWS_AT_ONCE", size)
        assert repeated(keys) == (len(again), *again[0])
    assert repeated(np.arange(5)) == (0, 0, 0)
    assert shared(np.array([9, 3, 1]), np.array([5, 1, 3, 1])) == (2, 1, 2)
    assert shared(np.array([9]), np.array([5])) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_a_split_keeps_equal_rows_together(seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 30, 100)
    training, held_out = split(keys, 20, seed)
    assert sorted([*training, *held_out]) == list(range(100))
    assert 10 < len(held_out) <= 20
    assert not set(keys[training]) & set(keys[held_out])
    only = split(np.array([1, 1, 1, 2, 2]), 1, seed)[1]
    assert only.tolist() == [3, 4]  # the smaller group, though it is more than was asked for
    assert len(split(np.zeros(5, dtype=np.int64), 1, seed)[1]) == 0
