"""One rank's part of a save, without a collective call: plan files, copy, write and hash."""

import hashlib
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint import safetensors_file
from megagpt.checkpoint.format import WEIGHT, Slice, StoredFile
from megagpt.common.background import in_threads
from megagpt.lora import build
from megagpt.parallel.compat import MOMENTS, Bucket, Piece
from megagpt.parallel.engine import Engine
from megagpt.parallel.rectangles import Box
from megagpt.utils import MIB, UserError

KINDS = (WEIGHT, *MOMENTS)
FILE_BYTES = 256 * MIB  # at most, so that several threads can write and verify one large bucket
CHUNK_BYTES = MIB  # small enough to be hashed and written while it is in the processor's cache
_ELEMENT_BYTES = 4

Flats = dict[str, Tensor]  # by kind (weights or a moment): the bucket's flat run


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written: some pieces of one bucket, each with its weights and moments."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def header(self) -> bytes:
        """The header of the file."""
        return safetensors_file.header(
            (f"{kind}/{piece.name}", "F32", [piece.numel]) for kind, piece in self.tensors
        )

    @property
    def tensors(self) -> list[tuple[str, Piece]]:
        """(kind, piece) in the order in which they are written."""
        return [(kind, piece) for piece in self.pieces for kind in KINDS]

    @property
    def bytes(self) -> int:
        """The size of the file."""
        elements = sum(piece.numel for piece in self.pieces)
        return len(self.header) + len(KINDS) * _ELEMENT_BYTES * elements

    def slices(self, boxes: dict[str, Box]) -> list[tuple[str, Slice]]:
        """Return each parameter with the slice of it in this file, for the manifest."""
        return [(p.name, Slice(self.name, p.start, p.numel, boxes[p.name])) for p in self.pieces]


def plan_files(engine: Engine) -> list[list[PlannedFile]]:
    """Return the files of each bucket of this rank."""
    return files_of(engine.mesh.rank, (bucket.owned_pieces for bucket in owned_buckets(engine)))


def files_of(rank: int, buckets: Iterable[Iterable[Piece]]) -> list[list[PlannedFile]]:
    """Return the files of each bucket; a parameter too large for one file is cut."""
    names = (f"rank_{rank:05d}_{index:03d}.safetensors" for index in count())
    return [
        [PlannedFile(next(names), pieces) for pieces in _in_files(bucket)] for bucket in buckets
    ]


def _in_files(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    most = FILE_BYTES // (len(KINDS) * _ELEMENT_BYTES)
    held: list[Piece] = []
    for piece in pieces:
        for part in _cut(piece, most):
            if held and (
                sum(p.numel for p in held) + part.numel > most or held[-1].name == part.name
            ):
                yield tuple(held)
                held = []
            held.append(part)
    if held:
        yield tuple(held)


def _cut(piece: Piece, most: int) -> Iterator[Piece]:
    for start in range(0, piece.numel, most):
        numel = min(most, piece.numel - start)
        yield replace(piece, start=piece.start + start, numel=numel, offset=piece.offset + start)


def kinds(master: Tensor, optimizer_state: dict[str, Any]) -> Flats:
    """Return a bucket's weights and moments by their names in a file, each as a flat run.

    Moments that Adam has not created yet are zero.
    """
    moments = {name: optimizer_state.get(name) for name in MOMENTS}
    flats = {
        WEIGHT: master,
        **{n: torch.zeros_like(master) if m is None else m for n, m in moments.items()},
    }
    return {kind: flat.view(-1) for kind, flat in flats.items()}


def parameter_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Return the shape of every trained parameter of the whole model."""
    with torch.device("meta"):
        whole = build(engine.config.megagpt)
    return {
        name: tuple(parameter.shape)
        for name, parameter in whole.named_parameters()
        if parameter.requires_grad
    }


def owned_buckets(engine: Engine) -> list[Bucket]:
    """Return the buckets of which this rank saves something."""
    return [bucket for bucket in engine.buckets() if bucket.owned_pieces]


def live(engine: Engine) -> Generator[Flats]:
    """Yield the state of each bucket where it lies, resident in memory while it is used."""
    for bucket in owned_buckets(engine):
        with bucket.resident(False) as held:
            yield kinds(*held)


class Snapshot:
    """A copy of this rank's state in host memory, reused by every save.

    It is pinned only if a GPU copies to it. State in host memory is copied by the processor, and
    pinning its copy would cost time and memory (model_states.py, `pinned_block`) for nothing.
    """

    def __init__(self) -> None:
        self._flats: list[Flats] = []

    def take(self, engine: Engine) -> list[Flats]:
        """Copy the present state of the buckets, overwriting what an earlier call returned."""
        for index, flats in enumerate(live(engine)):
            if index == len(self._flats):
                self._flats.append(
                    {k: torch.empty(f.numel(), pin_memory=f.is_cuda) for k, f in flats.items()}
                )
            for kind, flat in flats.items():
                self._flats[index][kind].copy_(flat, non_blocking=True)
            if any(flat.is_cuda for flat in flats.values()):
                # The copy must end before the bucket's buffers go back to the swapper.
                torch.cuda.synchronize(engine.device)
        return self._flats


def write_files(
    staging: Path, plan: Sequence[list[PlannedFile]], state: Iterable[Flats]
) -> dict[str, StoredFile]:
    """Write every file of the plan, flushed to the disk; return size and SHA-256 by name.

    Raise OSError if the disk refuses, UserError if a value is not finite.
    """
    written: dict[str, StoredFile] = {}
    for files, flats in zip(plan, state, strict=True):
        stored = in_threads(partial(_write_file, staging, flats), files)
        written |= {file.name: entry for file, entry in zip(files, stored, strict=True)}
    return written


def write_live(
    staging: Path, plan: Sequence[list[PlannedFile]], engine: Engine
) -> dict[str, StoredFile]:
    """Write every file of the plan from the state where it lies, without a copy."""
    with closing(live(engine)) as state:
        return write_files(staging, plan, state)


def _write_file(staging: Path, flats: Flats, planned: PlannedFile) -> StoredFile:
    """Write a file in one pass: each chunk is hashed and handed to the disk."""
    path = staging / planned.name
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for chunk in _chunks(planned, flats):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # The error of a write does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    return StoredFile(planned.bytes, digest.hexdigest())


def _chunks(planned: PlannedFile, flats: Flats) -> Iterator[bytes | memoryview]:
    yield planned.header
    for kind, piece in planned.tensors:
        values = (
            flats[kind][piece.offset : piece.offset + piece.numel].detach().to("cpu", torch.float32)
        )
        _require_finite(f"{kind}/{piece.name}", values)
        content = values.contiguous().view(torch.uint8).numpy().data
        for start in range(0, len(content), CHUNK_BYTES):
            yield content[start : start + CHUNK_BYTES]


def _require_finite(name: str, values: Tensor) -> None:
    """Raise UserError if a value is NaN or infinite, which the extremes show.

    A corrupt checkpoint would in time push out the last good one.
    """
    least, greatest = values.aminmax()
    if not (least.isfinite() and greatest.isfinite()):
        raise UserError(
            f"{name}: not finite, so nothing was saved; earlier checkpoints are untouched; lower "
            "optimizer.params.lr and start again from the newest"
        )
