"""Read UTF-8 text in blocks and in pieces, from a stream of any length."""

from __future__ import annotations

import codecs
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megagpt.data.kinds import BYTE_ORDER_MARK
from megagpt.utils import MIB, UserError

TEXT_BLOCK_BYTES = MIB
LONGEST_TEXT_PIECE = 16 * MIB  # characters; a text without plain line breaks is cut here


def documents(
    content: BinaryIO, path: Path, separator: str | None
) -> Iterator[tuple[str, bool, bool]]:
    """Yield (text, starts a document, ends it) of the pieces of a file.

    The file is one document, or several with `separator` between them; line breaks beside a
    separator belong to it.
    """
    if separator is None:
        pieces: Iterator[tuple[str, bool]] = _marked_last(text_pieces(content, path))
    else:
        pieces = _separated(content, path, separator)
    starts = True
    for text, ends in pieces:
        yield text, starts, ends
        starts = ends


def _marked_last(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    text = next(texts, "")
    for following in texts:
        yield text, False
        text = following
    yield text, True


def _separated(content: BinaryIO, path: Path, separator: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether it ends a document); documents without text are left out."""
    text = ""
    begun = False  # whether a part of this document has been yielded
    for block in decoded_blocks(content, path):
        *ended, text = (text + block).split(separator)
        for document in ended:
            document = document.rstrip("\n") if begun else document.strip("\n")
            if document or begun:
                yield document, True
            begun = False
        if len(text) > LONGEST_TEXT_PIECE:  # a separator may have begun at its end
            part = text[: -len(separator)].rstrip("\n")
            rest = text[len(part) :]
            yield part if begun else part.lstrip("\n"), False
            text = rest
            begun = True
    text = text.rstrip("\n") if begun else text.strip("\n")
    if text or begun:
        yield text, True


def text_pieces(content: BinaryIO, path: Path) -> Iterator[str]:
    """Yield the text, cut where no tokenizer pattern crosses.

    That is at a line break between two visible characters.
    """
    text = ""
    for block in decoded_blocks(content, path):
        text += block
        cut = _last_plain_line_break(text)
        if cut is None and len(text) > LONGEST_TEXT_PIECE:
            cut = len(text)
        if cut is not None:
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _last_plain_line_break(text: str) -> int | None:
    """Return the position after the last "\\n" that has a visible character on either side."""
    place = len(text)
    while (place := text.rfind("\n", 1, place)) != -1:
        if (
            place + 1 < len(text)
            and not text[place - 1].isspace()
            and not text[place + 1].isspace()
        ):
            return place + 1
    return None


def decoded_blocks(content: BinaryIO, path: Path) -> Iterator[str]:
    """Yield the text of a stream, without a byte-order mark; raise UserError with the place."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read_bytes = 0
    while True:
        block = content.read(TEXT_BLOCK_BYTES)
        if read_bytes == 0 and block.startswith(BYTE_ORDER_MARK):
            block = block[len(BYTE_ORDER_MARK) :]
            read_bytes = len(BYTE_ORDER_MARK)
        held_back = len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = read_bytes - held_back + error.start
            raise UserError(f"{path}: {not_utf8(error, offset, path)}") from None
        if not block:
            return
        read_bytes += len(block)


def not_utf8(error: UnicodeDecodeError, offset: int, path: Path) -> str:
    """Return what is wrong with bytes that are not UTF-8, and what to type."""
    if error.reason == "unexpected end of data":
        return (
            f"ends within a character of UTF-8, at byte {offset}: it is cut off, or in another "
            f"encoding; download it again, or convert it, for example: "
            f"{_conversion('LATIN1', path)}"
        )
    # Windows has printable characters where Latin-1 has control characters.
    name = "CP1252" if 0x80 <= error.object[error.start] <= 0x9F else "LATIN1"
    return (
        f"not UTF-8 at byte {offset} ({error.reason}); convert it, for example: "
        f"{_conversion(name, path)}"
    )


def _conversion(name: str, path: Path) -> str:
    """Return the command that converts a file to UTF-8."""
    converted = f"converted{path.suffix or '.txt'}"
    return f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > {converted}"
