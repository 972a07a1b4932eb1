"""Fused attention: the public function, its two custom operators and their gradients.

The kernels are in attention_forward.py and attention_backward.py, their block sizes in
attention_tiles.py. As custom operators with shape functions they work under torch.compile, and
torch's FLOP counter counts them.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import costs, reference
from kernels.documents import DocumentBounds, document_bounds
from kernels.fused.attention_ahead import AHEAD_OF_TIME as AHEAD_OF_TIME
from kernels.fused.attention_backward import (
    attention_backward_delta,
    attention_backward_keys,
    attention_backward_queries,
)
from kernels.fused.attention_forward import attention_forward
from kernels.fused.attention_tiles import MAXIMUM_HEAD_DIM, Tiles, padded, tiles_for
from kernels.launcher import launch
from kernels.operators import operator
from kernels.verification import self_check
from kernels.verification.exact_attention import variant_of

_ROWS_PER_DELTA_BLOCK = 64
_NO_GRADIENTS = (None,) * 9  # of the arguments after q, k and v


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
    """Compute ``kernels.reference.attention`` without storing the scores.

    Memory grows with length, not with its square. The result is stored as (batch, length, heads,
    head_dim), so merging the heads needs no copy. With ``deterministic``, or torch's deterministic
    algorithms, repeated backward passes give the same bits; they take seven matrix products for
    each score instead of five. Blocks of keys outside the window are not visited.
    """
    documents = (
        None if document_ids is None else document_bounds(document_ids).positions.contiguous()
    )
    seed = None if not dropout or dropout_seed is None else dropout_seed.contiguous()
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    window = reference.binding_window(window, k)
    out, _ = _forward(
        q, k, v, documents, seed, scale, causal, window, softcap, dropout, head_offset,
        deterministic,
    )  # fmt: skip
    return out


def refusal(
    op: str, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **kwargs: Any
) -> str | None:
    """Return why the fused kernels cannot run this call, or None."""
    if q.shape[-1] > MAXIMUM_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is above {MAXIMUM_HEAD_DIM}"
    if scale is not None and scale <= 0:
        return f"scale {scale} is not positive"
    return None


def fault(op: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """Return what these kernels compute wrongly on this GPU, or None.

    The first call of each kind runs the self-check.
    """
    if not q.numel() or not k.numel():
        return None  # nothing would be launched
    return self_check.verdict(__name__, q.device, q.dtype, variant_of(q, k, v, **options))


def empty_heads_last(like: Tensor) -> Tensor:
    """Return an uninitialised tensor of the shape of ``like``, stored as (b, length, heads, d).

    ``like`` is (batch, heads, length, head_dim).
    """
    shape = like.shape
    _, heads, length, head_dim = shape
    row = heads * head_dim
    return like.new_empty_strided(shape, (length * row, head_dim, row, 1))


def _addressable(x: Tensor) -> Tensor:
    """Return x, copied if an offset within one block of it would need more than 31 bits."""
    _, _, row, channel = x.stride()
    return x.contiguous() if row >= 2**23 or channel >= 2**23 else x  # of 256 rows or channels


class _Settings(NamedTuple):
    """The numbers of one call that its kernels share."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    dropout: float
    head_offset: int


class _Plan(NamedTuple):
    """What a launch is told beside its tensors: block sizes, run-time and compile-time arguments.

    Triton compiles a run-time argument of None away.
    """

    tiles: Tiles
    scalars: tuple[float | None, ...]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=1024)  # computing it again would take longer than a short kernel
def _plan(
    phase: str,
    settings: _Settings,
    documents: bool,
    q: torch.Size,
    k: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
) -> _Plan:
    """Return the plan of one pass for queries and keys of these shapes."""
    scale, causal, window, softcap, dropout, head_offset = settings
    tiles = tiles_for(
        phase,
        q[3],
        dtype,
        device,
        dropout=dropout > 0,
        documents=documents,
        window=window is not None,
        softcap=softcap is not None,
    )
    scalars = (
        q[1],  # heads
        q[1] // k[1],  # group
        q[2],  # length
        k[2],  # key_length
        window,
        scale,
        math.log2(math.e) * (softcap or scale),  # scale_log2
        scale / softcap if softcap else None,  # cap_scale
        1.0 / (1.0 - dropout),  # keep_scale
        head_offset,
    )
    constants = {
        "HEAD_DIM": q[3],
        "BLOCK_DIM": padded(q[3]),
        "CAUSAL": causal,
        "DOCUMENTS": documents,
        "DROP_BELOW": int(dropout * 2**32),
        **tiles.options(),
    }
    return _Plan(tiles, scalars, constants)


