"""Attention backward in Triton, with scores recomputed from the saved log-sum-exp.

FlashAttention-2 (Dao 2023). With P the probabilities, D the dropout mask divided by its keep
probability, and delta = rowsum(dO * O):

    dV = (P * D)^T dO      dP = (dO V^T) * D      dS = P * (dP - delta)
    dQ = scale * dS K      dK = scale * dS^T Q

With a soft cap, where scores are softcap * t with t = tanh(scale / softcap * Q K^T), dS has the
factor 1 - t^2 too.

``attention_backward_keys`` goes once over the queries of a block of keys and adds its part of dQ to
an fp32 buffer with atomics: five matrix products for each score, in a varying order of summation.
Without ``ADD_QUERY_GRADIENT`` it leaves dQ to ``attention_backward_queries``: seven products, the
same bits on every run.

Scores are held transposed, (keys, queries), so that P and dS are operands of the next products
without leaving the registers. Not transposed, the kernel spilled hundreds of bytes at head
dimension 64 on sm_90. One fp32 log-sum-exp stands for a row, as in FlashAttention; with scores of
size S the relative error of its weights is up to about S * 2^-23.
"""

# Triton compiles these functions for the types of each launch; it ignores annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from kernels.fused.attention_masks import (
    in_reach,
    key_range,
    last_visible,
    query_range,
    same_document,
)
from kernels.fused.rounding import narrow
from kernels.fused.soft_cap import tanh
from kernels.fused.tiles import (
    IN_INTERPRETER,
    head_start,
    keep_tile,
    load_tile,
    product,
    tile_offsets,
)


