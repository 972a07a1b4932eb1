"""Block sizes of the attention kernels, and the configurations compiled ahead of time."""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.launcher import INTERPRETED

MAXIMUM_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """Queries (BLOCK_M) and keys (BLOCK_N) at a time, warps, and how many loads ahead the pipeline runs."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return asdict(self)


# By pass, then by padded head dimension. Chosen by compiling for sm_90: no spills, no serialised wgmma, two programs a
# multiprocessor where registers allow it. tests/compiled_kernels.json has the figures.
_LARGE: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 128, 8, 2), 256: Tiles(64, 64, 8, 2)},
    "backward_keys": {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(64, 32, 8, 1)},
    "backward_queries": {64: Tiles(128, 64, 8, 2), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
}
# The extra masks of documents make two of these spill or serialise.
_DOCUMENTS = {
    **_LARGE,
    "forward": {**_LARGE["forward"], 128: Tiles(128, 64, 8, 3)},
    "backward_keys": {**_LARGE["backward_keys"], 128: Tiles(64, 32, 8, 2)},
}
# Dropout's random numbers need registers; and GPUs with less than 160 KiB of shared memory a multiprocessor (compute
# capability 8.6, 8.9, 12.x) hold only small blocks.
_SMALL: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(64, 32, 8, 1)},
    "backward_keys": {64: Tiles(32, 64, 8, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
    "backward_queries": {64: Tiles(64, 32, 8, 1), 128: Tiles(64, 32, 8, 1), 256: Tiles(32, 32, 8, 1)},
}
# fp32 products run on the ordinary cores, with both operands in registers.
_FP32: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 32, 8, 1)},
    "backward_keys": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    "backward_queries": {64: Tiles(32, 16, 8, 1), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
_SMALL_SHARED_MEMORY_BYTES = 160 * 1024
_INTERPRETED = {
    "forward": Tiles(32, 16, 4, 1),
    "backward_keys": Tiles(16, 32, 4, 1),
    "backward_queries": Tiles(32, 16, 4, 1),
}


def padded(head_dim: int) -> int:
    """The power of two that holds a head; matrix products need at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(phase: str, q: Tensor, *, dropout: bool, documents: bool) -> Tiles:
    """The configuration of one pass (forward, backward_keys, backward_queries) for queries like ``q``."""
    if INTERPRETED:
        return _INTERPRETED[phase]
    small = dropout or _shared_memory_bytes(q.device) < _SMALL_SHARED_MEMORY_BYTES
    return choose_tiles(phase, q.shape[-1], fp32=q.dtype == torch.float32, small=small, documents=documents)


def choose_tiles(phase: str, head_dim: int, *, fp32: bool, small: bool, documents: bool) -> Tiles:
    """The row of the tables above."""
    table = _FP32 if fp32 else _SMALL if small else _DOCUMENTS if documents else _LARGE
    return table[phase][max(64, padded(head_dim))]


@cache
def _shared_memory_bytes(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub does not list this one
    return int(properties.shared_memory_per_block_optin)
