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
from kernels.fused.rounding import narrow
from kernels.fused.tiles import IN_INTERPRETER, head_start
from kernels.launcher import cdiv, launch, power_of_2
from kernels.operators import operator

_ROWS = 32  # positions for each program


@triton.jit
def rotary_rotate(
    x, cosine, sine, y, x_strides, y_strides, heads, length, half,
    ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    BATCHED: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS positions of one head for each program.

    x and y (batch, heads, length, 2 * half + REST), cosine and sine (length, half), or (batch,
    length, half) if BATCHED. HALF and REST_BLOCK are ``half`` and REST rounded up to a power of
    two. The last REST channels are copied.
    """
    # Blocks and heads share the grid's first axis: the other axes end at 65,535.
    blocks = tl.cdiv(length, ROWS)
    plane = tl.program_id(0) // blocks
    batch, head = plane // heads, plane % heads
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, HALF).to(tl.int64)
    mask = (row < length)[:, None] & (column < half)[None, :]
    angle = row[:, None] * half + column[None, :]
    if BATCHED:
        angle += batch.to(tl.int64) * length * half
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
    if REST > 0:
        local = tl.arange(0, REST_BLOCK).to(tl.int64)
        kept = 2 * far + local
        mask = (row < length)[:, None] & (local < REST)[None, :]
        source = head_start(x, x_strides, batch, head, 0)
        source += row[:, None] * x_strides[2] + kept[None, :] * x_strides[3]
        target = head_start(y, y_strides, batch, head, 0)
        target += row[:, None] * y_strides[2] + kept[None, :] * y_strides[3]
        tl.store(target, tl.load(source, mask=mask, other=0.0), mask=mask)


@operator("rotary")
def _rotary(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    y = _output(x, cosine, sine, backward)
    batch, heads, length, head_dim = x.shape
    if y.numel() == 0:
        return y
    half = cosine.shape[-1]
    rest = head_dim - 2 * half
    launch(
        rotary_rotate,
        (cdiv(length, _ROWS) * batch * heads,),
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
            half,
        ),
        ROWS=_ROWS,
        HALF=power_of_2(half),
        REST=rest,
        REST_BLOCK=power_of_2(max(rest, 1)),
        BATCHED=cosine.dim() > 2,
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


_rotary.register_gradient("rotary", _gradient, _save)


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Compute ``kernels.reference.rotary``; the tables get no gradient."""
    return _rotary(x, cosine, sine, False)


def refusal(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Refuse nothing: any length, any head dimension."""
    return None


def _shipped(head_dim: int) -> AheadOfTime:
    strides = ("i32:16", "i32:16", "i32:16", 1)
    pointers = {"x": "*bf16", "cosine": "*fp32", "sine": "*fp32", "y": "*bf16"}
    sizes: dict[str, Any] = {"heads": "i32", "length": "i32", "half": "i32:16"}
    return AheadOfTime(
        f"rotary_{head_dim}",
        rotary_rotate,
        {**pointers, "x_strides": strides, "y_strides": strides, **sizes},
        {
            "ROWS": _ROWS,
            "HALF": head_dim // 2,
            "REST": 0,
            "REST_BLOCK": 1,
            "BATCHED": False,
            "BACKWARD": False,
        },
    )


AHEAD_OF_TIME: list[AheadOfTime] = [_shipped(64), _shipped(128)]
