"""Device memory that a rank needs while it computes: activations, pipeline buffers, buckets.

The activations are those that autograd keeps for our model on our kernels;
`tests/planning/test_working_memory.py` counts them: 32 bytes for each token and hidden channel of a
plain GPT block in 16 bit. Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1) have 34 without
the score matrices, which flash attention never stores. The other two are dropout masks, which our
kernels recompute.

In the formulas: T tokens of a micro-batch on a rank, h hidden size, q and k widths of all query and
of all key heads, m MLP width, V vocabulary, t tensor ranks, e bytes of an element. The results are
upper bounds where DeepSpeed decides at run time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kernels.costs import loss_chunk_rows
from megagpt.config import ModelConfig
from megagpt.planning.cost.model_states import (
    FP32_BYTES,
    MAX_LIVE_PARAMETERS,
    Shard,
    reuse_distance,
)
from megagpt.planning.layout import Layout, model_layers
from megagpt.planning.parameters import largest_module
from megagpt.planning.schedules import actions_of_rank, micro_batches_to_peak, peak_held

REDUCE_BUCKET_SIZE = 500_000_000  # elements; default of DeepSpeed's zero/config.py


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes on the device, by kind."""

    activations: float
    pipeline_buffers: float
    head: float
    recomputation: float
    gathered_parameters: float
    reduce_buffers: float
    reduce_copies: float
    update: float


def working_memory(
    layout: Layout, pipeline_rank: int, shard: Shard, *, work: bool = True
) -> WorkingMemory:
    """Return the memory of one rank of a pipeline rank; `shard` holds its parameters.

    Without `work`, only what ZeRO needs: what the passes keep is 0.
    """
    return WorkingMemory(
        activations=activations(layout, pipeline_rank) if work else 0,
        pipeline_buffers=pipeline_buffers(layout, pipeline_rank) if work else 0,
        head=head(layout, pipeline_rank) if work else 0,
        recomputation=recomputation(layout) if work else 0,
        gathered_parameters=gathered_parameters(shard),
        reduce_buffers=reduce_buffers(shard),
        reduce_copies=reduce_copies(shard),
        update=update(shard),
    )


def activations(layout: Layout, pipeline_rank: int) -> float:
    """Return the largest total that the schedule makes this rank keep.

    A micro-batch keeps memory in a stage from its forward to its backward. With equal stages:
    1f1b keeps min(p - rank, micro-batches) of them, gpipe all, interleaved warm_up + 1 of 1 / v
    the size.
    """
    sizes = {stage: kept_by_stage(layout, stage) for stage in layout.stages_of(pipeline_rank)}
    schedule = layout.schedule
    if layout.num_stages == 1:
        return sizes[0]
    if schedule == "gpipe":
        return layout.micro_batches * sum(sizes.values())
    if schedule == "1f1b":
        return min(layout.pipeline - pipeline_rank, layout.micro_batches) * sizes[pipeline_rank]
    count = micro_batches_to_peak(schedule, layout.pipeline, layout.micro_batches)
    order = actions_of_rank(schedule, pipeline_rank, layout.pipeline, layout.virtual_stages, count)
    return peak_held(order, sizes.__getitem__)


def kept_by_stage(layout: Layout, stage: int) -> float:
    """Return the bytes that one micro-batch keeps in a stage until its backward.

    They are in each block, in the head, in the rotary angles, which blocks share, and in the output
    that torch's pipelining keeps.
    """
    blocks, _, has_head = model_layers(layout.model, layout.stages[stage])
    kept = blocks * kept_by_block(layout) + rotary_angles(layout.model)
    hidden = _hidden_bytes(layout)
    if stage < layout.num_stages - 1:
        kept += hidden
    return kept + (kept_by_head(layout) if has_head else 0)


def kept_by_block(layout: Layout, recompute: str | None = None) -> float:
    """Return the bytes that one micro-batch keeps in a block, without the rotary angles.

    `recompute` replaces the layout's.

    Without recomputation: T e (n h + (attention + MLP) / t) and fp32 statistics. n h are the inputs
    and outputs of norms (`_norm_widths`), also divided by t with sequence parallelism. See
    `_attention_width`, `_qk_norm_bytes` and `_mlp_width`. selective: without the MLP's. full: only
    the block's input, T e h.
    """
    model, element = layout.model, layout.element_bytes
    recompute = recompute or layout.recompute
    if recompute == "full":
        return _hidden_bytes(layout)
    attention = _attention_width(model) * element + FP32_BYTES * model.num_heads
    attention += _qk_norm_bytes(layout)
    mlp = 0 if recompute == "selective" else _mlp_width(model) * element
    statistics = (4 if model.post_norm == "both" else 2) * _norm_statistics(model)
    norms = _norm_widths(model) * model.hidden_size * element + statistics
    return layout.tokens * (norms / _norm_shards(layout) + (attention + mlp) / layout.tensor)


