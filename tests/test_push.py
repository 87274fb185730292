"""`lorafit push`, against a local server that speaks the hub's protocol for uploads to the hub's own client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RecipeMaker, Train, as_planned, resealed
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.push import MOST_TEXT, Part
from lorafit.run.directory import RunDir

TOKEN = "hf_" + "a" * 30


@dataclass
class Hub:
    """A hub in memory.

    Attributes:
        repositories: private or not, by id.
        files: by path, whatever the repository.
        status: what every request is answered with, if not what it should be.
        cut: connections are cut off, so many times, where this is in the path.
        refuses: uploads of large files, as a storage does whose address has expired.
        spoils: large files arrive otherwise.
    """

    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0
    status: int | None = None
    cut: tuple[str, int] = ("", 0)
    refuses: bool = False
    spoils: bool = False
    address: str = ""
    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def answer(self, method: str, path: str, body: bytes, headers: Any) -> tuple[int, Any]:
        if self.status is not None:
            return self.status, {"error": f"no, {TOKEN}"}
        if headers.get("Authorization") != f"Bearer {TOKEN}" and "/upload/" not in path:
            return 401, {"error": "no"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            known = name in self.repositories
            self.repositories.setdefault(name, asked.get("private") or asked.get("visibility") == "private")
            return (409 if known else 200), {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            wrong = "[\n" in json.loads(body)["content"]
            return (400 if wrong else 200), {"errors": [{"message": "bad\nyaml"}] * wrong, "warnings": []}
        if "/upload/" in path:
            self.begun.set()
            self.go_on.wait()
            if self.refuses:
                return 403, {}
            self.large[path.rpartition("/")[2]] = body
            self.sent += 1
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.place(one) for one in json.loads(body)["objects"]]}
        if "/preupload/" in path:
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if "/commit/" in path:
            self.commit(body)
            return 200, {
                "success": True,
                "commitOid": "c" * 40,
                "commitUrl": f"{self.address}/me/mine/commit/{'c' * 40}",
            }
        if "/paths-info/" in path:
            return 200, [self.told(one) for one in self.asked(body)]
        if "/tree/" in path:
            return 200, [self.told(name) for name in self.files]
        if "/branch/" in path:
            return 200, {}
        if match := re.match(r"/api/models/([\w.-]+/[\w.-]+)", path):
            private = self.repositories[match[1]]
            return 200, {"id": match[1], "private": private, "sha": "c" * 40, "siblings": [], "tags": []}
        return 404, {"error": path}

    def asked(self, body: bytes) -> list[str]:
        text = body.decode()
        if text.startswith("{"):
            return [name for name in json.loads(text)["paths"] if name in self.files]
        from urllib.parse import parse_qs

        return [name for name in parse_qs(text)["paths"] if name in self.files]

    def place(self, one: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": one["oid"], "size": one["size"]}
        if one["oid"] in self.large:
            return known
        return known | {"actions": {"upload": {"href": f"{self.address}/upload/{one['oid']}?sig=shh", "header": {}}}}

    def commit(self, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.large[value["oid"]]
                self.files[value["path"]] = data[:-1] + b"\x00" if self.spoils else data

    def told(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        known: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git}
        if name.endswith(".safetensors"):
            known["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return known


@pytest.fixture
def hub() -> Iterator[Hub]:
    known = Hub()
    known.go_on.set()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            where, times = known.cut
            if times and where in self.path:
                known.cut = (where, times - 1)
                self.close_connection = True
                return
            status, content = known.answer(self.command, self.path.partition("?")[0], body, self.headers)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = reply

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    known.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield known
    server.shutdown()


def push(hub: Hub | None, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the hub's client reads its settings as it is imported."""
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_ETAG_TIMEOUT": "5"}
    settings |= {"HF_HUB_VERBOSITY": "warning"}  # a user's shell has none, and this process's training sets one
    settings |= {"HF_ENDPOINT": hub.address} if hub else {}
    command = [sys.executable, "-m", "lorafit", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings, **environment})


@pytest.fixture
def run(recipe: RecipeMaker, train: Train) -> RunDir:
    """A finished run on a base that is on this machine alone."""
    found: RunDir = train(recipe("run", training={"max_steps": 1, "warmup_steps": 0}))
    return found


def test_an_adapter_is_there_as_it_is_here(run: RunDir, hub: Hub) -> None:
    """Private, with a card and a base that others can follow, and with nothing but what loads."""
    hub.files["other.txt"] = b"older"
    done = push(hub, run.path, "me/mine", "--base", "org/base")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/mine"
    assert hub.repositories == {"me/mine": True}
    assert "other.txt" in done.stderr
    weights = "adapter_model.safetensors"
    assert hub.files[weights] == (run.adapter / weights).read_bytes()
    config = json.loads(hub.files["adapter_config.json"])
    own = json.loads((run.adapter / "adapter_config.json").read_text())
    assert config == own | {"base_model_name_or_path": "org/base"}
    card = hub.files["README.md"].decode()
    assert "base_model: org/base" in card
    assert 'from_pretrained("me/mine")' in card
    assert not {"lorafit.json", "plan.json", "manifest.json"} & hub.files.keys()
    assert not any(str(run.path.parent).encode() in data for data in hub.files.values())
    assert TOKEN not in done.stdout + done.stderr


