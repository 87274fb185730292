"""Reading data files: rows in order, and errors that name the file and the line."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wording import Like

from lorafit.errors import DataError
from lorafit.files import file_digest
from lorafit.rows import (
    COLUMNS,
    OPTIONAL,
    Example,
    Fault,
    Row,
    Shape,
    check_template,
    data_files,
    detect_format,
    digest,
    is_local,
    place_of,
    read_rows,
    to_example,
)

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
    return to_example(Row("a.jsonl", 3, fields), Shape(format, columns))


def example_error(format: Format, fields: dict[str, Any], **columns: str) -> str:
    """The message of a row that stops everything."""
    with pytest.raises(DataError) as caught:
        example(format, fields, **columns)
    assert not isinstance(caught.value, Fault)
    assert str(caught.value).isprintable()
    return str(caught.value)


def fault(format: Format, fields: dict[str, Any], **columns: str) -> tuple[str, str]:
    """The rule and the message of a row that an audit counts."""
    with pytest.raises(Fault) as caught:
        example(format, fields, **columns)
    assert str(caught.value).isprintable()
    return caught.value.rule, str(caught.value)


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
    assert list(read_rows("a.parquet")) == [Row("a.parquet", 1, rows[0]), Row("a.parquet", 2, rows[1])]
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


EXPECTED = ".jsonl, .json, .csv, .parquet file (text also as .gz or .zst)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a":', "a.jsonl:2: not JSON … line"),
        ("a.jsonl", '{"a": 1}\n{"a": 1} {"a": 2}\n', "a.jsonl:2: not JSON … line"),
        ("a.jsonl", '\n"text"\n', 'a.jsonl:2: … object … "text"'),
        ("a.jsonl", "[{}]", "a.jsonl:1: … object … [{}] … .json"),
        ("a.jsonl", b'{"a": 1}\r\n{"a": \xff}\n', "a.jsonl:2: not JSON … line"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "a.jsonl: … UTF-16 … UTF-8"),
        ("a.json", "\ufeff[]".encode("utf-16-be"), "a.json: … UTF-16 … UTF-8"),
        ("a.csv", "a\n1".encode("utf-16"), "a.csv: … UTF-16 … UTF-8"),
        ("a.json", '{"a": 1}\n{"a": 2}', "a.json:2: not JSON … .jsonl"),
        ("a.json", '[{"a": 1},\n2]', "a.json: row 2: … object … 2"),
        ("a.json", "7", "a.json: … list … 7"),
        ("a.json", "", "a.json:1: not JSON"),
        ("a.json", '{"a": 1}', "a.json: … list"),
        ("a.json", '[{"a": 1},\n{"a": 1', "a.json:2: not JSON"),
        ("a.json", '[{"a": 1},\n{"a": "1\n', "a.json:2: not JSON"),
        ("a.json", '[{"a": 1}\n', "a.json:2: not JSON"),
        ("a.json", '[{"a": 1}\n{"a": 1}]', "a.json:2: not JSON"),
        ("a.json", '[{"a": 1},]', "a.json:1: not JSON"),
        ("a.json", '[{"a": 1}]\n\n{', "a.json:3: not JSON"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv:3: … 1 … header … 2"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv:2: … 3 … header … 2"),
        ("a.csv", "a,b,a\n1,2,3\n", 'a.csv:1: … "a" … twice'),
        ("a.csv", 'a\n1\n"2\n', "a.csv:3: not CSV"),
        ("a.csv", 'a\n"1" x\n', "a.csv:2: not CSV"),
        ("a.csv", "a\r1\r", "a.csv:1: not CSV"),
        ("a.txt", "hello", f"a.txt: … {EXPECTED}"),
        ("a b/c.jsonl", "nope", "a b/c.jsonl:1: not JSON … line"),
    ],
)
def test_a_broken_file_is_named_with_its_line(name: str, content: str | bytes, message: str) -> None:
    assert error_of(name, content) == Like(message)


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
    with pytest.raises(DataError) as caught:
        list(read_rows("empty"))
    assert str(caught.value) == Like(f"empty: … folder … {EXPECTED}")
    with pytest.raises(DataError) as caught:
        list(read_rows("gone.jsonl"))
    assert str(caught.value) == Like(f"gone.jsonl: no such file … {here}")
    for name in ("x" * 5000 + ".jsonl", "a\0.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            list(read_rows(name))


def test_a_hub_id_is_told_from_a_path(here: Path) -> None:
    (here / "folder").mkdir()
    assert all(map(is_local, ["folder", "rows.jsonl", "./rows", "/rows", "~/rows", "a/b.csv", "a/b.json.gz", "a/*"]))
    assert not any(map(is_local, ["tatsu-lab/alpaca", "imdb", "x" * 5000]))


ROWS = b'{"text": "one"}\n{"text": "zwei \xc3\xbc"}\n'


def packed(suffix: str, content: bytes) -> bytes:
    import pyarrow

    return gzip.compress(content) if suffix == ".gz" else pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files(suffix: str) -> None:
    expected = [{"text": "one"}, {"text": "zwei ü"}]
    rows = rows_of(f"a.jsonl{suffix}", packed(suffix, ROWS))
    assert [row.fields for row in rows] == expected
    assert [row.place for row in rows] == [f"a.jsonl{suffix}:1", f"a.jsonl{suffix}:2"]
    array = json.dumps(expected).encode()
    rows = rows_of(f"a.json{suffix}", packed(suffix, array[:9]) + packed(suffix, array[9:]))  # two members
    assert [row.fields for row in rows] == expected
    assert rows[1].place == f"a.json{suffix}: row 2"
    rows = rows_of(f"a.csv{suffix}", packed(suffix, "text\none\nzwei ü\n".encode()))
    assert [row.fields for row in rows] == expected
    many = b"".join(packed(suffix, b'{"n": %d}\n' % number) for number in range(3000))
    assert [row.fields["n"] for row in rows_of(f"many.jsonl{suffix}", many)] == list(range(3000))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_damaged(suffix: str) -> None:
    name = f"a.jsonl{suffix}"
    start = f"{name}: … unpacked … damaged"
    whole = packed(
        suffix, b"".join(b'{"n": "%s"}\n' % hashlib.sha256(b"%d" % n).hexdigest().encode() for n in range(9999))
    )
    for content in (b"", whole[:-4], whole[: len(whole) // 2], b"not packed at all", whole + b"garbage"):
        assert error_of(name, content) == Like(start)
    assert error_of(f"b.jsonl{suffix}", packed(suffix, b"nope")).startswith(f"b.jsonl{suffix}:1: not JSON")


def test_a_parquet_file_is_not_compressed_again() -> None:
    assert error_of("a.parquet.gz", b"") == Like("a.parquet.gz: … .parquet")


def test_globs(here: Path) -> None:
    for name in ("data/b.jsonl", "data/a.jsonl", "data/deep/er/c.jsonl.gz", "data/x.csv"):
        rows_of(name, gzip.compress(b"{}") if name.endswith("gz") else b"{}" if "json" in name else b"")
    (here / "data/readme.md").write_text("not data")
    assert data_files("data/*.jsonl") == [Path("data/a.jsonl"), Path("data/b.jsonl")]
    assert data_files("data/**/*.gz") == [Path("data/deep/er/c.jsonl.gz")]
    assert data_files(f"{here}/data/*") == [here / "data/a.jsonl", here / "data/b.jsonl", here / "data/x.csv"]
    assert len(data_files("data/**")) == 4
    assert [row.place for row in read_rows("data/[ab].jsonl")] == ["data/a.jsonl:1", "data/b.jsonl:1"]
    for nothing in ("data/*.txt", "data/*.parquet", "no\0pe/*.json"):
        with pytest.raises(DataError) as caught:
            data_files(nothing)
        assert str(caught.value) == Like(f"{nothing}: … glob … {EXPECTED} … {here}")
    rows_of("[1].jsonl", b"{}")  # a file of that name is itself
    assert data_files("[1].jsonl") == [Path("[1].jsonl")]


def test_digests(here: Path) -> None:
    rows_of("data/a.jsonl", b"{}")
    rows_of("data/c/b.jsonl", b"{} ")
    one, two = hashlib.sha256(b"{}").hexdigest(), hashlib.sha256(b"{} ").hexdigest()
    both = hashlib.sha256(f"a.jsonl {one}\nc/b.jsonl {two}\n".encode()).hexdigest()
    assert digest("data/a.jsonl") == file_digest(Path("data/a.jsonl")) == one
    assert digest("data") == digest(f"{here}/data") == digest("data/**/*.jsonl") == digest("./data/**") == both
    assert digest("data/*.jsonl") != digest("data/c/*.jsonl")


def test_an_unreadable_byte_is_found_where_it_is_used() -> None:
    line = b'{"output": "a", "instruction": "b"}\n{"output": "' + b"x" * 16 + b'\xff", "instruction": "b", "n": "ok"}'
    row = rows_of("a.jsonl", line)[1]
    with pytest.raises(Fault) as caught:
        to_example(row, Shape("alpaca"))
    assert str(caught.value) == Like("a.jsonl:2: 'output' … UTF-8 … 0xff … 17")
    assert caught.value.rule == "not_utf8"
    assert to_example(row, Shape("text", {"text": "n"})).text == "ok"
    [row] = rows_of("a.json", b'[{"text": "\xe9"}]')
    with pytest.raises(Fault, match=r"^a\.json: row 1: 'text' .*UTF-8 .*0xe9 .*\b1\b"):
        to_example(row, Shape("text"))
    [row] = rows_of("a.csv", b"t\xffxt,text\n1,\xfe\n")
    with pytest.raises(Fault, match=r"^a\.csv:2: 'text' .*UTF-8 .*0xfe .*\b1\b"):
        to_example(row, Shape("text"))


def test_an_unreadable_byte_in_parquet(here: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"ok", b"a\xff"]).view(pyarrow.string())
    turn = pyarrow.StructArray.from_arrays([text, pyarrow.array(["assistant"] * 2)], names=["content", "role"])
    messages = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2]), turn)
    table = pyarrow.table({"text": text, "messages": messages, "raw": [b"\xff", b"ok"]})
    pyarrow.parquet.write_table(table, here / "a.parquet")
    first, second = read_rows("a.parquet")
    assert to_example(first, Shape("text")).text == "ok"
    assert first.fields["raw"] == b"\xff"
    for format, what in (("text", "'text'"), ("messages", "turn 1 of 'messages'")):
        with pytest.raises(Fault) as caught:
            to_example(second, Shape(format))
        assert str(caught.value).startswith("a.parquet: row 2: ")
        assert what in str(caught.value)
        assert str(caught.value) == Like("… UTF-8 … 0xff … 2")


def test_parquet_in_row_groups_and_its_padding(here: Path) -> None:
    """Arrow gives every nested object the keys of all; they must not show as nulls in a tool call."""
    import pyarrow
    import pyarrow.parquet

    def call(**arguments: Any) -> dict[str, Any]:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        return {
            "messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": calls}]
        }

    rows = [call(a=1), call(b=["x", None]), {"messages": None}] * 300
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "a.parquet", row_group_size=250)
    read = list(read_rows("a.parquet"))
    assert [row.number for row in read] == list(range(1, 901))
    assert to_example(read[0], Shape("messages")).messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }
    second = to_example(read[1], Shape("messages")).messages[1]
    assert second["tool_calls"][0]["function"]["arguments"] == {"b": ["x", None]}
    assert read[2].fields == {"messages": None}
    # The same of a hub data set; in JSON a null is there because somebody wrote it.
    padded = {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": None}}]}]}
    for file, arguments in (("org/set", {}), ("a.json", {"a": None})):
        message = to_example(Row(file, 1, padded), Shape("messages")).messages[0]
        assert message["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_parquet_value_that_python_has_not(here: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    years = pyarrow.array([0, 2**60], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"when": years}), here / "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet: row 1 .*out of range"):
        list(read_rows("a.parquet"))
    map_type = pyarrow.map_(pyarrow.string(), pyarrow.int64())
    table = pyarrow.table({"map": pyarrow.array([[("a", 1), ("b", 2)], [("a", 1), ("a", 2)]], map_type)})
    pyarrow.parquet.write_table(table.slice(0, 1), here / "a.parquet")
    assert [row.fields for row in read_rows("a.parquet")] == [{"map": {"a": 1, "b": 2}}]
    pyarrow.parquet.write_table(table, here / "a.parquet")
    with pytest.raises(DataError, match=r"^a\.parquet: row 1 "):
        list(read_rows("a.parquet"))


def test_a_parquet_column_that_is_there_twice(here: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, here / "a.parquet")
    with pytest.raises(DataError, match=r'^a\.parquet: .*"text" .*twice'):
        list(read_rows("a.parquet"))


def test_a_json_list_is_read_a_little_at_a_time() -> None:
    values = [{"n": number, "text": "ü" * (number % 700), "x": [number, {"y": None}]} for number in range(9000)]
    for indent in (None, 2):
        rows = rows_of("a.json", json.dumps(values, indent=indent))
        assert [row.fields for row in rows] == values
    # An error is found before the file's end, here before its cut-off end.
    noise = "".join(hashlib.sha256(b"%d" % n).hexdigest() for n in range(100_000))
    broken = gzip.compress(('[{"a": 1},\n{"a": 2},\n{"a" 3},' + json.dumps([noise])).encode())[:-100]
    Path("a.json.gz").write_bytes(broken)
    rows = read_rows("a.json.gz")
    assert [next(rows).number, next(rows).number] == [1, 2]
    with pytest.raises(DataError, match=r"^a\.json\.gz:3: not JSON"):
        next(rows)


@pytest.mark.parametrize("cut", range(-30, 4))
def test_a_json_value_at_the_end_of_the_window(cut: int) -> None:
    """The window is a megabyte of text; whatever it cuts in two is read all the same."""
    values = [{"a": "x" * ((1 << 20) - 20 + cut)}, {"b": [True, None, -1.5e-3, '\u00fc"\n', {}]}, {"c": 12345}]
    assert [row.fields for row in rows_of("a.json", json.dumps(values))] == values


def test_reading_a_large_file_takes_little_memory() -> None:
    """Row by row, as a process of its own tells: 60 MB are read in far less."""
    Path("a.json").write_text("[" + ",\n".join([json.dumps({"text": "x" * 1000})] * 60_000) + "]")
    script = (
        "import resource; from lorafit.rows import read_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "count = sum(1 for _ in read_rows('a.json'))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    count, kilobytes = subprocess.check_output([sys.executable, "-c", script], text=True).split()
    assert int(count) == 60_000
    assert int(kilobytes) < 30_000


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "format", "why"),
    [
        (["messages"], "messages", "… 'messages'"),
        (["conversations", "system"], "sharegpt", "… 'conversations'"),
        (["instruction", "input", "output"], "alpaca", "… 'instruction' … 'output'"),
        (["prompt", "completion"], "prompt_completion", "… 'prompt' … 'completion'"),
        (["text", "label"], "text", "… 'text'"),
        (["text", "messages"], "messages", "… 'messages'"),
        (["prompt", "chosen", "rejected"], "preference", "… 'chosen' … 'rejected'"),
        (["messages", "chosen", "rejected", "label"], "preference", "… 'chosen' … 'rejected'"),
    ],
)
def test_a_format_is_detected_with_its_reason(names: list[str], format: str, why: str) -> None:
    assert detect_format(Row("a.jsonl", 1, dict.fromkeys(names, "")), {}) == (format, Like(why))


def test_detection_uses_the_mapped_columns() -> None:
    row = Row("a.csv", 2, {"question": "q", "answer": "a"})
    assert detect_format(row, {"instruction": "question", "output": "answer"}) == (
        "alpaca",
        Like("… 'question' … 'answer'"),
    )
    with pytest.raises(DataError) as caught:
        detect_format(row, {})
    assert str(caught.value) == Like(
        "a.csv:2: … question, answer … alpaca: instruction, output; … text: text … "
        "dataset.train.0.format … dataset.train.0.columns"
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
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    conversation = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    read = example("messages", {"messages": conversation, "tools": json.dumps([{"name": "add"}])})
    assert read.tools == ({"type": "function", "function": {"name": "add"}},)
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
        "a.jsonl", 3, prompt="1+1=", completion="2"
    )
    both = {"prompt": turns(("user", "hi"))["messages"], "completion": turns(("assistant", "ho"))["messages"]}
    assert [m["content"] for m in example("prompt_completion", both).messages] == ["hi", "ho"]
    assert example("text", {"text": "once"}) == Example("a.jsonl", 3, text="once")


def test_columns_are_mapped() -> None:
    fields = {"q": "Add", "context": "1 1", "a": "2"}
    read = example("alpaca", fields, instruction="q", input="context", output="a")
    assert [m["content"] for m in read.messages] == ["Add\n\n1 1", "2"]
    assert example("text", {"story": "once"}, text="story").text == "once"


NEEDS_TURN = "a.jsonl:3: turn 1 of 'messages' … 'role' … 'content' … "


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        (
            "alpaca",
            {"instruction": "a", "answer": "b"},
            "a.jsonl:3: 'output' … missing … instruction, answer … dataset.train.0.columns",
        ),
        ("alpaca", {"instruction": "a", "input": 0, "output": "b"}, "a.jsonl:3: 'input' … text … 0"),
        ("alpaca", {"instruction": "a", "system": 1, "output": "b"}, "a.jsonl:3: 'system' … text … 1"),
        ("text", {"text": 5}, "a.jsonl:3: 'text' … text … 5"),
        ("messages", {"messages": "hi"}, "a.jsonl:3: 'messages' … list … \"hi\""),
        ("messages", {"messages": ["hi"]}, f'{NEEDS_TURN}"hi"'),
        ("messages", {"messages": [{"role": "user"}]}, NEEDS_TURN + '{"role": "user"}'),
        ("alpaca", {"instruction": None, "output": "b"}, "a.jsonl:3: 'instruction' … text … null"),
        ("messages", {"messages": [{"content": "hi"}]}, NEEDS_TURN + '{"content": "hi"}'),
        ("messages", turns(("user", None)), NEEDS_TURN + '{"role": "user", "content": null}'),
        ("messages", turns(("user", 5)), "a.jsonl:3: … content … turn 1 of 'messages' … text … 5"),
        ("messages", turns(("user", ["a"])), "a.jsonl:3: … turn 1 of 'messages' … 'type' … \"a\""),
        (
            "messages",
            turns(("nobody", "hi")),
            "a.jsonl:3: turn 1 of 'messages' … role … human, user, gpt, … function_call … \"nobody\"",
        ),
        ("sharegpt", {"conversations": {}}, "a.jsonl:3: 'conversations' … list … {}"),
        (
            "messages",
            {**turns(("assistant", "a")), "tools": "nope"},
            "a.jsonl:3: 'tools' … JSON … \"nope\"",
        ),
        ("messages", {**turns(("assistant", "a")), "tools": 3}, "a.jsonl:3: 'tools' … list … 3"),
    ],
)
def test_a_row_that_cannot_be_trained_on(format: Format, fields: dict[str, Any], message: str) -> None:
    assert example_error(format, fields) == Like(message)


def test_values_in_messages_are_short_and_on_one_line() -> None:
    assert len(example_error("messages", turns(("r\n" * 5000, "hi")))) < 250
    assert len(example_error("text", {"text": ["x\n" * 5000]})) < 200
    assert len(example_error("text", {f"column\n{n}": 1 for n in range(1000)})) < 600


def test_a_mapped_column_must_be_there_even_if_it_is_optional() -> None:
    """`columns: {input: contxt}` would otherwise train without the context, silently."""
    fields = {"instruction": "a", "context": "b", "output": "c"}
    assert "'contxt' is missing" in example_error("alpaca", fields, input="contxt")


def test_detection_of_labels() -> None:
    def detect(**fields: Any) -> tuple[str, str]:
        return detect_format(Row("a.jsonl", 1, fields), {})

    assert detect(prompt="", completion="", label=True) == (
        "unpaired_preference",
        Like("… 'label' … 'completion'"),
    )
    assert detect(messages=[], label=False)[0] == "unpaired_preference"
    assert detect(conversations=[], label="False")[0] == "unpaired_preference"
    assert detect(text="", label=True)[0] == "text"
    assert detect(messages=[], label=3)[0] == "messages"
    assert detect(prompt="", completion="", label="spam")[0] == "prompt_completion"


def test_detection_sees_templates_and_paths() -> None:
    row = Row("a.jsonl", 1, {"question": "q", "answers": ["a"], "chosen": "a"})
    template = {"prompt": "{{ question }}", "completion": "{{ answers[0] }}"}
    assert detect_format(row, {}, template) == ("prompt_completion", Like("… template … 'prompt' … 'completion'"))
    assert detect_format(row, {"output": "answers.0"}, {"instruction": "{{ question }}"}) == (
        "alpaca",
        Like("… 'answers.0' … template … 'instruction'"),
    )
    assert detect_format(row, {}, "{{ question }}") == ("text", Like("… template … 'text'"))
    with pytest.raises(DataError, match=r"dataset\.validation\.1\.format .*dataset\.validation\.1\.columns"):
        detect_format(row, {}, None, "dataset.validation.1")


def test_places() -> None:
    assert place_of("a.jsonl", 12) == "a.jsonl:12"
    assert place_of("a.csv.zst", 12) == "a.csv.zst:12"
    assert place_of("a.json.gz", 12) == "a.json.gz: row 12"
    assert place_of("a.parquet", 12) == "a.parquet: row 12"
    assert place_of("org/set", 12) == "org/set: row 12"
    assert example("text", {"text": "a"}).place == "a.jsonl:3"


def test_the_columns_of_formats() -> None:
    assert set(COLUMNS) == set(OPTIONAL)
    assert {"train", "weight", "history", "system", "input", "tools"} == set(OPTIONAL["alpaca"])


# --- rows that an audit counts --------------------------------------------------------------------

NOTHING = " … nothing to learn"


@pytest.mark.parametrize(
    ("format", "fields", "rule", "message"),
    [
        ("alpaca", {"instruction": "a", "output": None}, "empty_answers", f"'output' … null{NOTHING}"),
        ("alpaca", {"instruction": "a", "output": " \n"}, "empty_answers", f"'output' … empty{NOTHING}"),
        ("text", {"text": ""}, "empty_answers", f"'text' … empty{NOTHING}"),
        ("prompt_completion", {"prompt": "", "completion": None}, "empty_answers", f"'completion' … null{NOTHING}"),
        ("messages", turns(("assistant", None)), "empty_answers", f"… assistant turn … 'messages' … null{NOTHING}"),
        ("messages", turns(("assistant", " ")), "empty_answers", f"… assistant turn … 'messages' … empty{NOTHING}"),
        (
            "messages",
            {"messages": [{"role": "assistant"}]},
            "empty_answers",
            f"… assistant turn … 'messages' … null{NOTHING}",
        ),
        ("messages", {"messages": []}, "no_supervised_tokens", f"… assistant turn{NOTHING}"),
        ("messages", turns(("user", "hi")), "no_supervised_tokens", f"… assistant turn{NOTHING}"),
        ("text", {"text": "ok \ud83d"}, "not_utf8", "'text' … UTF-8 … \\ud83d … 4"),
        (
            "alpaca",
            {"instruction": "\udcff", "output": "a"},
            "not_utf8",
            "'instruction' … UTF-8 … 0xff … 1",
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": {"a": "\udcff"}}]}
                ]
            },
            "not_utf8",
            "turn 1 of 'messages' … UTF-8 … 0xff … 1",
        ),
        (
            "messages",
            {**turns(("assistant", "a")), "tools": [{"name": "f", "description": "\udcff"}]},
            "not_utf8",
            "'tools' … UTF-8 … 0xff … 1",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": None},
            "empty_answers",
            f"'rejected' … null{NOTHING}",
        ),
        (
            "prompt_completion",
            {"prompt": turns(("assistant", "a"))["messages"], "completion": turns(("user", "b"))["messages"]},
            "no_supervised_tokens",
            f"… assistant turn … 'completion'{NOTHING}",
        ),
        (
            "unpaired_preference",
            {"label": True, **turns(("assistant", "a"), ("user", "b"))},
            "no_supervised_tokens",
            f"… assistant turn … 'messages'{NOTHING}",
        ),
    ],
)
def test_a_row_that_is_counted(format: Format, fields: dict[str, Any], rule: str, message: str) -> None:
    assert fault(format, fields) == (rule, Like(f"a.jsonl:3: {message}"))


# --- columns --------------------------------------------------------------------------------------


def test_a_path_into_nested_columns() -> None:
    fields = {"instances": [{"output": "a"}], "instances.1": "exact", "meta": {"q": {"text": "why"}}}
    read = example("alpaca", fields, instruction="meta.q.text", output="instances.0.output")
    assert [message["content"] for message in read.messages] == ["why", "a"]
    assert example("text", fields, text="instances.1").text == "exact"
    for path in ("instances.1.output", "instances.-1.output", "instances.x", "meta.q.texts", "meta.q.text.x"):
        assert example_error("text", fields, text=path) == Like(f"… {path!r} … missing … instances, instances.1, meta")
    with pytest.raises(Fault, match=r"'a\.b' is null"):  # as padding in parquet has it
        to_example(Row("a.parquet", 1, {"a": {"b": None}}), Shape("text", {"text": "a.b"}))


def test_a_missing_column_names_the_key_of_its_source() -> None:
    row = Row("data/train.jsonl", 812, {"instruction": "a", "input": "", "response": "b"})
    with pytest.raises(DataError) as caught:
        to_example(row, Shape("alpaca", key="dataset.train.0"))
    assert str(caught.value) == Like(
        "data/train.jsonl:812: 'output' … missing … instruction, input, response … dataset.train.0.columns"
    )


@pytest.mark.parametrize("name", ["train", "weight"])
def test_a_row_may_say_that_it_is_not_learned(name: str) -> None:
    for yes in (True, 1, 1.0, "1", "true", "True", None):
        assert example("text", {"text": "a", name: yes}).train is True
    for no in (False, 0, 0.0, "0", "false"):
        assert example("text", {"text": "a", name: no}) == Example("a.jsonl", 3, text="a", train=False)
        assert example("text", {"text": "a", "use": no}, **{name: "use"}).train is False
        assert example("alpaca", {"instruction": "a", "output": None, name: no}).train is False  # not counted
    assert "'use' is missing" in example_error("text", {"text": "a"}, **{name: "use"})
    allowed = {"train": "true and false", "weight": "0 and 1"}[name]
    for wrong in (0.5, "yes", "", [], 2):
        assert example_error("text", {"text": "a", name: wrong}) == Like(
            f"a.jsonl:3: {name!r} … {allowed} … {json.dumps(wrong)}"
        )


def test_flags_in_csv() -> None:
    rows = rows_of("a.csv", "text,train,weight\na,true,1\nb,false,1\nc,1,0\nd,maybe,1\n")
    assert [to_example(row, Shape("text")).train for row in rows[:3]] == [True, False, False]
    with pytest.raises(DataError, match=r"^a\.csv:5: 'train' .*true and false"):
        to_example(rows[3], Shape("text"))


# --- templates ------------------------------------------------------------------------------------


def templated(template: Any, fields: dict[str, Any], format: Format = "text", **columns: str) -> Example:
    return to_example(Row("a.jsonl", 3, fields), Shape(format, columns, template))


def template_error(template: Any, fields: dict[str, Any], format: Format = "text") -> str:
    with pytest.raises(DataError) as caught:
        templated(template, fields, format)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_template_makes_the_text() -> None:
    fields = {"q": "1 < 2?", "two words": "ja", "data": {"a": "<ü>"}}
    assert templated("Q: {{ q }}\nA: {{ row['two words'] }}\n", fields).text == "Q: 1 < 2?\nA: ja\n"
    assert templated("{{ data | tojson }}", fields).text == '{"a": "<ü>"}'
    assert templated("{{ row | length }} {{ items }}", {"items": "x"}).text == "1 x"


def test_a_template_makes_columns_by_name() -> None:
    template = {"prompt": "Q: {{ question }}\n", "completion": "{{ answers[0] }}"}
    read = templated(template, {"question": "why", "answers": ["so"], "train": 1}, "prompt_completion")
    assert (read.prompt, read.completion) == ("Q: why\n", "so")
    read = templated({"instruction": "Do {{ what }}"}, {"what": "it", "result": "done"}, "alpaca", output="result")
    assert [message["content"] for message in read.messages] == ["Do it", "done"]


def test_a_template_makes_turns() -> None:
    fields = {"q": 'say "hi"', "a": "hi", "spec": [{"name": "f"}]}
    user = '{"role": "user", "content": {{ q | tojson }}}'
    assistant = '{"role": "assistant", "content": {{ a | tojson }}}'
    expected = ({"role": "user", "content": 'say "hi"'}, {"role": "assistant", "content": "hi"})
    template = {"messages": f"[{user}, {assistant}]", "tools": "{{ spec | tojson }}"}
    read = templated(template, fields, "messages")
    assert read.messages == expected
    assert read.tools == ({"type": "function", "function": {"name": "f"}},)
    read = templated({"prompt": f"[{user}]", "completion": f" [{assistant}]"}, fields, "prompt_completion")
    assert read.completion_start == 1
    read = templated({"prompt": "{{ q }}", "completion": '[{"name": "f"}]'}, fields, "prompt_completion")
    assert read.completion == '[{"name": "f"}]'  # JSON, but not turns: an answer's text
    assert template_error({"messages": "[oops"}, fields, "messages") == Like("a.jsonl:3: 'messages' … list … \"[oops\"")


def test_turns_as_json_text_are_read_by_a_template() -> None:
    """As CSV has to have them."""
    cell = json.dumps(turns(("user", "a"), ("assistant", "b"))["messages"])
    assert len(templated({"messages": "{{ turns }}"}, {"turns": cell}, "messages").messages) == 2


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ nope }}", "'nope' is undefined"),
        ("{{ nope | tojson }}", "'nope' is undefined"),
        ("{{ q.nope }}", "… 'nope'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ nothing }}", "… null … {{ … or '' }}"),
        (
            "{% for i in range(999999999) %}x{% endfor %}",
            "… MAX_RANGE",
        ),
        ("{{ q.__class__.__mro__ }}", "… '__class__'"),
        ("{% include 'x' %}", "… loader"),
    ],
)
def test_a_template_that_fails(template: str, reason: str) -> None:
    message = template_error(template, {"q": "a", "nothing": None})
    assert message == Like(f"a.jsonl:3: dataset.train.0.template (text): {reason}")


def test_templates_are_checked() -> None:
    check_template("{{ a }}")
    check_template({"prompt": "{{ a }}", "completion": "{% if b %}c{% endif %}"})
    with pytest.raises(ValueError, match=r"^text: line 2: unexpected '}'$"):
        check_template("ok\n{{ a }")
    with pytest.raises(ValueError, match=r"^completion: line 1: .*'nope'"):
        check_template({"prompt": "", "completion": "{{ a | nope }}"})


# --- conversations --------------------------------------------------------------------------------


def said(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """What becomes of turns, after a user's."""
    return list(example("messages", {"messages": [{"role": "user", "content": "go"}, *messages], **fields}).messages)[
        1:
    ]