def kept_by_head(layout: Layout) -> float:
    """Return the bytes that one micro-batch keeps in the head.

    T e h for the last norm's input, T e h for the gradient that the loss computes ahead, and
    the gradient of the head's weight in fp32: 4 V h / t.
    """
    model = layout.model
    norm = (
        layout.tokens
        * (model.hidden_size * layout.element_bytes + _norm_statistics(model))
        / _norm_shards(layout)
    )
    ahead = layout.tokens * model.hidden_size * layout.element_bytes
    return norm + ahead + FP32_BYTES * model.vocab_size * model.hidden_size / layout.tensor


def _norm_widths(model: ModelConfig) -> int:
    """Return the hidden states that a block's norms keep.

    The input and the output of each of two norms, of which those after attention and MLP keep the
    input only. With a parallel residual both branches have the same input.
    """
    return (6 if model.post_norm == "both" else 4) - model.parallel_residual


def _attention_width(model: ModelConfig) -> float:
    """Return the elements that attention keeps for a token, q + 2 k + q and often q + k.

    The fused projection and the result. Rotated or normalised queries and keys are new tensors,
    q + k. Without them, grouped keys need the reordered queries, q.
    """
    width = 2 * (model.query_size + model.key_value_size)
    if model.position == "rotary" or model.qk_norm != "none":
        return width + model.query_size + model.key_value_size
    return width + (model.query_size if _reorders_queries(model) else 0)


def _qk_norm_bytes(layout: Layout) -> float:
    """Return the bytes that norms of queries and keys keep for a token, on all tensor ranks.

    Per head: the queries where they had to be reordered, and a number for each head. Whole: the
    rows of queries and keys; ranks that share them keep both twice in fp32.
    """
    model, element = layout.model, layout.element_bytes
    width = model.query_size + model.key_value_size
    match model.qk_norm:
        case "per_head":
            reordered = model.query_size if _reorders_queries(model) else 0
            return reordered * element + FP32_BYTES * (model.num_heads + model.num_kv_heads)
        case "whole" if layout.tensor > 1:
            return 2 * FP32_BYTES * width
        case "whole":
            return width * element + 2 * FP32_BYTES
    return 0


def _reorders_queries(model: ModelConfig) -> bool:
    """Return whether a group's queries are separated from its key and value by a copy."""
    return model.num_kv_heads < model.num_heads


def _mlp_width(model: ModelConfig) -> int:
    """Return the elements that the MLP keeps for a token.

    Before and after the activation, 2 m. With a gate: gate, value and the product, 3 m; geglu,
    which is not fused, also keeps the gate's activation.
    """
    if not model.gated:
        return 2 * model.mlp_size
    return model.mlp_size * (3 if model.activation == "swiglu" else 4)


def _norm_statistics(model: ModelConfig) -> int:
    """Return bytes for a token and norm: fp32 mean and deviation, or root of the mean square."""
    return FP32_BYTES * (2 if model.norm == "layernorm" else 1)


def rotary_angles(model: ModelConfig) -> int:
    """Return the bytes of cosines and sines in fp32, whatever the batch; 0 without rotation."""
    return FP32_BYTES * model.sequence_length * model.rotated_size


def _norm_shards(layout: Layout) -> int:
    return layout.tensor if layout.parallel.sequence else 1


def _hidden_bytes(layout: Layout) -> float:
    """Return the bytes of one hidden state of a micro-batch, T e h."""
    return layout.tokens * layout.model.hidden_size * layout.element_bytes / _norm_shards(layout)


def pipeline_buffers(layout: Layout, pipeline_rank: int) -> float:
    """Return the bytes of receive buffers between stages, at most.

    T e h for the inputs of every stage but the first, and T e h for the output gradients of
    every stage but the last. A schedule posts one receive a direction (`compat.EngineStage`
    allocates it then).
    """
    stages = layout.stages_of(pipeline_rank)
    directions = sum((stage > 0) + (stage < layout.num_stages - 1) for stage in stages)
    return directions * _hidden_bytes(layout)