@triton.jit(do_not_specialize=["heads"])
def attention_backward_delta(
    out, out_gradient, delta, out_strides, gradient_strides, heads, length,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute delta (batch * heads, length) fp32: the sum over head_dim of out * out_gradient."""
    blocks = tl.cdiv(length, BLOCK_M)
    first_row, plane = tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks
    local_rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DIM)
    rows = first_row + local_rows
    tile = tile_offsets(out_strides, local_rows, columns)
    value = load_tile(
        head_start(out, out_strides, plane // heads, plane % heads, first_row) + tile,
        rows,
        columns,
        length,
        HEAD_DIM,
        True,
    )
    tile = tile_offsets(gradient_strides, local_rows, columns)
    gradient = load_tile(
        head_start(out_gradient, gradient_strides, plane // heads, plane % heads, first_row) + tile,
        rows, columns, length, HEAD_DIM, True,
    )  # fmt: skip
    total = tl.sum(value.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(delta + tl.cast(plane, tl.int64) * length + rows, total, mask=rows < length)


@triton.jit(do_not_specialize=["heads", "head_offset", "window"])
def attention_backward_keys(
    q, k, v, out_gradient, log_sum_exp, delta, dq, dk, dv, documents, seeds,
    q_strides, k_strides, v_strides, gradient_strides, dq_strides, dk_strides, dv_strides,
    heads, group, length, key_length, window, scale, scale_log2, cap_scale, keep_scale, head_offset,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROP_BELOW: tl.constexpr,
    ADD_QUERY_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one block of keys, and its part of dq (fp32, unscaled).

    dk and dv are summed over the query heads that share the keys.
    """
    blocks = tl.cdiv(key_length, BLOCK_N)
    # Most queries see the first keys, so ascending order starts the longest programs first.
    block, plane = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    key_heads = heads // group
    batch, key_head = plane // key_heads, plane % key_heads
    first_key = block * BLOCK_N
    local_keys, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DIM)
    key_index = first_key + local_keys
    k_tile = head_start(k, k_strides, batch, key_head, first_key) + tile_offsets(
        k_strides, local_keys, columns
    )
    v_tile = head_start(v, v_strides, batch, key_head, first_key) + tile_offsets(
        v_strides, local_keys, columns
    )
    # keys, values, key_gradient, value_gradient: (BLOCK_N, BLOCK_DIM)
    keys = load_tile(k_tile, key_index, columns, key_length, HEAD_DIM, True)
    values = load_tile(v_tile, key_index, columns, key_length, HEAD_DIM, True)
    key_document = key_index  # (BLOCK_N,)
    if DOCUMENTS:
        documents += tl.cast(batch, tl.int64) * 2 * key_length
        key_document = tl.load(documents + key_index, mask=key_index < key_length, other=-1)
    seed = 0
    if DROP_BELOW > 0:
        seed = tl.load(seeds + batch)

    start, whole_start, whole_end, end = query_range(
        documents, first_key, key_index, length, key_length, window, BLOCK_M, BLOCK_N, CAUSAL,
        DOCUMENTS,
    )  # fmt: skip
    key_gradient = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
    value_gradient = tl.zeros((BLOCK_N, BLOCK_DIM), tl.float32)
    # One loop over heads and blocks: nested loops cost twenty registers more, and the pipeline of
    # loads ran empty between heads.
    blocks_before = tl.cdiv(tl.maximum(whole_start - start, 0), BLOCK_M)
    whole_blocks = tl.cdiv(tl.maximum(whole_end - whole_start, 0), BLOCK_M)
    masked_blocks = blocks_before
    if window is not None:
        masked_blocks += tl.cdiv(tl.maximum(end - whole_end, 0), BLOCK_M)
    for step in tl.range(0, group * masked_blocks):
        first_row = start + step % masked_blocks * BLOCK_M
        if window is not None:
            after = step % masked_blocks - blocks_before
            first_row = tl.where(after < 0, first_row, whole_end + after * BLOCK_M)
        key_gradient, value_gradient = _accumulate(
            keys, values, key_gradient, value_gradient, q, out_gradient, dq, log_sum_exp, delta,
            q_strides, gradient_strides, dq_strides, key_index, key_document, documents, seed,
            head_offset, batch, key_head * group + step // masked_blocks, heads, first_key,
            first_row, length, key_length, window, scale_log2, cap_scale, keep_scale, HEAD_DIM,
            BLOCK_DIM, BLOCK_M, BLOCK_N, CAUSAL, DOCUMENTS, DROP_BELOW, ADD_QUERY_GRADIENT, True,
        )  # fmt: skip
    for step in tl.range(0, group * whole_blocks):
        first_row = whole_start + step % whole_blocks * BLOCK_M
        key_gradient, value_gradient = _accumulate(
            keys, values, key_gradient, value_gradient, q, out_gradient, dq, log_sum_exp, delta,
            q_strides, gradient_strides, dq_strides, key_index, key_document, documents, seed,
            head_offset, batch, key_head * group + step // whole_blocks, heads, first_key,
            first_row, length, key_length, window, scale_log2, cap_scale, keep_scale, HEAD_DIM,
            BLOCK_DIM, BLOCK_M, BLOCK_N, CAUSAL, DOCUMENTS, DROP_BELOW, ADD_QUERY_GRADIENT, False,
        )  # fmt: skip

    inside = (key_index[:, None] < key_length) & (columns[None, :] < HEAD_DIM)
    dk_tile = head_start(dk, dk_strides, batch, key_head, first_key) + tile_offsets(
        dk_strides, local_keys, columns
    )
    tl.store(
        dk_tile, narrow(key_gradient * scale, dk.dtype.element_ty, IN_INTERPRETER), mask=inside
    )
    dv_tile = head_start(dv, dv_strides, batch, key_head, first_key) + tile_offsets(
        dv_strides, local_keys, columns
    )
    tl.store(dv_tile, narrow(value_gradient, dv.dtype.element_ty, IN_INTERPRETER), mask=inside)