def test_a_dry_run_asks_no_hub(run: RunDir) -> None:
    done = push(None, run.path, "me/mine", "--base", "org/base", "--dry-run", "--json", HF_HUB_OFFLINE="1", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["pushed"], told["private"], told["what"]) == (False, True, "adapter")
    sizes = {one["path"]: one["bytes"] for one in told["files"]}
    assert sizes["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").stat().st_size


def test_a_merged_model_and_one_trained_in_full(run: RunDir, hub: Hub, recipe: RecipeMaker, train: Train) -> None:
    assert push(hub, run.path, "me/mine", "--merged").returncode == 2  # there is none
    assert CliRunner().invoke(app, ["merge", str(run.path), "--verify", "none"]).exit_code == 0
    assert push(hub, run.path, "me/mine", "--merged").returncode == 2  # nothing was proved
    assert CliRunner().invoke(app, ["merge", str(run.path), "--overwrite"]).exit_code == 0
    assert push(hub, run.path, "me/mine", "--merged", "--public").returncode == 0
    assert hub.repositories == {"me/mine": False}
    assert {"config.json", "model.safetensors", "README.md"} <= hub.files.keys()
    assert not [name for name in hub.files if name.startswith("merge_report")]
    full = train(recipe("full", lora=..., training={"max_steps": 1, "warmup_steps": 0}))
    assert push(hub, full.path, "me/full").returncode == 0
    assert hub.files["model.safetensors"] == (full.model / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("me/mine",), 2, "--base"),
        (("me/mine", "--base", "./here"), 2, "--base"),
        (("mine", "--base", "org/base"), 2, "OWNER/NAME"),
        (("me/a--b", "--base", "org/base"), 2, "OWNER/NAME"),
    ],
)
def test_what_can_not_be_pushed_is_refused(arguments: tuple[str, ...], code: int, said: str, run: RunDir) -> None:
    done = push(None, run.path, *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert said in done.stderr


def test_what_is_not_as_it_was_written_stays(run: RunDir, hub: Hub) -> None:
    config = run.adapter / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert push(hub, run.path, "me/mine", "--base", "org/base").returncode == 7
    assert hub.repositories == {}


@pytest.mark.parametrize("what", ["a token", "a secret of the environment", "a place"])
def test_secrets_and_places_stay_here(what: str, run: RunDir, hub: Hub) -> None:
    texts = {"a token": f"hf_{'b' * 30}", "a secret of the environment": "correct horse", "a place": str(run.path)}
    card = run.adapter / "README.md"
    card.write_text(card.read_text() + texts[what])
    resealed(run)
    done = push(hub, run.path, "me/mine", "--base", "org/base", MY_PASSWORD="correct horse")
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert "README.md" in done.stderr
    assert "correct horse" not in done.stderr
    assert hub.repositories == {}


@pytest.mark.parametrize(("status", "said"), [(401, "hf auth login"), (403, "write access"), (500, "refused")])
def test_a_hub_that_refuses_is_one_line(status: int, said: str, run: RunDir, hub: Hub) -> None:
    hub.status = status
    done = push(hub, run.path, "me/mine", "--base", "org/base")
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)
    assert said in done.stderr
    assert TOKEN not in done.stderr


def test_without_a_login_or_a_hub_it_says_so(run: RunDir, hub: Hub, tmp_path: Path) -> None:
    nobody = {"HF_TOKEN": "", "HF_HOME": str(tmp_path / "empty")}
    assert "hf auth login" in push(hub, run.path, "me/mine", "--base", "org/base", **nobody).stderr
    offline = push(hub, run.path, "me/mine", "--base", "org/base", HF_HUB_OFFLINE="1")
    assert (offline.returncode, len(offline.stderr.splitlines())) == (4, 1)
    gone = push(None, run.path, "me/mine", "--base", "org/base", HF_ENDPOINT="http://127.0.0.1:9")
    assert (gone.returncode, "reached" in gone.stderr) == (4, True)


def test_a_public_repository_is_not_taken_unasked(run: RunDir, hub: Hub) -> None:
    hub.repositories["me/mine"] = False
    done = push(hub, run.path, "me/mine", "--base", "org/base")
    assert (done.returncode, "--public" in done.stderr) == (2, True)
    assert hub.files == {}


