"""Read prepared tokens: memory-mapped streams, cut into samples in a reproducible order.

A run reads a `SampleStream`. Sample `index` is a pure function of (data, seed, index), the same on
every rank and mesh, so the position in the data is one integer and resuming costs nothing. numpy
only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megagpt.data.integrity import check_file, verify
from megagpt.data.manifest import (
    OFFSET_DTYPE,
    DatasetManifest,
    Split,
    TokenShard,
    read_dataset_manifest,
    remedy,
)
from megagpt.data.sample_order import Blend, permute
from megagpt.utils import UserError

__all__ = [
    "Batch",
    "Dataset",
    "DatasetManifest",
    "Sample",
    "SampleStream",
    "TokenStream",
    "open_dataset",
    "verify",
]


class TokenStream:
    """The tokens of one split as one long sequence, with the starts of its documents."""

    def __init__(
        self, directory: Path, shards: Sequence[TokenShard], dtype: np.dtype, vocabulary: int
    ) -> None:
        self._files = [directory / shard.file for shard in shards]
        self._vocabulary = vocabulary
        self._tokens = [np.memmap(file, dtype, mode="r") for file in self._files]
        self._offsets = [_open_offsets(directory / shard.offsets.file) for shard in shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._first_documents = np.cumsum([0, *(shard.documents for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) as int64; raise UserError if an id is out of range."""
        pieces = [self._tokens[shard][low:high] for shard, low, high in self._pieces(start, stop)]
        tokens = np.concatenate(pieces, dtype=np.int64)
        # the probes may miss a change; on a GPU a wrong id would be a CUDA assertion
        if tokens.max() >= self._vocabulary:
            raise UserError(self._id_problem(start + int(np.argmax(tokens >= self._vocabulary))))
        return tokens

    def _id_problem(self, place: int) -> str:
        """Return the error message for the token at a position in the stream."""
        ((shard, low, _),) = self._pieces(place, place + 1)
        file = self._files[shard]
        tokens = self._tokens[shard]
        return (
            f"{file}: token id {tokens[low]} found at byte {low * tokens.itemsize}, ids below "
            f"{self._vocabulary} expected: changed since preparation\n"
            f"{remedy(file.parent)}"
        )

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """Return the document number, within the split, of each token in [start, stop): int64."""
        return np.concatenate(
            [self._shard_document_ids(*piece) for piece in self._pieces(start, stop)]
        )

    def _shard_document_ids(self, shard: int, low: int, high: int) -> np.ndarray:
        offsets = self._offsets[shard]
        # Scalars of the file's type: with another type, searchsorted would convert the whole file.
        first, last = np.searchsorted(
            offsets, [OFFSET_DTYPE.type(low), OFFSET_DTYPE.type(high - 1)], side="right"
        )
        begins = np.zeros(high - low, np.int64)
        begins[(offsets[first:last] - OFFSET_DTYPE.type(low)).astype(np.int64)] = 1
        return self._first_documents[shard] + first - 1 + np.cumsum(begins)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return (shard, low, high) of the shards that [start, stop) touches."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {len(self)}")
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        return [
            (
                shard,
                max(start - int(self._starts[shard]), 0),
                min(stop, int(self._starts[shard + 1])) - int(self._starts[shard]),
            )
            for shard in range(first, last + 1)
        ]


