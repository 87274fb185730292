"""What is written and shown: references, `~` and visible characters, whatever command, file and source."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RecipeMaker, conversation, write_jsonl
from rich.table import Table
from rich.text import Text
from test_eval_judge import serving

from lorafit import written
from lorafit.cli import main
from lorafit.console import Console
from lorafit.engine.trainer import add_callbacks


def lorafit(*arguments: str) -> tuple[int, str, str]:
    """A command as a shell runs it, in a pipe; returns the exit code, all that was printed, and stderr alone."""
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    pipes = io.BytesIO(), io.BytesIO()
    sys.argv = ["lorafit", *arguments]
    streams = [io.TextIOWrapper(pipe, encoding="utf-8", write_through=True) for pipe in pipes]
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), *streams
    code = 0
    try:
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
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
    Path(f"{trainer.args.run_name}.tracked.json").write_text(json.dumps(seen, default=str))
    return add_callbacks(trainer, *arguments)


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other recipes read from the environment is not remembered: as in a process of one command."""
    monkeypatch.setattr(written, "_read", set())


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
        patch.setattr("lorafit.engine.train.add_callbacks", tracked)
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
    *("trainer_state.json", "fingerprint.json", "metrics.jsonl", "a.yaml.lock", "b.golden.json", "one.tracked.json"),
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
        ("JUDGE_URL", None, ("eval", "runs/two"), 2, "JUDGE_URL"),
        ("JUDGE_URL", None, ("eval", "runs/two", "--locked"), 2, "JUDGE_URL"),
        ("JUDGE_URL", None, ("merge", "runs/two", "-o", "other"), 0, "other"),
        ("BASE", None, ("merge", "runs/two", "-o", "third"), 2, "BASE"),
        ("BASE", None, ("chat", "runs/two", "--prompt", "x"), 2, "BASE"),
        ("ROWS", None, ("verify", "runs/two"), 2, "ROWS"),
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
        patch.setattr("lorafit.engine.train.save_result", interrupt)
        assert lorafit(*changed)[0] == 130
    assert run.is_dir()
    monkeypatch.setenv("JUDGE_URL", "http://127.0.0.1:9/OTHERKEY/v1")
    with monkeypatch.context() as patch:
        patch.setenv("BASE", str(world.home / "tiny"))
        code, said, _ = lorafit(*changed, "--resume")
        assert (code, "model.name_or_path" in said) == (2, True), said
    code, said, _ = lorafit(*changed, "--resume")
    assert code == 0, said


def test_a_script_finds_the_run(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "runs/of-42"))
    monkeypatch.setenv("HOME", str(tmp_path))
    code, said, talk = lorafit("train", str(recipe()), "--set", "output_dir=${OUT}")
    assert (code, said.removesuffix(talk)) == (0, f"{tmp_path / 'runs/of-42/adapter'}\n")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


EVIL = "\x1b[31mred\x1b]0;title\x07\x9b31m\u202e\u2066\r\x7fend"
ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What a terminal obeys, or shows in another order."""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A working directory with files, names, keys, values, rows and models that would give a terminal orders."""
    place = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("EVIL", EVIL)
        patch.setenv("JUDGE_KEY", "key-0123456789")
        row = conversation("say 1", "one")
        write_jsonl(place / "rows.jsonl", [conversation(f"say {n} {EVIL}", f"{n} {EVIL}") for n in range(8)])
        write_jsonl(place / "bad.jsonl", [row, {EVIL: EVIL}])
        (place / "broken.jsonl").write_text(f"{{{EVIL}\n")
        write_jsonl(place / f"{EVIL}.jsonl", [row] * 4)
        (place / "metric.py").write_text(f"def odd(answer, expected):\n    raise ValueError({EVIL!r})\n")
        (place / "raises.jinja").write_text("{{ raise_exception(" + json.dumps(EVIL) + ") }}")
        (place / "other.yaml").write_text(json.dumps({EVIL: {EVIL: EVIL}, "lora": {EVIL: 1}}))
        for name, file, old, new in (
            ("family", "config.json", '"llama"', json.dumps(EVIL)),
            ("dtype", "config.json", '"float32"', json.dumps(EVIL)),
            ("tokens", "tokenizer_config.json", '"<|im_end|>"', json.dumps(EVIL)),
            ("vocabulary", "tokenizer.json", '"BPE"', json.dumps(EVIL)),
        ):
            shutil.copytree(tiny_model, place / name)
            text = (place / name / file).read_text()
            assert old in text
            (place / name / file).write_text(text.replace(old, new))
        shutil.copytree(tiny_model, place / EVIL)
        write("good", place, tiny_model)
        code, said, _ = lorafit("train", "good.yaml")
        assert code == 0, said
        shutil.copytree(place / "runs/good/adapter", place / "adapter")
        (place / "adapter/lorafit.json").unlink()
        config = json.loads((place / "adapter/adapter_config.json").read_text())
        odd = config | {"base_model_name_or_path": EVIL, "peft_type": EVIL}
        (place / "adapter/adapter_config.json").write_text(json.dumps(odd))
        (place / "results.json").write_text(json.dumps({EVIL: EVIL, "run": {EVIL: 1}}))
        (place / "good.yaml.lock").write_text(json.dumps({"lock_version": EVIL}))
        yield place


