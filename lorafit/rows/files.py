"""Local data files -> rows, a little at a time."""

from __future__ import annotations

import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lorafit import bounds
from lorafit.errors import DataError
from lorafit.files import file_digest
from lorafit.progress import stage
from lorafit.rows.cells import COMPRESSIONS, KINDS, Row, brief, kind_of
from lorafit.text import first_line
from lorafit.written import expanded

_EXPECTED = f"{', '.join(KINDS)} file (text also as .gz or .zst)"
_CHUNK = 1 << 20
_BATCH_ROWS = 200
_BATCH_BYTES = 8 << 20


def is_local(path: str) -> bool:
    """Whether a source's path names something on this disk rather than a hub data set."""
    return os.path.exists(path) or kind_of(path) != "" or path.startswith((".", "/", "~")) or glob.has_magic(path)


def data_files(path: str) -> list[Path]:
    """The data files of a file's, a folder's or a glob's path, sorted. Raises DataError."""
    given = str(expanded(path))
    if os.path.isdir(given):
        with bounds.within(DataError, f"{path}: the folder"):
            files = sorted(
                file
                for file in Path(given).rglob("*")
                if kind_of(file.name) and file.is_file() and not _is_hidden(file.relative_to(given))
            )
        if not files:
            raise DataError(f"{path}: the folder holds no {_EXPECTED}")
        return files
    if os.path.exists(given):  # Path.exists raises for a name that is too long
        if not kind_of(given) or not os.path.isfile(given):
            raise DataError(f"{path}: expected a {_EXPECTED}, a folder of them, or a glob")
        return [Path(given)]
    if glob.has_magic(given):
        matches = bounds.expand(given, DataError)
        files = sorted({Path(match) for match in matches if kind_of(match) and os.path.isfile(match)})
        if not files:
            raise DataError(f"{path}: the glob matches no {_EXPECTED} (looked in {Path.cwd()})")
        return files
    raise DataError(f"{path}: no such file or folder (looked in {Path.cwd()})")


def _is_hidden(file: Path) -> bool:
    """Whether a file is one of a tool's own copies, such as .ipynb_checkpoints/train-checkpoint.jsonl."""
    return any(part.startswith(".") for part in file.parts)


def digest(path: str) -> str:
    """SHA-256 of a local source: of its file, or of the names and digests of a folder's or glob's files.

    Names are relative to the folder, or to the part of a glob before its first wildcard.
    """
    files = data_files(path)
    given = expanded(path)
    if given.is_file():
        return file_digest(files[0])
    base = given if given.is_dir() else Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
    lines = "".join(f"{file.relative_to(base)} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def size_digest(path: str) -> str:
    """What a local source can be told by without reading it: a hash of its files' names, sizes and times."""
    facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in data_files(path)]
    return f"unread:{hashlib.sha256(repr(facts).encode()).hexdigest()}"


def read_rows(path: str) -> Iterator[Row]:
    """Every row of a local source, in order; never a whole file in memory. Raises DataError with the place."""
    for file in data_files(path):
        try:
            if (kind := kind_of(file.name)) == ".parquet":
                yield from _parquet(file)
            else:
                size = file.stat().st_size
                with _text(file) as (text, place), stage(f"reading {file.name}", size, "bytes", place=place):
                    yield from _READERS[kind](str(file), text)
        except (EOFError, zlib.error) as error:
            raise DataError(f"{file}: can't be unpacked, the file is damaged or cut off: {first_line(error)}") from None
        except OSError as error:
            what = "unpacked, the file is damaged or cut off" if file.suffix in COMPRESSIONS else "read"
            raise DataError(f"{file}: can't be {what}: {first_line(error.strerror or error)}") from None