def said_error(*messages: dict[str, Any]) -> str:
    return example_error("messages", {"messages": list(messages)})


def tool_call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_alpaca_with_history_and_tools() -> None:
    fields = {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "S", "tools": '[{"name": "f"}]'}
    read = example("alpaca", fields)
    assert [message["content"] for message in read.messages] == ["S", "a", "b", "c", "d"]
    assert [message["role"] for message in read.messages] == ["system", *["user", "assistant"] * 2]
    assert read.tools == ({"type": "function", "function": {"name": "f"}},)
    assert read.completion_start is None
    for nothing in ([], None):
        assert len(example("alpaca", {"instruction": "c", "output": "d", "history": nothing}).messages) == 2
    assert example_error("alpaca", {**fields, "history": [["a"]]}) == Like(
        "a.jsonl:3: 'history' … [question, answer] … [[\"a\"]]"
    )
    assert fault("alpaca", {**fields, "history": [["a", ""]]})[1] == Like(
        "a.jsonl:3: … assistant turn … 'history' … empty"
    )


def test_roles_and_keys_are_decided_turn_by_turn() -> None:
    roles = {
        "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
        "system": "system", "developer": "developer", "tool": "tool", "observation": "tool", "function": "tool",
        "ipython": "tool",
    }  # fmt: skip
    for name, role in roles.items():
        for key, value in (("role", "content"), ("from", "value"), ("from", "content"), ("role", "value")):
            assert said({key: name, value: "x"}, {"role": "assistant", "content": "y"})[0] == {
                "role": role,
                "content": "x",
            }
    for name in ("bard", "bing", "chatgpt"):
        assert f'got "{name}"' in said_error({"from": name, "value": "x"})
    mixed = {"conversations": [{"from": "human", "value": "a"}, {"role": "assistant", "content": "b", "from": None}]}
    assert len(example("sharegpt", mixed).messages) == 2


