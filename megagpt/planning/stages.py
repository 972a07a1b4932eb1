"""Split a model into pipeline stages: consecutive layers, balanced by work, then by parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from megagpt.config import ModelConfig
from megagpt.planning.flops import layer_flops

# how much slower than necessary the slowest stage may be to make the largest stage smaller
SLOWER = 0.02


def stage_parameters(model: ModelConfig, layers: range) -> int:
    """Return the parameters of a stage.

    A tied weight counts twice over the model if its two layers are in different stages.
    """
    table = model.vocab_size * model.hidden_size
    positions = model.sequence_length * model.hidden_size if model.position == "learned" else 0
    embedding, head = 0 in layers, model.num_layers + 1 in layers
    tables = 1 if embedding and head and model.tie_embeddings else embedding + head
    blocks = len(layers) - embedding - head
    return (
        tables * table
        + embedding * positions
        + blocks * model.block_parameters
        + head * model.norm_parameters
    )


def describe_stage(model: ModelConfig, layers: range) -> str:
    """Return a stage's contents and shares.

    For example `embedding, blocks 0-5 (49% of the work, 52% of the parameters)`.
    """
    blocks = [layer - 1 for layer in layers if 1 <= layer <= model.num_layers]
    held = ["embedding"] * (0 in layers) + [f"blocks {blocks[0]}-{blocks[-1]}"]
    held += ["head"] * (model.num_layers + 1 in layers)
    costs = layer_flops(model)
    work = sum(costs[layer] for layer in layers) / sum(costs)
    parameters = stage_parameters(model, layers) / model.num_parameters
    return f"{', '.join(held)} ({work:.0%} of the work, {parameters:.0%} of the parameters)"


def cut(model: ModelConfig, num_stages: int) -> list[range]:
    """Return the layers of each stage; 0 is the embedding and num_layers + 1 the head.

    Every stage has a block. The slowest stage is as fast as possible. Among the splits whose
    slowest stage is within ``SLOWER`` of that, choose the one whose largest stage has the
    fewest parameters. Needs num_stages <= num_layers.
    """
    costs = layer_flops(model)

    def work(layers: range) -> float:
        return sum(costs[layers.start : layers.stop])

    fastest, _ = _best(model.num_layers, num_stages, lambda layers: (work(layers), 0.0))[0]
    limit = (1 + SLOWER) * fastest

    def parameters_within(layers: range) -> Worst:
        too_slow = max(0.0, work(layers) - limit)
        return (too_slow, float(stage_parameters(model, layers)))

    return _best(model.num_layers, num_stages, parameters_within)[1]


Worst = tuple[float, float]


def _best(
    blocks: int, num_stages: int, burden: Callable[[range], Worst]
) -> tuple[Worst, list[range]]:
    """Return the split with the smallest largest burdens, and those burdens.

    The first kind of burden decides before the second. Of equal splits, the one with smaller
    first stages wins. Linear partitioning by dynamic programming.
    """
    of = cache(burden)

    def stage(first: int, last: int) -> range:
        """Return the layers of blocks first to last (from 1), with the embedding or head."""
        return range(0 if first == 1 else first, blocks + 2 if last == blocks else last + 1)

    @cache
    def best(first: int, stages: int) -> tuple[Worst, tuple[int, ...]]:
        """Return the best split of blocks from ``first`` on: the last block of each stage."""
        if stages == 1:
            return of(stage(first, blocks)), (blocks,)
        found: tuple[Worst, tuple[int, ...]] | None = None
        for last in range(first, blocks - stages + 2):
            own = of(stage(first, last))
            if found is not None and own > found[0]:
                break  # more blocks only add to a burden
            rest, cuts = best(last + 1, stages - 1)
            option = ((max(own[0], rest[0]), max(own[1], rest[1])), (last, *cuts))
            found = option if found is None else min(found, option)
        assert found is not None  # a stage has a block
        return found

    worst, lasts = best(1, num_stages)
    firsts = [1, *(last + 1 for last in lasts[:-1])]
    return worst, [stage(first, last) for first, last in zip(firsts, lasts, strict=True)]
