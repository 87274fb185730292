"""What is printed where no terminal is: keys, paths and numbers in one piece; and on a terminal, if there is room."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import conversation, make_model, write_jsonl
from rich.console import Console
from typer.testing import CliRunner

from lorafit.cli import app
from lorafit.console import print_line, print_table, table
from lorafit.text import gib

LONG = "a-folder-whose-name-is-longer-than-eighty-columns-of-a-terminal-as-those-of-a-ci-often-are-indeed"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the run of it, evaluated and merged, all in a path of more than 80 characters."""
    folder = tmp_path_factory.mktemp("tables") / LONG
    folder.mkdir()
    model = make_model(folder / "model")
    data = [conversation(f"the cat {number}", "sat on a mat") for number in range(24)]
    content: dict[str, Any] = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
        "dataset": {
            "train": [{"path": str(write_jsonl(folder / "rows.jsonl", data))}],
            "validation": [{"path": str(write_jsonl(folder / "held-out.jsonl", data[::5]))}],
            "audit": {"leaked": None},
        },
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 128},
        "eval": {"forgetting": []},
        "hardware": {"device": "cpu"},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    content["training"]["learning_rate"] = 3e-4
    (folder / "other.yaml").write_text(yaml.safe_dump(content))
    lorafit("train", folder / "recipe.yaml")
    lorafit("merge", folder / "run", "--verify", "weights")
    lorafit("eval", folder / "run", "--max-new-tokens", 2, "--show", 0)
    return folder


def lorafit(*words: object, width: int = 80) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code in (0, 5, 7), result.output
    return result.stdout


def as_json(*words: object) -> Any:
    return json.loads(lorafit(*words, "--json"))


Shown = Callable[[Any], Iterator[str]]


def plan(found: Any) -> Iterator[str]:
    yield from (found["output_dir"], found["model"]["name_or_path"], f"{found['model']['parameters']:,}")
    yield from found["choices"]
    for source in (*found["data"]["train"], *found["data"]["validation"]):
        yield source["path"]


def preview(found: Any) -> Iterator[str]:
    yield from (source["path"] for source in found["audit"]["train"] + found["audit"]["validation"])
    for row in found["rows"]:
        yield from (row["place"], f"{row['tokens']} tokens", str(row["input_ids"]))
    yield from (f"{bar['up_to']:,}" for bar in found["lengths"]["histogram"])


def memory(found: Any) -> Iterator[str]:
    yield from (gib(found[name]) for name in ("total", "least", "most", "allocated", "reserved"))
    yield found["model"]["name_or_path"]
    for term in found["terms"]:
        if term["bytes"] >= 0.01 * found["allocated"]:
            yield from (term["name"], gib(term["bytes"]), term["why"])
    for asked in found["asked"]:
        for advice in asked["advice"]:
            yield from (advice["options"], gib(advice["total"]))
    for cell in found["sweep"]:
        yield from (*cell["values"], *cell["values"].values(), gib(cell["total"]))


def explained(found: Any) -> Iterator[str]:
    for one in found["values"]:
        yield one["key"].rpartition(".")[2]
        if isinstance(one["value"], str | int) and not isinstance(one["value"], bool):
            yield from str(one["value"]).split()
        if one["place"]:
            yield one["place"].rpartition("/")[2]


def checks(found: Any) -> Iterator[str]:
    yield from (check["what"] for check in found["checks"])


def results(found: Any) -> Iterator[str]:
    yield from (*found["models"], *found["sets"], found["sets"]["heldout"]["source"])
    for name, figure in found["figures"].items():
        if ".loss." in name:
            yield f"{figure['value']:.4f}"
    yield from found["files"]["html"].split()


def speeds(found: Any) -> Iterator[str]:
    yield from found["models"]
    yield from (f"{one['tensor_bytes'] / 2**20:,.1f}" for one in found["models"].values())


def smoked(found: Any) -> Iterator[str]:
    yield from (f"{step['loss']:.5f}" for step in found["steps"][:1])
    for one in found["replaced"]:
        yield from (one["key"], *str(one["used"]).split())


