"""Reading data files: rows in order, and errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafit.errors import DataError
from lorafit.rows import Example, Row, data_files, detect_format, is_local, read_rows, to_example

Format = Any


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Paths in messages are as given, so the tests run in the folder and give short ones."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(name: str, content: str | bytes) -> list[Row]:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(name))


def error_of(name: str, content: str | bytes) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(name, content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def example(format: Format, fields: dict[str, Any], **columns: str) -> Example:
    return to_example(Row("a.jsonl:3", fields), format, columns)


def example_error(format: Format, fields: dict[str, Any], **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        example(format, fields, **columns)
    assert str(caught.value).isprintable()
    return str(caught.value)


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": "zwei ü"}\n'),
        ("a.jsonl", '\ufeff{"text": "one"}\r\n\r\n  \n{"text": "zwei ü"}'),
        ("a.json", '\ufeff[{"text": "one"},\r\n{"text": "zwei ü"}]'),
        ("a.json", '{"version": 1, "data": [{"text": "one"}, {"text": "zwei ü"}]}'),
        ("a.csv", "text\none\nzwei ü\n"),
        ("a.csv", '\ufefftext\r\n"one"\r\n\r\nzwei ü\r\n'),
        ("with a space/ä.jsonl", '{"text": "one"}\n{"text": "zwei ü"}\n'),
    ],
)
def test_rows_are_read_in_order_whatever_the_line_ends(name: str, content: str) -> None:
    assert [row.fields for row in rows_of(name, content)] == [{"text": "one"}, {"text": "zwei ü"}]


def test_a_row_knows_its_place() -> None:
    assert [row.place for row in rows_of("a.jsonl", '{"text": "1"}\n\n{"text": "2"}\n')] == ["a.jsonl:1", "a.jsonl:3"]
    rows = rows_of("a.json", '[{"text": "1"},\n{"text": "2"}]')
    assert [row.place for row in rows] == ["a.json: row 1", "a.json: row 2"]
    # A quoted cell may hold line breaks; the place is the line where the row ends.
    rows = rows_of("a.csv", 'text,n\n"1\n1",x\n2,y\n')
    assert [(row.place, row.fields) for row in rows] == [
        ("a.csv:3", {"text": "1\n1", "n": "x"}),
        ("a.csv:4", {"text": "2", "n": "y"}),
    ]


def test_parquet(here: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [turns(("user", "hi"), ("assistant", "yes")), turns(("user", "é"), ("assistant", "no"))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "a.parquet")
    assert list(read_rows("a.parquet")) == [Row("a.parquet: row 1", rows[0]), Row("a.parquet: row 2", rows[1])]
    whole = (here / "a.parquet").read_bytes()
    assert error_of("bad.parquet", "not a table").startswith("bad.parquet: not parquet: ")
    assert error_of("empty.parquet", "").startswith("empty.parquet: not parquet: ")
    assert error_of("cut.parquet", whole[:-20]).startswith("cut.parquet: ")
    assert error_of("torn.parquet", whole[:4] + b"\xff" * 40 + whole[44:]).startswith("torn.parquet: ")


def test_a_cell_of_ten_megabytes() -> None:
    text = "x" * 10_000_000
    assert rows_of("a.jsonl", json.dumps({"text": text}))[0].fields["text"] == text
    assert rows_of("a.json", json.dumps([{"text": text}]))[0].fields["text"] == text
    assert rows_of("a.csv", f"text\n{text}\n")[0].fields["text"] == text
    assert len(error_of("list.jsonl", json.dumps([text]))) < 200


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a":', "a.jsonl:2: not JSON: Expecting value; each line is one row"),
        ("a.jsonl", '{"a": 1}\n{"a": 1} {"a": 2}\n', "a.jsonl:2: not JSON: Extra data; each line is one row"),
        ("a.jsonl", '\n"text"\n', 'a.jsonl:2: expected an object with columns, got "text"'),
        ("a.jsonl", "[{}]", "a.jsonl:1: expected an object with columns, got [{}]; a list of rows is .json"),
        ("a.jsonl", b'{"a": 1}\r\n{"a": "\xff"}\n', "a.jsonl:2: is not UTF-8 text (invalid start byte)"),
        ("a.json", '{"a": 1}\n{"a": 2}', "a.json:2: not JSON: Extra data; one object per line is .jsonl"),
        ("a.json", '[{"a": 1},\n2]', "a.json: row 2: expected an object with columns, got 2"),
        ("a.json", "7", "a.json: expected a list of rows, got 7"),
        ("a.json", "", "a.json:1: not JSON: Expecting value"),
        ("a.json", '{"a": 1}', "a.json: expected a list of rows, or an object that holds one list"),
        ("a.json", b'[\n{"a": "\xe9"}]', "a.json:2: is not UTF-8 text (invalid continuation byte)"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv:3: has 1 columns, but the header has 2"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv:2: has 3 columns, but the header has 2"),
        ("a.csv", "a,b,a\n1,2,3\n", 'a.csv:1: the column "a" is there twice'),
        ("a.csv", 'a\n1\n"2\n', "a.csv:3: not CSV: unexpected end of data"),
        ("a.csv", 'a\n"1" x\n', "a.csv:2: not CSV: ',' expected after '\"'"),
        ("a.csv", b"a\n1\n\xff\n", "a.csv:3: is not UTF-8 text (invalid start byte)"),
        ("a.csv", "a\r1\r", "a.csv:1: not CSV: new-line character seen in unquoted field"),
        ("a.txt", "hello", "a.txt: expected a .jsonl, .json, .csv, .parquet file, or a folder of them"),
        ("a b/c.jsonl", "nope", "a b/c.jsonl:1: not JSON: Expecting value; each line is one row"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name: str, content: str | bytes, message: str) -> None:
    assert error_of(name, content) == message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_nested_without_end_or_with_endless_numbers(name: str) -> None:
    assert "not JSON" in error_of(name, '{"a":' * 100_000)
    assert "not JSON" in error_of(name, '[{"a": ' + "9" * 5000 + "}]")


def test_the_rows_before_a_broken_line_are_read() -> None:
    Path("a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{')
    rows = read_rows("a.jsonl")
    assert [next(rows).fields, next(rows).fields] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match=r"^a\.jsonl:3: not JSON"):
        next(rows)


def test_files_without_rows() -> None:
    assert rows_of("a.jsonl", "") == []
    assert rows_of("a.csv", "") == []
    assert rows_of("a.csv", "text,label\n") == []
    assert rows_of("a.json", "[]") == []


def test_a_folder_of_mixed_files_is_read_in_order(here: Path) -> None:
    rows_of("data/b.csv", "text\nthree\n")
    rows_of("data/a.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    rows_of("data/c/d.json", '[{"text": "four"}]')
    (here / "data/notes.txt").write_text("not data")
    assert data_files("data") == [Path("data/a.jsonl"), Path("data/b.csv"), Path("data/c/d.json")]
    assert [row.fields["text"] for row in read_rows("data")] == ["one", "two", "three", "four"]
    assert [row.place for row in read_rows("data")][2:] == ["data/b.csv:2", "data/c/d.json: row 1"]


def test_what_is_not_there(here: Path) -> None:
    (here / "empty").mkdir()
    with pytest.raises(DataError, match=r"^empty: the folder holds no \.jsonl, \.json, \.csv, \.parquet file$"):
        list(read_rows("empty"))
    with pytest.raises(DataError) as caught:
        list(read_rows("gone.jsonl"))
    assert str(caught.value) == f"gone.jsonl: no such file or folder (looked in {here})"
    for name in ("x" * 5000 + ".jsonl", "a\0.jsonl"):
        with pytest.raises(DataError, match="no such file or folder"):
            list(read_rows(name))


def test_a_hub_id_is_told_from_a_path(here: Path) -> None:
    (here / "folder").mkdir()
    assert all(map(is_local, ["folder", "rows.jsonl", "./rows", "/rows", "~/rows", "a/b.csv"]))
    assert not any(map(is_local, ["tatsu-lab/alpaca", "imdb", "x" * 5000]))


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "format", "why"),
    [
        (["messages"], "messages", "the rows have 'messages'"),
        (["conversations", "system"], "sharegpt", "the rows have 'conversations'"),
        (["instruction", "input", "output"], "alpaca", "the rows have 'instruction' and 'output'"),
        (["prompt", "completion"], "prompt_completion", "the rows have 'prompt' and 'completion'"),
        (["text", "label"], "text", "the rows have 'text'"),
        (["text", "messages"], "messages", "the rows have 'messages'"),
    ],
)
def test_a_format_is_detected_with_its_reason(names: list[str], format: str, why: str) -> None:
    assert detect_format(Row("a.jsonl:1", dict.fromkeys(names, "")), {}) == (format, why)


def test_detection_uses_the_mapped_columns() -> None:
    row = Row("a.csv:2", {"question": "q", "answer": "a"})
    assert detect_format(row, {"instruction": "question", "output": "answer"}) == (
        "alpaca",
        "the rows have 'question' and 'answer'",
    )
    with pytest.raises(DataError) as caught:
        detect_format(row, {})
    assert str(caught.value) == (
        "a.csv:2: the columns question, answer fit no format (messages: messages; sharegpt: conversations; "
        "alpaca: instruction, output; prompt_completion: prompt, completion; text: text); "
        "name the format and map the columns with `columns:`"
    )


def test_alpaca() -> None:
    fields = {"instruction": "Add", "input": "1 1", "output": "2", "system": "Be brief"}
    assert example("alpaca", fields).messages == (
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Add\n\n1 1"},
        {"role": "assistant", "content": "2"},
    )
    for nothing in ("", "  ", None):
        read = example("alpaca", {"instruction": "Add", "input": nothing, "output": "2"})
        assert read.messages[0]["content"] == "Add"


def test_messages_keep_tool_calls_and_tools() -> None:
    call = {"function": {"name": "add", "arguments": {}}}
    conversation = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    read = example("messages", {"messages": conversation, "tools": json.dumps([{"name": "add"}])})
    assert read.tools == ({"name": "add"},)
    assert read.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_sharegpt_roles_are_translated() -> None:
    fields = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "Sing"}
    assert [(m["role"], m["content"]) for m in example("sharegpt", fields).messages] == [
        ("system", "Sing"),
        ("user", "hi"),
        ("assistant", "ho"),
    ]


def test_prompt_completion_and_text() -> None:
    assert example("prompt_completion", {"prompt": "1+1=", "completion": "2"}) == Example(
        "a.jsonl:3", prompt="1+1=", completion="2"
    )
    both = {"prompt": turns(("user", "hi"))["messages"], "completion": turns(("assistant", "ho"))["messages"]}
    assert [m["content"] for m in example("prompt_completion", both).messages] == ["hi", "ho"]
    assert example("text", {"text": "once"}) == Example("a.jsonl:3", text="once")


def test_columns_are_mapped() -> None:
    fields = {"q": "Add", "context": "1 1", "a": "2"}
    read = example("alpaca", fields, instruction="q", input="context", output="a")
    assert [m["content"] for m in read.messages] == ["Add\n\n1 1", "2"]
    assert example("text", {"story": "once"}, text="story").text == "once"


NEEDS_TURN = "a.jsonl:3: a turn needs 'role' and 'content', got "


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "answer": "b"},
            "a.jsonl:3: 'output' is missing (columns: instruction, answer); map it with `columns: {output: …}`",
        ),
        ("alpaca", {"instruction": "a", "output": " "}, "a.jsonl:3: 'output' is empty, so there is nothing to learn"),
        ("alpaca", {"instruction": "a", "output": None}, "a.jsonl:3: 'output' must be text, got null"),
        ("alpaca", {"instruction": "a", "input": 0, "output": "b"}, "a.jsonl:3: 'input' must be text, got 0"),
        ("alpaca", {"instruction": "a", "system": 1, "output": "b"}, "a.jsonl:3: 'system' must be text, got 1"),
        ("text", {"text": 5}, "a.jsonl:3: 'text' must be text, got 5"),
        ("text", {"text": "ok \ud83d"}, "a.jsonl:3: 'text' holds \"\\ud83d\", which is not a character"),
        ("messages", {"messages": "hi"}, "a.jsonl:3: 'messages' must be a list, got \"hi\""),
        ("messages", {"messages": ["hi"]}, f'{NEEDS_TURN}"hi"'),
        ("messages", {"messages": [{"role": "user"}]}, NEEDS_TURN + '{"role": "user"}'),
        ("messages", {"messages": []}, "a.jsonl:3: there is no assistant turn, so there is nothing to learn"),
        ("messages", turns(("user", "hi")), "a.jsonl:3: there is no assistant turn, so there is nothing to learn"),
        ("messages", turns(("assistant", None)), "a.jsonl:3: an assistant turn is empty, so there is nothing to learn"),
        ("messages", turns(("user", ["a"])), 'a.jsonl:3: the content of a turn must be text, got ["a"]'),
        (
            "messages",
            turns(("bot", "hi")),
            'a.jsonl:3: unknown role "bot"; known: human, user, gpt, assistant, model, system, tool, observation',
        ),
        ("sharegpt", {"conversations": {}}, "a.jsonl:3: 'conversations' must be a list, got {}"),
        (
            "messages",
            {**turns(("assistant", "a")), "tools": "nope"},
            "a.jsonl:3: 'tools' is not JSON: \"nope\"",
        ),
        ("messages", {**turns(("assistant", "a")), "tools": 3}, "a.jsonl:3: 'tools' must be a list, got 3"),
    ],
)
def test_a_row_that_cannot_be_trained_on(format: Format, fields: dict[str, Any], message: str) -> None:
    assert example_error(format, fields) == message


def test_values_in_messages_are_short_and_on_one_line() -> None:
    assert len(example_error("messages", turns(("r\n" * 5000, "hi")))) < 200
    assert len(example_error("text", {"text": ["x\n" * 5000]})) < 200
    assert len(example_error("text", {f"column\n{n}": 1 for n in range(1000)})) < 600


def test_a_mapped_column_must_be_there_even_if_it_is_optional() -> None:
    """`columns: {input: contxt}` would otherwise train without the context, silently."""
    fields = {"instruction": "a", "context": "b", "output": "c"}
    assert "'contxt' is missing" in example_error("alpaca", fields, input="contxt")
