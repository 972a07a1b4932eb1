"""Linear cross-entropy in chunks, with the two functions of a chunk in Triton.

``kernels.chunked_cross_entropy`` does the rest: its products are the library's, which run at full
speed. The loss is limited by memory bandwidth. torch's own reads and writes fp32 copies of the
logits several times; these two functions read the logits twice and write them once.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import chunked_cross_entropy
from kernels.ahead.compiler import AheadOfTime
from kernels.chunked_cross_entropy import SoftCap
from kernels.fused.rounding import narrow
from kernels.fused.soft_cap import tanh
from kernels.fused.tiles import IN_INTERPRETER
from kernels.launcher import cdiv, launch, power_of_2

_BLOCK = 4096  # columns at a time: 16 elements for each thread of 8 warps


@triton.jit(do_not_specialize=["columns"])
def cross_entropy_statistics(
    logits, targets, statistics, vocabulary, softcap, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute one row for each program: maximum, sum of exp(logit - maximum), target's logit.

    The target's logit is -inf if it is not among these columns. logits (rows, vocabulary),
    statistics (3, rows) fp32. ``softcap`` (None: no cap) caps the logits before ``columns``.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    logits += row * vocabulary
    maximum = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(
            tl.float32
        )
        if softcap is not None:
            value = tl.where(column < columns, softcap * tanh(value / softcap, True), value)
        larger = tl.maximum(maximum, tl.max(value, axis=0))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf is NaN
        total = total * tl.exp(maximum - finite) + tl.exp(value - finite)
        maximum = larger
    target = tl.load(targets + row)
    here = (target >= 0) & (target < vocabulary)
    tl.store(statistics + row, maximum)
    tl.store(statistics + rows + row, tl.sum(total, axis=0))
    last = statistics + 2 * rows + row
    target_logit = tl.load(logits + target, mask=here, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        capped = softcap * tanh(target_logit / softcap, True)
        target_logit = tl.where(here & (target < columns), capped, target_logit)
    tl.store(last, target_logit)


@triton.jit(do_not_specialize=["columns"])
def cross_entropy_gradient(
    logits, targets, normaliser, scales, z_loss, vocabulary, softcap, columns, BLOCK: tl.constexpr
):  # fmt: skip
    """Overwrite one block of one row of the logits by their gradient, for each program.

    normaliser (rows, 2) and scales (rows,), as in ``chunked_cross_entropy.RowFunctions``; softcap
    and columns as above.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocabulary
    logits += row * vocabulary
    maximum = tl.load(normaliser + 2 * row)
    log_total = tl.load(normaliser + 2 * row + 1)
    scale = tl.load(scales + row)
    value = tl.load(logits + column, mask=mask, other=0.0).to(tl.float32)
    if softcap is not None:
        ratio = tanh(value / softcap, True)
        slope = tl.where(column < columns, 1.0 - ratio * ratio, 1.0)
        value = tl.where(column < columns, softcap * ratio, value)
    gradient = tl.exp(value - maximum - log_total) * (
        scale * (1.0 + 2.0 * z_loss * (maximum + log_total))
    )
    gradient -= tl.where(column == tl.load(targets + row), scale, 0.0)
    if softcap is not None:
        gradient *= slope
    gradient = tl.where(scale == 0.0, 0.0, gradient)
    tl.store(logits + column, narrow(gradient, logits.dtype.element_ty, IN_INTERPRETER), mask=mask)


def _block(vocabulary: int) -> int:
    return min(_BLOCK, max(16, power_of_2(vocabulary)))


def _run_time(cap: SoftCap) -> tuple[float | None, int | None]:
    """Return softcap and columns, which Triton compiles away if they are None."""
    return (None, None) if cap.softcap is None else (cap.softcap, cap.columns)


def _statistics(logits: Tensor, targets: Tensor, cap: SoftCap) -> Tensor:
    rows, vocabulary = logits.shape
    statistics = logits.new_empty(3, rows, dtype=torch.float32)
    launch(
        cross_entropy_statistics,
        (rows,),
        logits,
        *(logits, targets, statistics, vocabulary, *_run_time(cap)),
        BLOCK=_block(vocabulary),
        num_warps=8,
    )
    return statistics


def _gradient(
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    scales: Tensor,
    z_loss: float,
    cap: SoftCap,
) -> None:
    rows, vocabulary = logits.shape
    block = _block(vocabulary)
    launch(
        cross_entropy_gradient,
        (rows, cdiv(vocabulary, block)),
        logits,
        *(logits, targets, normaliser, scales, z_loss, vocabulary, *_run_time(cap)),
        BLOCK=block,
        num_warps=8,
    )


chunked_cross_entropy.ROW_FUNCTIONS["triton"] = chunked_cross_entropy.RowFunctions(
    _statistics, _gradient
)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Compute ``kernels.chunked_cross_entropy.linear_cross_entropy`` with Triton's functions."""
    return chunked_cross_entropy.linear_cross_entropy(
        hidden, weight, targets, **options, implementation="triton"
    )


def refusal(op: str, *args: Any, **kwargs: Any) -> str | None:
    """Refuse nothing: any number of rows, any vocabulary."""
    return None


def _shipped(kernel: Any, softcap: bool) -> AheadOfTime:
    """Return one of the two functions, as this module launches it."""
    types = {
        **dict.fromkeys(("statistics", "normaliser", "scales"), "*fp32"),
        **dict.fromkeys(("z_loss", "softcap"), "fp32"),
        "logits": "*bf16",
        "targets": "*i64",
        "vocabulary": "i32:16",
        "columns": "i32",
    }
    off = {} if softcap else {"softcap": None, "columns": None}
    name = kernel.fn.__name__ + ("_softcap" if softcap else "")
    return AheadOfTime(name, kernel, types, {"BLOCK": _BLOCK, **off}, num_warps=8)


AHEAD_OF_TIME: list[AheadOfTime] = [
    _shipped(kernel, softcap)
    for kernel in (cross_entropy_statistics, cross_entropy_gradient)
    for softcap in (False, True)
]
