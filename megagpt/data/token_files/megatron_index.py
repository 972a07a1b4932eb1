"""The `.idx` beside a `.bin`, as Megatron-LM, Megatron-DeepSpeed and gpt-neox write it.

After the mark `MMIDIDX` and a version of 1 come, little-endian: a code of the ids' type (1 byte),
the number of sequences n (uint64), the number of entries of the document index m (uint64), the
length of each sequence (int32 [n]), the byte in the .bin at which each begins (int64 [n]), and the
number of the first sequence of each document, ended by n (int64 [m]). Source:
megatron/core/datasets/indexed_dataset.py of Megatron-LM 0.13, megatron/data/indexed_dataset.py of
gpt-neox.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from megagpt.utils import UserError

MARK = b"MMIDIDX\x00\x00"
OLDER_MARK = b"TNTIDX\x00\x00"  # of fairseq's cached format
HEADER = struct.Struct("<9sQBQQ")
# Ids are never negative: read as unsigned, a negative one is above every vocabulary.
DTYPES = {1: "<u1", 2: "<u1", 3: "<u2", 4: "<u4", 5: "<u8", 8: "<u2"}
CHECKED = 64  # sequences of which the place is checked, evenly spaced


@dataclass(frozen=True)
class MegatronIndex:
    """An index that agrees with its `.bin`: the type of the ids, their number, the documents."""

    path: Path
    dtype: np.dtype
    tokens: int
    starts: Sequence[int]


class _Starts(Sequence[int]):
    """The first token of each document, read from the mapped index."""

    def __init__(self, pointers: np.ndarray, documents: np.ndarray, tokens: int, item: int) -> None:
        self._pointers = pointers
        self._documents = documents
        self._tokens = tokens
        self._item = item

    def __len__(self) -> int:
        return len(self._documents) - 1

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...

    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        sequence = int(self._documents[place])
        if sequence == len(self._pointers):  # an empty document at the end
            return self._tokens
        return int(self._pointers[sequence]) // self._item


def read_index(path: Path, tokens_file: Path) -> MegatronIndex:
    """Return the index; raise UserError if it is none, or not that of the tokens' file."""
    dtype, sequences, entries = _read_header(path)
    lengths, pointers, documents = _map(path, sequences, entries)
    size = tokens_file.stat().st_size
    if not sequences or not entries:
        raise UserError(f"{path}: no sequence in it; prepare the data again")
    end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize
    if end != size:
        raise UserError(
            f"{path}: does not belong to {tokens_file} (found {size} bytes there, need {end}); "
            f"copy the two of one preparation"
        )
    _require_order(path, lengths, pointers, documents, dtype.itemsize)
    tokens = size // dtype.itemsize
    return MegatronIndex(path, dtype, tokens, _Starts(pointers, documents, tokens, dtype.itemsize))


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Return the type of the ids, the number of sequences and of entries of the document index."""
    with path.open("rb") as file:
        data = file.read(HEADER.size)
    if data.startswith(OLDER_MARK):
        raise UserError(
            f"{path}: fairseq's older format (TNTIDX, data_impl cached or lazy); prepare the data "
            f"again with --dataset-impl mmap"
        )
    if len(data) < HEADER.size or not data.startswith(MARK):
        raise UserError(
            f"{path}: not an index of Megatron or gpt-neox (found {data[:9]!r} at the beginning, "
            f"need {MARK!r})"
        )
    _, version, code, sequences, entries = HEADER.unpack(data)
    if version != 1:
        raise UserError(f"{path}: version {version}, need 1")
    if code not in DTYPES:
        raise UserError(
            f"{path}: type {code} of ids, need one of {', '.join(map(str, DTYPES))} (integers)"
        )
    return np.dtype(DTYPES[code]), sequences, entries


def _map(path: Path, sequences: int, entries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map lengths, pointers and documents; raise UserError if the file has another size."""
    need = HEADER.size + 12 * sequences + 8 * entries
    found = path.stat().st_size
    if sequences and found == need + sequences:
        raise UserError(
            f"{path}: has a mode for each sequence (several modalities), need text only"
        )
    if found != need:
        cause = "truncated" if found < need else "something was appended"
        raise UserError(f"{path}: {cause} (found {found} bytes, need {need})")
    data = np.memmap(path, np.uint8, mode="r")
    at_pointers = HEADER.size + 4 * sequences
    at_documents = at_pointers + 8 * sequences
    return (
        data[HEADER.size : at_pointers].view("<i4"),
        data[at_pointers:at_documents].view("<i8"),
        data[at_documents:].view("<i8"),
    )


def _require_order(
    path: Path, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray, item: int
) -> None:
    """Raise UserError if sequences do not follow each other, or documents do not cover them.

    Some are looked at: a large index is gigabytes.
    """
    places = np.unique(np.linspace(0, len(pointers) - 1, CHECKED).astype(np.int64))
    ends = pointers[places] + lengths[places].astype(np.int64) * item
    following = places[:-1] + 1
    wrong = np.flatnonzero(pointers[following] != ends[:-1])
    if len(wrong) or pointers[0] != 0:
        number = int(places[wrong[0]]) + 1 if len(wrong) else 0
        raise UserError(f"{path}: sequence {number} does not begin where the one before it ends")
    some = documents[np.unique(np.linspace(0, len(documents) - 1, CHECKED).astype(np.int64))]
    if some[0] != 0 or some[-1] != len(pointers) or np.any(np.diff(some) < 0):
        raise UserError(
            f"{path}: its documents do not cover its {len(pointers)} sequences (first "
            f"{documents[0]}, last {documents[-1]}); prepare the data again"
        )
