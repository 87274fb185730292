"""Recipes: what is read, and how every mistake is reported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lorafit.recipe import LoraSection, Recipe, RecipeError
from lorafit.recipe.load import sections

BASE = """\
model:
  name_or_path: a/b
dataset:
  train:
    - path: rows.jsonl
"""
"""The shortest recipe: 5 lines, so what a test adds begins in line 6."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Positions name the file as it was given, so the tests run in its folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(content: str | bytes, name: str = "r.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def load(content: str | bytes, *overrides: str) -> Recipe:
    return Recipe.load(write(content), overrides)


def mistakes_of(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, overrides)
    lines = [str(mistake) for mistake in caught.value.mistakes]
    assert str(caught.value) == "\n".join(lines)
    assert caught.value.exit_code == 2
    for line in lines:
        assert line.isprintable()
    return lines


def mistakes(content: str | bytes, *overrides: str) -> list[str]:
    return mistakes_of(write(content), *overrides)


def only_mistake(content: str | bytes, *overrides: str) -> str:
    (mistake,) = mistakes(content, *overrides)
    return mistake


# --- what is read ---------------------------------------------------------------------------------


def test_the_shortest_recipe_has_every_default() -> None:
    recipe = load(BASE)
    assert recipe.model.name_or_path == "a/b"
    assert recipe.lora is None
    assert recipe.quantization is None
    assert recipe.training.learning_rate == 2e-4
    assert recipe.dataset.train[0].format == "auto"
    assert load(BASE + "lora: {}\n").lora is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("5e-05", 5e-5), (".5", 0.5), ("1.", 1.0), ("+1e+1", 10), ("0x10", 16), ("1", 1)],
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    assert load(f"{BASE}training: {{learning_rate: {text}}}").training.learning_rate == value


@pytest.mark.parametrize("text", ["no", "off", "yes", "on", "y", "n", "1_000", "12:30", "2024-01-01", "0b1", "1e", "="])
def test_what_yaml_1_1_would_turn_into_something_else_stays_text(text: str) -> None:
    assert load(f"{BASE}output_dir: {text}").output_dir == text


def test_no_is_a_strategy_and_not_a_boolean() -> None:
    assert load(BASE + "training: {save_strategy: no}").training.save_strategy == "no"
    assert only_mistake(BASE + "training:\n  packing: no") == (
        "r.yaml:7:12: training.packing: expected true or false, got 'no'"
    )


def test_unions() -> None:
    assert load(BASE + "training: {per_device_train_batch_size: auto}").training.per_device_train_batch_size == "auto"
    assert load(BASE + "training: {per_device_train_batch_size: 3}").training.per_device_train_batch_size == 3
    assert load(BASE + "  validation: 0.25").dataset.validation == 0.25
    sources = load(BASE + "  validation:\n    - path: held.jsonl").dataset.validation
    assert isinstance(sources, tuple)
    assert sources[0].path == "held.jsonl"
    assert load(BASE + "lora: {target_modules: [q, v]}").lora.target_modules == ("q", "v")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xef\xbb\xbf" + BASE.encode(), "byte-order mark"),
        (BASE.replace("\n", "\r\n"), "CRLF"),
        ("---\n" + BASE + "...\n", "document markers"),
        ("%YAML 1.2\n---\n" + BASE, "directive"),
        (json.dumps({"dataset": {"train": [{"path": "rows.jsonl"}]}, "model": {"name_or_path": "a/b"}}), "JSON"),
        ("model: {name_or_path: a/b}\ndataset: {train: [{path: rows.jsonl}]}", "flow style"),
        ("model: &m {name_or_path: a/b}\ndataset: {train: [&s {path: rows.jsonl}]}", "anchors"),
        ("model:\n  <<: {name_or_path: a/b}\ndataset:\n  train:\n  - path: >-\n     rows.jsonl", "merge key"),
    ],
)
def test_equal_content_is_an_equal_recipe_however_it_is_written(content: str | bytes, why: str) -> None:
    assert load(content).resolved() == load(BASE).resolved(), why
    json.dumps(load(content).resolved())


def test_a_recipe_is_frozen() -> None:
    recipe = load(BASE + "lora: {target_modules: [q]}")
    for section, name in ((recipe, "lora"), (recipe.model, "name_or_path"), (recipe.dataset.train[0], "path")):
        with pytest.raises(ValidationError):
            setattr(section, name, None)
    with pytest.raises(ValidationError):
        recipe.new = 1  # type: ignore[attr-defined]


def test_every_field_has_a_description() -> None:
    fields = {(*where, name): field for where, section in sections() for name, field in section.model_fields.items()}
    assert len(fields) > 70
    assert [path for path, field in fields.items() if not (field.description or "").strip().endswith((".", ")"))] == []
    assert {where for where, _ in sections()} == {
        (),
        ("model",),
        ("quantization",),
        ("lora",),
        ("dataset",),
        ("dataset", "train"),
        ("dataset", "validation"),
        ("dataset", "audit"),
        ("training",),
        ("merge",),
        ("hardware",),
        ("eval",),
        ("eval", "sets"),
        ("eval", "lm_eval"),
        ("eval", "judge"),
    }


# --- wrong keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "mistake"),
    [
        ("lora:\n  lora_alpah: 3", "7:3: lora.lora_alpah: unknown key; did you mean 'lora_alpha'?"),
        ("trainig: {}", "6:1: trainig: unknown key; did you mean 'training'?"),
        ("extend: x.yaml", "6:1: extend: unknown key; did you mean 'extends'?"),
        ("      fromat: text", "6:7: dataset.train.0.fromat: unknown key; did you mean 'format'?"),
        ("  validation: [{path: x, splti: a}]", "6:26: dataset.validation.0.splti: unknown key; did you mean 'split'?"),
        ("lr: 1e-4", "6:1: lr: unknown key; did you mean 'training.learning_rate'?"),
        ("training: {lr: 1e-4}", "6:12: training.lr: unknown key; did you mean 'learning_rate'?"),
        ("lora: {alpha: 3}", "6:8: lora.alpha: unknown key; did you mean 'lora_alpha'?"),
        ("lora: {learning_rate: 3}", "6:8: lora.learning_rate: unknown key; did you mean 'training.learning_rate'?"),
        ("max_seq_length: 3", "6:1: max_seq_length: unknown key; did you mean 'training.max_length'?"),
        ("lora.r: 3", "6:1: lora.r: unknown key; a dot does not nest: write lora: {r: …}"),
        (
            "zzz: 3",
            "6:1: zzz: unknown key; known keys: model, quantization, lora, dataset, training, hardware, merge, eval, "
            "output_dir, extends",
        ),
        ("lora: {'<<': {}}", "6:8: lora.<<: unknown key; known keys: " + ", ".join(LoraSection.model_fields)),
    ],
)
def test_an_unknown_key_suggests_the_known_one(added: str, mistake: str) -> None:
    assert only_mistake(BASE + added) == f"r.yaml:{mistake}"


