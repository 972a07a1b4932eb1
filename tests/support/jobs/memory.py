"""What the ranks of a pool do to count, in bytes, the tensors that they hold."""

import ctypes
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megagpt.checkpoint.writer import Snapshot
from megagpt.parallel import compat, pipeline
from megagpt.parallel.engine import Engine
from tests.support.configurations import tiny
from tests.support.jobs.training import build, destroy, micro_batches


def held_states(config: dict[str, Any]) -> dict[str, Any]:
    """Train a step, then count each kind of state; gradients on the way, before and after their
    reduction.
    """
    engine = build(config)
    try:
        with most_under_way(engine) as under_way:
            pipeline.train_step(
                engine, micro_batches(engine, 0)
            )  # Adam makes its moments at the first update
        accumulating = gradients_while_accumulating(engine)
        reduced = gradients_after_reduction(engine)
        engine.deepspeed.step()
        return {
            "place": (engine.mesh.pipeline_rank, engine.mesh.data_rank),
            "accumulating_gradients": accumulating,
            "reduced_gradients": reduced,
            "snapshot": storage_bytes(
                copy for flats in Snapshot().take(engine) for copy in flats.values()
            ),
            "pipeline_buffers": (
                max(under_way, default=0),
                storage_bytes(pipeline_buffers(engine)),
            ),
            **states(engine),
        }
    finally:
        destroy(engine)


def gradients_while_accumulating(engine: Engine) -> int:
    """Bytes at the end of the backwards, where the reduction comes once a step, else after the
    first micro-batch.
    """
    step = micro_batches(engine, 1)
    if engine.config.megagpt.parallel.gradient_reduction == "per_step" and engine.zero_stage > 0:
        return seen_before_the_reduction(engine, step)
    if engine.num_stages > 1:
        return 0  # every micro-batch is reduced at once: see gradients_after_reduction
    engine.deepspeed.backward(engine.deepspeed(step[0].tokens, targets=step[0].targets))
    seen = storage_bytes(gradients(engine))
    for micro_batch in step[1:]:
        engine.deepspeed.step()
        engine.deepspeed.backward(engine.deepspeed(micro_batch.tokens, targets=micro_batch.targets))
    engine.deepspeed.step()
    return seen


def seen_before_the_reduction(engine: Engine, step: list[pipeline.MicroBatch]) -> int:
    """Bytes of gradients when DeepSpeed is about to flush what a whole step put off."""
    name = (
        "_flush_coalesced_reduction_zero3"
        if engine.zero_stage == 3
        else "_flush_coalesced_reduction_zero12"
    )
    flush, seen = getattr(engine.deepspeed, name), []

    def count_and_flush(optimizer: Any) -> None:
        seen.append(storage_bytes(gradients(engine)))
        flush(optimizer)

    setattr(engine.deepspeed, name, count_and_flush)
    try:
        pipeline.train_step(engine, step)
    finally:
        delattr(engine.deepspeed, name)
    (found,) = seen
    return found


def gradients_after_reduction(engine: Engine) -> int:
    """Bytes of gradients between the last backward of a step and the update."""
    pipeline.accumulate(engine, micro_batches(engine, 2))
    return storage_bytes(gradients(engine))


def gradients(engine: Engine) -> Iterator[Tensor]:
    """Every gradient that is alive, wherever DeepSpeed keeps it."""
    zero = engine.deepspeed.optimizer
    for parameter in engine.names:
        yield from (
            g for g in (parameter.grad, getattr(parameter, "grad_accum", None)) if g is not None
        )
    for attribute in ("averaged_gradients", "all_grad_tensors"):
        for group in getattr(zero, attribute, {}).values():
            yield from group or []
    yield from getattr(zero, "accumulated_grads_in_cpu", {}).values()
    if engine.zero_stage == 3:
        yield zero.grad_partitions_flat_buffer


def pipeline_buffers(engine: Engine) -> Iterator[Tensor]:
    """What torch's pipelining has allocated to receive hidden states and gradients."""
    for schedule in engine.schedules.values():
        for stage in schedule.stages:
            for received in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
                buffers = (getattr(info, "buffer", None) for info in received)
                yield from (buffer for buffer in buffers if is_real(buffer))


