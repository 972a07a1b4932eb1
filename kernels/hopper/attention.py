"""Attention on Hopper: a forward in Gluon, and the portable backward.

The kernel is in hopper/forward.py. It runs only on compute capability 9.0, after it and the
portable backward have passed the self-check there. MEGAGPT_HOPPER=0 turns it off, in favour of the
portable forward.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import reference
from kernels.ahead.compiler import AheadOfTime
from kernels.documents import DocumentBounds
from kernels.fused import attention as fused_attention
from kernels.hopper.forward import CONSUMERS, ROWS, attention_forward_hopper
from kernels.launcher import launch
from kernels.operators import operator
from kernels.verification import self_check
from kernels.verification.exact_attention import variant_of

_BLOCK_N = 128  # keys at a time
# By head dimension: how many tiles of keys, and as many of values, fit into shared memory.
_STAGES = {64: 4, 128: 2}
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ALIGNMENT = 8  # elements of 16 bits: TMA needs multiples of 16 bytes
_LARGEST_STRIDE = 2**38  # elements; TMA's strides have 40 bits of bytes


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    document_ids: Tensor | DocumentBounds | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    head_offset: int = 0,
    deterministic: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute ``kernels.reference.attention``, for the calls that ``refusal`` accepts."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _forward(
        q, k, v, scale, causal, deterministic or torch.are_deterministic_algorithms_enabled()
    )
    return out


def refusal(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    document_ids: Tensor | DocumentBounds | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> str | None:
    """Return why this kernel cannot run the call, or None."""
    if dropout:
        return "it has no dropout"
    if document_ids is not None:
        return "it has no document masks"
    if reference.binding_window(window, k) is not None:
        return "it has no window"
    if softcap is not None:
        return "it has no soft cap"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype} is not bfloat16 or float16"
    if q.shape[-1] not in _STAGES:
        return f"head_dim {q.shape[-1]} is neither 64 nor 128"
    if scale is not None and scale <= 0:
        return f"scale {scale} is not positive"
    if not q.numel() or not k.numel():
        return "there is nothing to attend to"
    if causal and q.shape[2] > k.shape[2]:
        return f"the first of {q.shape[2]} queries see none of {k.shape[2]} keys"
    return next(
        (
            reason
            for name, x in (("q", q), ("k", k), ("v", v))
            if (reason := _layout_refusal(name, x))
        ),
        None,
    )


def fault(op: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """Return what this kernel or its backward computes wrongly on this GPU, or None.

    The first call of each kind runs the self-check of both. All rows that ``refusal`` accepts are
    alike for this kernel. The portable backward has code of its own for rows that are not multiples
    of 16 elements, so it is checked alone with such rows, which TMA cannot read.
    """
    *sizes, aligned, causal, documents, window, softcap, dropout, deterministic, gradients = (
        variant_of(q, k, v, **options)
    )
    rest = (causal, documents, window, softcap, dropout, deterministic, gradients)
    found = self_check.verdict(__name__, q.device, q.dtype, (*sizes, True, *rest))
    if found is not None or aligned or not gradients:
        return found
    return self_check.verdict(fused_attention.__name__, q.device, q.dtype, (*sizes, False, *rest))


def _layout_refusal(name: str, x: Tensor) -> str | None:
    """Return why the tensor memory accelerator (TMA) cannot read x, or None.

    It reads rows whose distance is a multiple of 16 bytes.
    """
    if x.stride(3) != 1:
        return f"{name} has stride {x.stride(3)} between channels, not 1"
    for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
        if size > 1 and (stride % _ALIGNMENT or not 0 < stride < _LARGEST_STRIDE):
            return (
                f"{name} has a stride of {stride} elements, not a positive multiple of {_ALIGNMENT}"
            )
    return None


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Return a TMA descriptor of blocks of ``rows`` rows of one head of x.

    x is (batch, heads, length, head_dim).
    """
    if x.data_ptr() % 16:  # a view whose start TMA cannot address
        x = x.clone()
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(_description(x.shape, x.stride(), x.dtype, rows), base=x)
    return descriptor