def test_what_is_missing_says_what_it_is() -> None:
    assert mistakes("output_dir: x") == [
        "r.yaml:1:1: model: is missing (The base model)",
        "r.yaml:1:1: dataset: is missing (The training and validation rows)",
    ]
    assert mistakes("model: {}\ndataset:\n  train:\n    - name: x\n") == [
        "r.yaml:1:1: model.name_or_path: is missing (Hub id, local folder, or a `.gguf` file (which is dequantized))",
        "r.yaml:4:7: dataset.train.0.path: is missing (A .json, .jsonl, .csv or .parquet file (the first three also "
        "with .gz or .zst), a folder of them, a pattern such as `data/*.jsonl`, or a hub data set's id)",
    ]
    # The misspelt key is the only mistake: what it was meant for isn't missing.
    assert only_mistake(BASE.replace("model:", "modle:")) == "r.yaml:1:1: modle: unknown key; did you mean 'model'?"


# --- wrong values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "mistake"),
    [
        ("training: {learning_rate: fast}", "6:27: training.learning_rate: expected a number, got 'fast'"),
        ("training: {learning_rate: 0}", "6:27: training.learning_rate: expected a number above 0, got 0"),
        ("training: {learning_rate: .inf}", "6:27: training.learning_rate: expected a finite number, got inf"),
        ("training: {learning_rate: 1e999}", "6:27: training.learning_rate: expected a finite number, got inf"),
        ("training: {learning_rate: '1e-4'}", "6:27: training.learning_rate: expected a number, got '1e-4'"),
        ("training: {weight_decay: -1}", "6:26: training.weight_decay: expected a number of at least 0, got -1"),
        ("training: {adam_beta1: 1}", "6:24: training.adam_beta1: expected a number below 1, got 1"),
        ("training: {seed: 4294967296}", "6:18: training.seed: expected a number below 4.29497e+09, got 4294967296"),
        ("training: {max_steps: 1.5}", "6:23: training.max_steps: expected a whole number, got 1.5"),
        ("training: {max_steps: true}", "6:23: training.max_steps: expected a whole number, got true"),
        ("training: {packing: 1}", "6:21: training.packing: expected true or false, got 1"),
        (
            "training: {per_device_train_batch_size: 0}",
            "6:41: training.per_device_train_batch_size: expected a number above 0 or auto, got 0",
        ),
        ("training: {report_to: wandb}", "6:23: training.report_to: expected a list, got 'wandb'"),
        (
            "training: {report_to: [wandb, wnadb]}",
            "6:31: training.report_to.1: expected tensorboard | wandb | mlflow | trackio | comet_ml | swanlab | "
            "clearml | neptune | dvclive | codecarbon | azure_ml | dagshub | flyte, got 'wnadb'; did you mean 'wandb'?",
        ),
        ("training: []", "6:11: training: expected a section of keys, got []"),
        ("output_dir: 5", "6:13: output_dir: expected text, got 5"),
        ("output_dir: ''", "6:13: output_dir: expected text that isn't empty, got ''"),
        ("output_dir: [a, b]", "6:13: output_dir: expected text, got ['a', 'b']"),
        ("lora: {r: null}", "6:11: lora.r: expected a whole number, got null"),
        ("lora: {rank_pattern: {q: -1}}", "6:26: lora.rank_pattern.q: expected a number above 0, got -1"),
        (
            "lora: {bias: nnoe}",
            "6:14: lora.bias: expected none | all | lora_only, got 'nnoe'; did you mean 'none'?",
        ),
        (
            "lora: {init_lora_weights: lofq}",
            "6:27: lora.init_lora_weights: expected true or false or gaussian | orthogonal | pissa | pissa_niter_N | "
            "olora | loftq | eva, got 'lofq'; did you mean 'loftq'?",
        ),
        ("  validation: 1.5", "6:15: dataset.validation: expected a number below 1 or a list, got 1.5"),
        ("  validation: held.jsonl", "6:15: dataset.validation: expected a number or a list, got 'held.jsonl'"),
        ("  validation: {float: 1}", "6:3: dataset.validation: expected a number or a list, got {'float': 1}"),
        ("  validation: [{path: 1}]", "6:23: dataset.validation.0.path: expected text, got 1"),
        ("      columns: {output: 1}", "6:25: dataset.train.0.columns.output: expected text, got 1"),
        ("      columns: {output: [a]}", "6:25: dataset.train.0.columns.output: expected text, got ['a']"),
        ("model2: 3\n", "6:1: model2: unknown key; did you mean 'model'?"),
    ],
)
def test_a_wrong_value(added: str, mistake: str) -> None:
    assert only_mistake(BASE + added) == f"r.yaml:{mistake}"


def test_a_name_that_begins_like_a_choice_suggests_it() -> None:
    assert only_mistake(BASE + "training: {optim: adamw}").endswith("got 'adamw'; did you mean 'adamw_torch'?")


def test_no_sources() -> None:
    content = "model: {name_or_path: a/b}\ndataset: {train: []}"
    assert only_mistake(content) == "r.yaml:2:18: dataset.train: expected a list that isn't empty, got []"
    content = "model: {name_or_path: a/b}\ndataset: {train: [rows.jsonl]}"
    assert only_mistake(content) == "r.yaml:2:19: dataset.train.0: expected a section of keys, got 'rows.jsonl'"