def _blocks(length: int, block: int, x: Tensor) -> tuple[int]:
    """Return a grid of one program for each block of each head of x."""
    return (-(-length // block) * x.shape[0] * x.shape[1],)


@operator("attention_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
    head_offset: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Return the result and the log2-sum-exp2 of each query's scaled scores.

    The second is fp32 (batch, heads, length).
    """
    out = empty_heads_last(q)
    log_sum_exp = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not out.numel() or not k.numel():
        return out.zero_(), log_sum_exp.fill_(math.inf)
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    settings = _Settings(scale, causal, window, softcap, dropout, head_offset)
    plan = _plan("forward", settings, documents is not None, q.shape, k.shape, q.dtype, q.device)
    launch(
        attention_forward, _blocks(q.shape[2], plan.tiles.BLOCK_M, q), q,
        q, k, v, out, log_sum_exp, documents, seed,
        q.stride(), k.stride(), v.stride(), out.stride(), *plan.scalars, **plan.constants,
    )  # fmt: skip
    return out, log_sum_exp


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("attention_backward")
def backward(
    out_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    documents: Tensor | None,
    seed: Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    dropout: float,
    head_offset: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    dq, dk = empty_heads_last(q), empty_heads_last(k)
    dv = torch.empty_like(dk)  # which keeps the order of its dimensions
    if not out.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, out_gradient = (
        _addressable(q),
        _addressable(k),
        _addressable(v),
        _addressable(out_gradient),
    )
    delta = torch.empty_like(log_sum_exp)  # (batch, heads, length), fp32
    _launch_delta(out, out_gradient, delta)
    inputs = (q, k, v, out_gradient, log_sum_exp, delta)
    masks = (documents, seed)
    settings = _Settings(scale, causal, window, softcap, dropout, head_offset)
    if deterministic:
        _launch_keys(inputs, (dq, dk, dv), masks, settings, add_query_gradient=False)
        _launch_queries(inputs, dq, masks, settings)
        return dq, dk, dv
    total = torch.empty_like(dq, dtype=torch.float32).zero_()
    _launch_keys(inputs, (total, dk, dv), masks, settings, add_query_gradient=True)
    return torch.mul(total, scale, out=dq), dk, dv


@backward.register_fake
def _(
    out_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)


def _launch_delta(out: Tensor, out_gradient: Tensor, delta: Tensor) -> None:
    """Fill delta, the sum of out * out_gradient over the channels of each row."""
    _, heads, length, head_dim = out.shape
    launch(
        attention_backward_delta, _blocks(length, _ROWS_PER_DELTA_BLOCK, out), out,
        out, out_gradient, delta, out.stride(), out_gradient.stride(), heads, length,
        HEAD_DIM=head_dim, BLOCK_DIM=padded(head_dim), BLOCK_M=_ROWS_PER_DELTA_BLOCK,
    )  # fmt: skip


def _launch_keys(
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    settings: _Settings,
    *,
    add_query_gradient: bool,
) -> None:
    """Fill dk and dv, one program for each block of keys.

    With ``add_query_gradient`` also add dq / scale to an fp32 buffer. ``masks`` are the documents
    and dropout's seeds.
    """
    q, k, v, out_gradient, _, _ = inputs
    dq, dk, dv = gradients
    plan = _plan(
        "backward_keys", settings, masks[0] is not None, q.shape, k.shape, q.dtype, q.device
    )
    launch(
        attention_backward_keys, _blocks(k.shape[2], plan.tiles.BLOCK_N, k), q,
        *inputs, dq, dk, dv, *masks,
        q.stride(), k.stride(), v.stride(), out_gradient.stride(),
        dq.stride(), dk.stride(), dv.stride(),
        *plan.scalars, **plan.constants, ADD_QUERY_GRADIENT=add_query_gradient,
    )  # fmt: skip


def _launch_queries(
    inputs: tuple[Tensor, ...],
    dq: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    settings: _Settings,
) -> None:
    """Fill dq, one program for each block of queries."""
    q, k, v, out_gradient, _, _ = inputs
    plan = _plan(
        "backward_queries", settings, masks[0] is not None, q.shape, k.shape, q.dtype, q.device
    )
    launch(
        attention_backward_queries, _blocks(q.shape[2], plan.tiles.BLOCK_M, q), q,
        *inputs, dq, *masks,
        q.stride(), k.stride(), v.stride(), out_gradient.stride(), dq.stride(),
        *plan.scalars, **plan.constants,
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, seed, *settings = inputs
    ctx.set_materialize_grads(False)  # of the log-sum-exp, which nobody differentiates
    ctx.save_for_backward(q, k, v, *output, documents, seed)
    ctx.settings = settings


def _differentiate(
    ctx: Any, out_gradient: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if out_gradient is None:
        return (None,) * 12
    gradients: tuple[Tensor, ...] = backward(out_gradient, *ctx.saved_tensors, *ctx.settings)
    return gradients + _NO_GRADIENTS


_forward.register_gradient("attention", _differentiate, _save)
backward.refuse_second_order("attention")


def flops(
    q: tuple[int, ...], k: tuple[int, ...], causal: bool, window: int | None, backward: bool
) -> int:
    """Return the FLOPs of one pass for tensors of these shapes."""
    return costs.attention(
        *q, key_length=k[2], causal=causal, window=window, itemsize=2, backward=backward
    ).flops


@register_flop_formula(torch.ops.megagpt.attention_forward)
def _forward_flops(
    q: Any,
    k: Any,
    v: Any,
    documents: Any,
    seed: Any,
    scale: float,
    causal: bool,
    window: int | None,
    *_: Any,
    **__: Any,
) -> int:
    return flops(q, k, causal, window, backward=False)


@register_flop_formula(torch.ops.megagpt.attention_backward)
def _backward_flops(gradient: Any, q: Any, k: Any, *rest: Any, **__: Any) -> int:
    causal, window = rest[6:8]  # after v, out, log_sum_exp, documents, seed and scale
    return flops(q, k, causal, window, backward=True)
