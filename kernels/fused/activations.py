"""The feed-forward's activations, each one pass over memory forward and one backward.

``bias_gelu``: y = u * sigmoid(2z), u = x + bias, z = sqrt(2/pi) * (u + 0.044715 u^3). This is
GELU's tanh approximation, since (1 + tanh z) / 2 = sigmoid(2z). Backward computes u again from x,
and sums the bias's gradient in the same pass.

``swiglu``: silu(gate) * value, with channels that alternate gate, value. A tensor shard of whole
rows therefore holds whole pairs.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead.compiler import AheadOfTime
from kernels.derivatives import refuse_second_order, register_gradient
from kernels.fused.rounding import narrow
from kernels.fused.tiles import IN_INTERPRETER
from kernels.launcher import launch

_BLOCK = 1024  # channels for each program


@triton.jit
def _gelu(u):
    """Return GELU of u, and its derivative."""
    square = u * u
    twice_z = 1.5957691216057308 * u * (1.0 + 0.044715 * square)  # 2 * sqrt(2 / pi)
    gate = tl.sigmoid(twice_z)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * square)  # d(2z)/du; 3 * 0.044715
    # sigmoid(-2z), not 1 - gate: u * slope would multiply the rounding error of 1 - gate.
    return u * gate, gate + u * gate * tl.sigmoid(-twice_z) * slope


@triton.jit
def bias_gelu_forward(x, bias, y, channels, BLOCK: tl.constexpr):
    """Compute one block of one row for each program; x and y (rows, channels)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < channels
    offset = tl.program_id(0).to(tl.int64) * channels + column
    u = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) + tl.load(
        bias + column, mask=mask
    ).to(tl.float32)
    result, _ = _gelu(u)
    tl.store(y + offset, narrow(result, y.dtype.element_ty, IN_INTERPRETER), mask=mask)


@triton.jit
def bias_gelu_backward(
    dy, x, bias, dx, dbias, rows, channels, rows_per_program, BLOCK: tl.constexpr
):
    """Compute dx of a run of rows and one block of channels for each program.

    dbias (programs, channels) gets fp32 partial sums.
    """
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < channels
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(first, tl.minimum(first + rows_per_program, rows), num_stages=3):
        offset = row * channels + column
        _, slope = _gelu(tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) + shift)
        gradient = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32) * slope
        total += gradient
        tl.store(dx + offset, narrow(gradient, dx.dtype.element_ty, IN_INTERPRETER), mask=mask)
    tl.store(dbias + program * channels + column, total, mask=mask)


