"""A base is told from another by its fingerprint, wherever it stands and however it is cut into files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from wording import Like

from lorafit.engine.model import base_source
from lorafit.errors import ModelError
from lorafit.facts import fingerprint
from lorafit.facts.fingerprint import (
    VERSION,
    comparable,
    damaged_in_cache,
    differences,
    fingerprint_of,
    listed,
    summary,
)
from lorafit.run.directory import RunDir
from lorafit.run.fingerprint import changed_base, changed_source, model_fingerprint, run_fingerprint

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def plan_of(name: str | Path, revision: str | None = None) -> Any:
    return SimpleNamespace(model=SimpleNamespace(name_or_path=str(name)), revision=revision, references={})


def changed_tensors(folder: Path, **changes: Any) -> None:
    """Write a folder's weights anew, with functions of tensors applied (`all` is for every one of them)."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        change = changes.get("all") or changes.get(name)
        if change:
            tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


# --- the same base --------------------------------------------------------------------------------


def test_a_copy_is_the_same_base(base: Path, tiny_model: Path) -> None:
    before = fingerprint_of(tiny_model)
    assert before["fingerprint_version"] == VERSION
    assert before["tensors"].keys() == load_file(base / "model.safetensors").keys()
    assert before["files"].keys() == {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert json.loads(json.dumps(before)) == before
    assert differences(before, fingerprint_of(base)) == []


def test_sharded_anew_it_is_the_same_base(base: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, two = fingerprint_of(base), fingerprint_of(sharded)
    assert differences(one, two) == differences(two, one) == []


def test_a_configuration_that_was_only_written_anew(base: Path) -> None:
    before, file = fingerprint_of(base), base / "config.json"
    config = json.loads(file.read_text())
    config |= {"transformers_version": "9.9.9", "_name_or_path": "/home/somebody/base"}
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(dict(sorted(config.items(), reverse=True))))
    now = fingerprint_of(base)
    assert now["files"]["config.json"] != before["files"]["config.json"]
    assert differences(before, now) == []


def test_a_head_that_is_stored_twice(base: Path) -> None:
    changed_tensors(base, **{"lm_head.weight": lambda _: load_file(base / "model.safetensors")[EMBEDDINGS].clone()})
    both = fingerprint_of(base)
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert differences(both, fingerprint_of(base)) == differences(fingerprint_of(base), both) == []


# --- another base ---------------------------------------------------------------------------------


def test_another_random_base_of_the_same_shapes(base: Path, tmp_path: Path) -> None:
    found = differences(fingerprint_of(base), fingerprint_of(make_model(tmp_path / "other", seed=1)))
    assert f"tensor {Q_PROJ}" in found
    assert {name.split()[0] for name in found} == {"tensor"}
    assert not any("norm" in name for name in found)  # all ones in both


@pytest.mark.parametrize("change", [torch.neg, lambda t: t.to(torch.bfloat16), lambda t: t[:-1].clone(), lambda t: t.T])
def test_one_changed_tensor(base: Path, change: Any) -> None:
    before = fingerprint_of(base)
    changed_tensors(base, **{Q_PROJ: lambda tensor: change(tensor).contiguous()})
    assert differences(before, fingerprint_of(base)) == [f"tensor {Q_PROJ}"]


def test_every_changed_tensor_is_named(base: Path) -> None:
    before = fingerprint_of(base)
    changed_tensors(base, all=torch.neg)
    assert differences(before, fingerprint_of(base)) == [f"tensor {name}" for name in sorted(before["tensors"])]


def test_a_small_change_in_a_small_tensor(base: Path) -> None:
    before = fingerprint_of(base)
    changed_tensors(base, **{"model.norm.weight": lambda t: torch.cat([t[:30], t[30:31] + 1, t[31:]])})
    assert differences(before, fingerprint_of(base)) == ["tensor model.norm.weight"]


def test_a_tensor_more_or_less(base: Path) -> None:
    before = fingerprint_of(base)
    tensors = load_file(base / "model.safetensors")
    del tensors[Q_PROJ], tensors["lm_head.weight"]
    save_file(tensors | {"extra.weight": torch.ones(2)}, base / "model.safetensors", {"format": "pt"})
    expected = ["tensor extra.weight", "tensor lm_head.weight", f"tensor {Q_PROJ}"]
    assert differences(before, fingerprint_of(base)) == expected
    assert differences(fingerprint_of(base), before) == expected


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_file(base: Path, file: str) -> None:
    before = fingerprint_of(base)
    content = (base / file).read_text()
    changed = content.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05') + " " * (file != "config.json")
    assert changed != content
    (base / file).write_text(changed)
    assert differences(before, fingerprint_of(base)) == [file]


def test_weights_of_other_kinds(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"weights")
    before = fingerprint_of(base)
    assert before["tensors"] == {}
    (base / "pytorch_model.bin").write_bytes(b"others.")
    assert differences(before, fingerprint_of(base)) == ["pytorch_model.bin"]


def test_what_is_not_known_is_not_compared(base: Path) -> None:
    whole = fingerprint_of(base)
    assert differences({}, whole) == differences(whole, {}) == differences({}, {}) == []
    for file in ("tokenizer.json", "model.safetensors"):
        (base / file).unlink()
    assert differences(whole, fingerprint_of(base)) == []


def test_whether_weights_were_compared(base: Path) -> None:
    whole = fingerprint_of(base)
    file = base.with_name("model.gguf")
    file.write_bytes(b"GGUF")
    gguf = model_fingerprint(plan_of(file))
    assert comparable(whole, whole)
    assert comparable(gguf, gguf)
    assert comparable(gguf | {"dequantized": whole}, whole)
    assert not comparable({}, whole)
    assert not comparable(gguf, whole)
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = {"weight_map": {Q_PROJ: "model-00001-of-00001.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert comparable(whole, fingerprint_of(base))


def test_listed() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcdefgh")) == Like("a, b, c, d, e … 3")


# --- files that can't be read ---------------------------------------------------------------------


def test_a_shard_that_is_cut_off(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors: .*cut off.* \d+ bytes"):
        fingerprint_of(base)


def test_a_shard_that_is_missing(base: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"base: model-00001-of-00001.safetensors .*missing.*index.json"):
        fingerprint_of(base)


def test_offsets_that_lie_are_no_crash(base: Path) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [-4000, 4]},
        "b": {"dtype": "F32", "shape": [9], "data_offsets": [1 << 60, 8]},
    }
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ModelError, match="not a whole"):
        fingerprint_of(base)


@pytest.mark.parametrize("place", [0.001, 0.2, 0.5, 0.77, 0.9999])
def test_a_byte_anywhere_in_the_weights_counts(place: float, base: Path) -> None:
    before, file = fingerprint_of(base), base / "model.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + int((len(content) - start) * place)] ^= 1
    file.write_bytes(content)
    (changed,) = differences(before, fingerprint_of(base))
    assert changed.startswith("tensor ")


def test_weights_are_read_once(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the file changes, even into one of the same size and modification time."""
    read = []
    original = fingerprint.tensor_digests
    monkeypatch.setattr(fingerprint, "tensor_digests", lambda file: [read.append(file), original(file)][1])
    monkeypatch.setattr("lorafit.rows.cache.SETTLED_NS", 0)
    file = base / "model.safetensors"
    before = fingerprint_of(base)
    assert fingerprint_of(base) == before
    assert len(read) == 1
    times = file.stat()
    changed_tensors(base, **{Q_PROJ: torch.neg})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert differences(before, fingerprint_of(base)) == [f"tensor {Q_PROJ}"]
    assert len(read) == 2
    monkeypatch.setattr("lorafit.rows.cache.SETTLED_NS", 60_000_000_000)
    file.touch()
    fingerprint_of(base)
    fingerprint_of(base)
    assert len(read) == 4, "what was just written may be written again in the same tick of the clock"


# --- runs -----------------------------------------------------------------------------------------


def test_a_run_knows_its_base(base: Path, run: RunDir) -> None:
    plan = plan_of(base)
    assert changed_base(plan, run) == []  # nothing was recorded
    run.write_base_files(run_fingerprint(plan, run))
    assert run.base_files() == model_fingerprint(plan)
    assert changed_base(plan, run) == []
    assert base_source(plan, run) is None
    changed_tensors(base, **{Q_PROJ: torch.neg})
    assert changed_base(plan, run) == [f"tensor {Q_PROJ}"]
    with pytest.raises(ModelError, match=rf"not the base .*\(changed: tensor {Q_PROJ}\)"):
        base_source(plan, run)


def test_a_gguf_file_and_what_it_became(base: Path, run: RunDir) -> None:
    file = base.with_name("model.gguf")
    file.write_bytes(b"GGUF" + bytes(100))
    plan = plan_of(file)
    shutil.copytree(base, run.base)
    run.write_base_files(run_fingerprint(plan, run))
    assert run.base_files()["dequantized"]["tensors"].keys() == fingerprint_of(base)["tensors"].keys()  # type: ignore[index]
    assert base_source(plan, run) == run.base
    file.write_bytes(b"GGUF" + bytes(101))
    assert changed_source(plan, run) == ["model.gguf"]
    assert changed_base(plan, run) == []  # what was trained on is still there
    assert differences(run.base_files() or {}, fingerprint_of(base)) == []
    changed_tensors(run.base, **{Q_PROJ: torch.neg})
    with pytest.raises(ModelError, match=rf"run/base: .*not the base .*changed: tensor {Q_PROJ}\)"):
        base_source(plan, run)
    assert differences(run.base_files() or {}, fingerprint_of(run.base)) == [f"tensor {Q_PROJ}"]


def test_a_model_of_the_hub(base: Path, tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--owner--name"
    snapshot = model / "snapshots" / commit
    shutil.copytree(base, snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    plan = plan_of("owner/name", "main")
    found = model_fingerprint(plan)
    assert (found["model"], found["revision"], found["commit"]) == ("owner/name", "main", commit)
    assert differences(found, fingerprint_of(base)) == []
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (snapshot / "model.safetensors").unlink()
    assert model_fingerprint(plan)["tensors"] == {}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_fingerprint(plan)["tensors"] == {}  # the download is not finished
    assert "tensors" not in model_fingerprint(plan_of("owner/other"))


def test_what_is_damaged_in_the_hubs_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are named by their SHA-256, small ones as git names them."""
    model = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = model / "snapshots" / ("0" * 40), model / "blobs"
    for folder in (snapshot, blobs, model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    for file in base.iterdir():
        content = file.read_bytes()
        git = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True).stdout.strip()
        name = hashlib.sha256(content).hexdigest() if file.suffix == ".safetensors" else git
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert damaged_in_cache("owner/name", None) == []
    for name in ("model.safetensors", "config.json"):
        blob = (snapshot / name).resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    assert damaged_in_cache("owner/name", None) == ["config.json", "model.safetensors"]
    assert damaged_in_cache("owner/other", None) == damaged_in_cache(str(base), None) == []


def test_no_place_on_this_machine_is_recorded(base: Path, run: RunDir) -> None:
    plan = plan_of(base)
    found = run_fingerprint(plan, run)
    assert found["model"] == "base"
    assert str(base.parent) not in json.dumps(found)


def test_the_summary_has_one_hash_of_the_tensors(base: Path) -> None:
    whole = fingerprint_of(base)
    short = summary(whole | {"dequantized": whole})
    assert short["tensors"]["count"] == short["dequantized"]["tensors"]["count"] == len(whole["tensors"])
    changed_tensors(base, **{Q_PROJ: torch.neg})
    assert summary(fingerprint_of(base))["tensors"]["sha256"] != short["tensors"]["sha256"]
    assert short | {"tensors": 0, "dequantized": 0} == whole | {"tensors": 0, "dequantized": 0}
    assert "samples" in summary({"samples": {"a.gguf": "x"}, "dequantized": whole})


def test_it_needs_no_torch() -> None:
    probe = (
        "import sys, lorafit.run.fingerprint; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
