"""Language-model head and loss, a chunk of rows at a time: the full logits never exist.

For each chunk: logits = hidden @ weight.T; three numbers for each row (maximum, sum of
exponentials, the target's logit); the loss; then, in place, the gradient of the logits, softmax *
(1 + 2 z lse) - one_hot, times the slope of a soft cap. Two more products give the gradients of
hidden and weight. Backward therefore needs no second pass over the logits: there are three
products, as in plain autograd. The weight's gradient is summed over the chunks in fp32. Idea:
Liger-Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989). With
``reduction="none"`` each row's gradient has a factor of its own, unknown until backward, so
backward computes the logits again.

The gradients are stored until the gradient of the loss is known. For the mean over n targets they
need the factor 1/n. Applied in forward, it would make them underflow in fp16, whose loss scale
comes only with backward; applied in backward, it would round them a second time. So 1/n is split: a
number in [1, 2) multiplies the gradient of the logits before it is rounded, and a power of two
multiplies the stored gradients in backward. That product is exact if the gradient of the loss is a
power of two, such as 1 or fp16's loss scale. With any other gradient, 16-bit gradients are rounded
once more.

This module is plain torch; ``kernels.fused.cross_entropy`` adds the two functions of a chunk in
Triton. In a vocabulary-parallel group each rank holds some rows of the weight, and each chunk costs
one all-gather of three numbers for each row.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.flop_counter import register_flop_formula

from kernels import costs
from kernels.operators import operator


@dataclass(frozen=True)
class RowFunctions:
    """The two functions that read a chunk of logits (rows, vocabulary).

    A target outside 0 .. vocabulary - 1 belongs to another rank. ``statistics(logits, targets,
    cap)`` returns fp32 (3, rows): maximum, sum of exp(logit - maximum), and the logit of the target
    or -inf. ``gradient(logits, targets, normaliser, scales, z_loss, cap)`` overwrites the logits by
    their gradient times ``scales`` (rows,), exactly zero where the scale is zero. ``normaliser``
    (rows, 2) holds the maximum and the logarithm of the sum. They stay separate because their sum,
    rounded, would lose the differences between large logits. Both cap what they read in fp32, so
    the cap rounds nothing to 16 bits; the gradient is that of the logits before the cap.
    """

    statistics: Callable[[Tensor, Tensor, "SoftCap"], Tensor]
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, float, "SoftCap"], None]


@dataclass(frozen=True)
class SoftCap:
    """softcap * tanh(logit / softcap) for the first ``columns`` logits of a row (None: no cap).

    The columns after them are padding, whose huge negative number a cap would make a logit.
    """

    softcap: float | None
    columns: int

    def of(self, logits: Tensor) -> Tensor:
        """Return the capped logits, in fp32 at least."""
        values = _at_least_fp32(logits)
        if self.softcap is None:
            return values
        capped = self.softcap * torch.tanh(values[:, : self.columns] / self.softcap)
        return torch.cat((capped, values[:, self.columns :]), dim=1)

    def times_slope(self, gradient: Tensor, capped: Tensor) -> Tensor:
        """Return a gradient of capped logits as one of the logits."""
        if self.softcap is None:
            return gradient
        slope = 1.0 - (capped[:, : self.columns] / self.softcap).square()
        return torch.cat((gradient[:, : self.columns] * slope, gradient[:, self.columns :]), dim=1)


def _torch_statistics(logits: Tensor, targets: Tensor, cap: SoftCap) -> Tensor:
    values = cap.of(logits)
    maximum = values.amax(dim=-1)  # (rows,), like all below
    total = (values - maximum[:, None]).exp().sum(dim=-1)
    here = (targets >= 0) & (targets < logits.shape[1])
    logit = values.gather(1, (targets * here)[:, None])[:, 0].masked_fill(~here, -torch.inf)
    return torch.stack((maximum, total, logit))


def _torch_gradient(
    logits: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    scales: Tensor,
    z_loss: float,
    cap: SoftCap,
) -> None:
    maximum, log_total = normaliser.unbind(dim=1)
    values = cap.of(logits)
    gradient = (values - maximum[:, None] - log_total[:, None]).exp_()
    gradient *= (scales * (1.0 + 2.0 * z_loss * (maximum + log_total)))[:, None]
    here = (targets >= 0) & (targets < logits.shape[1])
    gradient.scatter_add_(1, (targets * here)[:, None], (-scales * here)[:, None])
    gradient = cap.times_slope(gradient, values)
    logits.copy_(gradient.masked_fill_((scales == 0)[:, None], 0.0))


ROW_FUNCTIONS = {"torch": RowFunctions(_torch_statistics, _torch_gradient)}
_GROUPS: dict[str, ProcessGroup] = {}  # by name, since an operator cannot take a group


# ---------------------------------------------------------------------------------------- operators


def _in_its_own_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run the operator's function without autocast.

    Autocast would convert the operands of some of its products and not of others.
    """

    @functools.wraps(function)
    def run(first: Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *others)

    return run


