"""Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053), applied to the model from outside.

The model publishes which of its layers ranks may share and how; ``share`` replaces those by the
layers here:

    column      a rank holds some rows of the weight and computes some of the outputs;
                the gradients of the input are summed
    row         a rank holds some columns and computes a part of every output; the parts are
                summed, then the bias is added once
    vocabulary  a rank holds the rows of some tokens of the embedding or of the head; no rank has
                all logits

An adapter has the role of its layer. Of a column layer, a rank computes all low-rank states of its
positions and some outputs; of a row layer, a part of each low-rank state, and the parts are summed.

A norm of all query or key heads together is a column layer, too: a rank holds the weights of its
heads, and the ranks sum the squares of each row.

Between a row layer and the next column layer all ranks hold the same hidden states, (batch, length,
hidden_size). With ``sequence`` (Korthikanti et al. 2022, arXiv 2205.05198) each rank holds its part
of the length there: norms, residuals and dropout need 1 / ranks of the memory, and each sum becomes
a reduce-scatter before that region and an all-gather after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.lora import Adapter
from megagpt.model import (
    GPT,
    Attention,
    Context,
    Dropout,
    Embedding,
    Head,
    HeadNorm,
    Linear,
    Norm,
    Table,
)
from megagpt.parallel import rectangles as boxes
from megagpt.parallel.rectangles import Box

# torch 2.11 has only the older names, which torch 2.13 deprecates.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SPLIT_DIMENSION = {"column": 0, "row": 1, "vocabulary": 0}  # of the weight


class TensorAxis:
    """The ranks that share each layer, and this rank's index among them.

    ``sequence``: between the shared layers, hidden states are split along the length.
    """

    def __init__(self, group: dist.ProcessGroup, sequence: bool) -> None:
        self.group = group
        self.sequence = sequence
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Keep all positions on every rank within this context: one new token cannot be split."""
        before = self.sequence
        self.sequence = False
        try:
            yield
        finally:
            self.sequence = before

    def sum(self, partial: Tensor) -> Tensor:
        """Return the sum over the ranks; with ``sequence``, this rank's part of the length."""
        return _ScatterSum.apply(partial, self) if self.sequence else _Sum.apply(partial, self)

    def to_shares(self, x: Tensor) -> Tensor:
        """Return x along the whole length, for layers of which each rank computes some outputs."""
        return _ToShares.apply(x, self)

    def all_positions(self, x: Tensor) -> Tensor:
        """Return x along the whole length.

        What follows must already sum the gradient over the ranks.
        """
        return _AllPositions.apply(x, self) if self.sequence else x

    def sum_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient summed over the ranks.

        For a parameter that every rank holds whole and applies to its own positions only.
        """
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=self.group)
        return gradient

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Sum the gradients over the ranks in place, in one all-reduce; all have one dtype."""
        if not gradients:
            return
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together, group=self.group)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, together.split(sizes), strict=True):
            gradient.copy_(total.view_as(gradient))

    def part(self, x: Tensor) -> Tensor:
        """Return this rank's positions of x (batch, length, ...)."""
        return x.chunk(self.size, dim=1)[self.rank].contiguous()

    def gather(self, part: Tensor) -> Tensor:
        """Return all positions, (batch, length, ...).

        ``part`` is every rank's (batch, length / ranks, ...).
        """
        return self.from_all(part).movedim(0, 1).flatten(1, 2)  # no copy if the batch is 1

    def from_all(self, own: Tensor) -> Tensor:
        """Return every rank's tensor, stacked: (ranks, ...)."""
        everywhere = own.new_empty(self.size * own.shape[0], *own.shape[1:])
        all_gather_single(everywhere, own.contiguous(), group=self.group)
        return everywhere.unflatten(0, (self.size, -1))

    def scatter_sum(self, partial: Tensor, async_op: bool = False) -> tuple[Tensor, Any]:
        """Return this rank's positions of the sum over the ranks, and the work to wait for.

        ``partial`` is (batch, length, ...), the result (batch, length / ranks, ...).
        """
        by_rank = partial.unflatten(1, (self.size, -1)).movedim(1, 0).flatten(0, 1).contiguous()
        own = by_rank.new_empty(partial.shape[0], *by_rank.shape[1:])
        return own, reduce_scatter_single(own, by_rank, group=self.group, async_op=async_op)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, in place, because no backward before it needs its own output.

    The gradient of the sum is the gradient of every addend.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: TensorAxis) -> Tensor:
        ctx.mark_dirty(partial)
        dist.all_reduce(partial, group=axis.group)
        return partial

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ScatterSum(torch.autograd.Function):
    """The sum over all ranks, of which each rank keeps its positions.

    Backward gathers all positions' gradient.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return axis.scatter_sum(partial)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.gather(gradient), None


class _SumOfShares(torch.autograd.Function):
    """The sum over all ranks, of which each rank goes on with a share of its own.

    The gradient of each addend is therefore the sum of the ranks' gradients.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return axis.sum_gradient(partial.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum_gradient(gradient.clone()), None


