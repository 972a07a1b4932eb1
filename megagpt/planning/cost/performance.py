"""Estimate of a step's time: the model's arithmetic and bytes divided by assumed rates.

It is not a measurement. All rates are in `Assumptions` and printed with the plan. Replace them by
measured rates of a machine (`python -m kernels.benchmark`, nccl-tests, fio).
`benchmarks/published_steps.py` compares the formulas with steps that others have published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from megagpt.config import ModelConfig
from megagpt.planning.cost.communication import (
    gathers,
    gathers_of_step,
    reductions,
    ring,
    tensor,
)
from megagpt.planning.cost.model_states import Shard, shard_of
from megagpt.planning.cost.working_memory import kept_by_block
from megagpt.planning.flops import (
    FORWARD_AND_BACKWARD,
    layer_flops,
    model_flops_per_token,
)
from megagpt.planning.layout import Layout, cut_stages, model_layers
from megagpt.planning.schedules import last_end

# read weight, gradient and two moments in fp32, write three of them and 16-bit weights
ADAM_BYTES = 30
SWAPPED_BYTES = 28  # NVMe reads the same four and writes three


@dataclass(frozen=True)
class Assumptions:
    """Rates of one rank, or of one host if the name says so; GB are 10^9 bytes per direction."""

    peak_tflops: float
    efficiency: float  # share of the peak that products and attention reach
    link_gb_per_s: float
    network_gb_per_s: float
    host_gb_per_s: float
    host_memory_gb_per_s: float  # of a whole host, shared by its ranks' Adams
    nvme_gb_per_s: float  # of a whole host
    device_memory_gb_per_s: float
    ranks_per_host: int


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step and of its parts.

    `bubble` is the idle share of the time in which micro-batches run. `parts` are the seconds of
    what the slowest rank does, by name; they sum to `step_s`.
    """

    step_s: float
    passes_s: float
    reduction_s: float
    update_s: float
    bubble: float
    tokens_per_s: float
    mfu: float
    parts: dict[str, float] = field(default_factory=dict)


class StageWork(NamedTuple):
    """Seconds of one micro-batch in a stage: what it consists of, and both passes."""

    products_s: float
    recomputation_s: float
    memory_s: float
    tensor_s: float
    waiting_s: float
    forward_s: float
    backward_s: float


PARTS = {  # fields of StageWork, for people
    "products_s": "matrix products",
    "recomputation_s": "recomputation",
    "memory_s": "device memory",
    "tensor_s": "tensor axis",
    "waiting_s": "gathers",
}
BUBBLE, REDUCTION, UPDATE = "bubble", "reduction", "update"


def estimate(layout: Layout, assumed: Assumptions, *, simulated: bool = True) -> Estimate:
    """Estimate the passes of all micro-batches, then the reduction and update that nothing hides.

    Without simulation, no step is longer than the exact one, and most are as long: see
    `_shortest_passes`. That is fast enough to compare thousands of layouts.
    """
    work = work_of_stages(layout, assumed)
    transfer_s = _transfer_s(layout, assumed)
    passes_s = (
        _simulated_passes(layout, work, transfer_s)
        if simulated
        else _shortest_passes(layout, work, transfer_s)
    )
    busy_s = [_busy_s(layout, work, rank) for rank in range(layout.pipeline)]
    ranks = range(layout.pipeline) if simulated else extremes(layout.pipeline)
    reduction_s, update_s = end_of_step(layout, assumed, ranks)
    step_s = passes_s + reduction_s + update_s
    peak = 1e12 * assumed.peak_tflops * layout.world_size
    needed = model_flops_per_token(layout.model, lora=layout.lora)
    return Estimate(
        step_s=step_s,
        passes_s=passes_s,
        reduction_s=reduction_s,
        update_s=update_s,
        bubble=1 - sum(busy_s) / (layout.pipeline * passes_s),
        tokens_per_s=layout.tokens_per_step / step_s,
        mfu=layout.tokens_per_step * needed / (step_s * peak),
        parts=_parts(layout, work, busy_s, passes_s) | {REDUCTION: reduction_s, UPDATE: update_s},
    )


