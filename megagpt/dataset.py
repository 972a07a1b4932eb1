"""Read prepared tokens: memory-mapped streams, cut into samples in a reproducible order.

A run reads a `SampleStream`. Sample `index` is a pure function of (data, seed, index), the same on
every rank and mesh, so the position in the data is one integer and resuming costs nothing. A
dataset is read as windows of its tokens (`Windows`), or one of conversations as whole ones
(`PackedConversations`). numpy only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from megagpt.data.chat.packing import one_each, pack
from megagpt.data.integrity import check_file, verify
from megagpt.data.manifest import (
    OFFSET_DTYPE,
    DatasetManifest,
    Split,
    TokenShard,
    remedy,
)
from megagpt.data.sample_order import Blend, permute
from megagpt.data.token_files.declared import NOTHING, Declared
from megagpt.data.token_files.opening import TokenFiles, manifest_of
from megagpt.data.token_files.segments import DocumentStarts, Segment, StoredStarts
from megagpt.utils import IGNORED, UserError

__all__ = [
    "Batch",
    "Dataset",
    "DatasetManifest",
    "Packing",
    "Sample",
    "SampleStream",
    "TokenStream",
    "open_dataset",
    "verify",
]

Packing = Literal["stream", "conversations", "one_per_row"]


class TokenStream:
    """The tokens of one split as one long sequence, with the starts of its documents."""

    def __init__(self, segments: Sequence[Segment], vocabulary: int, remedy: str) -> None:
        self._segments = segments
        self._vocabulary = vocabulary
        self._remedy = remedy
        self._tokens = [segment.open() for segment in segments]
        self._bounds = [segment.bounds for segment in segments if segment.bounds is not None]
        self._starts = np.cumsum([0, *(segment.tokens for segment in segments)])
        self._first_documents = np.cumsum([0, *(len(segment.starts) for segment in segments)])

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
        ((number, low, _),) = self._pieces(place, place + 1)
        segment = self._segments[number]
        byte = segment.first_byte + low * segment.dtype.itemsize
        return (
            f"{segment.file}: token id {self._tokens[number][low]} found at byte {byte}, ids below "
            f"{self._vocabulary} expected{self._remedy}"
        )

    def document_ids(self, start: int, stop: int) -> np.ndarray:
        """Return the document number, within the split, of each token in [start, stop): int64."""
        return np.concatenate(
            [self._shard_document_ids(*piece) for piece in self._pieces(start, stop)]
        )

    def _shard_document_ids(self, shard: int, low: int, high: int) -> np.ndarray:
        begun = _places_up_to(self._segments[shard].starts, low, high)
        return self._first_documents[shard] - 1 + begun

    def targets(self, start: int, tokens: np.ndarray) -> np.ndarray:
        """Return `tokens` of the stream from `start` on; IGNORED in place of those without loss."""
        if not self._bounds:
            return tokens
        passed = [
            _places_up_to(self._bounds[shard], low, high)
            for shard, low, high in self._pieces(start, start + len(tokens))
        ]
        # Bounds begin and end runs in turn, so within a run their number is odd.
        return np.where(np.concatenate(passed) % 2, tokens, IGNORED)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """The first token of each document, and at the end the number of tokens: int64."""
        starts = [
            segment.starts.between(0, len(segment.starts)) + start
            for segment, start in zip(self._segments, self._starts[:-1], strict=True)
        ]
        return np.concatenate([*starts, self._starts[-1:]])

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


def _open_places(path: Path) -> np.ndarray:
    if path.stat().st_size == 0:  # no document begins in this shard; an empty file cannot be mapped
        return np.empty(0, OFFSET_DTYPE)
    return np.memmap(path, OFFSET_DTYPE, mode="r")


def _places_up_to(places: DocumentStarts, low: int, high: int) -> np.ndarray:
    """Return for each token in [low, high) how many of the increasing places are not after it."""
    first = places.count(low)
    passed = places.between(first, places.count(high - 1)) - low
    # Several may be at one token, where documents are empty.
    return first + np.cumsum(np.bincount(passed, minlength=high - low))


@dataclass(frozen=True)
class Dataset:
    """A directory of prepared tokens that agrees with its manifest, or another's token files."""

    directory: Path
    manifest: DatasetManifest | TokenFiles

    @property
    def vocabulary(self) -> int:
        return self.manifest.vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """A hash of tokens and tokenizer for checkpoints; it does not depend on the directory."""
        return self.manifest.fingerprint

    def split(self, name: Split) -> TokenStream:
        if not self.manifest.tokens(name):
            raise UserError(f"{self.directory}: no tokens in its {name} split; {self._more(name)}")
        if isinstance(self.manifest, TokenFiles):
            problem = "; give the tokenizer that made the file: megagpt.data.tokenizer"
            return TokenStream(self.manifest.segments(name), self.vocabulary, problem)
        segments = [_segment(self.directory, self.manifest, s) for s in self.manifest.shards(name)]
        changed = f": changed since preparation\n{remedy(self.directory)}"
        return TokenStream(segments, self.vocabulary, changed)

    def _more(self, name: Split) -> str:
        if isinstance(self.manifest, TokenFiles):
            return "set megagpt.data.validation_fraction between 0 and 1"
        advice = "a --validation_fraction above 0" if name == "val" else "more text"
        return f"prepare it again with {advice}"