class _AllPositions(torch.autograd.Function):
    """All positions from every rank's; backward keeps this rank's part of the gradient.

    Every rank must have the whole, already summed gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return axis.gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.part(gradient), None


class _ToShares(torch.autograd.Function):
    """x on all positions, for layers of which each rank computes some outputs.

    The gradient of x is the sum of the ranks' gradients; with ``sequence``, of this rank's
    positions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        ctx.sequence = axis.sequence
        return axis.gather(x) if axis.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        axis = ctx.axis
        if ctx.sequence:
            return axis.scatter_sum(gradient)[0], None
        return axis.sum_gradient(gradient.clone()), None


class _ColumnProduct(torch.autograd.Function):
    """x W^T + b for this rank's rows of W; x's gradient is summed while W's is computed.

    Backward gathers x's positions again instead of keeping them. The weight is saved as the
    parameter itself, because ZeRO-3 frees a gathered parameter by its identity. A frozen weight
    needs no x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: TensorAxis
    ) -> Tensor:
        ctx.axis = axis
        ctx.sequence = axis.sequence
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(axis.gather(x) if axis.sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        _, of_weight, of_bias, _ = ctx.needs_input_grad
        axis = ctx.axis
        x_gradient = gradient @ weight
        if ctx.sequence:
            x = axis.gather(x) if of_weight else None
            x_gradient, sum_done = axis.scatter_sum(x_gradient, async_op=True)
        else:
            sum_done = dist.all_reduce(x_gradient, group=axis.group, async_op=True)
        rows = gradient.flatten(0, -2)
        weight_gradient = rows.T @ x.flatten(0, -2) if of_weight else None
        bias_gradient = rows.sum(0) if of_bias else None
        sum_done.wait()
        return x_gradient, weight_gradient, bias_gradient, None


class ColumnLinear(nn.Module):
    """A linear layer of which each rank computes some outputs."""

    def __init__(self, linear: Linear, axis: TensorAxis) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora = linear.lora
        self.axis = axis

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = _ColumnProduct.apply(x, self.weight, self.bias, self.axis)
        return y if self.lora is None else y + self.lora(x, context)


class RowLinear(nn.Module):
    """A linear layer of which each rank holds some inputs; every rank gets all outputs."""

    def __init__(self, linear: Linear, axis: TensorAxis) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.lora = linear.lora
        self.axis = axis

    def forward(self, x: Tensor, context: Context) -> Tensor:
        y = self.axis.sum(F.linear(x, self.weight))
        y = y if self.bias is None else y + self.bias
        return y if self.lora is None else y + self.lora(x, context)


class SharedHeadNorm(nn.Module):
    """Queries or keys normalised over all heads, of which each rank holds some."""

    def __init__(self, norm: HeadNorm, axis: TensorAxis) -> None:
        super().__init__()
        self.weight = norm.weight
        self.channels = norm.weight.numel()  # of all ranks: the weight is not cut yet
        self.epsilon = norm.options["eps"]
        self.weight_offset = norm.options["weight_offset"]
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # (batch, 1, length, 1)
        squares = _SumOfShares.apply(wide.square().sum(dim=(1, 3), keepdim=True), self.axis)
        weight = self.weight_offset + self.weight.to(wide.dtype).view(-1, 1, x.shape[-1])
        return (wide * torch.rsqrt(squares / self.channels + self.epsilon) * weight).to(x.dtype)


class VocabularyTable(nn.Module):
    """An embedding of which each rank holds some rows; other ranks' tokens contribute zeros."""

    def __init__(self, table: Table, axis: TensorAxis) -> None:
        super().__init__()
        self.weight = table.weight
        self.axis = axis

    def forward(self, index: Tensor) -> Tensor:
        rows = self.weight.shape[0]
        own = index - self.axis.rank * rows
        elsewhere = (own < 0) | (own >= rows)
        found = F.embedding(own.masked_fill(elsewhere, 0), self.weight)
        return self.axis.sum(found.masked_fill(elsewhere[..., None], 0.0))