def shortest_passes(layout: Layout, assumed: Assumptions) -> float:
    """Return seconds that the passes of all micro-batches take at least, in any schedule."""
    work = work_of_stages(layout, assumed)
    return _shortest_passes(layout, work, _transfer_s(layout, assumed))


def end_of_step(layout: Layout, assumed: Assumptions, ranks: Iterable[int]) -> tuple[float, float]:
    """Return the longest reduction and the longest update of these pipeline ranks, in seconds."""
    ends = [_Rank(layout, assumed, rank) for rank in ranks]
    return max(end.reduction_s for end in ends), max(end.update_s for end in ends)


def work_of_stages(layout: Layout, assumed: Assumptions) -> list[StageWork]:
    """Return each stage's work; stages of equal layers share one computation."""
    known: dict[tuple[float, ...], StageWork] = {}
    found = []
    partitioned = layout.zero.stage == 3
    for stage, kind in enumerate(_kinds(layout.model, layout.num_stages)):
        elements = shard_of(layout, stage % layout.pipeline).elements if partitioned else 0
        key = (*kind, elements)
        if key not in known:
            known[key] = stage_work(layout, assumed, stage)
        found.append(known[key])
    return found


@cache
def _kinds(model: ModelConfig, num_stages: int) -> tuple[tuple[float, ...], ...]:
    """Return what a stage's work depends on: its blocks, embedding, head and FLOPs of a token."""
    of_layer = layer_flops(model, causal=True)
    return tuple(
        (*model_layers(model, layers), sum(of_layer[layer] for layer in layers))
        for layers in cut_stages(model, num_stages)
    )