@triton.jit
def swiglu_forward(x, y, count, BLOCK: tl.constexpr):
    """Compute BLOCK results for each program, of ``count``; x holds 2 * count channels."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = first * 2 + tl.arange(0, 2 * BLOCK)
    channels = 2 * tl.cast(count, tl.int64)  # may not fit where count itself does
    gate, value = tl.split(
        tl.load(x + pair, mask=pair < channels, other=0.0).to(tl.float32).reshape(BLOCK, 2)
    )
    offset = first + tl.arange(0, BLOCK)
    result = gate * tl.sigmoid(gate) * value
    tl.store(y + offset, narrow(result, y.dtype.element_ty, IN_INTERPRETER), mask=offset < count)


@triton.jit
def swiglu_backward(dy, x, dx, count, BLOCK: tl.constexpr):
    """Compute the gradients of BLOCK pairs for each program, of ``count``."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = first * 2 + tl.arange(0, 2 * BLOCK)
    channels = 2 * tl.cast(count, tl.int64)  # may not fit where count itself does
    gate, value = tl.split(
        tl.load(x + pair, mask=pair < channels, other=0.0).to(tl.float32).reshape(BLOCK, 2)
    )
    offset = first + tl.arange(0, BLOCK)
    gradient = tl.load(dy + offset, mask=offset < count, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = gradient * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    result = tl.interleave(dgate, gradient * gate * sigmoid)
    tl.store(dx + pair, narrow(result, dx.dtype.element_ty, IN_INTERPRETER), mask=pair < channels)


# ---------------------------------------------------------------------------------------- operators


@torch.library.custom_op("megagpt::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    y = _contiguous_like(x)
    channels = x.shape[-1]
    if x.numel():
        grid = (x.numel() // channels, triton.cdiv(channels, _BLOCK))
        launch(
            bias_gelu_forward, grid, x, x.contiguous(), bias.contiguous(), y, channels, BLOCK=_BLOCK
        )
    return y


@torch.library.custom_op("megagpt::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dx = _contiguous_like(x)
    channels = x.shape[-1]
    if not x.numel():
        return dx, torch.zeros_like(bias)
    rows = x.numel() // channels
    blocks = triton.cdiv(channels, _BLOCK)
    # About 1,000 programs fill the largest GPU several times, with few partial sums to add.
    programs = min(rows, triton.cdiv(1024 if x.is_cuda else 4, blocks))
    partial_sums = x.new_empty(programs, channels, dtype=torch.float32)
    launch(
        bias_gelu_backward,
        (programs, blocks),
        x,
        *(dy.contiguous(), x.contiguous(), bias.contiguous(), dx, partial_sums),
        *(rows, channels, triton.cdiv(rows, programs)),
        BLOCK=_BLOCK,
    )
    return dx, partial_sums.sum(dim=0).to(bias.dtype)


@torch.library.custom_op("megagpt::swiglu", mutates_args=())
def _swiglu(x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if y.numel():
        grid = (triton.cdiv(y.numel(), _BLOCK),)
        launch(swiglu_forward, grid, x, x.contiguous(), y, y.numel(), BLOCK=_BLOCK)
    return y


@torch.library.custom_op("megagpt::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = _contiguous_like(x)
    if dy.numel():
        grid = (triton.cdiv(dy.numel(), _BLOCK),)
        launch(
            swiglu_backward, grid, x, dy.contiguous(), x.contiguous(), dx, dy.numel(), BLOCK=_BLOCK
        )
    return dx


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_bias_gelu.register_fake(lambda x, bias: _contiguous_like(x))
_bias_gelu_backward.register_fake(lambda dy, x, bias: (_contiguous_like(x), torch.empty_like(bias)))
_swiglu.register_fake(lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
_swiglu_backward.register_fake(lambda dy, x: _contiguous_like(x))


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


register_gradient(
    _bias_gelu,
    "bias_gelu",
    lambda ctx, dy: _bias_gelu_backward(dy, *ctx.saved_tensors),
    _save_inputs,
)
register_gradient(
    _swiglu, "swiglu", lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors), _save_inputs
)
refuse_second_order(_bias_gelu_backward, "bias_gelu")
refuse_second_order(_swiglu_backward, "swiglu")


# --------------------------------------------------------------------------------- public functions


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias) in the tanh approximation; x (..., channels), bias (channels,)."""
    return _bias_gelu(x, bias)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * value of x (..., 2 * channels), whose channels alternate gate, value."""
    return _swiglu(x)


def refusal(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Refuse nothing: any number of rows and channels."""
    return None


def _shipped(kernel: Any, signature: dict[str, Any]) -> AheadOfTime:
    return AheadOfTime(kernel.fn.__name__, kernel, signature, {"BLOCK": _BLOCK})


_GELU = {"x": "*bf16", "bias": "*bf16", "channels": "i32:16"}
_GELU_SUMS = {"dbias": "*fp32", "rows": "i32", "rows_per_program": "i32"}
AHEAD_OF_TIME: list[AheadOfTime] = [
    _shipped(bias_gelu_forward, _GELU | {"y": "*bf16"}),
    _shipped(bias_gelu_backward, _GELU | _GELU_SUMS | {"dy": "*bf16", "dx": "*bf16"}),
    _shipped(swiglu_forward, {"x": "*bf16", "y": "*bf16", "count": "i32:16"}),
    _shipped(swiglu_backward, {"dy": "*bf16", "x": "*bf16", "dx": "*bf16", "count": "i32:16"}),
]