def test_a_push_that_broke_is_done_again(run: RunDir, hub: Hub) -> None:
    """Until then nothing is there; what was uploaded already is not sent again, and no signed address is shown."""
    hub.refuses, hub.cut = True, ("/upload/", 1)
    refused = push(hub, run.path, "me/mine", "--base", "org/base")
    assert (refused.returncode, len(refused.stderr.splitlines()), hub.files) == (4, 1, {})
    hub.refuses, hub.cut = False, ("/commit/", 99)
    broken = push(hub, run.path, "me/mine", "--base", "org/base")
    assert (broken.returncode, "reached" in broken.stderr, hub.files, hub.sent) == (4, True, {}, 1)
    hub.cut = ("", 0)
    done = push(hub, run.path, "me/mine", "--base", "org/base")
    assert (done.returncode, hub.sent) == (0, 1)
    assert "shh" not in refused.stderr + broken.stderr + done.stderr


def test_a_push_that_is_interrupted_leaves_nothing(run: RunDir, hub: Hub) -> None:
    hub.go_on.clear()
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.address}
    command = [sys.executable, "-m", "lorafit", "push", str(run.path), "me/mine", "--base", "org/base"]
    with subprocess.Popen(command, env=os.environ | settings, stderr=subprocess.PIPE, text=True) as process:
        assert hub.begun.wait(60)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    hub.go_on.set()
    assert (process.returncode, "Traceback" in said, hub.files) == (130, False, {})


def test_what_arrived_otherwise_is_told(run: RunDir, hub: Hub) -> None:
    hub.spoils = True
    done = push(hub, run.path, "me/mine", "--base", "org/base")
    assert (done.returncode, "adapter_model.safetensors" in done.stderr) == (4, True)


def test_a_base_of_the_hub_needs_no_name(run: RunDir) -> None:
    as_planned(run, model={"name_or_path": "org/base", "kind": "hub"})
    assert push(None, run.path, "me/mine", "--dry-run").returncode == 0


@pytest.mark.parametrize("named", ["~/own base", "${OWN_BASE}"])
def test_nobody_reads_how_the_base_is_called_here(
    named: str, recipe: RecipeMaker, train: Train, tiny_model: Path, hub: Hub, tmp_path: Path, monkeypatch: Any
) -> None:
    """In the card's table and in its code: both would name a place that others don't have."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OWN_BASE", str(shutil.copytree(tiny_model, tmp_path / "home" / "own base")))
    short = {"max_steps": 1, "warmup_steps": 0}
    run = train(recipe("run", model={"name_or_path": named}, training=short))
    assert push(hub, run.path, "me/mine").returncode == 2  # PEFT loads the base by that name
    done = push(hub, run.path, "me/mine", "--base", "org/base", "--revision", "v2")
    assert done.returncode == 0, done.stderr
    card = hub.files["README.md"].decode()
    assert not {word for word in ("own base", "OWN_BASE", "expanduser", "environ") if word in card}
    assert 'AutoPeftModelForCausalLM.from_pretrained("me/mine", revision="v2")' in card


def test_a_hub_s_id_from_the_environment_stays_here(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe says ${BASE}; what it stands for may be nobody's business."""
    monkeypatch.setenv("BASE", "org/unreleased-base")
    reference = {"text": "${BASE}", "sha256": hashlib.sha256(b"org/unreleased-base").hexdigest()}
    changes = {"name_or_path": "${BASE}", "kind": "hub"}
    as_planned(run, model=changes, references={"model.name_or_path": reference})
    done = push(None, run.path, "me/mine", "--dry-run")
    assert (done.returncode, "--base" in done.stderr, "unreleased" in done.stderr) == (2, True, False)


def test_a_merged_model_wherever_it_was_written(run: RunDir, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "my models" / "merged"
    assert CliRunner().invoke(app, ["merge", str(run.path), "--output", str(out)]).exit_code == 0
    assert push(hub, out, "me/mine").returncode == 0
    assert hub.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert str(tmp_path) not in hub.files["README.md"].decode()
    assert "merge_report.json" not in hub.files


def test_a_card_that_the_hub_refuses_is_named(run: RunDir, hub: Hub) -> None:
    (run.adapter / "README.md").write_text("---\ntags: [\n---\n")
    done = push(hub, run.path, "me/mine", "--base", "org/base")
    assert (done.returncode, len(done.stderr.splitlines()), "README.md" in done.stderr) == (4, 1, True)
    assert hub.files == {}


def test_files_that_are_large_here_and_small_for_a_hub(tmp_path: Path) -> None:
    """A hub keeps text of up to 10 MB as git does, by another hash than that of large files."""
    file = tmp_path / "tokenizer.json"
    file.write_bytes(b"a" * (MOST_TEXT + 1))
    git = subprocess.run(["git", "hash-object", file], capture_output=True, text=True, check=True).stdout.strip()
    part = Part(file.name, file)
    assert part.is_there(SimpleNamespace(size=part.bytes, lfs=None, blob_id=git))
    assert not part.is_there(SimpleNamespace(size=part.bytes, lfs=None, blob_id=git[::-1]))
