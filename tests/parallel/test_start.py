"""Starting: no rank ever holds more than its own shard and one block beside it, and every mesh
starts alike.
"""

from typing import Any

import pytest
import torch

from tests.support import plain
from tests.support.configurations import Config, tiny, with_zero
from tests.support.ranks import RankPool
from tests.support.shards import whole_tensors

WIDTH, BLOCKS = 128, 16
BLOCK_BYTES = 4 * 12 * WIDTH**2  # the matrices of a block in fp32; a sixteenth of the model, nearly
INTERLEAVED = {"schedule": "interleaved", "virtual_stages": 2}
MESHES: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (2, {}),
    (3, {}),
    (1, {"tensor": 2}),
    (3, {"tensor": 4}),
    (1, {"pipeline": 2} | INTERLEAVED),
    (3, {"pipeline": 2, "tensor": 2}),
]


def deep(stage: int, parallel: dict[str, Any], **model: Any) -> Config:
    """A model of many blocks under a mesh, with buckets smaller than a block."""
    shape = {"num_layers": BLOCKS, "hidden_size": WIDTH, "vocab_size": 128} | model
    config = with_zero(tiny(batch=16, **shape), stage, reduce_bucket_size=10_000)
    config["megagpt"]["parallel"] = parallel
    return config


@pytest.mark.rotate(3)
@pytest.mark.parametrize(
    ("stage", "parallel"),
    [(3, {}), (3, {"tensor": 2}), (3, {"pipeline": 2}), (1, {"tensor": 2}), (1, {"pipeline": 2})],
)
def test_a_rank_builds_its_shard_with_one_block_beside_it(
    two_ranks: RankPool, stage: int, parallel: dict[str, Any]
) -> None:
    """Half of the model on each of two ranks, however it is cut.

    What DeepSpeed then makes of the shard is counted too: at ZeRO 1 it flattens the parameters,
    which lie there twice for a moment (and their gradients need as much in the first step).
    """
    flattened = int(stage == 1)
    for rank in two_ranks.run(
        "tests.support.jobs.start:memory_at_start", config=deep(stage, parallel)
    ):
        assert rank["logical"] > BLOCKS * BLOCK_BYTES
        assert rank["model"] == pytest.approx(rank["logical"] / 2, rel=0.05)
        assert rank["model_peak"] < rank["model"] + BLOCK_BYTES
        assert rank["engine_peak"] < rank["engine"] + flattened * rank["model"] + BLOCK_BYTES


@pytest.mark.parametrize(
    "model",
    [{}, pytest.param({"tie_embeddings": False, "vocabulary": 70}, marks=pytest.mark.slow)],
    ids=str,
)
def test_every_mesh_starts_from_the_same_bits(four_ranks: RankPool, model: dict[str, Any]) -> None:
    expected = plain.train(tiny(num_layers=4, **model), 0).start
    for stage, parallel in MESHES:
        config = with_zero(tiny(num_layers=4, **model), stage)
        config["megagpt"]["parallel"] = parallel
        found = whole_tensors(
            four_ranks.run("tests.support.jobs.start:initial_weights", config=config)
        )
        assert {name for _, name in found} == expected.keys()
        for (_, name), values in found.items():
            assert torch.equal(values, expected[name]), f"{name} under {parallel}"