class PartTable(nn.Module):
    """The learned positions of this rank's part of the sequence."""

    def __init__(self, table: Table, axis: TensorAxis) -> None:
        super().__init__()
        self.weight = table.weight
        self.axis = axis

    def forward(self, index: Tensor) -> Tensor:
        # (length,) or (batch, length)
        own = index.chunk(self.axis.size, -1)[self.axis.rank] if self.axis.sequence else index
        return F.embedding(own, self.weight)


class VocabularyHead(Head):
    """The final norm, then the loss from every rank's own logits.

    Without targets, the logits of all ranks, for generation.
    """

    def __init__(self, head: Head, axis: TensorAxis) -> None:
        super().__init__(head.config, head.weight)
        self.norm = head.norm
        self.axis = axis

    def forward(self, x: Tensor, targets: Tensor | None) -> Tensor:
        x = self.axis.all_positions(self.norm(x))
        if targets is None:
            return self.axis.from_all(self.logits(x)).movedim(0, -2).flatten(-2)
        start = self.axis.rank * self.weight.shape[0]
        return self.loss(x, targets, vocabulary_start=start, group=self.axis.group)


REPLACEMENTS: dict[tuple[type[nn.Module], str], type[nn.Module]] = {
    (Linear, "column"): ColumnLinear,
    (Linear, "row"): RowLinear,
    (HeadNorm, "column"): SharedHeadNorm,
    (Table, "vocabulary"): VocabularyTable,
    (Head, "vocabulary"): VocabularyHead,
}


def split_dimensions(model: GPT) -> dict[nn.Parameter, int]:
    """Return the dim along which each shared parameter is split; the others are replicated."""
    split: dict[nn.Parameter, int] = {}
    for path, role in model.tensor_plan().items():
        layer: Any = model.get_submodule(path)
        split[layer.weight] = SPLIT_DIMENSION[role]
        if role == "column" and getattr(layer, "bias", None) is not None:
            split[layer.bias] = 0
        for adapter in _adapters(layer):
            split[adapter.a if adapter.is_row else adapter.b] = SPLIT_DIMENSION[role]
    return split


def _adapters(layer: nn.Module) -> list[Adapter]:
    return [module for module in layer.modules() if isinstance(module, Adapter)]


def box(shape: torch.Size, dimension: int | None, axis: TensorAxis | None) -> Box:
    """Return the rectangle that this rank holds of a parameter with this logical shape."""
    if dimension is None or axis is None:
        return boxes.whole(tuple(shape))
    return boxes.shard(tuple(shape), dimension, axis.rank, axis.size)


def share(model: GPT, axis: TensorAxis) -> None:
    """Replace the layers in the model's plan by the layers above.

    The new layers take over the parameters.
    """
    for path, role in model.tensor_plan().items():
        parent, _, name = path.rpartition(".")
        serial = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, REPLACEMENTS[type(serial), role](serial, axis))
    for module in model.modules():
        if isinstance(module, Attention):
            module.head_offset = axis.rank * (model.config.num_heads // axis.size)
        elif isinstance(module, Adapter):
            _share_adapter(module, axis)
        elif isinstance(module, Dropout) and axis.sequence:
            module.sequence_part = axis.rank
        elif isinstance(module, Embedding) and isinstance(module.positions, Table):
            module.positions = PartTable(module.positions, axis)


def _share_adapter(adapter: Adapter, axis: TensorAxis) -> None:
    if adapter.is_row:
        adapter.between = axis.sum
        units = adapter.a.shape[1] // adapter.unit  # of all ranks: A is not cut yet
        adapter.first_unit = axis.rank * (units // axis.size)
    else:
        adapter.between = axis.to_shares
        adapter.sequence_part = axis.rank if axis.sequence else 0


def partial_parameters(model: GPT, axis: TensorAxis) -> list[nn.Parameter]:
    """Return the replicated parameters that each rank applies to its own share.

    Their gradients must be summed. That is a norm of single heads, and what follows a row layer or
    precedes a column layer if it is split along the sequence.
    """
    partial: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, HeadNorm) or (axis.sequence and isinstance(module, Norm | PartTable)):
            partial += module.parameters(recurse=False)
        elif axis.sequence and isinstance(module, RowLinear) and module.bias is not None:
            partial.append(module.bias)
        elif axis.sequence and isinstance(module, Adapter):
            partial.append(module.b if module.is_row else module.a)
    return [parameter for parameter in partial if parameter.requires_grad]
