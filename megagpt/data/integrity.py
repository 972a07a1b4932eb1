"""Check a dataset against its manifest: sizes and probes before every run, all on request.

A probe is the digest of one block of 64 KiB. Sizes and probes find a truncated, replaced or
rewritten file in well under two seconds at any size of data. `verify(directory, full=True)` finds a
single changed bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from megagpt.common.disk import sha256_of
from megagpt.data.manifest import (
    MODEL_TOKENIZER_FILES,
    OFFSET_DTYPE,
    TOKENIZER_FILE,
    DatasetManifest,
    FileRecord,
    TokenizerRecord,
    TokenShard,
    read_dataset_manifest,
    remedy,
)
from megagpt.utils import KIB, MIB, UserError

PROBE_BYTES = 64 * KIB
PROBES_PER_FILE = 16  # so files up to 1 MiB are read whole
SCAN_TOKENS = 4 * MIB


def record_file(path: Path) -> FileRecord:
    """Return what the manifest stores about a finished file."""
    return FileRecord(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
        probes=tuple(probes_of(path)),
    )


def record_tokenizer(directory: Path, name: str) -> TokenizerRecord:
    """Return what the manifest stores about the tokenizer `name`; its files are in `directory`."""
    main = record_file(directory / TOKENIZER_FILE)
    beside = [directory / file for file in MODEL_TOKENIZER_FILES if (directory / file).is_file()]
    return TokenizerRecord(
        **main.model_dump(), name=name, beside=tuple(record_file(path) for path in beside)
    )


def check_file(directory: Path, manifest: DatasetManifest) -> None:
    """Compare the files with the manifest by size, largest token and probes.

    Raises one UserError with every difference.
    """
    directory = Path(directory)
    problems = [
        problem
        for record in manifest.tokenizer.files
        for problem in _file_problems(directory, record)
    ]
    for shard in _all_shards(manifest):
        problems += _shard_problems(directory, shard, manifest) or (
            _file_problems(directory, shard, partial(_id_problem, manifest))
            + [problem for file in shard.beside for problem in _file_problems(directory, file)]
        )
    _raise(directory, problems)


def verify(directory: Path, *, full: bool = False) -> DatasetManifest:
    """Check a dataset as a run does; with `full`, also hash every file and check every token."""
    manifest = read_dataset_manifest(directory)
    check_file(directory, manifest)
    if full:
        problems = [
            problem
            for record in manifest.tokenizer.files
            for problem in _hash_problems(Path(directory), record)
        ]
        for shard in _all_shards(manifest):
            for file in (shard, *shard.beside):
                problems += _hash_problems(Path(directory), file)
            problems += _token_problems(Path(directory), shard, manifest)
            problems += _place_problems(Path(directory), shard.offsets, below=shard.tokens)
            if shard.targets is not None:
                problems += _place_problems(Path(directory), shard.targets, below=shard.tokens + 1)
        _raise(Path(directory), problems)
    return manifest


def probes_of(path: Path) -> list[str]:
    """Return digests of up to 16 blocks of 64 KiB, evenly spaced from first to last byte."""
    return [_digest(block) for _, block in _probed_blocks(path)]


def largest_token(path: Path, dtype: np.dtype) -> int:
    return max((int(block.max()) for _, block in _token_blocks(path, dtype)), default=0)


def count_token(path: Path, dtype: np.dtype, token: int) -> int:
    return sum(int(np.count_nonzero(block == token)) for _, block in _token_blocks(path, dtype))


def _probed_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, content) of each probed block."""
    with path.open("rb") as file:
        for offset in _probe_offsets(path.stat().st_size):
            file.seek(offset)
            yield offset, file.read(PROBE_BYTES)


def _digest(block: bytes) -> str:
    return hashlib.sha256(block).hexdigest()[:16]


def _probe_offsets(size: int) -> list[int]:
    if size <= PROBES_PER_FILE * PROBE_BYTES:
        return list(range(0, size, PROBE_BYTES))
    return [
        probe * (size - PROBE_BYTES) // (PROBES_PER_FILE - 1) for probe in range(PROBES_PER_FILE)
    ]


