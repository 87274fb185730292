"""`lorafit init`: a first recipe that validates, fits and says why."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import conversation, write_jsonl
from typer.testing import CliRunner, Result
from wording import Like

import lorafit.cli.init
from lorafit.cli import app
from lorafit.init.document import Document, Line, recipe_of, scalar
from lorafit.recipe import Recipe
from lorafit.recipe.yaml import read_yaml

LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


def init(*options: object, **kwargs: Any) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, options)], **kwargs)


def made(file: Path, *options: object) -> Recipe:
    done = init(file, *options)
    assert done.exit_code == 0, done.output
    return Recipe.load(file)


def fits(file: Path, device: str) -> int:
    return CliRunner().invoke(app, ["estimate-vram", str(file), "--assert-fits", device]).exit_code


@pytest.fixture
def many(tmp_path: Path) -> Path:
    rows = [conversation(f"question {i} " * 20, f"answer {i}") for i in range(60)]
    return write_jsonl(tmp_path / "many.jsonl", rows)


@pytest.mark.parametrize(
    ("device", "quantized"), [("A100 80GB", False), ("RTX 4090", False), ("RTX 3060 12GB", True), ("T4", True)]
)
def test_the_settings_fit_the_gpu(tmp_path: Path, many: Path, device: str, quantized: bool) -> None:
    recipe = made(tmp_path / "r.yaml", "--model", LLAMA, "--data", many, "--gpu", device)
    assert (recipe.quantization is not None) is quantized
    assert recipe.hardware is not None
    assert recipe.hardware.gpu == device
    assert fits(tmp_path / "r.yaml", device) == 0


def test_the_largest_gpu_is_not_made_slow(tmp_path: Path, many: Path) -> None:
    recipe = made(tmp_path / "r.yaml", "--model", LLAMA, "--data", many, "--gpu", "A100 80GB")
    assert recipe.training.gradient_checkpointing is False
    assert recipe.training.per_device_train_batch_size == 4


def test_long_rows_are_cut_only_where_nothing_else_helps(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [conversation("word " * 8000, "yes") for _ in range(60)])
    done = init(tmp_path / "r.yaml", "--model", LLAMA, "--data", data, "--vram", "12GiB")
    assert done.exit_code == 0, done.output
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.quantization is not None
    assert recipe.training.per_device_train_batch_size == 1
    assert recipe.training.max_length < 8192
    assert (tmp_path / "r.yaml").read_text() == Like("… max_length: … cut … 8192")
    assert "QLoRA, 1 x 8192 tokens" in done.stderr
    assert recipe.hardware is not None
    assert recipe.hardware.vram == "12GiB"
    assert fits(tmp_path / "r.yaml", "12GiB") == 0


def test_a_recipe_for_a_cpu(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    recipe = made(tmp_path / "r.yaml", "--model", tiny_model, "--data", rows, "--cpu", "--name", "first")
    assert recipe.model.dtype == "float32"
    assert recipe.quantization is None
    assert recipe.hardware is not None
    assert recipe.hardware.device == "cpu"
    assert recipe.output_dir == "runs/first"
    assert recipe.dataset.train[0].format == "messages"
    assert recipe.dataset.validation is None  # of 24 rows a tenth says nothing
    assert recipe.training.max_length <= 512  # the model's context
    assert recipe.training.num_train_epochs == 3


def test_the_estimate_and_the_reasons_stand_in_the_recipe(tmp_path: Path, many: Path) -> None:
    made(tmp_path / "r.yaml", "--model", LLAMA, "--data", many, "--gpu", "RTX 4090")
    text = (tmp_path / "r.yaml").read_text()
    stated = re.search(r"# Memory: about ([0-9.]+) GiB on the GPU, from [0-9.]+ to [0-9.]+ \(", text)
    assert stated
    asked = CliRunner().invoke(app, ["estimate-vram", str(tmp_path / "r.yaml"), "--gpu", "RTX 4090", "--json"])
    assert float(stated[1]) == pytest.approx(json.loads(asked.stdout)["asked"][0]["total"] / 2**30, abs=0.01)
    assert "extends" not in text
    assert re.search(r"max_length: \d+ # .*longest .*\d+ tokens", text)
    assert "validation: 0.1 # " in text


@pytest.mark.parametrize(
    "rows", [[{"text": "one"}], [{"instruction": "a", "output": "b"}], [{"prompt": "a", "completion": "b"}]]
)
def test_every_format_is_found(tmp_path: Path, tiny_model: Path, rows: list[dict[str, str]]) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    recipe = made(tmp_path / "r.yaml", "--model", tiny_model, "--data", data, "--cpu")
    assert recipe.dataset.train[0].format in ("text", "alpaca", "prompt_completion")
    assert recipe.dataset.loss_on == ("all" if "text" in rows[0] else "assistant")


def test_validation_is_a_share_or_rows_of_their_own(tmp_path: Path, tiny_model: Path, rows: Path, many: Path) -> None:
    options = ("--model", tiny_model, "--data", rows, "--cpu")
    assert made(tmp_path / "a.yaml", *options, "--validation", "0.25").dataset.validation == 0.25
    own = made(tmp_path / "b.yaml", *options, "--validation", many).dataset.validation
    assert isinstance(own, tuple)
    assert (own[0].path, own[0].format) == (str(many), "messages")
    assert init(tmp_path / "c.yaml", *options, "--validation", "2").exit_code == 2


def test_more_rows_take_fewer_passes_and_are_packed(tmp_path: Path) -> None:
    short = [conversation("hi", "ho") for _ in range(2500)]
    data = write_jsonl(tmp_path / "d.jsonl", [*short[:100], conversation("long " * 400, "yes"), *short])
    recipe = made(tmp_path / "r.yaml", "--model", LLAMA, "--data", data, "--gpu", "RTX 4090")
    assert recipe.training.num_train_epochs == 2
    assert recipe.training.packing is True


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ((), "--model; --data; --gpu, --vram or --cpu"),
        (("--cpu",), "--model; --data"),
        (("--model", "x", "--gpu", "T4"), "--data"),
    ],
)
def test_without_a_terminal_the_missing_options_are_named(
    tmp_path: Path, left_out: tuple[str, ...], named: str
) -> None:
    done = init(tmp_path / "r.yaml", *left_out)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"missing: {named} (")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r.yaml").exists()


def test_on_a_terminal_it_asks(tmp_path: Path, tiny_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lorafit.cli.init, "is_terminal", lambda: True)
    done = init(tmp_path / "r.yaml", "--data", rows, input=f"{tiny_model}\n16GiB\n")
    assert done.exit_code == 0, done.output
    assert "Base model" in done.stderr
    assert "Training rows" not in done.stderr  # which was given
    recipe = Recipe.load(tmp_path / "r.yaml")
    assert recipe.model.name_or_path == str(tiny_model)
    assert recipe.hardware is not None
    assert recipe.hardware.vram == "16GiB"


def test_nothing_is_overwritten_unless_it_is_forced(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("mine")
    options = ("--model", tiny_model, "--data", rows, "--cpu")
    done = init(file, *options)
    assert (done.exit_code, file.read_text()) == (2, "mine")
    assert "--force" in done.stderr
    printed = init(file, *options, "--print")
    assert (printed.exit_code, file.read_text()) == (0, "mine")
    assert init(file, *options, "--force").exit_code == 0
    assert file.read_text() == printed.stdout


def test_only_a_file_is_overwritten(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    done = init(pipe, "--model", tiny_model, "--data", rows, "--cpu", "--force")
    assert (done.exit_code, pipe.is_fifo()) == (2, True)
    assert "no file" in done.stderr


def test_any_name_of_data_can_stand_in_a_recipe(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    odd = rows.rename(tmp_path / "two  words: # 'x'.jsonl")
    file = tmp_path / "r.yaml"
    assert init(file, "--model", tiny_model, "--data", odd, "--cpu").exit_code == 0
    assert Recipe.load(file).dataset.train[0].path == str(odd)


def test_rows_that_training_would_refuse_are_said(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [conversation("hello", "hi"), conversation("hello", "")])
    done = init(tmp_path / "r.yaml", "--model", tiny_model, "--data", rows, "--cpu")
    assert done.exit_code == 0
    assert "rows.jsonl:2: " in done.stderr
    assert "`lorafit preview`" in done.stderr


def test_it_says_how_to_go_on(tmp_path: Path, tiny_model: Path, rows: Path) -> None:
    file = tmp_path / "r.yaml"
    done = init(file, "--model", tiny_model, "--data", rows, "--cpu")
    assert done.stdout == ""
    for command in ("validate", "estimate-vram", "preview", "train"):
        assert f"  lorafit {command} {file}\n" in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--model", "meta-llama/Meta-Llama-3-8B-Instuct", "--cpu"), 4, "download"),
        (("--model", "./nowhere", "--cpu"), 4, "no such folder"),
        (("--model", LLAMA, "--gpu", "RTX 9999"), 2, "RTX 9999"),
        (("--model", LLAMA, "--vram", "24"), 2, "unit"),
        (("--model", LLAMA, "--vram", "2GiB"), 5, "2.00 GiB, "),
        (("--model", LLAMA, "--cpu", "--gpu", "T4"), 2, "exclude each other"),
        (("--model", LLAMA, "--cpu", "--kind", "trl"), 2, "--from"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, rows: Path, options: tuple[str, ...], code: int, said: str) -> None:
    done = init(tmp_path / "r.yaml", "--data", rows, *options)
    assert done.exit_code == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r.yaml").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "no rows"), ("{\n", "bad.jsonl:1: not JSON")],
)
def test_rows_that_cannot_be_read_are_said(tmp_path: Path, tiny_model: Path, content: str, said: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    done = init(tmp_path / "r.yaml", "--model", tiny_model, "--data", tmp_path / "bad.jsonl", "--cpu")
    assert done.exit_code == 3
    assert said in done.stderr
    assert not (tmp_path / "r.yaml").exists()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = init(tmp_path / "no" / "r.yaml", "--model", "x/y", "--data", "d.jsonl", "--cpu")
    assert done.exit_code == 2
    assert "no folder" in done.stderr


def test_rows_on_the_hub_are_taken_on_trust(tmp_path: Path, tiny_model: Path) -> None:
    recipe = made(tmp_path / "r.yaml", "--model", tiny_model, "--data", "acme/rows", "--cpu")
    assert (recipe.dataset.train[0].path, recipe.dataset.train[0].format) == ("acme/rows", "auto")


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "a b",
        "",
        " padded ",
        "yes",
        "1e-4",
        "null",
        "12",
        "0x1f",
        "~",
        "a: b",
        "a #b",
        "- a",
        "${HOME}",
        "it's ${HOME}",
        "line\nbreak\ttab",
        'quote " and \\',
        "ünï🙂",
        "\x85\u2028\ufeff\x00\x7f\U000e0001",
        "*star",
        "&x",
        "!tag",
        "%p",
        "[a]",
        "{a}",
        "@at",
        "`tick`",
        2e-4,
        0.1,
        1.0,
        -0.5,
        1e-10,
        123456.789,
        0,
        7,
        True,
        None,
        [1, "a", 0.5],
        ["x, y", "z"],
        {"a": "b: c", "k y": 1},
    ],
)
def test_every_value_is_read_back_as_it_was(value: Any) -> None:
    assert read_yaml(f"key: {scalar(value)} # comment\n", "f", {}).plain() == {"key": value}


def test_a_document_keeps_the_order_of_the_sections_and_their_keys() -> None:
    lines = {
        "output_dir": Line("runs/x"),
        "training.seed": Line(1),
        "training.max_length": Line(8, "short"),
        "dataset.train": Line([{"path": "d.jsonl", "columns": {"text": "a: b"}}], "rows"),
        "model.name_or_path": Line("a/b"),
    }
    text = Document(lines, ("head",), ("foot",)).text()
    assert text == (
        "# head\nmodel:\n  name_or_path: a/b\ndataset:\n  train: # rows\n    - path: d.jsonl\n      columns:\n"
        '        text: "a: b"\ntraining:\n  max_length: 8 # short\n  seed: 1\noutput_dir: runs/x\n\n# foot\n'
    )
    assert recipe_of(text, "f").training.max_length == 8


INSTANCES = [{"input": "1, 2", "output": "3"}]
TALK = [{"speaker": "customer", "text": "Hi"}, {"speaker": "agent", "text": "Hello"}]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]
GUESSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "gsm8k": (
        {"question": "How many are 40 and 2?", "answer": "40 + 2 = 42\n#### 42"},
        {"instruction": "question", "output": "answer"},
    ),
    "dolly": (
        {"instruction": "Why?", "context": "", "response": "So."},
        {"instruction": "instruction", "output": "response", "input": "context"},
    ),
    "prompt and response": ({"prompt": "Why?", "response": "So."}, {"instruction": "prompt", "output": "response"}),
    "input and output": ({"input": "Why?", "output": "So."}, {"instruction": "input", "output": "output"}),
    "nested": (
        {"id": "a", "data": {"query": "Why?", "reply": "So."}},
        {"instruction": "data.query", "output": "data.reply"},
    ),
    "self-instruct": (
        {"id": "t", "instruction": "Add.", "instances": INSTANCES},
        {"instruction": "instruction", "output": "instances.0.output", "input": "instances.0.input"},
    ),
    "squad": (
        {"question": "Who?", "context": "It was Ada.", "answers": {"text": ["Ada"], "start": [7]}},
        {"instruction": "question", "output": "answers.text.0", "input": "context"},
    ),
    "german": (
        {"Frage": "Warum?", "Kontext": "x", "Antwort": "Darum."},
        {"instruction": "Frage", "output": "Antwort", "input": "Kontext"},
    ),
    "two texts": (
        {"foo": "Why is it?", "bar": "Because it is, as it always was."},
        {"instruction": "foo", "output": "bar"},
    ),
    "one text": ({"id": "1", "content": "Once upon a time"}, {"text": "content"}),
    "chat": ({"dialog": TALK}, {"messages": "dialog"}),
    "chat below": ({"log": {"turns": TURNS}}, {"messages": "log.turns"}),
}


@pytest.mark.parametrize("kind", GUESSED)
def test_rows_of_any_shape_are_read(kind: str, tmp_path: Path, tiny_model: Path) -> None:
    """By names in several languages, by what is in them; and the recipe is one that trains."""
    row, columns = GUESSED[kind]
    format = {"messages": "messages", "text": "text"}.get(next(iter(columns)), "alpaca")
    file = tmp_path / "r.yaml"
    recipe = made(file, "--model", tiny_model, "--data", write_jsonl(tmp_path / "rows.jsonl", [row] * 3), "--cpu")
    (source,) = recipe.dataset.train
    assert (source.format, source.columns) == (format, columns)
    assert ("# check" in file.read_text()) is kind.endswith(("texts", "one text"))
    assert CliRunner().invoke(app, ["validate", str(file)]).exit_code == 0


def test_german_names_in_a_table(tmp_path: Path, tiny_model: Path) -> None:
    """In a file of rows of their own as well."""
    for name in ("rows.csv", "test rows.csv"):
        (tmp_path / name).write_text("Frage;Antwort\nWarum?;Darum.\n".replace(";", ","))
    options = ("--data", tmp_path / "rows.csv", "--validation", tmp_path / "test rows.csv", "--cpu")
    recipe = made(tmp_path / "r.yaml", "--model", tiny_model, *options)
    assert isinstance(recipe.dataset.validation, tuple)
    for source in (*recipe.dataset.train, *recipe.dataset.validation):
        assert source.columns == {"instruction": "Frage", "output": "Antwort"}


def test_what_nobody_can_tell_is_left_open(tmp_path: Path, tiny_model: Path) -> None:
    """The recipe is written, says what is open and among which columns, and is refused at that very line."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"one": "a", "two": "b", "three": "c"}] * 3)
    file = tmp_path / "r.yaml"
    assert init(file, "--model", tiny_model, "--data", rows, "--cpu").exit_code == 0
    lines = file.read_text().splitlines()
    (place,) = [number for number, line in enumerate(lines, 1) if "# open" in line]
    assert all(name in lines[place - 1] for name in ("one", "two", "three"))
    found = json.loads(CliRunner().invoke(app, ["validate", str(file), "--json"]).stdout)
    (fault,) = found["recipes"][0]["faults"]
    assert fault["key"].startswith("dataset.train.0.columns")
    assert place <= fault["line"] <= place + 2