def _open_offsets(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:  # no document begins in this shard; an empty file cannot be mapped
        return np.empty(0, OFFSET_DTYPE)
    return np.memmap(path, OFFSET_DTYPE, mode="r")


@dataclass(frozen=True)
class Dataset:
    """A directory of prepared tokens that agrees with its manifest."""

    directory: Path
    manifest: DatasetManifest

    @property
    def vocabulary(self) -> int:
        return self.manifest.vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """A hash of tokens and tokenizer for checkpoints; it does not depend on the directory."""
        return self.manifest.fingerprint

    def split(self, name: Split) -> TokenStream:
        if not self.manifest.tokens(name):
            advice = "a --validation_fraction above 0" if name == "val" else "more text"
            raise UserError(
                f"{self.directory}: no tokens in its {name} split; prepare it again with {advice}"
            )
        manifest = self.manifest
        return TokenStream(
            self.directory, manifest.shards(name), manifest.token_dtype, manifest.vocabulary
        )


def open_dataset(directory: Path) -> Dataset:
    """Open a prepared dataset after checking its files: size, dtype, largest token and probes.

    Takes well under two seconds. Raises UserError with file, offset, found and expected value
    if the files do not agree with the manifest.
    """
    manifest = read_dataset_manifest(Path(directory))
    check_file(Path(directory), manifest)
    return Dataset(Path(directory), manifest)


@dataclass(frozen=True)
class Sample:
    """One sample: `tokens` and the token after each, `targets`, both int64 [L].

    `document_ids`: int32 [L], equal within a document.
    """

    tokens: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray | None
    sample_id: int


@dataclass(frozen=True)
class Batch:
    """Stacked samples: int64 [n, L], int64 [n, L], int32 [n, L] or None, int64 [n]."""

    tokens: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray | None
    sample_ids: np.ndarray


class SampleStream:
    """Endless samples of `sequence_length` tokens from one dataset or a weighted blend.

    Samples are windows of L + 1 tokens that overlap by one, so each token is a target once an
    epoch. The rest of a split that fills no window is not used. Every split is read in a new
    pseudo-random order each epoch, so the first samples of a split are a random choice from all of
    it, and always the same one. In a blend each dataset counts its own epochs. A sample's id is its
    index.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        blend: Blend,
        *,
        split: Split,
        sequence_length: int,
        seed: int,
        document_mask: bool,
    ) -> None:
        self.datasets = tuple(datasets)
        self.sequence_length = sequence_length
        self._blend = blend
        self._seed = seed
        self._document_mask = document_mask
        self._streams = [dataset.split(split) for dataset in datasets]
        self._windows = [_count_windows(dataset, split, sequence_length) for dataset in datasets]

    @classmethod
    def open(
        cls,
        data: Sequence[tuple[Path, float]],
        *,
        split: Split,
        sequence_length: int,
        seed: int,
        document_mask: bool,
    ) -> SampleStream:
        """Open (directory, weight) pairs.

        Raises UserError for a bad dataset, a bad weight, or different tokenizers.
        """
        blend = Blend([weight for _, weight in data])
        datasets = [open_dataset(directory) for directory, _ in data]
        for other in datasets[1:]:
            if other.manifest.ids != datasets[0].manifest.ids:
                raise UserError(
                    f"{other.directory}: its tokenizer ({other.manifest.tokenizer.name}) is not "
                    f"that of {datasets[0].directory} ({datasets[0].manifest.tokenizer.name}); "
                    "prepare both with the same one"
                )
        return cls(
            datasets,
            blend,
            split=split,
            sequence_length=sequence_length,
            seed=seed,
            document_mask=document_mask,
        )

    @property
    def vocabulary(self) -> int:
        return self.datasets[0].vocabulary

    @property
    def samples_per_epoch(self) -> int:
        """Windows of all datasets together; each dataset of a blend has its own epochs."""
        return sum(self._windows)

    def share(self, samples: int) -> float:
        """Return the share of all windows, 0 to 1, that the first ``samples`` samples visit."""
        visits = Counter(self._blend.locate(index)[0] for index in range(samples))
        visited = sum(min(visits[number], count) for number, count in enumerate(self._windows))
        return visited / self.samples_per_epoch

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the data and their shares, which a resumed run compares."""
        contents = [
            [dataset.fingerprint, str(share)]
            for dataset, share in zip(self.datasets, self._blend.shares, strict=True)
        ]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def locate(self, index: int) -> tuple[Dataset, int]:
        """Return the dataset of sample `index` and its first token there, to look a sample up."""
        number, window = self._window(index)
        return self.datasets[number], window * self.sequence_length

    def source_of(self, index: int) -> int:
        """Return the number of the dataset that sample `index` is from."""
        return self._blend.locate(index)[0]

    def sample(self, index: int) -> Sample:
        """Return sample `index`, counted over all epochs."""
        number, window = self._window(index)
        stream = self._streams[number]
        start = window * self.sequence_length
        stop = start + self.sequence_length
        tokens = stream.read(start, stop + 1)
        document_ids = None
        if self._document_mask:
            ids = stream.document_ids(start, stop)
            document_ids = (ids - ids[0]).astype(np.int32)
        return Sample(tokens[:-1], tokens[1:], document_ids, index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at `indices`, stacked in that order."""
        samples = [self.sample(index) for index in indices]
        return Batch(
            tokens=np.stack([sample.tokens for sample in samples]),
            targets=np.stack([sample.targets for sample in samples]),
            document_ids=np.stack([s.document_ids for s in samples if s.document_ids is not None])
            if self._document_mask
            else None,
            sample_ids=np.array([sample.sample_id for sample in samples], np.int64),
        )

    def _window(self, index: int) -> tuple[int, int]:
        """Return (number of the dataset, window in it) of sample `index`."""
        number, visit = self._blend.locate(index)
        epoch, place = divmod(visit, self._windows[number])
        return number, permute(place, self._windows[number], seed=self._seed, epoch=epoch)


def _count_windows(dataset: Dataset, split: Split, sequence_length: int) -> int:
    tokens = dataset.manifest.tokens(split)
    windows = (tokens - 1) // sequence_length
    if windows < 1:
        raise UserError(
            f"{dataset.directory}: its {split} split has {tokens} tokens, but a sample needs "
            f"{sequence_length + 1}; set megagpt.model.sequence_length to at most "
            f"{max(tokens - 1, 0)}, or use more data"
        )
    return windows
