"""Write a dataset: appends, commit points to continue from, the manifest last, then one rename.

Everything happens in `NAME.partial` beside the destination. `progress.json` there says how much of
each file is complete. After a kill the files are truncated to that and writing continues. Readers
see the directory only when it is complete.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from megagpt.common.atomic_directory import AtomicDirectory
from megagpt.common.disk import WRITE_ERRORS
from megagpt.data.integrity import count_token, largest_token, record_file
from megagpt.data.manifest import (
    MANIFEST_FILE,
    OFFSET_DTYPE,
    DatasetManifest,
    Split,
    TokenizerRecord,
    TokenShard,
    dataset_staging_directory,
    dtype_for,
)
from megagpt.utils import MIB, UserError, human_bytes, write_atomically

PROGRESS_FILE = "progress.json"
RESERVE_BYTES = 16 * MIB  # kept free on the disk, for the manifest and other users
SPLITS: tuple[Split, ...] = ("train", "val")


class ShardProgress(BaseModel):
    """How much of one shard is safely on disk."""

    tokens: int = 0
    documents: int = 0
    target_bounds: int = 0


class ConversationCounts(BaseModel):
    """What became of the conversations so far, for the report at the end."""

    conversations: int = 0
    longest: int = 0  # in tokens, as kept
    targets: int = 0
    cut: int = 0  # conversations
    tokens_cut: int = 0
    targets_cut: int = 0
    unusable: int = 0  # left out: without a target within --max_length


class PreparationProgress(BaseModel):
    """What an interrupted preparation continues from.

    `request` is what was asked for; it must be equal to continue.
    """

    model_config = ConfigDict(extra="forbid")

    request: dict[str, JsonValue]
    pieces: int = 0  # pieces of the source that are in the files
    splits: dict[Split, list[ShardProgress]] = {"train": [], "val": []}
    conversations: ConversationCounts | None = None  # None: the corpus is text

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.splits[split])

    def save(self, staging: Path) -> None:
        with explain_full_disk(staging, 0):
            write_atomically(staging / PROGRESS_FILE, self.model_dump_json(indent=2) + "\n")


def read_progress(staging: Path) -> PreparationProgress | None:
    """Return the commit point in a staging directory, or None if there is none yet."""
    path = staging / PROGRESS_FILE
    if not path.exists():
        return None
    try:
        return PreparationProgress.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path}: damaged ({error.error_count()} errors); start again with --force"
        ) from None


class SplitWriter:
    """Append one split's tokens and document offsets, continuing after `shards`.

    With `targets`, also the bounds of the runs of tokens that are targets.
    """

    def __init__(
        self,
        staging: Path,
        split: Split,
        dtype: np.dtype,
        shard_tokens: int,
        shards: list[ShardProgress],
        *,
        targets: bool = False,
    ) -> None:
        self._staging = staging
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self.shards = shards
        self._targets = targets
        self._files: tuple[BinaryIO, ...] | None = None
        _remove_shards_from(staging, split, len(shards))
        if shards:
            self._open_last()

    def write(
        self, tokens: np.ndarray, *, starts_document: bool, bounds: np.ndarray | None = None
    ) -> None:
        """Append `tokens`; a full shard is closed, so documents and pieces stay whole in it.

        `bounds` of the runs of targets among them (megagpt/data/chat/targets.py).
        """
        if not self.shards or self.shards[-1].tokens >= self._shard_tokens:
            self.sync()
            self.close()
            self.shards.append(ShardProgress())
            self._open_last()
        assert self._files is not None
        shard = self.shards[-1]
        tokens_file, offsets_file, *targets_file = self._files
        if bounds is not None:
            _write_all(targets_file[0], (bounds + shard.tokens).astype(OFFSET_DTYPE).tobytes())
            shard.target_bounds += len(bounds)
        if starts_document:
            _write_all(offsets_file, np.array(shard.tokens, OFFSET_DTYPE).tobytes())
            shard.documents += 1
        _write_all(tokens_file, tokens.astype(self._dtype, casting="same_kind").tobytes())
        shard.tokens += len(tokens)

    def sync(self) -> None:
        for file in self._files or ():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = None

    def _open_last(self) -> None:
        """Open the last shard's files, truncated to the commit point.

        Data beyond it may be torn.
        """
        shard = self.shards[-1]
        stem = f"{self._split}-{len(self.shards) - 1:05d}"
        self._files = (
            _open_at(self._staging / f"{stem}.bin", shard.tokens * self._dtype.itemsize),
            _open_at(self._staging / f"{stem}.offsets", shard.documents * OFFSET_DTYPE.itemsize),
        )
        if self._targets:
            size = shard.target_bounds * OFFSET_DTYPE.itemsize
            self._files += (_open_at(self._staging / f"{stem}.targets", size),)


def _open_at(path: Path, size: int) -> BinaryIO:
    # unbuffered: after a full disk, closing must not flush
    file = path.open("ab", buffering=0)
    if os.fstat(file.fileno()).st_size < size:
        file.close()
        raise UserError(
            f"{path}: shorter than the {size} bytes that were committed; start again with --force"
        )
    os.truncate(file.fileno(), size)
    return file


def _remove_shards_from(staging: Path, split: Split, count: int) -> None:
    for path in staging.glob(f"{split}-*"):
        if path.stem >= f"{split}-{count:05d}":
            path.unlink()


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class DatasetWriter:
    """Write both splits into a staging directory and commit them together."""

    def __init__(
        self, staging: Path, progress: PreparationProgress, *, vocabulary: int, shard_tokens: int
    ) -> None:
        self._staging = staging
        self._vocabulary = vocabulary
        self.progress = progress
        self._dtype = np.dtype(dtype_for(vocabulary)).newbyteorder("<")
        self._splits = {
            s: SplitWriter(
                staging,
                s,
                self._dtype,
                shard_tokens,
                progress.splits[s],
                targets=progress.conversations is not None,
            )
            for s in SPLITS
        }

    def write(
        self,
        split: Split,
        tokens: np.ndarray,
        *,
        starts_document: bool,
        bounds: np.ndarray | None = None,
    ) -> None:
        """Append a part of a document; of conversations also the bounds of its targets.

        Raises UserError with needed and free space if the disk is full.
        """
        # a cast to uint16 would silently turn 70000 into 4464
        if tokens.max(initial=0) >= self._vocabulary:
            raise ValueError(f"token id {tokens.max()} in a vocabulary of {self._vocabulary}")
        with explain_full_disk(self._staging, tokens.nbytes):
            self._splits[split].write(tokens, starts_document=starts_document, bounds=bounds)

    def commit(self, pieces: int) -> None:
        """Make everything durable that was written from the source's first `pieces`.

        It then survives a kill or a power cut.
        """
        with explain_full_disk(self._staging, 0):
            for split in self._splits.values():
                split.sync()
        self.progress.pieces = pieces
        self.progress.save(self._staging)

    def close(self) -> None:
        for split in self._splits.values():
            split.close()

    def count(self, token: int) -> int:
        """Return how often an id was written."""
        self.close()
        return sum(
            count_token(self._staging / f"{split}-{number:05d}.bin", self._dtype, token)
            for split in SPLITS
            for number, _ in enumerate(self.progress.splits[split])
        )

    def finish(
        self, *, tokenizer: TokenizerRecord, end_of_document: int, source: dict[str, JsonValue]
    ) -> DatasetManifest:
        """Hash the files and write the manifest, which completes the staging directory."""
        self.close()
        splits = {split: self._sealed_shards(split) for split in SPLITS}
        manifest = DatasetManifest(
            format_version=1,
            dtype=dtype_for(self._vocabulary),
            vocabulary=self._vocabulary,
            end_of_document=end_of_document,
            documents=sum(shard.documents for shards in splits.values() for shard in shards),
            tokenizer=tokenizer,
            splits=splits,
            source=source,
        )
        with explain_full_disk(self._staging, 0):
            write_atomically(self._staging / MANIFEST_FILE, manifest.to_json())
        return manifest

    def _sealed_shards(self, split: Split) -> tuple[TokenShard, ...]:
        return tuple(
            _sealed_shard(self._staging / f"{split}-{number:05d}.bin", shard, self._dtype)
            for number, shard in enumerate(self.progress.splits[split])
        )


def _sealed_shard(path: Path, shard: ShardProgress, dtype: np.dtype) -> TokenShard:
    return TokenShard(
        **record_file(path).model_dump(),
        tokens=shard.tokens,
        documents=shard.documents,
        max_token=largest_token(path, dtype),
        offsets=record_file(path.with_suffix(".offsets")),
        targets=record_file(targets)
        if (targets := path.with_suffix(".targets")).exists()
        else None,
    )


@contextmanager
def explain_full_disk(directory: Path, need_bytes: int) -> Iterator[None]:
    """Raise UserError if `need_bytes` do not fit or if the disk fills up.

    The message has the needed and the free space.
    """
    require_space(directory, need_bytes)
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        if error.errno == errno.EROFS:  # no room would help
            raise UserError(
                f"{directory}: {error.strerror}; make its disk writable and give the same command "
                "again: it continues from the last commit point"
            ) from error
        raise _disk_full(directory, need_bytes, error.strerror or "disk full") from error


def require_space(directory: Path, need_bytes: int) -> None:
    if shutil.disk_usage(directory).free < need_bytes + RESERVE_BYTES:
        raise _disk_full(directory, need_bytes, "disk nearly full")


def _disk_full(directory: Path, need_bytes: int, reason: str) -> UserError:
    need = human_bytes(need_bytes + RESERVE_BYTES)
    have = human_bytes(shutil.disk_usage(directory).free)
    return UserError(
        f"{directory}: {reason}: need at least {need} more, have {have}. Free some space and rerun "
        "the same command: it continues from the last commit point"
    )


@contextmanager
def exclusive_staging(directory: Path) -> Iterator[Path]:
    """Lock the staging directory of `directory` against other processes of this host, and yield it.

    Makes it if needed, and waits while another process holds it. Raises UserError if it cannot be
    made.
    """
    with ExitStack() as held:
        try:
            staging = held.enter_context(_atomic(directory).locked(wait=True))
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be made ({error.strerror}: {error.filename}); choose another "
                "--output"
            ) from error
        yield staging


def _atomic(directory: Path) -> AtomicDirectory:
    return AtomicDirectory(dataset_staging_directory(directory), directory)


def publish(directory: Path) -> None:
    """Rename the complete staging directory of `directory` to it.

    A dataset that was there is removed after the rename.
    """
    staging = dataset_staging_directory(directory)
    manifest = DatasetManifest.model_validate_json((staging / MANIFEST_FILE).read_bytes())
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    known = {
        MANIFEST_FILE,
        *(record.file for record in manifest.tokenizer.files),
        *(s.file for s in shards),
        *(file.file for s in shards for file in s.beside),
    }
    for path in staging.iterdir():
        if path.name not in known:
            path.unlink()
    _atomic(directory).commit()
