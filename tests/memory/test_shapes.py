"""Files in the shapes that people have, from a recipe to learned tokens, and trained together."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RecipeMaker, Train, make_model, write_jsonl
from transformers import PreTrainedTokenizerBase
from wording import Like

from lorafit.engine.data.encode import IGNORED
from lorafit.engine.data.prepare import prepare
from lorafit.engine.tokenizer import load_tokenizer
from lorafit.errors import DataError
from lorafit.plan import plan_recipe
from lorafit.recipe import Recipe
from lorafit.rows.audit import gate

CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
TOOLS = '[{"name": "weather", "description": "the cat", "parameters": {"type": "object", "properties": {}}}]'
END = "<|im_end|>"


def alpaca(folder: Path) -> Path:
    file = folder / "alpaca.json"
    rows = [
        {"instruction": "Add", "input": "1 and 1", "output": "2"},
        {"instruction": "say {{name}}", "input": "", "output": "I am {{name}}"},
    ]
    file.write_text(json.dumps(rows, indent=1))
    return file


def sharegpt(folder: Path) -> Path:
    turns = [
        ("human", "is it warm?"),
        ("gpt", "Where?"),
        ("human", "Rome"),
        ("function_call", CALL),
        ("observation", '{"celsius": 31}'),
        ("gpt", "It is."),
    ]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": TOOLS}
    return write_jsonl(folder / "sharegpt.jsonl", [row])


def parts(folder: Path) -> Path:
    messages = [
        {"role": "system", "content": [{"type": "text", "value": "Be brief"}]},
        {"role": "user", "content": [{"type": "text", "value": "is it warm in "}, {"type": "text", "value": "Rome?"}]},
        {
            "role": "assistant",
            "content": [{"type": "reasoning", "value": "I have to look"}, {"type": "tool_call", "value": CALL}],
        },
        {"role": "tool", "content": [{"type": "text", "value": "31"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "warm"}, {"type": "text", "value": "yes"}]},
    ]
    return write_jsonl(folder / "parts.jsonl", [{"messages": messages, "tools": TOOLS}])


def openai(folder: Path) -> Path:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "is it warm in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "31"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "31 is warm"},
    ]
    return write_jsonl(folder / "openai.jsonl", [{"messages": messages, "tools": json.loads(TOOLS)}])


def preference(folder: Path) -> Path:
    file = folder / "dpo.json"
    row = {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "ho"},
            {"from": "human", "value": "who?"},
        ],
        "chosen": {"from": "gpt", "value": "me"},
        "rejected": {"from": "gpt", "value": "you"},
    }
    file.write_text(json.dumps([row]))
    return file


def kto(folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}], "label": label}
        for text, label in (("good", True), ("bad", False))
    ]
    return write_jsonl(folder / "kto.jsonl", rows)


def text(folder: Path) -> Path:
    return write_jsonl(folder / "text.jsonl", [{"text": "the cat sat"}])


def table(folder: Path) -> Path:
    file = folder / "table.csv.gz"
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerows([["question", "answer"], ["what?\nthis", "that, yes"]])
    file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + buffer.getvalue().encode()))
    return file


def parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    rows = [{"task": "Add", "instances": [{"input": "1 1", "output": "2"}]}]
    file = folder / "nested.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def odd(folder: Path) -> Path:
    (folder / "odd").mkdir()
    for name in ("a", "b"):
        write_jsonl(
            folder / "odd" / f"{name}.jsonl", [{"q": f"what is {name}", "options": ["no", f"{name}!"], "right": 1}]
        )
    return folder / "odd" / "*.jsonl"


SHAPES: dict[Callable[[Path], Path], tuple[str, dict[str, Any], list[list[str]]]] = {
    # what writes the file: its format, what the recipe says of it, and what is learned of each row
    alpaca: ("alpaca", {}, [["2" + END], ["I am {{name}}" + END]]),
    sharegpt: ("sharegpt", {}, [["Where?" + END, CALLED, "It is." + END]]),
    parts: (
        "messages",
        {},
        [["<think>\nI have to look\n</think>\n\n" + CALLED, "<think>\nwarm\n</think>\n\nyes" + END]],
    ),
    openai: ("messages", {}, [[CALLED, "<think>\n31 is warm\n</think>\n\nYes." + END]]),
    preference: ("preference", {}, [["me" + END]]),
    kto: ("unpaired_preference", {}, [["good" + END]]),
    text: ("text", {}, [["the cat sat" + END]]),
    table: ("alpaca", {"columns": {"instruction": "question", "output": "answer"}}, [["that, yes" + END]]),
    parquet: (
        "alpaca",
        {"columns": {"instruction": "task", "input": "instances.0.input", "output": "instances.0.output"}},
        [["2" + END]],
    ),
    odd: (
        "prompt_completion",
        {"template": {"prompt": "{{ q }}? ", "completion": "{{ options[right] }}"}},
        [["a!" + END], ["b!" + END]],
    ),
}


def learned(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    runs = itertools.groupby(row["labels"], key=lambda label: label != IGNORED)
    answers = [tokenizer.decode(list(run)).strip() for is_learned, run in runs if is_learned]
    return [answer.removeprefix("<think>\n\n</think>\n\n") for answer in answers]  # what Qwen3 writes for no thoughts


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a longer context, for what a template says of tools is long in a tiny vocabulary."""
    return make_model(tmp_path_factory.mktemp("models") / "long", max_position_embeddings=1024)


