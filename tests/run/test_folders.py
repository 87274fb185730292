"""What lorafit did not write is still there, whatever a command does; what it reads is what it wrote."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import conversation, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result
from wording import Like

from lorafit import files
from lorafit.cli import app
from lorafit.files import SEAL

RECIPE = {
    "model": {"name_or_path": "model", "dtype": "float32"},
    "lora": {"r": 4},
    "dataset": {"train": [{"path": "rows.jsonl"}], "validation": 0.2},
    "training": {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
    },
    "eval": {"forgetting": [], "limit": 1, "max_new_tokens": 2},
    "merge": {"rows": 2},
    "output_dir": "runs/one",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, f"{arguments}: {result.output}"
    return result


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project with a finished run, evaluated and merged."""
    folder = tmp_path_factory.mktemp("original") / "a project"
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "model")
    write_jsonl(folder / "rows.jsonl", [conversation(f"question {i}", "an answer") for i in range(16)])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done("train", "recipe.yaml")
        done("eval", "runs/one")
        done("merge", "runs/one", "--export", "gguf:f16")
        done("lock", "recipe.yaml")
    return folder


@pytest.fixture
def project(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a project"
    shutil.copytree(original, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink()
    }


OUTPUTS = ("out", "out/deep", ".", "runs", "runs/one", "runs/one/eval", "runs/one/merged", "model", "rows.jsonl", "..")
COMMANDS = (
    *(("train", "recipe.yaml", "--set", f"output_dir={out}") for out in OUTPUTS),
    *(("train", "recipe.yaml", "--set", f"output_dir={out}", "--overwrite") for out in OUTPUTS),
    ("train", "recipe.yaml", "--resume"),
    *(("eval", "runs/one", "-o", out) for out in OUTPUTS),
    ("eval", "runs/one"),
    *(("merge", "runs/one", "--verify", "none", "-o", out, *how) for out in OUTPUTS for how in ((), ("--overwrite",))),
    ("merge", "runs/one", "--verify", "none", "--overwrite", "--export", "gguf:f16", "--quantize", "nf4"),
    ("merge", "runs/one", "--as-adapter", "--rank", "2", "-o", "out"),
    *(("bench", "runs/one", "--rounds", "1", "--new-tokens", "1", "--batch", "1", "--prompt-tokens", "4", "-o", out)
      for out in ("notes.md", "out.json", "recipe.yaml")),
    ("estimate-vram", "recipe.yaml", "--vram", "8GiB", "--plot", "out.png"),
    ("lock", "recipe.yaml"),
    ("lock", "other.yaml"),
    ("smoke", "recipe.yaml", "--record", "--steps", "1"),
    ("smoke", "recipe.yaml", "--record", "--steps", "1", "--golden", "notes.md"),
    ("init", "recipe.yaml", "--model", "model", "--data", "rows.jsonl", "--cpu"),
    ("verify", "runs/one"),
)  # fmt: skip
NAMES = (
    "thesis.txt", "plan.json", "results.json", "merge_report.json", SEAL, "recipe.lock", "adapter", "checkpoints",
    "eval",
    "merged", "merged-nf4", "merged-gguf", "merged.unverified", ".replaced", ".eval.work", ".eval.partial",
    ".merged.partial", ".merged.removing", ".adapter.partial", ".eval.lock", ".lorafit.lock", "tensorboard", "sub",
    "notes.md", "out.json", "out.png", "recipe.golden.json", "other.yaml.lock",
)  # fmt: skip
PLACES = ("", "out", "out/deep", "runs", "runs/one", "runs/one/adapter", "runs/one/eval", "runs/one/merged", "runs/two",
          "runs/one/checkpoints", "runs/one/checkpoints/checkpoint-1", "runs/one/.replaced", "model")  # fmt: skip
trees = st.dictionaries(
    st.tuples(st.sampled_from(PLACES), st.lists(st.sampled_from(NAMES), min_size=1, max_size=2)).map(
        lambda parts: Path(parts[0], *parts[1])
    ),
    st.sampled_from([b"{}", b"precious", b'{"lorafit": "merge"}']),
    max_size=4,
)


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(tree=trees, command=st.sampled_from(COMMANDS))
def test_every_foreign_byte_is_still_there(
    tree: dict[Path, bytes], command: tuple[str, ...], original: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("planted") / "a project"
    shutil.copytree(original, folder)
    shutil.copyfile(folder / "recipe.yaml", folder / "other.yaml")
    before = {name: content for name, content in contents(folder).items() if not name.startswith("runs/")}
    before.pop("recipe.yaml.lock")  # which lorafit wrote
    for path, content in tree.items():
        file = folder / path
        if os.path.lexists(file) or any(part.is_file() for part in file.parents):
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        before[str(path)] = content
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run(*command)
    after = contents(folder)
    lost = [name for name, content in before.items() if after.get(name) != content]
    assert not lost, f"{command}: exit {result.exit_code}\n{result.output}"
    assert result.exit_code in (0, 2, 3, 4, 5, 6, 7), result.output
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("train", "recipe.yaml", "--set", "output_dir=others"), 2),
        (("train", "recipe.yaml", "--set", "output_dir=others", "--overwrite"), 2),
        (("train", "recipe.yaml", "--set", "output_dir=."), 2),
        (("eval", "runs/one", "-o", "others"), 2),
        (("eval", "runs/one", "-o", "."), 2),
        (("eval", "runs/one", "-o", ".."), 2),
        (("eval", "runs/one", "-o", "runs/one"), 2),
        (("eval", "runs/one", "-o", "runs/one/merged"), 2),
        (("merge", "runs/one", "-o", "others"), 2),
        (("merge", "runs/one", "-o", "others", "--overwrite"), 2),
        (("merge", "runs/one", "-o", "model", "--overwrite"), 2),
        (("merge", "runs/one", "-o", "runs/one/eval", "--overwrite"), 2),
        (("eval", "runs/one", "-o", "runs/one/adapter/new"), 2),
        (("merge", "runs/one", "-o", "runs/one/checkpoints/checkpoint-2/new"), 2),
        (("eval", "runs/one", "-o", "/"), 2),
        (("eval", "runs/one", "-o", "made"), 2),
        (("merge", "runs/one", "-o", "made", "--overwrite"), 2),
        (("bench", "runs/one", "-o", "notes.md"), 2),
        (("smoke", "recipe.yaml", "--record", "--golden", "notes.md"), 2),
        (("estimate-vram", "recipe.yaml", "--vram", "8GiB", "--plot", "picture.png"), 2),
        (("lock", "other.yaml"), 2),
    ],
)
def test_outputs_that_are_somebody_elses(command: tuple[str, ...], code: int, project: Path) -> None:
    """One line, and nothing is changed, even by names that lorafit uses."""
    (project / "others").mkdir()
    for name in ("plan.json", "results.json", "merge_report.json", "thesis.txt"):
        (project / "others" / name).write_text("{}")
        (project / name).write_text("{}")
    shutil.copyfile(project / "recipe.yaml", project / "other.yaml")
    (project / "made").mkdir()
    (project / "made" / SEAL).write_text(
        json.dumps({"lorafit": "merge" if command[0] == "merge" else "evaluation", "files": None})
    )
    (project / "made/thesis.txt").write_text("precious")
    for name in ("notes.md", "picture.png", "other.yaml.lock"):
        (project / name).write_text("mine")
    before = contents(project)
    result = run(*command)
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) == 1
    assert contents(project) == before | {n: c for n, c in contents(project).items() if n.endswith(".lorafit.lock")}