def test_values_and_paths_in_messages_are_short_and_printable() -> None:
    long = only_mistake(BASE + f"lora: {{r: {'x' * 10_000}}}")
    assert len(long) < 150
    assert long.endswith("xxx…")
    assert len(only_mistake(BASE + f"lora: {{r: [{'1, ' * 500}]}}")) < 150
    assert len(only_mistake(BASE + f"{'k' * 1000}: 1")) < 500
    assert len(only_mistake(BASE, f"lora.r={'x' * 10_000}")) < 250
    assert mistakes(BASE + '"a\\nb\\e[31m\\ud800": 1\noutput_dir: "\\udfff"') == [
        "r.yaml:6:1: a\\nb\\x1b[31m\\ud800: holds \\ud800, which is not a character",
        "r.yaml:6:1: a\\nb\\x1b[31m?: unknown key; known keys: "
        "model, quantization, lora, dataset, training, hardware, merge, eval, output_dir, extends",
        "r.yaml:7:13: output_dir: holds \\udfff, which is not a character",
    ]
    assert only_mistake(BASE + 'lora: {r: "a\\nb"}') == "r.yaml:6:11: lora.r: expected a whole number, got 'a\\nb'"
    assert only_mistake(BASE + "lora: {r: !a%0Ab 8}") == (
        "r.yaml:6:11: lora.r: tags such as !a\\nb are not read; remove it"
    )


# --- YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        ("", "1:1: is empty"),
        ("# nothing\n", "1:1: is empty"),
        ("- a\n", "1:1: a recipe is a mapping of sections, such as `model:`"),
        ("text", "1:1: a recipe is a mapping of sections, such as `model:`"),
        (BASE + "lora:\n", "6:6: lora: is empty; write a value, {} for a section of defaults, or null"),
        (BASE + "lora:\n  r:\n", "7:5: lora.r: is empty; write a value, {} for a section of defaults, or null"),
        (BASE + "model: {}\n", "6:1: model: is given twice (first in line 1); remove one"),
        (BASE + "lora:\n  r: 8\n  r: 16\n", "8:3: lora.r: is given twice (first in line 7); remove one"),
        (BASE + "      path: x\n", "6:7: dataset.train.0.path: is given twice (first in line 5); remove one"),
        (BASE + "lora: {<<: {r: 1}, <<: {r: 2}}", "6:20: lora.<<: is given twice (first in line 6); remove one"),
        (BASE + "lora: {<<: 3}", "6:12: lora.<<: merges mappings only"),
        (BASE + "lora: {r: !!int 8}", "6:11: lora.r: tags such as !!int are not read; remove it"),
        (BASE + "lora: !!python/object:os.system {}", "6:7: lora: tags such as !!python/object:os.system are not read; "
         "remove it"),
        (BASE + "lora: {!foo r: 8}", "6:8: lora.r: tags such as !foo are not read; remove it"),
        (BASE + "? [a]\n: 1", "6:3: a key must be text"),
        (BASE + "---\n" + BASE, "6:1: a second document begins here; a recipe is one"),
        (BASE + "lora: [", "6:8: not YAML: expected the node content, but found '<stream end>' "
         "(while parsing a flow node of line 6)"),
        (BASE + "lora:\n\tr: 8", "7:1: not YAML: found character '\\t' that cannot start any token; "
         "indent with spaces"),
        (BASE + "output_dir: @runs", "6:13: not YAML: found character '@' that cannot start any token; quote it"),
        (BASE + "output_dir: a: b", "6:14: not YAML: mapping values are not allowed here; indent it rightly, "
         "or quote text that holds ': '"),
        (BASE + "lora: *gone", "6:7: found undefined alias 'gone'"),
        (BASE + "lora: &a {r: &a 8}", "6:14: this anchor is given twice: 'a'"),
        (BASE + "lora: !x!y {}", "6:7: not YAML: found undefined tag handle '!x!' (while parsing a node of line 6)"),
        (BASE + 'output_dir: "\\UFFFFFFFF"', "6:16: not YAML: this escape or number is out of range"),
        (BASE + "output_dir: a\0b", "6:14: the character #x0000 is not allowed in YAML"),
        (BASE + "output_dir: \x1b[31m", "6:13: the character #x001b is not allowed in YAML"),
        (BASE.replace("\n", "\r\n") + "output_dir: \x07", "6:13: the character #x0007 is not allowed in YAML"),
        (BASE.encode() + b"output_dir: caf\xe9\n", "6:16: is not UTF-8 text"),
        (BASE.encode("utf-16"), "1:1: is not UTF-8 text"),
        (BASE + "lora: {r: " + "9" * 5000 + "}", "6:11: lora.r: this number is too large; quote it if it is text"),
        (BASE + "lora: {r: 0x" + "f" * 5000 + "}", "6:11: lora.r: this number is too large; quote it if it is text"),
    ],
)  # fmt: skip
def test_strict_yaml(content: str | bytes, mistake: str) -> None:
    assert only_mistake(content) == f"r.yaml:{mistake}"


def test_positions_with_a_byte_order_mark_and_crlf() -> None:
    content = "\ufefflr: 3\r\n" + BASE.replace("\n", "\r\n") + "lora: {r: x}\r\n"
    assert mistakes(content) == [
        "r.yaml:1:1: lr: unknown key; did you mean 'training.learning_rate'?",
        "r.yaml:7:11: lora.r: expected a whole number, got 'x'",
    ]


def test_what_is_too_much() -> None:
    too_many = "holds more than 10000 values, counting what aliases repeat; this is not a recipe"
    assert only_mistake("#" * 300_000) == "r.yaml: is larger than 256 KiB: not a recipe"
    assert only_mistake("[" * 60_000) == "r.yaml:1:65: is nested deeper than 64 levels"
    assert only_mistake(BASE + "a: " + "{a: " * 200 + "}" * 200) == "r.yaml:6:253: is nested deeper than 64 levels"
    assert only_mistake("a: [" + "1," * 100_000 + "]").endswith(too_many)
    bomb = BASE + "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 60))
    assert only_mistake(bomb) == f"r.yaml:10:5: a4: {too_many}"
    merges = BASE + "a: &a {" + ", ".join(f"k{n}: 1" for n in range(900)) + "}\nb: {<<: [" + "*a, " * 5000 + "]}"
    assert only_mistake(merges).endswith(too_many)
    assert only_mistake(BASE + "lora: &a {rank_pattern: *a}") == (
        "r.yaml:6:7: lora.rank_pattern: an alias refers to what contains it"
    )
    chain = BASE + "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} {'[' * 40}*a{n - 1}{']' * 40}\n" for n in range(1, 9))
    assert "nested deeper than 64 levels by its aliases" in only_mistake(chain)


