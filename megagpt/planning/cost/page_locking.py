"""Host memory that page-locking takes beyond the tensors that are page-locked.

DeepSpeed 0.19.8 page-locks buffers of an offload unless `pin_memory` is false, and some always.
torch's allocator of page-locked memory rounds each block up to a power of two and keeps it when its
tensor is freed. DeepSpeed's own (DS_PIN_MEMORY_BACKEND=native) rounds up to pages and frees. Read
in the sources, not measured: no GPU has run this. Line numbers refer to DeepSpeed's `runtime/`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megagpt.planning.cost.model_states import (
    FP32_BYTES,
    OPTIMIZER_BUFFER_COUNT,
    PARAMETER_BUFFER_COUNT,
    PARAMETER_BUFFER_SIZE,
    Bytes,
    Shard,
    pinned_block,
)
from megagpt.schema.arithmetic import round_up

PAGE_BYTES = 4096


def page_locking(shard: Shard) -> Bytes:
    """Return the bytes that rounding adds to page-locked blocks, and the blocks kept unused.

    0 without a GPU, where nothing is page-locked.
    """
    pins = shard.layout.pins
    if pins == "nobody":
        return Bytes()
    if pins == "native":
        return Bytes(host=sum(round_up(size, PAGE_BYTES) - size for size in locked_blocks(shard)))
    rounding = sum(pinned_block(size) - size for size in locked_blocks(shard))
    return Bytes(host=rounding + sum(map(pinned_block, _freed_blocks(shard))))


def locked_blocks(shard: Shard) -> Iterator[int]:
    """Yield the bytes of each page-locked tensor that a run keeps."""
    if shard.stage == 3:
        yield from _of_parameters(shard)
    if shard.layout.zero.optimizer_device != "none":
        yield from _of_optimizer(shard) if shard.stage == 3 else _of_zero12(shard)


def _of_zero12(shard: Shard) -> Iterator[int]:
    """Yield the blocks of an offloaded optimizer at ZeRO 1 and 2.

    For each optimizer group fp32 weights, a 16-bit copy and fp32 gradients (stage_1_and_2.py:565,
    572, 940), a transfer buffer (657), and with micro-batches to add the gradients of whole
    parameters (1825).
    """
    layout = shard.layout
    assert layout.zero.offload_optimizer is not None
    if not layout.zero.offload_optimizer.pin_memory:
        return
    element = layout.element_bytes
    for numel in shard.group_partitions:
        yield from (FP32_BYTES * numel, element * numel, FP32_BYTES * numel)
    yield element * max(parameter.numel for parameter in shard.trained)
    accumulates = layout.micro_batches > 1 and not layout.reduces_per_step
    if shard.stage == 2 and accumulates and not shard.accumulates_compactly:
        yield from (element * numel for numel in shard.touched_parameters())


def _of_optimizer(shard: Shard) -> Iterator[int]:
    """Yield the blocks of an offloaded optimizer at ZeRO 3.

    The gradients of the partition and the fp32 gradients of each tile (stage3.py:795, 1340), and
    the buffers of NVMe, always (swap_tensor/utils.py, `SwapBufferManager`).
    """
    layout = shard.layout
    offload = layout.zero.offload_optimizer
    assert offload is not None
    if offload.pin_memory:
        yield layout.accumulation_bytes * shard.partition
    if offload.device == "nvme":
        count = offload.buffer_count or OPTIMIZER_BUFFER_COUNT
        yield from [FP32_BYTES * max(shard.tiles)] * count
    elif offload.pin_memory:
        yield from (FP32_BYTES * tile for tile in shard.tiles)


def _of_parameters(shard: Shard) -> Iterator[int]:
    """Yield the blocks of offloaded parameters: a flat one for each group, always (stage3.py:906).

    Frozen ones keep a block each (zero/partition_parameters.py:1843).

    NVMe has one block of I/O buffers (swap_tensor/partitioned_param_swapper.py).
    """
    offload = shard.layout.zero.offload_param
    if offload is None or offload.device == "none":
        return
    element = shard.layout.element_bytes
    if offload.device == "cpu":
        for decayed in (True, False):
            members = zip(shard.trained, shard.partitions, strict=True)
            yield element * sum(numel for one, numel in members if one.decayed == decayed)
        if offload.pin_memory:
            yield from (element * numel for numel in shard.frozen_partitions)
    else:
        count = offload.buffer_count or PARAMETER_BUFFER_COUNT
        yield element * count * (offload.buffer_size or PARAMETER_BUFFER_SIZE)


def _freed_blocks(shard: Shard) -> Iterator[int]:
    """Yield the bytes of page-locked tensors that a start frees and torch keeps.

    Each parameter's partition is page-locked alone (zero/partition_parameters.py:1843) before it
    moves into the flat block.
    """
    offload = shard.layout.zero.offload_param
    if shard.stage == 3 and offload is not None and offload.device == "cpu" and offload.pin_memory:
        yield from (shard.layout.element_bytes * numel for numel in shard.partitions)
