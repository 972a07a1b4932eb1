"""Attention forward for Hopper in Gluon: copies, products and exponentials overlap.

Ordinary Triton waits for every matrix product, so softmax and the tensor cores take turns within a
program. Here one warp, the producer, copies tiles. Two warp groups, the consumers, have 64 query
rows each. A consumer starts the product for the next scores together with the product of the last
weights and values, and computes the exponentials of the scores while the second product still runs
(FlashAttention-3, Shah et al. 2024, sec. 3):

    producer    K0 V0 K1 V1 ...   each into a ring of STAGES tiles, once both consumers released it
    consumer    S0 = Q K0         softmax(S0)
                S1 = Q K1 | O += P0 V0    softmax(S1)     rescale O
                S2 = Q K2 | O += P1 V1    softmax(S2)     rescale O      ...      O += Pn Vn

Every tile has two barriers. ``ready`` counts the bytes that the tensor memory accelerator (TMA) has
copied; ``empty`` counts the consumers that have finished with the tile. Round r of the ring
completes phase r of both. TMA reads zeros beyond the tensors and stores nothing there, so only
scores need a mask.
"""

# Gluon compiles these functions for the types of each launch; it ignores annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # of queries for each consumer: one warp group's product has 64 rows
_PRODUCER_REGISTERS = gl.constexpr(24)  # for each thread; the minimum
_CONSUMER_REGISTERS = gl.constexpr(240)  # 240 + 240 + 24 = 3 * 168: all that 12 warps have


