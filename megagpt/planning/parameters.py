"""The parameters of a pipeline stage with their sizes, in the order of `model.parameters()`.

A size is the number of elements on one tensor shard. Tensor parallelism splits attention by whole
key-value groups, the MLP by its hidden channels (Shoeybi et al. 2019, arXiv 1909.08053, section 3),
the embedding and the head by rows of the vocabulary, a norm of all query or key heads by heads.
Other norms, positions and the biases behind an all-reduced output are whole on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from typing import NamedTuple

from megagpt.config import ModelConfig
from megagpt.planning.layout import Layout
from megagpt.schema.lora import LoraConfig, projection


class Parameter(NamedTuple):
    """One parameter of a stage: global name, elements on one tensor shard, weight decay.

    ``trained`` is false for a weight that adapters change.
    """

    name: str
    numel: int
    decayed: bool
    trained: bool = True


def parameters_of_rank(layout: Layout, pipeline_rank: int) -> tuple[Parameter, ...]:
    """Return the parameters of one rank of this pipeline rank, over its chunks."""
    return _of_rank(layout, pipeline_rank)[0]


def groups_of_rank(layout: Layout, pipeline_rank: int) -> tuple[int, int]:
    """Return the elements with and without weight decay: the optimizer's two groups (engine.py).

    Frozen parameters are in neither.
    """
    return _of_rank(layout, pipeline_rank)[1]


def frozen_of_rank(layout: Layout, pipeline_rank: int) -> int:
    """Return the elements of the frozen parameters."""
    return _of_rank(layout, pipeline_rank)[2]


def _of_rank(
    layout: Layout, pipeline_rank: int
) -> tuple[tuple[Parameter, ...], tuple[int, int], int]:
    return _of_stages(layout.model, _layers(layout, pipeline_rank), layout.tensor, layout.lora)


def partitions_of_rank(layout: Layout, pipeline_rank: int) -> tuple[int, ...]:
    """Return ZeRO 3's part of each trained parameter on a data rank: ceil(numel / data ranks)."""
    layers = _layers(layout, pipeline_rank)
    return _partitions(layout.model, layers, layout.tensor, layout.lora, layout.data)


def largest_module(layout: Layout, pipeline_rank: int) -> int:
    """Return the elements of the module whose own parameters are the most."""
    layers = _layers(layout, pipeline_rank)
    return _largest_module(layout.model, layers, layout.tensor, layout.lora)


