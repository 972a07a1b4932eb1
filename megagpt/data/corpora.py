"""Sources of documents: Python's standard library, local files, any Hugging Face dataset.

A source yields pieces in a fixed order. Most are whole documents; a long text file comes in several
pieces. An interrupted preparation only has to remember the number of pieces taken.
"""

from __future__ import annotations

import codecs
import glob
import itertools
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import JsonValue

from megagpt.utils import MIB, UserError

TEXT_BLOCK_BYTES = MIB
LONGEST_TEXT_PIECE = 16 * MIB  # characters; a text without plain line breaks is cut here
FORMAT_OF_SUFFIX = {".txt": "text", ".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet"}
# Tests, the editor, character tables and help texts: large, and not typical code.
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "turtledemo",
    "ensurepip",
}
INSTALLED = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class TextPiece:
    """Part of a document.

    `document` counts from 0. `starts` and `ends` say whether this is its first and its last
    part.
    """

    document: int
    text: str
    starts: bool = True
    ends: bool = True


class Corpus(Protocol):
    """A corpus.

    `description` goes into the manifest. A preparation continues only if `version` is
    unchanged.
    """

    description: dict[str, JsonValue]
    version: JsonValue
    size_bytes: int | None  # size of the text, if it is known in advance

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        """Yield every piece except the first `skip`."""
        ...


def open_source(
    dataset: str | tuple[str, ...],
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
) -> Corpus:
    """Return the source that `--dataset` names; raise UserError if there is none.

    Several names, such as those that a shell makes of a pattern, are files of one format.
    """
    if dataset == "stdlib":
        return StandardLibrary(Path(sysconfig.get_path("stdlib")))
    patterns = (dataset,) if isinstance(dataset, str) else dataset
    formats = {_format_of(pattern) for pattern in patterns}
    if None not in formats:
        if len(formats) > 1:
            raise UserError(
                f"--dataset {shown(dataset)}: files of several formats; prepare one format at a "
                f"time"
            )
        return _local_source(patterns, str(formats.pop()), column)
    if not isinstance(dataset, str):
        other = next(pattern for pattern in patterns if _format_of(pattern) is None)
        raise UserError(
            f"--dataset {other}: among several names each is a file that ends in "
            f"{', '.join(FORMAT_OF_SUFFIX)}"
        )
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) and not Path(dataset).exists():
        description: dict[str, JsonValue] = {
            "dataset": dataset,
            "config": config,
            "split": split,
            "column": column,
        }
        return TableFiles(
            description, {"path": dataset, "name": config, "split": split}, column, None, None
        )
    raise UserError(
        f"--dataset {dataset}: use stdlib, a Hugging Face dataset (owner/name), or a path or "
        f"pattern that ends in {', '.join(FORMAT_OF_SUFFIX)}"
    )


def shown(dataset: str | tuple[str, ...]) -> str:
    """Return the words of `--dataset`, the first of many."""
    words = (dataset,) if isinstance(dataset, str) else dataset
    return f"{words[0]} and {len(words) - 1} more" if len(words) > 2 else " ".join(words)


def _format_of(pattern: str) -> str | None:
    return next((FORMAT_OF_SUFFIX[end] for end in FORMAT_OF_SUFFIX if pattern.endswith(end)), None)


def _files(pattern: str) -> set[Path]:
    """Return the files of a path or pattern; raise UserError if there are none."""
    found = {Path(path) for path in glob.glob(pattern, recursive=True) if Path(path).is_file()}
    if not found:
        raise UserError(f"--dataset {pattern}: no such file; correct the path or the pattern")
    return found


def _local_source(patterns: tuple[str, ...], file_format: str, column: str) -> Corpus:
    paths = sorted(set[Path]().union(*map(_files, patterns)))
    status = [path.stat() for path in paths]
    empty = [str(path) for path, s in zip(paths, status, strict=True) if s.st_size == 0]
    if empty:
        raise UserError(
            f"--dataset {shown(patterns)}: empty files: {', '.join(empty)}; remove them or name "
            f"others"
        )
    version: JsonValue = [
        [str(path), s.st_size, s.st_mtime_ns] for path, s in zip(paths, status, strict=True)
    ]
    named: JsonValue = patterns[0] if len(patterns) == 1 else list(patterns)
    description: dict[str, JsonValue] = {"dataset": named, "files": len(paths)}
    size_bytes = sum(s.st_size for s in status)
    if file_format == "text":
        return TextFiles(paths, description, version, size_bytes)
    arguments = {"path": file_format, "data_files": [str(path) for path in paths], "split": "train"}
    compressed = file_format == "parquet" or any(path.suffix == ".zst" for path in paths)
    return TableFiles(
        {**description, "column": column},
        arguments,
        column,
        version,
        None if compressed else size_bytes,
    )