def write(name: str, place: Path, base: Path | str, /, **sections: Any) -> None:
    content = {
        "model": {"name_or_path": str(base), "dtype": "float32"},
        "lora": {"r": 2},
        "dataset": {"train": [{"path": "rows.jsonl"}], "audit": {"duplicates": 1.0}},
        "training": {"max_steps": 1, "max_length": 256, "per_device_train_batch_size": 2},
        "eval": {"forgetting": [], "limit": 1, "max_new_tokens": 2, "sets": [{"name": "own", "path": "rows.jsonl"}]},
        "output_dir": f"runs/{name}",
    }
    changed = {key: {**content.get(key, {}), **one} if isinstance(one, dict) else one for key, one in sections.items()}
    (place / f"{name}.yaml").write_text(json.dumps(content | changed))


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "an argument": (
        {},
        "train @; merge @; eval @; chat @; verify @; bench @; validate @; diff @ @; diff --against @ x.yaml; @;"
        "train --@;"
        "estimate-vram --model @; estimate-vram --gpu @ x.yaml; estimate-vram x.yaml --sweep @=1; explain x.yaml @;"
        "init --model @ --data rows.jsonl --cpu --print; init --from other.yaml --print; init --from @ --print;"
        "train x.yaml --set @; train x.yaml --set lora.r=@; preview x.yaml --rows @; merge runs/good --base @ -o m",
    ),
    "a file's name": ({"dataset": {"train": [{"path": f"{EVIL}.jsonl"}]}}, "preview x.yaml; train x.yaml --dry-run"),
    "a model's name": (
        {"model": {"name_or_path": EVIL}},
        "explain x.yaml; train x.yaml --dry-run; estimate-vram x.yaml; validate x.yaml --json; diff good.yaml x.yaml;"
        "explain x.yaml --json; diff good.yaml x.yaml --json; diff good.yaml x.yaml --format markdown",
    ),
    "a key": (
        {EVIL: 1, "lora": {EVIL: 2}},
        "validate x.yaml; train x.yaml; validate x.yaml --json; validate x.yaml --format sarif",
    ),
    "a value": (
        {"training": {"optim": EVIL}, "lora": {"r": EVIL}, "eval": {"gates": [EVIL], "metrics": [EVIL]}},
        "validate x.yaml; explain x.yaml; validate x.yaml --format github; validate x.yaml --format junit",
    ),
    "a variable": (
        {"model": {"revision": "${EVIL}"}, "output_dir": "${EVIL}"},
        "explain x.yaml; train x.yaml --dry-run",
    ),
    "an own metric": ({"eval": {"trust_code": True, "metrics": ["metric:odd"]}}, "train x.yaml; eval runs/x"),
    "rows": ({}, "preview x.yaml; preview x.yaml --json; preview x.yaml --ids"),
    "a row's keys": ({"dataset": {"train": [{"path": "bad.jsonl"}]}}, "preview x.yaml; validate x.yaml"),
    "no JSON": ({"dataset": {"train": [{"path": "broken.jsonl"}]}}, "preview x.yaml; train x.yaml"),
    "a template's words": ({"model": {"chat_template": "raises.jinja"}}, "preview x.yaml; train x.yaml"),
    "a model's family": (
        {"model": {"name_or_path": "family"}},
        "train x.yaml; estimate-vram x.yaml; chat family --prompt x; explain x.yaml",
    ),
    "a model's type": (
        {"model": {"name_or_path": "dtype"}},
        "train x.yaml; estimate-vram x.yaml; chat dtype --prompt x",
    ),
    "a tokenizer": (
        {"model": {"name_or_path": "tokens"}},
        "preview x.yaml; train x.yaml --dry-run; chat tokens --prompt x",
    ),
    "a vocabulary": (
        {"model": {"name_or_path": "vocabulary"}},
        "preview x.yaml; train x.yaml; chat vocabulary --prompt x",
    ),
    "a parent": ({"extends": "other.yaml"}, "validate x.yaml; explain x.yaml"),
    "what a run made": (
        {},
        "eval runs/good; chat runs/good --prompt @; chat runs/good --prompt @ --json; merge adapter -o m;"
        "chat runs/good --adapter a=adapter --prompt x; eval runs/good --adapter a=adapter; lock good.yaml --check;"
        "eval runs/good --baseline results.json; eval runs/good --fail-under @; merge runs/good --add adapter -o n",
    ),
}
"""Where text may come from: changes of a recipe, and the commands that show it; @ is the text itself."""