@cache
def _partitions(
    model: ModelConfig, stages: tuple[range, ...], tensor: int, lora: LoraConfig | None, data: int
) -> tuple[int, ...]:
    found, *_ = _of_stages(model, stages, tensor, lora)
    return tuple(-(-parameter.numel // data) for parameter in found if parameter.trained)


@cache
def _largest_module(
    model: ModelConfig, stages: tuple[range, ...], tensor: int, lora: LoraConfig | None
) -> int:
    modules: Counter[str] = Counter()
    for parameter in _of_stages(model, stages, tensor, lora)[0]:
        modules[parameter.name.rpartition(".")[0]] += parameter.numel
    return max(modules.values())


def _layers(layout: Layout, pipeline_rank: int) -> tuple[range, ...]:
    stages = layout.stages
    return tuple(stages[stage] for stage in layout.stages_of(pipeline_rank))


@cache
def _of_stages(
    model: ModelConfig, stages: tuple[range, ...], tensor: int, lora: LoraConfig | None
) -> tuple[tuple[Parameter, ...], tuple[int, int], int]:
    """Return the parameters, the elements of the optimizer's two groups, and those frozen."""
    found = tuple(parameter for layers in stages for parameter in _stage(model, layers, tensor))
    if lora is not None:
        found = tuple(_adapted(found, model, tensor, lora))
    sizes = [0, 0, 0]
    for parameter in found:
        sizes[2 if not parameter.trained else 0 if parameter.decayed else 1] += parameter.numel
    return found, (sizes[0], sizes[1]), sizes[2]


def _adapted(
    parameters: Iterable[Parameter], model: ModelConfig, tensor: int, lora: LoraConfig
) -> Iterator[Parameter]:
    """Yield the parameters, frozen, and after those of each layer its adapters'."""
    targets = [projection(name, model) for name in lora.projections(model)]
    for layer, members in groupby(parameters, lambda p: p.name.rpartition(".")[0]):
        yield from (parameter._replace(trained=False) for parameter in members)
        for target in targets:
            if layer.startswith("blocks.") and layer.endswith(f".{target.layer}"):
                name = f"{layer}.lora.{target.name}"
                of_a, of_b = (tensor, 1) if target.is_row else (1, tensor)
                yield Parameter(f"{name}.a", lora.rank * target.inputs // of_a, True)
                yield Parameter(f"{name}.b", target.outputs // of_b * lora.rank, True)


@cache
def _stage(model: ModelConfig, layers: range, tensor: int) -> tuple[Parameter, ...]:
    """Return the parameters of consecutive layers.

    A tied head has its own weight only if the embedding is in another stage.
    """
    found: list[Parameter] = []
    for layer in layers:
        if layer == 0:
            found += _embedding(model, tensor)
        elif layer <= model.num_layers:
            found += _block(model, f"blocks.{layer - 1}", tensor)
        else:
            tied_here = model.tie_embeddings and 0 in layers
            found += _head(model, tensor, with_weight=not tied_here)
    return tuple(found)


def _embedding(model: ModelConfig, tensor: int) -> Iterator[Parameter]:
    yield Parameter("embedding.tokens.weight", model.vocab_size * model.hidden_size // tensor, True)
    if model.position == "learned":
        yield Parameter(
            "embedding.positions.weight", model.sequence_length * model.hidden_size, True
        )


def _block(model: ModelConfig, block: str, tensor: int) -> Iterator[Parameter]:
    """Yield norm, attention, norm, MLP, norm; which norms there are, the model says.

    The bias of a column-split matrix is split too; other biases are whole.
    """
    width = model.hidden_size
    qkv = model.query_size + 2 * model.key_value_size
    up = model.mlp_size * (2 if model.gated else 1)
    before = model.post_norm != "instead"
    after = model.post_norm != "none"
    if before:
        yield from _norm(model, f"{block}.attention_norm")
    yield Parameter(f"{block}.attention.qkv.weight", width * qkv // tensor, True)
    if model.qkv_bias:
        yield Parameter(f"{block}.attention.qkv.bias", qkv // tensor, False)
    yield from _head_norms(model, f"{block}.attention", tensor)
    yield Parameter(f"{block}.attention.output.weight", model.query_size * width // tensor, True)
    if model.output_bias:
        yield Parameter(f"{block}.attention.output.bias", width, False)
    if after:
        yield from _norm(model, f"{block}.attention_post_norm")
    if before:
        yield from _norm(model, f"{block}.mlp_norm")
    yield Parameter(f"{block}.mlp.up.weight", width * up // tensor, True)
    if model.mlp_bias:
        yield Parameter(f"{block}.mlp.up.bias", up // tensor, False)
    yield Parameter(f"{block}.mlp.down.weight", model.mlp_size * width // tensor, True)
    if model.mlp_bias:
        yield Parameter(f"{block}.mlp.down.bias", width, False)
    if after:
        yield from _norm(model, f"{block}.mlp_post_norm")


def _head_norms(model: ModelConfig, attention: str, tensor: int) -> Iterator[Parameter]:
    if model.qk_norm == "per_head":
        yield Parameter(f"{attention}.query_norm.weight", model.head_size, False)
        yield Parameter(f"{attention}.key_norm.weight", model.head_size, False)
    elif model.qk_norm == "whole":
        yield Parameter(f"{attention}.query_norm.weight", model.query_size // tensor, False)
        yield Parameter(f"{attention}.key_norm.weight", model.key_value_size // tensor, False)


def _head(model: ModelConfig, tensor: int, *, with_weight: bool) -> Iterator[Parameter]:
    if with_weight:
        name = "embedding.tokens.weight" if model.tie_embeddings else "head.weight"
        yield Parameter(name, model.vocab_size * model.hidden_size // tensor, True)
    yield from _norm(model, "head.norm")


def _norm(model: ModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", model.hidden_size, False)
    if model.norm_bias:
        yield Parameter(f"{name}.bias", model.hidden_size, False)
