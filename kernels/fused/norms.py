"""Layer and RMS normalisation, forward and backward, fused with the residual addition.

Both norms are limited by memory bandwidth, so the kernels read each byte once: forward moves 2 rows
x columns elements, backward 3, and one more with a residual. Statistics are fp32 for every input
dtype. Rows of up to ``_WIDEST_TILE`` columns stay in registers; wider ones are processed in chunks
and read twice, the second time from cache. Beyond ``_WIDEST_SUMS`` columns a multiprocessor's
registers no longer hold the sums for the parameters either. Then a kernel of its own computes the
averages over rows, and backward moves 5 rows x columns elements.

With z = (x - mean) * rstd and g = dy * (offset + weight), averages over a row (Ba et al. 2016;
RMSNorm drops mean(g) and mean):

    dx = rstd * (g - mean(g) - z * mean(g * z))
    dweight = sum over rows of dy * z       dbias = sum over rows of dy

The sums over rows are fp32 partial sums, one row for each program, and a second reduction adds them
in a fixed order. There are no atomics, so repeated runs give the same bits.

Beside 16-bit activations, parameters may be fp32, and so may the residual stream (as under
autocast). y has the dtype of x, the sum that of the residual, and every gradient that of its input.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.ahead.compiler import AheadOfTime
from kernels.fused.norm_kernels import (
    norm_backward,
    norm_backward_wide,
    norm_forward,
    norm_forward_wide,
    norm_row_averages,
)
from kernels.launcher import cdiv, launch, power_of_2
from kernels.operators import operator

_BOTH = "layer_norm or rms_norm"  # whose operators these are
_WIDEST_TILE = 8192
_CHUNK = 4096  # columns at a time in wider rows
_SUM_CHUNK = 2048  # the same in backward
# The sums over so many columns take 96 of the 255 registers of each of 256 threads.
_WIDEST_SUMS = 6 * _SUM_CHUNK
# Mixed dtypes need more registers than backward has at these widths. So the first limit is lower
# if any tensor is fp32 beside 16 bits, the second if the sum is fp32: then backward stores two
# gradients.
_WIDEST_TILE_MIXED = _WIDEST_TILE // 2
_WIDEST_SUMS_WIDER = _WIDEST_SUMS - _SUM_CHUNK


# ----------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class _Tile:
    """How many rows and columns a program processes at a time, and with how many warps.

    Wide rows are processed in chunks of ``block`` columns.
    """

    rows: int
    block: int
    warps: int
    wide: bool
    stages: int = 3  # of the backward's pipeline of loads


@cache
def _tile(columns: int) -> _Tile:
    if columns > _WIDEST_TILE:
        return _Tile(rows=1, block=_CHUNK, warps=8, wide=True)
    block = max(16, power_of_2(columns))
    rows = min(64, max(1, 4096 // block))
    # 16 elements for each thread: backward keeps seven such tiles in registers, just without
    # spilling. At 8192 columns a third stage would spill on sm_100.
    warps = min(16, max(4, rows * block // 512))
    return _Tile(
        rows=rows, block=block, warps=warps, wide=False, stages=2 if block == _WIDEST_TILE else 3
    )


@cache
def _programs(device: torch.device) -> int:
    """Return the number of programs in backward: two for each multiprocessor, to hide latency."""
    if device.type != "cuda":
        return 4
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@operator("norm_forward")
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (y, x + residual, mean, rstd).

    The sum is empty without a residual, the mean without centring.
    """
    y, total, mean, rstd = _forward_outputs(x, residual, weight, bias, eps, centred, weight_offset)
    columns = x.shape[-1]
    rows = rstd.numel()
    if x.numel() == 0:
        return y, total, mean, rstd
    tile = _tile(columns)
    x, weight = x.contiguous(), weight.contiguous()
    added, shift = (
        like if given is None else given.contiguous()
        for given, like in ((residual, x), (bias, weight))
    )
    pointers = (x, added, weight, shift)
    constants = {
        "CENTRED": centred,
        "RESIDUAL": residual is not None,
        "BIAS": bias is not None,
        "OFFSET": weight_offset,
        "BLOCK": tile.block,
        "num_warps": tile.warps,
    }
    if tile.wide:
        launch(
            norm_forward_wide,
            (rows,),
            x,
            *pointers,
            y,
            total,
            mean,
            rstd,
            columns,
            eps,
            **constants,
        )
    else:
        grid = (cdiv(rows, tile.rows),)
        launch(
            norm_forward,
            grid,
            x,
            *pointers,
            y,
            total,
            mean,
            rstd,
            rows,
            columns,
            eps,
            ROWS=tile.rows,
            **constants,
        )
    return y, total, mean, rstd