@pytest.mark.parametrize("write", SHAPES, ids=lambda write: write.__name__)
def test_a_file_of_each_shape(write: Any, recipe: RecipeMaker, long_model: Path, tmp_path: Path) -> None:
    format, says, answers = SHAPES[write]
    path = recipe(
        model={"name_or_path": str(long_model), "chat_template": "qwen3"},
        dataset={"train": [{"path": str(write(tmp_path)), **says}], "audit": {"prompt_differs": None}},
        training={"max_length": 1024},
    )
    plan = plan_recipe(Recipe.load(path), path)
    assert plan.choices["dataset.train.0.format"].value == format
    tokenizer = load_tokenizer(plan)
    data = prepare(plan.data, tokenizer)
    gate(data.audit, plan.data.audit)
    assert [learned(row, tokenizer) for row in data.train] == answers
    if write is kto:
        assert data.audit.train[0].dropped == {"label is false": 1}
        assert any("label is false" in remark for remark in plan.remarks)


def test_all_shapes_train_together(recipe: RecipeMaker, train: Train, long_model: Path, tmp_path: Path) -> None:
    sources = [{"path": str(write(tmp_path)), **says} for write, (_, says, _) in SHAPES.items()]
    path = recipe(
        model={"name_or_path": str(long_model), "chat_template": "qwen3"},
        dataset={"train": sources, "audit": {"prompt_differs": None}},
        training={"max_steps": 2, "max_length": 1024, "per_device_train_batch_size": 12},
    )
    run = train(path)
    audit = run.load_manifest()["data"]["audit"]
    assert [source["rows"] for source in audit["train"]] == [len(answers) for _, _, answers in SHAPES.values()]
    assert audit["training_rows"]["rows"] == sum(len(answers) for _, _, answers in SHAPES.values())


