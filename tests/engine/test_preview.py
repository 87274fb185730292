"""`lorafit preview` shows exactly what is trained on, safely, and without weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHATML, WORDS, RecipeMaker, conversation, make_tokenizer, write_jsonl
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from typer.testing import CliRunner
from wording import Like

import lorafit.engine.preview
from lorafit.cli import app
from lorafit.engine.data.encode import IGNORED
from lorafit.engine.data.prepare import pack, prepare
from lorafit.engine.preview import lengths, segments
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe
from lorafit.run.summary import print_preview

TERMINAL = {"force_terminal": True, "color_system": "truecolor", "width": 200}


def run(path: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["preview", str(path), *options])


def report(path: Path, *options: str) -> dict[str, Any]:
    done = run(path, "--json", *options)
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def printed(given: dict[str, Any], **console: Any) -> str:
    stream = StringIO()
    print_preview(given, Console(file=stream, **{"width": 200, **console}))
    return stream.getvalue()


def prepared(path: Path, *overrides: str) -> Any:
    plan = plan_recipe(Recipe.load(path, overrides), path)
    return prepare(plan.data, load_tokenizer(plan))


@pytest.fixture
def rows_of(recipe: RecipeMaker, tmp_path: Path) -> Callable[..., Path]:
    """A recipe of some conversations."""

    def make(*rows: dict[str, Any], **sections: Any) -> Path:
        file = write_jsonl(tmp_path / "given.jsonl", list(rows))
        dataset = {"train": [{"path": str(file)}], **sections.pop("dataset", {})}
        return recipe(dataset=dataset, **sections)

    return make


def multi(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}


# --- what it says ---------------------------------------------------------------------------------


def test_a_row_is_its_segments(rows_of: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> None:
    path = rows_of(multi("one", "two three", "four", "red green"), conversation("a", "b"))
    found = report(path, "--ids")
    row, other = found["rows"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert "".join(one["text"] for one in row["segments"]) == tokenizer.decode(row["input_ids"])
    assert [one["text"] for one in row["segments"] if one["learned"]] == [
        "two three", "<|im_end|>", "red green", "<|im_end|>"
    ]  # fmt: skip
    assert [one["special"] for one in row["segments"] if one["learned"]] == [False, True, False, True]
    assert all(one["text"] in ("<|im_start|>", "<|im_end|>") for one in row["segments"] if one["special"])
    assert row["place"] == f"{tmp_path / 'given.jsonl'}:1"
    assert (row["number"], other["number"]) == (1, 2)
    assert row["tokens"] == len(row["input_ids"]) == len(row["labels"])
    assert row["learned"] == sum(label != IGNORED for label in row["labels"])
    made = prepared(path)
    assert made.train[0] == {"input_ids": row["input_ids"], "labels": row["labels"]}
    assert found["audit"] == made.audit.as_dict()
    assert found["preview_version"] == 1
    assert found["breaches"] == []
    assert found["steps"] == 4
    assert found["part"] == "training"
    assert found["limits"]["empty_answers"] == 0
    assert "input_ids" not in report(path)["rows"][0]


def test_which_rows(recipe: RecipeMaker) -> None:
    path = recipe()

    def numbers(*options: str) -> list[int]:
        return [row["number"] for row in report(path, *options)["rows"]]

    assert numbers() == [1, 2, 3]
    assert numbers("--rows", "0") == []
    assert numbers("-n", "100") == list(range(1, 25))
    assert numbers("--row", "24", "--row", "2", "--row", "2") == [24, 2, 2]
    assert report(path, "--row", "7")["rows"][0]["place"].endswith("rows.jsonl:7")


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_row_that_is_not_there(recipe: RecipeMaker, as_json: list[str]) -> None:
    done = run(recipe(), "--row", "3", "--row", "25", *as_json)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == Like("--row 25: … 24 training rows")
    done = run(recipe(dataset={"validation": 0.25}), "--validation", "--row", "7")
    assert (done.exit_code, done.stderr) == (2, Like("--row 7: … 6 validation rows"))
    assert run(recipe(), "--row", "0").exit_code == 2
    assert run(recipe(), "--rows", "-1").exit_code == 2


def test_validation_rows(recipe: RecipeMaker, tmp_path: Path) -> None:
    done = run(recipe(), "--validation")
    assert (done.exit_code, done.stderr) == (2, Like("--validation: … no validation rows"))
    path = recipe(dataset={"validation": 0.25})
    found = report(path, "--validation", "-n", "24", "--ids")
    assert found["part"] == "validation"
    held_out = prepared(path).validation
    assert [row["input_ids"] for row in found["rows"]] == held_out["input_ids"][:]
    assert len(found["rows"]) == 6
    trained = report(path, "-n", "24", "--ids")["rows"]
    assert len(trained) == 18
    assert not {row["place"] for row in trained} & {row["place"] for row in found["rows"]}
    apart = write_jsonl(tmp_path / "apart.jsonl", [conversation("x", "y")])
    (row,) = report(recipe(dataset={"validation": [{"path": str(apart)}]}), "--validation")["rows"]
    assert row["place"] == f"{apart}:1"


def test_repeated_rows_are_numbered_as_they_are_trained_on(recipe: RecipeMaker, rows: Path) -> None:
    found = report(recipe(dataset={"train": [{"path": str(rows), "weight": 2}]}), "-n", "100")
    assert len(found["rows"]) == 48
    assert found["rows"][0]["place"] == found["rows"][24]["place"]


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream(recipe: RecipeMaker, packing: bool) -> None:
    path = recipe(dataset={"streaming": True}, training={"packing": packing, "max_steps": 2})
    found = report(path)
    assert (found["lengths"], found["packing"]) == (None, None)
    assert found["audit"]["whole"] is False
    assert all(row["place"] is None and row["segments"] for row in found["rows"])
    assert found["rows"]
    assert "first 24 training rows" in printed(found)
    assert report(path, "--rows", "0")["rows"] == []
    assert run(path, "--validation").exit_code == 2
    apart = write_jsonl(path.parent / "apart.jsonl", [conversation("x", "y")])
    path = recipe(dataset={"streaming": True, "validation": [{"path": str(apart)}]})
    assert [row["place"] for row in report(path, "--validation")["rows"]] == [f"{apart}:1"]


def test_breaches_are_printed(rows_of: Callable[..., Path], tmp_path: Path) -> None:
    path = rows_of(conversation("a", "b"), conversation("c", " "), conversation("<|im_end|>", "d"))
    place = tmp_path / "given.jsonl"
    for options in ([], ["--json"]):
        done = run(path, *options)
        assert done.exit_code == 3
        first, second = done.stderr.splitlines()
        assert first.startswith(f"{place}:2: ")
        assert second.startswith(f"{place}:3: ")
    assert json.loads(done.stdout)["breaches"] == [first, second]
    assert "⟦b<|im_end|>⟧" in run(path).stdout  # what can be shown is shown all the same
    lenient = ["--set", "dataset.audit.empty_answers=0.5", "--set", "dataset.audit.special_tokens_in_content=null"]
    done = run(path, *lenient)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"{place}:2: " in done.stdout


# --- lengths and packing --------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1], [5] * 9, [1, 2], [3, 64], list(range(1, 65)), [10, 20, 30, 64, 64]])
def test_every_row_is_in_the_bar_of_its_length(values: list[int]) -> None:
    found = lengths(np.array(values, np.int32), 64)
    assert found is not None
    below = 0
    for bar in found["histogram"]:
        assert bar["rows"] == sum(below < value <= bar["up_to"] for value in values)
        below = bar["up_to"]
    assert sum(bar["rows"] for bar in found["histogram"]) == len(values)
    assert found["longest"] == below == max(values)
    assert lengths(None, 64) is None


def test_lengths_of_the_rows(recipe: RecipeMaker) -> None:
    path = recipe(training={"max_length": 20}, dataset={"audit": {"lost_tokens": None}})
    found = report(path, "-n", "100")
    values = [row["tokens"] for row in found["rows"]]
    assert sum(bar["rows"] for bar in found["lengths"]["histogram"]) == len(values)
    assert found["lengths"]["longest"] == max(values) == 20
    assert found["lengths"]["median"] == int(np.median(values))


@pytest.mark.parametrize("rows_at_most", [10_000, 10])
def test_packing_is_as_full_as_it_says(
    recipe: RecipeMaker, rows: Path, monkeypatch: pytest.MonkeyPatch, rows_at_most: int
) -> None:
    monkeypatch.setattr(lorafit.engine.preview, "PACKED_ROWS", rows_at_most)
    path = recipe(
        dataset={"train": [{"path": str(rows), "weight": 1.5}], "validation": 0.25}, training={"max_length": 64}
    )
    packs = prepared(path, "training.packing=true").train
    full = sum(map(len, packs["input_ids"])) / (len(packs) * 64)
    on, off = report(path, "--set", "training.packing=true")["packing"], report(path)["packing"]
    assert (on["on"], off["on"]) == (True, False)
    assert (on["rows"], on["packed_rows"], on["efficiency"]) == (27, len(packs), pytest.approx(full))
    if rows_at_most > 27:
        assert off == on | {"on": False}
    else:  # some of the rows, taken at random
        assert off["rows"] == 10
        order = np.random.default_rng(42).permutation(27)[:10]
        tried = pack(prepared(path).rows.select(order), 64)
        assert off["packed_rows"] == len(tried)
        assert off["efficiency"] == pytest.approx(sum(map(len, tried["input_ids"])) / (len(tried) * 64))


def test_padding_without_packing(rows_of: Callable[..., Path]) -> None:
    path = rows_of(*(conversation("a " * n, "b") for n in (1, 20, 2, 21, 3)))
    for size, least, most in ((1, 1, 1), (5, 0.3, 0.9)):
        found = report(path, "--set", f"training.per_device_train_batch_size={size}", "-n", "5")
        values = [row["tokens"] for row in found["rows"]]
        share = found["packing"]["efficiency_without"]
        assert least <= share <= most
        assert share == pytest.approx(1 if size == 1 else sum(values) / (5 * max(values)))


# --- how it looks ---------------------------------------------------------------------------------


def test_without_colour_learned_text_is_marked(rows_of: Callable[..., Path]) -> None:
    path = rows_of(multi("one", "two", "three", "four"))
    text = run(path).stdout
    assert (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧\n"
    ) in text
    assert "⟦ ⟧" in text
    assert "\x1b" not in text
    assert "ids    [" in run(path, "--ids").stdout
    assert "⟦" not in run(path, "--rows", "0").stdout


def test_with_colour_learned_text_is_styled(rows_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(rows_of(multi("one", "two")))
    text = printed(found, **TERMINAL)
    assert "⟦" not in text
    assert "\x1b[32mtwo\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in text
    assert "\x1b[36m<|im_start|>\x1b[0m" in text
    monkeypatch.setenv("NO_COLOR", "1")  # a terminal still, but one where green is not seen
    assert "⟦two" in printed(found, **TERMINAL)


EVIL = "say \x1b[31mred\x1b[0m \x07 \x1b]0;title\x07 \x9b2J \x08\x7f \r \u202e end"


@pytest.mark.parametrize("terminal", [{}, TERMINAL])
def test_data_does_not_command_the_terminal(rows_of: Callable[..., Path], terminal: dict[str, Any]) -> None:
    found = report(rows_of(conversation(EVIL, EVIL)))
    assert "".join(one["text"] for one in found["rows"][0]["segments"]).count(EVIL) == 2
    place = found["rows"][0]["place"]
    found["rows"][0]["place"] = f"{place}\x1b[2J"
    text = printed(found, **terminal)
    own = text.replace("\x1b[", "") if terminal else text
    assert not set("\x1b\x07\x08\x7f\x9b\r\u202e") & set(own)
    assert text.count(r"\x1b[31mred\x1b[0m \x07 \x1b]0;title\x07 \x9b2J \x08\x7f \r \u202e end") == 2
    assert "\x1b[2J" not in text
    assert "\x1b[31m" not in text


def test_faults_do_not_command_the_terminal(rows_of: Callable[..., Path]) -> None:
    """What was found wrong names the row's words."""
    tools = [{"type": "function", "function": {"name": "\x1b[31mbad", "parameters": {}}}]
    path = rows_of(conversation("a", "b") | {"tools": tools})
    done = run(path)
    assert done.exit_code == 3
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("terminal", [{}, TERMINAL])
def test_markup_in_the_data_is_text(
    rows_of: Callable[..., Path], terminal: dict[str, Any], recipe: RecipeMaker, tmp_path: Path
) -> None:
    said = r"[red]x[/red] [/] [link=a]b :smile: \[bold] [1, 2] 'q' 12"
    text = printed(report(rows_of(conversation(said, said))), **terminal)
    assert text.count(said) == 2
    file = write_jsonl(tmp_path / "[red]my :cat: [b].jsonl", [conversation("a", "b")])
    text = printed(report(recipe(dataset={"train": [{"path": str(file)}]})), **terminal | {"width": 400})
    assert text.count(str(file)) == 2


