"""Sources of documents: Python's standard library, local files, any Hugging Face dataset.

A source yields pieces in a fixed order. Most are whole documents; a long text file comes in several
pieces. An interrupted preparation only has to remember the number of pieces taken.
"""

from __future__ import annotations

import itertools
import platform
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import JsonValue

from megagpt.data.byte_level_bpe import END_OF_DOCUMENT
from megagpt.data.chat.answers import Rendered, Span
from megagpt.data.chat.records import ChatRows
from megagpt.data.chat.template import TemplateUnusableError
from megagpt.data.columns import DEFAULT_COLUMN, BadRowError, Column
from megagpt.data.compression import open_decompressed
from megagpt.data.kinds import ROWS, Recognized
from megagpt.data.left_out import LeftOut
from megagpt.data.rows import BadRow, rows_of
from megagpt.data.source_files import FoundFiles, is_local
from megagpt.data.text_files import documents
from megagpt.utils import UserError

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
    part. A conversation has the spans of its text that are `answers`, and its place in a file.
    """

    document: int
    text: str
    starts: bool = True
    ends: bool = True
    answers: tuple[Span, ...] | None = None
    place: str = ""


class Corpus(Protocol):
    """A corpus.

    `description` goes into the manifest. A preparation continues only if `version` is
    unchanged. `left_out` counts what the latest pass has left out, from `skipped_before` on: bad
    rows that an interrupted preparation met after reading.
    """

    has_conversations: bool
    skipped_before: int
    description: dict[str, JsonValue]
    version: JsonValue
    size_bytes: int | None  # size of the text, if it is known in advance
    left_out: LeftOut
    notes: Sequence[str]  # what the user should know before it is read

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        """Yield every piece except the first `skip`."""
        ...

    def require_unchanged(self) -> None:
        """Raise UserError if the corpus is not the one that was opened."""
        ...


def open_source(
    dataset: str | Sequence[str],
    *,
    config: str | None = None,
    split: str = "train",
    column: str | ChatRows = DEFAULT_COLUMN,
    separator: str | None = None,
    skip_bad_rows: int = 0,
) -> Corpus:
    """Return the source that `--dataset` names; raise UserError if there is none.

    `dataset` is stdlib, a name on the Hugging Face hub, or paths, directories and patterns.
    `column` names the text of a row, or reads its conversation.
    """
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    chosen = Column(column) if isinstance(column, str) else column
    if names == ["stdlib"]:
        if isinstance(chosen, ChatRows):
            raise UserError("--dataset stdlib: text without conversations; name files of rows")
        return StandardLibrary(Path(sysconfig.get_path("stdlib")))
    if len(names) == 1 and not is_local(names[0]):
        return HubDataset(names[0], config, split, chosen, skip_bad_rows)
    other = next((name for name in names if not is_local(name)), None)
    if other is not None:
        raise UserError(
            f"--dataset {other}: among several names each is a file, a directory or a pattern; "
            "prepare it on its own and blend the datasets (megagpt.data.path)"
        )
    return LocalFiles(names, chosen, separator, skip_bad_rows)


class StandardLibrary:
    """The sources of the running Python, one document a module: a corpus without a download."""

    has_conversations = False
    skipped_before = 0

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
        self.left_out = LeftOut("stdlib")
        self.notes: Sequence[str] = ()

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        for number, path in enumerate(self._paths[skip:], start=skip):
            with tokenize.open(path) as file:  # respects the encoding that a module declares
                yield TextPiece(number, file.read())

    def require_unchanged(self) -> None:
        """Do nothing: the manifest names the Python."""


def _is_left_out(path: Path) -> bool:
    return bool((LEFT_OUT | INSTALLED).intersection(path.parts)) or path.parts[0].startswith(
        "config-"
    )


class LocalFiles:
    """Files of text, a document each, and files of rows, a document a row.

    A file of any size fits in memory, as text comes in pieces and rows come one by one.
    """

    skipped_before = 0

    def __init__(
        self,
        names: Sequence[str],
        column: Column | ChatRows,
        separator: str | None = None,
        skip_bad_rows: int = 0,
    ) -> None:
        found = FoundFiles(names)
        self.notes: Sequence[str] = found.notes
        self._files = found.files
        self._column = column
        self._separator = separator
        self._skip_bad_rows = skip_bad_rows
        self._dataset = " ".join(names)
        self.left_out = LeftOut(self._dataset)
        self.has_conversations = isinstance(column, ChatRows)
        text = next((known for known in found.files if known.kind == "text"), None)
        if self.has_conversations and text is not None:
            raise UserError(
                f"{text.file.path}: a file of text, need rows with conversations (.jsonl, .parquet "
                "...); name other files"
            )
        files = [known.file for known in found.files]
        if all(known.kind == "empty" for known in found.files):
            raise UserError(
                f"--dataset {self._dataset}: nothing in it (empty: "
                f"{', '.join(str(file.path) for file in files[:10])}); name other files"
            )
        self.description: dict[str, JsonValue] = {
            "dataset": names[0] if len(names) == 1 else list(names),
            "files": len(files),
        }
        if any(known.kind in ROWS for known in found.files):
            self.description["column"] = column.written
        self.version: JsonValue = [[str(path), size, time] for path, size, time in files]
        plain = all(k.kind != "parquet" and not k.compressions for k in found.files)
        self.size_bytes = sum(file.size for file in files) if plain else None

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        return itertools.islice(self._all_pieces(), skip, None)

    def require_unchanged(self) -> None:
        for known in self._files:
            known.file.require_unchanged()

    def _all_pieces(self) -> Iterator[TextPiece]:
        self.left_out = left_out = LeftOut(
            self._dataset, self._skip_bad_rows, bad_rows=self.skipped_before
        )
        for known in self._files:
            if known.kind == "empty":
                left_out.empty.append(str(known.file.path))
            elif known.kind == "text":
                yield from self._pieces_of_text(known, left_out)
            else:
                yield from self._pieces_of_rows(known, left_out)
        left_out.require_documents(self._column)

    def _pieces_of_text(self, known: Recognized, left_out: LeftOut) -> Iterator[TextPiece]:
        content, _ = open_decompressed(known.file)
        with content:
            parts = documents(content, known.file.path, self._separator)
            for text, starts, ends in parts:
                if starts and self._separator is None and END_OF_DOCUMENT in text:
                    left_out.unseparated.append(str(known.file.path))
                yield TextPiece(left_out.documents, text, starts, ends)
                left_out.documents += ends

    def _pieces_of_rows(self, known: Recognized, left_out: LeftOut) -> Iterator[TextPiece]:
        path = known.file.path
        between = ": row " if known.kind in ("parquet", "arrow") else ":"
        before = left_out.documents
        left_out.begin_file()
        row = None
        for number, row in rows_of(known, self._column):
            piece = piece_of(row, f"{path}{between}{number}", self._column, left_out)
            if piece is not None:
                yield piece
        if row is None:
            left_out.empty.append(str(path))
        elif left_out.documents == before:
            left_out.file_without_text(str(path), self._column)


def piece_of(
    row: Any, place: str, column: Column | ChatRows, left_out: LeftOut
) -> TextPiece | None:
    """Return the document of a row; None, counted, if it has none or is bad."""
    try:
        if isinstance(row, BadRow):
            raise BadRowError(row.problem)
        text = column.text(row)
    except BadRowError as error:
        left_out.bad_row(place, str(error))
        return None
    except TemplateUnusableError as error:
        raise UserError(f"{place}: {error}") from None
    if not text:
        left_out.row_without_text(place, row, column)
        return None
    left_out.documents += 1
    number = left_out.documents - 1
    if isinstance(text, Rendered):
        return TextPiece(number, text.text, answers=text.answers, place=place)
    return TextPiece(number, text)


class HubDataset:
    """One column of a Hugging Face dataset, of text or of messages, one document a row.

    `datasets` streams it. Code that comes with a dataset is never run.
    """

    skipped_before = 0

    def __init__(
        self,
        name: str,
        config: str | None,
        split: str,
        column: Column | ChatRows,
        skip_bad_rows: int = 0,
    ) -> None:
        self.description: dict[str, JsonValue] = {
            "dataset": name,
            "config": config,
            "split": split,
            "column": column.written,
        }
        self.version: JsonValue = None
        self.size_bytes: int | None = None
        self.notes: Sequence[str] = ()
        self.left_out = LeftOut(name)
        self.has_conversations = isinstance(column, ChatRows)
        self._arguments = {"path": name, "name": config, "split": split}
        self._column = column
        self._skip_bad_rows = skip_bad_rows

    def pieces(self, skip: int = 0) -> Iterator[TextPiece]:
        return itertools.islice(self._all_pieces(), skip, None)

    def require_unchanged(self) -> None:
        """Do nothing: the hub answers for what it sends."""

    def _all_pieces(self) -> Iterator[TextPiece]:
        self.left_out = left_out = LeftOut(
            self._arguments["path"] or "", self._skip_bad_rows, bad_rows=self.skipped_before
        )
        rows, expected = self._rows()
        count = 0
        while (row := self._guarded(next, rows, None)) is not None:
            count += 1
            place = f"--dataset {self.description['dataset']}: row {count}"
            piece = piece_of(row, place, self._column, left_out)
            if piece is not None:
                yield piece
        if expected is not None and count < expected:
            raise UserError(
                f"--dataset {self.description['dataset']}: the stream ended after {count} rows, "
                f"the hub says {expected}; give the same command again"
            )
        left_out.require_documents(self._column)

    def _rows(self) -> tuple[Iterator[dict[str, Any]], int | None]:
        """Return the rows, and their number if the hub says it."""
        from datasets import load_dataset

        dataset = self._guarded(load_dataset, streaming=True, **self._arguments)
        splits = getattr(dataset.info, "splits", None) or {}
        known = splits.get(self._arguments["split"])
        return iter(dataset), (getattr(known, "num_examples", None) or None)

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
                "Check the name, --config and --split, and the network (HF_ENDPOINT; HF_TOKEN for "
                "gated data)"
            ) from error
