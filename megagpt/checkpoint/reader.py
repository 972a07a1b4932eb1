"""Reading tensors of a checkpoint on any mesh: only the elements that are asked for."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint.format import (
    MANIFEST,
    MISSING,
    DamagedCheckpointError,
    Manifest,
    Slice,
    complete_steps,
    read_manifest,
    require_no_other_files,
    step_directory,
    verify_file,
)
from megagpt.parallel.rectangles import Box, Rectangle, overlaps, rectangles, whole
from megagpt.utils import MIB, UserError

MOST_HEADER_BYTES = 8 * MIB  # enough for the names and shapes of some 60,000 pieces


class Reader:
    """Reads from one checkpoint and opens only the files that hold what is asked for.

    ``bytes_read`` counts the bytes read so far.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.bytes_read = 0
        self._open: dict[str, Any] = {}

    def read_into(self, result: Tensor, kind: str, name: str, box: Box, start: int) -> None:
        """Fill a flat tensor with the elements of a parameter's flattened box, from ``start`` on.

        ``kind`` is weight or a moment. Raise DamagedCheckpointError if the files lack some of the
        elements.
        """
        wanted = rectangles(box, start, result.numel())
        found = 0
        for piece in self._pieces(name):
            for here, there in overlaps(wanted, rectangles(piece.box, piece.start, piece.numel)):
                _view(result, here).copy_(self._rectangle(kind, name, piece, there))
                found += here.numel
        if found != result.numel():
            raise DamagedCheckpointError(
                f"{self.directory.name}: {name} is incomplete (found {found} of the elements "
                f"{start} to {start + result.numel()} of {box})"
            )

    def tensor(self, kind: str, name: str, box: Box | None = None) -> Tensor:
        """Return a whole parameter in its logical shape, or a box of it; fp32 on the CPU."""
        self._pieces(name)
        box = whole(self.manifest.tensors[name].shape) if box is None else box
        shape = [end - start for start, end in box]
        result = torch.empty(math.prod(shape))
        self.read_into(result, kind, name, box, 0)
        return result.view(shape)

    def _pieces(self, name: str) -> tuple[Slice, ...]:
        if name not in self.manifest.tensors:
            raise DamagedCheckpointError(f"{self.directory.name}/{MANIFEST}: no parameter {name}")
        return self.manifest.tensors[name].slices

    def _rectangle(self, kind: str, name: str, piece: Slice, part: Rectangle) -> Tensor:
        """Return a rectangle of a piece.

        If rows are much longer than the rectangle is wide, only the needed part of each row is
        read.
        """
        try:
            stored = self._file(piece.file).get_slice(f"{kind}/{name}")
        except SafetensorError as error:
            raise DamagedCheckpointError(f"{self.directory.name}/{piece.file}: {error}") from error
        if stored.get_shape() != [piece.numel] or stored.get_dtype() != "F32":
            raise DamagedCheckpointError(
                f"{self.directory.name}/{piece.file}: {kind}/{name} has the wrong type or shape "
                f"(found {stored.get_dtype()} {stored.get_shape()}, need F32 [{piece.numel}])"
            )
        rows, columns = part.shape
        starts = range(part.offset, part.offset + rows * part.stride, part.stride)
        if 2 * columns <= part.stride:
            self.bytes_read += 4 * part.numel
            return torch.stack([stored[start : start + columns] for start in starts])
        run = stored[part.offset : starts[-1] + columns]
        self.bytes_read += 4 * run.numel()
        return run.as_strided(part.shape, (part.stride, 1))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            require_small_header(self.directory, name)
            try:
                self._open[name] = safe_open(str(self.directory / name), framework="pt")
            # An OSError of another kind says nothing about the content.
            except (SafetensorError, *MISSING) as error:
                raise DamagedCheckpointError(f"{self.directory.name}/{name}: {error}") from error
        return self._open[name]


def require_small_header(directory: Path, name: str) -> None:
    """Raise DamagedCheckpointError if a file's JSON header is too large.

    safetensors needs twenty times the header's size in memory (measured: 1.9 GiB for 98 MB).
    """
    # safe_open meets the same OSError and reports it.
    with suppress(OSError), (directory / name).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER_BYTES:
            raise DamagedCheckpointError(
                f"{directory.name}/{name}: header too large ({size} bytes)"
            )


def _view(run: Tensor, part: Rectangle) -> Tensor:
    """Return a rectangle of a flat run as a view."""
    return run[part.offset :].as_strided(part.shape, (part.stride, 1))


def open_checkpoint(
    run_directory: Path, step: int | None = None, *, verified: bool = False
) -> Reader:
    """Return a reader of the newest checkpoint that verifies, or of ``step``; single process.

    ``verified``: another rank has verified it, so its files are not read here. Raise UserError if
    there is none, naming the damage of those skipped, and if the newest has another format.
    """
    checkpoints = run_directory / "checkpoints"
    known = complete_steps(checkpoints)
    faults: list[str] = []
    for candidate in known if step is None else [step]:
        directory = step_directory(checkpoints, candidate)
        try:
            manifest = read_manifest(directory)
            require_no_other_files(directory, manifest)
            for name, expected in manifest.files.items():
                if not verified:
                    verify_file(directory, name, expected)
            return Reader(directory, manifest)
        except DamagedCheckpointError as error:
            faults.append(f"\n  {error}")
    wanted = f"checkpoint of step {step}" if step is not None else "checkpoint that can be loaded"
    having = f"it has steps {', '.join(map(str, reversed(known)))}" if known else "it has none yet"
    raise UserError(f"{run_directory}: no {wanted}; {having}{''.join(faults)}")