def test_many_mistakes_take_no_time(here: Path) -> None:
    """Each was once quadratic in the number of mistakes (23 s and 50 s)."""
    assert len(mistakes(BASE + "".join(f"k{n}: 1\n" for n in range(9000)))) == 9000
    assert len(mistakes(BASE + f"lora: {{target_modules: [{'1,' * 9000}]}}")) == 9000


def test_anchors_and_merge_keys() -> None:
    recipe = load(
        "x: &x {path: a.jsonl, format: text}\n".replace("x: &x", "model: {name_or_path: m}\ndataset:\n  train:\n  - &x")
        + "  - {<<: *x, path: b.jsonl}\n  - {path: c.jsonl, <<: [{name: one}, {name: two, split: s}]}\n  loss_on: all\n"
    )
    a, b, c = recipe.dataset.train
    assert (a.path, a.format) == ("a.jsonl", "text")
    assert (b.path, b.format) == ("b.jsonl", "text")
    assert (c.path, c.name, c.split) == ("c.jsonl", "one", "s")


def test_a_mistake_in_an_aliased_value_is_where_the_value_is() -> None:
    content = BASE + "      split: &s 3\n      name: *s\n"
    assert mistakes(content) == [
        "r.yaml:6:14: dataset.train.0.split: expected text, got 3",
        "r.yaml:6:14: dataset.train.0.name: expected text, got 3",
    ]


def test_files_that_cannot_be_read(here: Path) -> None:
    (here / "folder").mkdir()
    (here / "loop").symlink_to("loop")
    assert mistakes_of("folder") == ["folder: is a folder; give a recipe, a YAML file"]
    assert mistakes_of("gone.yaml") == ["gone.yaml: can't be read: No such file or directory"]
    assert mistakes_of("loop") == ["loop: can't be read: Too many levels of symbolic links"]
    assert mistakes_of("a\0b.yaml") == ["a\\x00b.yaml: is not a path: embedded null byte"]
    assert len(mistakes_of("x" * 300)) == 1


# --- the environment ------------------------------------------------------------------------------


def test_the_environment_is_read_where_it_is_the_whole_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("TRICK", "${RANK}")

    def value(text: str) -> Any:
        return load(f"{BASE}output_dir: {text}").output_dir

    assert load(BASE + "lora:\n  r: ${RANK}").lora.r == 8  # type: ignore[union-attr]
    assert load(BASE + 'lora: {r: "${RANK}"}').lora.r == 8  # type: ignore[union-attr]
    assert load(BASE + "training:\n  learning_rate: ${GONE:-1e-4}").training.learning_rate == 1e-4
    assert value("'${RANK}'") == "${RANK}"
    assert value("runs/${RANK}") == "runs/${RANK}"
    assert value("$RANK") == "$RANK"
    assert value("${TRICK}") == "${RANK}"
    assert value("${EMPTY:-x}") == "x"
    assert value("${EMPTY}") is None
    assert value("${GONE:-}") is None
    assert value("${GONE:-a b}") == "a b"


def test_a_variable_that_is_not_set_is_the_only_mistake_about_its_value() -> None:
    assert only_mistake(BASE + "lora:\n  r: ${GONE_VARIABLE}") == (
        "r.yaml:7:6: lora.r: the environment variable GONE_VARIABLE is not set; give a default: ${GONE_VARIABLE:-…}"
    )


def test_a_wrong_value_from_the_environment_is_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "high")
    assert only_mistake(BASE + "lora:\n  r: ${RANK}") == "r.yaml:7:6: lora.r: expected a whole number, got ${RANK}"


# --- extends --------------------------------------------------------------------------------------


def test_extends_merges_deeply_and_the_child_wins() -> None:
    write(BASE + "lora: {r: 64, lora_alpha: 5, target_modules: [q, k]}\ntraining: {seed: 1}", "up/parent.yaml")
    write("extends: parent.yaml\nlora: {lora_alpha: 7}", "up/middle.yaml")
    recipe = load("extends: up/middle.yaml\nlora: {r: 8, target_modules: [v]}\ndataset: {train: [{path: mine.csv}]}")
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (8, 7, ("v",))
    assert [source.path for source in recipe.dataset.train] == ["mine.csv"]
    assert (recipe.training.seed, recipe.model.name_or_path) == (1, "a/b")


def test_extends_takes_a_list_of_which_the_later_wins_and_a_diamond_is_fine() -> None:
    write(BASE + "lora: {r: 1}", "base.yaml")
    write("extends: base.yaml\nlora: {r: 2}\ntraining: {seed: 2}", "one.yaml")
    write("extends: base.yaml\ntraining: {seed: 3}", "two.yaml")
    recipe = load("extends: [one.yaml, two.yaml]")
    assert (recipe.training.seed, recipe.lora.r) == (3, 1)  # type: ignore[union-attr]
    assert load("extends: []\n" + BASE).resolved() == load(BASE).resolved()


def test_null_removes_what_a_parent_says() -> None:
    write(
        BASE + "  validation: 0.1\nquantization: {load_in_4bit: true, bnb_4bit_quant_type: fp4}\n"
        "lora: {r: 64, rank_pattern: {q: 4, v: 8}}\ntraining: {save_total_limit: 5, seed: 3}",
        "base.yaml",
    )
    removed = load("extends: base.yaml\nlora: {r: null, rank_pattern: {q: null}}\ntraining: {save_total_limit: null}")
    assert removed.lora is not None
    assert (removed.lora.r, removed.lora.rank_pattern) == (16, {"v": 8})
    assert removed.training.save_total_limit is None, "null is a value of this field: keep all"
    assert removed.training.seed == 3
    eight = load(
        "extends: base.yaml\nquantization: {load_in_4bit: null, load_in_8bit: true, bnb_4bit_quant_type: null}"
    )
    assert eight.quantization is not None
    assert eight.quantization.model_fields_set == {"load_in_8bit"}
    without = load("extends: base.yaml\nlora: null\nquantization: ~\ntraining: null\ndataset: {validation: null}")
    assert (without.lora, without.quantization, without.dataset.validation) == (None, None, None)
    assert without.training.seed == 42
    assert load("extends: base.yaml", "lora.r=null").lora.r == 16  # type: ignore[union-attr]


