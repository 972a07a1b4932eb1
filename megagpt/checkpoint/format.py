"""Checkpoints on disk: one directory per step, safetensors and JSON, readable without any mesh.

    checkpoints/latest                      advisory; the scan of manifests is the authority
    checkpoints/step_00000100/
        manifest.json                       run, mesh, slices of tensors, SHA-256 of each file
        rank_00000_000.safetensors ...      weight/NAME, exp_avg/NAME, exp_avg_sq/NAME

A directory is whole or absent. A tensor in a file is a flat fp32 run of a parameter with a global
name (``blocks.17.attention.qkv.weight``): elements [start, start + numel) of the flattened ``box``
of the logical tensor. Nothing here executes what it reads.
"""

import hashlib
import json
import re
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megagpt.common.disk import sha256_of
from megagpt.utils import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHT = "weight"
# The file is not there. Other OSErrors may be temporary errors of the disk.
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_STEP_NAME = re.compile(r"step_(\d{8,})")
_SEAL = re.compile(r',\n "sha256": "([0-9a-f]{64})"\n\}\n\Z')
STRICT = ConfigDict(strict=True, extra="forbid")

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# The pattern admits no path outside the checkpoint's own directory.
FileName = Annotated[str, Field(pattern=r"^rank_\d{5,}_\d{3,}\.safetensors$")]
Record = TypeVar("Record")


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be loaded; the message names the file and the damage."""


class OtherFormatError(UserError):
    """A valid file of another version of this program.

    It is not damaged, so a resume neither skips it nor sets it aside.
    """


@dataclass(frozen=True, config=STRICT)
class Slice:
    """Elements [start, start + numel) of a logical tensor's flattened box, and their file."""

    file: FileName
    start: Count
    numel: Count
    box: tuple[tuple[Count, Count], ...]  # [from, to) in each dim of the logical tensor


@dataclass(frozen=True, config=STRICT)
class StoredTensor:
    """One parameter: its logical shape and its slices."""

    shape: tuple[Count, ...]
    slices: tuple[Slice, ...]


@dataclass(frozen=True, config=STRICT)
class StoredFile:
    """The size and SHA-256 that a file must have."""

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, config=STRICT)
class GuardMemory:
    """The guard's state, so that a resumed run skips the same steps as an undisturbed one."""

    recent_losses: tuple[float, ...] = ()
    skips_in_a_row: Count = 0


@dataclass(frozen=True, config=STRICT)
class TrainState:
    """The progress of a run; with weights and moments, everything that its next step depends on.

    Random numbers are counter-based (seed, step, sample), so no generator is saved. ``cursor`` is
    the index of the next sample. ``applied_steps`` is Adam's count of updates: steps minus skipped
    steps.
    """

    step: Count = 0
    cursor: Count = 0
    tokens: Count = 0
    applied_steps: Count = 0
    skipped_steps: Count = 0
    guard: GuardMemory = GuardMemory()


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """Everything about a checkpoint except its tensors."""

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
    # SHA-256 of the frozen weights (base.py), if the tensors are those of adapters.
    base: Sha256 | None = None

    def to_json(self) -> str:
        """Return the manifest as sealed text; one of a whole model has no ``base``."""
        fields = asdict(self)
        if self.base is None:
            del fields["base"]
        return sealed(fields)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse and check a manifest; raise DamagedCheckpointError with what is wrong."""
        return parse_sealed(cls, text, MANIFEST)


def sealed(fields: dict[str, Any]) -> str:
    """Return JSON that ends with its own SHA-256, so that any changed bit is detected."""
    body = json.dumps(fields, indent=1)
    return body.removesuffix("\n}") + f',\n "sha256": "{_text_hash(body)}"\n}}\n'


def parse_sealed(record: type[Record], text: str, name: str) -> Record:
    """Return a pydantic dataclass with a ``format_version`` from a file's text.

    Raise DamagedCheckpointError with what is wrong, and OtherFormatError if ``format_version`` is
    another whole number. Every format has the same seal, so that another format can be told from
    damage.
    """
    body = _unsealed(text, name)
    try:
        version = json.loads(body)["format_version"]
        if type(version) is int and version != FORMAT_VERSION:
            raise OtherFormatError(
                f"{name}: wrong format (found {version}, this version of megagpt needs "
                f"{FORMAT_VERSION})"
            )
        return TypeAdapter(record).validate_json(body)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:3]
        )
        raise DamagedCheckpointError(f"{name}: {wrong}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{name}: {type(error).__name__}: {error}") from error


def _unsealed(text: str, name: str) -> str:
    """Return the JSON without its last key, the SHA-256, after checking it."""
    seal = _SEAL.search(text)
    body = f"{text[: seal.start()]}\n}}" if seal else ""
    if seal is None or _text_hash(body) != seal[1]:
        raise DamagedCheckpointError(f"{name}: its content changed since it was written (SHA-256)")
    return body


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def step_directory(checkpoints: Path, step: int) -> Path:
    """Return the directory of a step: checkpoints/step_00000100."""
    return checkpoints / f"step_{step:08d}"


def complete_steps(checkpoints: Path) -> list[int]:
    """Return the steps with a committed directory, newest first.

    Staging directories have other names.
    """
    if not checkpoints.is_dir():
        return []
    matches = (
        _STEP_NAME.fullmatch(entry.name) for entry in checkpoints.iterdir() if entry.is_dir()
    )
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of one checkpoint.

    Raise DamagedCheckpointError, or OtherFormatError with what to do.
    """
    try:
        return read_sealed(Manifest, directory, MANIFEST)
    except OtherFormatError as error:
        aside = directory.with_name(f"other_format_{directory.name}")
        raise OtherFormatError(
            f"{directory.parent}/{error}; continue with the version that wrote it, or without "
            f"this checkpoint: mv {directory} {aside}"
        ) from error


def read_sealed(record: type[Record], directory: Path, name: str) -> Record:
    """Return a sealed file of one checkpoint.

    Raise DamagedCheckpointError or OtherFormatError.
    """
    try:
        return parse_sealed(record, (directory / name).read_text(encoding="utf-8"), name)
    except (DamagedCheckpointError, OtherFormatError) as error:
        raise type(error)(f"{directory.name}/{error}") from error
    except MISSING as error:
        raise DamagedCheckpointError(f"{directory.name}/{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DamagedCheckpointError(
            f"{directory.name}/{name}: not UTF-8 at byte {error.start}"
        ) from error


def require_no_other_files(directory: Path, manifest: Manifest) -> None:
    """Raise DamagedCheckpointError on a tensor file that is not in the manifest.

    Such a file shows that two saves were mixed up.
    """
    others = sorted({path.name for path in directory.glob("*.safetensors")} - manifest.files.keys())
    if others:
        raise DamagedCheckpointError(f"{directory.name}/{others[0]}: not in {MANIFEST}")


def verify_file(directory: Path, name: str, expected: StoredFile) -> None:
    """Raise DamagedCheckpointError unless the file has the recorded size and SHA-256."""
    path = directory / name
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            raise DamagedCheckpointError(
                f"{directory.name}/{name}: wrong size (found {size} bytes, need {expected.bytes})"
            )
        if sha256_of(path) != expected.sha256:
            raise DamagedCheckpointError(
                f"{directory.name}/{name}: its content changed since it was written (SHA-256)"
            )
    except MISSING as error:
        raise DamagedCheckpointError(f"{directory.name}/{name}: {error.strerror}") from error
