"""Attention forward in Triton: one program for each block of queries, in a loop over its keys.

FlashAttention-2 (Dao 2023): the softmax is rescaled with each block of keys, so scores never leave
the chip. Scores stay unscaled until after the product and enter exp2 as ``score * scale * log2(e) -
maximum``, one fused multiply-add.
"""

# Triton compiles these functions for the types of each launch; it ignores annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from kernels.fused.attention_masks import in_reach, key_range, last_visible, same_document
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


@triton.jit(do_not_specialize=["heads", "head_offset", "window"])
def attention_forward(
    q, k, v, out, log_sum_exp, documents, seeds,
    q_strides, k_strides, v_strides, out_strides,
    heads, group, length, key_length, window, scale, scale_log2, cap_scale, keep_scale, head_offset,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROP_BELOW: tl.constexpr,
):  # fmt: skip
    """Compute out (batch, heads, length, head_dim) and log_sum_exp (batch * heads, length) fp32.

    log_sum_exp is the log2-sum-exp2 of the scaled scores. ``documents`` (batch, 2, key_length)
    int32: the first and the last position of each position's document. ``window`` is None or the
    number of keys that a query sees. With a soft cap, ``cap_scale`` is scale / softcap, else None;
    scores are then tanh(cap_scale * product), and ``scale_log2`` is softcap * log2(e). A query that
    sees no key gets a zero row and a log-sum-exp of +inf, which makes its probabilities zero in
    backward.
    """
    blocks = tl.cdiv(length, BLOCK_M)
    # Causal work grows with the row: the longest programs start first, and short ones fill the
    # last wave.
    block = blocks - 1 - tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    batch, head = plane // heads, plane % heads
    first_row = block * BLOCK_M
    local_rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DIM)
    rows = first_row + local_rows
    q_tile = head_start(q, q_strides, batch, head, first_row) + tile_offsets(
        q_strides, local_rows, columns
    )
    queries = load_tile(q_tile, rows, columns, length, HEAD_DIM, True)  # (BLOCK_M, BLOCK_DIM)
    k_head = head_start(k, k_strides, batch, head // group, 0)
    v_head = head_start(v, v_strides, batch, head // group, 0)
    seed = 0
    if DROP_BELOW > 0:
        seed = tl.load(seeds + batch)

    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_DIM), tl.float32)
    last_key = last_visible(rows, length, key_length, CAUSAL)
    document = rows
    if DOCUMENTS:
        documents += tl.cast(batch, tl.int64) * 2 * key_length
        document = tl.load(documents + key_length - length + rows, mask=rows < length, other=-1)
    start, whole_start, whole_end, end = key_range(
        documents, first_row, rows, length, key_length, window, BLOCK_M, BLOCK_N, CAUSAL, DOCUMENTS
    )
    for first_key in tl.range(whole_start, whole_end, BLOCK_N):
        maximum, total, weighted = _attend(
            queries, k_head, v_head, k_strides, v_strides, rows, last_key, documents, document,
            seed, head_offset + head, maximum, total, weighted, first_key, key_length, window,
            scale_log2, cap_scale, keep_scale, HEAD_DIM, BLOCK_DIM, BLOCK_N, DOCUMENTS, DROP_BELOW,
            False,
        )  # fmt: skip
    # The blocks before and after them, in one loop: each loop costs registers and instructions.
    gap = whole_end - whole_start
    for step in tl.range(start + gap, end, BLOCK_N):
        first_key = step
        if window is not None:
            first_key = tl.where(step < whole_end, step - gap, step)
        maximum, total, weighted = _attend(
            queries, k_head, v_head, k_strides, v_strides, rows, last_key, documents, document,
            seed, head_offset + head, maximum, total, weighted, first_key, key_length, window,
            scale_log2, cap_scale, keep_scale, HEAD_DIM, BLOCK_DIM, BLOCK_N, DOCUMENTS, DROP_BELOW,
            True,
        )  # fmt: skip

    seen = total > 0.0
    result = weighted / tl.where(seen, total, 1.0)[:, None]
    out_tile = head_start(out, out_strides, batch, head, first_row) + tile_offsets(
        out_strides, local_rows, columns
    )
    inside = (rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
    tl.store(out_tile, narrow(result, out.dtype.element_ty, IN_INTERPRETER), mask=inside)
    lse = tl.where(seen, maximum + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    tl.store(log_sum_exp + plane.to(tl.int64) * length + rows, lse, mask=rows < length)


@triton.jit
def _attend(
    queries, k_head, v_head, k_strides, v_strides, rows, last_key, documents, document, seed,
    plane, maximum, total, weighted, first_key, key_length, window, scale_log2, cap_scale,
    keep_scale,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROP_BELOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running softmax (maximum, total) and to the weighted values."""
    local_keys, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_DIM)
    key_index = first_key + local_keys
    k_tile = (
        k_head
        + tl.cast(first_key, tl.int64) * k_strides[2]
        + tile_offsets(k_strides, local_keys, columns)
    )
    v_tile = (
        v_head
        + tl.cast(first_key, tl.int64) * v_strides[2]
        + tile_offsets(v_strides, local_keys, columns)
    )

    keys = load_tile(k_tile, key_index, columns, key_length, HEAD_DIM, MASKED)
    # scores, visible, weights: (BLOCK_M, BLOCK_N)
    scores = product(queries, tl.trans(keys), tl.zeros((rows.shape[0], BLOCK_N), tl.float32))
    if cap_scale is not None:
        scores = tanh(scores * cap_scale, queries.dtype == tl.float32)
    if MASKED:
        visible = in_reach(key_index[None, :], last_key[:, None], window)
        if DOCUMENTS:
            visible = visible & same_document(
                key_index[None, :], document[:, None], documents, key_length
            )
        scores = tl.where(visible, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)  # (BLOCK_M,)
    reference = new_maximum
    if MASKED:  # a row that has seen no key yet would compute exp2(-inf - -inf), which is NaN
        reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.math.exp2(scores * scale_log2 - reference[:, None])
    rescale = tl.math.exp2(maximum - reference)
    total = total * rescale + tl.sum(weights, 1)
    if DROP_BELOW > 0:
        keep = keep_tile(seed, plane, rows, first_key, BLOCK_N, DROP_BELOW)
        weights = tl.where(keep, weights * keep_scale, 0.0)
    values = load_tile(v_tile, key_index, columns, key_length, HEAD_DIM, MASKED)
    # (BLOCK_M, BLOCK_DIM)
    weighted = product(
        narrow(weights, values.dtype, IN_INTERPRETER), values, weighted * rescale[:, None]
    )
    return new_maximum, total, weighted
