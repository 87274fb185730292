"""Local data files -> rows, with the place of each row for error messages. No heavy imports."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorafit.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
Format = Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text"]


@dataclass(frozen=True)
class Row:
    """One row of a file. `place` is `file:line`, or `file: row N` where files have no lines."""

    place: str
    fields: dict[str, Any]


def is_local(path: str) -> bool:
    """Whether a source's path names something on this disk rather than a hub data set."""
    return os.path.exists(path) or Path(path).suffix in SUFFIXES or path.startswith((".", "/", "~"))


def data_files(path: str) -> list[Path]:
    """The data files that a path means, in order. Raises DataError."""
    root = Path(path).expanduser()
    if os.path.isdir(root):
        files = sorted(file for file in root.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
        return files
    if not os.path.exists(root):  # Path.exists raises for a name that is too long
        raise DataError(f"{path}: no such file or folder (looked in {Path.cwd()})")
    if root.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a {', '.join(SUFFIXES)} file, or a folder of them")
    return [root]


def read_rows(path: str) -> Iterator[Row]:
    """Every row of a local source, in order. Raises DataError with file and line."""
    for file in data_files(path):
        reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[file.suffix]
        try:
            yield from reader(file)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: is not UTF-8 text ({error.reason})") from None
        except OSError as error:
            raise DataError(f"{file}: can't be read: {_first_line(error.strerror or str(error))}") from None


def digest(path: str) -> str:
    """SHA-256 of a local source: of its file, or of the names and digests of a folder's files."""
    files = data_files(path)
    digests = [file_digest(file) for file in files]
    if not Path(path).expanduser().is_dir():
        return digests[0]
    lines = "".join(
        f"{file.relative_to(Path(path).expanduser())} {d}\n" for file, d in zip(files, digests, strict=True)
    )
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_row(place: str, value: Any, hint: str = "") -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object with columns, got {_brief(value)}{hint}")
    return Row(place, value)


def _lines(file: Path) -> Iterator[str]:
    """A text file's lines, decoded one by one so that a wrong byte's line is known."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{file}:{number}: is not UTF-8 text ({error.reason})") from None


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{file}:{number}: not JSON: {reason}; each line is one row") from None
        hint = "; a list of rows is .json" if isinstance(value, list) else ""
        yield _as_row(f"{file}:{number}", value, hint)


def _json(file: Path) -> Iterator[Row]:
    data = file.read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: is not UTF-8 text ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            hint = "; one object per line is .jsonl" if error.msg == "Extra data" else ""
            raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}{hint}") from None
        raise DataError(f"{file}: not JSON: {error}") from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            raise DataError(f"{file}: expected a list of rows, or an object that holds one list")
        value = value[lists[0]]
    if not isinstance(value, list):
        raise DataError(f"{file}: expected a list of rows, got {_brief(value)}")
    for number, item in enumerate(value, 1):
        yield _as_row(f"{file}: row {number}", item)


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_lines(file), strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            place = f"{file}:{reader.line_num}"
            if not cells:
                continue
            if header is None:
                header = cells
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise DataError(f"{place}: the column {_brief(twice)} is there twice")
                continue
            if len(cells) != len(header):
                raise DataError(f"{place}: has {len(cells)} columns, but the header has {len(header)}")
            yield Row(place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV: {str(error).partition(' - ')[0]}") from None


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{file}: row {number}", fields)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not parquet: {_first_line(str(error))}") from None


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")


def _brief(value: Any, limit: int = 40) -> str:
    """A value as short text on one line that any terminal can show."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _names(columns: Iterable[str]) -> str:
    names = [_brief(name).strip('"') for name in columns]
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


# --- formats --------------------------------------------------------------------------------------

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The columns that a format needs, in the order in which `auto` looks for them."""

OPTIONAL: dict[Format, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "system", "tools"),
    "prompt_completion": ("tools",),
    "text": (),
}
"""The columns that a format also reads, where a row has them."""


def detect_format(row: Row, columns: dict[str, str]) -> tuple[Format, str]:
    """The format of a row by its columns, and why. Raises DataError when none fits."""
    for name, needed in COLUMNS.items():
        if all(columns.get(column, column) in row.fields for column in needed):
            return name, f"the rows have {' and '.join(repr(columns.get(c, c)) for c in needed)}"
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
    raise DataError(
        f"{row.place}: the columns {_names(row.fields)} fit no format ({known}); "
        "name the format and map the columns with `columns:`"
    )


Message = dict[str, Any]
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Example:
    """One row in a shape that can be rendered: messages, or a prompt and completion, or text.

    A plain prompt and completion (both text) are joined as they are; a text is learned whole.
    """

    place: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None


def to_example(row: Row, format: Format, columns: dict[str, str]) -> Example:
    """A row in a known format. Raises DataError naming the place and the column."""
    reader = {
        "messages": _from_messages,
        "sharegpt": _from_sharegpt,
        "alpaca": _from_alpaca,
        "prompt_completion": _from_prompt_completion,
        "text": _from_text,
    }[format]
    return reader(_Cells(row, columns))


@dataclass(frozen=True)
class _Cells:
    """Access to a row's cells under the names that the format uses."""

    row: Row
    columns: dict[str, str]

    @property
    def place(self) -> str:
        return self.row.place

    def get(self, name: str) -> Any:
        """An optional cell; one that is mapped by name has to be there."""
        return self.need(name) if name in self.columns else self.row.fields.get(name)

    def need(self, name: str) -> Any:
        actual = self.columns.get(name, name)
        if actual not in self.row.fields:
            raise DataError(
                f"{self.place}: {actual!r} is missing (columns: {_names(self.row.fields)}); "
                f"map it with `columns: {{{name}: …}}`"
            )
        return self.row.fields[actual]

    def text(self, name: str) -> str:
        return self.as_text(self.need(name), repr(self.columns.get(name, name)))

    def optional_text(self, name: str) -> str:
        value = self.get(name)
        return "" if value is None else self.as_text(value, repr(self.columns.get(name, name)))

    def as_text(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            raise DataError(f"{self.place}: {what} must be text, got {_brief(value)}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can hold
                wrong = _brief(value[error.start])
                raise DataError(f"{self.place}: {what} holds {wrong}, which is not a character") from None
        return value

    def answer(self, name: str) -> str:
        value = self.text(name)
        if not value.strip():
            raise DataError(f"{self.place}: {self.columns.get(name, name)!r} is empty, so there is nothing to learn")
        return value


def _from_alpaca(cells: _Cells) -> Example:
    instruction, extra = cells.text("instruction"), cells.optional_text("input")
    user = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    answer = cells.answer("output")
    return _conversation(
        cells, [*_system(cells), {"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    )


def _system(cells: _Cells) -> list[Message]:
    text = cells.optional_text("system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _from_messages(cells: _Cells) -> Example:
    messages = cells.need("messages")
    if not isinstance(messages, list):
        raise DataError(f"{cells.place}: 'messages' must be a list, got {_brief(messages)}")
    return _conversation(cells, [_message(cells, item, "role", "content") for item in messages])


def _from_sharegpt(cells: _Cells) -> Example:
    turns = cells.need("conversations")
    if not isinstance(turns, list):
        raise DataError(f"{cells.place}: 'conversations' must be a list, got {_brief(turns)}")
    return _conversation(cells, _system(cells) + [_message(cells, item, "from", "value") for item in turns])


def _message(cells: _Cells, item: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(item, dict) or role_key not in item or not ({content_key, "tool_calls"} & set(item)):
        raise DataError(f"{cells.place}: a turn needs {role_key!r} and {content_key!r}, got {_brief(item)}")
    role = _ROLES.get(item[role_key]) if isinstance(item[role_key], str) else None
    if role is None:
        raise DataError(f"{cells.place}: unknown role {_brief(item[role_key])}; known: {', '.join(_ROLES)}")
    content = item.get(content_key)
    if content is not None:
        cells.as_text(content, "the content of a turn")
    rest = {key: value for key, value in item.items() if key not in (role_key, content_key) and value is not None}
    return {**rest, "role": role, "content": content or ""}


def _conversation(cells: _Cells, messages: list[Message]) -> Example:
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise DataError(f"{cells.place}: there is no assistant turn, so there is nothing to learn")
    for message in answers:
        if not message["content"].strip() and not message.get("tool_calls"):
            raise DataError(f"{cells.place}: an assistant turn is empty, so there is nothing to learn")
    tools = cells.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise DataError(f"{cells.place}: 'tools' is not JSON: {_brief(tools)}") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{cells.place}: 'tools' must be a list, got {_brief(tools)}")
    return Example(cells.place, messages=tuple(messages), tools=tuple(tools) if tools else None)


def _from_prompt_completion(cells: _Cells) -> Example:
    prompt, completion = cells.need("prompt"), cells.need("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation(cells, [_message(cells, item, "role", "content") for item in (*prompt, *completion)])
    return Example(cells.place, prompt=cells.text("prompt"), completion=cells.answer("completion"))


def _from_text(cells: _Cells) -> Example:
    return Example(cells.place, text=cells.answer("text"))