@_forward.register_fake
def _forward_outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0)
        if residual is None
        else torch.empty_like(residual, memory_format=torch.contiguous_format),
        x.new_empty(rows if centred else 0, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@operator("norm_backward")
def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    dtype: torch.dtype,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients (dx, dresidual, dparameters); x is what the forward normalised.

    dx has ``dtype``, dresidual the dtype of x; it is empty if the dtypes are the same. dparameters
    (1 + bias, columns) are those of the weight and of the bias.
    """
    dx, dresidual = _input_gradients(x, dtype)
    if x.numel() == 0:
        return dx, dresidual, weight.new_zeros(1 + bias, x.shape[-1])
    x, dy, weight = x.contiguous(), dy.contiguous(), weight.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    run = (
        _backward_wide
        if _is_wide(x.shape[-1], mixed={x.dtype, weight.dtype} != {dtype})
        else _backward_narrow
    )
    partial_sums = run(dy, dtotal, x, weight, mean, rstd, dx, dresidual, bias, weight_offset)
    sums = partial_sums.sum(dim=1)
    return dx, dresidual, sums if sums.dtype == weight.dtype else sums.to(weight.dtype)


@_backward.register_fake
def _backward_outputs(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias: bool,
    dtype: torch.dtype,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return *_input_gradients(x, dtype), weight.new_empty(1 + bias, x.shape[-1])


def _input_gradients(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return empty (dx, dresidual)."""
    own = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dtype == x.dtype:
        return own, x.new_empty(0)
    return torch.empty_like(own, dtype=dtype), own


def _backward_narrow(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dresidual: Tensor,
    bias: bool,
    weight_offset: float,
) -> Tensor:
    """Fill dx, and dresidual unless it is empty.

    Returns partial sums (1 + bias, programs, columns) of the parameters' gradients.
    """
    rows, columns = rstd.numel(), x.shape[-1]
    tile = _tile(columns)
    programs = min(_programs(x.device), cdiv(rows, tile.rows))
    partial_sums = x.new_empty(1 + bias, programs, columns, dtype=torch.float32)
    rows_per_program = cdiv(cdiv(rows, tile.rows), programs) * tile.rows
    launch(
        norm_backward,
        (programs,),
        x,
        *(dy, dy if dtotal is None else dtotal, x, weight, mean, rstd),
        *(dx, dresidual, partial_sums, partial_sums[-1], rows, columns, rows_per_program),
        CENTRED=mean.numel() > 0,
        RESIDUAL=dtotal is not None,
        WIDER=dresidual.numel() > 0,
        BIAS=bias,
        OFFSET=weight_offset,
        ROWS=tile.rows,
        BLOCK=tile.block,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    return partial_sums


def _backward_wide(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    dresidual: Tensor,
    bias: bool,
    weight_offset: float,
) -> Tensor:
    """Fill dx, and dresidual unless it is empty.

    Returns partial sums (1 + bias, programs, columns) of the parameters' gradients.
    """
    rows, columns = rstd.numel(), x.shape[-1]
    parts, chunks = _parts(columns, wider=dresidual.numel() > 0)
    flags: dict[str, Any] = {
        "CENTRED": mean.numel() > 0,
        "OFFSET": weight_offset,
        "BLOCK": _SUM_CHUNK,
        "num_warps": 8,
    }
    averages = rstd.new_empty(2, rows) if parts > 1 else rstd
    if parts > 1:
        launch(
            norm_row_averages,
            (rows,),
            x,
            dy,
            x,
            weight,
            mean,
            rstd,
            averages,
            rows,
            columns,
            STAGES=3,
            **flags,
        )
    # Half as many programs as in the narrow backward: one fills a multiprocessor.
    programs = min(rows, cdiv(_programs(x.device), 2 * parts))
    partial_sums = x.new_empty(1 + bias, programs, columns, dtype=torch.float32)
    launch(
        norm_backward_wide,
        (programs, parts),
        x,
        *(dy, dy if dtotal is None else dtotal, x, weight, mean, rstd, averages),
        *(
            dx,
            dresidual,
            partial_sums[0],
            partial_sums[-1],
            rows,
            columns,
            cdiv(rows, programs),
        ),
        RESIDUAL=dtotal is not None,
        WIDER=dresidual.numel() > 0,
        BIAS=bias,
        AVERAGED=parts > 1,
        CHUNKS=chunks,
        **flags,
    )
    return partial_sums


def _is_wide(columns: int, mixed: bool) -> bool:
    """Return whether backward must process a row in chunks."""
    return columns > (_WIDEST_TILE_MIXED if mixed else _WIDEST_TILE)


def _parts(columns: int, wider: bool) -> tuple[int, int]:
    """Return how many parts backward makes of a wide row's columns, and the chunks of a part."""
    chunks = cdiv(columns, _SUM_CHUNK)
    parts = cdiv(columns, _WIDEST_SUMS_WIDER if wider else _WIDEST_SUMS)
    return parts, cdiv(chunks, parts)


# ----------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, _, ctx.weight_offset = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    ctx.has_bias = bias is not None
    ctx.dtype = x.dtype
    # The weight itself, not a view of it: ZeRO-3 frees a gathered parameter by its identity.
    ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)


def _gradients(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, dmean: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, mean, rstd = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x, dtype=ctx.dtype)
    dtotal = dtotal if ctx.has_residual else None
    dx, dresidual, dparameters = _backward(
        dy, dtotal, x, weight, mean, rstd, ctx.has_bias, ctx.dtype, ctx.weight_offset
    )
    if ctx.dtype == x.dtype:
        dresidual = dx
    dweight, *dbias = dparameters.unbind()
    return (
        dx,
        dresidual if ctx.has_residual else None,
        dweight,
        dbias[0] if dbias else None,
        None,
        None,
        None,
    )


_forward.register_gradient(_BOTH, _gradients, _save)
_backward.refuse_second_order(_BOTH)


# --------------------------------------------------------------------------------- public functions


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``kernels.reference.layer_norm``."""
    return _normalise(x, residual, weight, bias, eps, weight_offset, centred=True)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute ``kernels.reference.rms_norm``."""
    return _normalise(x, residual, weight, None, eps, weight_offset, centred=False)


def refusal(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Refuse nothing: any number of rows, any width."""
    return None


def _normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    centred: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    y, total, _, _ = _forward(x, residual, weight, bias, eps, centred, float(weight_offset))
    return y if residual is None else (y, total)


# ------------------------------------------------------------------------------------ ahead of time


_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("x", "residual", "weight", "bias", "y", "total", "dy", "dtotal", "dx", "dresidual"),
        "*bf16",
    ),
    **dict.fromkeys(("mean", "rstd", "averages", "dweight", "dbias"), "*fp32"),
    "rows": "i32",
    "columns": "i32:16",
    "rows_per_program": "i32",
    "eps": "fp32",
}


def _shipped(
    columns: int,
    centred: bool,
    residual: bool,
    dtype: str = "bf16",
    mixed: bool = False,
    weight_offset: float = 0.0,
) -> list[AheadOfTime]:
    """Return forward and backward at one width, as this module would launch them.

    ``mixed``: parameters and sums in fp32.
    """
    tile = _tile(columns)
    types = {name: f"*{dtype}" if type_ == "*bf16" else type_ for name, type_ in _TYPES.items()}
    if mixed:
        types |= dict.fromkeys(
            ("weight", "bias", "residual", "total", "dtotal", "dresidual"), "*fp32"
        )
    name = "layer_norm" if centred else "rms_norm"
    name += (
        ("_residual" if residual else "")
        + ("" if dtype == "bf16" else f"_{dtype}")
        + ("_mixed" if mixed else "")
        + ("_offset" if weight_offset else "")
    )
    name += f"_{columns}"
    flags = {
        "CENTRED": centred,
        "RESIDUAL": residual,
        "WIDER": mixed,
        "BIAS": centred,
        "OFFSET": weight_offset,
        "STAGES": tile.stages,
    }
    shape = {"ROWS": tile.rows, "BLOCK": tile.block}
    forward = norm_forward_wide if tile.wide else norm_forward
    entries = [AheadOfTime(f"{name}_forward", forward, types, flags | shape, tile.warps)]
    if mixed:
        types = types | {"x": "*fp32"}  # backward reads the sum
    if not _is_wide(columns, mixed):
        return [
            *entries,
            AheadOfTime(f"{name}_backward", norm_backward, types, flags | shape, tile.warps),
        ]
    parts, chunks = _parts(columns, mixed)
    flags |= {"BLOCK": _SUM_CHUNK, "CHUNKS": chunks, "AVERAGED": parts > 1}
    entries.append(AheadOfTime(f"{name}_backward", norm_backward_wide, types, flags, 8))
    if parts > 1:
        entries.append(AheadOfTime(f"{name}_row_averages", norm_row_averages, types, flags, 8))
    return entries


AHEAD_OF_TIME: list[AheadOfTime] = [
    *_shipped(768, centred=True, residual=False),
    *_shipped(4096, centred=True, residual=True),
    *_shipped(8192, centred=True, residual=True),
    *_shipped(12288, centred=True, residual=True),
    *_shipped(16384, centred=True, residual=True),
    *_shipped(768, centred=False, residual=False),
    *_shipped(4096, centred=False, residual=True),
    *_shipped(8192, centred=False, residual=True),
    *(
        entry
        for columns in (2304, 8192, 16384)  # Gemma 2's smallest width, and the other kernels
        for entry in _shipped(columns, centred=False, residual=True, weight_offset=1.0)
    ),
    *(
        entry
        for columns in (4096, 8192, 12288)
        for entry in _shipped(columns, centred=True, residual=True, mixed=True)
    ),
    *(
        entry
        for dtype in ("fp16", "fp32")
        for entry in _shipped(768, centred=True, residual=False, dtype=dtype)
    ),
    *(
        entry
        for dtype in ("fp16", "fp32")
        for entry in _shipped(8192, centred=True, residual=True, dtype=dtype)
    ),
]