def test_the_system_column() -> None:
    read = example("messages", {**turns(("user", "a"), ("assistant", "b")), "system": "S"})
    assert read.messages[0] == {"role": "system", "content": "S"}
    assert example_error("messages", {**turns(("system", "a"), ("assistant", "b")), "system": "S"}) == Like(
        "a.jsonl:3: … 'system' … first turn"
    )


def test_function_calls_in_turns_of_their_own() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}
    two = {"from": "function_call", "value": [{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": {}}]}
    result = {"from": "observation", "value": "2"}
    assert said(call, result) == [
        {"role": "assistant", "content": "", "tool_calls": [tool_call("f", a=1)]},
        {"role": "tool", "content": "2"},
    ]
    assert said({"from": "gpt", "value": "Let me see"}, two, result)[0] == {
        "role": "assistant",
        "content": "Let me see",
        "tool_calls": [tool_call("f"), tool_call("g")],
    }
    assert len(said({"from": "gpt", "value": "x", "train": False}, call)) == 2  # one is learned, the other is not
    assert len(said({"from": "gpt", "value": "x"}, result, call)) == 3
    thoughts = ({"from": "gpt", "value": "x", "reasoning": "a"}, {**call, "reasoning": "b"})
    assert [message["reasoning_content"] for message in said(*thoughts)] == ["a", "b"]  # neither is lost
    assert said_error({"from": "function_call", "value": "f(1)"}) == Like(
        "a.jsonl:3: … tool call … turn 1 of 'messages' … JSON … \"f(1)\""
    )
    assert "call a tool" in said_error({"from": "function_call", "value": "[]"})


def test_content_in_parts() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "a "},
        {"type": "output_text", "value": "b"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"type": "tool_call", "value": {"name": "g"}},
    ]
    assert said({"role": "assistant", "content": parts}) == [
        {
            "role": "assistant",
            "content": "a b",
            "reasoning_content": "hm",
            "tool_calls": [tool_call("f", a=1), tool_call("g")],
        }
    ]
    assert said({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})[0]["content"] == "no"
    for part in ({"text": "r"}, {"value": "r"}, {"thinking": "r"}, {"reasoning": "r"}):
        message = said({"role": "assistant", "content": [{"type": "reasoning", **part}]})[0]
        assert message == {"role": "assistant", "content": "", "reasoning_content": "r"}
    read = example(
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                *turns(("assistant", "a"))["messages"],
            ]
        },
    )
    assert read.messages[0] == {"role": "user", "content": "q"}


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video", "file"])
@pytest.mark.parametrize("role", ["user", "tool", "assistant"])
def test_content_that_is_not_text(kind: str, role: str) -> None:
    assert said_error({"role": role, "content": [{"type": kind}]}) == Like(
        f"a.jsonl:3: … turn 1 of 'messages' … not text … \"{kind}\""
    )


