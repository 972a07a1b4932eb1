"""Files as people have them: any usual format and compression, nothing lost silently."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from datasets import Dataset as HuggingFaceDataset
from datasets import load_dataset

from megagpt import download_data
from megagpt.data import compression, encoding_pool, kinds, text_files
from megagpt.data import rows as row_readers
from megagpt.data.columns import BadRowError, Column
from megagpt.data.corpora import LocalFiles, TextPiece, open_source
from megagpt.download_data import PreparationRequest, prepare
from megagpt.utils import UserError

TEXTS = [
    f"Document {number}: naïve 🙂\nof two lines, {'and more ' * number}" for number in range(40)
]
HALVES = (TEXTS[:20], TEXTS[20:])


def json_lines(texts=TEXTS, column="text") -> bytes:
    return "".join(
        json.dumps({"n": n, column: text}, ensure_ascii=n % 2 == 0) + "\n"
        for n, text in enumerate(texts)
    ).encode()


def table(texts=TEXTS, **form) -> bytes:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n", **form).writerows(
        [("n", "text"), *((n, text) for n, text in enumerate(texts))]
    )
    return lines.getvalue().encode()


def arrow(texts=TEXTS, write: Callable = pyarrow.parquet.write_table, **form) -> bytes:
    columns = pyarrow.table({"n": list(range(len(texts))), "text": pyarrow.array(texts, "string")})
    content = pyarrow.BufferOutputStream()
    write(columns, content, **form)
    return content.getvalue().to_pybytes()


def arrow_stream(texts=TEXTS) -> bytes:
    columns = pyarrow.table({"text": texts})
    content = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(content, columns.schema) as stream:
        stream.write_table(columns, max_chunksize=10)
    return content.getvalue().to_pybytes()


def zstd(content: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level, write_checksum=True).compress(content)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(*names: Path | str, **options) -> list[str]:
    """The documents that some names stand for."""
    return joined(open_source([str(name) for name in names], **options).pieces())


def joined(pieces: Iterable[TextPiece]) -> list[str]:
    documents: list[str] = []
    for piece in pieces:
        assert piece.document == len(documents) - (not piece.starts)
        documents += [""] if piece.starts else []
        documents[-1] += piece.text
    return documents


def refusal(*names: Path | str, **options) -> str:
    with pytest.raises(UserError) as refused:
        read(*names, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Formats: the same documents, whatever holds them (rows 1, 8, 34)


FORMATS = {
    "lines.jsonl": json_lines(),
    "lines.ndjson": json_lines(),
    "lines.json": json_lines(),
    "bom.jsonl": b"\xef\xbb\xbf" + json_lines(),
    "crlf_and_blank.jsonl": json_lines().replace(b"\n", b"\r\n\r\n"),
    "no_newline_at_the_end.jsonl": json_lines()[:-1],
    "part-00000": json_lines(),
    "array.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "array_indented.json": json.dumps([{"text": text} for text in TEXTS], indent=2).encode(),
    "objects_indented.json": "\n".join(
        json.dumps({"text": text}, indent=2) for text in TEXTS
    ).encode(),
    "objects_without_breaks.jsonl": json_lines().replace(b"\n", b""),
    "cr_line_ends.jsonl": json_lines().replace(b"\n", b"\r"),
    "array_of_strings.json": json.dumps(TEXTS).encode(),
    "strings.jsonl": "".join(json.dumps(text) + "\n" for text in TEXTS).encode(),
    "table.csv": table(),
    "bom.csv": b"\xef\xbb\xbf" + table(),
    "all_quoted.csv": table(quoting=csv.QUOTE_ALL),
    "semicolons.csv": table(delimiter=";"),
    "table.tsv": table(delimiter="\t"),
    "UPPER.CSV": table(),
    "rows.parquet": arrow(),
    "small_groups.parquet": arrow(row_group_size=7),
    "named.txt": arrow(),
    "rows.feather": arrow(write=pyarrow.feather.write_feather),
    "rows.arrow": arrow_stream(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    assert read(write(tmp_path / name, FORMATS[name])) == TEXTS


def test_rows_are_those_that_datasets_reads(tmp_path):
    """The outside reference: Hugging Face `datasets` on the formats that it has."""
    for name in ("lines.jsonl", "table.csv", "rows.parquet"):
        path = write(tmp_path / name, FORMATS[name])
        form = {"jsonl": "json"}.get(path.suffix[1:], path.suffix[1:])
        theirs = load_dataset(form, data_files=str(path), split="train", streaming=True)
        assert [row["text"] for row in theirs] == read(path)


def test_what_datasets_saves_is_read(tmp_path):
    HuggingFaceDataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved", num_shards=3)
    assert (tmp_path / "saved" / "state.json").exists()
    assert read(tmp_path / "saved") == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.TXT", "README", "a.html", "a.ipynb"])
def test_any_text_is_a_document(tmp_path, name):
    text = '{"is": "text"}\n<html>\r\n\0' + "tab\t\n" * 10
    if name == "README":
        text = "# A heading\n" + text
    assert read(write(tmp_path / name, text)) == [text]


def test_a_byte_order_mark_is_dropped(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\nb\xef\xbb\xbf")) == ["a\nb\ufeff"]


def test_other_columns_may_be_anything(tmp_path):
    """RedPajama: `meta` and `id` differ between files and within one."""
    for number, other in enumerate([1, "a", None, {"b": [1]}, [{"c": 2.5}, "d"]]):
        rows = "".join(json.dumps({"text": text, "meta": other}) + "\n" for text in TEXTS[:3])
        write(tmp_path / f"{number}.jsonl", rows)
    assert read(tmp_path) == TEXTS[:3] * 5
    for name, other in (("a", [1]), ("b", ["x"])):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": ["one"], "meta": other}), tmp_path / f"{name}.parquet"
        )
    assert read(tmp_path / "*.parquet") == ["one", "one"]


# Columns


ROWS = [
    ({"text": "a"}, "text", "a"),
    ({"text": {"content": "a"}}, "text.content", "a"),
    ({"text.content": "a", "text": {"content": "b"}}, "text.content", "a"),
    ({"messages": [{"content": "a"}, {"content": "b"}]}, "messages.content", "a\nb"),
    ({"messages": [{"content": "a"}, {"role": "b"}]}, "messages.content", "a"),
    ({"text": ["a", "b"]}, "text", "a\nb"),
    ({"text": b"\xc3\xa9"}, "text", "é"),
    ({"title": "a", "text": "b"}, "{title}\\n\\n{text}", "a\n\nb"),
    ({"title": "a", "text": "b"}, "{title}\n\n{text}", "a\n\nb"),
    ({"title": None, "text": "b"}, "{title}: {text}", ": b"),
    ({"n": 1, "m": {"text": "b"}}, "{{{n}}} {m.text}", "{1} b"),
    ({"title": None}, "{title}: {text}", None),
    ({"text": None}, "text", None),
    ({"body": "a"}, "text", None),
    ({"text": {"body": "a"}}, "text.content", None),
    ({"text": []}, "text", None),
    ("a", "text", "a"),
]


@pytest.mark.parametrize(("row", "column", "text"), ROWS, ids=lambda value: str(value)[:40])
def test_a_column_names_a_text(tmp_path, row, column, text):
    assert Column(column).text(row) == text
    if isinstance(row, dict) and text is not None and b"\xc3\xa9" not in row.values():
        path = write(tmp_path / "a.jsonl", json.dumps(row) + "\n")
        assert read(path, column=column) == [text]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet", column=column) == [text]


BAD_ROWS = [
    (1, "text", "holds int, need an object with column 'text'"),
    ("a", "body", "holds str, need an object with column 'body'"),
    (None, "text", "is null"),
    ({"text": 1.5}, "text", "column 'text' holds float, not text"),
    (
        {"text": {"lang": "en", "content": "long enough"}},
        "text",
        r"an object \(lang, content\).*text\.content",
    ),
    ({"m": [{"role": "user", "content": "long enough"}]}, "m", r"for example m\.content"),
    ({"text": b"\xe9"}, "text", "not UTF-8"),
    ({"text": {"0": "a", "1": "b"}}, "text", "row by row instead, in pandas"),
    ({"text": {f"key{n}": n for n in range(99)}}, "text", r"key19 and 79 more\)"),
]


@pytest.mark.parametrize(("row", "column", "problem"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_a_row_of_another_shape_is_named(row, column, problem):
    with pytest.raises(BadRowError, match=problem):
        Column(column).text(row)


@pytest.mark.parametrize("written", ["", "{", "{}", "{a!r}", "{a:>3}", "no column {{}}"])
def test_a_template_that_names_no_column_is_refused(written):
    with pytest.raises(UserError, match="--column"):
        Column(written)


@pytest.mark.parametrize("content", [table(), arrow(), arrow_stream()], ids=["csv", "parquet", "a"])
def test_a_misspelt_column_is_found_at_once_where_there_is_a_header(tmp_path, content):
    path = write(tmp_path / "a.csv", content)
    assert "no column 'txt', did you mean \"text\"?" in refusal(path, column="txt")


def test_a_misspelt_column_of_json_is_found_before_the_end(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"body": "a"}\n' * 10_000 + b'{"text": "b"}\n')
    assert "none of its 10000 rows up to here has a text: no column 'text'" in refusal(path)


# Compression (rows 8, 22)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compression_is_told_by_content(tmp_path, kind):
    packed = COMPRESS[kind](json_lines())
    for name in (f"a.jsonl.{kind}", "a.jsonl", "a.json.gz"):
        assert read(write(tmp_path / name, packed)) == TEXTS
    assert read(write(tmp_path / f"a.txt.{kind}", packed)) == [json_lines().decode()]
    twice = gzip.compress(packed)  # a server that compresses .gz files again
    assert read(write(tmp_path / "twice.jsonl.gz", twice)) == TEXTS
    assert read(write(tmp_path / "a.jsonl.gz", json_lines())) == TEXTS  # it is not compressed


@pytest.mark.parametrize("kind", COMPRESS)
def test_members_follow_one_another(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(compression, "COMPRESSED_BLOCK_BYTES", 11)
    members = b"".join(COMPRESS[kind](json_lines([text])) for text in TEXTS)
    assert read(write(tmp_path / "a.jsonl", members)) == TEXTS
    assert read(write(tmp_path / "a.jsonl", members + b"\0" * 600)) == TEXTS  # padding of a tape


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    """No cut gives fewer documents without an error, but at the end of a whole member."""
    first, second = (COMPRESS[kind](json_lines(half)) for half in HALVES)
    whole = first + second
    cuts = {1, 2, 3, 5, 9, 12, len(first) // 2, *range(len(first) - 9, len(first) + 15)}
    cuts |= {len(whole) - 1, len(whole) - 4, len(whole) - 9, len(first) + len(second) // 2}
    for cut in sorted(cuts - {len(first)}):
        path = write(tmp_path / "a.jsonl.zst", whole[:cut])
        assert "a.jsonl.zst" in refusal(path), cut
    assert read(write(path, whole)) == TEXTS


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_changed_byte_or_a_rest_is_refused(tmp_path, kind):
    packed = COMPRESS[kind](json_lines())
    changed = bytearray(packed)
    changed[len(packed) // 2] ^= 0x55
    assert "a.jsonl" in refusal(write(tmp_path / "a.jsonl", bytes(changed)))
    path = write(tmp_path / "a.jsonl", packed + b"<html>")
    assert "follows member or frame 1" in refusal(path)


def test_zstd_as_others_write_it(tmp_path):
    """Frames to skip (pzstd, seekable files) and the window of `zstd --long=31` (Reddit)."""
    skipped = (0x184D2A5E).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    frames = skipped + zstd(json_lines(HALVES[0])) + skipped + zstd(json_lines(HALVES[1])) + skipped
    assert read(write(tmp_path / "a.jsonl.zst", frames)) == TEXTS
    long = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    stream = zstandard.ZstdCompressor(compression_params=long).compressobj()
    packed = stream.compress(json_lines()) + stream.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 2**31
    assert read(write(tmp_path / "b.jsonl.zst", packed)) == TEXTS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.feather", "rows.arrow", "array.json"])
def test_other_files_cut_anywhere_are_refused(tmp_path, name):
    whole = FORMATS[name]
    cuts = [len(whole) * part // 10 for part in range(1, 10)]
    for cut in (*cuts, len(whole) - 8, len(whole) - 2, len(whole) - 1):
        assert name in refusal(write(tmp_path / name, whole[:cut])), cut


def test_a_stream_of_arrow_cut_between_batches_is_refused(tmp_path):
    content = pyarrow.BufferOutputStream()
    stream = pyarrow.ipc.new_stream(content, pyarrow.schema({"text": "string"}))
    stream.write_table(pyarrow.table({"text": TEXTS[:30]}))
    cut = content.getvalue().to_pybytes()  # nobody has closed the stream
    with pyarrow.ipc.open_stream(cut) as stream:
        assert stream.read_all().num_rows == 30  # pyarrow itself takes it
    assert "no end mark" in refusal(write(tmp_path / "a.arrow", cut))


# What only looks like data (rows 34, 36)


FOREIGN = [
    ("a.jsonl", b"<!DOCTYPE html><html><body>404</body></html>\n", "an HTML page"),
    ("a.parquet", b"\n<HTML><head>", "an HTML page"),
    ("a.jsonl.gz", b"<!doctype html>" + b" " * 99, "an HTML page"),
    ("a.json", b"<?xml version='1.0'?><Error><Code>AccessDenied", "XML, probably a server's"),
    (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer; git lfs pull",
    ),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ("a.jsonl", b"- text: one\n- text: two\n", r"a\.jsonl:1: YAML, need JSON"),
    ("a.jsonl", b"text: one\n", "YAML"),
    ("a.jsonl", b"{'text': 'one'}\n", "Python's notation with single quotes"),
    ("a.txt", "Ünïcode".encode("utf-16"), r"UTF-16, need UTF-8; .*iconv -f UTF-16 -t UTF-8"),
    ("a.jsonl", json_lines().decode().encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    ("a.csv", table().decode().encode("utf-32"), "iconv -f UTF-32 -t UTF-8"),
    ("a.txt", "naïve café".encode("latin-1"), "not UTF-8 at byte 2 .*iconv -f LATIN1"),
    ("a.txt", "“quoted”".encode("cp1252"), "iconv -f CP1252"),
    ("a.csv", "text\nfine\ncafé\n".encode("latin-1"), r"a\.csv:3: .*iconv -f LATIN1"),
    ("a.txt", "cut within é".encode()[:-1], "UTF-8, at byte 11: it is cut off, or in another"),
    ("a.txt", b"PK\x03\x04abcdefgh", "a zip archive.*unpack it"),
    ("a.txt", b"%PDF-1.7", "a PDF; .*pdftotext"),
    ("a.parquet", b'{"text": "a"}\n', r"not parquet \(it begins with"),
    ("a.parquet", b"PAR1" + b"\0" * 20, "damaged or cut off"),
    ("a.tar", b"name".ljust(257, b"\0") + b"ustar\0", "a tar archive"),
    ("a.tgz", gzip.compress(b"name".ljust(257, b"\0") + b"ustar\0", mtime=0), "a tar archive"),
    ("a.bin", bytes(range(256)), "a binary file"),
    (
        "a.parquet.gz",
        gzip.compress(arrow(), mtime=0),
        "parquet compressed with gzip; decompress it",
    ),
]


@pytest.mark.parametrize(("name", "content", "said"), FOREIGN, ids=lambda value: str(value)[:30])
def test_what_is_not_data_is_named_as_what_it_is(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"{name}.*" + said if r"\." not in said else said):
        read(path)


# Bad rows (row 13)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\0" * 64, "only NUL bytes, as a crash leaves them"),
        (b'{"text": "missing quote}', r"not JSON \(Unterminated string starting at: column 10\)"),
        (b'{"text": "a" "b"}', r"not JSON \(Expecting ',' delimiter: column 14\)"),
        (b'{"text": "a\0b"}', r"not JSON \(Invalid control character"),
        (b'{"text": "\xe9"}', "not UTF-8 at byte 10"),
        (b'{"text": 5}', "column 'text' holds int"),
        (b'["a"]', "holds an array, need an object"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"n": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_a_bad_row_is_named_or_skipped(tmp_path, line, said):
    lines = json_lines().splitlines(keepends=True)
    content = b"".join([*lines[:20], line + b"\n", *lines[20:]])
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=rf"a\.jsonl:21: .*({said}).*--skip_bad_rows N"):
        read(path)
    source = open_source(str(path), skip_bad_rows=1)
    assert [piece.text for piece in source.pieces()] == TEXTS
    assert "bad rows skipped: 1 of 1 allowed" in source.left_out.lines()
    assert source.left_out.record() == {"skipped_bad_rows": 1}
    write(path, content + line + b"\n")
    once_more = refusal(path, skip_bad_rows=1)
    assert "a.jsonl:42: " in once_more
    assert "after 1 that were skipped" in once_more


def test_a_line_that_is_cut_off_is_a_bad_row(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines() + b'{"text": "the run was killed whi')
    said = refusal(path)
    assert "a.jsonl:41: not JSON" in said
    assert "the file may be cut off here" in said
    assert read(path, skip_bad_rows=1) == TEXTS


BAD_TABLES = [
    (b"n,text\n1,fine\n2,two,many\n3,fine\n", ":3: 3 fields, the header has 2"),
    (b'n,text\n1,fine\n2,"a"b\n3,fine\n', ":3: not a row of the table"),
    (b"n,text\n1,fine\n2,caf\xe9\n3,fine\n", ":3: not a row of the table .not UTF-8 at byte 5"),
    (b'n,text\n1,"fi\nne"\n2\n3,fine\n', ":4: 1 fields, the header has 2"),
]


@pytest.mark.parametrize(("content", "said"), BAD_TABLES)
def test_a_bad_row_of_a_table(tmp_path, content, said):
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(UserError, match=said):
        read(path)
    kept = [text.replace("\n", "") for text in read(path, skip_bad_rows=1)]
    assert kept == ["fine", "fine"]


def test_a_quote_that_nobody_closes_does_not_hide_rows(tmp_path, monkeypatch):
    path = write(tmp_path / "a.csv", b'text\nfine\n"open\n' + b"more\n" * 10)
    assert "a.csv:3: not a row of the table (unexpected end of data)" in refusal(path)
    monkeypatch.setattr(row_readers, "LONGEST_FIELD", 20)
    assert "a.csv:3: not a row of the table (field larger" in refusal(path)
    csv.field_size_limit(2**17)


def test_a_lone_surrogate_is_replaced(tmp_path):
    lines = b'{"text": "broken \\ud83d emoji"}\n{"text": "raw \xed\xa0\xbd"}\n'
    path = write(tmp_path / "a.jsonl", lines + json_lines())
    prepare(PreparationRequest(str(path), tmp_path / "out", "bytes"), report=lambda line: None)
    tokens = b"".join(
        bytes(byte for byte in part.read_bytes()[::2]) for part in (tmp_path / "out").glob("*.bin")
    )
    assert tokens.count("broken \ufffd emoji".encode()) == 1
    assert b"raw \xef\xbf\xbd" in tokens


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"text": "a"}, {"text": "b" "c"}]', ":1: not JSON .Expecting ',' delimiter"),
        (b'[\n{"text": "a"},\n{"text": 5}]', ":3: column 'text' holds int"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', ":2: something follows the array"),
        (b'{\n "text": "a"\n}\n{\n "text": nul }', ":5: not JSON"),
    ],
)
def test_a_bad_value_of_many_lines_is_named(tmp_path, content, said):
    with pytest.raises(UserError, match=rf"a\.json{said}"):
        read(write(tmp_path / "a.json", content))


# Rows without text, empty files (rows 15, 21)


@pytest.mark.parametrize("missing", [b'{"text": null}', b'{"title": "x"}', b'{"text": ""}'])
def test_rows_without_text_do_not_count(tmp_path, missing):
    path = write(tmp_path / "a.jsonl", (missing + b"\n") * 10 + json_lines())
    source = open_source(str(path))
    assert [(piece.document, piece.text) for piece in source.pieces()] == list(enumerate(TEXTS))
    assert source.left_out.lines() == [f"10 rows without text left out, the first is {path}:1"]
    said: list[str] = []
    made = prepare(PreparationRequest(str(path), tmp_path / "out", "bytes"), report=said.append)
    assert made.tokens("val") > 0
    assert made.source["rows_without_text"] == 10
    assert any("10 rows without text left out" in line for line in said)


def test_a_file_whose_rows_lack_the_column_is_named(tmp_path):
    write(tmp_path / "a.jsonl", json_lines())
    other = write(tmp_path / "b.jsonl", json_lines(column="Text"))
    write(tmp_path / "c.jsonl", b'{"text": null}\n')
    source = open_source(str(tmp_path))
    assert joined(source.pieces()) == TEXTS
    (line,) = (line for line in source.left_out.lines() if "nothing read" in line)
    assert line.startswith(f"nothing read from {other}: no column 'text', did you mean \"Text\"?")


@pytest.mark.parametrize("place", ["file", "file/x", "file/x/y"])
def test_an_output_below_a_file_is_refused(tmp_path, place):
    path = write(tmp_path / "file", b"mine")
    request = PreparationRequest(str(write(tmp_path / "a.jsonl", json_lines())), tmp_path / place)
    with pytest.raises(UserError, match=r"; choose another --output$"):
        prepare(request)
    assert path.read_bytes() == b"mine"


def test_nothing_to_validate_on_is_said(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines())
    said: list[str] = []
    request = PreparationRequest(str(path), tmp_path / "out", "bytes", validation_fraction=0)
    prepare(request, report=said.append)
    (line,) = (line for line in said if "no text for validation" in line)
    assert "--set megagpt.training.eval_interval_steps=0" in line


def test_a_text_of_one_line_has_something_held_out(tmp_path):
    for number, text in enumerate(["A" * 1000, "A" * 1000 + "\n"]):
        path = write(tmp_path / f"{number}.txt", text)
        made = prepare(PreparationRequest(str(path), tmp_path / f"{number}", "bytes"), print)
        assert made.tokens("val") == pytest.approx(100, abs=2)


def test_empty_parts_are_skipped_and_named(tmp_path):
    empty = {
        "0.jsonl": b"",
        "1.jsonl.gz": gzip.compress(b""),
        "2.parquet": arrow([]),
        "3.csv": b"text\n",
        "4.json": b"[]",
        "5.jsonl": b"\n\n",
    }
    for name, content in empty.items():
        write(tmp_path / "data" / name, content)
    assert "no text found (6 empty files)" in refusal(tmp_path / "data")
    write(tmp_path / "data" / "9.jsonl", json_lines())
    source = open_source(str(tmp_path / "data"))
    assert [piece.text for piece in source.pieces()] == TEXTS
    (line,) = source.left_out.lines()
    assert all(name in line for name in empty)
    path = write(tmp_path / "a.txt", b"")
    assert f"nothing in it (empty: {path})" in refusal(path)


# Which files (row 31)


def test_a_directory_is_read_in_order_without_hidden_files(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/.hidden.jsonl", ".git/c.jsonl", "C.JSONL"):
        write(tmp_path / name, json_lines([name]))
    write(tmp_path / "README.md", "about it")
    source = open_source(str(tmp_path))
    assert [piece.text for piece in source.pieces()] == ["C.JSONL", "a/z.jsonl", "b.jsonl"]
    assert any("not read: README.md" in note for note in source.notes)
    write(tmp_path / "essay.txt", "a text")
    assert "has files of rows and files of text (3 .jsonl, 1 .txt)" in refusal(tmp_path)


def test_a_directory_of_code_is_texts(tmp_path):
    for name in ("a.py", "b/c.c", "Makefile", "README.md"):
        write(tmp_path / name, f"# {name}\n")
    write(tmp_path / "logo.png", b"\x89PNG\r\n\x1a\n")
    write(tmp_path / "b" / "c.pyc", bytes(range(256)))
    source = open_source(str(tmp_path))
    texts = [piece.text for piece in source.pieces()]
    assert texts == ["# Makefile\n", "# README.md\n", "# a.py\n", "# b/c.c\n"]
    assert any("c.pyc is a binary file, and 1 others" in note for note in source.notes)


def test_the_cache_of_the_hub_is_read_once(tmp_path):
    blob = write(tmp_path / "blobs" / "4d7a", arrow())
    link = tmp_path / "snapshots" / "main" / "train-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert read(tmp_path) == TEXTS
    assert read(link) == TEXTS


def test_rows_under_the_name_of_a_text_are_noted(tmp_path):
    path = write(tmp_path / "a.txt", json_lines())
    source = open_source(str(path))
    assert joined(source.pieces()) == [json_lines().decode()]
    assert any("call it .jsonl to read its rows" in note for note in source.notes)


def test_several_names_in_the_order_of_paths_each_file_once(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.jsonl", json_lines([name]))
    names = [tmp_path / "c.jsonl", tmp_path / "[ab].jsonl", tmp_path]
    assert read(*names) == ["a", "b", "c"]
    notes = open_source([str(name) for name in names]).notes
    assert f"{tmp_path / 'a.jsonl'} and 2 others: named more than once, read once" in notes


def test_names_with_commas_between_them_are_told_from_a_missing_file(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", json_lines([name]))
    with pytest.raises(UserError, match="with spaces between them"):
        open_source(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}")


def test_a_path_that_exists_is_taken_as_it_is_written(tmp_path):
    write(tmp_path / "d[v1]" / "part[0].jsonl", json_lines())
    for name in ("d[v1]", "d[v1]/part[0].jsonl", "d[v1]/*.jsonl"):
        assert read(tmp_path / name) == TEXTS


def test_names_of_the_hub_are_not_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_source("HuggingFaceFW/fineweb-edu").description["split"] == "train"
    assert "x.jsonl: no such file" in refusal("data/x.jsonl")
    write(tmp_path / "owner" / "name" / "a.jsonl", json_lines())
    assert read("owner/name") == TEXTS


def test_a_separator_ends_documents(tmp_path, monkeypatch):
    """TinyStories: one file, `<|endoftext|>` on a line of its own between stories."""
    path = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(TEXTS) + "\n<|endoftext|>\n")
    source = open_source(str(path))
    assert len(joined(source.pieces())) == 1
    assert any("--separator '<|endoftext|>'" in line for line in source.left_out.lines())
    for block in (7, 100, 10**6):
        monkeypatch.setattr(text_files, "TEXT_BLOCK_BYTES", block)
        assert read(path, separator="<|endoftext|>") == TEXTS
    monkeypatch.setattr(text_files, "TEXT_BLOCK_BYTES", 7)
    monkeypatch.setattr(text_files, "LONGEST_TEXT_PIECE", 50)
    pieces = list(open_source(str(path), separator="<|endoftext|>").pieces())
    assert len(pieces) > len(TEXTS)
    assert joined(pieces) == TEXTS


# A file that changes, a short read


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "parquet"])
def test_a_file_that_changes_during_the_preparation_is_refused(tmp_path, suffix):
    content = {"txt": b"a line\n" * 500_000, "jsonl": json_lines() * 100, "csv": table()}
    path = write(tmp_path / f"a.{suffix}", content.get(suffix, arrow(TEXTS * 200)))
    source = open_source(str(path))
    pieces = source.pieces()
    next(pieces)
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=rf"a\.{suffix}: changed during the preparation"):
        list(pieces)
    with pytest.raises(UserError, match="changed"):
        source.require_unchanged()
    path.unlink()
    with pytest.raises(UserError, match="was there when the preparation started"):
        source.require_unchanged()


def test_a_file_that_shrinks_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines() * 200)
    pieces = open_source(str(path)).pieces()
    next(pieces)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="changed during the preparation"):
        list(pieces)


def test_a_preparation_of_a_file_that_changed_at_its_end_is_refused(tmp_path, monkeypatch):
    """It had been read to its end; the dataset would not be that of the file."""
    path = write(tmp_path / "a.jsonl", json_lines())
    pieces = LocalFiles._all_pieces

    def changing(source):
        yield from pieces(source)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(LocalFiles, "_all_pieces", changing)
    with pytest.raises(UserError, match="changed during the preparation"):
        prepare(PreparationRequest(str(path), tmp_path / "out", "bytes"), report=print)
    assert not (tmp_path / "out").exists()


def test_a_row_count_that_is_not_the_footer_s_is_refused():
    rows = row_readers._counted(iter(pyarrow.table({"text": TEXTS}).to_batches()), 41, Path("a"))
    with pytest.raises(UserError, match="has 40 rows, its footer says 41"):
        list(rows)


# Going on, memory


def test_a_preparation_goes_on_with_more_bad_rows_allowed(tmp_path, monkeypatch):
    """The number of bad rows to skip is no other request: what was prepared stays."""
    monkeypatch.setattr(download_data, "COMMIT_TOKENS", 500)
    monkeypatch.setattr(encoding_pool, "BATCH_CHARACTERS", 200)
    path = write(tmp_path / "a.jsonl", json_lines() + b"{\n" + json_lines())
    request = PreparationRequest(str(path), tmp_path / "out", "bytes")
    with pytest.raises(UserError, match=r"a\.jsonl:41: not JSON"):
        prepare(request, report=print)
    said: list[str] = []
    made = prepare(replace(request, skip_bad_rows=1), report=said.append)
    assert "continuing after" in said[0]
    assert any(f"bad row skipped: {path}:41: not JSON" in line for line in said)
    assert made.documents == 80
    at_once = prepare(
        replace(request, skip_bad_rows=1, output=tmp_path / "at_once"), report=said.append
    )
    assert made.fingerprint == at_once.fingerprint


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json", "a.parquet", "a.txt", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    """Peaks over a file and over one of eight times as much; both far above the block sizes."""
    for module, block in ((text_files, "TEXT_BLOCK_BYTES"), (compression, "READ_AHEAD_BYTES")):
        monkeypatch.setattr(module, block, 2**14)
    monkeypatch.setattr(row_readers, "BATCH_BYTES", 2**14)
    large: dict[str, Callable[[list[str]], bytes]] = {
        "a.jsonl.gz": lambda texts: gzip.compress(json_lines(texts), 1),
        "a.json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
        "a.parquet": lambda texts: arrow(texts, data_page_size=2**14, use_dictionary=False),
        "a.txt": lambda texts: "".join(texts).encode(),
        "a.csv": table,
    }

    def peak(times: int) -> int:
        numbers = random.Random(0)  # what repeats would be compressed to almost nothing
        texts = [numbers.randbytes(250).hex() + "\nno more\n" for _ in range(500 * times)]
        path = write(tmp_path / name, large[name](texts))
        del texts
        before = pyarrow.default_memory_pool().bytes_allocated()
        tracemalloc.start()
        for _ in open_source(str(path)).pieces():
            before = max(before, pyarrow.default_memory_pool().bytes_allocated())
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most + before

    peak(1)  # imports
    assert peak(8) < 1.5 * peak(1) + 2**17


def test_kinds_of_suffixes_are_kinds():
    assert set(kinds.KIND_OF_SUFFIX.values()) <= set(kinds.ROWS)