def changed(found: Any) -> Iterator[str]:
    for one in found["changes"]:
        yield from (one["key"], str(one["after"]))


def calibrated(found: Any) -> Iterator[str]:
    yield from (one["run"] for one in found["runs"])


def nothing(found: Any) -> Iterator[str]:
    yield from ()


COMMANDS: tuple[tuple[str, Shown], ...] = (
    ("train RECIPE --dry-run", plan),
    ("preview RECIPE --ids", preview),
    ("estimate-vram RECIPE", memory),
    ("estimate-vram RECIPE --vram 600MiB --sweep lora.r=4,8", memory),
    ("estimate-vram RECIPE --sweep training.max_length=64,128 --sweep lora.r=4,8 --sweep training.seed=1,2", memory),
    ("estimate-vram --model MODEL --gpu RTX4090 --list-gpus", memory),
    ("estimate-vram --calibrate RUN", calibrated),
    ("explain RECIPE", explained),
    ("explain RECIPE training.learning_rate", explained),
    ("diff RECIPE OTHER", changed),
    ("validate RECIPE", nothing),
    ("eval RUN --max-new-tokens 2", results),
    ("bench RUN --prompt-tokens 4 --batch 1,2 --new-tokens 2 --rounds 2", speeds),
    ("merge RUN --verify weights --overwrite", lambda found: iter([found["merged"]])),
    ("verify RUN", checks),
    ("lock RECIPE", lambda found: iter([found["lock"]])),
    ("smoke RECIPE --steps 3", smoked),
)


@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_pipe_keeps_everything_in_one_piece(command: str, shown: Shown, place: Path) -> None:
    names = {"RECIPE": "recipe.yaml", "OTHER": "other.yaml", "RUN": "run", "MODEL": "model"}
    words = [str(place / names[word]) if word in names else word for word in command.split()]
    printed, unlimited = lorafit(*words), lorafit(*words, width=10_000)
    for part in shown(as_json(*words)):
        assert part in printed

    def pieces(text: str) -> list[str]:
        return re.sub(r"[+−-]?\d[\d.,e-]*", "0", text).split()  # figures that are measured may differ

    if words[0] not in ("bench", "eval"):  # nor are those of the same words
        assert pieces(printed) == pieces(unlimited)


ROWS = (
    ("dataset.validation.0.format", "messages", "the rows have 'messages'"),
    ("training.per_device_eval_batch_size", "8", "as in training, where 1,234,567 tokens are learned"),
    ("lora.target_modules", "down_proj, gate_proj, up_proj", f"of the model in /somewhere/{LONG}/model"),
)


@pytest.mark.parametrize("width", [20, 36, 60, 80, 100, 150, 250])
def test_a_terminal_keeps_words_whole(width: int) -> None:
    """A word that is longer than a line is left to the terminal, whose own folding copies as one piece."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    made = table("resolved", "value", "because")
    for row in ROWS:
        made.add_row(*row)
    print_table(console, made)
    print_line(console, " ".join(ROWS[1]))
    printed = out.getvalue()
    for word in {word for row in ROWS for cell in row for word in cell.split()}:
        assert word in printed
    long = [line for line in printed.splitlines() if len(line.rstrip()) > width]
    assert all(max(map(len, line.split())) > width - 30 for line in long), "only for the sake of such a word"


def test_the_first_form_that_fits_is_shown() -> None:
    def shown(width: int, **terminal: Any) -> str:
        out = io.StringIO()
        wide, narrow = table("a", "interval"), table("a")
        wide.add_row("1", "0.5 to 1.5")
        narrow.add_row("1")
        print_table(Console(file=out, width=width, **terminal), wide, narrow)
        return out.getvalue()

    assert "0.5 to 1.5" in shown(40, force_terminal=True)
    assert "interval" not in shown(10, force_terminal=True)
    assert "0.5 to 1.5" in shown(10)