def test_parts_that_nobody_knows() -> None:
    assert said_error({"role": "user", "content": [{"type": "hologram"}]}) == Like(
        'a.jsonl:3: … turn 1 … text … "hologram"'
    )
    assert said_error({"role": "user", "content": [{"type": "text"}]}) == Like(
        "a.jsonl:3: … turn 1 of 'messages' … no 'text' … {\"type\": \"text\"}"
    )
    assert said_error({"role": "user", "content": [{"type": "reasoning", "text": "hm"}]}) == Like(
        "a.jsonl:3: turn 1 of 'messages' … reasoning … assistant's"
    )


def test_reasoning_has_one_name() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        expected = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
        assert said({"role": "assistant", "content": "a", key: "hm"}) == [expected]
        assert said({"role": "assistant", "content": None, key: "hm"}) == [{**expected, "content": ""}]
        assert said({"role": "assistant", "content": "a", key: ""}) == [{"role": "assistant", "content": "a"}]
        assert said_error({"role": "assistant", "content": "a", key: 5}) == Like(
            f"a.jsonl:3: {key!r} … turn 1 of 'messages' … text … 5"
        )
    assert said({"role": "assistant", "content": "a", "thinking": "hm", "reasoning": "hm"}) == [expected]
    assert "more than once" in said_error({"role": "assistant", "content": "a", "thinking": "hm", "reasoning": "hm hm"})