def test_what_null_removed_can_be_missing_and_can_be_set_again() -> None:
    write(BASE + "lora: {r: 64}", "base.yaml")
    write("extends: base.yaml\nlora: {r: null}", "middle.yaml")
    assert load("extends: middle.yaml\nlora: {r: 3}").lora.r == 3  # type: ignore[union-attr]
    assert load("extends: middle.yaml\nlora: {r: null}").lora.r == 16  # type: ignore[union-attr]
    assert only_mistake("extends: base.yaml\nmodel:\n  name_or_path: null").startswith(
        "r.yaml:3:17: model.name_or_path: is missing"
    )


def test_a_mistake_is_reported_in_the_file_that_holds_it() -> None:
    write(BASE + "lora:\n  r: x\n  lora_alpah: 2\ntraining: {seed: 1, seed: 2}", "up/parent.yaml")
    assert mistakes("extends: up/parent.yaml\nlora:\n  lora_dropout: 2\n") == [
        "r.yaml:3:17: lora.lora_dropout: expected a number below 1, got 2",
        "up/parent.yaml:7:6: lora.r: expected a whole number, got 'x'",
        "up/parent.yaml:8:3: lora.lora_alpah: unknown key; did you mean 'lora_alpha'?",
        "up/parent.yaml:9:21: training.seed: is given twice (first in line 9); remove one",
    ]
    # A cross-field rule that the child breaks on the parent's value points at that value.
    write(BASE + "training:\n  global_batch_size: 8\n", "up/parent.yaml")
    assert only_mistake("extends: up/parent.yaml\ntraining: {per_device_train_batch_size: 3}") == (
        "up/parent.yaml:7:22: training.global_batch_size: is not a multiple of per_device_train_batch_size (3)"
    )


def test_missing_parents_are_reported_at_extends_with_the_other_mistakes() -> None:
    write("extends: [gone.yaml, ../r.yaml, '', ../up]", "up/parent.yaml")
    assert mistakes("extends:\n  - up/parent.yaml\n  - nope.yaml\nlora: {r: x}\nlr: 3\n") == [
        "r.yaml:3:5: extends: nope.yaml does not exist",
        "r.yaml:4:11: lora.r: expected a whole number, got 'x'",
        "r.yaml:5:1: lr: unknown key; did you mean 'training.learning_rate'?",
        "up/parent.yaml:1:11: extends: up/gone.yaml does not exist",
        "up/parent.yaml:1:22: extends: goes in a circle: r.yaml -> up/parent.yaml -> r.yaml",
        "up/parent.yaml:1:33: extends: expected a path or a list of paths",
        "up/parent.yaml:1:37: extends: up/../up is not a file",
    ]


def test_extends_that_cannot_be_followed() -> None:
    assert only_mistake("extends: r.yaml\n" + BASE) == "r.yaml:1:10: extends: goes in a circle: r.yaml -> r.yaml"
    assert only_mistake("extends: 3\n" + BASE) == "r.yaml:1:10: extends: expected a path or a list of paths"
    assert only_mistake("extends: {a: b}\n" + BASE) == "r.yaml:1:10: extends: expected a path or a list of paths"
    assert only_mistake('extends: "a\\0b"\n' + BASE) == "r.yaml:1:10: extends: is not a path: embedded null byte"
    assert only_mistake(f"extends: {'x' * 5000}\n" + BASE).endswith("… does not exist")
    write("a: [", "broken.yaml")
    assert only_mistake("extends: broken.yaml\n" + BASE).startswith("broken.yaml:1:5: not YAML: ")
    for number in range(100):
        write(f"extends: p{number + 1}.yaml", f"p{number}.yaml")
    assert only_mistake("extends: p0.yaml\n" + BASE) == "p62.yaml:1:10: extends: needs more than 64 files"


# --- --set ----------------------------------------------------------------------------------------


def test_set_overrides_values_as_yaml() -> None:
    recipe = load(
        BASE + "lora: {r: 2, lora_alpha: 3}",
        "training.learning_rate=1e-3",
        "lora.r=4",
        " lora.use_dora = true",
        "dataset.train.0.path=other.jsonl",
        "lora.target_modules=[q, v]",
        "quantization.load_in_4bit=true",
        "output_dir=runs/a=b",
        "lora.r=8",
    )
    assert recipe.lora is not None
    assert recipe.quantization is not None
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.use_dora) == (8, 3, True)
    assert recipe.lora.target_modules == ("q", "v")
    assert (recipe.training.learning_rate, recipe.output_dir) == (1e-3, "runs/a=b")
    assert recipe.dataset.train[0].path == "other.jsonl"
    assert recipe.quantization.load_in_4bit


def test_set_of_a_section_replaces_it_and_null_removes_it() -> None:
    content = BASE + "lora: {r: 2, lora_alpha: 3}"
    assert load(content, "lora={r: 5}").resolved() == load(BASE + "lora: {r: 5}").resolved()
    assert load(content, "lora=null").lora is None
    assert load(content, "lora={}").lora.r == 16  # type: ignore[union-attr]
    assert load(BASE + "lora: null", "lora.r=5").lora.r == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("override", "mistake"),
    [
        ("lora.r=x", "lora.r: expected a whole number, got 'x'"),
        ("lora={r: x}", "lora.r: expected a whole number, got 'x'"),
        ("lora.lora_alpah=1", "lora.lora_alpah: unknown key; did you mean 'lora_alpha'?"),
        ("lr=1", "lr: unknown key; did you mean 'training.learning_rate'?"),
        ("lora.r=", "lora.r: is empty"),
        ("lora.r=[", "lora.r: not YAML: expected the node content, but found '<stream end>' "
         "(while parsing a flow node of line 1)"),
        ("lora.r=!!int 3", "lora.r: tags such as !!int are not read; remove it"),
        ("lora", "expected key=value, such as training.learning_rate=1e-4"),
        ("=3", "expected key=value, such as training.learning_rate=1e-4"),
        ("lora..r=3", "expected key=value, such as training.learning_rate=1e-4"),
        ("extends=x.yaml", "extends: can't be set; write it in the file"),
        ("model.name_or_path.x=1", "model.name_or_path.x: model.name_or_path is a single value and has no keys"),
        ("dataset.train.1.path=x", "dataset.train.1: dataset.train is a list of 1; give an index, from 0"),
        ("dataset.train.path=x", "dataset.train.path: dataset.train is a list of 1; give an index, from 0"),
        ("dataset.train.-1.path=x", "dataset.train.-1: dataset.train is a list of 1; give an index, from 0"),
        ("dataset.train.0=null", "dataset.train.0: expected a section of keys, got null"),
        ("model=null", "model: is missing (The base model)"),
    ],
)  # fmt: skip
def test_a_mistake_in_set_is_reported_there(override: str, mistake: str) -> None:
    assert only_mistake(BASE, override) == f"--set {override}: {mistake}"


