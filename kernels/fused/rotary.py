"""Rotary position embedding in one pass, for any strides of the input.

The transpose of a rotation is the rotation by the opposite angle. So backward is the same function
with the sine negated, and keeps only the table of angles.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead.compiler import AheadOfTime
from kernels.derivatives import register_gradient
from kernels.fused.rounding import narrow
from kernels.fused.tiles import IN_INTERPRETER, head_start
from kernels.launcher import launch

_ROWS = 32  # positions for each program


@triton.jit
def rotary_rotate(
    x, cosine, sine, y, x_strides, y_strides, heads, length, half,
    ROWS: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS positions of one head for each program.

    x and y (batch, heads, length, 2 * half), cosine and sine (length, half). HALF is ``half``
    rounded up to a power of two.
    """
    # Blocks and heads share the grid's first axis: the other axes end at 65,535.
    blocks = tl.cdiv(length, ROWS)
    plane = tl.program_id(0) // blocks
    batch, head = plane // heads, plane % heads
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, HALF).to(tl.int64)
    mask = (row < length)[:, None] & (column < half)[None, :]
    angle = row[:, None] * half + column[None, :]
    cos = tl.load(cosine + angle, mask=mask, other=0.0)  # (ROWS, HALF), like all loaded
    sin = tl.load(sine + angle, mask=mask, other=0.0)
    if BACKWARD:
        sin = -sin
    far = tl.cast(half, tl.int64)  # from the first channel of a pair to the second
    source = head_start(x, x_strides, batch, head, 0)
    source += row[:, None] * x_strides[2] + column[None, :] * x_strides[3]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + far * x_strides[3], mask=mask, other=0.0).to(tl.float32)
    target = head_start(y, y_strides, batch, head, 0)
    target += row[:, None] * y_strides[2] + column[None, :] * y_strides[3]
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(target, narrow(first * cos - second * sin, dtype, IN_INTERPRETER), mask=mask)
    tl.store(
        target + far * y_strides[3],
        narrow(second * cos + first * sin, dtype, IN_INTERPRETER),
        mask=mask,
    )


@torch.library.custom_op("megagpt::rotary", mutates_args=())
def _rotary(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    y = _output(x, cosine, sine, backward)
    batch, heads, length, head_dim = x.shape
    if y.numel() == 0:
        return y
    launch(
        rotary_rotate,
        (triton.cdiv(length, _ROWS) * batch * heads,),
        x,
        *(
            x,
            cosine.contiguous(),
            sine.contiguous(),
            y,
            x.stride(),
            y.stride(),
            heads,
            length,
            head_dim // 2,
        ),
        ROWS=_ROWS,
        HALF=triton.next_power_of_2(head_dim // 2),
        BACKWARD=backward,
    )
    return y


@_rotary.register_fake
def _output(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosine, sine, ctx.backward = inputs
    ctx.save_for_backward(cosine, sine)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return _rotary(dy, *ctx.saved_tensors, not ctx.backward), None, None, None


register_gradient(_rotary, "rotary", _gradient, _save)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + head_dim / 2) of x by its angle.

    x (batch, heads, length, head_dim); cosine and sine (length, head_dim / 2) in fp32, row t for
    position t. The tables get no gradient.
    """
    return _rotary(x, cosine, sine, False)


def refusal(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Refuse nothing: any length, any even head dimension."""
    return None


def _shipped(head_dim: int) -> AheadOfTime:
    strides = ("i32:16", "i32:16", "i32:16", 1)
    pointers = {"x": "*bf16", "cosine": "*fp32", "sine": "*fp32", "y": "*bf16"}
    sizes: dict[str, Any] = {"heads": "i32", "length": "i32", "half": "i32:16"}
    return AheadOfTime(
        f"rotary_{head_dim}",
        rotary_rotate,
        {**pointers, "x_strides": strides, "y_strides": strides, **sizes},
        {"ROWS": _ROWS, "HALF": head_dim // 2, "BACKWARD": False},
    )


AHEAD_OF_TIME: list[AheadOfTime] = [_shipped(64), _shipped(128)]
