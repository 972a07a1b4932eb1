"""Read a file from its first byte to its last, whatever compresses it.

The first bytes tell the compression, not the name: gzip, bzip2, xz and zstd. Several members or
frames may follow one another (pigz, pzstd, `cat a.gz b.gz`). A file that ends within one, or that
has something else after the last, is an error: most readers end there silently, and text is lost.
So is a file that is not the one that was there when the preparation started.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from megagpt.utils import KIB, MIB, UserError

COMPRESSED_BLOCK_BYTES = 16 * KIB  # zstd may make 32,768 times as much of it
READ_AHEAD_BYTES = MIB
# zstd --long=31, which the Reddit dumps use; the library's own limit is 128 MiB.
LARGEST_ZSTD_WINDOW = 2**31
MOST_LAYERS = 3  # some servers compress .gz files once more


class SourceFile(NamedTuple):
    """A file as it was when the preparation started."""

    path: Path
    size: int
    modified_ns: int

    @classmethod
    def found(cls, path: Path) -> SourceFile:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def require_unchanged(self) -> None:
        """Raise UserError if the file is not the one that was found."""
        try:
            now = SourceFile.found(self.path)
        except OSError as error:
            raise UserError(
                f"{self.path}: it was there when the preparation started ({error.strerror}); "
                f"bring it back and give the same command again"
            ) from None
        if now != self:
            raise UserError(
                f"{self.path}: changed during the preparation (found {now.size} bytes, need "
                f"{self.size}, and the same time); wait until it is complete and start again "
                f"with --force"
            )


@dataclass(frozen=True)
class Compression:
    """One way to compress: its name, how it begins, and a new decompressor."""

    name: str
    begins: Callable[[bytes], bool]
    decompressor: Callable[[], Any]


def _begins_zstd(head: bytes) -> bool:
    """Return whether a frame begins here: of data, or one to skip (pzstd, seekable files)."""
    skippable = len(head) > 0 and 0x50 <= head[0] <= 0x5F and head[1:4] == b"\x2a\x4d\x18"
    return head.startswith(b"\x28\xb5\x2f\xfd") or skippable


def _begins_bzip2(head: bytes) -> bool:
    blocks = (b"1AY&SY", b"\x17rE8P\x90")  # the first block, or the end of an empty file
    return head.startswith(b"BZh") and any(block.startswith(head[4:10]) for block in blocks)


COMPRESSIONS = (
    Compression("gzip", lambda head: head.startswith(b"\x1f\x8b"), lambda: zlib.decompressobj(31)),
    Compression("bzip2", _begins_bzip2, bz2.BZ2Decompressor),
    Compression("xz", lambda head: head.startswith(b"\xfd7zXZ"), lzma.LZMADecompressor),
    Compression(
        "zstd",
        _begins_zstd,
        lambda: zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW).decompressobj(),
    ),
)
SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")


def name_without_compression(path: Path) -> str:
    """Return a file's name in lower case without the suffixes of compression."""
    name = path.name.lower()
    while stem := next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), ""):
        name = stem
    return name


def open_decompressed(file: SourceFile) -> tuple[io.BufferedReader[Any], tuple[str, ...]]:
    """Open a file; return its content and the names of the compressions, the outermost first.

    Reading raises UserError, with the file's name, if the file is damaged, cut off or changed.
    """
    content: io.BufferedReader[Any] = io.BufferedReader(_WholeFile(file), READ_AHEAD_BYTES)
    layers: list[str] = []
    while (compression := _compression_of(content)) is not None:
        if len(layers) == MOST_LAYERS:
            raise UserError(f"{file.path}: compressed more than {MOST_LAYERS} times; unpack it")
        layers.append(compression.name)
        content = io.BufferedReader(
            _Decompressed(content, compression, file.path), READ_AHEAD_BYTES
        )
    return content, tuple(layers)


def _compression_of(content: io.BufferedReader[Any]) -> Compression | None:
    head = content.peek(10)[:10]
    if len(head) < 4:
        return None
    return next((known for known in COMPRESSIONS if known.begins(head)), None)


class _WholeFile(io.RawIOBase):
    """The bytes of a file; at its end, and not before, the file must be the one that was found."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._descriptor = os.open(file.path, os.O_RDONLY)
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = os.readv(self._descriptor, [buffer])
        self._read += count
        if count == 0 and self._read != self._file.size:
            self._file.require_unchanged()
            raise UserError(
                f"{self._file.path}: short read (found {self._read} bytes, need "
                f"{self._file.size}); check its disk"
            )
        if count == 0:
            self._file.require_unchanged()
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class _Decompressed(io.RawIOBase):
    """The content of members or frames that follow one another until the compressed data end."""

    def __init__(self, compressed: BinaryIO, compression: Compression, path: Path) -> None:
        self._compressed = compressed
        self._compression = compression
        self._path = path
        self._decompressor: Any = None  # None between two members
        self._unused = b""  # compressed bytes after the end of a member
        self._ready = memoryview(b"")
        self._members = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, but for the end of the content."""
        filled = 0
        while filled < len(buffer) and (self._ready or self._more()):
            count = min(len(buffer) - filled, len(self._ready))
            buffer[filled : filled + count] = self._ready[:count]
            self._ready = self._ready[count:]
            filled += count
        return filled

    def _more(self) -> bool:
        """Decompress until something is ready; return False at the end of the content."""
        while not self._ready:
            data = self._unused or self._compressed.read(COMPRESSED_BLOCK_BYTES)
            self._unused = b""
            if not data and self._decompressor is not None:
                raise self._damaged(
                    f"ends within member or frame {self._members} of its {self._compression.name} "
                    "data: it is cut off"
                )
            if not data:
                return False
            if self._decompressor is None:
                data = self._next_member(data)
            if data:
                self._ready = memoryview(self._decompress(data))
        return True

    def _next_member(self, data: bytes) -> bytes:
        """Begin a member; return its data, empty where only padding was left."""
        data = data.lstrip(b"\0")  # tapes and some servers fill the last block with zeros
        if not data:
            return b""
        if len(data) < 10:
            data += self._compressed.read(COMPRESSED_BLOCK_BYTES)
        if not self._compression.begins(data):
            raise self._damaged(
                f"something that is not {self._compression.name} follows member or frame "
                f"{self._members}"
            )
        self._members += 1
        self._decompressor = self._compression.decompressor()
        return data

    def _decompress(self, data: bytes) -> bytes:
        try:
            ready: bytes = self._decompressor.decompress(data)
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as error:
            raise self._damaged(
                f"member or frame {self._members} of its {self._compression.name} data is damaged "
                f"({error})"
            ) from error
        if self._decompressor.eof:
            self._unused = self._decompressor.unused_data
            self._decompressor = None
        return ready

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"{self._path}: {problem}; download it again")

    def close(self) -> None:
        self._compressed.close()
        super().close()