@pytest.mark.parametrize("where", ["row", "turn"])
@pytest.mark.parametrize("how", [{"train": False}, {"weight": 0}])
def test_what_says_that_it_is_not_learned_is_not(
    where: str, how: dict[str, Any], recipe: RecipeMaker, tmp_path: Path
) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    marked = [turns[0], {**turns[1], **how}, *turns[2:]] if where == "turn" else turns
    rows = [{"messages": marked, **(how if where == "row" else {})}, {"messages": turns[:2]}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    for template in (None, "qwen3"):  # turn by turn, and by markers
        model = {"chat_template": template} if template else {}
        path = recipe(model=model, dataset={"train": [{"path": str(file)}]})
        plan = plan_recipe(Recipe.load(path), path)
        tokenizer = load_tokenizer(plan)
        data = prepare(plan.data, tokenizer)
        found = [learned(row, tokenizer) for row in data.train]
        if where == "turn":
            assert found == [["four" + END], ["two" + END]]
            assert data.audit.train[0].dropped == {}
        else:
            assert found == [["two" + END]]
            assert data.audit.train[0].dropped == {"train: false": 1}


# --- what would go wrong in silence ---------------------------------------------------------------


def planned(recipe: RecipeMaker, file: Path, **source: Any) -> Any:
    path = recipe(dataset={"train": [{"path": str(file), **source}]})
    return plan_recipe(Recipe.load(path), path)


@pytest.mark.parametrize("label", [0, 1, "0", "1"])
def test_a_label_that_may_be_a_class_wants_a_format(label: Any, recipe: RecipeMaker, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "bad", "label": label}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: label .*dataset\.train\.0\.format"):
        planned(recipe, file)
    assert planned(recipe, file, format="prompt_completion").data.train[0].format == "prompt_completion"


def test_columns_that_are_not_read_are_said(recipe: RecipeMaker, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "context": "b", "response": "c", "category": "d"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    some = planned(recipe, file, format="alpaca", columns={"output": "response"})
    assert Like("dataset.train.0: not read: … context, category") in some.remarks
    more = planned(recipe, file, format="alpaca", columns={"output": "response", "input": "context"})
    assert Like("dataset.train.0: not read: … column category") in more.remarks


def test_hidden_copies_are_no_data(recipe: RecipeMaker, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for file in (folder / "rows.jsonl", folder / ".ipynb_checkpoints" / "rows-checkpoint.jsonl"):
        write_jsonl(file, [{"text": "once"}])
    assert planned(recipe, folder).data.train[0].rows == 1


def test_all_but_an_untrained_turn_is_clean_data(recipe: RecipeMaker, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "train": False},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    path = recipe(dataset={"train": [{"path": str(file)}], "loss_on": "all"})
    plan = plan_recipe(Recipe.load(path), path)
    tokenizer = load_tokenizer(plan)
    data = prepare(plan.data, tokenizer)
    gate(data.audit, plan.data.audit)
    assert "two" not in "".join(learned(data.train[0], tokenizer))
    assert data.audit.train[0].answers == data.audit.train[0].ends_learned == 1


def test_rendered_text_is_not_ended_twice(recipe: RecipeMaker, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "the cat<|im_end|>\n"}])
    plan = planned(recipe, file)
    tokenizer = load_tokenizer(plan)
    assert tokenizer.decode(prepare(plan.data, tokenizer).train[0]["input_ids"]) == "the cat<|im_end|>\n"


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ({"content": "<think>long</think>short"}, "context_left_out"),
        ({"content": "short", "reasoning_content": "x <|im_end|> y"}, "special_tokens_in_content"),
    ],
)
def test_words_that_a_template_drops_or_turns_into_control(
    message: dict[str, Any], rule: str, recipe: RecipeMaker, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['reasoning_content'] or '') }}"
        "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **message}]}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    path = recipe(model={"chat_template": str(template)}, dataset={"train": [{"path": str(file)}]})
    plan = plan_recipe(Recipe.load(path), path)
    data = prepare(plan.data, load_tokenizer(plan))
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*dataset\.audit\.{rule}"):
        gate(data.audit, plan.data.audit)


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
def test_weights_do_not_hide_duplicates(weight: float, recipe: RecipeMaker, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n % 4}"} for n in range(12)])
    plan = planned(recipe, file, weight=weight)
    data = prepare(plan.data, load_tokenizer(plan))
    with pytest.raises(DataError, match=r"dataset\.audit\.duplicates: 8 of 12, 66\.67%"):
        gate(data.audit, plan.data.audit)
