"""Where a model is cut into pipeline stages: contiguous runs of its layers whose work is as even as can be."""

from functools import cache

from megagpt.config import ModelConfig


def layer_costs(model: ModelConfig) -> list[float]:
    """Matrix elements that one token multiplies, by layer: the embedding, each block, the head.

    The embedding looks rows up and multiplies nothing; attention's own products are the same in every block.
    """
    attention = 2 * model.num_heads * model.head_size * model.sequence_length
    block = model.block_matmul_parameters + attention
    return [0.0, *[float(block)] * model.num_layers, float(model.vocab_size * model.hidden_size)]


def describe(model: ModelConfig, layers: range) -> str:
    """What a stage holds, and its share of the work: `embedding, blocks 0-5 (49%)`."""
    blocks = [layer - 1 for layer in layers if 1 <= layer <= model.num_layers]
    held = ["embedding"] * (0 in layers) + [f"blocks {blocks[0]}-{blocks[-1]}"]
    held += ["head"] * (model.num_layers + 1 in layers)
    costs = layer_costs(model)
    return f"{', '.join(held)} ({sum(costs[layer] for layer in layers) / sum(costs):.0%})"


def cut(model: ModelConfig, num_stages: int) -> list[range]:
    """The layers of each stage, 0 being the embedding and num_layers + 1 the head; no stage without a block.

    The costliest stage, which all others wait for, is as cheap as possible (linear partitioning, dynamic programming).
    Needs num_stages <= num_layers.
    """
    costs = layer_costs(model)
    blocks = model.num_layers

    def cost(first: int, last: int) -> float:
        """Of a stage holding blocks first to last (counted from 1), and the embedding or head beside them."""
        start, stop = 0 if first == 1 else first, blocks + 2 if last == blocks else last + 1
        return sum(costs[start:stop])

    @cache
    def best(first: int, stages: int) -> tuple[float, tuple[int, ...]]:
        """(the costliest stage's cost, last block of each stage) for blocks from ``first`` on in so many stages."""
        if stages == 1:
            return cost(first, blocks), (blocks,)
        options = []
        for last in range(first, blocks - stages + 2):
            rest, cuts = best(last + 1, stages - 1)
            options.append((max(cost(first, last), rest), (last, *cuts)))
        return min(options)

    lasts = best(1, num_stages)[1]
    firsts = [1, *(last + 1 for last in lasts[:-1])]
    return [
        range(0 if first == 1 else first, blocks + 2 if last == blocks else last + 1)
        for first, last in zip(firsts, lasts, strict=True)
    ]