@functools.lru_cache(maxsize=1024)  # four tensors a call, most of whose shapes return
def _description(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int
) -> dict[str, Any]:
    """Return the checked fields of a descriptor without its tensor, which must not stay alive."""
    head_dim = shape[3]
    # The stride of a dimension of size 1 may be any number; it is not used.
    used = [
        stride if size > 1 else head_dim
        for size, stride in zip(shape[:3], strides[:3], strict=True)
    ]
    like = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    fields = vars(
        TensorDescriptor(
            like, list(shape), [*used, 1], [1, 1, rows, head_dim], _layout(rows, head_dim, dtype)
        )
    )
    return {name: value for name, value in fields.items() if name != "base"}


@functools.cache
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], _DTYPES[dtype])


@operator("attention_forward_hopper")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Return the result and the log2-sum-exp2 of each query's scaled scores.

    The second is fp32 (batch, heads, length).
    """
    out, log_sum_exp = _outputs(q, k, v)
    batch, heads, length, head_dim = q.shape
    rows = CONSUMERS.value * ROWS.value
    launch(
        attention_forward_hopper, (-(-length // rows) * batch * heads,), q,
        _descriptor(q, ROWS.value), _descriptor(k, _BLOCK_N), _descriptor(v, _BLOCK_N),
        _descriptor(out, ROWS.value),
        log_sum_exp, heads, heads // k.shape[1], length, k.shape[2], scale * math.log2(math.e),
        HEAD_DIM=head_dim, BLOCK_N=_BLOCK_N, STAGES=_STAGES[head_dim], CAUSAL=causal, num_warps=4,
    )  # fmt: skip
    return out, log_sum_exp


@_forward.register_fake
def _outputs(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return fused_attention.empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.causal, ctx.deterministic = inputs
    ctx.set_materialize_grads(False)  # of the log-sum-exp, which nobody differentiates
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(
    ctx: Any, out_gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if out_gradient is None:
        return (None,) * 6
    portable = (None, None, ctx.scale, ctx.causal, None, None, 0.0, 0, ctx.deterministic)
    return (
        *fused_attention.backward(out_gradient, *ctx.saved_tensors, *portable),
        None,
        None,
        None,
    )


_forward.register_gradient("attention", _differentiate, _save)


@register_flop_formula(torch.ops.megagpt.attention_forward_hopper)
def _forward_flops(q: Any, k: Any, v: Any, scale: float, causal: bool, *_: Any, **__: Any) -> int:
    return fused_attention.flops(q, k, causal, window=None, backward=False)


def _shipped(head_dim: int, dtype: torch.dtype, causal: bool) -> AheadOfTime:
    """Return one configuration, as ``_forward`` launches it."""
    name = str(_DTYPES[dtype])
    blocks = {"q": ROWS.value, "k": _BLOCK_N, "v": _BLOCK_N, "out": ROWS.value}
    types: dict[str, Any] = {
        tensor: f"tensordesc<{name}[1, 1, {rows}, {head_dim}],{_layout(rows, head_dim, dtype)!r}>"
        for tensor, rows in blocks.items()
    }
    types |= dict.fromkeys(("heads", "group", "length", "key_length"), "i32")
    types |= {"log_sum_exp": "*fp32", "scale_log2": "fp32"}
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_N": _BLOCK_N,
        "STAGES": _STAGES[head_dim],
        "CAUSAL": causal,
    }
    flags = "" if causal else "_full"
    return AheadOfTime(
        f"attention_forward_hopper_{head_dim}_{name}{flags}",
        attention_forward_hopper,
        types,
        constants,
        capability=90,
    )


AHEAD_OF_TIME: list[AheadOfTime] = [
    *(
        _shipped(head_dim, torch.bfloat16, causal)
        for head_dim in _STAGES
        for causal in (True, False)
    ),
    *(_shipped(head_dim, torch.float16, True) for head_dim in _STAGES),
]