def test_set_with_hostile_keys() -> None:
    assert "expected key=value" in only_mistake(BASE, ".".join("a" * 10_000) + "=1")
    assert "give an index" in only_mistake(BASE, f"dataset.train.{'9' * 5000}.path=1")
    assert only_mistake(BASE, "lora.r=a\nb: c").startswith("--set lora.r=a\\nb: c: lora.r: ")
    assert only_mistake(BASE, "output_dir=\udcff") == (
        "--set output_dir=\\udcff: output_dir: the character #xdcff is not allowed in YAML"
    )


# --- all at once, and the rules between fields ----------------------------------------------------


def test_every_kind_of_mistake_is_reported_at_once() -> None:
    content = BASE + (
        "lr: 1\n"
        "lora:\n"
        "  r: !!int 8\n"
        "  lora_alpah: 3\n"
        "  r: 9\n"
        "  lora_dropout: high\n"
        "quantization: {}\n"
        "training:\n"
        "  seed:\n"
        "  max_steps: 5\n"
        "  num_train_epochs: 1\n"
    )
    assert mistakes(content, "lora.bias=some", "nonsense") == [
        "--set lora.bias=some: lora.bias: expected none | all | lora_only, got 'some'",
        "--set nonsense: expected key=value, such as training.learning_rate=1e-4",
        "r.yaml:6:1: lr: unknown key; did you mean 'training.learning_rate'?",
        "r.yaml:8:6: lora.r: tags such as !!int are not read; remove it",
        "r.yaml:9:3: lora.lora_alpah: unknown key; did you mean 'lora_alpha'?",
        "r.yaml:10:3: lora.r: is given twice (first in line 8); remove one",
        "r.yaml:11:17: lora.lora_dropout: expected a number, got 'high'",
        "r.yaml:12:1: quantization.load_in_4bit: set exactly one of load_in_4bit and load_in_8bit to true, "
        "or remove the section",
        "r.yaml:14:8: training.seed: is empty; write a value, {} for a section of defaults, or null",
        "r.yaml:15:14: training.max_steps: give either max_steps or num_train_epochs",
    ]


def test_a_rule_says_nothing_about_a_field_that_is_wrong_itself() -> None:
    assert len(mistakes(BASE + "lora: {}\nquantization: {load_in_4bit: treu}")) == 1
    assert len(mistakes(BASE + "lora: {}\nquantization: {load_in_4bti: true}")) == 1
    assert len(mistakes(BASE + "training: {eval_strategy: stepz, eval_steps: 3}")) == 1
    assert len(mistakes(BASE + "  validaton: 0.1\ntraining: {early_stopping_patience: 3}")) == 1


FOUR_BIT = "quantization: {load_in_4bit: true}\n"
HELD_OUT = "  validation: 0.1\n"
EXACTLY_ONE = "set exactly one of load_in_4bit and load_in_8bit to true, or remove the section"
NEEDS_ROWS = "needs validation rows; add dataset.validation, such as 0.1"


