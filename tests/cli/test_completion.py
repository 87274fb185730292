"""Completion in the shells' own protocols, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.cli.complete import gpus, keys

RECIPE = "model: {name_or_path: a/b}\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with recipes, runs, and names that hold spaces."""
    for name in ("configs/a.yaml", "configs/b.yml", "my recipes/big one.yaml", "my recipes/it's.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(RECIPE)
    (tmp_path / "configs" / "compose.yaml").write_text("services: {}\n")
    (tmp_path / "configs" / "notes.txt").write_text("model: no\n")
    (tmp_path / "child.yaml").write_text("# a comment\nextends: configs/a.yaml\n")
    for name in ("one", "two words"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "plan.json").write_text("{}")
    (tmp_path / "runs" / "other").mkdir()
    return tmp_path


def ask(cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'lorafit'; from lorafit.cli import main; main()"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("COMP_", "_TYPER", "_LORAFIT"))}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done


def bash(cwd: Path, *words: str) -> list[str]:
    """What bash would offer for the last word; the words are as they are typed."""
    everything = ("lorafit", *words)
    return ask(
        cwd,
        _LORAFIT_COMPLETE="complete_bash",
        COMP_WORDS="\n".join(everything),
        COMP_CWORD=str(len(words)),
    ).stdout.splitlines()


def zsh(cwd: Path, line: str) -> str:
    return ask(cwd, _LORAFIT_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line).stdout


def fish(cwd: Path, line: str, action: str = "get-args") -> subprocess.CompletedProcess[str]:
    return ask(cwd, _LORAFIT_COMPLETE="complete_fish", _TYPER_COMPLETE_ARGS=line, _TYPER_COMPLETE_FISH_ACTION=action)


class TestFiles:
    def test_recipes_and_folders(self, place: Path) -> None:
        assert bash(place, "train", "") == ["child.yaml", "configs/", r"my\ recipes/", "runs/"]
        assert bash(place, "preview", "configs/") == ["configs/a.yaml", "configs/b.yml"]

    def test_a_single_folder_is_entered(self, place: Path) -> None:
        assert bash(place, "train", "conf") == ["configs/a.yaml", "configs/b.yml"]

    @pytest.mark.parametrize("typed", [r"my\ r", r"my\ recipes/"])
    def test_spaces_are_escaped_for_bash(self, place: Path, typed: str) -> None:
        assert bash(place, "train", typed) == [r"my\ recipes/big\ one.yaml", r"my\ recipes/it\'s.yaml"]

    def test_but_not_in_quotes(self, place: Path) -> None:
        assert bash(place, "train", '"my recipes/b') == ["my recipes/big one.yaml"]

    def test_bash_takes_them_as_it_would_type_them(self, place: Path) -> None:
        script = ask(place, _LORAFIT_COMPLETE="source_bash").stdout
        assert "COMP_WORDS" in script
        for word in bash(place, "train", r"my\ r"):
            shown = subprocess.run(
                ["bash", "-c", f"cat -- {word}"], cwd=place, capture_output=True, text=True, check=True
            )
            assert shown.stdout == RECIPE

    def test_spaces_in_other_shells(self, place: Path) -> None:
        assert '"my recipes/big one.yaml"' in zsh(place, r"lorafit train my\ recipes/b")
        assert fish(place, r"lorafit train my\ recipes/b").stdout.splitlines() == ["my recipes/big one.yaml"]
        assert fish(place, "lorafit train conf", "is-args").returncode == 0
        assert fish(place, "lorafit train nothing-like-it", "is-args").returncode == 1

    def test_runs(self, place: Path) -> None:
        assert bash(place, "bench", "runs/") == ["runs/one", "runs/other/", r"runs/two\ words"]
        assert r"runs/two\ words" in bash(place, "bench", "")


class TestKeys:
    def test_with_what_they_mean(self, place: Path) -> None:
        assert (
            "training.num_train_epochs=\tPasses over the training rows"
            in fish(place, "lorafit train child.yaml --set training.num").stdout.splitlines()
        )
        assert '"training.optim=adafactor"' in zsh(place, "lorafit train child.yaml --set training.optim=")

    def test_values_where_bash_splits_the_word(self, place: Path) -> None:
        assert bash(place, "train", "x", "--set", "quantization.bnb_4bit_quant_type", "=", "n") == ["nf4"]
        assert bash(place, "train", "x", "--set", "quantization.bnb_4bit_quant_type", "=") == ["nf4", "fp4"]
        assert bash(place, "train", "x", "--set", "training.packing=t") == ["training.packing=true"]

    def test_items_of_lists(self) -> None:
        found = keys("dataset.train.")
        assert "dataset.train.0.path=" in [one[0] for one in found]
        assert keys("dataset.train.3.form")[0][0] == "dataset.train.3.format="
        assert "dataset.train.3.format=messages" in keys("dataset.train.3.format=")

    def test_every_key_can_be_set(self) -> None:
        from lorafit.recipe.load import near_key, section_at

        for name, _ in keys(""):
            path = tuple(step for step in name.rstrip("=").split(".") if not step.isdecimal())
            section = section_at(path[:-1])
            assert section is not None, (name, near_key(path))
            assert path[-1] in section.model_fields

    def test_of_a_number_the_default(self) -> None:
        assert keys("training.max_grad")[1][0] == "training.max_grad_norm=1.0"
        assert keys("lora.target_modules=") == [
            f"lora.target_modules={v}" for v in ("all-linear", "attention", "mlp", "qv")
        ]

    def test_of_no_field_nothing(self) -> None:
        assert keys("training.nothing=") == []


def test_gpus(place: Path) -> None:
    assert r"RTX\ 4090" in bash(place, "estimate-vram", "--gpu", r"RTX\ 40")
    assert "H200" in bash(place, "estimate-vram", "--assert-fits", "H2")
    assert gpus("no such") == []


@pytest.mark.parametrize(
    "environment",
    [
        {"_LORAFIT_COMPLETE": "complete_bash"},
        {"_LORAFIT_COMPLETE": "complete_bash", "COMP_WORDS": "lorafit\ntrain\n'", "COMP_CWORD": "x"},
        {"_LORAFIT_COMPLETE": "complete_bash", "COMP_WORDS": "lorafit\nno-such\n--set\n", "COMP_CWORD": "3"},
        {"_LORAFIT_COMPLETE": "complete_bash", "COMP_WORDS": "lorafit\ntrain\nnowhere/at/all/", "COMP_CWORD": "2"},
        {"_LORAFIT_COMPLETE": "complete_bash", "COMP_WORDS": "lorafit\ntrain\n~nobody-here/x", "COMP_CWORD": "2"},
        {"_LORAFIT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "lorafit train '"},
        {"_LORAFIT_COMPLETE": "complete_nothing"},
        {"_LORAFIT_COMPLETE": ""},
    ],
)
def test_says_nothing_where_something_is_wrong(place: Path, environment: dict[str, str]) -> None:
    assert "rror" not in ask(place, **environment).stdout
