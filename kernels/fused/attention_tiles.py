"""Block sizes of the attention kernels."""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from kernels.launcher import INTERPRETED

MAXIMUM_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """Block of queries (BLOCK_M) and of keys (BLOCK_N), warps, and the pipeline's stages.

    ``num_stages`` is how many blocks the loads run ahead.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Return the fields as keyword arguments of a launch."""
        return asdict(self)


_Table = dict[str, dict[int, Tiles]]  # by pass, then by padded head dimension


def _but(table: _Table, **changes: dict[int, Tiles]) -> _Table:
    """Return the table with some of its rows changed."""
    return table | {phase: table[phase] | rows for phase, rows in changes.items()}


# All were chosen by compiling: no spills, no serialised products, two programs for each
# multiprocessor if registers allow it. tests/kernels/compiled_kernels.csv has the figures.
_HOPPER: _Table = {
    "forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 128, 8, 2), 256: Tiles(64, 64, 8, 2)},
    "backward_keys": {
        64: Tiles(64, 128, 8, 2),
        128: Tiles(32, 128, 8, 2),
        256: Tiles(64, 32, 8, 1),
    },
    "backward_queries": {
        64: Tiles(128, 64, 8, 2),
        128: Tiles(128, 64, 8, 2),
        256: Tiles(64, 32, 8, 2),
    },
}
# Compute capability 8.0 also holds the operands of products in registers.
_AMPERE = _but(
    _HOPPER,
    forward={128: Tiles(128, 64, 8, 2)},
    backward_keys={64: Tiles(32, 128, 8, 2), 128: Tiles(32, 64, 8, 2), 256: Tiles(16, 32, 8, 2)},
    backward_queries={128: Tiles(128, 32, 8, 2)},
)
_BLACKWELL = _but(_HOPPER, backward_keys={256: Tiles(32, 32, 8, 1)})
_LARGE = {8: _AMPERE, 9: _HOPPER, 10: _BLACKWELL}  # by the major number of the compute capability
# The masks of documents take registers.
_BESIDE_DOCUMENTS: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 3)},
    "backward_keys": {128: Tiles(64, 32, 8, 2)},
}
_DOCUMENTS = {
    8: _but(_AMPERE, forward={64: Tiles(128, 64, 8, 3), 128: Tiles(64, 64, 8, 2)}),
    9: _but(_HOPPER, **_BESIDE_DOCUMENTS),
    10: _but(_BLACKWELL, **_BESIDE_DOCUMENTS),
}
# So do soft caps, and windows at some head dimensions.
_SOFTCAP = {
    generation: _but(table, forward={256: Tiles(64, 32, 8, 2)})
    for generation, table in _DOCUMENTS.items()
}
_BESIDE_WINDOW = {128: Tiles(128, 64, 8, 3), 256: Tiles(64, 32, 8, 2)}
_WINDOW = {
    8: _but(_AMPERE, forward={128: Tiles(64, 64, 8, 2), 256: Tiles(64, 32, 8, 2)}),
    9: _but(_HOPPER, forward=_BESIDE_WINDOW),
    10: _but(
        _BLACKWELL,
        forward=_BESIDE_WINDOW,
        backward_queries={64: Tiles(128, 32, 8, 2), 256: Tiles(32, 32, 8, 2)},
    ),
}
# Dropout's random numbers need registers. GPUs with less than 160 KiB of shared memory for each
# multiprocessor (compute capability 8.6, 8.9, 12.x) hold only small blocks.
_SMALL: _Table = {
    "forward": {64: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 256: Tiles(64, 32, 8, 1)},
    "backward_keys": {64: Tiles(32, 64, 8, 2), 128: Tiles(32, 32, 8, 1), 256: Tiles(32, 16, 8, 1)},
    "backward_queries": {
        64: Tiles(64, 32, 8, 1),
        128: Tiles(64, 32, 8, 1),
        256: Tiles(32, 32, 8, 1),
    },
}
# With dropout and documents or a soft cap, ptxas serialises Hopper's products if loads run ahead.
_SMALL_IN_TURN = _but(
    _SMALL,
    forward={64: Tiles(64, 32, 4, 1), 128: Tiles(64, 32, 8, 1)},
    backward_keys={64: Tiles(32, 64, 8, 1)},
)
# fp32 products run on the CUDA cores, with both operands in registers.
_FP32: _Table = {
    "forward": {64: Tiles(32, 32, 4, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 32, 8, 1)},
    "backward_keys": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    "backward_queries": {
        64: Tiles(32, 16, 8, 1),
        128: Tiles(32, 16, 8, 1),
        256: Tiles(16, 16, 8, 1),
    },
}
_SMALL_SHARED_MEMORY_BYTES = 160 * 1024
_INTERPRETED = {
    "forward": Tiles(32, 16, 4, 1),
    "backward_keys": Tiles(16, 32, 4, 1),
    "backward_queries": Tiles(32, 16, 4, 1),
}


def padded(head_dim: int) -> int:
    """Return the power of two that holds a head; matrix products need at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tiles_for(
    phase: str,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dropout: bool,
    documents: bool,
    window: bool,
    softcap: bool,
) -> Tiles:
    """Return the block sizes of one pass on a device.

    ``phase`` is forward, backward_keys or backward_queries.
    """
    if INTERPRETED:
        return _INTERPRETED[phase]
    generation, shared_memory_bytes = _gpu(device)
    small = dropout or shared_memory_bytes < _SMALL_SHARED_MEMORY_BYTES
    return choose_tiles(
        phase,
        head_dim,
        generation=generation,
        fp32=dtype == torch.float32,
        small=small,
        documents=documents,
        window=window,
        softcap=softcap,
    )


def choose_tiles(
    phase: str,
    head_dim: int,
    *,
    generation: int,
    fp32: bool,
    small: bool,
    documents: bool,
    window: bool,
    softcap: bool,
) -> Tiles:
    """Return the row of the tables above.

    ``generation`` is the major number of the compute capability.
    """
    if fp32:
        table = _FP32
    elif small:
        table = _SMALL_IN_TURN if documents or softcap else _SMALL
    else:
        tables = _SOFTCAP if softcap else _DOCUMENTS if documents else _WINDOW if window else _LARGE
        table = tables[min(generation, max(tables))]
    return table[phase][max(64, padded(head_dim))]


@cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Return the major number of the compute capability, and a program's shared memory in bytes."""
    # Any: torch's stub lacks the shared memory.
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.major), int(properties.shared_memory_per_block_optin)