def test_several_instances_of_a_row_are_told(tmp_path: Path, tiny_model: Path) -> None:
    row = {"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}, {"input": "2, 2", "output": "4"}]}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row, row, {**row, "instances": row["instances"][:1]}])
    done = init(tmp_path / "r.yaml", "--model", tiny_model, "--data", rows, "--cpu")
    assert "2 of the first 3 rows" in done.stderr


@pytest.mark.parametrize("answer", [None, 42])
def test_an_answer_that_is_no_text_is_an_answer_all_the_same(answer: Any, tmp_path: Path, tiny_model: Path) -> None:
    """The question alone is never taken for a text to be learned; what is wrong with the rows is said."""
    rows = [{"question": f"{i}?", "answer": answer if i == 3 else f"It is {i}."} for i in range(20)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = init(tmp_path / "r.yaml", "--model", tiny_model, "--data", data, "--cpu")
    assert done.exit_code == 0, done.output
    (source,) = Recipe.load(tmp_path / "r.yaml").dataset.train
    assert (source.format, source.columns) == ("alpaca", {"instruction": "question", "output": "answer"})
    assert "rows.jsonl:4" in done.stderr


def test_a_final_answer_is_measured(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"It is\n#### {i + 1}"} for i in range(20)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = made(tmp_path / "r.yaml", "--model", tiny_model, "--data", data, "--cpu")
    assert recipe.eval.metrics == ({"extract": "#### (-?[0-9.,]+)"},)


def test_how_rows_are_read_can_be_said(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"one": "a", "two": "b", "three": "c"}] * 3)
    start = ("--model", tiny_model, "--data", rows, "--cpu", "--force")
    for options in (
        ("--columns", "instruction=one,output=three"),
        ("--columns", "instruction=one", "--columns", "output=three"),
    ):
        (source,) = made(tmp_path / "r.yaml", *start, *options).dataset.train
        assert (source.format, source.columns) == ("alpaca", {"instruction": "one", "output": "three"})
    (source,) = made(tmp_path / "r.yaml", *start, "--template", "{{ one }} {{ two }}").dataset.train
    assert (source.format, source.template) == ("text", "{{ one }} {{ two }}")
    columns = ("--format", "prompt_completion", "--columns", "prompt=one,completion=two")
    (source,) = made(tmp_path / "r.yaml", *start, *columns).dataset.train
    assert source.format == "prompt_completion"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--columns", "instruction=one,output=fuor"), 3, "output=fuor"),
        (("--columns", "output"), 2, "--columns output"),
        (("--columns", "outptu=one"), 2, "output"),
        (("--columns", "output=one,output=two"), 2, "twice"),
        (("--template", "{one} {two}"), 2, "{{"),
        (("--format", "alpaka"), 2, "alpaca"),
        (("--format", "alpaca"), 3, "'instruction'"),
        (("--template", "{{ nothing }}"), 3, "nothing"),
        (("--template", "{{ one"), 2, "template"),
    ],
)
def test_what_is_said_of_rows_must_fit_them(
    tmp_path: Path, tiny_model: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"one": "a", "two": "b", "three": "c"}] * 3)
    done = init(tmp_path / "r.yaml", "--model", tiny_model, "--data", rows, "--cpu", *options)
    assert (done.exit_code, len(done.stderr.splitlines())) == (code, 1)
    assert said in done.stderr
    assert not (tmp_path / "r.yaml").exists()


def test_plain_prompts_on_a_model_with_a_chat_template_are_remarked_on(tmp_path: Path, tiny_model: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completion": "So."}] * 3)
    made(tmp_path / "r.yaml", "--model", tiny_model, "--data", rows, "--cpu")
    plan = json.loads(CliRunner().invoke(app, ["train", str(tmp_path / "r.yaml"), "--dry-run", "--json"]).stdout)
    assert any("format: alpaca, columns: {instruction: prompt, output: completion}" in one for one in plan["remarks"])
