"""The plain-torch twin of every operation: the fused kernels must equal it; a CPU runs it.

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
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(q k^T * scale) v; groups of query heads share K and V.

    q (batch, heads, length, head_dim); k and v (batch, key_value_heads, key_length, head_dim), with
    heads a multiple of key_value_heads. The result has q's shape.

    ``causal`` aligns the last query with the last key (a KV cache). If length > key_length, the
    first queries come before the first key and see nothing; their rows are zero. ``document_ids``
    (batch, key_length) restricts attention to keys of the query's document; the queries are the
    last ``length`` positions. Layers that share ids should pass ``kernels.document_bounds(ids)``
    instead, which each call computes again from ids. ``dropout_seed`` (batch,) int64 and
    ``head_offset`` (this shard's first head) select the mask. ``deterministic`` asks a fused
    backward for a fixed summation order; this twin always has one.

    ``window`` is the number of most recent keys that a query sees, itself included: with the last
    query aligned with the last key, a query at position i sees keys j with i - window < j <= i
    (transformers' ``sliding_window``). It needs ``causal``. ``softcap`` replaces each scaled score
    s by softcap * tanh(s / softcap), before any mask (Gemma 2, arXiv 2408.00118, sec. 2).
    """
    length, key_length = q.shape[2], k.shape[2]
    window = binding_window(window, k)
    plain = not dropout and softcap is None
    unmasked = document_ids is None and window is None
    if plain and unmasked and (not causal or length == key_length):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    mask = visible(length, key_length, causal, document_ids, q.device, window)
    if plain and length <= key_length:  # every query sees at least itself
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _explicit_attention(q, k, v, mask, scale, dropout, dropout_seed, head_offset, softcap)


def binding_window(window: int | None, k: Tensor) -> int | None:
    """Return the window, or None if it is not shorter than the keys and so hides none of them."""
    return None if window is None or window >= k.shape[2] else window


def visible(
    length: int,
    key_length: int,
    causal: bool,
    document_ids: Tensor | DocumentBounds | None,
    device: torch.device,
    window: int | None = None,
) -> Tensor:
    """Return a boolean (1 or batch, 1, length, key_length): True where a query sees a key."""
    query = torch.arange(key_length - length, key_length, device=device)[:, None]  # (length, 1)
    key = torch.arange(key_length, device=device)
    visible = torch.ones(1, 1, length, key_length, dtype=torch.bool, device=device)
    if causal:
        visible = visible & (key <= query)
    if window is not None:
        visible = visible & (key > query - window)
    if isinstance(document_ids, DocumentBounds):
        document_ids = document_ids.positions[:, 0]  # the first position identifies a document
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
    softcap: float | None = None,
) -> Tensor:
    """Compute attention with explicit probabilities, for what torch's SDPA cannot do.

    That is dropout with our masks, rows that see nothing, and a soft cap.
    """
    heads, length = q.shape[1:3]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    # 16-bit scores would round away differences that softmax depends on.
    wide = torch.promote_types(q.dtype, torch.float32)
    # scores, weights, keep: (batch, heads, length, key_length)
    scores = q.to(wide) @ k.to(wide).mT * (max(q.shape[-1], 1) ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
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
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the layer normalisation of the last dimension of x (Ba et al. 2016).

    With a residual: of x + residual, and the sum as a second result. Beside an x of 16 bits, both
    parameters and the residual may be fp32, as under autocast and with an fp32 residual stream. The
    result has the dtype of x and the sum that of the residual (as in flash-attn's layer_norm_fn),
    also under autocast; gradients have the dtypes of their inputs.

    Normalised values are multiplied by ``weight_offset`` + weight. An offset other than 0 is added
    in fp32 at least, as in Gemma, whose weights are around 0: 1 + weight would be rounded in 16
    bits.
    """
    total = x if residual is None else x + residual
    gain = _gain(total, weight, weight_offset)
    shift = None if bias is None else bias.to(gain.dtype)
    y = F.layer_norm(total.to(gain.dtype), weight.shape, gain, shift, eps).to(x.dtype)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the root-mean-square normalisation of x (Zhang and Sennrich 2019).

    Residual, offset, dtypes and results are as in ``layer_norm``.
    """
    total = x if residual is None else x + residual
    gain = _gain(total, weight, weight_offset)
    y = F.rms_norm(total.to(gain.dtype), weight.shape, gain, eps).to(x.dtype)
    return y if residual is None else (y, total)


def _gain(total: Tensor, weight: Tensor, offset: float) -> Tensor:
    """Return offset + weight, in the dtype in which the norm is computed."""
    wide = torch.promote_types(total.dtype, weight.dtype)
    if not offset:
        return weight.to(wide)
    return weight.to(torch.promote_types(wide, torch.float32)) + offset


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
    softcap: float | None = None,
    vocabulary_start: int = 0,
    vocabulary: int | None = None,
    group: ProcessGroup | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of ``hidden @ weight.T`` (head and loss), computed in fp32.

    hidden (..., hidden_size), weight (vocabulary, hidden_size), targets (...). ``reduction`` is
    mean (over targets that are not ``ignore_index``), sum, or none (the shape of targets).
    ``z_loss`` adds z_loss * logsumexp^2 (PaLM, sec. 5). ``softcap`` replaces each logit x by
    softcap * tanh(x / softcap) (Gemma 2, sec. 2), for z_loss, too. Rows of the weight from
    ``vocabulary`` on are padding: no probability, no gradient.

    If every target is ignored, the loss (the mean too) and the gradients are 0, as in Liger-Kernel.
    torch and flash-attn return a mean of NaN with gradients of 0; a trainer then skips the whole
    step because of one micro-batch without targets.

    With a ``group``, weight holds this rank's rows of the vocabulary, the first being
    ``vocabulary_start``. Every rank of the group must call it with the same hidden and targets.
    Each gets the whole loss and, in backward, the whole gradient of hidden.
    """
    if group is not None:
        from kernels import chunked_cross_entropy  # also plain torch; only it handles groups

        return chunked_cross_entropy.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap,
            vocabulary_start=vocabulary_start, vocabulary=vocabulary, group=group,
            reduction=reduction,
        )  # fmt: skip
    columns = None if vocabulary is None else max(vocabulary - vocabulary_start, 0)
    logits = F.linear(hidden, weight).flatten(0, -2)[:, :columns]  # (targets, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    targets = targets - vocabulary_start * (targets != ignore_index)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="none")
    counted = targets.flatten() != ignore_index
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(dim=-1).square() * counted
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


def swiglu(x: Tensor) -> Tensor:
    """Return silu(gate) * value (Shazeer 2020) of x (..., 2 * channels).

    The channels of x alternate gate, value, gate, value.
    """
    gate, value = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (..., channels)
    return F.silu(gate) * value


def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + pairs) by its angle (Su et al. 2021).

    x (batch, heads, length, head_dim); cosine and sine in fp32, (length, pairs), or (batch, 1,
    length, pairs) where samples have positions of their own. Channels from 2 * pairs on stay as
    they are.
    """
    wide = x.to(torch.promote_types(x.dtype, cosine.dtype))
    pairs = cosine.shape[-1]
    # (batch, heads, length, pairs) each
    first, second, rest = wide.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), -1).to(
        x.dtype
    )
