"""Checks of an operation's arguments, before any implementation runs.

One function for each operation, with its signature. It raises ValueError with the argument's name,
what was found and what is expected, and returns the tensor that gives the call its device and
dtype.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kernels.documents import DocumentBounds


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    document_ids: Tensor | DocumentBounds | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """Check q, k and v, the seed of dropout, the documents, the window and the soft cap.

    Heads of q must be a multiple of those of k; documents need at least as many keys as queries; a
    window needs causal attention.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"attention: {name} has shape {tuple(x.shape)}, expected (batch, heads, length, "
                f"head_dim)"
            )
    _require_floating_point("attention", "q", q)
    batch, heads, length, head_dim = q.shape
    key_heads, key_length = k.shape[1:3]
    _require("attention", "k", k, q, (batch, key_heads, key_length, head_dim))
    _require("attention", "v", v, q, (batch, key_heads, key_length, head_dim))
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"attention: q has {heads} heads, expected a multiple of k's {key_heads}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"attention: dropout is {dropout}, expected a probability of at least 0 and below 1"
        )
    if dropout:
        if dropout_seed is None:
            raise ValueError(
                "attention: dropout needs dropout_seed, one int64 for each sample of the batch"
            )
        _require("attention", "dropout_seed", dropout_seed, q, (batch,), torch.int64)
    if document_ids is not None:
        _require_documents(document_ids, q, batch, key_length)
        if length > key_length:
            raise ValueError(
                f"attention: q has length {length}, expected at most k's {key_length} with "
                "document_ids: the queries are the last of the keys' positions"
            )
    if window is not None and window < 1:
        raise ValueError(
            f"attention: window is {window}, expected at least 1 key, or None for all of them"
        )
    if window is not None and not causal:
        raise ValueError(
            f"attention: window is {window} with causal=False, expected causal=True: a window "
            "ends at the query"
        )
    _require_softcap("attention", softcap)
    return q


def _require_softcap(op: str, softcap: float | None) -> None:
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(
            f"{op}: softcap is {softcap}, expected a positive number, or None for no soft cap"
        )


def _require_documents(
    document_ids: Tensor | DocumentBounds, q: Tensor, batch: int, key_length: int
) -> None:
    if isinstance(document_ids, DocumentBounds):
        name = "document_ids.positions"
        positions = document_ids.positions
        _require("attention", name, positions, q, (batch, 2, key_length), torch.int32)
    else:
        _require(
            "attention", "document_ids", document_ids, q, (batch, key_length), document_ids.dtype
        )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None, **_: Any
) -> Tensor:
    """Check that weight and bias are as wide as x's rows, and residual has x's shape.

    Beside an x of 16 bits, parameters and residual may be fp32.
    """
    return _norm("layer_norm", x, weight, bias, residual)


def rms_norm(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, **_: Any) -> Tensor:
    """Check that weight is as wide as x's rows, and residual has x's shape.

    Beside an x of 16 bits, weight and residual may be fp32.
    """
    return _norm("rms_norm", x, weight, None, residual)


