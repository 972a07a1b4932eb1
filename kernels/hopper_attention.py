"""Attention on Hopper: a forward in Gluon where it applies, the portable backward from the same log-sum-exp.

The kernel is in attention_forward_hopper.py. It runs on compute capability 9.0 alone, after it and the
portable backward have passed the self-check there; MEGAGPT_HOPPER=0 leaves everything to the portable ones.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import costs, fused_attention, self_check
from kernels.attention_forward_hopper import CONSUMERS, ROWS, attention_forward_hopper
from kernels.compile_ahead import AheadOfTime
from kernels.derivatives import register_gradient
from kernels.documents import DocumentBounds
from kernels.exact_attention import variant_of
from kernels.launcher import launch

_BLOCK_N = 128  # keys at a time
_STAGES = {64: 4, 128: 2}  # by head dimension: tiles of keys, and of values, that fit into shared memory
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ALIGNMENT = 8  # elements of 16 bits: TMA counts in 16 bytes
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
) -> Tensor:
    """softmax(q k^T * scale) v for the calls that ``refusal`` lets through, as ``kernels.reference.attention``."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _forward(q, k, v, scale, causal, deterministic or torch.are_deterministic_algorithms_enabled())
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
    **kwargs: Any,
) -> str | None:
    """Why this kernel cannot run the call; None when it can."""
    if dropout:
        return "it has no dropout"
    if document_ids is not None:
        return "it has no document masks"
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
    return next((reason for name, x in (("q", q), ("k", k), ("v", v)) if (reason := _layout_refusal(name, x))), None)


def fault(op: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """What this kernel, or the backward it relies on, computes wrongly on this GPU. The first call checks both.

    To this kernel all rows that ``refusal`` lets through are alike. The portable kernels have code of their own for
    rows that are not whole multiples of 16 elements, and are asked alone: TMA cannot read the rows of that check.
    """
    *calls, aligned, causal, documents, dropout, deterministic, gradients = variant_of(q, k, v, **options)
    rest = (causal, documents, dropout, deterministic, gradients)
    found = self_check.verdict(__name__, q.device, q.dtype, (*calls, True, *rest))
    if found is not None or aligned or not gradients:
        return found
    return self_check.verdict(fused_attention.__name__, q.device, q.dtype, (*calls, False, *rest))


def _layout_refusal(name: str, x: Tensor) -> str | None:
    """Why the tensor memory accelerator cannot read x: what it addresses lies in rows of whole 16 bytes."""
    if x.stride(3) != 1:
        return f"{name} has stride {x.stride(3)} between channels, not 1"
    for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
        if size > 1 and (stride % _ALIGNMENT or not 0 < stride < _LARGEST_STRIDE):
            return f"{name} has a stride of {stride} elements, not a positive multiple of {_ALIGNMENT}"
    return None


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Blocks of ``rows`` rows of one head of x (batch, heads, length, head_dim), for TMA."""
    if x.data_ptr() % 16:  # a view that begins between two addresses TMA knows
        x = x.clone()
    head_dim = x.shape[3]
    # The stride of a dimension of size 1 may be any number, and means nothing.
    strides = [stride if size > 1 else head_dim for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, head_dim], _layout(rows, head_dim, x.dtype))


@functools.cache  # six of its microseconds for each of four tensors, in every call
def _layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, head_dim], _DTYPES[dtype])


@torch.library.custom_op("megagpt::attention_forward_hopper", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, deterministic: bool) -> tuple[Tensor, Tensor]:
    """The result and the log2-sum-exp2 of each query's scaled scores (batch, heads, length) in fp32."""
    out, log_sum_exp = _outputs(q, k, v)
    batch, heads, length, head_dim = q.shape
    rows = CONSUMERS.value * ROWS.value
    launch(
        attention_forward_hopper, (-(-length // rows) * batch * heads,), q,
        _descriptor(q, ROWS.value), _descriptor(k, _BLOCK_N), _descriptor(v, _BLOCK_N), _descriptor(out, ROWS.value),
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


def _differentiate(ctx: Any, out_gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if out_gradient is None:
        return (None,) * 6
    portable = (None, None, ctx.scale, ctx.causal, 0.0, 0, ctx.deterministic)
    return (*fused_attention.backward(out_gradient, *ctx.saved_tensors, *portable), None, None, None)


register_gradient(_forward, "attention", _differentiate, _save)


@register_flop_formula(torch.ops.megagpt.attention_forward_hopper)
def _forward_flops(q: Any, k: Any, v: Any, scale: float, causal: bool, *_: Any, **__: Any) -> int:
    return costs.attention(*q, key_length=k[2], causal=causal, itemsize=2).flops


def _shipped(head_dim: int, dtype: torch.dtype, causal: bool) -> AheadOfTime:
    """One configuration, as ``_forward`` launches it."""
    name = str(_DTYPES[dtype])
    blocks = {"q": ROWS.value, "k": _BLOCK_N, "v": _BLOCK_N, "out": ROWS.value}
    types: dict[str, Any] = {
        tensor: f"tensordesc<{name}[1, 1, {rows}, {head_dim}],{_layout(rows, head_dim, dtype)!r}>"
        for tensor, rows in blocks.items()
    }
    types |= dict.fromkeys(("heads", "group", "length", "key_length"), "i32")
    types |= {"log_sum_exp": "*fp32", "scale_log2": "fp32"}
    constants = {"HEAD_DIM": head_dim, "BLOCK_N": _BLOCK_N, "STAGES": _STAGES[head_dim], "CAUSAL": causal}
    flags = "" if causal else "_full"
    return AheadOfTime(
        f"attention_forward_hopper_{head_dim}_{name}{flags}", attention_forward_hopper, types, constants, capability=90
    )


AHEAD_OF_TIME: list[AheadOfTime] = [
    *(_shipped(head_dim, torch.bfloat16, causal) for head_dim in _STAGES for causal in (True, False)),
    *(_shipped(head_dim, torch.float16, True) for head_dim in _STAGES),
]
