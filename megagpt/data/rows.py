"""Read the rows of a file: JSON, tables of text, parquet and Arrow, one row at a time.

Only the columns that are asked for are read, so what the others hold does not matter. A row comes
with its place, `line 7` or `row 7`. A row that cannot be read comes as a `BadRow`, and the next one
follows where the format allows it. Damage of a whole file raises UserError.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megagpt.data.columns import BadRowError, Columns, listed
from megagpt.data.compression import open_decompressed
from megagpt.data.kinds import BYTE_ORDER_MARK, Recognized
from megagpt.data.text_files import decoded_blocks, not_utf8
from megagpt.utils import MIB, UserError

BATCH_BYTES = 4 * MIB  # of a parquet column, decoded at once
LONGEST_FIELD = 256 * MIB  # characters; a quote that nobody closes would read all of the table
DELIMITERS = (",", "\t", ";", "|")

_WHITE_SPACE = re.compile(r"\s*")

Row = tuple[int, Any]  # the number of its line or row from 1 on, and its value or a BadRow


@dataclass(frozen=True)
class BadRow:
    """What is wrong with a row."""

    problem: str


def rows_of(found: Recognized, column: Columns) -> Iterator[Row]:
    """Yield the rows of a file, from the first to the last."""
    path = found.file.path
    if found.kind in ("parquet", "arrow"):
        found.file.require_unchanged()
        read = _parquet_rows if found.kind == "parquet" else _arrow_rows
        with _damage_named(path):
            yield from read(path, column)
        found.file.require_unchanged()
        return
    content, _ = open_decompressed(found.file)
    with content:
        if found.kind == "table":
            yield from _table_rows(content, path, column)
        else:
            yield from _json_rows(content, path)


# --------------------------------------------------------------------------------------------- JSON


def _json_rows(content: io.BufferedReader[Any], path: Path) -> Iterator[Row]:
    """Yield the rows of JSON lines, of one array, or of values that take several lines each."""
    if content.peek(3).startswith(BYTE_ORDER_MARK):
        content.read(len(BYTE_ORDER_MARK))
    head = content.peek()
    start = head.lstrip()
    first_line = start.partition(b"\n")[0].strip()
    if start.startswith(b"["):
        yield from JsonValues(content, path).of_array()
    elif _is_not_a_row(first_line):
        yield from JsonValues(content, path).one_after_another()
    else:
        for number, line in enumerate(content, start=1):
            if not line.isspace():
                yield number, _json_line(line, path)


def _is_not_a_row(first_line: bytes) -> bool:
    """Return whether objects take several lines (written with indent), or one line has several."""
    if not first_line.startswith(b"{"):
        return False
    if first_line.endswith((b"{", b"[")):
        return True
    try:
        text = first_line.decode(errors="replace")
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip().startswith("{")


def _json_line(line: bytes, path: Path) -> Any:
    """Return the value of a line, or what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        try:
            text = line.decode(errors="surrogatepass")  # replaced when it is tokenized
        except UnicodeDecodeError:
            return BadRow(not_utf8(error, error.start, path))
    line_end = text[-1:] == "\n"
    text = text.rstrip("\r\n")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(_not_json(text, error, ended=line_end))
    except RecursionError:
        return BadRow("nested too deeply")
    except ValueError as error:  # a number of more than 4,300 digits
        return BadRow(str(error))


def _not_json(line: str, error: json.JSONDecodeError, *, ended: bool) -> str:
    """Return what a line is that is not JSON."""
    if not line.strip("\0"):
        return "only NUL bytes, as a crash leaves them"
    if re.match(r"(---|- |[A-Za-z_][\w-]*:(\s|$))", line):
        return "YAML, need JSON"
    if re.match(r"\{\s*u?'", line):
        return "Python's notation with single quotes, need JSON"
    at_end = error.msg.startswith("Unterminated string") or error.pos >= len(line) - 1
    cut = ": the file may be cut off here" if at_end and not ended else ""
    return f"not JSON ({error.msg}: column {error.colno}){cut}"


class JsonValues:
    """Values that need not stand on a line each, read with memory for the longest of them."""

    def __init__(self, content: BinaryIO, path: Path) -> None:
        self._blocks = decoded_blocks(content, path)
        self._path = path
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._place = 0
        self._lines = 1  # number of the line on which the text begins

    def of_array(self) -> Iterator[Row]:
        """Yield the elements of the array that the file is."""
        self._take("[")
        if self._next() == "]":
            self._take("]")
        else:
            yield self._value()
            while self._next() == ",":
                self._take(",")
                yield self._value()
            self._take("]")
        if self._next():
            raise self._error("something follows the array")

    def one_after_another(self) -> Iterator[Row]:
        while self._next():
            yield self._value()

    def _value(self) -> Row:
        """Return the next value with its line; raise UserError, as no later row can be found."""
        self._next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string")
                near_the_end = unfinished or error.pos >= len(self._text) - 8
                if near_the_end and self._more():
                    continue
                self._place = min(error.pos, len(self._text))
                cut = " near its end: it may be cut off" if near_the_end else ""
                raise self._error(f"not JSON ({error.msg}){cut}") from None
            except (RecursionError, ValueError) as error:
                raise self._error(f"not JSON ({error})") from None
            if end == len(self._text) and self._more():  # a number may go on
                continue
            line = self._line()
            self._place = end
            return line, value

    def _next(self) -> str:
        """Go to the next character that is not white space; return it, "" at the end."""
        while True:
            self._place = _WHITE_SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _take(self, character: str) -> None:
        found = self._next()
        if not found:
            raise self._error("ends within a JSON array: it is cut off")
        if found != character:
            raise self._error(f"not JSON (found {found!r}, need {character!r})")
        self._place += 1

    def _more(self) -> bool:
        """Read on, at least as much again as is there; return False at the end of the file."""
        self._lines += self._text.count("\n", 0, self._place)
        self._text = self._text[self._place :]
        self._place = 0
        wanted = 2 * len(self._text)
        blocks = [self._text]
        length = len(self._text)
        while length <= wanted and (block := next(self._blocks, None)) is not None:
            blocks.append(block)
            length += len(block)
        grown = length > len(self._text)
        self._text = "".join(blocks)
        return grown

    def _line(self) -> int:
        return self._lines + self._text.count("\n", 0, self._place)

    def _error(self, problem: str) -> UserError:
        return UserError(
            f"{self._path}:{self._line()}: {problem}; correct it, or write one row a line (.jsonl)"
        )