def _norm(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    if x.dim() == 0:
        raise ValueError(f"{op}: x has shape (), expected (..., width)")
    _require_floating_point(op, "x", x)
    _require(op, "weight", weight, x, (x.shape[-1],), _own_or_fp32(weight, x))
    if bias is not None:
        _require(op, "bias", bias, x, (x.shape[-1],), weight.dtype)
    if residual is not None:
        _require(op, "residual", residual, x, tuple(x.shape), _own_or_fp32(residual, x))
    return x


def _own_or_fp32(tensor: Tensor, x: Tensor) -> torch.dtype:
    """Return the dtype that a tensor beside x must have: x's, or fp32 if x has 16 bits."""
    return torch.float32 if tensor.dtype == torch.float32 and x.dtype.itemsize == 2 else x.dtype


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    vocabulary_start: int = 0,
    vocabulary: int | None = None,
    group: Any = None,
    reduction: str = "mean",
    **_: Any,
) -> Tensor:
    """Check shapes, the reduction, the soft cap, and that the weight has the vocabulary's rows.

    Targets are int64, one for each row of hidden.
    """
    op = "linear_cross_entropy"
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{op}: reduction is "{reduction}", expected "mean", "sum" or "none"')
    if hidden.dim() < 2:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)}, expected (..., hidden_size)"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected (vocabulary, "
            f"{hidden.shape[-1]})"
        )
    _require_floating_point(op, "hidden", hidden)
    _require(op, "weight", weight, hidden, (weight.shape[0], hidden.shape[-1]))
    _require(op, "targets", targets, hidden, tuple(hidden.shape[:-1]), torch.int64)
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected at least one row")
    if vocabulary_start < 0:
        raise ValueError(
            f"{op}: vocabulary_start is {vocabulary_start}, expected the first row's index, at "
            f"least 0"
        )
    _require_softcap(op, softcap)
    if vocabulary is not None:
        _require_rows_for(vocabulary, vocabulary_start, weight.shape[0], alone=group is None)
    return hidden


def _require_rows_for(vocabulary: int, start: int, rows: int, alone: bool) -> None:
    """Require the vocabulary to end within the weight's rows, unless a group shares it.

    A rank of a group may hold a part of the vocabulary, or only padding.
    """
    op = "linear_cross_entropy"
    if vocabulary < 1:
        raise ValueError(f"{op}: vocabulary is {vocabulary}, expected at least 1")
    if alone and vocabulary > start + rows:
        raise ValueError(
            f"{op}: vocabulary is {vocabulary}, expected at most {start + rows}: weight has "
            f"{rows} rows"
        )
    if alone and vocabulary <= start:
        raise ValueError(
            f"{op}: vocabulary is {vocabulary}, expected more than vocabulary_start, which is "
            f"{start}"
        )


def swiglu(x: Tensor) -> Tensor:
    """Check that x has an even number of channels."""
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"swiglu: x has shape {tuple(x.shape)}, expected an even number of channels (gate, "
            f"value pairs)"
        )
    _require_floating_point("swiglu", "x", x)
    return x


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Check for fp32 tables with a row for each position and at most half of x's channels."""
    if x.dim() != 4:
        raise ValueError(
            f"rotary: x has shape {tuple(x.shape)}, expected (batch, heads, length, head_dim)"
        )
    _require_floating_point("rotary", "x", x)
    length, head_dim = x.shape[2:]
    pairs = cosine.shape[-1] if cosine.dim() in (2, 4) else 0
    if not 1 <= pairs <= head_dim // 2:
        raise ValueError(
            f"rotary: cosine has shape {tuple(cosine.shape)}, expected ({length}, pairs) with at "
            f"most half of x's {head_dim} channels, or (batch, 1, {length}, pairs)"
        )
    shape = (length, pairs) if cosine.dim() == 2 else (x.shape[0], 1, length, pairs)
    for name, table in (("cosine", cosine), ("sine", sine)):
        _require("rotary", name, table, x, shape, torch.float32)
    return x


def dropout(x: Tensor, probability: float, *, seed: Tensor, **_: Any) -> Tensor:
    """Check for three dimensions, a probability below 1 and one seed for each sample."""
    if x.dim() != 3:
        raise ValueError(
            f"dropout: x has shape {tuple(x.shape)}, expected (batch, length, channels)"
        )
    _require_floating_point("dropout", "x", x)
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout: probability is {probability}, expected 0 <= probability < 1")
    _require("dropout", "seed", seed, x, (x.shape[0],), torch.int64)
    return x


def _require_floating_point(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(
            f"{op}: {name} has dtype {tensor.dtype}, expected floating-point numbers; convert it"
        )


def _require(
    op: str,
    name: str,
    tensor: Tensor,
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    """Require the device and dtype of ``like`` (or ``dtype``, if given) and exactly this shape."""
    dtype = dtype or like.dtype
    if tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, expected {like.device}; move it there"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}; convert it")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
