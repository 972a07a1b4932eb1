"""Dropout in one pass; backward draws the mask again from its counters, so nothing is stored.

The mask is ``kernels.philox.keep_mask``, bit for bit: a function of the sample's seed, the position
and the channel.
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

_BLOCK = 1024  # channels for each program


@triton.jit
def dropout_apply(
    x, seeds, y, length, channels, position_offset, threshold, scale, BLOCK: tl.constexpr
):
    """Apply dropout to one block of one position for each program.

    x and y (batch, length, channels). A random word below ``threshold`` drops its channel.
    """
    row = tl.program_id(0).to(tl.int64)
    sample = row // length
    position = (row % length + position_offset).to(tl.int32)
    seed = tl.load(seeds + sample)
    first = tl.program_id(1) * BLOCK
    group = first // 4 + tl.arange(0, BLOCK // 4)
    zero = group * 0
    # One call of Philox gives four neighbouring channels their words: each (BLOCK / 4,).
    a, b, c, d = tl.philox(seed, group, zero + position, zero, zero)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # (BLOCK,)
    column = first + tl.arange(0, BLOCK)
    mask = column < channels
    offset = row * channels + column
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) * scale
    value = tl.where(words.to(tl.int64) >= threshold, value, 0.0)
    tl.store(y + offset, narrow(value, y.dtype.element_ty, IN_INTERPRETER), mask=mask)


@operator("dropout")
def _dropout(x: Tensor, probability: float, seed: Tensor, position_offset: int) -> Tensor:
    y = _output(x, probability, seed, position_offset)
    batch, length, channels = x.shape
    if y.numel() == 0:
        return y
    launch(
        dropout_apply,
        (batch * length, cdiv(channels, _BLOCK)),
        x,
        *(x.contiguous(), seed.contiguous(), y, length, channels, position_offset),
        *(int(probability * 2**32), 1.0 / (1.0 - probability)),
        BLOCK=_BLOCK,
    )
    return y


@_dropout.register_fake
def _output(x: Tensor, probability: float, seed: Tensor, position_offset: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.probability, seed, ctx.position_offset = inputs
    ctx.save_for_backward(seed)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    (seed,) = ctx.saved_tensors
    return _dropout(dy, ctx.probability, seed, ctx.position_offset), None, None, None


_dropout.register_gradient("dropout", _gradient, _save)


def dropout(x: Tensor, probability: float, *, seed: Tensor, position_offset: int = 0) -> Tensor:
    """Zero elements of x (batch, length, channels) and scale the rest by 1 / (1 - probability).

    ``seed`` (batch,) int64. The mask depends only on it, on the position in the sequence and on the
    channel.
    """
    return _dropout(x, probability, seed, position_offset)


def refusal(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Refuse nothing: any length, any number of channels."""
    return None


_TYPES: dict[str, Any] = {
    "x": "*bf16",
    "seeds": "*i64",
    "y": "*bf16",
    "length": "i32",
    "channels": "i32:16",
    "position_offset": "i32",
    "threshold": "i64",
    "scale": "fp32",
}
AHEAD_OF_TIME: list[AheadOfTime] = [
    AheadOfTime("dropout", dropout_apply, _TYPES, {"BLOCK": _BLOCK})
]