def head(layout: Layout, pipeline_rank: int) -> float:
    """Return the bytes of one chunk of logits, e rows V / t.

    About 256 MiB, or 2,048 rows if the vocabulary is split over ranks.
    """
    if layout.num_stages - 1 not in layout.stages_of(pipeline_rank):
        return 0
    row_bytes = layout.model.vocab_size * layout.element_bytes / layout.tensor
    rows = loss_chunk_rows(row_bytes, grouped=layout.tensor > 1)
    return min(rows, layout.tokens) * row_bytes


def recomputation(layout: Layout) -> float:
    """Return the bytes that backward needs for one block in addition to what was kept.

    The recomputed activations, and gradients of two tensors as wide as the block's widest.
    """
    model, element = layout.model, layout.element_bytes
    up = model.mlp_size * (2 if model.gated else 1)
    widest = max(up, model.query_size + 2 * model.key_value_size)
    gradients = 2 * layout.tokens * widest * element / layout.tensor
    again = (
        layout.tokens * _mlp_width(model) * element / layout.tensor
        if layout.recompute == "selective"
        else 0.0
    )
    if layout.recompute == "full":
        shards = layout.tensor
        whole = (_norm_widths(model) - 1) * model.hidden_size / _norm_shards(layout)
        again = layout.tokens * (
            element * (whole + (_attention_width(model) + _mlp_width(model)) / shards)
            + _qk_norm_bytes(layout) / shards
        )
    return gradients + again


def gathered_parameters(shard: Shard) -> float:
    """Return the bytes that ZeRO 3 gathers, at most e min(n + f, L + 2 x the largest module).

    L is the larger of `stage3_max_live_parameters` and `stage3_max_reuse_distance`, 0 with
    parameters on NVMe. Two modules, because full recomputation gathers the next one before
    backward has released the last. DeepSpeed keeps the frozen parameters of a block that is
    recomputed until its backward has ended (zero/partitioned_param_coordinator.py:393).
    """
    zero = shard.layout.zero
    if shard.stage < 3 or (shard.layout.data == 1 and zero.parameter_device == "none"):
        return 0
    live = (
        MAX_LIVE_PARAMETERS
        if zero.stage3_max_live_parameters is None
        else zero.stage3_max_live_parameters
    )
    ahead = 0 if zero.parameter_device == "nvme" else max(live, reuse_distance(shard.layout))
    needed = 2 * largest_module(shard.layout, shard.pipeline_rank)
    if shard.layout.lora is not None and shard.layout.recompute == "full":
        of_block: Counter[str] = Counter()
        for parameter in shard.parameters:
            of_block[".".join(parameter.name.split(".")[:2])] += parameter.numel
        needed = max(needed, *of_block.values())
    whole = min(shard.elements, ahead + needed)
    return shard.layout.element_bytes * max(0, whole - shard.persistent)


def reduce_buffers(shard: Shard) -> float:
    """Return the bytes of the reduce buckets (stage_1_and_2.py:3256, stage3.py:780).

    ZeRO 1, 2: e `reduce_bucket_size`, twice with `overlap_comm`. ZeRO 3: once, during the whole
    run. The buffer has this size however small the model is.
    """
    zero = shard.layout.zero
    if shard.stage == 0 or zero.contiguous_gradients is False:
        return 0
    count = 2 if shard.stage < 3 and zero.overlap_comm else 1
    return count * _gradient_bytes(shard) * _bucket(shard)


def reduce_copies(shard: Shard) -> float:
    """Return the bytes of the flat copy of a bucket to be sent: e min(n, `reduce_bucket_size`)."""
    if shard.layout.data == 1:
        return 0
    return _gradient_bytes(shard) * min(shard.trained_elements, _bucket(shard))


def _bucket(shard: Shard) -> int:
    return shard.layout.zero.reduce_bucket_size or REDUCE_BUCKET_SIZE


def _gradient_bytes(shard: Shard) -> int:
    """Return the bytes of a reduced gradient element: ZeRO 1 as accumulated, else as the model."""
    return shard.layout.accumulation_bytes if shard.stage == 1 else shard.layout.element_bytes


def update(shard: Shard) -> float:
    """Return the bytes of the flat fp32 gradient that Adam reads.

    (e + 4) times the largest optimizer group's partition (ZeRO 1, 2) or sub-group (3) in 16
    bit, 4 times in fp32. 0 if the optimizer is offloaded.
    """
    layout = shard.layout
    if shard.stage == 0 or layout.zero.optimizer_device != "none":
        return 0
    largest = max(shard.tiles) if shard.stage == 3 else max(shard.group_partitions)
    return largest * (
        FP32_BYTES + (layout.element_bytes if layout.accumulation_bytes < FP32_BYTES else 0)
    )