# Not specialised: a length or a number of heads of 1 would become a constant, whose type is not
# that of the loops' counters.
@gluon.jit(do_not_specialize=["heads", "group", "length", "key_length"])
def attention_forward_hopper(
    q, k, v, out, log_sum_exp, heads, group, length, key_length, scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Compute what ``attention_forward`` does, from and to TMA descriptors.

    q, k, v and out are (batch, heads, length, head_dim). Launch with four warps: the first
    consumer. Every query must see a key: if CAUSAL, length <= key_length.
    """
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], q.dtype)
    key_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], q.dtype)
    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, ROWS, HEAD_DIM], q_layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, HEAD_DIM], key_layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, HEAD_DIM], key_layout)
    q_ready = _barriers(1, 1)
    k_ready, v_ready = _barriers(STAGES, 1), _barriers(STAGES, 1)
    k_empty, v_empty = _barriers(STAGES, CONSUMERS), _barriers(STAGES, CONSUMERS)
    fence_async_shared()

    blocks = gl.cdiv(length, CONSUMERS * ROWS)
    # Causal work grows with the row: the longest programs start first, and short ones fill the
    # last wave.
    first_row = (blocks - 1 - gl.program_id(0) % blocks) * (CONSUMERS * ROWS)
    plane = gl.program_id(0) // blocks
    end = key_length
    if CAUSAL:
        end = gl.minimum(end, first_row + CONSUMERS * ROWS + key_length - length)
    where = (plane // heads, plane % heads, first_row, gl.cdiv(end, BLOCK_N))
    tiles = (q_tiles, k_tiles, v_tiles)
    barriers = (q_ready, k_ready, v_ready, k_empty, v_empty)
    sizes = (heads, length, key_length, scale_log2)
    gl.warp_specialize(
        [
            (_consume, (out, log_sum_exp, tiles, barriers, where, sizes, 0, CAUSAL)),
            (_consume, (out, log_sum_exp, tiles, barriers, where, sizes, 1, CAUSAL)),
            (_produce, (q, k, v, tiles, barriers, where, group)),
        ],
        [4, 1],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Create COUNT barriers; each completes a phase after ARRIVALS arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(COUNT):
        mbarrier.init(barriers.index(index), count=ARRIVALS)
    return barriers


@gluon.jit
def _produce(q, k, v, tiles, barriers, where, group):
    """Copy both blocks of queries, then all keys and values, in one warp."""
    q_tiles, k_tiles, v_tiles = tiles
    q_ready, k_ready, v_ready, k_empty, v_empty = barriers
    batch, head, first_row, steps = where
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    mbarrier.expect(q_ready.index(0), CONSUMERS * q.block_type.nbytes)
    for consumer in gl.static_range(CONSUMERS):
        row = first_row + consumer * ROWS
        tma.async_copy_global_to_shared(
            q, [batch, head, row, 0], q_ready.index(0), q_tiles.index(consumer)
        )
    for step in range(steps):
        _copy(k, [batch, head // group, step * BLOCK_N, 0], k_tiles, k_ready, k_empty, step)
        _copy(v, [batch, head // group, step * BLOCK_N, 0], v_tiles, v_ready, v_empty, step)


@gluon.jit
def _copy(tensor, position, tiles, ready, empty, step):
    """Start copying into the tile of a step, once the consumers have released it."""
    STAGES: gl.constexpr = tiles.shape[0]
    stage = step % STAGES
    # A new barrier counts as having completed phase 1, so the first round does not wait.
    mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
    mbarrier.expect(ready.index(stage), tensor.block_type.nbytes)
    tma.async_copy_global_to_shared(tensor, position, ready.index(stage), tiles.index(stage))


@gluon.jit
def _consume(
    out, log_sum_exp, tiles, barriers, where, sizes, CONSUMER: gl.constexpr, CAUSAL: gl.constexpr
):
    """Compute 64 rows of the result in one warp group, from all the keys of the program."""
    q_tiles, k_tiles, v_tiles = tiles
    q_ready, k_ready, v_ready, k_empty, v_empty = barriers
    batch, head, first_row, steps = where
    heads, length, key_length, scale_log2 = sizes
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    HEAD_DIM: gl.constexpr = k_tiles.shape[2]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    first = first_row + CONSUMER * ROWS
    rows = first + gl.arange(0, ROWS, row_layout)
    last = gl.full_like(rows, 0) + key_length - 1
    whole = key_length // BLOCK_N  # tiles of keys that all rows see
    if CAUSAL:
        last = gl.minimum(last, rows + key_length - length)
        whole = gl.minimum(whole, (first + key_length - length + 1) // BLOCK_N)
    queries = q_tiles.index(CONSUMER)
    ring = (k_tiles, v_tiles, k_ready, v_ready, k_empty, v_empty)

    mbarrier.wait(q_ready.index(0), 0)
    mbarrier.wait(k_ready.index(0), 0)
    scores = gl.zeros((ROWS, BLOCK_N), gl.float32, score_layout)  # like weights
    scores = warpgroup_mma(
        queries, k_tiles.index(0).permute((1, 0)), scores, use_acc=False, is_async=True
    )
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    maximum = gl.full((ROWS,), float("-inf"), gl.float32, row_layout)
    total = gl.zeros((ROWS,), gl.float32, row_layout)
    maximum, total, weights, _ = _softmax(scores, maximum, total, last, 0, scale_log2, True)
    mbarrier.wait(v_ready.index(0), 0)
    weights = gl.convert_layout(weights.to(out.dtype), weight_layout, assert_trivial=True)
    weighted = gl.zeros((ROWS, HEAD_DIM), gl.float32, out_layout)
    for step in range(1, whole):
        maximum, total, weighted, weights = _advance(
            queries, ring, maximum, total, weighted, weights, last, step, scale_log2, False
        )
    for step in range(gl.maximum(whole, 1), steps):
        maximum, total, weighted, weights = _advance(
            queries, ring, maximum, total, weighted, weights, last, step, scale_log2, True
        )
    weighted = warpgroup_mma(
        weights, v_tiles.index((steps - 1) % v_tiles.shape[0]), weighted, is_async=True
    )
    weighted, weights = warpgroup_mma_wait(0, deps=(weighted, weights))

    statistics = log_sum_exp + (batch * heads + head).to(gl.int64) * length
    gl.store(statistics + rows, maximum + gl.log2(total), mask=rows < length)
    result = weighted / _column(total, out_layout)
    queries.store(result.to(out.dtype))  # the tile of queries is no longer needed
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [batch, head, first, 0], queries)
    tma.store_wait(0)


@gluon.jit
def _advance(
    queries, ring, maximum, total, weighted, weights, last, step, scale_log2, MASKED: gl.constexpr
):
    """Compute the weights of a step's keys while the values of the step before are added."""
    k_tiles, v_tiles, k_ready, v_ready, k_empty, v_empty = ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    score_layout: gl.constexpr = maximum.type.layout.parent
    out_layout: gl.constexpr = weighted.type.layout
    stage, before, phase = step % STAGES, (step - 1) % STAGES, step // STAGES & 1
    mbarrier.wait(k_ready.index(stage), phase)
    scores = gl.zeros((ROWS, BLOCK_N), gl.float32, score_layout)
    scores = warpgroup_mma(
        queries, k_tiles.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True
    )
    weighted = warpgroup_mma(weights, v_tiles.index(before), weighted, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    maximum, total, next_weights, rescale = _softmax(
        scores, maximum, total, last, step * BLOCK_N, scale_log2, MASKED
    )
    # Only the next step needs these values. Waiting for them here ends a basic block, and ptxas
    # does not move the wait below out of its block. Without this, ptxas moved that wait before the
    # exponentials, and nothing overlapped.
    mbarrier.wait(v_ready.index(stage), phase)
    # The weights pass through the wait, so that their registers are not reused before the product
    # has read them.
    weighted, weights = warpgroup_mma_wait(0, deps=(weighted, weights))
    mbarrier.arrive(v_empty.index(before), count=1)
    weighted = weighted * _column(rescale, out_layout)
    next_weights = gl.convert_layout(
        next_weights.to(weights.dtype), weights.type.layout, assert_trivial=True
    )
    return maximum, total, weighted, next_weights


@gluon.jit
def _softmax(scores, maximum, total, last, first_key, scale_log2, MASKED: gl.constexpr):
    """Add a tile of scores to the running maximum and total.

    Returns both, the tile's weights, and the factor for what was summed before.
    """
    if MASKED:
        keys = first_key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(last, 1), scores, float("-inf"))
    # Every row sees key 0, in the first tile, so the maximum is finite from then on.
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_maximum, 1))
    rescale = gl.exp2(maximum - new_maximum)
    return new_maximum, total * rescale + gl.sum(weights, 1), weights, rescale


@gluon.jit
def _column(values, layout: gl.constexpr):
    """Return one number for each row as a column that broadcasts over a tile.

    The layouts of rows and of the tile must distribute rows alike.
    """
    return gl.expand_dims(
        gl.convert_layout(values, gl.SliceLayout(1, layout), assert_trivial=True), 1
    )
