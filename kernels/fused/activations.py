"""The feed-forward's gated activation, one pass over memory forward and one backward.

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
from kernels.fused.rounding import narrow
from kernels.fused.tiles import IN_INTERPRETER
from kernels.launcher import cdiv, launch
from kernels.operators import operator

_BLOCK = 1024  # results for each program


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


@operator("swiglu")
def _swiglu(x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    if y.numel():
        grid = (cdiv(y.numel(), _BLOCK),)
        launch(swiglu_forward, grid, x, x.contiguous(), y, y.numel(), BLOCK=_BLOCK)
    return y


@operator("swiglu_backward")
def _swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = _contiguous_like(x)
    if dy.numel():
        grid = (cdiv(dy.numel(), _BLOCK),)
        launch(
            swiglu_backward, grid, x, dy.contiguous(), x.contiguous(), dx, dy.numel(), BLOCK=_BLOCK
        )
    return dx


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_swiglu.register_fake(lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
_swiglu_backward.register_fake(lambda dy, x: _contiguous_like(x))


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_swiglu.register_gradient(
    "swiglu", lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors), _save_inputs
)
_swiglu_backward.refuse_second_order("swiglu")


# --------------------------------------------------------------------------------- public functions


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * value of x (..., 2 * channels), whose channels alternate gate, value."""
    return _swiglu(x)


def refusal(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Refuse nothing: any number of rows and channels."""
    return None


def _shipped(kernel: Any, signature: dict[str, Any]) -> AheadOfTime:
    return AheadOfTime(kernel.fn.__name__, kernel, signature, {"BLOCK": _BLOCK})


AHEAD_OF_TIME: list[AheadOfTime] = [
    _shipped(swiglu_forward, {"x": "*bf16", "y": "*bf16", "count": "i32:16"}),
    _shipped(swiglu_backward, {"dy": "*bf16", "x": "*bf16", "dx": "*bf16", "count": "i32:16"}),
]