def _token_blocks(path: Path, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the first token, tokens) block by block.

    Uses plain reads, because a memory map of a shrinking file raises SIGBUS.
    """
    first = 0
    with path.open("rb") as file:
        while data := file.read(SCAN_TOKENS * dtype.itemsize):
            block = np.frombuffer(data, dtype)
            yield first, block
            first += len(block)


def _all_shards(manifest: DatasetManifest) -> list[TokenShard]:
    return [shard for shards in manifest.splits.values() for shard in shards]


def _shard_problems(directory: Path, shard: TokenShard, manifest: DatasetManifest) -> list[str]:
    """Return contradictions in the manifest's own numbers, before any block is read."""
    path = directory / shard.file
    item_bytes = manifest.token_dtype.itemsize
    if shard.bytes != shard.tokens * item_bytes:
        found = shard.bytes / shard.tokens
        return [
            f"{path}: {found:g} bytes per token found, {manifest.dtype} has {item_bytes}: wrong "
            f"dtype in the manifest"
        ]
    if shard.offsets.bytes != shard.documents * OFFSET_DTYPE.itemsize:
        expected = shard.documents * OFFSET_DTYPE.itemsize
        return [
            f"{path.with_suffix('.offsets')}: {shard.offsets.bytes} bytes found, {expected} "
            f"expected (uint64 offsets)"
        ]
    if shard.targets is not None and shard.targets.bytes % (2 * OFFSET_DTYPE.itemsize):
        return [
            f"{path.with_suffix('.targets')}: {shard.targets.bytes} bytes found, a multiple of "
            f"{2 * OFFSET_DTYPE.itemsize} expected (uint64, two for each run of targets)"
        ]
    if shard.max_token >= manifest.vocabulary:
        return [
            f"{path}: token id {shard.max_token} found, ids below the vocabulary of "
            f"{manifest.vocabulary} expected"
        ]
    return []


def _file_problems(
    directory: Path,
    record: FileRecord,
    inspect: Callable[[int, bytes], str | None] = lambda offset, block: None,
) -> list[str]:
    """Return the first problem of a file.

    ``inspect`` may explain a probed block.
    """
    path = directory / record.file
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return [f"{path}: {_size_problem(size, record.bytes)}"]
        for (offset, block), expected in zip(_probed_blocks(path), record.probes, strict=False):
            if problem := inspect(offset, block) or _probe_problem(offset, block, expected):
                return [f"{path}: {problem}"]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror}), {record.bytes} bytes expected"]
    return []


def _probe_problem(offset: int, block: bytes, expected: str) -> str | None:
    if (digest := _digest(block)) == expected:
        return None
    return (
        f"changed since preparation at byte {offset} or soon after: {digest} found, {expected} "
        f"expected"
    )


def _id_problem(manifest: DatasetManifest, offset: int, block: bytes) -> str | None:
    """Return an error for the first token id in a block that is outside the vocabulary, or None."""
    dtype = manifest.token_dtype
    skipped = -offset % dtype.itemsize  # a probe may begin within a token
    tokens = np.frombuffer(
        block, dtype, count=(len(block) - skipped) // dtype.itemsize, offset=skipped
    )
    wrong = np.flatnonzero(tokens >= manifest.vocabulary)
    if not len(wrong):
        return None
    first = int(wrong[0])
    place = offset + skipped + first * dtype.itemsize
    return (
        f"token id {tokens[first]} found at byte {place}, ids below {manifest.vocabulary} expected"
    )


def _size_problem(found: int, expected: int) -> str:
    if found == 0:
        return f"empty, {expected} bytes expected"
    if found == 2 * expected or 2 * found == expected:
        return (
            f"{found} bytes found, {expected} expected: the other dtype (uint16 and uint32 "
            f"differ by a factor of two)?"
        )
    cause = "truncated" if found < expected else "something was appended"
    return f"{found} bytes found, {expected} expected ({cause} at byte {min(found, expected)})"


def _hash_problems(directory: Path, record: FileRecord) -> list[str]:
    found = sha256_of(directory / record.file)
    if found == record.sha256:
        return []
    return [
        f"{directory / record.file}: sha256 {found} found, {record.sha256} expected: changed "
        f"since preparation"
    ]


def _token_problems(directory: Path, shard: TokenShard, manifest: DatasetManifest) -> list[str]:
    path = directory / shard.file
    dtype = manifest.token_dtype
    for first, block in _token_blocks(path, dtype):
        if problem := _id_problem(manifest, first * dtype.itemsize, block.tobytes()):
            return [f"{path}: {problem}"]
    return []


def _place_problems(directory: Path, record: FileRecord, *, below: int) -> list[str]:
    """Return what is wrong with places of tokens, of documents or of runs of targets."""
    path = directory / record.file
    offsets = np.fromfile(path, OFFSET_DTYPE).astype(np.int64)
    wrong = np.flatnonzero((np.diff(offsets, prepend=-1) <= 0) | (offsets >= below))
    if not len(wrong):
        return []
    place = int(wrong[0])
    return [
        f"{path}: offset {offsets[place]} at byte {place * OFFSET_DTYPE.itemsize}, "
        f"increasing offsets below {below} expected"
    ]


def _raise(directory: Path, problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join((*problems, remedy(directory))))
