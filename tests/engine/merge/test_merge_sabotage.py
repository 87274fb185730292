"""A merge that is killed, interrupted or out of disk leaves no wrong or partial output, and the next one succeeds."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.engine.merge.run import merge
from lorafit.errors import Interrupted
from lorafit.files import seal
from lorafit.options import MergeOptions

KILLS = 20


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A foreign adapter whose base is big enough (60 MB in several shards) to be killed on the way."""
    folder = tmp_path_factory.mktemp("sabotage")
    base = make_model(
        folder / "base", hidden_size=512, intermediate_size=1536, num_hidden_layers=5, num_attention_heads=8
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="20MB")
    peft = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    peft.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def expected(adapter: Path) -> dict[str, bytes]:
    """The weight files of a merge that nothing disturbs."""
    return contents(run(adapter, adapter.parent / "undisturbed"))


def run(adapter: Path, output: Path) -> Path:
    return merge(MergeOptions(adapter, output=output, verify="weights", overwrite=True), Console(file=io.StringIO()))


def contents(folder: Path) -> dict[str, bytes]:
    assert (folder / "merge_report.json").is_file()
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors*"))}


def in_a_process(adapter: Path, output: Path) -> None:

    torch.set_num_threads(1)
    run(adapter, output)


def test_killed_at_any_moment(adapter: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Twenty times, at random: there is a whole output or none; what is left over is cleared by the next merge."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lorafit.engine.merge.run"])
    output = tmp_path / "merged"
    began = time.monotonic()
    first = context.Process(target=in_a_process, args=(adapter, output))
    first.start()
    first.join(120)
    assert first.exitcode == 0
    started = time.monotonic()
    again = context.Process(target=in_a_process, args=(adapter, output))
    again.start()
    again.join(120)
    length = time.monotonic() - started
    assert began < started
    chance, outcomes = random.Random(5), []
    for _ in range(KILLS):
        shutil.rmtree(output, ignore_errors=True)
        process = context.Process(target=in_a_process, args=(adapter, output))
        process.start()
        process.join(chance.uniform(0, length))
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        outcomes.append(output.exists())
        if output.exists():
            assert contents(output) == expected
        left = {entry.name for entry in tmp_path.iterdir()} - {"merged", ".merged.partial", ".merged.lock"}
        assert left <= {".merged.removing", ".merged.replaced", "..merged.partial.removing"}, (
            "half removed ones, which the next merge clears"
        )
    assert not all(outcomes), "some were killed before the end"
    assert contents(run(adapter, output)) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_killed_while_it_replaces_an_older_one(adapter: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "merged"
    run(adapter, output)
    (output / "merge_report.md").write_text("the older one")
    seal(output, "merge")
    real = Path.rename

    def dies(self: Path, target: Any) -> Any:
        if self.name == ".merged.partial":
            raise KeyboardInterrupt
        return real(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            run(adapter, output)
    assert not output.exists() or contents(output) == expected
    assert contents(run(adapter, output)) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize(("writes", "direct"), [(1, True), (7, True), (3, False)])
def test_out_of_disk(writes: int, direct: bool, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the write, past the page cache or through it."""
    pwrite, opened, done = os.pwrite, os.open, 0

    def full(*arguments: Any) -> int:
        nonlocal done
        done += 1
        if done > writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    def indirect(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *more, **others)

    monkeypatch.setattr("lorafit.engine.merge.tensors.os.pwrite", full)
    if not direct:
        monkeypatch.setattr("lorafit.engine.merge.tensors.os.open", indirect)
    output = tmp_path / "merged"
    result = CliRunner().invoke(app, ["merge", str(adapter), "--output", str(output), "--verify", "weights"])
    assert result.exit_code == 5, result.output
    assert "disk is full" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_space_that_can_not_be_reserved_is_known_at_once(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lorafit.engine.merge.tensors.os.posix_fallocate", refuse)
    result = CliRunner().invoke(app, ["merge", str(adapter), "-o", str(tmp_path / "m"), "--verify", "weights"])
    assert result.exit_code == 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["no O_DIRECT", "EINVAL at the write", "no fallocate"])
def test_other_file_systems(
    fault: str, adapter: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the ways that are fast on some file systems, the same bytes are written."""
    opened, pwrite = os.open, os.pwrite
    direct: set[int] = set()

    def open_(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_DIRECT and fault == "no O_DIRECT":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = opened(path, flags, *more, **others)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def pwrite_(descriptor: int, *more: Any) -> int:
        if descriptor in direct and fault == "EINVAL at the write":
            direct.discard(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, *more)

    def no_fallocate(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("lorafit.engine.merge.tensors.os.open", open_)
    monkeypatch.setattr("lorafit.engine.merge.tensors.os.pwrite", pwrite_)
    if fault == "no fallocate":
        monkeypatch.setattr("lorafit.engine.merge.tensors.os.posix_fallocate", no_fallocate)
    assert contents(run(adapter, tmp_path / "merged")) == expected


def test_interrupted(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and SIGTERM: the exit code of the signal, one line, nothing left."""
    for error, code in ((KeyboardInterrupt(), 130), (Interrupted("terminated", 15), 143)):

        def stop(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("lorafit.engine.merge.stream._edited", stop)
            result = CliRunner().invoke(app, ["merge", str(adapter), "-o", str(tmp_path / "m"), "--verify", "weights"])
        assert result.exit_code == code
        assert not list(tmp_path.iterdir())


def test_a_path_with_spaces_and_a_base_that_changes_under_way(adapter: Path, tmp_path: Path) -> None:
    home = tmp_path / "a b" / "ü"
    shutil.copytree(adapter.parent / "base", home / "base")
    shutil.copytree(adapter, home / "my adapter")
    config = json.loads((home / "my adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(home / "base")
    (home / "my adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert run(home / "my adapter", home / "my model").is_dir()
    shard = sorted((home / "base").glob("*.safetensors"))[-1]
    shard.write_bytes(b"")
    result = CliRunner().invoke(app, ["merge", str(home / "my adapter"), "-o", str(home / "next")])
    assert result.exit_code == 4
    assert shard.name in result.stderr
    assert not (home / "next").exists()