def test_tool_calls_have_one_shape() -> None:
    normal = {"role": "assistant", "content": "", "tool_calls": [tool_call("f", a=1)]}
    for call in (
        {"name": "f", "arguments": {"a": 1}},
        {"name": "f", "arguments": '{"a": 1}'},
        {"function": {"name": "f", "arguments": '{"a": 1}'}},
        tool_call("f", a=1),
    ):
        assert said({"role": "assistant", "tool_calls": [call]}) == [normal]
        assert said({"role": "assistant", "content": None, "function_call": call}) == [normal]
        with_id = said({"role": "assistant", "tool_calls": [{**call, "id": "c1"}]})[0]["tool_calls"][0]
        assert with_id == {"id": "c1", **tool_call("f", a=1)}
    for wrong in ("a=1", "[1]", "", [1]):
        assert said_error({"role": "assistant", "tool_calls": [{"name": "f", "arguments": wrong}]}) == Like(
            f"a.jsonl:3: … arguments … 'f' … turn 1 of 'messages' … JSON object … {json.dumps(wrong)}"
        )
    for wrong in ({}, {"name": ""}, {"name": 1}, 5, {"function": "f"}, {"name": "f", "parameters": {"a": 1}}):
        assert said_error({"role": "assistant", "tool_calls": [wrong]}) == Like("… 'name' … 'arguments'")
    assert said_error({"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}) == Like(
        "a.jsonl:3: turn 1 of 'messages' … tools … assistant's"
    )


def test_what_a_tool_answers() -> None:
    answer = {"role": "assistant", "content": "ok"}
    for content, text in (
        ("plain", "plain"),
        ({"a": "ü"}, '{"a": "ü"}'),
        ([1, {"b": None}], '[1, {"b": null}]'),
        ([], "[]"),
        ([{"type": "house"}], '[{"type": "house"}]'),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ):
        message = {"role": "tool", "content": content, "name": "f", "tool_call_id": "c1", "unknown": 1, "none": None}
        assert said(message, answer)[0] == {
            "role": "tool", "content": text, "name": "f", "tool_call_id": "c1", "unknown": 1,
        }  # fmt: skip
    assert said_error({"role": "user", "content": {"a": 1}}) == Like('a.jsonl:3: … text … {"a": 1}')


def test_tools_have_one_shape() -> None:
    normal = ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    bare = {"name": "f", "parameters": {}}
    for tools in ([bare], json.dumps([bare]), [{"function": bare}], [{"type": "function", **bare}], list(normal)):
        assert example("messages", {**turns(("assistant", "a")), "tools": tools}).tools == normal
    for nothing in (None, "", "[]", []):
        assert example("messages", {**turns(("assistant", "a")), "tools": nothing}).tools is None
    assert example_error("messages", {**turns(("assistant", "a")), "tools": [{}]}) == Like(
        "a.jsonl:3: … 'tools' … 'name' … {}"
    )


def test_turns_that_are_not_learned() -> None:
    learned = {"role": "assistant", "content": "yes"}
    for no in ({"train": False}, {"training": False}, {"weight": 0}, {"train": "false", "weight": 1}):
        skipped = {"role": "assistant", "content": "no", **no}
        assert said(skipped, {**learned, "train": True, "weight": 1}) == [
            {"role": "assistant", "content": "no", "train": False},
            learned,
        ]
        assert said({**skipped, "content": ""}, learned)[0] == {"role": "assistant", "content": "", "train": False}
        fields = {"messages": [{"role": "user", "content": "a"}, skipped, skipped]}
        assert example("messages", fields).train is False
    assert example("messages", {"messages": [{"role": "user", "content": "a"}, skipped, learned]}).train is True
    assert said_error({**learned, "weight": 0.5}) == Like("a.jsonl:3: 'weight' … turn 1 of 'messages' … 0 and 1 … 0.5")


# --- prompts and preferences ----------------------------------------------------------------------

ASKED = turns(("user", "q"))["messages"]
ASKED_BEFORE = {"role": "user", "content": "q", "train": False}


def test_a_prompt_and_a_completion_of_turns() -> None:
    prompt = turns(("user", "a"), ("assistant", ""), ("user", "b"))["messages"]
    read = example("prompt_completion", {"prompt": prompt, "completion": {"role": "assistant", "content": "c"}})
    assert read.completion_start == 3
    assert [message.get("train", True) for message in read.messages] == [False, False, False, True]
    assert (read.prompt, read.completion) == (None, None)
    read = example(
        "prompt_completion",
        {"prompt": ASKED[0], "completion": turns(("assistant", "c"))["messages"], "tools": [{"name": "f"}]},
    )
    assert read.messages == (ASKED_BEFORE, {"role": "assistant", "content": "c"})
    assert read.tools is not None
    assert example_error("prompt_completion", {"prompt": "a", "completion": ASKED}) == Like(
        "a.jsonl:3: 'prompt' … text … 'completion' … turns"
    )
    assert example_error("prompt_completion", {"prompt": 5, "completion": "a"}) == Like(
        "a.jsonl:3: 'prompt' … text … 5"
    )
    assert example_error("prompt_completion", {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}) == Like(
        "a.jsonl:3: 'tools' … conversation … plain text"
    )


def test_a_plain_preference() -> None:
    read = example("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert read == Example("a.jsonl", 3, prompt="q", completion="good", rejected="bad")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ASKED, "chosen": "good", "rejected": "bad"},
        {"prompt": ASKED[0], "chosen": "good", "rejected": "bad"},
        {"messages": ASKED, "chosen": "good", "rejected": "bad"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"chosen": turns(("user", "q"), ("assistant", "good"))["messages"],
         "rejected": turns(("user", "q"), ("assistant", "bad"))["messages"]},
        {"prompt": "q", "chosen": turns(("user", "q"), ("assistant", "good"))["messages"],
         "rejected": turns(("user", "q"), ("assistant", "bad"))["messages"]},
    ],
)  # fmt: skip
def test_a_preference_between_turns(fields: dict[str, Any]) -> None:
    read = example("preference", {**fields, "system": "S", "tools": [{"name": "f"}]})
    assert read.messages == (
        {"role": "system", "content": "S", "train": False},
        ASKED_BEFORE,
        {"role": "assistant", "content": "good"},
    )
    assert read.completion_start == 2
    assert read.rejected == ({"role": "assistant", "content": "bad"},)
    assert read.tools is not None