def test_long_lines_are_not_broken(rows_of: Callable[..., Path]) -> None:
    said = "yes " * 30
    text = printed(report(rows_of(conversation("a", said))), width=40)
    assert said in text


@pytest.mark.parametrize(
    "said", ["🙂", "naïve 漢字 ñ", "👩‍👩‍👧", "e\u0301", "می\u200cخواهم", "a\u00a0b\u3000c", "🙂🙃" * 4]
)
def test_characters_of_many_tokens(rows_of: Callable[..., Path], said: str) -> None:
    found = report(rows_of(conversation(f"{said}", f"{said}{said}")), "--ids")
    learned = [one["text"] for one in found["rows"][0]["segments"] if one["learned"]]
    assert learned == [said + said, "<|im_end|>"]
    assert f"⟦{said}{said}<|im_end|>⟧" in printed(found)
    assert f"{said}{said}" in printed(found, **TERMINAL)


def byte_tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "bytes"))


def spaced_tokenizer() -> PreTrainedTokenizerBase:
    """A SentencePiece kind of tokenizer, which writes a word at the start of a text without its space."""
    inner = Tokenizer(models.BPE(byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<|im_start|>", "<|im_end|>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    inner.train_from_iterator([WORDS] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
@pytest.mark.parametrize("text", ["the cat 🙂 sat", "🙂🙃漢字", "one\ufffdtwo 🙂", "🙂 <|im_end|>🙃 the"])
def test_segments_are_the_row_wherever_they_are_cut(kind: str, text: str, tmp_path: Path) -> None:
    """A learned part may begin within a character, where a token holds the end of one and the start of another."""
    tokenizer = byte_tokenizer(tmp_path) if kind == "bytes" else spaced_tokenizer()
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids)
    for begin in range(len(ids)):
        for end in range(begin + 1, len(ids) + 1):
            labels = [token if begin <= at < end else IGNORED for at, token in enumerate(ids)]
            parts = list(segments(ids, labels, tokenizer))
            assert "".join(part["text"] for part in parts) == whole
            assert all("\ufffd" not in part["text"] for part in parts) or "\ufffd" in text


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_a_character_that_is_cut_belongs_to_the_later_segment(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path) if kind == "bytes" else spaced_tokenizer()
    ids = tokenizer("the 🙂 sat")["input_ids"]
    cuts = [at for at in range(1, len(ids)) if tokenizer.decode(ids[:at]).endswith("\ufffd")]
    assert len(cuts) == 3
    for cut in cuts:
        labels = [IGNORED] * cut + ids[cut:]
        parts = list(segments(ids, labels, tokenizer))
        for learned, text in ((False, "the "), (True, "🙂 sat")):
            assert "".join(part["text"] for part in parts if part["learned"] is learned) == text


# --- what it does not do --------------------------------------------------------------------------


def test_weights_are_not_needed(recipe: RecipeMaker, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "light"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "config.json" in os.listdir(model)
    path = recipe(model={"name_or_path": str(model)})
    assert run(path).exit_code == 0
    assert report(path)["steps"] == 4


def test_weights_are_not_loaded(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr("lorafit.engine.model.load_base", load)
    assert report(recipe())["rows"]


def test_nothing_is_left_behind(recipe: RecipeMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe(dataset={"validation": 0.25}, training={"packing": True})
    before = sorted(tmp_path.rglob("*"))
    assert run(path).exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
