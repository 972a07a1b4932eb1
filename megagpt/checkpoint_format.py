"""Checkpoints on disk: one directory a step, safetensors and JSON, whole or absent, readable without any mesh.

    checkpoints/step_00000100/manifest.json            what, from which run, how cut, and the SHA-256 of every file
                              rank_00000_000.safetensors ...    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME
    checkpoints/latest                                  advisory; the scan of manifests is the authority

A tensor in a file is a flat fp32 run of a parameter named globally (``blocks.17.attention.qkv.weight``): elements
[start, start + numel) of the flattened ``box`` of the logical tensor. Nothing here executes what it reads.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.boxes import Box, Rectangle, overlaps, rectangles, whole
from megagpt.utils import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHT = "weight"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_SEAL = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n\}\n\Z')
_STRICT = ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^rank_\d{5,}_\d{3,}\.safetensors$")]  # never outside its own directory


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True, config=_STRICT)
class Slice:
    """Elements [start, start + numel) of the flattened box of a logical tensor, and the file that holds them."""

    file: FileName
    start: Count
    numel: Count
    box: tuple[tuple[Count, Count], ...]  # [from, to) in each dimension of the logical tensor


@dataclass(frozen=True, config=_STRICT)
class StoredTensor:
    """One parameter: its logical shape and where its pieces lie."""

    shape: tuple[Count, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, config=_STRICT)
class StoredFile:
    """What a file must be, byte for byte."""

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, config=_STRICT)
class TrainState:
    """Where a run stands; with the weights and moments, everything that its next step depends on.

    Random numbers are counter-based (seed, step, sample), so no generator needs saving. ``cursor`` is the index of the
    next sample; ``applied_steps`` is Adam's count of updates: steps less the skipped ones.
    """

    step: Count = 0
    cursor: Count = 0
    tokens: Count = 0
    applied_steps: Count = 0
    skipped_steps: Count = 0


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    """Everything about a checkpoint but its tensors."""

    state: TrainState
    identity: dict[str, Any]
    data_fingerprint: str
    topology: dict[str, Any]
    scheduler: dict[str, Any]
    learning_rates: list[float]
    loss_scaler: dict[str, int | float]
    tensors: dict[str, StoredTensor]
    files: dict[FileName, StoredFile]
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The manifest as text that ends with its own SHA-256: no flipped bit in it passes for a manifest."""
        body = json.dumps(asdict(self), indent=1)
        return body.removesuffix("\n}") + f',\n "sha256": "{_text_hash(body)}"\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse and check; raises DamagedCheckpointError with what is wrong."""
        body = _unsealed(text)
        try:
            version = json.loads(body)["format_version"]
            if version != FORMAT_VERSION:
                raise DamagedCheckpointError(
                    f"{MANIFEST}: format {version}, this version of megagpt reads {FORMAT_VERSION}"
                )
            return TypeAdapter(cls).validate_json(body)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3])
            raise DamagedCheckpointError(f"{MANIFEST}: {wrong}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{MANIFEST}: {type(error).__name__}: {error}") from error


