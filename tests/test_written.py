"""What is written and shown: references, `~` and visible characters, whatever command, file and source."""

from __future__ import annotations

import io
import json
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
from lorafit.train import add_callbacks


def lorafit(*arguments: str) -> tuple[int, str, str]:
    """A command as a shell runs it, in a pipe; returns the exit code, all that was printed, and stderr alone."""
    before = sys.argv, sys.stdout, sys.stderr
    pipes = io.BytesIO(), io.BytesIO()
    sys.argv = ["lorafit", *arguments]
    streams = [io.TextIOWrapper(pipe, encoding="utf-8", write_through=True) for pipe in pipes]
    sys.stdout, sys.stderr = streams
    code = 0
    try:
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    out, err = (stream.detach().getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    return code, out + err, err


@dataclass
class World:
    """A working directory in which everything that a recipe names comes from elsewhere, and is named SECRET."""

    place: Path
    home: Path
    said: dict[str, str]
    """What each command printed."""
    talk: dict[str, str]
    """What of it went to stderr."""

    def run(self, name: str, *arguments: str, expect: int = 0) -> None:
        code, self.said[name], self.talk[name] = lorafit(*arguments)
        assert code == expect, self.said[name]


def tracked(trainer: Any, *arguments: Any) -> Any:
    """What trackers log, as a file in the working directory."""
    adapters = [config.to_dict() for config in trainer.model.peft_config.values()]
    seen = [trainer.args.to_dict(), trainer.model.config.to_dict(), adapters]
    Path("tracked.json").write_text(json.dumps(seen, default=str))
    return add_callbacks(trainer, *arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    """All commands once, on a model in the home folder and on one that the environment names."""
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
        world = World(place, home, {}, {})
        patch.setattr("lorafit.train.add_callbacks", tracked)
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


SECRETS = (
    *("SECRETUSER", "SECRETBASE", "SECRETROWS", "SECRETSCHEMA", "SECRETKEY", "SECRETJUDGE", "SECRETTOKEN"),
    *("SECRETWANDB", "SECRETPROXY", "SECRETPASSWORD"),
)
WRITTEN = {
    *("plan.json", "recipe.lock", "manifest.json", "results.json", "report.html", "report.md", "junit.xml"),
    *("samples.jsonl", "merge_report.json", "merge_report.md", "README.md", "bench.json", "adapter_config.json"),
    *("trainer_state.json", "fingerprint.json", "metrics.jsonl", "a.yaml.lock", "b.golden.json", "tracked.json"),
}


@pytest.mark.parametrize("secret", SECRETS)
def test_no_file_has_it(world: World, secret: str) -> None:
    """But for the user's own recipe, and the cache of rows, which says where on this machine they stand."""
    files = [file for folder in (world.place, world.home / "runs") for file in folder.rglob("*") if file.is_file()]
    assert {file.name for file in files} >= WRITTEN
    own = ("a.yaml", "recipe.yaml") if secret == "SECRETUSER" else ()
    cached = ("audit.json", "rows.arrow") if secret in ("SECRETUSER", "SECRETROWS") else ()
    found = [
        str(file)
        for file in files
        if file.name not in own
        and not (file.name in cached and "cache" in file.parts)
        and (secret in file.name or secret.encode() in file.read_bytes())
    ]
    assert not found


@pytest.mark.parametrize("secret", SECRETS)
def test_nothing_printed_has_it(world: World, secret: str) -> None:
    """On stdout a path is one that a script can use."""
    found = world.talk if secret == "SECRETUSER" else world.said
    assert not [(name, said) for name, said in found.items() if secret in said]


def test_references_are_kept_where_they_were_written(world: World) -> None:
    lock = json.loads((world.place / "b.yaml.lock").read_text())
    assert lock["recipe"]["values"]["model"]["name_or_path"] == lock["model"]["name"] == "${BASE}"
    assert lock["data"].keys() == {"~/train.jsonl", "${ROWS}"}
    assert lock["recipe"]["references"]["eval.judge.base_url"]["text"] == "${JUDGE_URL}"
    plan = json.loads((world.place / "runs/two/plan.json").read_text())
    assert plan["recipe"]["eval"]["judge"] | plan["eval"]["judge"] == plan["recipe"]["eval"]["judge"]
    assert plan["eval"]["judge"]["base_url"] == "${JUDGE_URL}"
    assert plan["training_kwargs"]["learning_rate"] == 1e-3  # a number is what the run was made with
    assert plan["recipe"]["hardware"]["device"] == "cpu"  # and so is a word of the field's own
    for run, base in ((world.home / "runs/one", "~/tiny"), (world.place / "runs/two", "${BASE}")):
        for folder in (run / "adapter", *(run / "checkpoints").iterdir()):
            assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert 'os.path.expanduser("~/tiny")' in (world.home / "runs/one/adapter/README.md").read_text()
    assert 'os.environ["BASE"]' in (world.place / "runs/two/adapter/README.md").read_text()
    results = json.loads((world.place / "runs/two/eval/results.json").read_text())
    assert results["models"]["base"]["path"] == "${BASE}"
    assert results["settings"]["eval"]["sets"][0]["path"] == "${ROWS}"


@pytest.mark.parametrize(
    ("name", "value", "command", "code", "named"),
    [
        ("JUDGE_URL", "http://127.0.0.1:9/OTHERKEY/v1", ("lock", "b.yaml", "--check"), 7, "eval.judge.base_url"),
        ("JUDGE_URL", "http://127.0.0.1:9/OTHERKEY/v1", ("eval", "runs/two", "--locked"), 7, "eval.judge.base_url"),
        ("ROWS", "OTHERKEY.jsonl", ("lock", "b.yaml", "--check"), 7, "${ROWS}"),
        ("BASE", "OTHERKEY/model", ("eval", "runs/two"), 4, "${BASE}"),
        ("JUDGE_URL", None, ("eval", "runs/two"), 2, "JUDGE_URL is not set"),
        ("JUDGE_URL", None, ("eval", "runs/two", "--locked"), 2, "JUDGE_URL is not set"),
        ("JUDGE_URL", None, ("merge", "runs/two", "-o", "other"), 0, "other"),
        ("BASE", None, ("merge", "runs/two", "-o", "third"), 2, "BASE is not set"),
        ("BASE", None, ("chat", "runs/two", "--prompt", "x"), 2, "BASE is not set"),
        ("ROWS", None, ("verify", "runs/two"), 2, "ROWS is not set"),
    ],
)  # fmt: skip
def test_what_a_run_takes_from_the_environment_is_read_again(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, command: tuple[str, ...], code: int,
    named: str,
) -> None:  # fmt: skip
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    found, said, _ = lorafit(*command)
    assert (found, named in said, "OTHERKEY" in said) == (code, True, False), said


def test_a_run_goes_on_with_what_it_began_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's reference names other weights, so it is another recipe; the judge's is nothing to the training."""
    run = world.place / "runs/four"
    changed = ("train", "b.yaml", "--set", "output_dir=runs/four")
    with monkeypatch.context() as patch:
        patch.setattr("lorafit.train.save_result", interrupt)
        assert lorafit(*changed)[0] == 130
    assert run.is_dir()
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/OTHERKEY/v1")
    with monkeypatch.context() as patch:
        patch.setenv("BASE", str(world.home / "tiny"))
        code, said, _ = lorafit(*changed, "--resume")
        assert (code, "model.name_or_path" in said) == (2, True), said
    code, said, _ = lorafit(*changed, "--resume")
    assert code == 0, said


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
