"""What a rank sends over each axis of the mesh in one optimizer step, in bytes.

With N ranks, a ring all-gather or reduce-scatter of S bytes sends S (N - 1) / N from each rank, an
all-reduce twice that (Thakur et al. 2005, "Optimization of collective communication operations in
MPICH", section 5). The letters are those of model_states.py and working_memory.py. DeepSpeed 0.19.8
reduces the gradients of ZeRO 1 and 2 by all-reduce, where the ZeRO paper has a reduce-scatter,
unless `use_multi_rank_bucket_allreduce` is false (zero/stage_1_and_2.py:1545).
`tests/planning/test_communication.py` counts what ranks send.
"""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.planning.cost.model_states import FP32_BYTES, Shard, reuse_distance
from megagpt.planning.layout import Layout, model_layers


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends in a step.

    `gathers` and `reductions` go over the data axis, `tensor` and `pipeline` over theirs.
    """

    gathers: float
    reductions: float
    tensor: float
    pipeline: float


def communication(layout: Layout, pipeline_rank: int, shard: Shard) -> Communication:
    """Return the bytes of one rank of a pipeline rank; `shard` holds its parameters."""
    return Communication(
        gathers=gathers(shard),
        reductions=reductions(shard),
        tensor=sum(tensor(layout, stage) for stage in layout.stages_of(pipeline_rank))
        * layout.micro_batches,
        pipeline=pipeline(layout, pipeline_rank),
    )


def gathers(shard: Shard) -> float:
    """Return the bytes of gathering parameters.

    ZeRO 1, 2: e n once, the updated parameters. ZeRO 3: e (n + f) times `gathers_of_step`. All
    times (D - 1) / D.
    """
    if shard.stage == 0:
        return 0
    gathered = (
        shard.elements * gathers_of_step(shard) if shard.stage == 3 else shard.trained_elements
    )
    return shard.layout.element_bytes * gathered * ring(shard.layout.data)


def gathers_of_step(shard: Shard) -> float:
    """Return how often ZeRO 3 gathers a parameter in a step, on average: u - k (u - w).

    u: uses of the parameter. Each micro-batch uses it once forward and once backward. Full
    recomputation repeats the forward of a block, up to its last matrix, which backward then
    finds; a norm behind that matrix needs its output, too.

    k: the share that DeepSpeed keeps until the next use, which are the parameters used again
    within R = `stage3_max_reuse_distance` elements. Forward and backward of a parameter are up
    to 2 n apart, so k = min(1, R / 2 n).

    w: windows; DeepSpeed keeps nothing from one to the next. A window is a micro-batch, or the
    step with a pipeline (compat.py). A tied weight that is embedding and head at once is
    gathered for both.
    """
    layout = shard.layout
    reuse = reuse_distance(layout)
    uses = 2.0
    if layout.recompute == "full" and reuse < layout.model.block_matmul_parameters / layout.tensor:
        blocks = (
            parameter for parameter in shard.parameters if parameter.name.startswith("blocks.")
        )
        ends_with_norm = layout.model.post_norm != "none"
        again = (p.numel for p in blocks if ends_with_norm or ".mlp.down." not in p.name)
        uses += sum(again) / shard.elements
    uses *= layout.micro_batches
    windows = layout.micro_batches if layout.num_stages == 1 else 1
    return uses - min(1, reuse / (2 * shard.elements)) * (uses - windows)


def reductions(shard: Shard) -> float:
    """Return the bytes of reducing gradients.

    ZeRO 0, 1: 2 e n once. ZeRO 2: the same, once a step or once a micro-batch, as
    `gradient_reduction` says. ZeRO 3: e n, as often as ZeRO 2. All times (D - 1) / D.
    """
    layout = shard.layout
    per_micro_batch = shard.stage >= 2 and not layout.reduces_per_step
    both_ways = 1 if shard.stage == 3 or layout.zero.use_multi_rank_bucket_allreduce is False else 2
    times = layout.micro_batches if per_micro_batch else 1
    size = layout.accumulation_bytes if shard.stage == 1 else layout.element_bytes
    return times * both_ways * size * shard.trained_elements * ring(layout.data)


def tensor(layout: Layout, stage: int) -> float:
    """Return the bytes of the tensor axis for one micro-batch in a stage.

    An all-reduce of T e h follows attention and MLP in forward and precedes them in backward: 4
    a block. One more follows the embedding and one precedes the head. All times (t - 1) / t.

    Full recomputation repeats the one behind attention; torch stops before the other, which no
    gradient needs unless a norm follows. A norm of all query or key heads sums a number for each
    token, forward and backward; full recomputation repeats the former.

    Sequence parallelism sends the same, as reduce-scatters and all-gathers (Korthikanti et al.
    2022, section 4.2.2), and gathers the inputs of two matrices once more.

    The low-rank states of each adapter are summed once, T e rank, forward or backward.
    """
    blocks, embedding, head = model_layers(layout.model, layout.stages[stage])
    model = layout.model
    full = layout.recompute == "full"
    repeated = (2 if model.post_norm != "none" else 1) if full else 0
    hidden = layout.tokens * layout.element_bytes * model.hidden_size
    sums = (blocks * (4 + repeated) + embedding + head) * hidden
    if model.qk_norm == "whole":
        sums += 2 * blocks * (3 if full else 2) * layout.tokens * FP32_BYTES
    if layout.lora is not None:
        adapters = len(layout.lora.projections(model))
        sums += blocks * adapters * layout.lora.rank * layout.tokens * layout.element_bytes
    return 2 * sums * ring(layout.tensor)


def pipeline(layout: Layout, pipeline_rank: int) -> float:
    """Return the bytes of the pipeline axis.

    For every micro-batch, a hidden state of T e h goes to the next stage and a gradient of the
    same size to the previous one.
    """
    stages = layout.stages_of(pipeline_rank)
    sends = sum((stage < layout.num_stages - 1) + (stage > 0) for stage in stages)
    hidden = layout.tokens * layout.element_bytes * layout.model.hidden_size
    return sends * layout.micro_batches * hidden


def ring(ranks: int) -> float:
    """Return (N - 1) / N."""
    return (ranks - 1) / ranks
