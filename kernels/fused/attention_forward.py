"""Attention forward in Triton: one program for each block of queries, in a loop over its keys.

FlashAttention-2 (Dao 2023): the softmax is rescaled with each block of keys, so scores never leave
the chip. Scores stay unscaled until after the product and enter exp2 as ``score * scale * log2(e) -
maximum``, one fused multiply-add.
"""

# Triton compiles these functions for the types of each launch; it ignores annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from kernels.fused.rounding import narrow
from kernels.fused.tiles import (
    IN_INTERPRETER,
    head_start,
    keep_tile,
    load_tile,
    product,
    tile_offsets,
)


@triton.jit(do_not_specialize=["heads", "head_offset"])
def attention_forward(
    q, k, v, out, log_sum_exp, documents, seeds,
    q_strides, k_strides, v_strides, out_strides,
    heads, group, length, key_length, scale, scale_log2, keep_scale, head_offset,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROP_BELOW: tl.constexpr,
):  # fmt: skip
    """Compute out (batch, heads, length, head_dim) and log_sum_exp (batch * heads, length) fp32.

    log_sum_exp is the log2-sum-exp2 of the scaled scores. ``documents`` (batch, 2, key_length)
    int32: the first and the last position of each position's document. A query that sees no key
    gets a zero row and a log-sum-exp of +inf, which makes its probabilities zero in backward.
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
    start, whole, end = key_range(
        documents, first_row, rows, length, key_length, BLOCK_M, BLOCK_N, CAUSAL, DOCUMENTS
    )
    for first_key in tl.range(start, whole, BLOCK_N):
        maximum, total, weighted = _attend(
            queries, k_head, v_head, k_strides, v_strides, rows, last_key, documents, document,
            seed, head_offset + head, maximum, total, weighted, first_key, key_length, scale_log2,
            keep_scale, HEAD_DIM, BLOCK_DIM, BLOCK_N, DOCUMENTS, DROP_BELOW, False,
        )  # fmt: skip
    for first_key in tl.range(whole, end, BLOCK_N):
        maximum, total, weighted = _attend(
            queries, k_head, v_head, k_strides, v_strides, rows, last_key, documents, document,
            seed, head_offset + head, maximum, total, weighted, first_key, key_length, scale_log2,
            keep_scale, HEAD_DIM, BLOCK_DIM, BLOCK_N, DOCUMENTS, DROP_BELOW, True,
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
def key_range(
    documents, first_row, rows, length, key_length,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Return the range of keys that a block of queries may see: start, whole, end.

    Keys from ``whole`` on need a mask.
    """
    offset = key_length - length
    end = key_length
    whole = key_length // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(end, first_row + BLOCK_M + offset))
        whole = tl.minimum(whole, (first_row + offset + 1) // BLOCK_N * BLOCK_N)
    # Only causal calls need this, but without it ptxas 12.8 serialises the products (C7515).
    whole = tl.maximum(0, whole)
    start = tl.zeros_like(end)
    if DOCUMENTS:
        # Skip blocks of keys outside all documents of these queries.
        inside = rows < length
        firsts = tl.load(documents + offset + rows, mask=inside, other=key_length)
        lasts = tl.load(documents + key_length + offset + rows, mask=inside, other=-1)
        start = tl.min(firsts) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, tl.max(lasts) + 1)
        whole = start
    return start, whole, end


@triton.jit
def _attend(
    queries, k_head, v_head, k_strides, v_strides, rows, last_key, documents, document, seed,
    plane, maximum, total, weighted, first_key, key_length, scale_log2, keep_scale,
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
    if MASKED:
        visible = key_index[None, :] <= last_key[:, None]
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


@triton.jit
def last_visible(query, length, key_length, CAUSAL: tl.constexpr):
    """Return the last key each query may see: its own position if CAUSAL.

    The last query is aligned with the last key.
    """
    last = tl.zeros_like(query) + key_length - 1
    if CAUSAL:
        last = tl.minimum(last, query + key_length - length)
    return last


@triton.jit
def same_document(key, query_document, documents, key_length):
    """Return whether keys belong to their queries' documents; both broadcast.

    A document is identified by its first position.
    """
    return tl.load(documents + key, mask=key < key_length, other=-1) == query_document