def _unsealed(text: str) -> str:
    """The JSON without its last key, the hash, once that agrees."""
    seal = _SEAL.search(text)
    body = f"{text[: seal.start()]}\n}}" if seal else ""
    if seal is None or _text_hash(body) != seal[1]:
        raise DamagedCheckpointError(f"{MANIFEST}: its content changed since it was written (SHA-256)")
    return body


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def step_directory(checkpoints: Path, step: int) -> Path:
    """checkpoints/step_00000100"""
    return checkpoints / f"step_{step:08d}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps with a committed directory, newest first; staging directories have other names."""
    if not checkpoints.is_dir():
        return []
    matches = (_STEP_NAME.fullmatch(entry.name) for entry in checkpoints.iterdir() if entry.is_dir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of one checkpoint; raises DamagedCheckpointError."""
    try:
        return Manifest.from_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{directory.name}/{error}") from error
    except OSError as error:
        raise DamagedCheckpointError(f"{directory.name}/{MANIFEST}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DamagedCheckpointError(f"{directory.name}/{MANIFEST}: not UTF-8 at byte {error.start}") from error


def verify_file(directory: Path, name: str, expected: StoredFile) -> None:
    """Raise DamagedCheckpointError unless the file is the one that was written."""
    path = directory / name
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise DamagedCheckpointError(f"{directory.name}/{name}: {size} bytes, expected {expected.bytes}")
        if hash_file(path) != expected.sha256:
            raise DamagedCheckpointError(f"{directory.name}/{name}: its content changed since it was written (SHA-256)")
    except OSError as error:
        raise DamagedCheckpointError(f"{directory.name}/{name}: {error.strerror}") from error


def hash_file(path: Path) -> str:
    """SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Reader:
    """Reads any run of any box of any parameter of one checkpoint, opening only the files that hold it."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, box: Box, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened box of a parameter, fp32 on the CPU.

        ``kind`` is weight or a moment.
        """
        result = torch.empty(numel)
        wanted = rectangles(box, start, numel)
        found = 0
        for piece in self._pieces(name):
            for here, there in overlaps(wanted, rectangles(piece.box, piece.start, piece.numel)):
                _view(result, here).copy_(self._rectangle(kind, name, piece, there))
                found += here.numel
        if found != numel:
            raise DamagedCheckpointError(
                f"{self.directory.name}: {name} has {found} of elements {start} to {start + numel} of {box}"
            )
        return result

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its logical shape."""
        self._pieces(name)
        shape = self.manifest.tensors[name].shape
        return self.read(kind, name, whole(shape), 0, math.prod(shape)).view(shape)

    def _pieces(self, name: str) -> tuple[Slice, ...]:
        if name not in self.manifest.tensors:
            raise DamagedCheckpointError(f"{self.directory.name}/{MANIFEST}: no parameter {name}")
        return self.manifest.tensors[name].slices

    def _rectangle(self, kind: str, name: str, piece: Slice, part: Rectangle) -> Tensor:
        """What a piece holds of a rectangle; of rows much longer than the rectangle only the part in it is read."""
        try:
            stored = self._file(piece.file).get_slice(f"{kind}/{name}")
        except SafetensorError as error:
            raise DamagedCheckpointError(f"{self.directory.name}/{piece.file}: {error}") from error
        if stored.get_shape() != [piece.numel]:
            raise DamagedCheckpointError(
                f"{self.directory.name}/{piece.file}: {kind}/{name} has shape {stored.get_shape()}, not [{piece.numel}]"
            )
        rows, columns = part.shape
        starts = range(part.offset, part.offset + rows * part.stride, part.stride)
        if 2 * columns <= part.stride:
            return torch.stack([stored[start : start + columns] for start in starts])
        run = stored[part.offset : starts[-1] + columns]
        return run.as_strided(part.shape, (part.stride, 1))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(str(self.directory / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpointError(f"{self.directory.name}/{name}: {error}") from error
        return self._open[name]


def _view(run: Tensor, part: Rectangle) -> Tensor:
    """A rectangle of a flat run, in place."""
    return run[part.offset :].as_strided(part.shape, (part.stride, 1))


def open_checkpoint(run_directory: Path, step: int | None = None) -> Reader:
    """For a single process: the newest checkpoint that verifies, or that of ``step``.

    Raises UserError where there is none, with what is wrong with those that were passed over.
    """
    checkpoints = run_directory / "checkpoints"
    known, faults = complete_steps(checkpoints), []
    for candidate in known if step is None else [step]:
        directory = step_directory(checkpoints, candidate)
        try:
            manifest = read_manifest(directory)
            for name, expected in manifest.files.items():
                verify_file(directory, name, expected)
            return Reader(directory, manifest)
        except DamagedCheckpointError as error:
            faults.append(f"\n  {error}")
    wanted = f"checkpoint of step {step}" if step is not None else "checkpoint that can be loaded"
    having = f"it has steps {', '.join(map(str, reversed(known)))}" if known else "it has none yet"
    raise UserError(f"{run_directory}: no {wanted}; {having}{''.join(faults)}")
