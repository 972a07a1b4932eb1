"""Fused attention: the public function, its two custom operators and their gradients.

The kernels are in attention_forward.py and attention_backward.py, their block sizes in
attention_tiles.py. As custom operators with shape functions they work under torch.compile, and
torch's FLOP counter counts them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import costs, reference
from kernels.derivatives import refuse_second_order, register_gradient
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
from kernels.verification import self_check
from kernels.verification.exact_attention import variant_of

_ROWS_PER_DELTA_BLOCK = 64


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


def empty_heads_last(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor of the shape of ``like``, stored as (b, length, heads, d).

    ``like`` is (batch, heads, length, head_dim).
    """
    batch, heads, length, head_dim = like.shape
    return like.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)


def _addressable(x: Tensor) -> Tensor:
    """Return x, copied if an offset within one block of it would need more than 31 bits."""
    return x.contiguous() if 256 * max(x.stride(2), x.stride(3)) >= 2**31 else x


@dataclass(frozen=True)
class _Call:
    """The arguments of one call that its kernels share, beside its tensors."""

    documents: Tensor | None
    seed: Tensor | None
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    dropout: float
    head_offset: int

    def tiles(self, phase: str, q: Tensor) -> Tiles:
        """Return the block sizes of one pass."""
        return tiles_for(
            phase,
            q,
            dropout=self.dropout > 0,
            documents=self.documents is not None,
            window=self.window is not None,
            softcap=self.softcap is not None,
        )

    def scalars(self, q: Tensor, k: Tensor) -> tuple[float | None, ...]:
        """Return the run-time arguments that are no tensors, in the kernels' order.

        Triton compiles a None away.
        """
        scale_log2 = math.log2(math.e) * (self.softcap or self.scale)
        return (
            q.shape[1],  # heads
            q.shape[1] // k.shape[1],  # group
            q.shape[2],  # length
            k.shape[2],  # key_length
            self.window,
            self.scale,
            scale_log2,
            self.scale / self.softcap if self.softcap else None,  # cap_scale
            1.0 / (1.0 - self.dropout),  # keep_scale
            self.head_offset,
        )

    def constants(self, q: Tensor, tiles: Tiles) -> dict[str, Any]:
        """Return the compile-time arguments and launch options."""
        return {
            "HEAD_DIM": q.shape[3],
            "BLOCK_DIM": padded(q.shape[3]),
            "CAUSAL": self.causal,
            "DOCUMENTS": self.documents is not None,
            "DROP_BELOW": int(self.dropout * 2**32),
            **tiles.options(),
        }


def _blocks(length: int, block: int, x: Tensor) -> tuple[int]:
    """Return a grid of one program for each block of each head of x."""
    return (-(-length // block) * x.shape[0] * x.shape[1],)


@torch.library.custom_op("megagpt::attention_forward", mutates_args=())
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
    log_sum_exp = q.new_full(q.shape[:3], math.inf, dtype=torch.float32)
    if not out.numel() or not k.numel():
        return out.zero_(), log_sum_exp
    q, k, v = _addressable(q), _addressable(k), _addressable(v)
    call = _Call(documents, seed, scale, causal, window, softcap, dropout, head_offset)
    tiles = call.tiles("forward", q)
    launch(
        attention_forward, _blocks(q.shape[2], tiles.BLOCK_M, q), q,
        q, k, v, out, log_sum_exp, documents, seed, *(x.stride() for x in (q, k, v, out)),
        *call.scalars(q, k), **call.constants(q, tiles),
    )  # fmt: skip
    return out, log_sum_exp


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("megagpt::attention_backward", mutates_args=())
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
    dq, dk, dv = empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)
    if not out.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, out_gradient = (
        _addressable(q),
        _addressable(k),
        _addressable(v),
        _addressable(out_gradient),
    )
    inputs = (q, k, v, out_gradient, log_sum_exp, _delta(out, out_gradient))
    call = _Call(documents, seed, scale, causal, window, softcap, dropout, head_offset)
    if deterministic:
        _launch_keys(inputs, (dq, dk, dv), call, add_query_gradient=False)
        _launch_queries(inputs, dq, call)
        return dq, dk, dv
    total = empty_heads_last(q, torch.float32).zero_()
    _launch_keys(inputs, (total, dk, dv), call, add_query_gradient=True)
    return torch.mul(total, scale, out=dq), dk, dv


@backward.register_fake
def _(
    out_gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads_last(q), empty_heads_last(k), empty_heads_last(v)


def _delta(out: Tensor, out_gradient: Tensor) -> Tensor:
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)  # (batch, heads, length)
    heads, length, head_dim = out.shape[1:]
    launch(
        attention_backward_delta, _blocks(length, _ROWS_PER_DELTA_BLOCK, out), out,
        out, out_gradient, delta, out.stride(), out_gradient.stride(), heads, length,
        HEAD_DIM=head_dim, BLOCK_DIM=padded(head_dim), BLOCK_M=_ROWS_PER_DELTA_BLOCK,
    )  # fmt: skip
    return delta


def _launch_keys(
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor, Tensor],
    call: _Call,
    *,
    add_query_gradient: bool,
) -> None:
    """Fill dk and dv, one program for each block of keys.

    With ``add_query_gradient`` also add dq / scale to an fp32 buffer.
    """
    q, k, v, out_gradient, _, _ = inputs
    tiles = call.tiles("backward_keys", q)
    launch(
        attention_backward_keys, _blocks(k.shape[2], tiles.BLOCK_N, k), q,
        *inputs, *gradients, call.documents, call.seed,
        *(x.stride() for x in (q, k, v, out_gradient, *gradients)),
        *call.scalars(q, k), **call.constants(q, tiles), ADD_QUERY_GRADIENT=add_query_gradient,
    )  # fmt: skip


def _launch_queries(inputs: tuple[Tensor, ...], dq: Tensor, call: _Call) -> None:
    """Fill dq, one program for each block of queries."""
    q, k, v, out_gradient, _, _ = inputs
    tiles = call.tiles("backward_queries", q)
    launch(
        attention_backward_queries, _blocks(q.shape[2], tiles.BLOCK_M, q), q,
        *inputs, dq, call.documents, call.seed, *(x.stride() for x in (q, k, v, out_gradient, dq)),
        *call.scalars(q, k), **call.constants(q, tiles),
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
    gradients = backward(out_gradient, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *(None for _ in range(9)))


register_gradient(_forward, "attention", _differentiate, _save)
refuse_second_order(backward, "attention")


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
