"""Where models are cut: against every possible cut of small ones."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import ModelConfig
from megagpt.model import GPT
from megagpt.planning.flops import layer_flops
from megagpt.planning.stages import SLOWER, cut, describe_stage, stage_parameters


def model_of(**changes: Any) -> ModelConfig:
    shape = {
        "num_layers": 6,
        "hidden_size": 32,
        "num_heads": 4,
        "sequence_length": 16,
        "vocab_size": 256,
    }
    return ModelConfig.model_validate(shape | changes)


def every_cut(blocks: int, stages: int) -> list[list[range]]:
    cuts = []
    for inner in itertools.combinations(range(2, blocks + 1), stages - 1):
        edges = [0, *inner, blocks + 2]
        cuts.append([range(start, stop) for start, stop in itertools.pairwise(edges)])
    return cuts


def slowest(model: ModelConfig, stages: list[range]) -> float:
    costs = layer_flops(model)
    return max(sum(costs[layer] for layer in layers) for layers in stages)


def largest(model: ModelConfig, stages: list[range]) -> int:
    return max(stage_parameters(model, layers) for layers in stages)


MODELS = st.builds(
    model_of,
    num_layers=st.integers(1, 9),
    vocab_size=st.sampled_from([128, 1024, 16384]),
    sequence_length=st.sampled_from([8, 4096]),
    tie_embeddings=st.booleans(),
    position=st.sampled_from(["learned", "rotary"]),
)


@given(MODELS, st.data())
@settings(max_examples=40)
def test_no_cut_is_faster_and_none_as_fast_is_smaller(
    model: ModelConfig, data: st.DataObject
) -> None:
    found = cut(model, data.draw(st.integers(1, model.num_layers)))
    all_cuts = every_cut(model.num_layers, len(found))
    assert found in all_cuts
    limit = (1 + SLOWER) * min(slowest(model, stages) for stages in all_cuts)
    assert slowest(model, found) <= limit
    assert largest(model, found) == min(
        largest(model, stages) for stages in all_cuts if slowest(model, stages) <= limit
    )


def test_a_large_embedding_takes_blocks_away_from_its_stage_where_that_costs_no_time() -> None:
    """Seven blocks on three stages: whichever has three, the step is as long."""
    model = model_of(num_layers=7, vocab_size=1024, position="rotary", sequence_length=4096)
    assert [len(layers) for layers in cut(model, 3)] == [1 + 2, 3, 2 + 1]
    words = [describe_stage(model, layers) for layers in cut(model, 3)]
    assert words[0].startswith("embedding, blocks 0-1 (")
    assert "of the work" in words[1]
    assert "of the parameters" in words[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_parameters_are_those_of_the_modules(tied: bool, stages: int) -> None:
    model = model_of(num_layers=5, tie_embeddings=tied, num_kv_heads=2, activation="swiglu")
    for layers in cut(model, stages):
        with torch.device("meta"):
            part = GPT(model, layers=layers)
        assert sum(parameter.numel() for parameter in part.parameters()) == stage_parameters(
            model, layers
        )