def extremes(pipeline: int) -> list[int]:
    """Return the pipeline ranks that differ most: the first two, the middle and the last."""
    return sorted({0, min(1, pipeline - 1), pipeline // 2, pipeline - 1})


def _parts(
    layout: Layout, work: list[StageWork], busy_s: list[float], passes_s: float
) -> dict[str, float]:
    """Return the seconds of the passes of the rank that works longest, by name."""
    slowest = busy_s.index(max(busy_s))
    own = [work[stage] for stage in layout.stages_of(slowest)]
    parts = {
        name: layout.micro_batches * sum(getattr(stage, key) for stage in own)
        for key, name in PARTS.items()
    }
    return parts | {BUBBLE: passes_s - busy_s[slowest]}


def _busy_s(layout: Layout, work: list[StageWork], rank: int) -> float:
    own = (work[stage] for stage in layout.stages_of(rank))
    return layout.micro_batches * sum(stage.forward_s + stage.backward_s for stage in own)


def _simulated_passes(layout: Layout, work: list[StageWork], transfer_s: float) -> float:
    """Return the seconds of all passes in the order of the schedule that runs."""
    if layout.pipeline == 1:
        return _busy_s(layout, work, 0)
    return last_end(
        layout.schedule,
        layout.pipeline,
        layout.virtual_stages,
        layout.micro_batches,
        tuple(stage.forward_s for stage in work),
        tuple(stage.backward_s for stage in work),
        transfer_s,
    )


def _shortest_passes(layout: Layout, work: list[StageWork], transfer_s: float) -> float:
    """Return seconds that no schedule can beat.

    A rank begins when the first micro-batch has passed the stages before its first one, is busy
    for all its work, and the gradients of the last one then pass those stages. With equal stages
    this is the time of 1F1B and of the ideal interleaved schedule.
    """
    longest = before = 0.0
    for rank in range(layout.pipeline):
        longest = max(longest, before + _busy_s(layout, work, rank))
        before += work[rank].forward_s + work[rank].backward_s + 2 * transfer_s
    return longest


def stage_work(layout: Layout, assumed: Assumptions, stage: int) -> StageWork:
    """Return the seconds of one micro-batch in a stage.

    Products and traffic of device memory add up: kernels that are bound by memory run between the
    products. The tensor axis does not overlap with either. ZeRO 3's gathers do, and with
    `overlap_comm` its reductions, so only what exceeds the work is waited for.
    """
    products_s = forward_flops(layout, stage) / (1e12 * assumed.peak_tflops * assumed.efficiency)
    again = {"none": 0.0, "selective": _mlp_share(layout), "full": 1.0}[layout.recompute]
    memory_s, memory_backward_s = (
        size / (1e9 * assumed.device_memory_gb_per_s) for size in memory_traffic(layout, stage)
    )
    tensor_s = tensor(layout, stage) / (1e9 * _tensor_rate(layout, assumed))
    tensor_forward = 2 / 5 if layout.recompute == "full" else 2 / 4
    gather_s, reduce_s = _data_axis(layout, assumed, stage)
    forward_s = products_s + memory_s + tensor_forward * tensor_s
    passes = _products_passes(layout)
    backward_s = (passes - 1 + again) * products_s
    backward_s += memory_backward_s + (1 - tensor_forward) * tensor_s
    waiting = max(0.0, gather_s - forward_s), max(0.0, gather_s + reduce_s - backward_s)
    return StageWork(
        products_s=passes * products_s,
        recomputation_s=again * products_s,
        memory_s=memory_s + memory_backward_s,
        tensor_s=tensor_s,
        waiting_s=sum(waiting),
        forward_s=forward_s + waiting[0],
        backward_s=backward_s + waiting[1],
    )


def _products_passes(layout: Layout) -> float:
    """Return the products of forward and backward, in those of the forward.

    A frozen weight has no gradient, which is a third of its products.
    """
    if layout.lora is None:
        return FORWARD_AND_BACKWARD
    forward = sum(layer_flops(layout.model, causal=True))
    return model_flops_per_token(layout.model, causal=True, lora=layout.lora) / forward


def memory_traffic(layout: Layout, stage: int) -> tuple[float, float]:
    """Return the bytes that forward and backward move through device memory for one micro-batch.

    Forward writes each tensor that autograd keeps without recomputation, and reads it once.
    Backward reads it and does the same with its gradient, twice: for the gradient of the input
    and of the weight. Recomputation repeats the forward. Weights are read once forward and once
    backward, and gradients that they have are added to. Logits: written, read, their gradient
    written and read by two products; all of that in forward, which computes the loss's gradient.
    """
    blocks, _, has_head = model_layers(layout.model, layout.stages[stage])
    whole = blocks * kept_by_block(layout, "none")
    again = {
        "none": 0.0,
        "selective": whole - blocks * kept_by_block(layout, "selective"),
        "full": whole,
    }[layout.recompute]
    model, element = layout.model, layout.element_bytes
    weights = blocks * model.block_matmul_parameters * element / layout.tensor
    logits = layout.tokens * model.vocab_size * element / layout.tensor if has_head else 0.0
    backward = weights if layout.lora is not None else 3 * weights
    return 2 * whole + weights + 5 * logits, 4 * whole + 2 * again + backward


def forward_flops(layout: Layout, stage: int) -> float:
    """Return the FLOPs of one micro-batch's forward through a stage on one rank.

    Attention counts its causal half, as our kernels compute it.
    """
    *_, token = _kinds(layout.model, layout.num_stages)[stage]
    return layout.tokens * token / layout.tensor


def _mlp_share(layout: Layout) -> float:
    """Return the MLP's share of a block's arithmetic, which selective recomputation repeats."""
    return layout.model.mlp_matmul_parameters / layout.model.block_matmul_parameters


def _data_axis(layout: Layout, assumed: Assumptions, stage: int) -> tuple[float, float]:
    """Return the seconds of ZeRO 3 for one micro-batch: a pass's gathers, backward's reductions.

    The gathers include reading from host memory or disk if the parameters are there. Reductions
    that `overlap_comm` does not hide are in `_Rank.reduction_s`.
    """
    if layout.zero.stage < 3:
        return 0.0, 0.0
    shard = shard_of(layout, stage % layout.pipeline)
    size = layout.element_bytes * shard.elements / layout.virtual_stages
    place = layout.zero.parameter_device
    own = size / layout.data
    gather_s = size * ring(layout.data) / (1e9 * _data_rate(layout, assumed))
    if place != "none":
        gather_s += own / (1e9 * assumed.host_gb_per_s)
    if place == "nvme":
        gather_s += own * assumed.ranks_per_host / (1e9 * assumed.nvme_gb_per_s)
    passes = 2 * layout.micro_batches
    reduce_s = 0.0
    if _hides_reductions(layout):
        reduce_s = reductions(shard) / (1e9 * _data_rate(layout, assumed))
        reduce_s /= layout.virtual_stages * layout.micro_batches
    return gather_s * gathers_of_step(shard) / passes, reduce_s


def _hides_reductions(layout: Layout) -> bool:
    """Return whether reductions run beside the backward: `overlap_comm`, on at ZeRO 3 unless off.

    A coalesced reduction follows the last backward.
    """
    zero = layout.zero
    return zero.stage == 3 and zero.overlap_comm is not False and not layout.reduces_per_step


def _transfer_s(layout: Layout, assumed: Assumptions) -> float:
    """Return the seconds that a hidden state takes to the next pipeline rank.

    That rank is on another host if a stage fills one.
    """
    far = layout.data * layout.tensor >= assumed.ranks_per_host
    rate = assumed.network_gb_per_s if far else assumed.link_gb_per_s
    return layout.tokens * layout.element_bytes * layout.model.hidden_size / (1e9 * rate)


def _tensor_rate(layout: Layout, assumed: Assumptions) -> float:
    """Return the GB/s of a tensor group, which crosses hosts only if it is larger than one."""
    return (
        assumed.link_gb_per_s
        if layout.tensor <= assumed.ranks_per_host
        else assumed.network_gb_per_s
    )


def _data_rate(layout: Layout, assumed: Assumptions) -> float:
    """Return the GB/s of a data group, whose ranks are a tensor group apart.

    Across hosts, each rank of the group on a host brings an adapter, and rings use all of them.
    """
    if layout.data * layout.tensor <= assumed.ranks_per_host:
        return assumed.link_gb_per_s
    on_a_host = max(1, assumed.ranks_per_host // layout.tensor)
    return min(assumed.link_gb_per_s, on_a_host * assumed.network_gb_per_s)


class _Rank:
    """The end of a step on one pipeline rank: reduction and update."""

    def __init__(self, layout: Layout, assumed: Assumptions, pipeline_rank: int) -> None:
        self.layout = layout
        self.assumed = assumed
        self.shard: Shard = shard_of(layout, pipeline_rank)

    @property
    def reduction_s(self) -> float:
        """Seconds to reduce gradients and, at ZeRO 1 and 2, gather updated parameters.

        Without what runs beside the backward (`_hides_reductions`).
        """
        size = 0.0 if _hides_reductions(self.layout) else reductions(self.shard)
        size += gathers(self.shard) if self.layout.zero.stage < 3 else 0
        return size / (1e9 * _data_rate(self.layout, self.assumed))

    @property
    def update_s(self) -> float:
        """Seconds of the update.

        Adam moves 30 bytes an element through the memory that holds its state; NVMe reads
        16 and writes 12.
        """
        zero = self.layout.zero
        assumed = self.assumed
        moved = ADAM_BYTES * self.shard.partition
        if zero.optimizer_device == "none":
            return moved / (1e9 * assumed.device_memory_gb_per_s)
        over_bus_s = (
            2 * self.layout.element_bytes * self.shard.partition / (1e9 * assumed.host_gb_per_s)
        )
        adam_s = moved * assumed.ranks_per_host / (1e9 * assumed.host_memory_gb_per_s)
        if zero.optimizer_device != "nvme":
            return adam_s + over_bus_s
        swapped = SWAPPED_BYTES * self.shard.partition * assumed.ranks_per_host
        return adam_s + over_bus_s + swapped / (1e9 * assumed.nvme_gb_per_s)
