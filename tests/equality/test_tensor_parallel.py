"""What the matrix (tests/equality/test_matrix.py) does not show of layers shared by ranks: four
of them, and fused kernels.
"""

from typing import Any

import pytest

from tests.conftest import HAS_GPU
from tests.support import plain
from tests.support.configurations import KINDS, tiny, with_zero
from tests.support.equality import (
    STEPS,
    assert_a_rank_holds_and_reduces_its_share,
    assert_equal_training,
)
from tests.support.ranks import RankPool

MICRO_BATCHES = 4


@pytest.mark.parametrize(
    ("stage", "sequence", "model"),
    [
        (0, False, KINDS["olmo2"] | {"num_kv_heads": 4}),
        pytest.param(3, True, KINDS["olmo2"] | {"num_kv_heads": 4}, marks=pytest.mark.slow),
        pytest.param(3, True, {"dropout": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_four_ranks_that_share_every_layer_equal_one_plain_process(
    four_ranks: RankPool, stage: int, sequence: bool, model: dict[str, Any]
) -> None:
    """Of the vocabulary's 128 rows, the last rank has none that stands for a token. A norm of
    all heads needs a sum for each token, of queries and of keys.
    """
    sizes = {"num_layers": 3, "vocabulary": 70}
    config = with_zero(tiny(batch=2 * MICRO_BATCHES, micro=2, steps=STEPS, **sizes, **model), stage)
    parallel = config["megagpt"]["parallel"] = {"tensor": 4, "sequence": sequence}
    ranks = four_ranks.run("tests.support.jobs.training:train", config=config, steps=STEPS)
    assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
    sums = (4 * 3 + (1 if sequence else 2)) * MICRO_BATCHES
    of_head_norms = 2 * 2 * 3 * MICRO_BATCHES * 2 * 16 if "qk_norm" in model else 0
    for rank in ranks:
        assert rank["evidence"]["stage_elements"] < 0.35 * rank["evidence"]["whole_elements"]
        assert_a_rank_holds_and_reduces_its_share(
            rank, stage, ("none", "none"), parallel, 1, MICRO_BATCHES
        )
        of_hidden = sums * 2 * 16 * 32
        _, summed = rank["traffic"]["tensor", "all_reduce"]
        if sequence:
            _, scattered = rank["traffic"]["tensor", "reduce_scatter"]
            assert scattered == of_hidden
            assert summed >= of_head_norms
        else:  # the norm of the gradients is a number each
            assert summed == pytest.approx(of_hidden + of_head_norms, abs=16)


@pytest.mark.skipif(HAS_GPU, reason="the interpreter works on CPU tensors")
@pytest.mark.parametrize(
    ("replicas", "micro_batches", "steps"),
    [(1, 2, 1), pytest.param(2, 4, 2, marks=pytest.mark.slow)],
)
def test_interpreted_kernels_inside_pipeline_2_x_tensor_2_x_zero_3(
    request: pytest.FixtureRequest, replicas: int, micro_batches: int, steps: int
) -> None:
    pool: RankPool = request.getfixturevalue({1: "four_ranks", 2: "eight_ranks"}[replicas])
    config = with_zero(
        tiny(batch=2 * micro_batches * replicas, micro=2, steps=steps, dropout=0.1), 3
    )
    config["megagpt"]["parallel"] = {"pipeline": 2, "tensor": 2, "sequence": True}
    ranks = pool.run(
        "tests.support.jobs.training:train_on_interpreted_kernels",
        config=config,
        steps=steps,
        deadline_s=400,
    )
    assert_equal_training(ranks, plain.train(config, steps), 8, tolerance=2e-5)
    everywhere = {
        "norm_forward",
        "norm_backward",
        "attention_forward",
        "attention_backward_keys",
        "dropout_apply",
    }
    for rank in ranks:
        assert rank["launches"].keys() >= everywhere
        assert rank["traffic"]["tensor", "reduce_scatter"][0] >= 4 * micro_batches
        assert ("data", "reduce_scatter") in rank["traffic"]
        shard, stage = rank["evidence"]["shard_elements"], rank["evidence"]["stage_elements"]
        assert shard == pytest.approx(stage / replicas, rel=0.01)
    assert "cross_entropy_gradient" in ranks[-1]["launches"]
