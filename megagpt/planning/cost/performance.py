"""Estimate of a step's time: the model's arithmetic and bytes divided by assumed rates.

It is not a measurement. All rates are in `Assumptions` and printed with the plan. Replace them by
measured rates of a machine (`python -m kernels.benchmark`, nccl-tests, fio).
"""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.planning.cost.communication import (
    Communication,
    communication,
    gathers_of_step,
    ring,
    tensor,
)
from megagpt.planning.cost.model_states import Shard, shard_of
from megagpt.planning.flops import (
    FORWARD_AND_BACKWARD,
    layer_flops,
    model_flops_per_token,
)
from megagpt.planning.layout import Layout
from megagpt.planning.schedules import actions, bubble, timeline

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

    `bubble` is the idle share of the time in which micro-batches run.
    """

    step_s: float
    passes_s: float
    reduction_s: float
    update_s: float
    bubble: float
    tokens_per_s: float
    mfu: float


def estimate(layout: Layout, assumed: Assumptions, *, simulated: bool = True) -> Estimate:
    """Estimate the passes of all micro-batches, then the reduction and update that nothing hides.

    Without simulation the slowest stage sets the pace and the bubble follows its formula. That
    is coarser, and fast enough to compare thousands of layouts.
    """
    passes_s, idle = _simulated(layout, assumed) if simulated else _paced(layout, assumed)
    looked_at = (
        range(layout.pipeline) if simulated else {0, layout.pipeline // 2, layout.pipeline - 1}
    )
    ranks = [_Rank(layout, assumed, rank) for rank in looked_at]
    reduction_s = max(rank.reduction_s for rank in ranks)
    update_s = max(rank.update_s for rank in ranks)
    step_s = passes_s + reduction_s + update_s
    peak = 1e12 * assumed.peak_tflops * layout.world_size
    needed = model_flops_per_token(layout.model, lora=layout.lora)
    mfu = layout.tokens_per_step * needed / (step_s * peak)
    return Estimate(
        step_s, passes_s, reduction_s, update_s, idle, layout.tokens_per_step / step_s, mfu
    )


def _simulated(layout: Layout, assumed: Assumptions) -> tuple[float, float]:
    """Return (seconds of all passes, idle share) of the schedule with each stage's durations."""
    orders = actions(layout.schedule, layout.pipeline, layout.virtual_stages, layout.micro_batches)
    forward, backward = _durations(layout, assumed)
    spans = timeline(
        orders, forward.__getitem__, backward.__getitem__, _transfer_s(layout, assumed)
    )
    return max(span.end for rank in spans for span in rank), bubble(spans)


def _paced(layout: Layout, assumed: Assumptions) -> tuple[float, float]:
    """Return (seconds of all passes, idle share) at the pace of the slowest rank.

    The slowest rank waits for (p - 1) / v others.
    """
    forward, backward = _durations(layout, assumed)
    ranks = [
        sum(forward[s] + backward[s] for s in layout.stages_of(rank))
        for rank in range(layout.pipeline)
    ]
    slowest, mean = max(ranks), sum(ranks) / len(ranks)
    filling = (layout.pipeline - 1) / layout.virtual_stages
    passes_s = layout.micro_batches * slowest + filling * mean
    return passes_s, 1 - layout.micro_batches * mean / passes_s


def _durations(layout: Layout, assumed: Assumptions) -> tuple[list[float], list[float]]:
    """Return the seconds of each stage's forward and backward of one micro-batch.

    Backward includes recomputation. The tensor axis does not overlap with arithmetic. ZeRO 3's
    gathers do, so they cost only what exceeds the arithmetic.
    """
    forward, backward = [], []
    tensor_forward = 2 / 5 if layout.recompute == "full" else 2 / 4
    again = {"none": 0.0, "selective": _mlp_share(layout), "full": 1.0}[layout.recompute]
    whole = FORWARD_AND_BACKWARD * sum(layer_flops(layout.model, causal=True))
    needed = model_flops_per_token(layout.model, causal=True, lora=layout.lora)
    passes = FORWARD_AND_BACKWARD * needed / whole  # less if the weights are frozen
    for stage in range(layout.num_stages):
        compute_s = forward_flops(layout, stage) / (1e12 * assumed.peak_tflops * assumed.efficiency)
        tensor_s = tensor(layout, stage) / (1e9 * _tensor_rate(layout, assumed))
        gather_s, gathers = _gather(layout, assumed, stage)
        forward.append(max(compute_s + tensor_forward * tensor_s, gather_s * gathers / 2))
        work_s = (passes - 1 + again) * compute_s + (1 - tensor_forward) * tensor_s
        backward.append(max(work_s, gather_s * gathers / 2))
    return forward, backward


def forward_flops(layout: Layout, stage: int) -> float:
    """Return the FLOPs of one micro-batch's forward through a stage on one rank.

    Attention counts its causal half, as our kernels compute it.
    """
    of_layer = layer_flops(layout.model, causal=True)
    token = sum(of_layer[layer] for layer in layout.stages[stage])
    return layout.tokens * token / layout.tensor


def _mlp_share(layout: Layout) -> float:
    """Return the MLP's share of a block's arithmetic, which selective recomputation repeats."""
    return layout.model.mlp_matmul_parameters / layout.model.block_matmul_parameters


def _gather(layout: Layout, assumed: Assumptions, stage: int) -> tuple[float, float]:
    """Return (seconds to gather a stage's parameters, gathers per micro-batch) at ZeRO 3.

    The seconds include reading from host memory or disk if the parameters are there.
    """
    if layout.zero.stage < 3:
        return 0, 1
    shard = shard_of(layout, stage % layout.pipeline)
    size = layout.element_bytes * shard.elements / layout.virtual_stages
    place = layout.zero.parameter_device
    own = size / layout.data
    from_host_s = own / (1e9 * assumed.host_gb_per_s) if place != "none" else 0
    from_disk_s = (
        own * assumed.ranks_per_host / (1e9 * assumed.nvme_gb_per_s) if place == "nvme" else 0
    )
    network_s = size * ring(layout.data) / (1e9 * _data_rate(layout, assumed))
    return network_s + from_host_s + from_disk_s, gathers_of_step(shard) / layout.micro_batches


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
    """Return the GB/s of a data group, whose ranks are a tensor group apart."""
    within = layout.data * layout.tensor <= assumed.ranks_per_host
    return assumed.link_gb_per_s if within else assumed.network_gb_per_s


class _Rank:
    """The end of a step on one pipeline rank: reduction and update."""

    def __init__(self, layout: Layout, assumed: Assumptions, pipeline_rank: int) -> None:
        self.layout = layout
        self.assumed = assumed
        self.shard: Shard = shard_of(layout, pipeline_rank)
        self.sent: Communication = communication(layout, pipeline_rank, self.shard)

    @property
    def reduction_s(self) -> float:
        """Seconds to reduce gradients and, at ZeRO 1 and 2, gather updated parameters.

        Nothing of it counts as hidden.
        """
        size = self.sent.reductions + (self.sent.gathers if self.layout.zero.stage < 3 else 0)
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