@operator("linear_cross_entropy")
@_in_its_own_dtype
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    vocabulary_start: int,
    columns: int,
    group: str,
    implementation: str,
    mean: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, losses, normaliser, factor, gradient of hidden, gradient of weight).

    hidden (rows, hidden_size), weight (vocabulary, hidden_size), targets (rows,). Columns of the
    logits from ``columns`` on are padding. losses (rows,), normaliser (rows, 2). The loss is the
    mean or the sum. The gradients lack ``factor``, a power of two: times it they are those of the
    loss. The gradient of weight is fp32; a gradient that is not requested is empty.
    """
    loss, losses, normaliser, factor, dhidden, dweight = _forward_outputs(
        hidden, weight, targets, ignore_index, z_loss, softcap, vocabulary_start, columns, group,
        implementation, mean, hidden_gradient, weight_gradient,
    )  # fmt: skip
    functions = ROW_FUNCTIONS[implementation]
    cap = SoftCap(softcap, columns)
    counted = targets != ignore_index
    divisor = counted.sum().clamp(min=1).to(losses.dtype) if mean else torch.ones_like(factor)
    fraction, exponent = divisor.reciprocal().frexp()  # the fraction is in [0.5, 1)
    torch.ldexp(torch.ones_like(factor), exponent - 1, out=factor)
    scales = counted * (2 * fraction)  # (rows,)
    targets = targets - vocabulary_start
    dweight.zero_()
    for rows in _chunks(hidden, weight, group):
        logits = _logits(hidden[rows], weight, columns)  # (chunk rows, vocabulary)
        maximum, total, target_logit = _over_group(
            functions.statistics(logits, targets[rows], cap), group
        )
        log_total = total.log()
        torch.stack((maximum, log_total), dim=1, out=normaliser[rows])
        # A target that no rank holds has logit -inf: the loss is infinite, not silently wrong.
        row_losses = (maximum - target_logit) + log_total + z_loss * (maximum + log_total).square()
        losses[rows] = row_losses.where(counted[rows], 0.0)
        if not (hidden_gradient or weight_gradient):
            continue
        functions.gradient(logits, targets[rows], normaliser[rows], scales[rows], z_loss, cap)
        _add_products(logits, hidden[rows], weight, dhidden[rows], dweight)
    _sum_over_group(dhidden, group)
    torch.div(losses.sum(), divisor, out=loss)
    return loss, losses, normaliser, factor, dhidden, dweight


@_forward.register_fake
def _forward_outputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    vocabulary_start: int,
    columns: int,
    group: str,
    implementation: str,
    mean: bool,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    return (
        losses.new_empty(()),
        losses,
        losses.new_empty(hidden.shape[0], 2),
        losses.new_empty(()),
        torch.empty_like(hidden) if hidden_gradient else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if weight_gradient else losses.new_empty(0),
    )


@operator("linear_cross_entropy_backward")
@_in_its_own_dtype
def _backward(
    row_gradients: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    ignore_index: int,
    z_loss: float,
    softcap: float | None,
    vocabulary_start: int,
    columns: int,
    group: str,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight if each row's loss has its own gradient.

    row_gradients (rows,). The logits are computed again.
    """
    dhidden = torch.empty_like(hidden)
    dweight = torch.zeros_like(weight, dtype=normaliser.dtype)
    scales = row_gradients * (targets != ignore_index)
    targets = targets - vocabulary_start
    cap = SoftCap(softcap, columns)
    for rows in _chunks(hidden, weight, group):
        logits = _logits(hidden[rows], weight, columns)
        ROW_FUNCTIONS[implementation].gradient(
            logits, targets[rows], normaliser[rows], scales[rows], z_loss, cap
        )
        _add_products(logits, hidden[rows], weight, dhidden[rows], dweight)
    _sum_over_group(dhidden, group)
    return dhidden, dweight.to(weight.dtype)


