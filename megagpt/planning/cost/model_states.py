"""Bytes of parameters, gradients, master weights and Adam's moments on a rank, and where they are.

The ZeRO paper counts 16 bytes a parameter (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1:
2 weights, 2 gradients, 12 optimizer). This module counts what DeepSpeed 0.19.8 allocates, with its
padding and copies.

In the formulas, n is the number of trained elements of a rank's stages on its tensor shard, f that
of frozen ones (the base of adapters; else 0), D the number of ranks on the data axis, e the bytes
of an element (2 in 16 bit, 4 in fp32), a those of an accumulated gradient.
`tests/planning/test_memory.py` counts the live tensors. Line numbers refer to DeepSpeed's
`runtime/`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megagpt.planning.layout import Layout
from megagpt.planning.parameters import (
    Parameter,
    frozen_of_rank,
    groups_of_rank,
    parameters_of_rank,
    partitions_of_rank,
)
from megagpt.schema.arithmetic import round_up
from megagpt.utils import MIB

FP32_BYTES = 4
PERSISTENCE_THRESHOLD = 100_000  # elements; defaults of zero/config.py and zero/offload_config.py
SUB_GROUP_SIZE = 1_000_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000
OPTIMIZER_BUFFER_COUNT = 4
PARAMETER_BUFFER_COUNT = 5
PARAMETER_BUFFER_SIZE = 100_000_000
MAX_IN_CPU = 1_000_000_000
LEAST_SWAPPED_BYTES = MIB  # smaller pieces stay in host memory (swap_tensor/utils.py:14)
# elements; partitions of 16-bit numbers begin at multiples of 4 bytes (stage_1_and_2.py:403)
ALIGNMENT = 2


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank in device memory, in host memory and on NVMe; `+` adds them."""

    device: float = 0
    host: float = 0
    nvme: float = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.device + other.device, self.host + other.host, self.nvme + other.nvme)


def reuse_distance(layout: Layout) -> int:
    """Return the elements within which ZeRO 3 keeps a parameter whole for its next use.

    0 with parameters on NVMe (compat.py, `read_when_needed`).
    """
    given = layout.zero.stage3_max_reuse_distance
    if layout.zero.parameter_device == "nvme":
        return 0
    return MAX_REUSE_DISTANCE if given is None else given


def placed(size: float, place: str) -> Bytes:
    """Return `size` bytes at `none` (the device), `cpu` or `nvme`, as in the configuration."""
    return Bytes(
        size if place == "none" else 0,
        size if place == "cpu" else 0,
        size if place == "nvme" else 0,
    )


@dataclass(frozen=True)
class ModelStates:
    """Bytes of each kind of state.

    Gradients have two lines, of which one at a time is in use: `accumulating` from the first
    backward of a step to the reduction, `reduced` from there to the update.
    """

    parameters: Bytes
    persistent_parameters: Bytes
    accumulating_gradients: Bytes
    reduced_gradients: Bytes
    master_weights: Bytes
    moments: Bytes
    offload_buffers: Bytes
    snapshot: Bytes


def model_states(layout: Layout, pipeline_rank: int, data_rank: int = 0) -> ModelStates:
    """Return the states of one rank.

    They are equal on all tensor ranks and, except for the gradients of ZeRO 1 and 2, on all
    data ranks.
    """
    shard = shard_of(layout, pipeline_rank, data_rank)
    return ModelStates(
        parameters=parameters(shard),
        persistent_parameters=persistent_parameters(shard),
        accumulating_gradients=accumulating_gradients(shard),
        reduced_gradients=reduced_gradients(shard),
        master_weights=master_weights(shard),
        moments=moments(shard),
        offload_buffers=offload_buffers(shard),
        snapshot=snapshot(shard),
    )


def shard_of(layout: Layout, pipeline_rank: int, data_rank: int = 0) -> Shard:
    """Return the elements of a rank's stages."""
    return Shard(layout, pipeline_rank, parameters_of_rank(layout, pipeline_rank), data_rank)