def test_a_preference_that_begins_to_differ_late() -> None:
    chosen = turns(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c"))["messages"]
    rejected = turns(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "d"), ("user", "e"))["messages"]
    read = example("preference", {"chosen": chosen, "rejected": rejected})
    assert read.completion_start == 3
    assert [message["content"] for message in read.messages] == ["a", "", "b", "c"]
    assert isinstance(read.rejected, tuple)
    assert [message["content"] for message in read.rejected] == ["d", "e"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'chosen' … 'rejected' … same"),
        ({"prompt": ASKED, "chosen": "a", "rejected": "a"}, "'chosen' … 'rejected' … same"),
        (
            {"prompt": "q", "chosen": "a", "rejected": ASKED},
            "'chosen' … text … 'rejected' … turns",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            "… no prompt … 'prompt', 'messages', 'conversations' … 'instruction' … 'chosen' … 'rejected'",
        ),
        (
            {"prompt": ASKED, "chosen": turns(("user", "q"), ("assistant", "a"))["messages"], "rejected": "b"},
            "'chosen' … turns … 'rejected' … text",
        ),
        (
            {"prompt": ASKED, "chosen": turns(("user", "q"), ("assistant", "a"))["messages"], "rejected": ASKED},
            "'chosen' … assistant's … \"user\"",
        ),
        (
            {
                "prompt": "else",
                "chosen": [*ASKED, *turns(("assistant", "a"))["messages"]],
                "rejected": [*ASKED, *turns(("assistant", "b"))["messages"]],
            },
            "'prompt' … text … 'chosen' … turns",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "system": "S"},
            "'system' … conversation … plain text",
        ),
    ],
)
def test_a_preference_that_makes_no_sense(fields: dict[str, Any], message: str) -> None:
    assert example_error("preference", fields) == Like(f"a.jsonl:3: {message}")


def test_unpaired_preferences() -> None:
    for label in (True, 1, "true", "1", 1.0):
        read = example("unpaired_preference", {"prompt": "q", "completion": "a", "label": label})
        assert read == Example("a.jsonl", 3, prompt="q", completion="a", label=True)
    for name in ("messages", "conversations"):
        fields = {name: turns(("user", "q"), ("assistant", "a"))["messages"], "label": False}
        read = example("unpaired_preference", fields)
        assert read.messages == (ASKED_BEFORE, {"role": "assistant", "content": "a"})
        assert (read.completion_start, read.label) == (1, False)
    turned = {"prompt": ASKED, "completion": turns(("assistant", "a"))["messages"], "label": True}
    assert example("unpaired_preference", turned).completion_start == 1
    for label in (None, "good", 2):
        assert example_error("unpaired_preference", {"prompt": "q", "completion": "a", "label": label}) == Like(
            f"a.jsonl:3: 'label' … true or false … {json.dumps(label)}"
        )
    assert "'prompt' is missing" in example_error("unpaired_preference", {"label": True})
