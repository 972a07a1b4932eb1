"""Tell what a file holds: by its first bytes, and among kinds of text by its name.

Parquet, Arrow and compressions have marks of their own, so a wrong name does no harm. Text, JSON
and tables of text have none; there the suffix decides, and the content where there is no suffix.
What cannot be read is named as what it is.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Literal

from megagpt.data.compression import SourceFile, name_without_compression, open_decompressed
from megagpt.data.token_files.marks import EXPORT, FOREIGN, UNPACK
from megagpt.utils import UserError

Kind = Literal["text", "json", "table", "parquet", "arrow", "empty"]
ROWS: tuple[Kind, ...] = ("json", "table", "parquet", "arrow")
HEAD_BYTES = 4096

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
KIND_OF_SUFFIX: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".jsonlines": "json",
    ".ndjson": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".js", ".html", ".log")
MARKS: tuple[tuple[bytes, Kind], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),  # a stream, as `datasets` saves it
)
TOKENS = "if it has ids of tokens, train on it as it is: --set megagpt.data.path=FILE"
UTF_32 = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Recognized:
    """A file with its kind, and what compresses it."""

    file: SourceFile
    kind: Kind
    compressions: tuple[str, ...] = ()
    looks_like_rows: bool = False  # JSON lines under a name of a text

    @property
    def suffix(self) -> str:
        return suffix_of(self.file)


class ForeignFileError(UserError):
    """A file of which nothing can be read; `what` it is."""

    def __init__(self, file: SourceFile, what: str, remedy: str) -> None:
        typed = shlex.quote(str(file.path))
        super().__init__(f"{file.path}: {what}; {remedy.replace('FILE', typed)}")
        self.what = what


def suffix_of(file: SourceFile) -> str:
    """Return the last suffix without those of compression, in lower case, with its dot."""
    name = name_without_compression(file.path)
    return f".{name.rpartition('.')[2]}" if "." in name.lstrip(".") else ""


def recognize(file: SourceFile) -> Recognized:
    """Return a file with its kind; raise ForeignFileError if it cannot be read."""
    if file.size == 0:
        return Recognized(file, "empty")
    try:
        content, compressions = open_decompressed(file)
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read ({error.strerror})") from error
    with content:
        head = content.read(HEAD_BYTES)
    if not head:
        return Recognized(file, "empty", compressions)
    kind = _kind(file, head)
    if kind in ("parquet", "arrow") and compressions:
        raise ForeignFileError(
            file, f"{kind} compressed with {compressions[0]}", "decompress it, then name the result"
        )
    looks_like_rows = suffix_of(file) == ".txt" and kind == "text" and _is_json_line(head)
    return Recognized(file, kind, compressions, looks_like_rows)


def _kind(file: SourceFile, head: bytes) -> Kind:
    for mark, what, remedy in FOREIGN:
        if head.startswith(mark):
            raise ForeignFileError(file, what, remedy)
    marked = next((kind for mark, kind in MARKS if head.startswith(mark)), None)
    if marked is not None:
        return marked
    if head[257:262] == b"ustar":
        raise ForeignFileError(file, "a tar archive", UNPACK)
    suffix = suffix_of(file)
    if suffix in (".bin", ".idx") and b"\0" in head:
        raise ForeignFileError(file, "a binary file", TOKENS)
    _refuse_wide_characters(file, head)
    named = KIND_OF_SUFFIX.get(suffix)
    if named is not None:
        _refuse_pages(file, head)
    if named in ("parquet", "arrow"):
        raise ForeignFileError(
            file, f"not {named} (it begins with {head[:8]!r})", "download it again"
        )
    if named is not None:
        return named
    if _has_no_meaning(suffix) and _is_json_line(head):
        return "json"
    if suffix not in TEXT_SUFFIXES and b"\0" in head and not _is_utf8(head):
        raise ForeignFileError(file, "a binary file", EXPORT)
    return "text"


def _has_no_meaning(suffix: str) -> bool:
    """Return whether a suffix is none, or a number: part-00000, shard.0001."""
    return re.fullmatch(r"\.[a-z]\w*", suffix) is None


def _is_utf8(head: bytes) -> bool:
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"  # the head ends within a character
    return True


def _refuse_wide_characters(file: SourceFile, head: bytes) -> None:
    """Raise for UTF-16 and UTF-32, with a mark or as every second byte of plain text shows it."""
    for name, marks in (("UTF-32", UTF_32), ("UTF-16", UTF_16)):
        if head.startswith(marks):
            raise _encoded(file, name, name)
    for name, zeros in (("UTF-16BE", head[0::2]), ("UTF-16LE", head[1::2])):
        if len(head) >= 16 and zeros.count(0) > 0.4 * len(zeros) and head.count(0) < len(head) / 2:
            raise _encoded(file, f"{name} by the look of it", name)


def _encoded(file: SourceFile, what: str, name: str) -> ForeignFileError:
    return ForeignFileError(
        file,
        f"{what}, need UTF-8",
        f"convert it: iconv -f {name} -t UTF-8 FILE > converted{suffix_of(file)}",
    )


def _refuse_pages(file: SourceFile, head: bytes) -> None:
    """Raise for what a server sends in place of a file."""
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:100].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        raise ForeignFileError(
            file, "an HTML page, probably a server's error message", "download it again"
        )
    if start.startswith((b"<?xml", b"<error")):
        raise ForeignFileError(
            file, "XML, probably a server's error message", "download it again, or convert it"
        )


def _is_json_line(head: bytes) -> bool:
    """Return whether the first line is an object or a string of JSON, as far as it can be seen."""
    line, newline, _ = head.removeprefix(BYTE_ORDER_MARK).lstrip().partition(b"\n")
    if not newline:
        return re.match(rb'\{\s*"(\\.|[^"\\])*"\s*:', line) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
