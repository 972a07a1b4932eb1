"""The base of a run that trains adapters, opened by all ranks: each reads only what it needs."""

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.base_weights import combined, hashes, require_same
from megagpt.checkpoint.collective import everyones, together
from megagpt.checkpoint.format import WEIGHT, read_manifest, require_no_other_files, verify_file
from megagpt.checkpoint.reader import Reader
from megagpt.checkpoint.resume import hashing_shares
from megagpt.common.background import in_threads
from megagpt.distributed import Mesh
from megagpt.parallel.engine import FrozenBase
from megagpt.parallel.rectangles import Box, shape_of


def open_base(checkpoint: Path, mesh: Mesh, expected: str | None) -> FrozenBase:
    """Return the weights of a checkpoint, proven by their hash; every rank must call it.

    Together the ranks hash each weight once. ``expected`` is the hash that the run has recorded;
    without one, the files are verified by their digests first. Raise UserError if the checkpoint is
    damaged or holds other weights.
    """
    reader = together(partial(_opened, checkpoint, mesh, whole_files=expected is None))
    names = sorted(reader.manifest.tensors)[mesh.rank :: mesh.world_size]
    parts = everyones(together(partial(hashes, reader, names)))
    found = combined({name: part for of_rank in parts for name, part in of_rank.items()})
    require_same(checkpoint, found, expected)
    return FrozenBase(partial(_rectangle, reader), found)


def _opened(checkpoint: Path, mesh: Mesh, *, whole_files: bool) -> Reader:
    manifest = read_manifest(checkpoint)
    if whole_files:
        require_no_other_files(checkpoint, manifest)
        share = hashing_shares(manifest.files, mesh.world_size)[mesh.rank]
        in_threads(lambda name: verify_file(checkpoint, name, manifest.files[name]), share)
    return Reader(checkpoint, manifest)


def _rectangle(reader: Reader, name: str, box: Box) -> Tensor:
    """Return a rectangle of a weight, fp32 on the CPU."""
    shape = shape_of(box)
    result = torch.empty(math.prod(shape))
    reader.read_into(result, WEIGHT, name, box, 0)
    return result.view(shape)
