"""A hub model's tensors are read from its files' headers over HTTP, from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from test_facts import LLAMA, write_safetensors
from wording import Like

from lorafit.facts import layout

COMMIT = "c" * 40
TENSORS = {tensor.name: tensor.shape for tensor in layout(LLAMA)}
OTHER = {"blocks.0.mixer.in_proj.weight": (256, 64), "blocks.0.norm.weight": (64,)}
READ = """
import json, sys
from lorafit.facts import read_facts
facts = read_facts(sys.argv[1])
print(json.dumps([facts.kind, facts.source, {t.name: t.shape for t in facts.tensors}]))
"""


class Hub:
    """Folders served as a hub serves its models.

    Attributes:
        asked: method, file and Range header of each request for a file.
        sent: bytes of each file that were sent.
        closed: files that nobody may read.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.home = root / "models", root / "home"
        self.asked: list[tuple[str, str, str | None]] = []
        self.sent: dict[str, int] = {}
        self.closed: set[str] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        Thread(target=self.server.serve_forever, daemon=True).start()

    def handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                owner, name, _, _, file = self.path.lstrip("/").split("/", 4)
                span = self.headers.get("Range")
                hub.asked.append((self.command, file, span))
                path = hub.root / owner / name / file
                code = "GatedRepo" if file in hub.closed else "EntryNotFound"
                if file in hub.closed or not path.is_file():
                    self.send_response(403 if file in hub.closed else 404)
                    self.send_header("X-Error-Code", code)
                    content = b""
                else:
                    content = path.read_bytes()
                    self.send_response(206 if span else 200)
                    if span:
                        begin, end = span.removeprefix("bytes=").split("-")
                        self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
                        content = content[int(begin) : int(end) + 1]
                    self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)
                    hub.sent[file] = hub.sent.get(file, 0) + len(content)

            do_GET = do_HEAD = answer

        return Handler

    def add(self, name: str, config: dict[str, Any], files: dict[str, dict[str, tuple[int, ...]]]) -> None:
        folder = self.root / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        for file, tensors in files.items():
            write_safetensors(folder / file, tensors)
        if len(files) > 1:
            index = {name: file for file, tensors in files.items() for name in tensors}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.asked.clear()
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        own |= {"HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_HOME": str(self.home)}
        own |= {"XDG_CACHE_HOME": str(self.home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return subprocess.run([sys.executable, *command], env=own | environment, capture_output=True, text=True)

    def read(self, name: str, **environment: str) -> tuple[str, str, dict[str, tuple[int, ...]]]:
        done = self.run("-c", READ, name, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        kind, source, tensors = json.loads(done.stdout)
        return kind, source, {name: tuple(shape) for name, shape in tensors.items()}

    def asked_for_weights(self) -> list[str]:
        return [file for _, file, _ in self.asked if ".safetensors" in file]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    made = Hub(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_headers_of_shards_are_read_once_and_no_weights(hub: Hub) -> None:
    names = list(TENSORS)
    shards = {
        f"model-{number}-of-2.safetensors": {name: TENSORS[name] for name in part}
        for number, part in ((1, names[:5]), (2, names[5:]))
    }
    hub.add("owner/sharded", LLAMA, shards)
    assert hub.read("owner/sharded") == ("hub", Like("… headers … 2 safetensors files … hub"), TENSORS)
    assert all(span for method, file, span in hub.asked if method == "GET" and file in shards)
    assert not list(hub.home.rglob("model-*.safetensors"))
    assert hub.read("owner/sharded") == ("hub", Like("… headers … 2 safetensors files … hub"), TENSORS)
    assert hub.asked_for_weights() == []
    assert hub.read("owner/sharded", HF_HUB_OFFLINE="1")[1] == Like("… headers … 2 safetensors files … hub")
    assert hub.asked == []


def test_headers_beyond_the_first_answer(hub: Hub) -> None:
    many = {f"blocks.{index}.a_name_that_is_long_enough.weight": (1, 1) for index in range(2000)}
    hub.add("owner/many", {"model_type": "other"}, {"model.safetensors": many})
    assert hub.read("owner/many")[2] == many


def test_targets_are_checked_against_the_real_names(hub: Hub, tmp_path: Path) -> None:
    """Of a family of which lorafit knows nothing, and of a large file, of which the header is read."""
    large = OTHER | {"blocks.0.mixer.out_proj.weight": (4096, 4096)}
    hub.add("owner/other", {"model_type": "mamba9"}, {"model.safetensors": large})
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 4)
    recipe.write_text(
        "model: {name_or_path: owner/other, dtype: float32}\nlora: {r: 4, target_modules: [in_proj]}\n"
        f"dataset: {{train: [{{path: {tmp_path}/rows.jsonl, format: text}}]}}\ntraining: {{max_length: 64}}\n"
    )
    done = hub.run("-m", "lorafit", "train", str(recipe), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert model["source"] == Like("… headers … 1 safetensors file … hub")
    assert (model["parameters"], model["adapted_modules"]) == (256 * 64 + 64 + 4096 * 4096, 1)
    assert hub.sent["model.safetensors"] < 200_000
    recipe.write_text(recipe.read_text().replace("[in_proj]", "[in_prj]"))
    refused = hub.run("-m", "lorafit", "train", str(recipe), "--dry-run")
    assert refused.returncode == 2
    assert "in_prj" in refused.stderr
    assert "in_proj" in refused.stderr


@pytest.mark.parametrize("how", ["gated", "no safetensors", "broken", "another model", "an index that is none"])
def test_without_headers_the_configuration_is_enough(how: str, hub: Hub) -> None:
    stored = {name: shape for name, shape in TENSORS.items() if how != "another model" or "embed" not in name}
    hub.add(
        "owner/model",
        LLAMA,
        {} if how in ("no safetensors", "an index that is none") else {"model.safetensors": stored},
    )
    if how == "gated":
        hub.closed = {"model.safetensors"}
    elif how == "broken":
        (hub.root / "owner/model/model.safetensors").write_bytes(b"\xff" * 64)
    elif how == "an index that is none":
        (hub.root / "owner/model/model.safetensors.index.json").write_text("<html>")
    for _ in range(2):  # what the client keeps of the first must not spoil the second
        kind, source, tensors = hub.read("owner/model")
        assert (kind, tensors) == ("hub", TENSORS)
        assert source.startswith("config.json (from the hub")
        assert (";" in source) is (how != "no safetensors")
        assert "\n" not in source


def test_stored_quantized_weights_are_not_asked_for(hub: Hub) -> None:
    hub.add("owner/gptq", LLAMA | {"quantization_config": {"quant_method": "gptq"}}, {"model.safetensors": TENSORS})
    assert hub.read("owner/gptq")[1] == "config.json (from the hub)"
    assert hub.asked_for_weights() == []