@pytest.mark.parametrize(
    ("added", "mistake"),
    [
        ("lora: {}\nquantization: {}", f"7:1: quantization.load_in_4bit: {EXACTLY_ONE}"),
        (
            "lora: {}\nquantization: {load_in_8bit: true, load_in_4bit: true}",
            f"7:50: quantization.load_in_4bit: {EXACTLY_ONE}",
        ),
        (
            "lora: {}\nquantization: {load_in_8bit: true, bnb_4bit_quant_type: nf4}",
            "7:57: quantization.bnb_4bit_quant_type: has no effect with load_in_8bit; remove it",
        ),
        (
            "lora: {}\nquantization: {load_in_4bit: true, llm_int8_threshold: 5}",
            "7:56: quantization.llm_int8_threshold: has no effect with load_in_4bit; remove it",
        ),
        (
            FOUR_BIT,
            "6:1: quantization: quantized weights can't be trained in full; add `lora: {}`, or remove quantization",
        ),
        (
            "lora: {init_lora_weights: loftq}",
            "6:27: lora.init_lora_weights: loftq corrects for 4-bit rounding: add quantization.load_in_4bit: true, "
            "or use another start",
        ),
        (
            FOUR_BIT + "lora: {init_lora_weights: pissa_niter_4}",
            "7:27: lora.init_lora_weights: pissa_niter_4 changes the base's weights, which are quantized; use loftq, "
            "or remove quantization",
        ),
        (
            FOUR_BIT + "lora: {init_lora_weights: loftq}",
            "7:27: lora.init_lora_weights: loftq's start is the rounding error itself, so its scale must be 1: set "
            "lora_alpha to r",
        ),
        (
            "lora: {init_lora_weights: olora, use_rslora: true}",
            "6:27: lora.init_lora_weights: olora can't be saved for the unchanged base with use_rslora; "
            "turn one of them off",
        ),
        (
            "lora: {init_lora_weights: pissa, alpha_pattern: {q: 2}}",
            "6:27: lora.init_lora_weights: pissa can't be saved for the unchanged base with rank_pattern or "
            "alpha_pattern",
        ),
        (
            FOUR_BIT + "lora: {init_lora_weights: eva}",
            "7:27: lora.init_lora_weights: eva runs on an unquantized base only; remove quantization",
        ),
        (
            "lora: {init_lora_weights: eva, use_dora: true}",
            "6:27: lora.init_lora_weights: eva does not go with use_dora",
        ),
        (
            "lora: {target_modules: []}",
            "6:24: lora.target_modules: is empty: nothing would be trained; use all-linear",
        ),
        (
            "lora: {target_modules: [q_proj, model.lm_head]}",
            "6:33: lora.target_modules.1: TRL computes the loss from lm_head's weight directly, so an adapter on it "
            "would never be trained; put lm_head in modules_to_save",
        ),
        (
            "      format: text\n  loss_on: completion",
            "6:15: dataset.train.0.format: text rows have no answer, so loss_on: completion has no meaning; "
            "use loss_on: all",
        ),
        (
            "      columns: {outptu: a}\n      format: alpaca",
            "6:25: dataset.train.0.columns.outptu: no such column in the format alpaca, which has: instruction, "
            "output, input, system, tools, history, train, weight",
        ),
        (
            HELD_OUT.replace("0.1", "[{path: x, columns: {role: a}}]"),
            "6:42: dataset.validation.0.columns.role: no such column in the format auto, which has: chosen, rejected, "
            "prompt, messages, conversations, instruction, input, system, tools, train, weight, label, completion, "
            "output, history, text",
        ),
        (
            "      template: {promt: a}\n      format: prompt_completion",
            "6:25: dataset.train.0.template.promt: no such column in the format prompt_completion, which has: prompt, "
            "completion, tools, train, weight",
        ),
        (
            "      template: {prompt: a}\n      columns: {prompt: b}",
            "7:25: dataset.train.0.columns.prompt: is made by the template as well; give one of them",
        ),
        (
            "      template: a\n      format: alpaca",
            "6:17: dataset.train.0.template: one text makes the column `text`; for alpaca name the columns it makes",
        ),
        (
            HELD_OUT.replace("0.1", "[{path: x, weight: 2}]"),
            "6:34: dataset.validation.0.weight: has no effect on validation rows; remove it",
        ),
        (
            "  min_length: 9\ntraining: {max_length: 8}",
            "6:15: dataset.min_length: is above training.max_length (8): no row would be left",
        ),
        (
            "  streaming: true",
            "6:14: dataset.streaming: the number of rows of a stream is not known; add training.max_steps",
        ),
        (
            "  streaming: true\n  validation: 0.1\ntraining: {max_steps: 2}",
            "7:15: dataset.validation: no fraction of a stream can be held out; name sources of their own",
        ),
        (
            "  streaming: true\ntraining: {max_steps: 2, dataloader_num_workers: 1}",
            "7:50: training.dataloader_num_workers: must be 0 for a stream, which is audited as it comes",
        ),
        (
            "  streaming: true\ntraining: {max_steps: 2, save_strategy: epoch}",
            "7:41: training.save_strategy: a stream's epochs are not known; use steps",
        ),
        (
            "  streaming: true\ntraining: {max_steps: 2, train_sampling_strategy: group_by_length}",
            "7:51: training.train_sampling_strategy: the lengths of a stream's rows are not known; use random",
        ),
        ("training: {early_stopping_patience: 3}", f"6:37: training.early_stopping_patience: {NEEDS_ROWS}"),
        ("training: {load_best_model_at_end: true}", f"6:36: training.load_best_model_at_end: {NEEDS_ROWS}"),
        ("training: {eval_strategy: epoch}", f"6:27: training.eval_strategy: {NEEDS_ROWS}"),
        ("training: {per_device_eval_batch_size: 2}", f"6:40: training.per_device_eval_batch_size: {NEEDS_ROWS}"),
        (
            "training: {max_steps: 3, num_train_epochs: 1}",
            "6:23: training.max_steps: give either max_steps or num_train_epochs",
        ),
        (
            "training: {warmup_steps: 0, warmup_ratio: 0}",
            "6:26: training.warmup_steps: give either warmup_steps or warmup_ratio",
        ),
        (
            "training: {global_batch_size: 8, gradient_accumulation_steps: 2}",
            "6:31: training.global_batch_size: has no effect unless gradient_accumulation_steps is auto",
        ),
        (
            "training: {global_batch_size: 8, per_device_train_batch_size: 3}",
            "6:31: training.global_batch_size: is not a multiple of per_device_train_batch_size (3)",
        ),
        ("training: {save_strategy: steps}", "6:27: training.save_strategy: needs save_steps"),
        (HELD_OUT + "training: {eval_strategy: steps}", "7:27: training.eval_strategy: needs eval_steps"),
        ("training: {save_steps: 2}", "6:24: training.save_steps: has no effect without save_strategy: steps"),
        (
            HELD_OUT + "training: {eval_steps: 2}",
            "7:24: training.eval_steps: has no effect without eval_strategy: steps",
        ),
        (
            HELD_OUT + "training: {eval_strategy: no, early_stopping_patience: 1}",
            "7:56: training.early_stopping_patience: needs evaluations; remove eval_strategy: no",
        ),
        (
            HELD_OUT + "training: {eval_strategy: no, load_best_model_at_end: true}",
            "7:55: training.load_best_model_at_end: needs evaluations; remove eval_strategy: no",
        ),
        (
            HELD_OUT + "training: {load_best_model_at_end: true, save_strategy: no}",
            "7:57: training.save_strategy: the best adapter can't be kept without checkpoints; use auto",
        ),
        (
            HELD_OUT + "training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 4, "
            "save_strategy: steps, save_steps: 6}",
            "7:113: training.save_steps: must be a multiple of eval_steps (4) to keep the best adapter",
        ),
        (
            HELD_OUT + "training: {load_best_model_at_end: true, eval_strategy: epoch, save_strategy: steps, "
            "save_steps: 6}",
            "7:79: training.save_strategy: must be as eval_strategy to keep the best adapter; use auto",
        ),
        (
            "merge: {max_kl: 0.2}",
            "6:1: merge: training in full leaves no adapter to merge; add `lora: {}`, or remove merge",
        ),
        (
            "lora: {}\nmerge: {base_weights: original}",
            "7:23: merge.base_weights: has no effect without quantization; remove it",
        ),
    ],
)
def test_each_rule_between_fields(added: str, mistake: str) -> None:
    assert only_mistake(BASE + added) == f"r.yaml:{mistake}"


