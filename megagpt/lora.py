"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), attached to the model from outside.

A projection x W^T becomes x W^T + (alpha / rank) dropout(x) A^T B^T, as in peft: A (rank, inputs)
begins uniform, B (outputs, rank) at zero, and W gets no gradient. Our fused weights hold several
projections, each with an adapter of its own if the targets say so: its outputs are put at the rows
of the projection. The adapter of the queries of block 3 has the parameters
`blocks.3.attention.qkv.lora.query.a` and `.b`.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.philox import fold_seed
from megagpt.config import ModelConfig
from megagpt.model import GPT, Context, initial_value
from megagpt.schema.lora import LoraConfig, Projection, known_projections, projection, shards
from megagpt.schema.megagpt import MegagptConfig

ADAPTERS = ".lora."  # in the global name of each parameter of an adapter
FIRST_SITE = 2**32  # of dropout; beyond the sites of the model's own


class Adapter(nn.Module):
    """The update of one projection: (batch, length, inputs) to (batch, length, outputs).

    ``between`` is applied to the low-rank states (batch, length, rank), which ranks that share the
    layer exchange. The inputs are dropped in equal runs of ``unit`` channels, each with a mask of
    its own, so that ranks which hold some of the runs, from ``first_unit`` on, drop the same
    elements. x is part ``sequence_part`` of equal parts of the sequence.
    """

    def __init__(self, projection: Projection, lora: LoraConfig, units: int, site: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(lora.rank, projection.inputs))
        self.b = nn.Parameter(torch.empty(projection.outputs, lora.rank))
        self.part = projection.part
        self.is_row = projection.is_row
        self.scale = lora.alpha / lora.rank
        self.dropout = lora.dropout
        self.site = site
        self.unit = projection.inputs // units
        self.first_unit = 0
        self.sequence_part = 0
        self.between: Callable[[Tensor], Tensor] = _unchanged

    def forward(self, x: Tensor, context: Context) -> Tensor:
        states = self.between(F.linear(self._dropped(x, context), self.a))
        return F.linear(states * self.scale, self.b)

    def _dropped(self, x: Tensor, context: Context) -> Tensor:
        if not self.dropout or context.dropout_seed is None:
            return x
        runs = x.unflatten(-1, (-1, self.unit)).transpose(1, 2)  # (batch, units, length, unit)
        units = torch.arange(self.first_unit, self.first_unit + runs.shape[1], device=x.device)
        seeds = fold_seed(context.dropout_seed[:, None], self.site, units)  # (batch, units)
        dropped = kernels.dropout(
            runs.flatten(0, 1),
            self.dropout,
            seed=seeds.flatten(),
            position_offset=self.sequence_part * x.shape[1],
        )
        return dropped.view(runs.shape).transpose(1, 2).flatten(2)


def _unchanged(states: Tensor) -> Tensor:
    return states


class Adapters(nn.ModuleDict):
    """The adapters of one linear layer by projection; together they make its update."""

    def __init__(self, adapters: Mapping[str, Adapter], widths: tuple[int, ...]) -> None:
        super().__init__(adapters)
        self.widths = widths

    def forward(self, x: Tensor, context: Context) -> Tensor:
        adapters = (cast(Adapter, module) for module in self.values())
        updates = {adapter.part: adapter(x, context) for adapter in adapters}
        return joined(updates, self.widths)


def joined(updates: Mapping[int | None, Tensor], widths: tuple[int, ...]) -> Tensor:
    """Return the update of a layer's rows (..., rows) from those of its projections.

    The rows are groups with ``widths`` rows of each part; a part without an update adds 0. The
    update of part None is that of all rows.
    """
    if None in updates:
        return updates[None]
    part, some = next(iter(updates.items()))
    assert part is not None
    groups = some.shape[-1] // widths[part]
    columns = [
        updates[index].unflatten(-1, (groups, width))
        if index in updates
        else some.new_zeros(*some.shape[:-1], groups, width)
        for index, width in enumerate(widths)
    ]
    return torch.cat(columns, dim=-1).flatten(-2)