class TestMergeAgain:
    def test_a_finished_merge_is_not_replaced_unasked(self, project: Path) -> None:
        before = contents(project / "runs/one/merged")
        refused = run("merge", "runs/one", "--verify", "none")
        assert refused.exit_code == 2
        assert "--overwrite" in refused.stderr
        assert contents(project / "runs/one/merged") == before

    def test_exports_of_before_are_not_either(self, project: Path) -> None:
        shutil.rmtree(project / "runs/one/merged")
        refused = run("merge", "runs/one", "--verify", "none", "--export", "gguf:f16")
        assert refused.exit_code == 2
        assert "merged-gguf: " in refused.stderr

    def test_overwrite_replaces_it(self, project: Path) -> None:
        report = project / "runs/one/merged/merge_report.json"
        assert "gguf" in json.loads(report.read_text())
        done("merge", "runs/one", "--verify", "none", "--overwrite")
        assert "gguf" not in json.loads(report.read_text())


class TestOverwritingARun:
    def test_what_lies_beside_it_in_the_folder_stays(self, project: Path) -> None:
        """Notes, other runs, copies, outputs of other names; what was made of the old run by its name goes with it."""
        run_folder = project / "runs/one"
        done("eval", "runs/one", "-o", "runs/one/second")
        shutil.copytree(run_folder / "adapter", run_folder / "adapter-best")
        (run_folder / "notes").mkdir()
        (run_folder / "notes" / "thesis.txt").write_text("precious")
        (run_folder / "train.log").write_text("mine")
        (run_folder / "recipe.lock").write_text("mine, as the run was not locked")
        (run_folder / "checkpoints" / "emissions.csv").write_text("mine")
        done("train", "recipe.yaml", "--set", "output_dir=runs/one/inner")
        done("train", "recipe.yaml", "--overwrite")
        assert (run_folder / "notes" / "thesis.txt").read_text() == "precious"
        assert (run_folder / "train.log").read_text() == "mine"
        assert (run_folder / "recipe.lock").read_text().startswith("mine")
        assert (run_folder / "checkpoints" / "emissions.csv").read_text() == "mine"
        assert (run_folder / "inner" / "adapter").is_dir()
        assert (run_folder / "adapter").is_dir()
        left = {entry.name for entry in run_folder.iterdir()}
        assert not left & {"eval", "merged", "merged-gguf", ".replaced"}
        assert {"second", "adapter-best"} <= left
        assert run("verify", "runs/one").exit_code == 0

    @pytest.mark.parametrize("place", ["adapter", "checkpoints/checkpoint-1", "eval", "merged"])
    def test_what_lies_in_lorafits_own_folders_is_named(self, place: str, project: Path) -> None:
        (project / "runs/one" / place / "thesis.txt").write_text("precious")
        before = contents(project)
        refused = run("train", "recipe.yaml", "--overwrite")
        assert refused.exit_code == 2
        assert f"{place}/thesis.txt " in refused.stderr
        assert contents(project) == before

    @pytest.mark.parametrize("name", ["adapter/README.md", "eval/report.md", "merged/README.md"])
    def test_what_somebody_wrote_in_lorafits_own_files_is_named(self, name: str, project: Path) -> None:
        file = project / "runs/one" / name
        file.write_text(file.read_text() + "What I think of it.")
        again = {"adapter": ("train", "recipe.yaml"), "eval": ("eval", "runs/one"), "merged": ("merge", "runs/one")}
        for command in {("train", "recipe.yaml"), again[file.parent.name]}:
            refused = run(*command, *(() if command[0] == "eval" else ("--overwrite",)))
            assert refused.exit_code == 2
            assert file.name in refused.stderr
        assert file.read_text().endswith("What I think of it.")

    def test_a_base_that_would_go_with_it(self, project: Path) -> None:
        for source in ("model.name_or_path=runs/one/merged", "dataset.train.0.path=runs/one/eval/samples.jsonl"):
            refused = run("train", "recipe.yaml", "--overwrite", "--set", source)
            assert refused.exit_code in (2, 3)
        own = run("train", "runs/one/recipe.yaml", "--overwrite")
        assert own.exit_code == 2
        assert "would be replaced" in own.stderr
        config, place = (
            project / "recipe.yaml",
            [f"output_dir={project}/runs/one", f"model.name_or_path={project}/model"],
        )
        place.append(f"dataset.train.0.path={project}/rows.jsonl")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(project / "runs/one/merged")
            refused = run("train", str(config), "--overwrite", *(word for one in place for word in ("--set", one)))
        assert refused.exit_code == 2
        assert refused.stderr == Like("… merged … in it")
        assert run("verify", "runs/one").exit_code == 0

    def test_a_finished_run_is_kept_though_one_before_it_was_not_removed(self, project: Path) -> None:
        """As a kill at the very end leaves it."""
        shutil.copytree("runs/one", "older")
        (project / "older").rename(project / "runs/one/.replaced")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorafit.engine.methods.sft.build", lambda *_: os.kill(os.getpid(), signal.SIGINT))
            assert run("train", "recipe.yaml", "--overwrite", "--set", "training.seed=5").exit_code == 130
        assert run("verify", "runs/one/.replaced").exit_code == 0
        assert not (project / "runs/one/.replaced/.replaced").exists()
        done("train", "recipe.yaml", "--overwrite")
        assert not (project / "runs/one/.replaced").exists()

    def test_what_a_kill_left_of_files_is_no_foreign_file(self, project: Path) -> None:
        for name in (
            ".plan.json.7-0.partial",
            "merged/.merge_report.json.7-0.partial",
            "eval/.lorafit.json.7-1.partial",
        ):
            (project / "runs/one" / name).write_text("half")
        (project / "runs/one/.replaced").mkdir()
        (project / "runs/one/.replaced/.lorafit.json.7-0.partial").write_text("half")
        done("merge", "runs/one", "--overwrite", "--verify", "none")
        done("train", "recipe.yaml", "--overwrite")
        assert not list((project / "runs/one").rglob("*.partial"))

    def test_an_unfinished_run_is_cleared(self, project: Path) -> None:
        (project / "runs/one/train.log").write_text("mine")
        shutil.rmtree(project / "runs/one/adapter")
        (project / "runs/one/manifest.json").unlink()
        shutil.rmtree(project / "runs/one/checkpoints")
        done("train", "recipe.yaml")
        assert (project / "runs/one/train.log").read_text() == "mine"
        assert not (project / "runs/one/eval").exists()

    @pytest.mark.parametrize("moves", [0, 1, 3, 8])
    def test_a_kill_while_it_is_set_aside(self, moves: int, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The old run is back at the next start, whole."""
        before = contents(project / "runs/one")
        rename, left = Path.rename, [moves]

        def killed(self: Path, target: Path) -> Path:
            if ".replaced" in Path(target).parts:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
            return rename(self, target)

        child = os.fork()
        if not child:
            monkeypatch.setattr(Path, "rename", killed)
            run("train", "recipe.yaml", "--overwrite")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        refused = run("train", "recipe.yaml")
        assert "run is finished" in refused.stderr
        assert contents(project / "runs/one") == before
        assert run("verify", "runs/one").exit_code == 0


class TestReadersAndWriters:
    HOLD = (
        "import sys, time\nfrom pathlib import Path\nfrom lorafit.run.directory import RunDir\n"
        "from lorafit.files import writing\n"
        "run = RunDir(Path('runs/one').resolve())\n"
        "with {what}:\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )

    def hold(self, what: str) -> subprocess.Popen[str]:
        code = self.HOLD.format(what=what)
        process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    def test_readers_go_on_side_by_side(self, project: Path) -> None:
        with self.hold("run.lock(shared=True)"):
            done("eval", "runs/one")
            done("merge", "runs/one", "--verify", "none", "-o", "out")
            done("chat", "runs/one", "--prompt", "hello", "--max-new-tokens", "1")
            refused = run("train", "recipe.yaml", "--overwrite")
            assert refused.exit_code == 2
            assert "another process" in refused.stderr
        assert run("verify", "runs/one").exit_code == 0

    @pytest.mark.parametrize(
        ("held", "command"),
        [
            ("run.lock()", ("eval", "runs/one")),
            ("run.lock()", ("merge", "runs/one", "-o", "out")),
            ("run.lock()", ("chat", "runs/one", "--prompt", "hello")),
            ("writing(run.eval)", ("eval", "runs/one")),
            ("writing(run.merged)", ("merge", "runs/one", "--overwrite")),
        ],
    )
    def test_writers_keep_others_out(self, held: str, command: tuple[str, ...], project: Path) -> None:
        with self.hold(held):
            refused = run(*command)
        assert refused.exit_code == 2, refused.output
        assert "another process" in refused.stderr

    def test_it_is_said_before_heavy_imports(self, project: Path) -> None:
        probe = (
            "import sys\nfrom typer.testing import CliRunner\nfrom lorafit.cli import app\n"
            "result = CliRunner().invoke(app, sys.argv[1:])\n"
            "print(result.exit_code, 'another process' in result.stderr, 'torch' in sys.modules)"
        )
        for held, command in (
            ("run.lock(shared=True)", ["train", "recipe.yaml", "--overwrite"]),
            ("writing(run.eval)", ["eval", "runs/one"]),
            ("writing(run.merged)", ["merge", "runs/one", "--overwrite"]),
        ):
            with self.hold(held):
                said = subprocess.run(
                    [sys.executable, "-c", probe, *command], capture_output=True, text=True, check=True
                )
            assert said.stdout.split() == ["2", "True", "False"], said.stderr


def flip(file: Path, place: float = 0.9) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 0x11
    file.write_bytes(content)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


EDITS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a weight": ("adapter/adapter_model.safetensors", flip),
    "alpha": ("adapter/adapter_config.json", lambda f: edit(f, lambda c: c.update(lora_alpha=320))),
    "the template": ("adapter/chat_template.jinja", lambda f: f.write_text(f.read_text() + "{{ 'EVIL' }}")),
    "the tokenizer": ("adapter/tokenizer.json", lambda f: flip(f, 0.5)),
    "no tokenizer": ("adapter/tokenizer_config.json", Path.unlink),
    "the gates": ("plan.json", lambda f: edit(f, lambda c: c["eval"].update(gates=[], limit=2))),
    "the fingerprint": ("fingerprint.json", lambda f: f.write_text("{}")),
    "no fingerprint": ("fingerprint.json", Path.unlink),
    "the losses": ("metrics.jsonl", lambda f: f.write_text(f.read_text().replace("loss", "Loss"))),
    "the result": ("manifest.json", lambda f: edit(f, lambda c: c["result"].update(best_metric=0.0))),
    "no hashes": ("manifest.json", lambda f: edit(f, lambda c: c.pop("files"))),
    "no manifest": ("manifest.json", Path.unlink),
    "the seal": ("adapter/lorafit.json", lambda f: edit(f, lambda c: c["files"].popitem())),
    "no seal": ("adapter/lorafit.json", Path.unlink),
    "more templates": ("adapter/additional_chat_templates/tool.jinja", lambda f: f.write_text("{{ 'EVIL' }}")),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_run_that_was_edited_is_refused(what: str, project: Path) -> None:
    name, change = EDITS[what]
    file = project / "runs/one" / name
    file.parent.mkdir(exist_ok=True)
    change(file)
    others = (("chat", "runs/one", "--prompt", "hello"), ("bench", "runs/one")) if what == "a weight" else ()
    for command in (("eval", "runs/one"), ("merge", "runs/one", "--overwrite"), ("verify", "runs/one"), *others):
        refused = run(*command)
        assert refused.exit_code == (2 if (command[0], what) == ("verify", "no manifest") else 7), (what, command)
        assert name.partition("/")[0] in refused.stderr, refused.stderr


def test_a_card_may_be_edited(project: Path) -> None:
    """It is for people to write in; `verify` tells all the same."""
    card = project / "runs/one/adapter/README.md"
    card.write_text(card.read_text() + "Mine.")
    done("eval", "runs/one")
    done("merge", "runs/one", "--overwrite", "--verify", "none")
    assert "adapter/README.md has changed" in run("verify", "runs/one").stderr


MADE = {
    "a merged weight": ("merged/model.safetensors", lambda f: flip(f, 0.5), True),
    "a merged tokenizer": ("merged/tokenizer.json", lambda f: flip(f, 0.5), True),
    "the merge's report": ("merged/merge_report.json", lambda f: edit(f, lambda c: c.update(verdict="fine")), True),
    "figures": ("eval/results.json", lambda f: edit(f, lambda c: c.update(name="better")), False),
    "samples": ("eval/samples.jsonl", lambda f: f.write_text(""), False),
    "an export": ("merged-gguf/Modelfile", lambda f: f.write_text("FROM elsewhere"), False),
    "no seal": ("merged/lorafit.json", Path.unlink, False),
    "one more file": ("eval/more.txt", lambda f: f.write_text("more"), False),
    "an adapter beside the merge": ("merged/adapter_config.json", lambda f: f.write_text("{}"), True),
    "an emptied seal": ("merged/lorafit.json", lambda f: f.write_text(""), True),
}


@pytest.mark.parametrize("what", MADE)
def test_what_was_made_of_a_run_is_verified(what: str, project: Path) -> None:
    """And a merged model that was changed is loaded by nobody."""
    name, change, is_loaded = MADE[what]
    change(project / "runs/one" / name)
    found = run("verify", "runs/one")
    assert found.exit_code == 7
    assert f"{name.partition('/')[0]}/ " in found.stderr
    if is_loaded:
        for command in (("eval", "runs/one"), ("chat", "runs/one/merged", "--prompt", "hello"), ("bench", "runs/one")):
            assert run(*command).exit_code == (
                2 if (command[0], what) == ("chat", "an adapter beside the merge") else 7
            )
        other = ("train", "recipe.yaml", "--set", "model.name_or_path=runs/one/merged", "--set", "output_dir=runs/two")
        assert run(*other).exit_code == (4 if "tokenizer" in what else 7), (
            "a tokenizer is read first, and is no JSON now"
        )


def test_an_adapter_elsewhere_is_checked_until_it_is_its_owners(project: Path) -> None:
    shutil.copytree("runs/one/adapter", "mine")
    edit(Path("mine/adapter_config.json"), lambda c: c.update(lora_alpha=64))
    merge = ("merge", "mine", "-o", "out", "--verify", "none")
    for command in (merge, ("eval", "runs/one", "--adapter", "mine=mine"), ("chat", "model", "--adapter", "mine=mine")):
        refused = run(*command, *(("--prompt", "x") if command[0] == "chat" else ()))
        assert refused.exit_code == 7
        assert "adapter_config.json has changed" in refused.stderr
    Path("mine", SEAL).unlink()
    done(*merge)


class TestLocks:
    """What the lock of a recipe holds besides data and model: what judges, and itself."""

    @pytest.fixture
    def locked(self, project: Path) -> Path:
        (project / "schema.json").write_text('{"type": "object"}')
        (project / "own").mkdir()
        (project / "own/__init__.py").write_text("")
        (project / "own/helper.py").write_text("VALUE = 0.0\n")
        (project / "own/metric.py").write_text("from . import helper\ndef m(answer, expected): return helper.VALUE\n")
        (project / "plain.py").write_text("import beside\ndef n(answer, expected): return beside.VALUE\n")
        (project / "beside.py").write_text("VALUE = 0.0\n")
        (project / "tasks").mkdir()
        (project / "tasks/mine.yaml").write_text("task: mine\n")
        settings = {
            "trust_code": True,
            "metrics": [{"json_schema": "schema.json"}, "own.metric:m"],
            "sets": [{"name": "heldout", "metrics": ["plain:n"]}],
            "lm_eval": {"tasks": ["mine"], "include_path": "tasks"},
        }
        (project / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"eval": RECIPE["eval"] | settings}))  # type: ignore[operator]
        done("lock", "recipe.yaml")
        assert run("lock", "--check", "recipe.yaml").exit_code == 0
        return project

    @pytest.mark.parametrize(
        "name",
        [
            "schema.json",
            "own/metric.py",
            "own/helper.py",
            "own/__init__.py",
            "plain.py",
            "beside.py",
            "tasks/mine.yaml",
        ],
    )
    def test_a_changed_judge_is_drift(self, name: str, locked: Path) -> None:
        for change, how in ((lambda f: f.write_text(f.read_text() + "\n"), "its bytes changed"), (Path.unlink, "")):
            change(locked / name)
            drifted = run("lock", "--check", "recipe.yaml")
            assert drifted.exit_code == 7
            assert f"eval: {name}: {how}" in drifted.stderr

    def test_no_metric_is_run(self, locked: Path) -> None:
        (locked / "plain.py").write_text("raise SystemExit(9)\n")
        assert run("lock", "recipe.yaml").exit_code == 0

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.update(data={}),
            lambda c: c["model"].pop("files"),
            lambda c: c.update(chat_template=None),
            lambda c: c.update(judging={}),
            lambda c: c.update(tokenizer={}),
            lambda c: c.pop("sha256"),
            lambda c: c["versions"].clear(),
        ],
    )
    def test_a_part_that_was_emptied_is_seen(self, change: Callable[[Any], Any], locked: Path) -> None:
        edit(locked / "recipe.yaml.lock", change)
        assert run("lock", "--check", "recipe.yaml").exit_code == 2
        assert run("train", "recipe.yaml", "--locked", "--overwrite", "--dry-run").exit_code == 2

    def test_its_own_lock_is_not_refused(self, project: Path) -> None:
        """Rules about what was written do not see defaults."""
        (project / "held.jsonl").write_text((project / "rows.jsonl").read_text().replace("question", "another"))
        dataset = {"train": [{"path": "rows.jsonl"}], "validation": [{"path": "held.jsonl"}]}
        forgetting = {"sets": [{"name": "other", "path": "held.jsonl", "role": "forgetting"}]}
        content = RECIPE | {"dataset": dataset, "eval": RECIPE["eval"] | forgetting}  # type: ignore[operator]
        (project / "recipe.yaml").write_text(yaml.safe_dump(content))
        for command in (
            ("lock", "recipe.yaml"),
            ("train", "recipe.yaml", "--locked", "--overwrite"),
            ("eval", "runs/one", "--locked"),
            ("merge", "runs/one", "--locked"),
            ("verify", "runs/one"),
        ):
            done(*command)


class TestDisks:
    def read_only(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        """No file in a folder can be made or written, as root as well."""
        opened = os.open

        def refusing(path: Any, flags: int, *more: Any, **others: Any) -> int:
            written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if written and isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(folder):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return opened(path, flags, *more, **others)

        monkeypatch.setattr(os, "open", refusing)
        monkeypatch.setattr(Path, "mkdir", self.refusing_mkdir(folder))

    @staticmethod
    def refusing_mkdir(folder: Path) -> Any:
        mkdir = Path.mkdir

        def refusing(self: Path, *arguments: Any, **options: Any) -> None:
            if not self.exists() and self.absolute().is_relative_to(folder):
                raise OSError(errno.EROFS, "Read-only file system", str(self))
            mkdir(self, *arguments, **options)

        return refusing

    def test_a_run_on_a_read_only_disk(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (project / "runs/one" / ".lorafit.lock").unlink()
        self.read_only(monkeypatch, project / "runs")
        done("eval", "runs/one", "-o", "here")
        done("merge", "runs/one", "--verify", "none", "-o", "merged")
        done("chat", "runs/one", "--prompt", "hello", "--max-new-tokens", "1")
        done("verify", "runs/one")

    def test_a_start_that_was_killed_or_out_of_disk(self, project: Path) -> None:
        """At any of its steps: a folder that was vacant is filled by the next start."""
        write, steps = files.beside, 0

        @contextlib.contextmanager
        def failing(destination: Path) -> Iterator[Path]:
            nonlocal left
            left -= 1
            with write(destination) as partial:
                yield partial
                if left < 0 and "two" in destination.parts:
                    raise OSError(errno.ENOSPC, "No space left on device")

        start = ("train", "recipe.yaml", "--set", "output_dir=runs/two")
        (project / "runs/two").mkdir()
        for steps in range(4):
            left = steps
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(files, "beside", failing)
                assert run(*start).exit_code == 5
        done(*start)