def _segment(directory: Path, manifest: DatasetManifest, shard: TokenShard) -> Segment:
    starts = StoredStarts(_open_places(directory / shard.offsets.file))
    bounds = StoredStarts(_open_places(directory / shard.targets.file)) if shard.targets else None
    file = directory / shard.file
    return Segment(file, manifest.token_dtype, shard.tokens, starts, bounds=bounds)


def open_dataset(directory: Path, declared: Declared = NOTHING) -> Dataset:
    """Open a prepared dataset after checking its files: size, dtype, largest token and probes.

    Takes well under two seconds. Raises UserError with file, offset, found and expected value
    if the files do not agree with the manifest. Of token files ``declared`` says what they do not.
    """
    manifest = manifest_of(Path(directory), declared)
    if isinstance(manifest, DatasetManifest):
        check_file(Path(directory), manifest)
    return Dataset(Path(directory), manifest)


@dataclass(frozen=True)
class Sample:
    """One sample: `tokens` and the token after each, `targets`, both int64 [L].

    A target of IGNORED has no loss. `document_ids`: int32 [L], equal within a document.
    `positions`: int32 [L], the place of each token in its conversation, where those begin at 0.
    """

    tokens: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray | None
    sample_id: int
    positions: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """Stacked samples: int64 [n, L], int64 [n, L], int32 [n, L] or None, int64 [n].

    `positions` int32 [n, L], or None.
    """

    tokens: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray | None
    sample_ids: np.ndarray
    positions: np.ndarray | None = None


class Cuts(Protocol):
    """One split cut into samples; `count` is their number in an epoch."""

    count: int

    def start(self, place: int) -> int:
        """Return the first token of a sample."""

    def sample(self, place: int, sample_id: int) -> Sample:
        """Return the sample at a place, 0 to count - 1."""