def attach(model: GPT, lora: LoraConfig) -> None:
    """Give each block's projections their adapters, and let nothing else have a gradient."""
    model.requires_grad_(False)
    if model.embedding is not None:
        model.embedding.register_forward_hook(_begin_gradients)
    targets = _targets(lora, model.config)
    numbers = {name: index for index, name in enumerate(known_projections(model.config))}
    for block in model.blocks:
        for layer in dict.fromkeys(target.layer for target in targets):
            adapters = {
                target.name: Adapter(
                    target,
                    lora,
                    units=shards(model.config) if target.is_row else 1,
                    site=FIRST_SITE + int(block) * len(numbers) + numbers[target.name],
                )
                for target in targets
                if target.layer == layer
            }
            widths = next(target.widths for target in targets if target.layer == layer)
            model.blocks[block].get_submodule(layer).lora = Adapters(adapters, widths)


def _begin_gradients(embedding: nn.Module, inputs: object, x: Tensor) -> None:
    """Let the hidden states have a gradient from the first block on, as in every other block.

    ZeRO 3 releases a module's weights when the gradient of its input is there.
    """
    if torch.is_grad_enabled():
        x.requires_grad_()


def build(config: MegagptConfig, layers: range | None = None) -> GPT:
    """Return the model that a run trains, or some of its layers, with adapters if it has them.

    Its parameters are not initialised, as with ``GPT``.
    """
    model = GPT(config.model, config.training.recompute, layers)
    if config.training.lora is not None:
        attach(model, config.training.lora)
    return model


def is_of_an_adapter(name: str) -> bool:
    """Return whether a global name is that of an adapter's parameter."""
    return ADAPTERS in name


def starting_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Return the initial fp32 value (on the CPU) of a parameter of the model or of an adapter.

    B is 0. A is uniform within 1 / sqrt(inputs), which peft's kaiming_uniform_ with a = sqrt(5)
    gives, from a generator of its own, seeded by (seed, name). Its values are rounded to bf16, so
    that a run in bf16, whose fp32 copies begin with what bf16 holds, begins with the same.
    """
    if not is_of_an_adapter(name):
        return initial_value(name, shape, config, seed)
    if name.endswith(".b"):
        return first_b(shape)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).bfloat16().float()


def first_b(shape: torch.Size) -> Tensor:
    """Return the initial B, so that the first update is 0; tests replace it, to see A move too."""
    return torch.zeros(shape)


@torch.no_grad()
def initialise_(model: GPT, seed: int) -> GPT:
    """Fill every parameter in place with its initial value."""
    for name, parameter in model.named_parameters():
        parameter.copy_(starting_value(name, parameter.shape, model.config, seed))
    return model


def update_of(name: str, adapter: Callable[[str], Tensor], config: MegagptConfig) -> Tensor | None:
    """Return what adapters add to a weight of the base, (alpha / rank) B A; None if they do not.

    ``adapter`` gives the value of an adapter's parameter by its global name, in fp32.
    """
    lora = config.training.lora
    if lora is None:
        return None
    updates: dict[int | None, Tensor] = {}
    widths: tuple[int, ...] = ()
    for target in _targets(lora, config.model):
        if name.startswith("blocks.") and name.endswith(f".{target.layer}.weight"):
            prefix = f"{name.removesuffix('.weight')}{ADAPTERS}{target.name}"
            product = adapter(f"{prefix}.b") @ adapter(f"{prefix}.a")  # (outputs, inputs)
            updates[target.part] = product.T * (lora.alpha / lora.rank)
            widths = target.widths
    return joined(updates, widths).T if updates else None


def _targets(lora: LoraConfig, model: ModelConfig) -> list[Projection]:
    return [projection(name, model) for name in lora.projections(model)]
