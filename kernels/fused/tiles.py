"""Triton functions that kernels share: offsets of tiles, loads, products, dropout masks."""

# Triton compiles these functions for the types of each launch; it ignores annotations.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from kernels.launcher import INTERPRETED
from kernels.verification import proxy_fence

proxy_fence.mend()  # before any function with a product is compiled

IN_INTERPRETER = tl.constexpr(INTERPRETED)


@triton.jit
def tile_offsets(strides, rows, columns):
    """Return the offsets of a (rows, columns) tile from the start of its batch and head.

    ``strides`` are those of a tensor (batch, heads, length, head_dim).
    """
    return rows[:, None] * strides[2] + columns[None, :] * strides[3]


@triton.jit
def head_start(pointer, strides, batch, head, row):
    """Return the pointer to row ``row`` of one head.

    It is computed in 64 bits, since a tensor may hold more than 2^31 elements.
    """
    batch, head, row = tl.cast(batch, tl.int64), tl.cast(head, tl.int64), tl.cast(row, tl.int64)
    return pointer + batch * strides[0] + head * strides[1] + row * strides[2]


@triton.jit
def load_tile(
    pointers, rows, columns, row_limit, COLUMN_LIMIT: tl.constexpr, MASK_ROWS: tl.constexpr
):
    """Load a tile, with zeros beyond ``row_limit`` (if MASK_ROWS) and beyond COLUMN_LIMIT."""
    if columns.shape[0] != COLUMN_LIMIT:
        return tl.load(
            pointers,
            mask=(rows[:, None] < row_limit) & (columns[None, :] < COLUMN_LIMIT),
            other=0.0,
        )
    if MASK_ROWS:
        return tl.load(pointers, mask=rows[:, None] < row_limit, other=0.0)
    return tl.load(pointers)


@triton.jit
def product(a, b, accumulator):
    """Return accumulator + a @ b in fp32; fp32 operands are multiplied in fp32, not TF32.

    The interpreter multiplies the bit patterns of bf16 operands (triton-lang/triton#11584), so
    there they are converted first.
    """
    if IN_INTERPRETER:
        return accumulator + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def keep_tile(seed, plane, rows, first_column, COLUMNS: tl.constexpr, DROP_BELOW: tl.constexpr):
    """Return True where dropout keeps an element: a tile of ``kernels.philox.keep_mask``.

    Four neighbouring columns share a Philox call; ``first_column`` is a multiple of 4. DROP_BELOW
    is the probability of dropping times 2^32.
    """
    groups = first_column // 4 + tl.arange(0, COLUMNS // 4)
    row = rows[:, None] + tl.zeros_like(groups)[None, :]
    group = tl.zeros_like(rows)[:, None] + groups[None, :]
    a, b, c, d = tl.philox(seed, group, row, tl.zeros_like(row) + plane, tl.zeros_like(row))
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # (rows, COLUMNS)
    return words >= tl.full((1, 1), DROP_BELOW, tl.uint32)
