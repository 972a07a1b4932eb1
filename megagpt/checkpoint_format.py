"""Checkpoints on disk: one directory a step, safetensors and JSON, whole or absent, readable without any mesh.

    checkpoints/step_00000100/manifest.json            what, from which run, how cut, and the SHA-256 of every file
                              rank_00000_000.safetensors ...    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME
    checkpoints/latest                                  advisory; the scan of manifests is the authority

A tensor in a file is a flat fp32 run of a parameter named globally (``blocks.17.attention.qkv.weight``): elements
[start, start + numel) of the flattened ``box`` of the logical tensor. Nothing here executes what it reads.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.utils import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHT = "weight"
_STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"rank_\d{5,}_\d{3,}\.safetensors")


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be loaded; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + numel) of the flattened box of a logical tensor, and the file that holds them."""

    file: str
    start: int
    numel: int
    box: tuple[tuple[int, int], ...]  # [from, to) in each dimension of the logical tensor


@dataclass(frozen=True)
class StoredTensor:
    """One parameter: its logical shape and where its pieces lie."""

    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class StoredFile:
    """What a file must be, byte for byte."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; with the weights and moments, everything that its next step depends on.

    Random numbers are counter-based (seed, step, sample), so no generator needs saving. ``cursor`` is the index of the
    next sample; ``applied_steps`` is Adam's count of updates: steps less the skipped ones.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    applied_steps: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its tensors."""

    state: TrainState
    identity: dict[str, Any]
    data_fingerprint: str
    topology: dict[str, Any]
    scheduler: dict[str, Any]
    learning_rates: list[float]
    loss_scaler: dict[str, float]
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The manifest as text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse and check; raises DamagedCheckpointError with what is wrong."""
        try:
            raw = json.loads(text)
            if raw["format_version"] != FORMAT_VERSION:
                raise DamagedCheckpointError(
                    f"{MANIFEST}: format {raw['format_version']}, this version reads {FORMAT_VERSION}"
                )
            raw["state"] = TrainState(**raw["state"])
            raw["files"] = {_safe_name(name): StoredFile(**entry) for name, entry in raw["files"].items()}
            raw["tensors"] = {name: _stored_tensor(entry) for name, entry in raw["tensors"].items()}
            return cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{MANIFEST}: {type(error).__name__}: {error}") from error


def _stored_tensor(entry: dict[str, Any]) -> StoredTensor:
    slices = tuple(
        Slice(_safe_name(piece["file"]), piece["start"], piece["numel"], tuple((a, b) for a, b in piece["box"]))
        for piece in entry["slices"]
    )
    return StoredTensor(tuple(entry["shape"]), slices)


def _safe_name(name: str) -> str:
    """A manifest names files of its own directory only."""
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name this format gives to a file")
    return name


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
        return Manifest.from_json((directory / MANIFEST).read_text())
    except OSError as error:
        raise DamagedCheckpointError(f"{directory.name}/{MANIFEST}: {error.strerror}") from error


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
    """Reads any run of any parameter of one checkpoint, opening only the files that hold it."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._open: dict[str, Any] = {}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the flattened parameter, fp32 on the CPU; kind is weight or a moment."""
        result = torch.empty(numel)
        found = 0
        for piece in self.manifest.tensors[name].slices:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                run = self._file(piece.file).get_slice(f"{kind}/{name}")[first - piece.start : last - piece.start]
                result[first - start : last - start] = run
                found += last - first
        if found != numel:
            raise DamagedCheckpointError(
                f"{self.directory.name}: {name} has {found} of elements {start} to {start + numel}"
            )
        return result

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole parameter in its logical shape."""
        shape = self.manifest.tensors[name].shape
        return self.read(kind, name, 0, int(torch.Size(shape).numel())).view(shape)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(str(self.directory / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise DamagedCheckpointError(f"{self.directory.name}/{name}: {error}") from error
        return self._open[name]


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
