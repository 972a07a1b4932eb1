"""What a rank sends over each axis of the mesh in one optimizer step, in bytes.

A ring all-gather or reduce-scatter of S bytes over N ranks sends S (N - 1) / N from each, an all-reduce twice that
(Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 5). The letters are those
of model_states.py and working_memory.py. DeepSpeed 0.19.8 reduces the gradients of ZeRO 1 and 2 by all-reduce, where
the ZeRO paper has a reduce-scatter, unless `use_multi_rank_bucket_allreduce` is false (zero/stage_1_and_2.py:1545).
`tests/test_communication.py` counts what ranks send.
"""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.layout import Layout, model_layers
from megagpt.model_states import MAX_REUSE_DISTANCE, Shard
from megagpt.schedules import warm_up


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in a step: `gathers` and `reductions` over the data axis, `tensor` and `pipeline` over
    theirs."""

    gathers: float
    reductions: float
    tensor: float
    pipeline: float


def communication(layout: Layout, pipeline_rank: int, shard: Shard) -> Communication:
    """Of one rank of this pipeline rank, whose parameters are those of the shard."""
    return Communication(
        gathers=gathers(shard),
        reductions=reductions(shard),
        tensor=sum(tensor(layout, stage) for stage in layout.stages_of(pipeline_rank)) * layout.micro_batches,
        pipeline=pipeline(layout, pipeline_rank),
    )


def gathers(shard: Shard) -> float:
    """ZeRO 1, 2: e n once, the updated parameters; 3: e n as often as `gathers_of_micro_batch` says, for every
    micro-batch. All times (D - 1) / D."""
    layout = shard.layout
    if shard.stage == 0:
        return 0
    times = 1 if shard.stage < 3 else layout.micro_batches * gathers_of_micro_batch(shard)
    return times * layout.element_bytes * shard.elements * ring(layout.data)


def gathers_of_micro_batch(shard: Shard) -> float:
    """ZeRO 3: of n elements on average, once forward, once backward, and once for the forward of blocks that full
    recomputation repeats (up to the last matrix, which backward then finds); less what DeepSpeed keeps.

    It keeps a parameter that is used again within `stage3_max_reuse_distance` elements, R: from a block's repeated
    forward to its backward, and of all n elements, which lie up to 2 n apart, the last R / 2 from forward to backward.
    It knows only where forward and backward of a micro-batch follow each other: under a pipeline in the last stage of
    1f1b, elsewhere nothing is kept. A tied weight that is embedding and head at once is gathered for both.
    """
    layout, distance = shard.layout, shard.layout.zero.stage3_max_reuse_distance
    alternates = (
        warm_up(layout.schedule, shard.pipeline_rank, layout.pipeline, layout.virtual_stages, layout.micro_batches) == 0
        or layout.num_stages == 1
    )
    reuse = (MAX_REUSE_DISTANCE if distance is None else distance) if alternates else 0
    passes = 2.0
    if layout.recompute == "full" and reuse < layout.model.block_matmul_parameters / layout.tensor:
        blocks = (parameter for parameter in shard.parameters if parameter.name.startswith("blocks."))
        passes += sum(p.numel for p in blocks if ".mlp.down." not in p.name) / shard.elements
    return passes - min(1, reuse / (2 * shard.elements))


def reductions(shard: Shard) -> float:
    """ZeRO 0, 1: 2 e n once; 2: once a step or a micro-batch, as `gradient_reduction` says; 3: e n, as often. All times
    (D - 1) / D."""
    layout = shard.layout
    per_micro_batch = shard.stage >= 2 and not layout.reduces_per_step
    both_ways = 1 if shard.stage == 3 or layout.zero.use_multi_rank_bucket_allreduce is False else 2
    times = layout.micro_batches if per_micro_batch else 1
    size = layout.accumulation_bytes if shard.stage == 1 else layout.element_bytes
    return times * both_ways * size * shard.elements * ring(layout.data)


def tensor(layout: Layout, stage: int) -> float:
    """Of one micro-batch in a stage: an all-reduce of T e h behind attention and MLP forward, and before them backward,
    4 a block, one behind the embedding, one before the head. Times (t - 1) / t.

    Full recomputation repeats the one behind attention; torch stops before the other, which no gradient needs.
    Sequence parallelism sends the same, as reduce-scatters and all-gathers (Korthikanti et al. 2022, section 4.2.2),
    and gathers the inputs of two matrices once more.
    """
    blocks, embedding, head = model_layers(layout.model, layout.stages[stage])
    times = blocks * (5 if layout.recompute == "full" else 4) + embedding + head
    hidden = layout.tokens * layout.element_bytes * layout.model.hidden_size
    return 2 * times * hidden * ring(layout.tensor)


def pipeline(layout: Layout, pipeline_rank: int) -> float:
    """A hidden state of T e h to the next stage and a gradient as large to the one before, for every micro-batch."""
    stages = layout.stages_of(pipeline_rank)
    sends = sum((stage < layout.num_stages - 1) + (stage > 0) for stage in stages)
    hidden = layout.tokens * layout.element_bytes * layout.model.hidden_size
    return sends * layout.micro_batches * hidden


def ring(ranks: int) -> float:
    """(N - 1) / N."""
    return (ranks - 1) / ranks