@pytest.mark.parametrize("source", HOSTILE)
def test_no_text_gives_a_terminal_orders(hostile: Path, tiny_model: Path, source: str) -> None:
    changes, commands = HOSTILE[source]
    write("x", hostile, tiny_model, **changes)
    told = 0
    for command in commands.split(";"):
        code, said, talk = lorafit(*(word.replace("@", EVIL) for word in command.split()))
        assert code != 1, (command, said)
        assert not ORDERS.search(said), (command, said)
        told += "red" in said
        if "--json" in command and said != talk:
            json.loads(said.removesuffix(talk))
    assert bool(told) == (source not in ("no JSON", "a variable", "a vocabulary"))  # of which nothing is quoted
    shutil.rmtree(hostile / "runs/x", ignore_errors=True)


def test_a_server_gives_a_terminal_no_orders(hostile: Path, tiny_model: Path) -> None:
    reply = f"{EVIL}".encode()
    with serving(lambda *_: (400, {}, reply)) as endpoint:
        write(
            "x",
            hostile,
            tiny_model,
            eval={"judge": {"base_url": endpoint.url, "model": "x", "api_key_env": "JUDGE_KEY"}},
        )
        assert lorafit("train", "x.yaml")[0] == 0
        code, said, _ = lorafit("eval", "runs/x")
    assert (code, "red" in said, ORDERS.search(said)) == (4, True, None), said


def test_a_terminal_has_styles_and_no_other_orders() -> None:
    """Styles are rich's, whatever stands in a table."""
    pipe = io.StringIO()
    console = Console(file=pipe, force_terminal=True, width=300, color_system="standard")
    table = Table("name")
    table.add_row(Text(EVIL, style="green"))
    console.print(table)
    console.print(Text(EVIL, style="green"))
    assert set(re.findall("\x1b.[0-9;]*m?", pipe.getvalue())) <= {"\x1b[32m", "\x1b[1m", "\x1b[0m"}
    assert pipe.getvalue().count("\\u001b[31mred") == 2
    assert not ORDERS.search(pipe.getvalue().replace("\x1b", ""))


@pytest.mark.parametrize(
    "content",
    [
        "user:SECRETLINE:x:\n",
        "root:x:0:0\nSECRETLINE:x:1:1\n",
        "API_KEY=SECRETLINE\n",
        "SECRETLINE: x\nother: SECRETLINE\n",
        "*SECRETLINE\n",
        "!SECRETLINE x\n",
        "%SECRETLINE x\n---\na: 1\n",
        "a: &SECRETLINE 1\nb: &SECRETLINE 2\n",
        "a: !SECRETLINE!x y\n",
        '{"SECRETLINE": 1, "SECRETLINE": 2}\n',
        "SECRETLINE: 99999999999999999999999999\n",
        "SECRETLINE: ${UNSET}\n",
        "SECRETLINE: &a [*a]\n",
        "[SECRETLINE]\nkey = SECRETLINE\n",
        "-----BEGIN SECRETLINE-----\nMIIE: SECRETLINE\n",
        "machine h login u password SECRETLINE\n",
        "? [SECRETLINE]\n: SECRETLINE\n",
        "<<: SECRETLINE\n",
    ],
)
def test_of_a_file_that_is_no_recipe_only_the_place_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "other.txt").write_text(content)
    whole = "extends: other.txt\nmodel: {name_or_path: a/b}\ndataset: {train: [{path: x.jsonl}]}\n"
    (tmp_path / "r.yaml").write_text(whole)
    for name in ("r.yaml", "other.txt"):
        code, said, _ = lorafit("validate", str(tmp_path / name))
        assert (code, "SECRETLINE" in said) == (2, False), said
        assert re.search(r"other.txt:\d+:\d+: ", said)


