"""Recipes: what is read, and how every mistake is reported."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from wording import Like

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
    assert recipe.training.learning_rate is None
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
    assert only_mistake(BASE + "training:\n  packing: no") == Like(
        "r.yaml:7:12: training.packing: … true … false … 'no'"
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
        ("preference",),
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
        ("lora:\n  lora_alpah: 3", "7:3: lora.lora_alpah: … 'lora_alpha'"),
        ("trainig: {}", "6:1: trainig: … 'training'"),
        ("extend: x.yaml", "6:1: extend: … 'extends'"),
        ("      fromat: text", "6:7: dataset.train.0.fromat: … 'format'"),
        ("  validation: [{path: x, splti: a}]", "6:26: dataset.validation.0.splti: … 'split'"),
        ("lr: 1e-4", "6:1: lr: … 'training.learning_rate'"),
        ("training: {lr: 1e-4}", "6:12: training.lr: … 'learning_rate'"),
        ("lora: {alpha: 3}", "6:8: lora.alpha: … 'lora_alpha'"),
        ("lora: {learning_rate: 3}", "6:8: lora.learning_rate: … 'training.learning_rate'"),
        ("max_seq_length: 3", "6:1: max_seq_length: … 'training.max_length'"),
        ("lora.r: 3", "6:1: lora.r: … lora: {r: …}"),
        (
            "zzz: 3",
            "6:1: zzz: … model, quantization, lora, … output_dir, extends",
        ),
        ("lora: {'<<': {}}", "6:8: lora.<<: … " + ", ".join(LoraSection.model_fields)),
    ],
)
def test_an_unknown_key_suggests_the_known_one(added: str, mistake: str) -> None:
    assert only_mistake(BASE + added) == Like(f"r.yaml:{mistake}")


def test_what_is_missing_says_what_it_is() -> None:
    assert mistakes("output_dir: x") == [
        Like("r.yaml:1:1: model: … missing"),
        Like("r.yaml:1:1: dataset: … missing"),
    ]
    assert mistakes("model: {}\ndataset:\n  train:\n    - name: x\n") == [
        Like("r.yaml:1:1: model.name_or_path: … missing … Hub id"),
        Like("r.yaml:4:7: dataset.train.0.path: … missing … .jsonl"),
    ]
    # The misspelt key is the only mistake: what it was meant for isn't missing.
    assert only_mistake(BASE.replace("model:", "modle:")) == Like("r.yaml:1:1: modle: … 'model'")


# --- wrong values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("added", "mistake"),
    [
        ("training: {learning_rate: fast}", "6:27: training.learning_rate: … number … 'fast'"),
        ("training: {learning_rate: 0}", "6:27: training.learning_rate: … above 0 … 0"),
        ("training: {learning_rate: .inf}", "6:27: training.learning_rate: … finite … inf"),
        ("training: {learning_rate: 1e999}", "6:27: training.learning_rate: … finite … inf"),
        ("training: {learning_rate: '1e-4'}", "6:27: training.learning_rate: … number … '1e-4'"),
        ("training: {weight_decay: -1}", "6:26: training.weight_decay: … 0 … -1"),
        ("training: {adam_beta1: 1}", "6:24: training.adam_beta1: … below 1 … 1"),
        ("training: {seed: 4294967296}", "6:18: training.seed: … below 4.29497e+09 … 4294967296"),
        ("training: {max_steps: 1.5}", "6:23: training.max_steps: … whole … 1.5"),
        ("training: {max_steps: true}", "6:23: training.max_steps: … whole … true"),
        ("training: {packing: 1}", "6:21: training.packing: … true … false … 1"),
        (
            "training: {per_device_train_batch_size: 0}",
            "6:41: training.per_device_train_batch_size: … above 0 … auto … 0",
        ),
        ("training: {report_to: wandb}", "6:23: training.report_to: … list … 'wandb'"),
        (
            "training: {report_to: [wandb, wnadb]}",
            "6:31: training.report_to.1: … tensorboard | wandb | … | flyte … 'wnadb' … 'wandb'",
        ),
        ("training: []", "6:11: training: … section … []"),
        ("output_dir: 5", "6:13: output_dir: … text … 5"),
        ("output_dir: ''", "6:13: output_dir: … empty … ''"),
        ("output_dir: [a, b]", "6:13: output_dir: … text … ['a', 'b']"),
        ("lora: {r: null}", "6:11: lora.r: … whole … null"),
        ("lora: {rank_pattern: {q: -1}}", "6:26: lora.rank_pattern.q: … above 0 … -1"),
        (
            "lora: {bias: nnoe}",
            "6:14: lora.bias: … none | all | … 'nnoe' … 'none'",
        ),
        (
            "lora: {init_lora_weights: lofq}",
            "6:27: lora.init_lora_weights: … false … pissa | pissa_niter_N | … eva … 'lofq' … 'loftq'",
        ),
        ("  validation: 1.5", "6:15: dataset.validation: … below 1 … list … 1.5"),
        ("  validation: held.jsonl", "6:15: dataset.validation: … number … list … 'held.jsonl'"),
        ("  validation: {float: 1}", "6:3: dataset.validation: … number … list … {'float': 1}"),
        ("  validation: [{path: 1}]", "6:23: dataset.validation.0.path: … text … 1"),
        ("      columns: {output: 1}", "6:25: dataset.train.0.columns.output: … text … 1"),
        ("      columns: {output: [a]}", "6:25: dataset.train.0.columns.output: … text … ['a']"),
        ("model2: 3\n", "6:1: model2: … 'model'"),
    ],
)
def test_a_wrong_value(added: str, mistake: str) -> None:
    assert only_mistake(BASE + added) == Like(f"r.yaml:{mistake}")


def test_a_name_that_begins_like_a_choice_suggests_it() -> None:
    assert only_mistake(BASE + "training: {optim: adamw}") == Like(
        "r.yaml:6:19: training.optim: … 'adamw' … 'adamw_torch'"
    )


def test_no_sources() -> None:
    content = "model: {name_or_path: a/b}\ndataset: {train: []}"
    assert only_mistake(content) == Like("r.yaml:2:18: dataset.train: … empty … []")
    content = "model: {name_or_path: a/b}\ndataset: {train: [rows.jsonl]}"
    assert only_mistake(content) == Like("r.yaml:2:19: dataset.train.0: … section … 'rows.jsonl'")


def test_values_and_paths_in_messages_are_short_and_printable() -> None:
    long = only_mistake(BASE + f"lora: {{r: {'x' * 10_000}}}")
    assert len(long) < 150
    assert long.endswith("xxx…")
    assert len(only_mistake(BASE + f"lora: {{r: [{'1, ' * 500}]}}")) < 150
    assert len(only_mistake(BASE + f"{'k' * 1000}: 1")) < 500
    assert len(only_mistake(BASE, f"lora.r={'x' * 10_000}")) < 250
    assert mistakes(BASE + '"a\\nb\\e[31m\\ud800": 1\noutput_dir: "\\udfff"') == [
        Like("r.yaml:6:1: a\\nb\\x1b[31m\\ud800: … \\ud800"),
        Like("r.yaml:6:1: a\\nb\\x1b[31m?: … output_dir, extends"),
        Like("r.yaml:7:13: output_dir: … \\udfff"),
    ]
    assert only_mistake(BASE + 'lora: {r: "a\\nb"}') == Like("r.yaml:6:11: lora.r: … whole … 'a\\nb'")
    assert only_mistake(BASE + "lora: {r: !a%0Ab 8}") == Like("r.yaml:6:11: lora.r: … !a\\nb")


# --- YAML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        ("", "1:1: is empty"),
        ("# nothing\n", "1:1: is empty"),
        ("- a\n", "1:1: … mapping … `model:`"),
        ("text", "1:1: … mapping … `model:`"),
        (BASE + "lora:\n", "6:6: lora: … empty … {} … null"),
        (BASE + "lora:\n  r:\n", "7:5: lora.r: … empty … {} … null"),
        (BASE + "model: {}\n", "6:1: model: … twice … line 1"),
        (BASE + "lora:\n  r: 8\n  r: 16\n", "8:3: lora.r: … twice … line 7"),
        (BASE + "      path: x\n", "6:7: dataset.train.0.path: … twice … line 5"),
        (BASE + "lora: {<<: {r: 1}, <<: {r: 2}}", "6:20: lora.<<: … twice … line 6"),
        (BASE + "lora: {<<: 3}", "6:12: lora.<<: … mappings"),
        (BASE + "lora: {r: !!int 8}", "6:11: lora.r: … !!int"),
        (BASE + "lora: !!python/object:os.system {}", "6:7: lora: … !!python/object:os.system"),
        (BASE + "lora: {!foo r: 8}", "6:8: lora.r: … !foo"),
        (BASE + "? [a]\n: 1", "6:3: … key … text"),
        (BASE + "---\n" + BASE, "6:1: … second document"),
        (BASE + "lora: [", "6:8: … '<stream end>' … line 6"),
        (BASE + "lora:\n\tr: 8", "7:1: … '\\t' … spaces"),
        (BASE + "output_dir: @runs", "6:13: … '@' … quote"),
        (BASE + "output_dir: a: b", "6:14: … ': '"),
        (BASE + "lora: *gone", "6:7: … alias 'gone'"),
        (BASE + "lora: &a {r: &a 8}", "6:14: … anchor … 'a'"),
        (BASE + "lora: !x!y {}", "6:7: … tag … '!x!'"),
        (BASE + 'output_dir: "\\UFFFFFFFF"', "6:16: … escape"),
        (BASE + "output_dir: a\0b", "6:14: … #x0000"),
        (BASE + "output_dir: \x1b[31m", "6:13: … #x001b"),
        (BASE.replace("\n", "\r\n") + "output_dir: \x07", "6:13: … #x0007"),
        (BASE.encode() + b"output_dir: caf\xe9\n", "6:16: … UTF-8"),
        (BASE.encode("utf-16"), "1:1: … UTF-8"),
        (BASE + "lora: {r: " + "9" * 5000 + "}", "6:11: lora.r: … number … large … quote"),
        (BASE + "lora: {r: 0x" + "f" * 5000 + "}", "6:11: lora.r: … number … large … quote"),
    ],
)  # fmt: skip
def test_strict_yaml(content: str | bytes, mistake: str) -> None:
    assert only_mistake(content) == Like(f"r.yaml:{mistake}")


def test_positions_with_a_byte_order_mark_and_crlf() -> None:
    content = "\ufefflr: 3\r\n" + BASE.replace("\n", "\r\n") + "lora: {r: x}\r\n"
    assert mistakes(content) == [
        Like("r.yaml:1:1: lr: … 'training.learning_rate'"),
        Like("r.yaml:7:11: lora.r: … whole … 'x'"),
    ]


def test_what_is_too_much() -> None:
    too_many = "… 10000 values … aliases"
    assert only_mistake("#" * 300_000) == Like("r.yaml: … 256 KiB")
    assert only_mistake("[" * 60_000) == Like("r.yaml:1:65: … 64 levels")
    assert only_mistake(BASE + "a: " + "{a: " * 200 + "}" * 200) == Like("r.yaml:6:253: … 64 levels")
    assert only_mistake("a: [" + "1," * 100_000 + "]") == Like(too_many)
    bomb = BASE + "a0: &a0 [1, 1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 60))
    assert only_mistake(bomb) == Like(f"r.yaml:10:5: a4: {too_many}")
    merges = BASE + "a: &a {" + ", ".join(f"k{n}: 1" for n in range(900)) + "}\nb: {<<: [" + "*a, " * 5000 + "]}"
    assert only_mistake(merges) == Like(too_many)
    assert only_mistake(BASE + "lora: &a {rank_pattern: *a}") == Like("r.yaml:6:7: lora.rank_pattern: … alias")
    chain = BASE + "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} {'[' * 40}*a{n - 1}{']' * 40}\n" for n in range(1, 9))
    assert only_mistake(chain) == Like("… 64 levels … aliases")


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
        Like("r.yaml:6:14: dataset.train.0.split: … text … 3"),
        Like("r.yaml:6:14: dataset.train.0.name: … text … 3"),
    ]


def test_files_that_cannot_be_read(here: Path) -> None:
    (here / "folder").mkdir()
    (here / "loop").symlink_to("loop")
    assert mistakes_of("folder") == [Like("folder: … folder … recipe")]
    assert mistakes_of("gone.yaml") == [Like("gone.yaml: … No such file")]
    assert mistakes_of("loop") == [Like("loop: … symbolic links")]
    assert mistakes_of("a\0b.yaml") == [Like("a\\x00b.yaml: … path")]
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
    assert only_mistake(BASE + "lora:\n  r: ${GONE_VARIABLE}") == Like(
        "r.yaml:7:6: lora.r: … GONE_VARIABLE … ${GONE_VARIABLE:-…}"
    )


def test_a_wrong_value_from_the_environment_is_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "high")
    assert only_mistake(BASE + "lora:\n  r: ${RANK}") == Like("r.yaml:7:6: lora.r: … whole … ${RANK}")


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
        Like("r.yaml:3:17: lora.lora_dropout: … below 1 … 2"),
        Like("up/parent.yaml:7:6: lora.r: … whole … 'x'"),
        Like("up/parent.yaml:8:3: lora.lora_alpah: … 'lora_alpha'"),
        Like("up/parent.yaml:9:21: training.seed: … twice … line 9"),
    ]
    # A cross-field rule that the child breaks on the parent's value points at that value.
    write(BASE + "training:\n  global_batch_size: 8\n", "up/parent.yaml")
    assert only_mistake("extends: up/parent.yaml\ntraining: {per_device_train_batch_size: 3}") == Like(
        "up/parent.yaml:7:22: training.global_batch_size: … multiple … per_device_train_batch_size (3)"
    )


def test_missing_parents_are_reported_at_extends_with_the_other_mistakes() -> None:
    write("extends: [gone.yaml, ../r.yaml, '', ../up]", "up/parent.yaml")
    assert mistakes("extends:\n  - up/parent.yaml\n  - nope.yaml\nlora: {r: x}\nlr: 3\n") == [
        Like("r.yaml:3:5: extends: … nope.yaml"),
        Like("r.yaml:4:11: lora.r: … whole … 'x'"),
        Like("r.yaml:5:1: lr: … 'training.learning_rate'"),
        Like("up/parent.yaml:1:11: extends: … up/gone.yaml … exist"),
        Like("up/parent.yaml:1:22: extends: … circle … r.yaml -> up/parent.yaml -> r.yaml"),
        Like("up/parent.yaml:1:33: extends: … path … list"),
        Like("up/parent.yaml:1:37: extends: … up/../up … file"),
    ]


def test_extends_that_cannot_be_followed() -> None:
    assert only_mistake("extends: r.yaml\n" + BASE) == Like("r.yaml:1:10: extends: … circle … r.yaml -> r.yaml")
    assert only_mistake("extends: 3\n" + BASE) == Like("r.yaml:1:10: extends: … path … list")
    assert only_mistake("extends: {a: b}\n" + BASE) == Like("r.yaml:1:10: extends: … path … list")
    assert only_mistake('extends: "a\\0b"\n' + BASE) == Like("r.yaml:1:10: extends: … not a path")
    assert only_mistake(f"extends: {'x' * 5000}\n" + BASE) == Like("r.yaml:1:10: extends: … exist")
    write("a: [", "broken.yaml")
    assert only_mistake("extends: broken.yaml\n" + BASE).startswith("broken.yaml:1:5: not YAML: ")
    for number in range(100):
        write(f"extends: p{number + 1}.yaml", f"p{number}.yaml")
    assert only_mistake("extends: p0.yaml\n" + BASE) == Like("p62.yaml:1:10: extends: … 64 files")


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
        ("lora.r=x", "lora.r: … whole … 'x'"),
        ("lora={r: x}", "lora.r: … whole … 'x'"),
        ("lora.lora_alpah=1", "lora.lora_alpah: … 'lora_alpha'"),
        ("lr=1", "lr: … 'training.learning_rate'"),
        ("lora.r=", "lora.r: is empty"),
        ("lora.r=[", "lora.r: … '<stream end>' … line 1"),
        ("lora.r=!!int 3", "lora.r: … !!int"),
        ("lora", "… key=value"),
        ("=3", "… key=value"),
        ("lora..r=3", "… key=value"),
        ("extends=x.yaml", "extends: … file"),
        ("model.name_or_path.x=1", "model.name_or_path.x: … model.name_or_path … single value"),
        ("dataset.train.1.path=x", "dataset.train.1: … dataset.train … 1 … index"),
        ("dataset.train.path=x", "dataset.train.path: … dataset.train … 1 … index"),
        ("dataset.train.-1.path=x", "dataset.train.-1: … dataset.train … 1 … index"),
        ("dataset.train.0=null", "dataset.train.0: … section … null"),
        ("model=null", "model: … missing"),
    ],
)  # fmt: skip
def test_a_mistake_in_set_is_reported_there(override: str, mistake: str) -> None:
    assert only_mistake(BASE, override) == Like(f"--set {override}: {mistake}")


def test_set_with_hostile_keys() -> None:
    assert "key=value" in only_mistake(BASE, ".".join("a" * 10_000) + "=1")
    assert "index" in only_mistake(BASE, f"dataset.train.{'9' * 5000}.path=1")
    assert only_mistake(BASE, "lora.r=a\nb: c").startswith("--set lora.r=a\\nb: c: lora.r: ")
    assert only_mistake(BASE, "output_dir=\udcff") == Like("--set output_dir=\\udcff: output_dir: … #xdcff")


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
        Like("--set lora.bias=some: lora.bias: … none | all | lora_only … 'some'"),
        Like("--set nonsense: … key=value"),
        Like("r.yaml:6:1: lr: … 'training.learning_rate'"),
        Like("r.yaml:8:6: lora.r: … !!int"),
        Like("r.yaml:9:3: lora.lora_alpah: … 'lora_alpha'"),
        Like("r.yaml:10:3: lora.r: … twice … line 8"),
        Like("r.yaml:11:17: lora.lora_dropout: … number … 'high'"),
        Like("r.yaml:12:1: quantization.load_in_4bit: … exactly one … load_in_8bit"),
        Like("r.yaml:14:8: training.seed: … empty … {} … null"),
        Like("r.yaml:15:14: training.max_steps: … max_steps … num_train_epochs"),
    ]


def test_a_rule_says_nothing_about_a_field_that_is_wrong_itself() -> None:
    assert len(mistakes(BASE + "lora: {}\nquantization: {load_in_4bit: treu}")) == 1
    assert len(mistakes(BASE + "lora: {}\nquantization: {load_in_4bti: true}")) == 1
    assert len(mistakes(BASE + "training: {eval_strategy: stepz, eval_steps: 3}")) == 1
    assert len(mistakes(BASE + "  validaton: 0.1\ntraining: {early_stopping_patience: 3}")) == 1


FOUR_BIT = "quantization: {load_in_4bit: true}\n"
HELD_OUT = "  validation: 0.1\n"
EXACTLY_ONE = "… exactly one … load_in_4bit … load_in_8bit"
NEEDS_ROWS = "… dataset.validation"


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
            "7:57: quantization.bnb_4bit_quant_type: … load_in_8bit",
        ),
        (
            "lora: {}\nquantization: {load_in_4bit: true, llm_int8_threshold: 5}",
            "7:56: quantization.llm_int8_threshold: … load_in_4bit",
        ),
        (
            FOUR_BIT,
            "6:1: quantization: … `lora: {}`",
        ),
        (
            "lora: {init_lora_weights: loftq}",
            "6:27: lora.init_lora_weights: loftq … quantization.load_in_4bit: true",
        ),
        (
            FOUR_BIT + "lora: {init_lora_weights: pissa_niter_4}",
            "7:27: lora.init_lora_weights: pissa_niter_4 … quantized … loftq",
        ),
        (
            FOUR_BIT + "lora: {init_lora_weights: loftq}",
            "7:27: lora.init_lora_weights: loftq's … lora_alpha … r",
        ),
        (
            "lora: {init_lora_weights: olora, use_rslora: true}",
            "6:27: lora.init_lora_weights: olora … use_rslora",
        ),
        (
            "lora: {init_lora_weights: pissa, alpha_pattern: {q: 2}}",
            "6:27: lora.init_lora_weights: pissa … rank_pattern … alpha_pattern",
        ),
        (
            FOUR_BIT + "lora: {init_lora_weights: eva}",
            "7:27: lora.init_lora_weights: eva … quantization",
        ),
        (
            "lora: {init_lora_weights: eva, use_dora: true}",
            "6:27: lora.init_lora_weights: eva … use_dora",
        ),
        (
            "lora: {target_modules: []}",
            "6:24: lora.target_modules: … empty … all-linear",
        ),
        (
            "lora: {target_modules: [q_proj, model.lm_head]}",
            "6:33: lora.target_modules.1: … lm_head … modules_to_save",
        ),
        (
            "      format: text\n  loss_on: completion",
            "6:15: dataset.train.0.format: text … loss_on: completion … loss_on: all",
        ),
        (
            "      columns: {outptu: a}\n      format: alpaca",
            "6:25: dataset.train.0.columns.outptu: … alpaca, … instruction, … output, … weight",
        ),
        (
            HELD_OUT.replace("0.1", "[{path: x, columns: {role: a}}]"),
            "6:42: dataset.validation.0.columns.role: … auto, … chosen, … messages, … text",
        ),
        (
            "      template: {promt: a}\n      format: prompt_completion",
            "6:25: dataset.train.0.template.promt: … prompt_completion, … prompt, … completion, … weight",
        ),
        (
            "      template: {prompt: a}\n      columns: {prompt: b}",
            "7:25: dataset.train.0.columns.prompt: … template",
        ),
        (
            "      template: a\n      format: alpaca",
            "6:17: dataset.train.0.template: … `text`; … alpaca",
        ),
        (
            HELD_OUT.replace("0.1", "[{path: x, weight: 2}]"),
            "6:34: dataset.validation.0.weight: … validation rows",
        ),
        (
            "  min_length: 9\ntraining: {max_length: 8}",
            "6:15: dataset.min_length: … training.max_length (8)",
        ),
        (
            "  streaming: true",
            "6:14: dataset.streaming: … training.max_steps",
        ),
        (
            "  streaming: true\n  validation: 0.1\ntraining: {max_steps: 2}",
            "7:15: dataset.validation: … fraction … stream",
        ),
        (
            "  streaming: true\ntraining: {max_steps: 2, dataloader_num_workers: 1}",
            "7:50: training.dataloader_num_workers: … 0 … stream",
        ),
        (
            "  streaming: true\ntraining: {max_steps: 2, save_strategy: epoch}",
            "7:41: training.save_strategy: … stream … steps",
        ),
        (
            "  streaming: true\ntraining: {max_steps: 2, train_sampling_strategy: group_by_length}",
            "7:51: training.train_sampling_strategy: … stream … random",
        ),
        ("training: {early_stopping_patience: 3}", f"6:37: training.early_stopping_patience: {NEEDS_ROWS}"),
        ("training: {load_best_model_at_end: true}", f"6:36: training.load_best_model_at_end: {NEEDS_ROWS}"),
        ("training: {eval_strategy: epoch}", f"6:27: training.eval_strategy: {NEEDS_ROWS}"),
        ("training: {per_device_eval_batch_size: 2}", f"6:40: training.per_device_eval_batch_size: {NEEDS_ROWS}"),
        (
            "training: {max_steps: 3, num_train_epochs: 1}",
            "6:23: training.max_steps: … max_steps … num_train_epochs",
        ),
        (
            "training: {warmup_steps: 0, warmup_ratio: 0}",
            "6:26: training.warmup_steps: … warmup_steps … warmup_ratio",
        ),
        (
            "training: {global_batch_size: 8, gradient_accumulation_steps: 2}",
            "6:31: training.global_batch_size: … gradient_accumulation_steps … auto",
        ),
        (
            "training: {global_batch_size: 8, per_device_train_batch_size: 3}",
            "6:31: training.global_batch_size: … multiple … per_device_train_batch_size (3)",
        ),
        ("training: {save_strategy: steps}", "6:27: training.save_strategy: … save_steps"),
        (HELD_OUT + "training: {eval_strategy: steps}", "7:27: training.eval_strategy: … eval_steps"),
        ("training: {save_steps: 2}", "6:24: training.save_steps: … save_strategy: steps"),
        (
            HELD_OUT + "training: {eval_steps: 2}",
            "7:24: training.eval_steps: … eval_strategy: steps",
        ),
        (
            HELD_OUT + "training: {eval_strategy: no, early_stopping_patience: 1}",
            "7:56: training.early_stopping_patience: … evaluations … eval_strategy: no",
        ),
        (
            HELD_OUT + "training: {eval_strategy: no, load_best_model_at_end: true}",
            "7:55: training.load_best_model_at_end: … evaluations … eval_strategy: no",
        ),
        (
            HELD_OUT + "training: {load_best_model_at_end: true, save_strategy: no}",
            "7:57: training.save_strategy: … best adapter … auto",
        ),
        (
            HELD_OUT + "training: {eval_strategy: steps, eval_steps: 4, evals_per_epoch: 2}",
            "7:66: training.evals_per_epoch: … eval_strategy: steps",
        ),
        (
            HELD_OUT + "training: {load_best_model_at_end: false, metric_for_best_model: loss}",
            "7:66: training.metric_for_best_model: … load_best_model_at_end: false",
        ),
        ("training: {metric_for_best_model: loss}", f"6:35: training.metric_for_best_model: {NEEDS_ROWS}"),
        ("training: {evals_per_epoch: 2}", f"6:29: training.evals_per_epoch: {NEEDS_ROWS}"),
        (
            "  streaming: true\ntraining: {max_steps: 2, saves_per_epoch: 2}",
            "7:43: training.saves_per_epoch: … stream … steps",
        ),
        (
            "merge: {max_kl: 0.2}",
            "6:1: merge: … adapter … `lora: {}`",
        ),
        (
            "lora: {}\nmerge: {base_weights: original}",
            "7:23: merge.base_weights: … quantization",
        ),
    ],
)
def test_each_rule_between_fields(added: str, mistake: str) -> None:
    assert only_mistake(BASE + added) == Like(f"r.yaml:{mistake}")


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
        HELD_OUT + "training: {load_best_model_at_end: true, eval_strategy: steps, eval_steps: 4, "
        "save_strategy: steps, save_steps: 6}",
        HELD_OUT
        + "training: {load_best_model_at_end: true, eval_strategy: epoch, save_strategy: steps, save_steps: 6}",
        HELD_OUT + "training: {evals_per_epoch: 3, saves_per_epoch: 1, metric_for_best_model: loss}",
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
        "dataset: {train: [{path: d.jsonl}], validation: 0.1}\ntraining: {eval_strategy: steps, eval_steps: 5}",
        "training.evals_per_epoch=2",
        {"eval_strategy": "auto", "eval_steps": None, "evals_per_epoch": 2},
    ),
    (
        "training: {saves_per_epoch: 5}",
        "training.save_strategy=no",
        {"save_strategy": "no", "saves_per_epoch": None},
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
