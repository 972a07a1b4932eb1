"""How a published architecture stores what we have in one tensor: joined to ours, split again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.config import ModelConfig


class Relation(NamedTuple):
    """``join`` makes our tensor from theirs, ``split`` theirs from ours, for weights and biases.

    Both only move elements, so that a value comes back as it was in any number format.
    """

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]


def _grouped(projections: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Return rows of q, k and v in our order: a group's queries, then its k, then its v."""
    per_group = [rows.unflatten(0, (model.num_kv_heads, -1)) for rows in projections]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def _ungrouped(fused: Tensor, model: ModelConfig) -> list[Tensor]:
    """Return q, k and v from rows in our order."""
    queries = model.num_heads // model.num_kv_heads * model.head_size
    per_group = fused.unflatten(0, (model.num_kv_heads, -1)).split(
        [queries, model.head_size, model.head_size], dim=1
    )
    return [rows.flatten(0, 1) for rows in per_group]


def _padded(rows: Tensor, model: ModelConfig) -> Tensor:
    """Return rows with those that pad our vocabulary: zero, because they are never trained."""
    return F.pad(rows, (0, 0, 0, model.vocab_size - model.vocabulary))


def _alternating(gate_and_value: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(gate_and_value), dim=1).flatten(0, 1)


def _separate(ours: Tensor) -> tuple[Tensor, ...]:
    return ours.unflatten(0, (-1, 2)).unbind(1)


SAME = Relation(lambda theirs, _: theirs[0], lambda ours, _: [ours])
ROWS_OF_TOKENS = Relation(
    lambda theirs, model: _padded(theirs[0], model), lambda ours, model: [ours[: model.vocabulary]]
)
QUERY_KEY_VALUE = Relation(_grouped, _ungrouped)
# Queries above keys above values, in one matrix (Phi-3).
STACKED_QUERY_KEY_VALUE = Relation(
    lambda theirs, model: _grouped(
        theirs[0].split([model.query_size, model.key_value_size, model.key_value_size]), model
    ),
    lambda ours, model: [torch.cat(_ungrouped(ours, model))],
)
# The rows of an MLP's gate and value alternate in ours.
GATE_AND_VALUE = Relation(
    lambda theirs, _: _alternating(theirs), lambda ours, _: list(_separate(ours))
)
# The gate above the value, in one matrix (Phi-3).
STACKED_GATE_AND_VALUE = Relation(
    lambda theirs, _: _alternating(theirs[0].chunk(2)), lambda ours, _: [torch.cat(_separate(ours))]
)
# GPT-2's projections are stored (inputs, outputs); a bias has one dim, which stays.
TURNED = Relation(lambda theirs, _: theirs[0].movedim(-1, 0), lambda ours, _: [ours.movedim(0, -1)])
TURNED_QUERY_KEY_VALUE = Relation(
    lambda theirs, model: _grouped(theirs[0].movedim(-1, 0).chunk(3), model),
    lambda ours, model: [torch.cat(_ungrouped(ours, model)).movedim(0, -1)],
)
