"""Files that hold neither text nor tokens, by their first bytes."""

from __future__ import annotations

UNPACK = "unpack it and name what is in it"
EXPORT = "export it as JSON lines, parquet or text"
# What people have beside text: how it begins -> what it is, what to do.
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer", "git lfs pull"),
    (b"PK\x03\x04", "a zip archive (or a file of an office program)", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", UNPACK),
    (b"\x04\x22\x4d\x18", "lz4 data", "lz4 -d FILE"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy data", UNPACK),
    (b"%PDF-", "a PDF", "extract its text, for example: pdftotext FILE"),
    (b"SQLite format 3\x00", "an SQLite database", EXPORT),
    (b"\x89HDF\r\n", "an HDF5 file", EXPORT),
    (b"Obj\x01", "an Avro file", EXPORT),
    (b"ORC", "an ORC file", EXPORT),
    (b"\x93NUMPY", "an array of numpy", EXPORT),
    (b"\x80\x04\x95", "a pickle, which is never loaded", EXPORT),
    (b"\x80\x05\x95", "a pickle, which is never loaded", EXPORT),
    (b"\x89PNG\r\n", "an image", EXPORT),
    (b"\xff\xd8\xff", "an image", EXPORT),
    (b"GIF8", "an image", EXPORT),
    (b"\x7fELF", "a program", EXPORT),
)
