"""The Triton functions of layer and RMS normalisation; ``kernels.fused.norms`` launches them.

Inputs are contiguous rows, each tensor with a dtype of its own; statistics and sums are fp32.
CENTRED selects layer norm, otherwise it is RMS norm. Normalised values are multiplied by OFFSET +
weight. A pointer that a flag switches off may be anything.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from kernels.fused.rounding import narrow
from kernels.fused.tiles import IN_INTERPRETER


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_gain(weight, column, mask, OFFSET: tl.constexpr):
    """Return the factors of normalised values, OFFSET + weight, in fp32."""
    gain = _load(weight, column, mask)
    if OFFSET != 0.0:
        gain += OFFSET
    return gain


@triton.jit
def _load_total(x, residual, total, offsets, mask, RESIDUAL: tl.constexpr):
    """Return x, or x + residual rounded as it is stored.

    Backward reads the stored sum, so forward must use the same numbers.
    """
    value = _load(x, offsets, mask)
    if RESIDUAL:
        value += _load(residual, offsets, mask)
        value = narrow(value, total.dtype.element_ty, IN_INTERPRETER).to(tl.float32)
    return value


@triton.jit
def norm_forward(
    x, residual, weight, bias, y, total, mean, rstd, rows, columns, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows for each program, a whole row (columns <= BLOCK) in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    mask = (row < rows)[:, None] & inside[None, :]
    offsets = row[:, None] * columns + column[None, :]  # (ROWS, BLOCK), like mask and value
    value = _load_total(x, residual, total, offsets, mask, RESIDUAL)
    if RESIDUAL:
        tl.store(total + offsets, narrow(value, total.dtype.element_ty, IN_INTERPRETER), mask=mask)
    if CENTRED:
        average = tl.sum(value, axis=1) / columns  # (ROWS,)
        value = tl.where(mask, value - average[:, None], 0.0)
        tl.store(mean + row, average, mask=row < rows)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / columns + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    value *= scale[:, None] * _load_gain(weight, column, inside, OFFSET)[None, :]
    if BIAS:
        value += _load(bias, column, inside)[None, :]
    tl.store(y + offsets, narrow(value, y.dtype.element_ty, IN_INTERPRETER), mask=mask)


@triton.jit
def norm_forward_wide(
    x, residual, weight, bias, y, total, mean, rstd, columns, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise one row for each program, in chunks of BLOCK columns: statistics, then result."""
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    residual += row * columns
    average = 0.0
    squares = 0.0  # sum of squared distances from the average so far
    for start in tl.range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < columns
        value = _load_total(x, residual, total, column, mask, RESIDUAL)
        if CENTRED:
            # Chan, Golub and LeVeque 1983: merge the chunks' squared distances, because
            # E[x^2] - E[x]^2 would lose precision.
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
        value = _load_total(x, residual, total, column, mask, RESIDUAL)
        if RESIDUAL:
            tl.store(
                total + row * columns + column,
                narrow(value, total.dtype.element_ty, IN_INTERPRETER),
                mask=mask,
            )
        value = (value - average) * scale * _load_gain(weight, column, mask, OFFSET)
        if BIAS:
            value += _load(bias, column, mask)
        tl.store(
            y + row * columns + column, narrow(value, y.dtype.element_ty, IN_INTERPRETER), mask=mask
        )