# ----------------------------------------------------------------------------------- tables of text


def _table_rows(content: BinaryIO, path: Path, column: Columns) -> Iterator[Row]:
    """Yield the rows of a table with a header: commas, tabs, semicolons or bars between fields."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = _Lines(content, path)
    delimiter, header = _header(lines, column)
    positions = [(name, header.index(name)) for name in column.sources(header)] if header else []
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = lines.count + 1
        try:
            fields = next(reader, None)
        except (csv.Error, BadRowError) as error:
            yield line, BadRow(f"not a row of the table ({error})")
            continue
        if fields is None:
            return
        if len(fields) == len(header):
            yield line, {name: fields[position] for name, position in positions}
        elif fields:
            yield (
                line,
                BadRow(f"{len(fields)} fields, the header has {len(header)} ({listed(header)})"),
            )


class _Lines:
    """Lines of text with their ends. Reading goes on after a line that raised BadRowError."""

    def __init__(self, content: BinaryIO, path: Path) -> None:
        self._content = content
        self.path = path
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._content)
        self.count += 1
        try:
            return (line.removeprefix(BYTE_ORDER_MARK) if self.count == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise BadRowError(not_utf8(error, error.start, self.path)) from None


def _header(lines: _Lines, column: Columns) -> tuple[str, list[str]]:
    """Return the delimiter under which the header has the column, and the header.

    An empty header if there are no lines.
    """
    try:
        header = next((line for line in lines if line.strip()), None)
    except BadRowError as error:
        raise UserError(f"{lines.path}:{lines.count}: {error}") from None
    if header is None:
        return DELIMITERS[0], []
    read = [(sign, next(csv.reader([header], delimiter=sign), [])) for sign in DELIMITERS]
    problems = []
    for sign, names in sorted(read, key=lambda item: -len(item[1])):
        try:
            column.sources(names)
            return sign, names
        except BadRowError as error:
            problems.append(f"{lines.path}:{lines.count}: its header has {error}")
    raise UserError(problems[0])


# -------------------------------------------------------------------------------- parquet and Arrow


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Raise pyarrow's errors as a UserError of one line with the file's name."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be read, damaged or cut off ({reason}); download it again"
        ) from error


def _parquet_rows(path: Path, column: Columns) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=BATCH_BYTES, pre_buffer=False) as file:
        names = _sources(file.schema_arrow.names, path, column)
        count = file.metadata.num_rows
        batches = file.iter_batches(
            _rows_at_once(file.metadata, names), columns=names, use_threads=False
        )
        yield from _counted(batches, count, path)


def _rows_at_once(metadata: Any, names: list[str]) -> int:
    """Return how many rows have about 4 MiB in the columns that are read."""
    size = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names):
                size += chunk.total_uncompressed_size
    return max(1, min(4096, metadata.num_rows * BATCH_BYTES // max(size, 1)))


def _arrow_rows(path: Path, column: Columns) -> Iterator[Row]:
    """Yield the rows of a file or a stream of Arrow, as Feather and `datasets` write them."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            names = _sources(file.schema.names, path, column)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            # A stream that is cut between two batches can be read to its end; only this mark is
            # missing.
            source.seek(max(source.size() - 8, 0))
            if source.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
                raise EOFError("no end mark")
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            names = _sources(stream.schema.names, path, column)
            batches = iter(stream)
        pieces = (
            batch.select(names).slice(start, 1024)
            for batch in batches
            for start in range(0, batch.num_rows, 1024)
        )
        yield from _counted(pieces, None, path)


def _sources(names: list[str], path: Path, column: Columns) -> list[str]:
    try:
        return column.sources(names)
    except BadRowError as error:
        raise UserError(f"{path}: {error}") from None


def _counted(batches: Iterator[Any], expected: int | None, path: Path) -> Iterator[Row]:
    """Yield the rows of batches; raise UserError unless there are as many as expected."""
    number = 0
    for batch in batches:
        for row in _python_rows(batch):
            number += 1
            yield number, row
    if expected is not None and number != expected:
        raise UserError(f"{path}: has {number} rows, its footer says {expected}; download it again")


def _python_rows(batch: Any) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow(f"not UTF-8 ({error.reason})")]
        return [
            row for place in range(batch.num_rows) for row in _python_rows(batch.slice(place, 1))
        ]
    return rows