@pytest.mark.parametrize(
    "added",
    [
        FOUR_BIT + "lora: {init_lora_weights: loftq, lora_alpha: 16}",
        FOUR_BIT + "lora: {}\nmerge: {base_weights: original, max_kl: null, max_loss_increase: 0, min_top1: 1}",
        "lora: {}\nmerge: {}",
        "lora: {}\nquantization: {load_in_8bit: true, llm_int8_threshold: 5}",
        "      format: text\n  loss_on: all",
        "      format: text",
        "      format: text\n      columns: {text: story}",
        "      columns: {input: a, conversations: b, tools: c}",
        "training: {global_batch_size: 8, per_device_train_batch_size: 4}",
        "training: {eval_strategy: no, load_best_model_at_end: false}",
        HELD_OUT + "training: {early_stopping_patience: 2, load_best_model_at_end: true}",
        HELD_OUT + "training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 3, "
        "save_strategy: steps, save_steps: 6}",
    ],
)
def test_what_no_rule_forbids(added: str) -> None:
    load(BASE + added)


def test_a_later_mistake_is_reported_where_the_value_was_written() -> None:
    """The plan finds mistakes that only the model or the machine can tell."""
    write(BASE + "lora: {target_modules: [q_prj]}", "parent.yaml")
    recipe = load("extends: parent.yaml", "model.dtype=float16")
    path = ("lora", "target_modules", 0)
    assert str(recipe.mistake(path, "matches nothing")) == "parent.yaml:6:25: lora.target_modules.0: matches nothing"
    assert str(recipe.mistake(("model", "dtype"), "is slow")) == "--set model.dtype=float16: model.dtype: is slow"
    assert str(recipe.mistake(("training", "optim"), "is for GPUs")) == "r.yaml:1:1: training.optim: is for GPUs"


# --- keys that exclude each other -----------------------------------------------------------------

RIVALS = [
    # written earlier, set later, what holds of both
    ("training: {num_train_epochs: 3}", "training.max_steps=5", {"max_steps": 5, "num_train_epochs": None}),
    ("training: {max_steps: 5}", "training.num_train_epochs=2", {"max_steps": None, "num_train_epochs": 2}),
    ("training: {warmup_ratio: 0.1}", "training.warmup_steps=5", {"warmup_ratio": None, "warmup_steps": 5}),
    ("training: {warmup_steps: 5}", "training.warmup_ratio=0.1", {"warmup_ratio": 0.1, "warmup_steps": None}),
    ("training: {warmup_ratio: 0.1}", "training.warmup_steps=0", {"warmup_ratio": None, "warmup_steps": 0}),
    ("training: {warmup_ratio: 0.0}", "training.warmup_steps=5", {"warmup_ratio": None, "warmup_steps": 5}),
    (
        "training: {global_batch_size: 32}",
        "training.gradient_accumulation_steps=4",
        {"global_batch_size": None, "gradient_accumulation_steps": 4},
    ),
    (
        "training: {gradient_accumulation_steps: 4}",
        "training.global_batch_size=32",
        {"global_batch_size": 32, "gradient_accumulation_steps": "auto"},
    ),
    (
        "training: {global_batch_size: 32}",  # goes with auto
        "training.gradient_accumulation_steps=auto",
        {"global_batch_size": 32, "gradient_accumulation_steps": "auto"},
    ),
    (
        "training: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6}}",
        "training.lr_scheduler_kwargs.min_lr_rate=0.1",
        {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
    (
        "lora: {}\nquantization: {load_in_4bit: true, bnb_4bit_quant_type: fp4}",
        "quantization.load_in_8bit=true",
        {"load_in_4bit": False, "load_in_8bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    (
        "lora: {}\nquantization: {load_in_8bit: true, llm_int8_threshold: 4.0}",
        "quantization.load_in_4bit=true",
        {"load_in_4bit": True, "load_in_8bit": False, "llm_int8_threshold": 6.0},
    ),
    ("hardware: {gpu: T4, vram: 8GiB}", "hardware.device=cpu", {"device": "cpu", "gpu": None, "vram": None}),
    ("hardware: {device: cpu}", "hardware.gpu=T4", {"device": None, "gpu": "T4"}),
    (
        "dataset: {train: [{path: d.jsonl}], validation: 0.1}\ntraining: {eval_strategy: steps, eval_steps: 5}",
        "training.eval_strategy=epoch",
        {"eval_strategy": "epoch", "eval_steps": None},
    ),
    (
        "training: {save_strategy: steps, save_steps: 5}",
        "training.save_strategy=auto",
        {"save_strategy": "auto", "save_steps": None},
    ),
]


def in_force(recipe: Recipe, keys: Iterable[str]) -> dict[str, Any]:
    values = recipe.resolved()
    return {key: next(part[key] for part in values.values() if isinstance(part, dict) and key in part) for key in keys}


@pytest.mark.parametrize(("earlier", "later", "holds"), RIVALS)
def test_what_is_set_later_takes_the_place_of_its_rival(earlier: str, later: str, holds: dict[str, Any]) -> None:
    base = BASE if "dataset:" not in earlier else "model: {name_or_path: m}\n"
    assert in_force(load(base + earlier, later), holds) == holds
    write(base + earlier, "parent.yaml")
    key, _, value = later.partition("=")
    child = f"{key.replace('.', ': {')}: {value}{'}' * key.count('.')}"
    assert in_force(load(f"extends: parent.yaml\n{child}\n"), holds) == holds


@pytest.mark.parametrize(
    ("content", "overrides"),
    [
        ("training: {max_steps: 5, num_train_epochs: 2}", ()),
        ("", ("training.max_steps=5", "training.num_train_epochs=2")),
        ("training: {num_train_epochs: 1}", ("training.max_steps=5", "training.num_train_epochs=2")),
        ("training: {max_steps: 1}", ("training={max_steps: 5, num_train_epochs: 2}",)),
        ("", ("training.warmup_steps=5", "training.warmup_ratio=0.1")),
        ("", ("training.global_batch_size=32", "training.gradient_accumulation_steps=4")),
        ("lora: {}", ("quantization.load_in_4bit=true", "quantization.load_in_8bit=true")),
        ("training: {warmup_steps: 5, warmup_ratio: 0.1}", ("training.max_steps=5",)),
        ("training: {max_steps: 4, num_train_epochs: 2}", ("training.max_steps=5",)),
    ],
)
def test_rivals_in_one_layer_stay_a_mistake(content: str, overrides: tuple[str, ...]) -> None:
    assert len(mistakes(BASE + content, *overrides)) == 1


def test_a_null_displaces_nothing() -> None:
    recipe = load(BASE + "training: {num_train_epochs: 2}", "training.max_steps=null")
    assert (recipe.training.num_train_epochs, recipe.training.max_steps) == (2, None)