@triton.jit
def norm_backward(
    dy, dtotal, x, weight, mean, rstd, dx, dresidual, dweight, dbias,
    rows, columns, rows_per_program,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, WIDER: tl.constexpr, BIAS: tl.constexpr,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx of a run of rows for each program, ROWS at a time.

    The program's share of dweight and dbias stays in registers to the end. WIDER: the residual's
    dtype differs from that of x, so the same gradient is stored in both dtypes.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    gain = _load_gain(weight, column, inside, OFFSET)[None, :]
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        offsets = row[:, None] * columns + column[None, :]  # (ROWS, BLOCK), like all loaded there
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
        if WIDER:
            tl.store(dresidual + offsets, result, mask=mask)
    tl.store(dweight + program * columns + column, tl.sum(weight_sum, axis=0), mask=inside)
    if BIAS:
        tl.store(dbias + program * columns + column, tl.sum(bias_sum, axis=0), mask=inside)


@triton.jit
def norm_backward_wide(
    dy, dtotal, x, weight, mean, rstd, averages, dx, dresidual, dweight, dbias,
    rows, columns, rows_per_program,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, WIDER: tl.constexpr, BIAS: tl.constexpr,
    OFFSET: tl.constexpr, AVERAGED: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``norm_backward`` for CHUNKS * BLOCK columns of a run of rows, one row at a time.

    Each row is loaded twice, the second time from the cache. If these columns are the whole row,
    the first pass computes its averages. Otherwise (AVERAGED) ``averages`` (2, rows) has them, from
    norm_row_averages.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    start = tl.program_id(1) * (CHUNKS * BLOCK)
    weight_sums = ()
    bias_sums = ()
    for _ in tl.static_range(CHUNKS):
        weight_sums += (tl.zeros((BLOCK,), tl.float32),)
        bias_sums += (tl.zeros((BLOCK,), tl.float32),)
    # No hoisting of the weights out of the loop: they would take the registers that the sums need
    # (triton 3.6 spilled).
    for row in tl.range(first, tl.minimum(first + rows_per_program, rows), disable_licm=True):
        scale = tl.load(rstd + row)
        centre = 0.0
        if CENTRED:
            centre = tl.load(mean + row)
        if AVERAGED:
            along_mean = tl.load(averages + row)
            plain_mean = tl.load(averages + rows + row)
        else:
            along = tl.zeros((BLOCK,), tl.float32)
            plain = tl.zeros((BLOCK,), tl.float32)
            for chunk in tl.static_range(CHUNKS):
                column = chunk * BLOCK + tl.arange(0, BLOCK)
                along, plain = _add_chunk(
                    dy, x, weight, row * columns, column, columns, centre, along, plain, OFFSET
                )
            along_mean = tl.sum(along, axis=0) * scale / columns
            plain_mean = tl.sum(plain, axis=0) / columns
        new_weight_sums = ()
        new_bias_sums = ()
        for chunk in tl.static_range(CHUNKS):
            column = start + chunk * BLOCK + tl.arange(0, BLOCK)
            mask = column < columns
            gradient = _load(dy, row * columns + column, mask)
            normalised = tl.where(
                mask, (_load(x, row * columns + column, mask) - centre) * scale, 0.0
            )
            new_weight_sums += (weight_sums[chunk] + gradient * normalised,)
            new_bias_sums += (bias_sums[chunk] + gradient,)
            gain = _load_gain(weight, column, mask, OFFSET)
            result = gradient * gain - normalised * along_mean
            if CENTRED:
                result -= plain_mean
            result *= scale
            if RESIDUAL:
                result += _load(dtotal, row * columns + column, mask)
            tl.store(
                dx + row * columns + column,
                narrow(result, dx.dtype.element_ty, IN_INTERPRETER),
                mask=mask,
            )
            if WIDER:
                tl.store(dresidual + row * columns + column, result, mask=mask)
        weight_sums = new_weight_sums
        bias_sums = new_bias_sums
    for chunk in tl.static_range(CHUNKS):
        column = start + chunk * BLOCK + tl.arange(0, BLOCK)
        tl.store(dweight + program * columns + column, weight_sums[chunk], mask=column < columns)
        if BIAS:
            tl.store(dbias + program * columns + column, bias_sums[chunk], mask=column < columns)


@triton.jit
def norm_row_averages(
    dy, x, weight, mean, rstd, averages, rows, columns,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the averages over one row for each program that dx needs: of g * z, and of g."""
    row = tl.program_id(0).to(tl.int64)
    centre = 0.0
    if CENTRED:
        centre = tl.load(mean + row)
    along = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, columns, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        along, plain = _add_chunk(
            dy, x, weight, row * columns, column, columns, centre, along, plain, OFFSET
        )
    tl.store(averages + row, tl.sum(along, axis=0) * tl.load(rstd + row) / columns)
    tl.store(averages + rows + row, tl.sum(plain, axis=0) / columns)


@triton.jit
def _add_chunk(
    dy, x, weight, offset, column, columns, centre, along, plain, OFFSET: tl.constexpr
):  # fmt: skip
    """Add one chunk's part to the sums of g * (x - mean) and of g."""
    mask = column < columns
    gradient = _load(dy, offset + column, mask) * _load_gain(weight, column, mask, OFFSET)
    return along + gradient * (_load(x, offset + column, mask) - centre), plain + gradient
