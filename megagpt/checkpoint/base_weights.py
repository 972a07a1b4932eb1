"""The weights of a base, known by their hash, in one process.

The hash is of the weights alone, as the logical tensors have them. So it does not depend on the
ranks that saved them, on the run or on its moments, and to prove a base only the weights are read,
a third of a checkpoint.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megagpt.checkpoint.collective import DAMAGE
from megagpt.checkpoint.format import WEIGHT, read_manifest
from megagpt.checkpoint.reader import Reader
from megagpt.parallel.rectangles import whole
from megagpt.utils import UserError

PIECE = 2**24  # elements that are in memory to be hashed


def open_proven(checkpoint: Path, expected: str | None) -> Reader:
    """Return a reader of the base whose weights have this hash; None: another rank has proven it.

    Raise UserError if the checkpoint is damaged or holds other weights.
    """
    try:
        reader = Reader(checkpoint, read_manifest(checkpoint))
        if expected is None:
            return reader
        found = combined(hashes(reader, reader.manifest.tensors))
    except (*DAMAGE, OSError) as error:
        raise UserError(f"{checkpoint}: the base cannot be read: {error}") from error
    require_same(checkpoint, found, expected)
    return reader


def require_same(checkpoint: Path, found: str, expected: str | None) -> None:
    """Raise UserError if the base has other weights than those that the adapters were trained on.

    ``expected`` None: none are known.
    """
    if expected not in (None, found):
        raise UserError(
            f"{checkpoint}: the adapters are of another base (found weights of sha256 "
            f"{found[:16]}, need {str(expected)[:16]}); name theirs: --set "
            "megagpt.training.lora.base=runs/NAME"
        )


def hashes(reader: Reader, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each weight: its shape, then its fp32 elements, little-endian."""
    return {name: _hash_of(reader, name) for name in names}


def combined(by_name: Mapping[str, str]) -> str:
    """Return the hash of all weights."""
    return hashlib.sha256(json.dumps(sorted(by_name.items())).encode()).hexdigest()


def _hash_of(reader: Reader, name: str) -> str:
    shape = reader.manifest.tensors[name].shape
    elements = math.prod(shape)
    digest = hashlib.sha256(json.dumps(shape).encode())
    for start in range(0, elements, PIECE):
        piece = torch.empty(min(PIECE, elements - start))
        reader.read_into(piece, WEIGHT, name, whole(shape), start)
        digest.update(piece.numpy().data)
    return digest.hexdigest()
