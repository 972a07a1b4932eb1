"""What page-locking adds to host memory: rounding by the allocator, block by block."""

from dataclasses import replace

import pytest
import torch

from megagpt.planning.cost.memory import rank_memory
from megagpt.planning.cost.model_states import (
    Bytes,
    model_states,
    pinned_block,
    shard_of,
    snapshot,
)
from megagpt.planning.cost.page_locking import locked_blocks, page_locking
from tests.planning.test_memory import layout_of, run_on


def test_what_is_copied_from_a_gpu_is_pinned_in_powers_of_two() -> None:
    """The issues' sizes: 1.1 GiB takes 2 GiB, 20.4 GiB takes 32 GiB (sgl-project/sglang#36562), a
    power of two takes itself.
    """
    sizes = (0, 1, 4096, 4097, 11 * 2**30 // 10, 204 * 2**30 // 10)
    assert [*map(pinned_block, sizes)] == [0, 1, 4096, 8192, 2**31, 2**35]
    on_cpu = layout_of(run_on((1, 2, 1), 1), 2)
    shard = shard_of(replace(on_cpu, pins="torch"), 0)
    exact = [4 * numel for numel in shard.group_partitions]
    assert snapshot(shard).host == 3 * sum(map(pinned_block, exact)) > 3 * sum(exact)
    assert snapshot(shard_of(on_cpu, 0)).host == 3 * sum(exact)
    in_host = layout_of(run_on((1, 2, 1), 1, optimizer="cpu"), 2)
    on_gpu = replace(in_host, pins="torch")
    assert snapshot(shard_of(in_host, 0)) == snapshot(shard_of(on_gpu, 0))
    blocking = run_on((1, 2, 1), 1)
    blocking["megagpt"]["checkpoint"] = {"asynchronous": False}
    assert snapshot(shard_of(layout_of(blocking, 2), 0)).host == 0


PLACES = [(1, "cpu", "none"), (2, "cpu", "none"), (3, "cpu", "none"), (3, "cpu", "cpu")]


@pytest.mark.parametrize(("stage", "optimizer", "parameters"), PLACES)
def test_page_locking_is_counted_block_by_block(
    stage: int, optimizer: str, parameters: str
) -> None:
    """By hand from DeepSpeed's source: what each stage page-locks, rounded; nothing on a CPU."""
    config = run_on((1, 2, 1), stage, optimizer=optimizer, parameters=parameters)
    layout = layout_of(config, 2)
    on_gpu = replace(layout, pins="torch")
    shard = shard_of(on_gpu, 0)
    blocks = list(locked_blocks(shard))
    if stage < 3:
        for numel in shard.group_partitions:
            assert {4 * numel, 2 * numel} <= set(blocks)
        held = model_states(layout, 0)
        assert sum(blocks[:6]) == held.master_weights.host + 6 * shard.partition
    else:
        assert {2 * shard.partition, 4 * max(shard.tiles)} <= set(blocks)
        assert (len(blocks) == len(shard.tiles) + 1) is (parameters == "none")
    more = page_locking(shard).host
    rounding = sum(pinned_block(size) - size for size in blocks)
    freed = sum(pinned_block(2 * numel) for numel in shard.partitions)
    assert more == rounding + (freed if parameters == "cpu" else 0) > 0
    assert rank_memory(on_gpu, 0).peak.host == rank_memory(layout, 0).peak.host + more
    assert page_locking(shard_of(layout, 0)) == Bytes()
    in_pages = page_locking(shard_of(replace(layout, pins="native"), 0)).host
    assert 0 < in_pages <= 4096 * len(blocks)


def test_pageable_offload_locks_what_deepspeed_always_locks() -> None:
    config = run_on((1, 2, 1), 3, optimizer="cpu", parameters="cpu")
    for section in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][section]["pin_memory"] = False
    shard = shard_of(replace(layout_of(config, 2), pins="torch"), 0)
    assert len(list(locked_blocks(shard))) == 2  # a flat block of parameters for each group


@pytest.mark.gpu
def test_torch_page_locks_what_the_formula_says() -> None:
    """By the statistics of torch's allocator of page-locked memory."""
    sizes = [1, 4097, 3 * 2**20, 33 * 2**20 + 5]
    torch.cuda.init()
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
    after = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    assert after - before == sum(map(pinned_block, sizes))
    assert all(tensor.is_pinned() for tensor in held)