class Windows:
    """Windows of L + 1 tokens that overlap by one, so each token is a target once an epoch.

    The rest of a split that fills no window is not used.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        length: int,
        *,
        document_mask: bool,
        restart_positions: bool,
    ) -> None:
        self._stream = dataset.split(split)
        self.count = _count_windows(dataset, split, length)
        self._length = length
        self._document_mask = document_mask
        self._restart_positions = restart_positions

    def start(self, place: int) -> int:
        """Return the first token of a sample."""
        return place * self._length

    def sample(self, place: int, sample_id: int) -> Sample:
        """Return the sample at a place."""
        start = self.start(place)
        stop = start + self._length
        tokens = self._stream.read(start, stop + 1)
        targets = self._stream.targets(start + 1, tokens[1:])
        if not self._document_mask:
            return Sample(tokens[:-1], targets, None, sample_id)
        ids = self._stream.document_ids(start, stop)
        documents = (ids - ids[0]).astype(np.int32)
        positions = _positions(documents) if self._restart_positions else None
        return Sample(tokens[:-1], targets, documents, sample_id, positions)


def _positions(documents: np.ndarray) -> np.ndarray:
    """Return the place of each token in its document, int32, from document ids in order."""
    index = np.arange(len(documents))
    begins = np.diff(documents, prepend=documents[:1] - 1) != 0
    return (index - np.maximum.accumulate(np.where(begins, index, 0))).astype(np.int32)


class PackedConversations:
    """Samples of whole conversations, each of which sees only itself, at positions from 0 on.

    A conversation of n tokens takes n - 1 places: its last token is only a target. What is left of
    a sample is filled with the end of a document, without targets.
    """

    def __init__(
        self, dataset: Dataset, split: Split, length: int, *, seed: int, packing: Packing
    ) -> None:
        self._stream = dataset.split(split)
        self._starts = self._stream.document_starts
        self._length = length
        self._filler = dataset.manifest.end_of_document
        places = np.diff(self._starts) - 1
        longest = int(places.max(initial=0))
        if longest > length:
            tokens = longest + 1
            raise UserError(
                f"{dataset.directory}: its longest conversation has {tokens} tokens, but a sample "
                f"holds {length + 1}; set megagpt.model.sequence_length to at least {longest}, "
                f"prepare it again with --max_length {length + 1}, or set megagpt.data.packing to "
                '"stream"'
            )
        self._packs = (
            one_each(places) if packing == "one_per_row" else pack(places, length, seed=seed)
        )
        self.count = len(self._packs)
        self.filled = float(places.sum() / max(self.count * length, 1))

    def start(self, place: int) -> int:
        """Return the first token of a sample."""
        return int(self._starts[self._packs.members(place)[0]])

    def sample(self, place: int, sample_id: int) -> Sample:
        """Return the sample at a place."""
        tokens = np.full(self._length, self._filler, np.int64)
        targets = np.full(self._length, IGNORED, np.int64)
        members = self._packs.members(place)
        documents = np.full(self._length, len(members), np.int32)
        at = 0
        for number, member in enumerate(members):
            start, stop = int(self._starts[member]), int(self._starts[member + 1])
            own = slice(at, at + stop - start - 1)
            conversation = self._stream.read(start, stop)
            tokens[own] = conversation[:-1]
            targets[own] = self._stream.targets(start + 1, conversation[1:])
            documents[own] = number
            at = own.stop
        return Sample(tokens, targets, documents, sample_id, _positions(documents))


class SampleStream:
    """Endless samples of `sequence_length` tokens from one dataset or a weighted blend.

    `packing` says how conversations are read; without it, whole ones are packed if there are any.
    Text is always read as windows, beside packed conversations with document masks and positions
    as they have them. Every split is read in a new pseudo-random order each epoch, so the first
    samples of a split are a random choice from all of it, and always the same one. In a blend each
    dataset counts its own epochs. A sample's id is its index.
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
        packing: Packing | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self.sequence_length = sequence_length
        self.packing: Packing = packing or (
            "conversations" if any(d.manifest.has_conversations for d in datasets) else "stream"
        )
        self._blend = blend
        self._seed = seed
        packed = self.packing != "stream"
        self._document_mask = document_mask or packed
        self._cuts: list[Cuts] = [
            PackedConversations(dataset, split, sequence_length, seed=seed, packing=self.packing)
            if packed and dataset.manifest.has_conversations
            else Windows(
                dataset,
                split,
                sequence_length,
                document_mask=self._document_mask,
                restart_positions=packed,
            )
            for dataset in datasets
        ]

    @classmethod
    def open(
        cls,
        data: Sequence[tuple[Path, float]],
        *,
        split: Split,
        sequence_length: int,
        seed: int,
        document_mask: bool,
        packing: Packing | None = None,
        declared: Declared = NOTHING,
    ) -> SampleStream:
        """Open (directory, weight) pairs.

        Raises UserError for a bad dataset, a bad weight, different tokenizers, and for token files
        without the documents that a mask needs.
        """
        blend = Blend([weight for _, weight in data])
        datasets = [open_dataset(directory, declared) for directory, _ in data]
        for dataset in datasets:
            if document_mask and not dataset.manifest.has_documents:
                raise UserError(
                    f"{dataset.directory}: does not say where documents begin, which "
                    "megagpt.data.document_mask needs; set it to false"
                )
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
            packing=packing,
        )

    @property
    def vocabulary(self) -> int:
        return self.datasets[0].vocabulary

    @property
    def ignores_targets(self) -> bool:
        """Whether a target may have no loss; if not, ranks need not count them in each step."""
        return any(dataset.manifest.has_conversations for dataset in self.datasets)

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all datasets together; each dataset of a blend has its own epochs."""
        return sum(cuts.count for cuts in self._cuts)

    def share(self, samples: int) -> float:
        """Return the share of all samples, 0 to 1, that the first ``samples`` samples visit."""
        visits = Counter(self._blend.locate(index)[0] for index in range(samples))
        visited = sum(min(visits[number], cuts.count) for number, cuts in enumerate(self._cuts))
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
        number, place = self._place(index)
        return self.datasets[number], self._cuts[number].start(place)

    def source_of(self, index: int) -> int:
        """Return the number of the dataset that sample `index` is from."""
        return self._blend.locate(index)[0]

    def sample(self, index: int) -> Sample:
        """Return sample `index`, counted over all epochs."""
        number, place = self._place(index)
        return self._cuts[number].sample(place, index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at `indices`, stacked in that order."""
        samples = [self.sample(index) for index in indices]
        return Batch(
            tokens=np.stack([sample.tokens for sample in samples]),
            targets=np.stack([sample.targets for sample in samples]),
            document_ids=_stacked([sample.document_ids for sample in samples]),
            sample_ids=np.array([sample.sample_id for sample in samples], np.int64),
            positions=_stacked([sample.positions for sample in samples]),
        )

    def _place(self, index: int) -> tuple[int, int]:
        """Return (number of the dataset, place in its epoch's order) of sample `index`."""
        number, visit = self._blend.locate(index)
        count = self._cuts[number].count
        epoch, place = divmod(visit, count)
        return number, permute(place, count, seed=self._seed, epoch=epoch)


def _stacked(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Return what all samples have, stacked; None if they have none."""
    present = [array for array in arrays if array is not None]
    return np.stack(present) if present else None


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
