"""From a path to token files with their splits, and a manifest that is computed, not stored.

A path names one `.bin`, the name without a suffix that Megatron and gpt-neox take, a pattern with
several shards of llm.c, or nanoGPT's directory with a `train.bin`.
"""

from __future__ import annotations

import glob
import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from megagpt.data.integrity import probes_of, record_tokenizer
from megagpt.data.manifest import (
    FRACTION_OF_MANY,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    DatasetManifest,
    Split,
    TokenizerRecord,
    read_dataset_manifest,
)
from megagpt.data.token_files.declared import NOTHING, Declared
from megagpt.data.token_files.formats import TokenFile, read_file
from megagpt.data.token_files.ids_only import IdsOnly
from megagpt.data.token_files.segments import SearchedStarts, Segment, StoredStarts
from megagpt.utils import UserError

if TYPE_CHECKING:
    from megagpt.data.tokenizer import Tokenizer

TRAIN = "train"
HELD_OUT = ("val", "valid", "validation")  # in the name of a file, in place of "train"
NO_END = 0  # ids alone do not say which one ends a document


Manifest: TypeAlias = "DatasetManifest | TokenFiles"


def is_token_files(path: Path) -> bool:
    """Return whether a path names token files of other trainers, not a prepared dataset."""
    if path.is_dir():
        return not (path / MANIFEST_FILE).exists() and (path / "train.bin").is_file()
    return path.suffix in (".bin", ".idx") or _with_bin(path).is_file()


def manifest_of(path: Path, declared: Declared = NOTHING) -> Manifest:
    """Return what a dataset's path holds: the manifest of a prepared one, or token files.

    Raise UserError if there is neither.
    """
    return TokenFiles.read(path, declared) if is_token_files(path) else read_dataset_manifest(path)


def tokenizer_directory(path: Path, declared: Declared) -> Path | None:
    """Return where the tokenizer of a dataset is; None for token files of which it is unknown."""
    return declared.tokenizer if is_token_files(path) else path


def tokenizer_of(path: Path, declared: Declared) -> Tokenizer:
    """Return the tokenizer of a dataset; that of ids alone takes and gives ids as text."""
    directory = tokenizer_directory(path, declared)
    if directory is None:
        return IdsOnly(manifest_of(path, declared).vocabulary)
    return _load_tokenizer(directory)


def _load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a directory; its libraries are imported only where there is one."""
    from megagpt.data.tokenizer import load_tokenizer

    return load_tokenizer(directory)


def require_use(paths: Sequence[Path], declared: Declared) -> None:
    """Raise UserError if something is declared of token files, and there are none."""
    if any(is_token_files(path) for path in paths):
        return
    for key in ("tokenizer", "validation_fraction"):
        if getattr(declared, key) is not None:
            raise UserError(
                f"megagpt.data.{key}: has no effect, {paths[0]} was prepared with its own; "
                f"remove it: --set megagpt.data.{key}=null"
            )


@dataclass(frozen=True)
class TokenFiles:
    """Token files with their splits: stands where the manifest of a prepared dataset stands."""

    path: Path
    splits: dict[Split, tuple[Segment, ...]]
    vocabulary: int
    tokenizer: TokenizerRecord
    end_of_document: int
    has_documents: bool
    files: tuple[TokenFile, ...]

    @classmethod
    def read(cls, path: Path, declared: Declared) -> TokenFiles:
        """Return the files that a path names; raise UserError with the file that is wrong."""
        files = [read_file(file) for file in _files(path)]
        held_out = [] if declared.validation_fraction is not None else _held_out(path)
        beside = [read_file(file) for file in held_out]
        if len({(file.dtype, file.kind, file.starts is None) for file in (*files, *beside)}) > 1:
            raise UserError(
                f"{path}: files of several formats ("
                f"{', '.join(f'{file.path.name}: {file.kind}' for file in (*files, *beside))}); "
                f"blend them: a list of paths and weights at megagpt.data.path"
            )
        vocabulary, end, tokenizer = _ids(files[0], declared)
        for file in (*files, *beside):
            _require_ids(file, vocabulary)
        fraction = declared.validation_fraction
        return cls(
            path=path,
            splits=_two_files(files, beside)
            if beside
            else _cut(files, FRACTION_OF_MANY if fraction is None else fraction),
            vocabulary=vocabulary,
            tokenizer=tokenizer,
            end_of_document=end,
            has_documents=files[0].starts is not None,
            files=(*files, *beside),
        )

    @property
    def has_conversations(self) -> bool:
        """Whether only answers are targets: never."""
        return False

    @property
    def ids(self) -> tuple[str, int]:
        """What decides the meaning of a token."""
        return self.tokenizer.sha256, self.end_of_document

    @cached_property
    def fingerprint(self) -> str:
        """A hash of sizes, of blocks of every file, of the splits and of the tokenizer.

        Files are not read whole: it takes milliseconds at any size, and notices a file that was
        cut, replaced or written again, but not a single changed id between the blocks.
        """
        content = {
            "files": [_content(file) for file in self.files],
            "splits": {name: self.tokens(name) for name in self.splits},
            "tokenizer": self.tokenizer.sha256,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def tokens(self, split: Split) -> int:
        """Return the number of tokens of a split."""
        return sum(segment.tokens for segment in self.splits.get(split, ()))

    def segments(self, split: Split) -> tuple[Segment, ...]:
        """Return the runs of tokens of a split."""
        return self.splits.get(split, ())


def _with_bin(path: Path) -> Path:
    return path.with_name(f"{path.name}.bin")


def _files(path: Path) -> list[Path]:
    """Return the files that a path names, in order of their names; shards follow each other."""
    if path.is_dir():
        return [path / "train.bin"]
    if path.suffix == ".idx":
        return [path.with_suffix(".bin")]
    if path.is_file() or (path.suffix == ".bin" and not glob.has_magic(str(path))):
        return [path]
    if _with_bin(path).is_file():
        return [_with_bin(path)]
    found = sorted(Path(name) for name in glob.glob(str(path)))
    if not found:
        raise UserError(f"{path}: no file has such a name")
    return found


def _held_out(path: Path) -> list[Path]:
    """Return the files beside those of a path with "val" in place of the last "train"."""
    if path.is_dir():
        return [path / "val.bin"] if (path / "val.bin").is_file() else []
    before, train, after = path.name.rpartition(TRAIN)
    for word in HELD_OUT if train else ():
        other = path.with_name(before + word + after)
        if glob.has_magic(other.name):
            if found := sorted(Path(name) for name in glob.glob(str(other))):
                return found
        elif other.is_file() or _with_bin(other).is_file():
            return _files(other)
    return []


def _ids(file: TokenFile, declared: Declared) -> tuple[int, int, TokenizerRecord]:
    """Return the number of ids, the one that ends a document, and the tokenizer's record."""
    if declared.tokenizer is not None:
        tokenizer = _load_tokenizer(declared.tokenizer)
        record = record_tokenizer(declared.tokenizer, declared.tokenizer.resolve().name)
        return tokenizer.vocabulary, tokenizer.end_of_document, record
    vocabulary = file.vocabulary or declared.vocabulary
    if vocabulary is None:
        raise UserError(
            f"{file.path}: does not say which tokenizer made its ids; name a directory that has "
            f"the tokenizer.json: --set megagpt.data.tokenizer=DIR, or only how many ids there "
            f"are, such as GPT-2's: --set megagpt.model.vocabulary=50257"
        )
    known_by = hashlib.sha256(f"{file.vocabulary or 'ids'}".encode()).hexdigest()
    record = TokenizerRecord(
        file=TOKENIZER_FILE, bytes=0, sha256=known_by, probes=(), name="none, ids only"
    )
    return vocabulary, NO_END, record