@_backward.register_fake
def _backward_outputs(
    row_gradients: Tensor, hidden: Tensor, weight: Tensor, *others: Tensor | int | float | str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _logits(hidden: Tensor, weight: Tensor, columns: int) -> Tensor:
    """Return hidden @ weight.T (rows, vocabulary), with the lowest finite number in padding.

    Padding then gets no probability and no gradient. It is not -inf, because a rank of a
    vocabulary-parallel group may hold only padding.
    """
    logits = F.linear(hidden, weight)
    logits[:, columns:] = torch.finfo(logits.dtype).min
    return logits


def _chunks(hidden: Tensor, weight: Tensor, group: str) -> list[slice]:
    row_bytes = weight.shape[0] * hidden.element_size()
    rows = costs.loss_chunk_rows(row_bytes, grouped=bool(group))
    # Even chunks: the last one is not much smaller than the others.
    chunks = max(1, -(-hidden.shape[0] // rows))
    rows = max(1, -(-hidden.shape[0] // chunks))
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]


def _add_products(
    dlogits: Tensor, hidden: Tensor, weight: Tensor, dhidden: Tensor, dweight: Tensor
) -> None:
    """Set dhidden = dlogits @ weight; add dlogits.T @ hidden to dweight, in its precision.

    A gradient that is empty is skipped.
    """
    if dhidden.numel():
        torch.mm(dlogits, weight, out=dhidden)
    if not dweight.numel():
        return
    if dlogits.dtype != dweight.dtype and dlogits.is_cuda:
        torch.addmm(dweight, dlogits.T, hidden, out_dtype=dweight.dtype, out=dweight)
    else:  # only CUDA has products of 16-bit operands with an fp32 result
        dweight.addmm_(dlogits.T.to(dweight.dtype), hidden.to(dweight.dtype))


def _over_group(statistics: Tensor, group: str) -> Tensor:
    """Merge the statistics of all ranks (3, rows), each over its own columns of the vocabulary.

    The log-sum-exp is that of the ranks' log-sum-exps; only one rank has the target's logit. Every
    rank of the group must call it.
    """
    if not group:
        return statistics
    everywhere = statistics.new_empty(dist.get_world_size(_GROUPS[group]), *statistics.shape)
    dist.all_gather(list(everywhere), statistics, group=_GROUPS[group])
    maxima, totals, logits = everywhere.unbind(dim=1)  # each (ranks, rows)
    maximum = maxima.amax(dim=0)  # (rows,)
    return torch.stack(
        (maximum, (totals * (maxima - maximum).exp()).sum(dim=0), logits.amax(dim=0))
    )


def _sum_over_group(tensor: Tensor, group: str) -> None:
    if group and tensor.numel():
        dist.all_reduce(tensor, group=_GROUPS[group])


# ----------------------------------------------------------------------------------------- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, *options, _, hidden_gradient, weight_gradient = inputs
    _, _, normaliser, factor, dhidden, dweight = output
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = weight.dtype
    ctx.options = options
    ctx.wanted = hidden_gradient, weight_gradient
    if any(ctx.wanted):
        ctx.save_for_backward(factor, dhidden, dweight)
    else:
        # The weight itself, not a view of it: ZeRO-3 frees a gathered parameter by its identity.
        ctx.save_for_backward(hidden, weight, targets, normaliser)


def _gradients(
    ctx: Any, dloss: Tensor | None, dlosses: Tensor | None, *unused: Tensor | None
) -> tuple[Any, ...]:
    nothing = (None,) * (1 + len(ctx.options) + 3)
    if any(ctx.wanted) and dloss is not None:
        factor, dhidden, dweight = ctx.saved_tensors
        return (
            _scaled(dhidden, dloss, factor, dhidden.dtype) if ctx.wanted[0] else None,
            _scaled(dweight, dloss, factor, ctx.weight_dtype) if ctx.wanted[1] else None,
            *nothing,
        )
    if not any(ctx.wanted) and dlosses is not None:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        return *_backward(dlosses, hidden, weight, targets, normaliser, *ctx.options), *nothing
    return None, None, *nothing


@operator("linear_cross_entropy_scale")
def _scaled(gradient: Tensor, dloss: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * dloss * factor in ``dtype``, without a second copy in the wider dtype."""
    return torch.mul(gradient, dloss * factor, out=torch.empty_like(gradient, dtype=dtype))


@_scaled.register_fake
def _scaled_output(gradient: Tensor, dloss: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


_forward.register_gradient("linear_cross_entropy", _gradients, _save)
_backward.refuse_second_order("linear_cross_entropy")
_scaled.refuse_second_order("linear_cross_entropy")


@register_flop_formula(torch.ops.megagpt.linear_cross_entropy)
def _forward_flops(hidden: Any, weight: Any, *others: Any, **options: Any) -> int:
    """Return the FLOPs of the forward product and of the gradients that it computes."""
    cost = costs.linear_cross_entropy(hidden[0], hidden[1], weight[0], itemsize=2).flops
    return int(cost) * (1 + sum(others[-2:]))


@register_flop_formula(torch.ops.megagpt.linear_cross_entropy_backward)
def _backward_flops(
    row_gradients: Any, hidden: Any, weight: Any, *others: Any, **options: Any
) -> int:
    return 3 * int(costs.linear_cross_entropy(hidden[0], hidden[1], weight[0], itemsize=2).flops)


# ---------------------------------------------------------------------------------- public function


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
    implementation: str = "torch",
) -> Tensor:
    """Compute ``kernels.reference.linear_cross_entropy`` in chunks of rows.

    With a group, the vocabulary is split between its ranks. Every rank must call it with the same
    hidden and targets. Each gets the whole loss, the whole gradient of hidden (summed over the
    group here), and the gradient of its own rows of the weight.
    """
    name = "" if group is None else group.group_name
    if group is not None:
        _GROUPS[name] = group
    columns = (
        weight.shape[0]
        if vocabulary is None
        else min(max(vocabulary - vocabulary_start, 0), weight.shape[0])
    )
    now = torch.is_grad_enabled() and reduction != "none"
    loss, losses, *_ = _forward(
        hidden.flatten(0, -2), weight, targets.flatten(), ignore_index, z_loss, softcap,
        vocabulary_start, columns, name, implementation, reduction == "mean",
        now and hidden.requires_grad, now and weight.requires_grad,
    )  # fmt: skip
    return losses.view(targets.shape) if reduction == "none" else loss


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