def is_real(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.device.type != "meta"


@contextmanager
def most_under_way(engine: Engine) -> Iterator[list[int]]:
    """Appends the bytes of all receive buffers whenever some are allocated."""
    seen: list[int] = []
    hold = compat.EngineStage._hold

    def holding(stage: compat.EngineStage, received: Any) -> None:
        hold(stage, received)
        seen.append(storage_bytes(pipeline_buffers(engine)))

    with patch.object(compat.EngineStage, "_hold", holding):
        yield seen


def states(engine: Engine) -> dict[str, int]:
    """Bytes of the other states after an update."""
    parameters, masters = list(engine.names), master_weights(engine)
    whole = [p for p in parameters if engine.zero_stage < 3 or p.ds_persist]
    adam = compat.base_optimizer(engine.deepspeed).state.values()
    return {
        "parameters": storage_bytes(
            [p.ds_tensor for p in parameters] if engine.zero_stage == 3 else whole
        ),
        "persistent_parameters": storage_bytes(whole) if engine.zero_stage == 3 else 0,
        "master_weights": storage_bytes(masters),
        "moments": storage_bytes(state[moment] for state in adam for moment in compat.MOMENTS),
        "offload_buffers": storage_bytes(
            [*offload_buffers(engine), *(m.grad for m in masters if m.grad is not None)]
        ),
    }


def offload_buffers(engine: Engine) -> Iterator[Tensor]:
    """ZeRO 1 and 2's, on both sides of the bus."""
    zero = engine.deepspeed.optimizer
    yield from getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", [])
    for side in ("cpu", "gpu"):
        if (buffer := getattr(zero, f"temp_grad_buffer_for_{side}_offload", None)) is not None:
            yield buffer


def master_weights(engine: Engine) -> list[Tensor]:
    """The fp32 weights that Adam updates, where they are tensors of their own."""
    zero = engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        return []
    return (
        zero.fp32_partitioned_groups_flat
        if engine.zero_stage == 3
        else zero.single_partition_of_fp32_groups
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind the tensors, each byte once: views share their storage."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors
    }
    return sum(storages.values())


def swapped_bytes_after_a_step(config: dict[str, Any]) -> int:
    """Train a step; the bytes of the swap files of all ranks."""
    engine = build(config)
    try:
        pipeline.train_step(engine, micro_batches(engine, 0))
        dist.barrier()
        directory = Path(config["zero_optimization"]["offload_optimizer"]["nvme_path"])
        seen = sum(path.stat().st_size for path in directory.rglob("*.swp"))
        dist.barrier()
        return seen
    finally:
        destroy(engine)


def gathered_elements(config: dict[str, Any], steps: int) -> tuple[list[int], int, int]:
    """The most parameter elements that are whole at once in each step; those of the stage, and
    of its largest one.
    """
    coordinator = compat.partitioned_param_coordinator.PartitionedParameterCoordinator
    fetch, most = coordinator._fetch_sub_module_impl, [0]
    engine = build(config)

    def fetch_and_count(*arguments: Any) -> None:
        fetch(*arguments)
        most.append(sum(parameter.numel() for parameter in engine.names))

    try:
        found = []
        with patch.object(coordinator, "_fetch_sub_module_impl", fetch_and_count):
            for step in range(steps):
                most[:] = [0]
                pipeline.train_step(engine, micro_batches(engine, step))
                found.append(max(most))
        sizes = [parameter.ds_numel for parameter in engine.names]
        return found, sum(sizes), max(sizes)
    finally:
        destroy(engine)


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
OWN_MAPPING_BYTES = 65536


def peak_bytes(config: dict[str, Any]) -> int:
    """Train two steps; return the most bytes that the process has during the second beyond those
    that it had before the engine was built.

    Every tensor gets a mapping of its own, so that the kernel does not count what is free. By
    itself glibc keeps freed blocks of up to 32 MiB, a fifth of the bytes of so small a model.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)
    destroy(build(tiny()))  # what libraries keep from their first use belongs to no run
    base = process_bytes("VmRSS")
    engine = build(config)
    try:
        pipeline.train_step(engine, micro_batches(engine, 0))
        process_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        pipeline.train_step(engine, micro_batches(engine, 1))
        return process_bytes("VmHWM") - base
    finally:
        destroy(engine)


def process_bytes(line: str) -> int:
    """What the kernel counts of this process, after glibc has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{line}:")[2].split()[0])