@triton.jit
def _accumulate(
    keys, values, key_gradient, value_gradient, q, out_gradient, dq, log_sum_exp, delta,
    q_strides, gradient_strides, dq_strides, key_index, key_document, documents, seed, head_offset,
    batch, head, heads, first_key, first_row, length, key_length, window, scale_log2, cap_scale,
    keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROP_BELOW: tl.constexpr,
    ADD_QUERY_GRADIENT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of queries of one head to the gradients of keys, values and queries."""
    local_rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DIM)
    rows = first_row + local_rows
    q_tile = head_start(q, q_strides, batch, head, first_row) + tile_offsets(
        q_strides, local_rows, columns
    )
    gradient_tile = head_start(out_gradient, gradient_strides, batch, head, first_row)
    gradient_tile += tile_offsets(gradient_strides, local_rows, columns)
    statistics = tl.cast(batch * heads + head, tl.int64) * length

    queries = load_tile(q_tile, rows, columns, length, HEAD_DIM, True)  # (BLOCK_M, BLOCK_DIM)
    lse = tl.load(log_sum_exp + statistics + rows, mask=rows < length, other=float("inf"))
    # scores, weights, weight_gradient, score_gradient: (BLOCK_N, BLOCK_M)
    scores = product(keys, tl.trans(queries), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    if cap_scale is not None:
        scores = tanh(scores * cap_scale, keys.dtype == tl.float32)
    weights = tl.math.exp2(scores * scale_log2 - lse[None, :])
    if MASKED:
        last_key = last_visible(rows, length, key_length, CAUSAL)
        visible = in_reach(key_index[:, None], last_key[None, :], window)
        if DOCUMENTS:
            row_document = tl.load(
                documents + key_length - length + rows, mask=rows < length, other=-1
            )
            visible = visible & (key_document[:, None] == row_document[None, :])
        weights = tl.where(visible, weights, 0.0)

    gradient = load_tile(gradient_tile, rows, columns, length, HEAD_DIM, True)  # like queries
    dropped = weights
    weight_gradient = product(values, tl.trans(gradient), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
    if DROP_BELOW > 0:
        keep = tl.trans(keep_tile(seed, head_offset + head, rows, first_key, BLOCK_N, DROP_BELOW))
        dropped = tl.where(keep, weights * keep_scale, 0.0)
        weight_gradient = tl.where(keep, weight_gradient * keep_scale, 0.0)
    value_gradient = product(
        narrow(dropped, values.dtype, IN_INTERPRETER), gradient, value_gradient
    )
    row_delta = tl.load(delta + statistics + rows, mask=rows < length, other=0.0)
    score_gradient = weights * (weight_gradient - row_delta[None, :])
    if cap_scale is not None:
        score_gradient *= 1.0 - scores * scores
    score_gradient = narrow(score_gradient, keys.dtype, IN_INTERPRETER)
    key_gradient = product(score_gradient, queries, key_gradient)
    if ADD_QUERY_GRADIENT:
        part = product(tl.trans(score_gradient), keys, tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32))
        dq_tile = head_start(dq, dq_strides, batch, head, first_row) + tile_offsets(
            dq_strides, local_rows, columns
        )
        inside = (rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
        tl.atomic_add(dq_tile, part, mask=inside, sem="relaxed")
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=["heads", "head_offset", "window"])
def attention_backward_queries(
    q, k, v, out_gradient, log_sum_exp, delta, dq, documents, seeds,
    q_strides, k_strides, v_strides, gradient_strides, dq_strides,
    heads, group, length, key_length, window, scale, scale_log2, cap_scale, keep_scale, head_offset,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROP_BELOW: tl.constexpr,
):  # fmt: skip
    """Compute dq of one block of queries, over its keys in ascending order (deterministic)."""
    blocks = tl.cdiv(length, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    batch, head = plane // heads, plane % heads
    first_row = block * BLOCK_M
    local_rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DIM)
    rows = first_row + local_rows
    q_tile = head_start(q, q_strides, batch, head, first_row) + tile_offsets(
        q_strides, local_rows, columns
    )
    queries = load_tile(q_tile, rows, columns, length, HEAD_DIM, True)
    gradient_tile = head_start(out_gradient, gradient_strides, batch, head, first_row)
    gradient_tile += tile_offsets(gradient_strides, local_rows, columns)
    # queries, gradient, total: (BLOCK_M, BLOCK_DIM)
    gradient = load_tile(gradient_tile, rows, columns, length, HEAD_DIM, True)
    statistics = tl.cast(plane, tl.int64) * length + rows  # (BLOCK_M,), like all loaded from there
    lse = tl.load(log_sum_exp + statistics, mask=rows < length, other=float("inf"))
    row_delta = tl.load(delta + statistics, mask=rows < length, other=0.0)
    last_key = last_visible(rows, length, key_length, CAUSAL)
    document = rows
    k_head = head_start(k, k_strides, batch, head // group, 0)
    v_head = head_start(v, v_strides, batch, head // group, 0)
    seed = 0
    if DROP_BELOW > 0:
        seed = tl.load(seeds + batch)

    if DOCUMENTS:
        documents += tl.cast(batch, tl.int64) * 2 * key_length
        document = tl.load(documents + key_length - length + rows, mask=rows < length, other=-1)
    start, _, _, end = key_range(
        documents, first_row, rows, length, key_length, window, BLOCK_M, BLOCK_N, CAUSAL, DOCUMENTS
    )
    total = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    for first_key in tl.range(start, end, BLOCK_N):
        total = _accumulate_query(
            queries, gradient, lse, row_delta, total, k_head, v_head, k_strides, v_strides, rows,
            last_key, documents, document, seed, head_offset + head, first_key, key_length, window,
            scale_log2, cap_scale, keep_scale, HEAD_DIM, BLOCK_DIM, BLOCK_N, DOCUMENTS, DROP_BELOW,
        )  # fmt: skip
    dq_tile = head_start(dq, dq_strides, batch, head, first_row) + tile_offsets(
        dq_strides, local_rows, columns
    )
    inside = (rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
    tl.store(dq_tile, narrow(total * scale, dq.dtype.element_ty, IN_INTERPRETER), mask=inside)


@triton.jit
def _accumulate_query(
    queries, gradient, lse, row_delta, total, k_head, v_head, k_strides, v_strides, rows, last_key,
    documents, document, seed, plane, first_key, key_length, window, scale_log2, cap_scale,
    keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROP_BELOW: tl.constexpr,
):  # fmt: skip
    """Add what one block of keys gives to the gradient of a block of queries (unscaled)."""
    local_keys, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DIM)
    key_index = first_key + local_keys
    start = tl.cast(first_key, tl.int64)
    k_tile = k_head + start * k_strides[2] + tile_offsets(k_strides, local_keys, columns)
    v_tile = v_head + start * v_strides[2] + tile_offsets(v_strides, local_keys, columns)
    keys = load_tile(k_tile, key_index, columns, key_length, HEAD_DIM, True)  # (BLOCK_N, BLOCK_DIM)
    values = load_tile(v_tile, key_index, columns, key_length, HEAD_DIM, True)
    # scores, visible, weights, weight_gradient, score_gradient: (BLOCK_M, BLOCK_N)
    scores = product(queries, tl.trans(keys), tl.zeros((rows.shape[0], BLOCK_N), tl.float32))
    if cap_scale is not None:
        scores = tanh(scores * cap_scale, keys.dtype == tl.float32)
    visible = in_reach(key_index[None, :], last_key[:, None], window)
    if DOCUMENTS:
        visible = visible & same_document(
            key_index[None, :], document[:, None], documents, key_length
        )
    weights = tl.where(visible, tl.math.exp2(scores * scale_log2 - lse[:, None]), 0.0)
    weight_gradient = product(
        gradient, tl.trans(values), tl.zeros((rows.shape[0], BLOCK_N), tl.float32)
    )
    if DROP_BELOW > 0:
        keep = keep_tile(seed, plane, rows, first_key, BLOCK_N, DROP_BELOW)
        weight_gradient = tl.where(keep, weight_gradient * keep_scale, 0.0)
    score_gradient = weights * (weight_gradient - row_delta[:, None])
    if cap_scale is not None:
        score_gradient *= 1.0 - scores * scores
    return product(narrow(score_gradient, keys.dtype, IN_INTERPRETER), keys, total)
