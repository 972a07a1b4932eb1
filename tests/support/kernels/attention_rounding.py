"""What fp32 sums may cost attention, whoever adds them up: the part of the accuracy rule that one
run cannot measure.

A score is a sum of head_dim products, and softmax turns its absolute error into a relative error of
the weight. The gradient of a score is a difference, dP - delta, of sums that may cancel: with one
key it is 0, and what is left is rounding, which torch's order of summation may hit exactly and
another misses. Twice torch's error is then a coin toss. So each of these sums is granted one unit
in the last place of fp32, relative to the sum of its terms' absolute values. A soft cap passes a
score's error on times its own slope, 1 - t^2 with t = tanh(score / softcap), and rounds t twice.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import reference
from tests.support.kernels.accuracy import output_gradient

UNIT = torch.finfo(torch.float32).eps


def attention_rounding(
    tensors: dict[str, Tensor], *, scale: float | None = None, dropout: float = 0.0, **options: Any
) -> dict[str, float]:
    """The largest error that this leaves in each result of ``outputs_and_gradients``, to first
    order.
    """
    q, k, v = (tensors[name].double() for name in "qkv")
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    gradient = output_gradient(q, tensors["q"].dtype).double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    # With the identity for values, the output is the weights themselves.
    keys = torch.eye(k.shape[2], device=k.device, dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    seed = tensors.get("dropout_seed")
    options |= {"scale": scale, "document_ids": tensors.get("document_ids")}
    weights = reference.attention(q, k, keys, **options)
    dropped = (
        reference.attention(q, k, keys, dropout=dropout, dropout_seed=seed, **options)
        if dropout
        else weights
    )

    score_error = UNIT * scale * (q.abs() @ k.abs().mT)
    softcap = options.get("softcap")
    if softcap is not None:
        tanh = (scale * (q @ k.mT) / softcap).tanh()
        slope = 1 - tanh.square()
        score_error = score_error * slope + 2 * UNIT * softcap * tanh.abs()
        slope_error = 2 * tanh.abs() * score_error / softcap
    weight_error = score_error * dropped
    score_gradient = _score_gradient(weights, dropped * (gradient @ v.mT), -1)
    summed = _score_gradient(weights, dropped * (gradient.abs() @ v.abs().mT), +1)
    score_gradient_error = UNIT * summed + score_error * score_gradient.abs()
    if softcap is not None:
        score_gradient_error = score_gradient_error * slope + score_gradient.abs() * slope_error
    errors = {
        "output 0": weight_error @ v.abs(),
        "gradient of q": scale * (score_gradient_error @ k.abs()),
        "gradient of k": _over_group(scale * (score_gradient_error.mT @ q.abs()), group),
        "gradient of v": _over_group(weight_error.mT @ gradient.abs(), group),
    }
    return {name: error.max().item() for name, error in errors.items()}


def _score_gradient(weights: Tensor, products: Tensor, sign: int) -> Tensor:
    """P * (dP - delta), or with a plus sign the magnitude of what is subtracted; ``products``
    are P * dP.
    """
    return products + sign * weights * products.sum(dim=-1, keepdim=True)


def _over_group(per_query_head: Tensor, group: int) -> Tensor:
    """Query heads that share keys add up their gradients."""
    return per_query_head.unflatten(1, (-1, group)).sum(dim=2)
