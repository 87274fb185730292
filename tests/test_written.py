"""What is written and shown: references, `~` and visible characters, whatever command, file and source."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import conversation, write_jsonl
from test_eval_judge import serving

from lorafit.cli import main


def lorafit(*arguments: str) -> tuple[int, str]:
    """A command as a shell runs it, its output in a pipe; returns the exit code, and stdout and stderr together."""
    before = sys.argv, sys.stdout, sys.stderr
    pipe = io.BytesIO()
    sys.argv = ["lorafit", *arguments]
    sys.stdout = sys.stderr = stream = io.TextIOWrapper(pipe, encoding="utf-8", write_through=True)
    try:
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    stream.detach()
    return code, pipe.getvalue().decode()


@dataclass
class World:
    """A working directory in which everything that a recipe names comes from elsewhere, and is named SECRET."""

    place: Path
    home: Path
    said: dict[str, str]
    """What each command printed."""

    def run(self, name: str, *arguments: str, expect: int = 0) -> str:
        code, self.said[name] = lorafit(*arguments)
        assert code == expect, self.said[name]
        return self.said[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    """Everything done once: a lock, a run of a model in the home folder and one from the environment, and what follows."""
    place = tmp_path_factory.mktemp("work")
    home = tmp_path_factory.mktemp("homes") / "alice-SECRETUSER"
    shutil.copytree(tiny_model, home / "tiny")
    shutil.copytree(tiny_model, home / "SECRETBASE-7b")
    rows = [conversation(f"say {n} and {n * 37 % 999}", f"it is {n * 7}") for n in range(24)]
    train, other = write_jsonl(home / "train.jsonl", rows[6:]), write_jsonl(home / "SECRETROWS.jsonl", rows[:6])
    schema = home / "SECRETSCHEMA.json"
    schema.write_text("{}")
    recipe: dict[str, Any] = {
        "model": {"name_or_path": "~/tiny", "dtype": "float32"},
        "lora": {"r": 4},
        "dataset": {"train": [{"path": str(train)}], "validation": [{"path": "${ROWS}"}]},
        "training": {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_length": 128}
        | {"per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": "${RATE}"},
        "eval": {
            "sets": [{"name": "more", "path": "${ROWS}", "metrics": ["exact_match", {"json_schema": "${SCHEMA}"}]}],
            "forgetting": [],
            "limit": 2,
            "max_new_tokens": 2,
            "judge": {"base_url": "${JUDGE_URL}", "model": "${JUDGE}", "api_key_env": "JUDGE_KEY", "rows": 1},
            "gates": ["heldout.loss.adapter < 100"],
        },
        "output_dir": "~/runs/one",
    }
    (place / "a.yaml").write_text(yaml.safe_dump(recipe))
    changes = {
        "extends": "a.yaml",
        "model": {"name_or_path": "${BASE}"},
        "output_dir": "runs/two",
        "hardware": {"device": "${DEVICE}"},
    }
    (place / "b.yaml").write_text(yaml.safe_dump(changes))
    with pytest.MonkeyPatch.context() as patch, serving(lambda *_: "A") as endpoint:
        patch.chdir(place)
        address = endpoint.url.replace("/v1", "/SECRETKEY/v1")
        values = {"HOME": home, "ROWS": other, "SCHEMA": schema, "BASE": home / "SECRETBASE-7b", "JUDGE_URL": address}
        values |= {"JUDGE": "SECRETJUDGE-1", "JUDGE_KEY": "SECRETKEY-judge", "HF_TOKEN": "hf_SECRETTOKEN"}
        values |= {"WANDB_API_KEY": "SECRETWANDB", "RATE": "1e-3", "DEVICE": "cpu", "XDG_CACHE_HOME": place / "cache"}
        values |= {"HTTPS_PROXY": "http://SECRETPROXY:SECRETPASSWORD@127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
        for name, value in values.items():
            patch.setenv(name, str(value))
        world = World(place, home, {})
        world.run("lock", "lock", "a.yaml")
        world.run("train", "train", "a.yaml", "--locked")
        world.run("eval", "eval", "~/runs/one", "--locked")
        world.run("merge", "merge", "~/runs/one")
        world.run("verify", "verify", "~/runs/one")
        world.run("lock b", "lock", "b.yaml")
        world.run("train b", "train", "b.yaml", "--locked")
        world.run("eval b", "eval", "b.yaml")
        world.run("merge b", "merge", "runs/two", "-o", "merged")
        world.run("as adapter", "merge", "runs/two", "--add", "~/runs/one", "--as-adapter", "--rank", "4", "-o", "both")
        world.run("smoke", "smoke", "b.yaml", "--record")
        world.run(
            "bench",
            "bench",
            "runs/two",
            "--rounds",
            "1",
            "--prompt-tokens",
            "8",
            "--new-tokens",
            "2",
            "-o",
            "bench.json",
        )
        for command in ("validate", "explain", "preview", "estimate-vram"):
            world.run(command, command, "b.yaml")
        for command in ("validate", "explain", "preview"):
            world.run(f"{command} json", command, "b.yaml", "--json")
        world.run("plan", "train", "b.yaml", "--dry-run", "--set", "output_dir=runs/three")
        world.run("diff", "diff", "a.yaml", "b.yaml", expect=7)
        world.run("chat", "chat", "runs/two", "--prompt", "say 1", "--max-new-tokens", "2")
        yield world


SECRETS = ("SECRETUSER", "SECRETBASE", "SECRETROWS", "SECRETSCHEMA", "SECRETKEY", "SECRETJUDGE", "SECRETTOKEN", "SECRETWANDB",
           "SECRETPROXY", "SECRETPASSWORD")  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
def test_no_file_has_it(world: World, secret: str) -> None:
    folders = (world.place, world.home / "runs")
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"plan.json", "recipe.lock", "manifest.json", "results.json", "report.html", "merge_report.json", "bench.json",
            "adapter_config.json", "trainer_state.json", "a.yaml.lock"} <= names  # fmt: skip
    found = [str(file) for file in files if secret.encode() in file.read_bytes()]
    assert not found
    assert not [name for name in names if secret in name]


@pytest.mark.parametrize("secret", SECRETS)
def test_nothing_printed_has_it(world: World, secret: str) -> None:
    assert not [(name, said) for name, said in world.said.items() if secret in said]