class StandardLibrary:
    """The sources of the running Python, one document a module: a corpus without a download."""

    def __init__(self, root: Path) -> None:
        self._paths = sorted(
            path for path in root.rglob("*.py") if not _is_left_out(path.relative_to(root))
        )
        if len(self._paths) < 20:
            raise UserError(
                f"{root}: {len(self._paths)} Python sources found; this Python has no standard "
                "library sources; use --dataset with your own text"
            )
        python = f"{platform.python_implementation()} {platform.python_version()}"
        self.description: dict[str, JsonValue] = {
            "dataset": "stdlib",
            "python": python,
            "files": len(self._paths),
        }
        self.version: JsonValue = None
        self.size_bytes: int | None = sum(path.stat().st_size for path in self._paths)

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        for number, path in enumerate(self._paths[skip:], start=skip):
            with tokenize.open(path) as file:  # respects the encoding that a module declares
                yield TextPiece(number, file.read())


def _is_left_out(path: Path) -> bool:
    return bool((LEFT_OUT | INSTALLED).intersection(path.parts)) or path.parts[0].startswith(
        "config-"
    )


class TextFiles:
    """UTF-8 text, one document a file, in pieces so that a file of any size fits in memory."""

    def __init__(
        self,
        paths: list[Path],
        description: dict[str, JsonValue],
        version: JsonValue,
        size_bytes: int | None,
    ) -> None:
        self._paths = paths
        self.description = description
        self.version = version
        self.size_bytes = size_bytes

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        return itertools.islice(self._all_pieces(), skip, None)

    def _all_pieces(self) -> Iterator[TextPiece]:
        for document, path in enumerate(self._paths):
            starts = True
            texts = _text_pieces(path)
            text = next(texts, "")
            for following in texts:
                yield TextPiece(document, text, starts, ends=False)
                text = following
                starts = False
            yield TextPiece(document, text, starts, ends=True)


def _text_pieces(path: Path) -> Iterator[str]:
    """Yield the file's text, cut where no tokenizer pattern crosses.

    That is at a line break between two visible characters.
    """
    text = ""
    for block in _decoded_blocks(path):
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


def _decoded_blocks(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    read_bytes = 0
    with path.open("rb") as file:
        while True:
            block = file.read(TEXT_BLOCK_BYTES)
            held_back = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = read_bytes - held_back + error.start
                raise UserError(
                    f"{path}: not UTF-8 at byte {offset} ({error.reason}); convert it, for "
                    f"example: iconv -f LATIN1 -t UTF-8 {path} > converted.txt"
                ) from None
            if not block:
                return
            read_bytes += len(block)


class TableFiles:
    """One text column of a Hugging Face dataset, from the hub or from local files.

    `datasets` streams it, one document a row. Code that comes with a dataset is never run.
    """

    def __init__(
        self,
        description: dict[str, JsonValue],
        arguments: dict[str, Any],
        column: str,
        version: JsonValue,
        size_bytes: int | None,
    ) -> None:
        self.description = description
        self.version = version
        self.size_bytes = size_bytes
        self._arguments = arguments
        self._column = column

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        rows = enumerate(self._rows(skip), start=skip)
        while (numbered := self._guarded(next, rows, None)) is not None:
            number, row = numbered
            yield TextPiece(number, self._text(number, row))

    def _rows(self, skip: int) -> Iterator[dict[str, Any]]:
        from datasets import load_dataset

        dataset = self._guarded(load_dataset, streaming=True, **self._arguments)
        return iter(dataset.skip(skip) if skip else dataset)

    def _guarded(self, function: Any, *arguments: Any, **keywords: Any) -> Any:
        """Call a function of `datasets`; raise its errors as UserError of one line.

        For example: no such dataset or configuration, no network, a damaged file.
        """
        from datasets.exceptions import DatasetsError

        try:
            return function(*arguments, **keywords)
        except (DatasetsError, OSError, ValueError, RuntimeError, StopIteration) as error:
            reason = " ".join(str(error).split()) or "no rows"
            raise UserError(
                f"--dataset {self.description['dataset']}: {type(error).__name__}: {reason}. "
                f"{self._advice()}"
            ) from error

    def _advice(self) -> str:
        if "data_files" in self._arguments:
            return "Check the files"
        return (
            "Check the name, --config and --split, and the network (HF_ENDPOINT; HF_TOKEN for "
            "gated data)"
        )

    def _text(self, number: int, row: dict[str, Any]) -> str:
        text = row.get(self._column)
        if isinstance(text, str):
            return text
        where = f"--dataset {self.description['dataset']}: row {number}"
        if self._column not in row:
            raise UserError(
                f"{where} has no column {self._column!r}; choose one with --column: "
                f"{', '.join(row)}"
            )
        if text is None:
            return ""
        raise UserError(
            f"{where}: column {self._column!r} holds {type(text).__name__}, not text; choose "
            f"another with --column"
        )
