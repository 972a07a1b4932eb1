"""Which queries see which keys: the blocks that an attention kernel visits, and masks in them.

A call may be causal, have a window of recent keys (causal calls only) and documents. The last query
is aligned with the last key, so query i has the position i + key_length - length.
"""

# Triton compiles these functions for the types of each launch; it ignores annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl


@triton.jit
def key_range(
    documents, first_row, rows, length, key_length, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Return the range of keys that a block of queries may see: start, whole_start, whole_end, end.

    Keys from ``whole_start`` to ``whole_end`` need no mask.
    """
    offset = key_length - length
    end = key_length
    whole_end = key_length // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(end, first_row + BLOCK_M + offset))
        whole_end = tl.minimum(whole_end, (first_row + offset + 1) // BLOCK_N * BLOCK_N)
    # Only causal calls need this, but without it ptxas 12.8 serialises the products (C7515).
    whole_end = tl.maximum(0, whole_end)
    start = tl.zeros_like(end)
    if DOCUMENTS:
        # Skip blocks of keys outside all documents of these queries.
        inside = rows < length
        firsts = tl.load(documents + offset + rows, mask=inside, other=key_length)
        lasts = tl.load(documents + key_length + offset + rows, mask=inside, other=-1)
        start = tl.min(firsts) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, tl.max(lasts) + 1)
    whole_start = start
    if window is not None:
        hidden = first_row + offset - window + 1  # keys before the window of the first query
        start = tl.maximum(start, tl.maximum(0, hidden) // BLOCK_N * BLOCK_N)
        hidden += tl.minimum(BLOCK_M, length - first_row) - 1  # ... of the last query
        whole_start = tl.cdiv(tl.maximum(0, hidden), BLOCK_N) * BLOCK_N
        whole_start = tl.minimum(whole_start, end)
        whole_end = tl.maximum(whole_start, whole_end)
    if DOCUMENTS:
        whole_start = start
        whole_end = start
    return start, whole_start, whole_end, end


@triton.jit
def query_range(
    documents, first_key, key_index, length, key_length, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Return the range of queries that may see a block of keys: start, whole_start, whole_end, end.

    Queries from ``whole_start`` to ``whole_end`` need no mask.
    """
    offset = key_length - length
    start = tl.zeros_like(first_key)
    whole_start = start
    end = start + length
    if CAUSAL:
        start = tl.maximum(0, first_key - offset) // BLOCK_M * BLOCK_M
        whole_start = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
    if DOCUMENTS:
        inside = key_index < key_length
        first = tl.min(tl.load(documents + key_index, mask=inside, other=key_length))
        last = tl.max(tl.load(documents + key_length + key_index, mask=inside, other=-1))
        start = tl.maximum(start, tl.maximum(0, first - offset) // BLOCK_M * BLOCK_M)
        end = tl.minimum(end, last + 1 - offset)
    if window is not None:
        end = tl.minimum(end, first_key + BLOCK_N - 1 - offset + window)
    # Keys beyond the end are loaded as zeros. Their score is 0, and exp2(0 - log_sum_exp) may be
    # infinite, so all queries of that block are masked.
    whole_start = end if DOCUMENTS else tl.where(first_key + BLOCK_N > key_length, end, whole_start)
    whole_start = tl.minimum(whole_start, end)
    whole_end = end
    if window is not None:
        within = tl.maximum(0, first_key - offset + window) // BLOCK_M * BLOCK_M
        whole_end = tl.maximum(whole_start, tl.minimum(within, end))
    return start, whole_start, whole_end, end


@triton.jit
def last_visible(query, length, key_length, CAUSAL: tl.constexpr):
    """Return the last key each query may see: its own position if CAUSAL."""
    last = tl.zeros_like(query) + key_length - 1
    if CAUSAL:
        last = tl.minimum(last, query + key_length - length)
    return last


@triton.jit
def in_reach(key, last_key, window):
    """Return whether keys are at most their queries' last, and in the window; both broadcast."""
    reached = key <= last_key
    if window is not None:
        reached = reached & (key > last_key - window)
    return reached


@triton.jit
def same_document(key, query_document, documents, key_length):
    """Return whether keys belong to their queries' documents; both broadcast.

    A document is identified by its first position.
    """
    return tl.load(documents + key, mask=key < key_length, other=-1) == query_document
