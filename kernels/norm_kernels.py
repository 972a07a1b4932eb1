"""The Triton functions of layer and root-mean-square normalisation; ``kernels.norms`` launches them.

Inputs are contiguous rows; statistics and sums are fp32. CENTRED tells layer norm from RMS norm, and pointers that a
flag switches off may be anything.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.rounding import narrow
from kernels.tiles import IN_INTERPRETER


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_total(x, residual, offsets, mask, RESIDUAL: tl.constexpr):
    """x, or x + residual rounded as it is stored: backward reads the stored sum, so both see the same numbers."""
    value = _load(x, offsets, mask)
    if RESIDUAL:
        value += _load(residual, offsets, mask)
        value = narrow(value, x.dtype.element_ty, IN_INTERPRETER).to(tl.float32)
    return value


@triton.jit
def norm_forward(
    x, residual, weight, bias, y, total, mean, rstd, rows, columns, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows for each program, a whole row (columns <= BLOCK) in registers."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    mask = (row < rows)[:, None] & inside[None, :]
    offsets = row[:, None] * columns + column[None, :]
    value = _load_total(x, residual, offsets, mask, RESIDUAL)
    if RESIDUAL:
        tl.store(total + offsets, narrow(value, total.dtype.element_ty, IN_INTERPRETER), mask=mask)
    if CENTRED:
        average = tl.sum(value, axis=1) / columns
        value = tl.where(mask, value - average[:, None], 0.0)
        tl.store(mean + row, average, mask=row < rows)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / columns + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    value *= scale[:, None] * _load(weight, column, inside)[None, :]
    if BIAS:
        value += _load(bias, column, inside)[None, :]
    tl.store(y + offsets, narrow(value, y.dtype.element_ty, IN_INTERPRETER), mask=mask)


@triton.jit
def norm_forward_wide(
    x, residual, weight, bias, y, total, mean, rstd, columns, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row for each program, in chunks of BLOCK columns: statistics first, then the result."""
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    residual += row * columns
    average = 0.0
    squares = 0.0  # sum of squared distances from the average so far
    for start in tl.range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        value = _load_total(x, residual, column, mask, RESIDUAL)
        if CENTRED:
            # Chan, Golub and LeVeque 1983: merging chunks keeps the precision that E[x^2] - E[x]^2 would lose.
            count = tl.minimum(columns - start, BLOCK).to(tl.float32)
            seen = (start + count).to(tl.float32)
            chunk_average = tl.sum(value, axis=0) / count
            value = tl.where(mask, value - chunk_average, 0.0)
            shift = chunk_average - average
            average += shift * (count / seen)
            squares += shift * shift * (start * (count / seen))
        squares += tl.sum(value * value, axis=0)
    scale = tl.rsqrt(squares / columns + eps)
    tl.store(rstd + row, scale)
    if CENTRED:
        tl.store(mean + row, average)
    for start in tl.range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        value = _load_total(x, residual, column, mask, RESIDUAL)
        if RESIDUAL:
            tl.store(total + row * columns + column, narrow(value, total.dtype.element_ty, IN_INTERPRETER), mask=mask)
        value = (value - average) * scale * _load(weight, column, mask)
        if BIAS:
            value += _load(bias, column, mask)
        tl.store(y + row * columns + column, narrow(value, y.dtype.element_ty, IN_INTERPRETER), mask=mask)


@triton.jit
def norm_backward(
    dy, dtotal, x, weight, mean, rstd, dx, dweight, dbias, rows, columns, rows_per_program,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A run of rows for each program, ROWS at a time; its share of dweight and dbias stays in registers to the end."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    gain = _load(weight, column, inside)[None, :]
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        offsets = row[:, None] * columns + column[None, :]
        gradient = _load(dy, offsets, mask)
        value = _load(x, offsets, mask)
        scale = tl.load(rstd + row, mask=row < last, other=0.0)[:, None]
        if CENTRED:
            value -= tl.load(mean + row, mask=row < last, other=0.0)[:, None]
        normalised = tl.where(mask, value * scale, 0.0)
        weight_sum += gradient * normalised
        if BIAS:
            bias_sum += gradient
        gradient *= gain
        result = gradient - normalised * (tl.sum(gradient * normalised, axis=1) / columns)[:, None]
        if CENTRED:
            result -= (tl.sum(gradient, axis=1) / columns)[:, None]
        result *= scale
        if RESIDUAL:
            result += _load(dtotal, offsets, mask)
        tl.store(dx + offsets, narrow(result, dx.dtype.element_ty, IN_INTERPRETER), mask=mask)
    tl.store(dweight + program * columns + column, tl.sum(weight_sum, axis=0), mask=inside)
    if BIAS:
        tl.store(dbias + program * columns + column, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit
def norm_backward_wide(
    dy, dtotal, x, weight, mean, rstd, dx, columns,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row for each program, in chunks of BLOCK columns: the two row averages first, then the result."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * columns
    scale = tl.load(rstd + row)
    average = 0.0
    if CENTRED:
        average = tl.load(mean + row)
    along = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        gradient = _load(dy + offset, column, mask) * _load(weight, column, mask)
        along += gradient * (_load(x + offset, column, mask) - average) * scale
        plain += gradient
    along_mean = tl.sum(along, axis=0) / columns
    plain_mean = tl.sum(plain, axis=0) / columns
    for start in tl.range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        gradient = _load(dy + offset, column, mask) * _load(weight, column, mask)
        result = gradient - (_load(x + offset, column, mask) - average) * scale * along_mean
        if CENTRED:
            result -= plain_mean
        result *= scale
        if RESIDUAL:
            result += _load(dtotal + offset, column, mask)
        tl.store(dx + offset + column, narrow(result, dx.dtype.element_ty, IN_INTERPRETER), mask=mask)


@triton.jit
def norm_parameter_sums(
    dy, x, mean, rstd, dweight, dbias, rows, columns, rows_per_program,
    CENTRED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of dweight and dbias for one run of rows and one block of columns (wide rows only)."""
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(first, tl.minimum(first + rows_per_program, rows), num_stages=STAGES):
        gradient = _load(dy + row * columns, column, mask)
        value = _load(x + row * columns, column, mask)
        if CENTRED:
            value -= tl.load(mean + row)
        weight_sum += gradient * value * tl.load(rstd + row)
        if BIAS:
            bias_sum += gradient
    tl.store(dweight + program * columns + column, weight_sum, mask=mask)
    if BIAS:
        tl.store(dbias + program * columns + column, bias_sum, mask=mask)