@pytest.mark.parametrize("key", ["eval.metrics=[m:f]", "eval.sets=[{name: own, path: x.jsonl, metrics: [words, m:f]}]"])
def test_code_of_a_metric_is_trusted_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: RecipeMaker, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text("open('ran', 'w')\ndef f(answer, expected): return 1\n")
    write_jsonl(tmp_path / "x.jsonl", [{"instruction": "a", "output": "b"}])
    file = str(recipe())
    for command in (
        ("validate", file),
        ("train", file, "--dry-run"),
        ("train", file),
        ("lock", file),
        ("explain", file),
    ):
        code, said, _ = lorafit(*command, "--set", key)
        assert (code, "eval.trust_code" in said) == (2, True), (command, said)
    assert lorafit("train", file)[0] == 0
    run = str(tmp_path / "runs/recipe")
    assert lorafit("eval", run, "--set", key)[0] == 2
    assert lorafit("train", file, "--dry-run", "--set", key, "--set", "eval.trust_code=true")[0] == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/x: refused", "https://…@host/x: refused"),
        ("GET https://host/x?a=1&token=abc&b=2", "GET https://host/x?a=1&token=…&b=2"),
        ("Bearer hf_0123456789", "Bearer ${MY_TOKEN}"),
        ("{h}/x", "~/x"),
        ("{h}: no such file", "~: no such file"),
        ("file://{h}/x", "file://~/x"),
        ("{h}-2/x and /data{h}/x", "{h}-2/x and /data{h}/x"),
        ("'{h}/a b'", "'~/a b'"),
        ("a\nb\tc é 日本\u200d", "a\nb\tc é 日本\u200d"),
    ],
)
def test_lines_of_anybody(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    monkeypatch.setenv("HOME", "/srv/alice")
    monkeypatch.setenv("MY_TOKEN", "hf_0123456789")
    assert written.shown(text.replace("{h}", "/srv/alice"), talk=True) == shown.replace("{h}", "/srv/alice")


def test_a_first_recipe_has_no_home_folder(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, rows: Path) -> None:
    monkeypatch.setenv("HOME", str(tiny_model.parent))
    code, said, _ = lorafit("init", "--model", str(tiny_model), "--data", str(rows), "--cpu", "--print")
    assert (code, "name_or_path: ~/tiny\n" in said) == (0, True), said


def test_an_evaluation_after_a_merge_knows_a_base_that_a_variable_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: RecipeMaker, tiny_model: Path, rows: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE_OF_MINE", str(tiny_model))
    file = recipe()
    file.write_text(file.read_text().replace(str(tiny_model), "${BASE_OF_MINE}"))
    assert "${BASE_OF_MINE}" in file.read_text()
    run = str(tmp_path / "runs/recipe")
    for command in (("train", str(file)), ("merge", run), ("eval", run, "--data", str(rows), "--limit", "2")):
        code, said, _ = lorafit(*command)
        assert code == 0, said


@pytest.mark.parametrize("value", ["3219776", 'ok": true', 'a"b/cd', "back\\slash", "correcthorse"])
def test_json_is_json_whatever_a_key_is(value: str, monkeypatch: pytest.MonkeyPatch, recipe: RecipeMaker) -> None:
    monkeypatch.setenv("SOME_KEY", value)
    file = recipe()
    for command in ("validate", "estimate-vram", "explain"):
        code, said, err = lorafit(command, str(file), "--json")
        assert code == 0
        json.loads(said.removesuffix(err))
    said = json.dumps({"x": f"before {value} after"})
    assert value.isdecimal() or value not in json.loads(written.hidden(said))["x"]


def test_a_path_is_no_part_of_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE_OF_MINE", "/models/tiny")
    written.remember({"model.name_or_path": written.Reference("${BASE_OF_MINE}", "")})
    assert written.hidden("/models/tiny-run/adapter") == "/models/tiny-run/adapter"
    assert (
        written.hidden("/models/tiny/config.json: no, /models/tiny.")
        == "${BASE_OF_MINE}/config.json: no, ${BASE_OF_MINE}."
    )


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", ">&- 2>&-"])
def test_a_closed_stream_is_no_failure(closed: str, recipe: RecipeMaker) -> None:
    """As cron and services call programs."""
    command = f"exec {shlex.quote(sys.executable)} -m lorafit validate {shlex.quote(str(recipe()))} {closed}"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