@dataclass(frozen=True)
class Shard:
    """The elements that the formulas use, for one rank."""

    layout: Layout
    pipeline_rank: int
    parameters: tuple[Parameter, ...]
    data_rank: int

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.layout.zero.stage

    @cached_property
    def elements(self) -> int:
        """The elements of the rank's stages on its tensor shard, n + f."""
        return self.trained_elements + frozen_of_rank(self.layout, self.pipeline_rank)

    @property
    def trained_elements(self) -> int:
        """The elements of the trained parameters, n."""
        return sum(self.groups)

    @cached_property
    def trained(self) -> tuple[Parameter, ...]:
        """The parameters that have gradients, master weights and moments."""
        if self.layout.lora is None:
            return self.parameters
        return tuple(parameter for parameter in self.parameters if parameter.trained)

    @cached_property
    def frozen_partitions(self) -> list[int]:
        """ZeRO 3: the partitions of the frozen parameters, cut like the others."""
        frozen = (parameter for parameter in self.parameters if not parameter.trained)
        return [-(-parameter.numel // self.layout.data) for parameter in frozen]

    @cached_property
    def groups(self) -> tuple[int, int]:
        """The elements of each optimizer group."""
        return groups_of_rank(self.layout, self.pipeline_rank)

    @cached_property
    def group_partitions(self) -> list[int]:
        """ZeRO 1 and 2: elements of a rank's partition of each optimizer group.

        A group is one flat buffer, padded to a multiple of 2 D and cut into D parts.
        """
        unit = ALIGNMENT * self.layout.data
        return [round_up(numel, unit) // self.layout.data for numel in self.groups]

    @property
    def padded(self) -> int:
        """ZeRO 1 and 2: the elements of the flat buffers."""
        return self.layout.data * sum(self.group_partitions)

    @cached_property
    def partitions(self) -> tuple[int, ...]:
        """ZeRO 3: each trained parameter is cut into D parts of ceil(numel / D) elements."""
        return partitions_of_rank(self.layout, self.pipeline_rank)

    @cached_property
    def partition(self) -> int:
        """Elements whose master weights and moments this rank keeps."""
        if self.stage == 0:
            return self.trained_elements
        return sum(self.partitions) if self.stage == 3 else self.padded // self.layout.data

    @property
    def touched(self) -> int:
        """ZeRO 1 and 2: elements of all parameters that overlap this rank's partitions.

        The rank keeps the gradients of these parameters whole.
        """
        return self.touched_by_rank[self.data_rank]

    @cached_property
    def touched_by_rank(self) -> list[int]:
        """ZeRO 1 and 2: `touched` of every data rank."""
        held = [0] * self.layout.data
        for decayed, size in zip((True, False), self.group_partitions, strict=True):
            start = 0
            for parameter in self.trained:
                if parameter.decayed != decayed or not size:
                    continue
                end = start + parameter.numel
                for rank in range(start // size, -(-end // size)):
                    held[rank] += parameter.numel
                start = end
        return held

    def touched_parameters(self) -> list[int]:
        """Return the elements of each parameter that `touched` counts."""
        sizes = []
        for decayed, size in zip((True, False), self.group_partitions, strict=True):
            start = 0
            first, last = self.data_rank * size, (self.data_rank + 1) * size
            for parameter in self.trained:
                if parameter.decayed == decayed:
                    end = start + parameter.numel
                    if start < last and end > first:
                        sizes.append(parameter.numel)
                    start = end
        return sizes

    @property
    def padding(self) -> int:
        """ZeRO 1 and 2: padding elements in this rank's partitions."""
        return self.padding_of(self.data_rank)

    def padding_of(self, data_rank: int) -> int:
        """Return the padding elements in a data rank's partitions at ZeRO 1 and 2."""
        empty = 0
        for numel, size in zip(self.groups, self.group_partitions, strict=True):
            empty += min(size, max(0, (data_rank + 1) * size - numel))
        return empty

    @cached_property
    def tiles(self) -> list[int]:
        """ZeRO 3: partitioned elements of each sub-group, the optimizer's unit (stage3.py:1210)."""
        limit = _given(self.layout.zero.sub_group_size, SUB_GROUP_SIZE)
        tiles: list[int] = []
        for decayed in (True, False):
            members = zip(self.trained, self.partitions, strict=True)
            tiles += _tiles(
                [numel for parameter, numel in members if parameter.decayed == decayed], limit
            )
        return tiles

    @cached_property
    def persistent(self) -> int:
        """ZeRO 3: elements of the parameters that stay whole because they are small.

        Each counts D x ceil(numel / D) elements, as gathered
        (zero/parameter_offload.py:317).
        """
        zero = self.layout.zero
        total = 0
        threshold = _given(zero.stage3_param_persistence_threshold, PERSISTENCE_THRESHOLD)
        bound = _given(zero.stage3_model_persistence_threshold, sys.maxsize)
        gathered = 0
        for parameter in self.parameters:
            if parameter.numel <= threshold and parameter.numel + total <= bound:
                total += parameter.numel
                gathered += round_up(parameter.numel, self.layout.data)
        return gathered

    @property
    def accumulates_compactly(self) -> bool:
        """ZeRO 1 and 2: gradients accumulate in one flat partition (stage_1_and_2.py:1259).

        This is so if a 16-bit model accumulates in fp32.
        """
        return self.layout.accumulation_bytes != self.layout.element_bytes


def tile_counts(layout: Layout) -> list[int]:
    """Return the number of optimizer tiles of each pipeline rank at ZeRO 3; empty below ZeRO 3."""
    if layout.zero.stage < 3:
        return []
    return [len(shard_of(layout, rank).tiles) for rank in range(layout.pipeline)]


def fewest_elements_of_one_tile(layout: Layout) -> int:
    """Return the smallest `sub_group_size` that gives every pipeline rank one tile a group."""
    return max(sum(shard_of(layout, rank).partitions) for rank in range(layout.pipeline))


def _tiles(partitions: Sequence[int], limit: int) -> list[int]:
    tiles = []
    current = 0
    for index, numel in enumerate(partitions):
        current += numel
        if current >= limit or index == len(partitions) - 1:
            tiles.append(current)
            current = 0
    return tiles


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def parameters(shard: Shard) -> Bytes:
    """Return the bytes of the parameters.

    ZeRO 0: e (n + f). ZeRO 1, 2: e f, and e round_up(n, 2 D) for each group. ZeRO 3: e sum(ceil(
    numel / D)), on the device, in host memory, or on NVMe. With NVMe, pieces below 1 MiB stay in
    host memory, and `max_in_cpu` trained elements.
    """
    size = shard.layout.element_bytes
    if shard.stage < 3:
        trained = shard.trained_elements if shard.stage == 0 else shard.padded
        return Bytes(device=size * (shard.elements - shard.trained_elements + trained))
    place = shard.layout.zero.parameter_device
    held = shard.partition + sum(shard.frozen_partitions)
    if place != "nvme":
        return placed(size * held, place)
    small = sum(numel for numel in shard.partitions if size * numel < LEAST_SWAPPED_BYTES)
    assert shard.layout.zero.offload_param is not None
    kept = max(
        small, min(shard.partition, _given(shard.layout.zero.offload_param.max_in_cpu, MAX_IN_CPU))
    )
    kept += sum(n for n in shard.frozen_partitions if size * n < LEAST_SWAPPED_BYTES)
    return Bytes(host=size * kept, nvme=size * (held - kept))


def persistent_parameters(shard: Shard) -> Bytes:
    """Return the bytes of small parameters that ZeRO 3 keeps whole beside their partitions.

    These are parameters of at most `stage3_param_persistence_threshold` elements. 0 if the
    partition is the whole parameter and on the device.
    """
    alone = shard.layout.data == 1 and shard.layout.zero.parameter_device == "none"
    return Bytes(
        device=shard.layout.element_bytes * shard.persistent
        if shard.stage == 3 and not alone
        else 0
    )


def accumulating_gradients(shard: Shard) -> Bytes:
    """Return the bytes of gradients until the reduction.

    ZeRO 0, ZeRO 1, and any stage with `per_step`: e n, whole. ZeRO 2: e times the parameters
    that overlap this rank's partition, or an fp32 partition. ZeRO 3: always its partition a
    sum(ceil(numel / D)).

    Offload of the optimizer moves the partitions of ZeRO 2 and 3 to host memory.
    """
    layout = shard.layout
    share = _gradient_partition(shard)
    if shard.stage <= 1 or layout.reduces_per_step:
        local = layout.accumulation_bytes if shard.stage == 1 else layout.element_bytes
        whole = Bytes(device=local * shard.trained_elements)
        return whole + (share if shard.stage == 3 else Bytes())
    if shard.stage == 2 and not shard.accumulates_compactly:
        more = layout.micro_batches > 1 or layout.zero.optimizer_device == "none"
        return placed(
            layout.element_bytes * shard.touched if more else 0, layout.zero.optimizer_device
        )
    return share


def reduced_gradients(shard: Shard) -> Bytes:
    """Return the bytes of gradients from the reduction to the update.

    ZeRO 0: e n. ZeRO 1, 2: e times the parameters that overlap this rank's partition, with its
    padding, or an fp32 partition. ZeRO 3: the partition. With offload at ZeRO 1 and 2 they are
    in the fp32 buffers of `offload_buffers`.
    """
    layout = shard.layout
    if shard.stage == 0:
        return Bytes(device=layout.element_bytes * shard.trained_elements)
    if shard.stage == 3 or shard.accumulates_compactly:
        return _gradient_partition(shard)
    if layout.zero.optimizer_device != "none":
        left = layout.micro_batches > 1 and shard.stage == 2 and not layout.reduces_per_step
        return Bytes(host=layout.element_bytes * shard.touched if left else 0)
    return Bytes(device=layout.element_bytes * (shard.touched + shard.padding))


def _gradient_partition(shard: Shard) -> Bytes:
    """Return a times the elements that this rank updates.

    At ZeRO 3 they are in host memory if the optimizer is offloaded.
    """
    size = shard.layout.accumulation_bytes * shard.partition
    in_host = shard.stage == 3 and shard.layout.zero.optimizer_device != "none"
    return Bytes(host=size) if in_host else Bytes(device=size)


def master_weights(shard: Shard) -> Bytes:
    """Return 4 bytes for each element that this rank updates, also in fp32 runs.

    0 at ZeRO 0, where the parameters themselves are the masters. NVMe takes tiles of at least 1
    MiB.
    """
    return Bytes() if shard.stage == 0 else _optimizer_bytes(shard, FP32_BYTES)


def moments(shard: Shard) -> Bytes:
    """Return the bytes of Adam's two moments: 8 for each element that this rank updates.

    They are where the master weights are.
    """
    return _optimizer_bytes(shard, 2 * FP32_BYTES)


def _optimizer_bytes(shard: Shard, size: int) -> Bytes:
    place = shard.layout.zero.optimizer_device
    if place != "nvme":
        return placed(size * shard.partition, place)
    swapped = sum(tile for tile in shard.tiles if _is_swapped(tile))
    return Bytes(host=size * (shard.partition - swapped), nvme=size * swapped)


def offload_buffers(shard: Shard) -> Bytes:
    """Return the bytes that offload needs in addition to the states.

    fp32 gradients for the CPU's Adam, copies in the model's type, buffers of disk I/O.
    """
    zero = shard.layout.zero
    total = Bytes()
    if zero.optimizer_device != "none":
        total += _fp32_gradients(shard)
        total += (
            _nvme_optimizer_buffers(shard)
            if zero.optimizer_device == "nvme"
            else _zero12_buffers(shard)
        )
    if zero.offload_param is not None and zero.parameter_device == "nvme":
        count = _given(zero.offload_param.buffer_count, PARAMETER_BUFFER_COUNT)
        size = _given(zero.offload_param.buffer_size, PARAMETER_BUFFER_SIZE)
        total += Bytes(host=shard.layout.element_bytes * count * size)
    return total


def _fp32_gradients(shard: Shard) -> Bytes:
    """Return 4 bytes for each element that this rank updates.

    With NVMe, the pieces of at least 1 MiB are on the disk, if a tile is.
    """
    total = FP32_BYTES * shard.partition
    if shard.layout.zero.optimizer_device != "nvme" or not any(map(_is_swapped, shard.tiles)):
        return Bytes(host=total)
    swapped = sum(FP32_BYTES * numel for numel in shard.partitions if _is_swapped(numel))
    return Bytes(host=total - swapped, nvme=swapped)


def _is_swapped(numel: int) -> bool:
    return FP32_BYTES * numel >= LEAST_SWAPPED_BYTES


def _zero12_buffers(shard: Shard) -> Bytes:
    """Return the transfer buffers of ZeRO 1 and 2 (stage_1_and_2.py:540, 657).

    e times the partition in host memory for the way back, and e times the largest parameter on
    both sides of the bus.
    """
    if shard.stage == 3:
        return Bytes()
    size = shard.layout.element_bytes
    largest = size * max(parameter.numel for parameter in shard.trained)
    return Bytes(device=largest, host=largest + size * shard.partition)


def _nvme_optimizer_buffers(shard: Shard) -> Bytes:
    """Return the pinned buffers of NVMe offload (swap_tensor/optimizer_utils.py:184).

    `buffer_count` x 4 bytes x the largest tile.
    """
    assert shard.layout.zero.offload_optimizer is not None
    count = _given(shard.layout.zero.offload_optimizer.buffer_count, OPTIMIZER_BUFFER_COUNT)
    return Bytes(host=FP32_BYTES * count * max(shard.tiles))


def snapshot(shard: Shard) -> Bytes:
    """Return the host memory of a save in the background (checkpoint/writer.py).

    It keeps master weights and two moments, 4 bytes an element each. What is copied from a GPU
    is pinned, a block for each run of elements: see `pinned_block`.
    """
    if not shard.layout.saves_in_background:
        return Bytes()
    pinned = shard.layout.pins != "nobody" and shard.layout.zero.optimizer_device == "none"
    sizes = [FP32_BYTES * numel for numel in _saved_runs(shard)]
    return Bytes(host=3 * sum(pinned_block(size) if pinned else size for size in sizes))


def _saved_runs(shard: Shard) -> Sequence[int]:
    """Return the elements of each flat run of optimizer state (compat.py, `buckets`).

    At ZeRO 0, data ranks take turns at the parameters.
    """
    if shard.stage == 3:
        return shard.tiles
    if shard.stage > 0:
        return shard.group_partitions
    in_groups = sorted(shard.trained, key=lambda parameter: not parameter.decayed)
    return [parameter.numel for parameter in in_groups[shard.data_rank :: shard.layout.data]]


def pinned_block(size: int) -> int:
    """Return the bytes that torch pins for a tensor of `size` bytes: the next power of two.

    aten/src/ATen/core/CachingHostAllocator.h, `PowerOf2Ceil`; pytorch issues 95823 and 150517. From
    torch 2.13 on, PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:N leaves larger blocks exact.
    """
    return 1 << (size - 1).bit_length() if size else 0
