"""Reading tensors of a checkpoint on whatever mesh: any run of any box of any parameter, and
nothing else.
"""

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

MOST_HEADER_BYTES = 8 * MIB  # of the shapes and names of some 60,000 pieces


class Reader:
    """Reads from one checkpoint, opening only the files that hold what is asked for.

    ``bytes_read`` counts what has been taken from the files so far.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.bytes_read = 0
        self._open: dict[str, Any] = {}

    def read_into(self, result: Tensor, kind: str, name: str, box: Box, start: int) -> None:
        """Fill a flat tensor with the elements of a parameter's flattened box from ``start`` on.

        ``kind`` is weight or a moment. Raises DamagedCheckpointError where the files do not hold
        all of them.
        """
        wanted = rectangles(box, start, result.numel())
        found = 0
        for piece in self._pieces(name):
            for here, there in overlaps(wanted, rectangles(piece.box, piece.start, piece.numel)):
                _view(result, here).copy_(self._rectangle(kind, name, piece, there))
                found += here.numel
        if found != result.numel():
            raise DamagedCheckpointError(
                f"{self.directory.name}: {name} has {found} of elements {start} to "
                f"{start + result.numel()} of {box}"
            )

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its logical shape, fp32 on the CPU."""
        self._pieces(name)
        shape = self.manifest.tensors[name].shape
        result = torch.empty(math.prod(shape))
        self.read_into(result, kind, name, whole(shape), 0)
        return result.view(shape)

    def _pieces(self, name: str) -> tuple[Slice, ...]:
        if name not in self.manifest.tensors:
            raise DamagedCheckpointError(f"{self.directory.name}/{MANIFEST}: no parameter {name}")
        return self.manifest.tensors[name].slices

    def _rectangle(self, kind: str, name: str, piece: Slice, part: Rectangle) -> Tensor:
        """What a piece holds of a rectangle; of rows much longer than the rectangle only the
        part in it is read.
        """
        try:
            stored = self._file(piece.file).get_slice(f"{kind}/{name}")
        except SafetensorError as error:
            raise DamagedCheckpointError(f"{self.directory.name}/{piece.file}: {error}") from error
        if stored.get_shape() != [piece.numel] or stored.get_dtype() != "F32":
            raise DamagedCheckpointError(
                f"{self.directory.name}/{piece.file}: {kind}/{name} is {stored.get_dtype()} of "
                f"shape {stored.get_shape()}, not F32 of [{piece.numel}]"
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
            except (
                SafetensorError,
                *MISSING,
            ) as error:  # an OSError of another kind says nothing of the content
                raise DamagedCheckpointError(f"{self.directory.name}/{name}: {error}") from error
        return self._open[name]


def require_small_header(directory: Path, name: str) -> None:
    """Of a header, which is JSON, safetensors makes twenty times its size in memory (seen: 98 MB
    became 1.9 GiB).
    """
    with (
        suppress(OSError),
        (directory / name).open("rb") as file,
    ):  # safe_open meets it too, and says so
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER_BYTES:
            raise DamagedCheckpointError(
                f"{directory.name}/{name}: header too large ({size} bytes)"
            )


def _view(run: Tensor, part: Rectangle) -> Tensor:
    """A rectangle of a flat run, in place."""
    return run[part.offset :].as_strided(part.shape, (part.stride, 1))


def open_checkpoint(run_directory: Path, step: int | None = None) -> Reader:
    """For a single process: the newest checkpoint that verifies, or that of ``step``.

    Raises UserError where there is none, with what is wrong with those that were passed over, and
    where the newest has another format.
    """
    checkpoints = run_directory / "checkpoints"
    known, faults = complete_steps(checkpoints), []
    for candidate in known if step is None else [step]:
        directory = step_directory(checkpoints, candidate)
        try:
            manifest = read_manifest(directory)
            require_no_other_files(directory, manifest)
            for name, expected in manifest.files.items():
                verify_file(directory, name, expected)
            return Reader(directory, manifest)
        except DamagedCheckpointError as error:
            faults.append(f"\n  {error}")
    wanted = f"checkpoint of step {step}" if step is not None else "checkpoint that can be loaded"
    having = f"it has steps {', '.join(map(str, reversed(known)))}" if known else "it has none yet"
    raise UserError(f"{run_directory}: no {wanted}; {having}{''.join(faults)}")