def _require_ids(file: TokenFile, vocabulary: int) -> None:
    """Raise UserError if an id near the beginning is beyond the vocabulary.

    Every id is compared again when it is read.
    """
    count = min(file.tokens, 2**16)
    ids = np.memmap(file.path, file.dtype, mode="r", offset=file.first_byte, shape=(count,))
    if (largest := int(ids.max())) >= vocabulary:
        place = file.first_byte + int(ids.argmax()) * file.dtype.itemsize
        raise UserError(
            f"{file.path}: id {largest} at byte {place} is beyond the vocabulary (need ids below "
            f"{vocabulary}); give the tokenizer that made the file (megagpt.data.tokenizer), or "
            f"how many ids there are (megagpt.model.vocabulary)"
        )


def _content(file: TokenFile) -> dict[str, Any]:
    """Return what the fingerprint knows of a file: sizes and blocks, not its name."""
    files = [file.path] if file.index is None else [file.path, file.index]
    sizes = [path.stat().st_size for path in files]
    return {"kind": file.kind, "bytes": sizes, "probes": [probes_of(path) for path in files]}


def _segment(file: TokenFile, low: int, high: int) -> Segment:
    starts = (
        StoredStarts(np.zeros(1, np.int64))
        if file.starts is None
        else SearchedStarts(file.starts, low, high)
    )
    first_byte = file.first_byte + low * file.dtype.itemsize
    return Segment(file.path, file.dtype, high - low, starts, first_byte)


def _two_files(
    train: Sequence[TokenFile], held_out: Sequence[TokenFile]
) -> dict[Split, tuple[Segment, ...]]:
    return {
        "train": tuple(_segment(file, 0, file.tokens) for file in train),
        "val": tuple(_segment(file, 0, file.tokens) for file in held_out),
    }


def _cut(files: Sequence[TokenFile], fraction: float) -> dict[Split, tuple[Segment, ...]]:
    """Return the files up to a cut, and the rest; at the start of a document where known."""
    total = sum(file.tokens for file in files)
    cut = total - round(total * fraction)
    splits: dict[Split, list[Segment]] = {"train": [], "val": []}
    before = 0
    for file in files:
        place = min(max(cut - before, 0), file.tokens)
        if file.starts is not None and 0 < place < file.tokens:
            # The start of the document that would be cut, unless it is the only one.
            place = file.starts[bisect_right(file.starts, place) - 1] or place
        if place:
            splits["train"].append(_segment(file, 0, place))
        if place < file.tokens:
            splits["val"].append(_segment(file, place, file.tokens))
        before += file.tokens
    return {name: tuple(segments) for name, segments in splits.items()}