@contextlib.contextmanager
def _text(file: Path) -> Iterator[tuple[TextIO, Callable[[], int]]]:
    """A file's unpacked text, in lines as they are, and what tells how many of its bytes are read.

    Raises DataError for UTF-16.
    """
    if file.suffix in COMPRESSIONS and file.stat().st_size == 0:
        raise DataError(f"{file}: can't be unpacked, the file is damaged or cut off: it is empty")
    with bounds.opened(file) as raw:
        stream = io.BufferedReader(_unpacked(file, raw), _CHUNK // 4)
        if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{file}: is UTF-16 text; save it as UTF-8")
        with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as text:
            yield text, raw.tell


def _unpacked(file: Path, raw: BinaryIO) -> Any:
    if file.suffix == ".gz":
        return gzip.open(raw)
    if file.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(raw, compression="zstd")
    return raw


def _as_row(file: str, number: int, value: Any, hint: str = "") -> Row:
    row = Row(file, number, value)
    if not isinstance(value, dict):
        raise DataError(f"{row.place}: expected an object with columns, got {brief(value)}{hint}")
    return row


class _Lines:
    """The lines of a text, with as many characters for each row as one may have: set `taken` to 0 after each.

    Raises DataError.
    """

    def __init__(self, file: str, text: TextIO) -> None:
        self.file, self.text = file, text
        self.number = self.taken = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.text.readline(bounds.LONGEST_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.taken += len(line)
        if self.taken > bounds.LONGEST_ROW:
            raise DataError(f"{self.file}:{self.number}: {_too_long()}")
        return line


def _too_long() -> str:
    return f"the row is longer than {bounds.LONGEST_ROW} characters; split it, or leave it out"


class _Twice(ValueError):
    """An object has a key twice, of which Python would keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(f"the key {brief(next(name for name in names if names.count(name) > 1))} is there twice")
    return made


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _jsonl(file: str, text: TextIO) -> Iterator[Row]:
    lines = _Lines(file, text)
    for line in lines:
        if not line.strip():
            continue
        try:
            value = _JSON.decode(line)
        except (ValueError, RecursionError) as error:
            more = "" if isinstance(error, _Twice) else "; each line is one row"
            raise DataError(f"{file}:{lines.number}: {_json_reason(error)}{more}") from None
        lines.taken = 0
        yield _as_row(file, lines.number, value, "; a list of rows is .json" if isinstance(value, list) else "")


def _json_reason(error: Exception) -> str:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
    return reason if isinstance(error, _Twice) else f"not JSON: {reason}"


def _json(file: str, text: TextIO) -> Iterator[Row]:
    window = _JsonWindow(file, text)
    if window.next() == "[":
        yield from _json_list(file, window)
        return
    value = window.value(bounds.LARGEST_DOCUMENT)
    if window.next():
        what = "Extra data; one object per line is .jsonl" if isinstance(value, dict) else "Extra data"
        raise window.error(f"not JSON: {what}")
    if not isinstance(value, dict):
        raise DataError(f"{file}: expected a list of rows, got {brief(value)}")
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1:
        raise DataError(f"{file}: expected a list of rows, or an object that holds one list")
    for number, item in enumerate(lists[0], 1):
        yield _as_row(file, number, item)


def _json_list(file: str, window: _JsonWindow) -> Iterator[Row]:
    window.skip()
    for number in itertools.count(1):
        if number == 1 and window.next() == "]":
            break
        yield _as_row(file, number, window.value())
        follows = window.next()
        if follows not in (",", "]"):
            raise window.error("not JSON: Expecting ',' delimiter")
        if follows == "]":
            break
        window.skip()
    window.skip()
    if window.next():
        raise window.error("not JSON: Extra data")


class _JsonWindow:
    """Takes JSON values one after another out of a stream, holding little more than one of them.

    A value that the window cuts is parsed again with at least twice the text, so that even a huge
    one costs time in proportion to its size.
    """

    _decode = _JSON.raw_decode
    _space = re.compile(r"[ \t\r\n]*")
    _TOKEN = 16
    """An error this near to the window's end may come from a cut token (`-Infin`, `\\u00`)."""

    def __init__(self, file: str, stream: TextIO) -> None:
        self.file = file
        self.stream = stream
        self.text = ""
        self.at = 0
        self.line = 1
        """The line of the window's first character."""
        self.ended = False

    def next(self) -> str:
        """The next character that isn't white space; empty at the end. Raises DataError where there is no end to it."""
        space = -self.at
        while True:
            match = self._space.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if space + self.at > bounds.LONGEST_ROW:
                raise self.error(_too_long())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            space += self.at
            self._read()

    def skip(self) -> None:
        """Go past the next character."""
        self.at += 1

    def value(self, most: int | None = None) -> Any:
        """The next value, of a row's most characters or some other number of them. Raises DataError with the line."""
        self.next()
        while True:
            try:
                value, end = self._decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - self._TOKEN
                if self.ended or not cut:
                    raise self.error(_json_reason(error), error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.error(_json_reason(error)) from None
            else:
                if end < len(self.text) or self.ended:  # a number at the window's end may go on
                    self.at = end
                    return value
            if len(self.text) - self.at > (bounds.LONGEST_ROW if most is None else most):
                too_long = f"the file is longer than {most} characters, and no list of rows; save it as .jsonl"
                raise self.error(_too_long() if most is None else too_long)
            self._read()

    def error(self, reason: str, position: int | None = None) -> DataError:
        line = self.line + self.text.count("\n", 0, self.at if position is None else position)
        return DataError(f"{self.file}:{line}: {reason}")

    def _read(self) -> None:
        self.line += self.text.count("\n", 0, self.at)
        rest = self.text[self.at :]
        chunk = self.stream.read(max(_CHUNK, len(rest)))
        self.text, self.at, self.ended = rest + chunk, 0, not chunk


def _csv(file: str, text: TextIO) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    lines = _Lines(file, text)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            lines.taken = 0
            if header is None:
                header = cells
                _no_twins(f"{file}:{reader.line_num}", header)
                continue
            if len(cells) != len(header):
                raise DataError(f"{file}:{reader.line_num}: has {len(cells)} columns, but the header has {len(header)}")
            yield Row(file, reader.line_num, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not CSV: {str(error).partition(' - ')[0]}") from None


def _no_twins(place: str, columns: list[str]) -> None:
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{place}: the column {brief(twice)} is there twice")


_READERS: dict[str, Callable[[str, TextIO], Iterator[Row]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with (
            bounds.opened(file) as stream,
            pyarrow.parquet.ParquetFile(stream) as table,
            stage(f"reading {file.name}", table.metadata.num_rows, "rows") as reading,
        ):
            _no_twins(str(file), list(table.schema_arrow.names))
            number = 0
            for group in range(table.num_row_groups):
                facts = table.metadata.row_group(group)
                fitting = _BATCH_BYTES * facts.num_rows // max(facts.total_byte_size, 1)
                size = min(max(fitting, 1), _BATCH_ROWS)
                _look(file, table, group, number + 1)
                for batch in table.iter_batches(batch_size=size, row_groups=[group]):
                    for index in range(len(batch) if batch.nbytes > bounds.LONGEST_ROW else 0):
                        if batch.slice(index, 1).nbytes > bounds.LONGEST_ROW:
                            place = Row(str(file), number + index + 1, {}).place
                            raise DataError(f"{place}: {_too_long()}")
                    columns = list(map(_cells, batch.columns))
                    for number, cells in enumerate(zip(*columns, strict=True), number + 1):  # noqa: B020
                        yield Row(str(file), number, dict(zip(batch.schema.names, cells, strict=True)))
                    reading.advance(len(batch))
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not parquet: {first_line(error)}") from None
    except (ValueError, KeyError, OverflowError) as error:  # a date of the year 10000, a map with a key twice
        raise DataError(f"{file}: row {number + 1} or one soon after can't be read: {first_line(error)}") from None


def _look(file: Path, table: Any, group: int, number: int) -> None:
    """Read the first row of a group alone. Raises DataError where that unpacks to far more than its bytes."""
    import pyarrow

    facts = table.metadata.row_group(group)
    packed = sum(facts.column(index).total_compressed_size for index in range(facts.num_columns))
    before = pyarrow.total_allocated_bytes()
    row = next(table.iter_batches(batch_size=1, row_groups=[group]), None)
    if pyarrow.total_allocated_bytes() - before - packed > 8 * bounds.LONGEST_ROW:
        raise DataError(f"{Row(str(file), number, {}).place}: it, or what is packed with it, {_TOO_MUCH}")
    del row


_TOO_MUCH = "unpacks to far more than a row may have; write the file with smaller pages, or leave it out"


def _cells(column: Any) -> list[Any]:
    """An Arrow column's values; bytes that aren't UTF-8 are kept in its text as surrogates."""
    try:
        return list(column.to_pylist(maps_as_pydicts="strict"))
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(_as_bytes(column.type)).to_pylist(maps_as_pydicts="strict")]


def _as_bytes(type: Any) -> Any:
    """An Arrow type with bytes in place of text."""
    import pyarrow
    from pyarrow import types

    if types.is_string(type) or types.is_large_string(type):
        return pyarrow.large_binary() if types.is_large_string(type) else pyarrow.binary()
    if types.is_dictionary(type):
        return _as_bytes(type.value_type)
    if types.is_list(type) or types.is_large_list(type):
        return (pyarrow.list_ if types.is_list(type) else pyarrow.large_list)(_as_bytes(type.value_type))
    if types.is_struct(type):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in type])
    return type


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return value
