"""The plain-torch twin of every operation: what the fused kernels must equal, and what runs on a
CPU.

Shapes follow torch's scaled_dot_product_attention: (batch, heads, length, head_dim).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from kernels.documents import DocumentBounds
from kernels.philox import keep_mask


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
    """softmax(q k^T * scale) v, with K and V shared by groups of query heads.

    q (batch, heads, length, head_dim); k and v (batch, key_value_heads, key_length, head_dim),
    heads a multiple of key_value_heads. ``causal`` aligns the last query with the last key (a KV
    cache), so a query sees nothing where length > key_length puts it before the first key; such
    rows are zero. ``document_ids`` (batch, key_length) confines attention to equal ids; the queries
    are the last ``length`` positions. Layers that share ids should be given their
    ``kernels.document_bounds`` instead, which each call computes anew from ids. ``dropout_seed``
    (batch,) int64 and ``head_offset`` (this shard's first head) select the mask. ``deterministic``
    asks a fused backward for a fixed summation order; this twin has one anyway.
    """
    length, key_length = q.shape[2], k.shape[2]
    if not dropout and document_ids is None and (not causal or length == key_length):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    mask = visible(length, key_length, causal, document_ids, q.device)
    if not dropout and length <= key_length:  # every query sees itself at least
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _explicit_attention(q, k, v, mask, scale, dropout, dropout_seed, head_offset)


def visible(
    length: int,
    key_length: int,
    causal: bool,
    document_ids: Tensor | DocumentBounds | None,
    device: torch.device,
) -> Tensor:
    """Boolean (1 or batch, 1, length, key_length): may this query attend to that key?"""
    query = torch.arange(key_length - length, key_length, device=device)[:, None]
    visible = torch.ones(1, 1, length, key_length, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (query >= torch.arange(key_length, device=device))
    if isinstance(document_ids, DocumentBounds):
        document_ids = document_ids.positions[:, 0]  # a document is known by its first position
    if document_ids is not None:
        visible = visible & (
            document_ids[:, None, -length:, None] == document_ids[:, None, None, :]
        )
    return visible


def _explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float | None,
    dropout: float,
    seed: Tensor | None,
    head_offset: int,
) -> Tensor:
    """Attention with its probabilities written out, for dropout and for rows that see nothing."""
    heads, length = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    wide = torch.promote_types(
        q.dtype, torch.float32
    )  # scores of 16 bits would lose what softmax tells apart
    scores = q.to(wide) @ k.to(wide).mT * (max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).masked_fill(~mask, 0.0)
    if dropout:
        if seed is None:
            raise ValueError(
                "attention: dropout needs dropout_seed, one int64 for each sample of the batch"
            )
        plane = torch.arange(head_offset, head_offset + heads, device=q.device)[None, :, None]
        row = torch.arange(length, device=q.device)[None, None, :]
        keep = keep_mask(dropout, seed.to(q.device)[:, None, None], plane, row, k.shape[2])
        weights = weights * keep / (1.0 - dropout)
    return weights.to(v.dtype) @ v


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation of the last dimension (Ba et al. 2016); with a residual, of x + residual,
    returning both.

    Beside an x of 16 bits, parameters (both) and the residual may be fp32, as autocast and a
    residual stream in fp32 make them. The result has the dtype of x, the sum that of the residual
    (as in flash-attn's layer_norm_fn), under autocast, too; gradients have the dtypes of their
    inputs.
    """
    total = x if residual is None else x + residual
    wide = torch.promote_types(total.dtype, weight.dtype)
    shift = None if bias is None else bias.to(wide)
    y = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), shift, eps).to(x.dtype)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square normalisation (Zhang and Sennrich 2019); residual, dtypes and results as
    of ``layer_norm``.
    """
    total = x if residual is None else x + residual
    wide = torch.promote_types(total.dtype, weight.dtype)
    y = F.rms_norm(total.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
    return y if residual is None else (y, total)


def dropout(x: Tensor, probability: float, *, seed: Tensor, position_offset: int = 0) -> Tensor:
    """Zero elements of x (batch, length, channels) and scale the rest by 1 / (1 - probability).

    The mask depends on ``seed`` (batch,), the position in the sequence and the channel, not on how
    ranks share a batch.
    """
    position = torch.arange(position_offset, position_offset + x.shape[1], device=x.device)[None, :]
    seed = seed.to(x.device)[:, None]
    keep = keep_mask(probability, seed, torch.zeros_like(seed), position, x.shape[2])
    return x * keep / (1.0 - probability)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    vocabulary_start: int = 0,
    vocabulary: int | None = None,
    group: ProcessGroup | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` (the language-model head and its loss), computed in
    fp32.

    hidden (..., hidden_size), weight (vocabulary, hidden_size), targets (...). ``reduction`` is
    mean (over targets that are not ``ignore_index``), sum or none (the shape of targets).
    ``z_loss`` adds z_loss * logsumexp^2 (PaLM, sec. 5). Rows of the weight from ``vocabulary`` on
    are padding: no probability, no gradient. Where every target is ignored, gradients and the loss
    are 0, the mean too: Liger-Kernel's choice. torch and flash-attn return a mean of NaN (with
    gradients of 0), which makes a trainer skip the whole step for one micro-batch that has no
    targets. With a ``group``, weight holds this rank's rows of the vocabulary, the first being
    ``vocabulary_start``; every rank of the group must call it with the same hidden and targets, and
    each receives the whole loss and, in backward, the whole gradient of hidden.
    """
    if group is not None:
        from kernels import (
            chunked_cross_entropy,
        )  # plain torch too, and the one place that knows of groups

        return chunked_cross_entropy.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss,
            vocabulary_start=vocabulary_start,
            vocabulary=vocabulary, group=group, reduction=reduction,
        )  # fmt: skip
    columns = None if vocabulary is None else max(vocabulary - vocabulary_start, 0)
    logits = F.linear(hidden, weight).flatten(0, -2)[:, :columns]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets - vocabulary_start * (targets != ignore_index)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="none")
    counted = targets.flatten() != ignore_index
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(dim=-1).square() * counted
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias) in the tanh approximation (Hendrycks and Gimpel 2016), as GPT-2 uses it;
    bias (channels,).
    """
    return F.gelu(x + bias, approximate="tanh")


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020) of x (..., 2 * channels), whose channels alternate gate,
    value, gate, value.
    """
    gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * value


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021): rotate the pair of channels (i, i + head_dim / 2)
    by its angle.

    x (batch, heads, length, head_dim); cosine and sine (length, head_dim / 2) in fp32, row t for
    position t.
    """
    first, second = x.to(torch.promote_types(x.dtype, cosine.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(
        x.dtype
    )
