"""DeepSpeed's own PipelineEngine, another schedule and another engine, trains to the same
losses.
"""

import pytest

from tests.support.ranks import RankPool

STEPS = 5
SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "vocab_size": 128,
    "sequence_length": 16,
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_equal_those_of_pipeline_engine(request: pytest.FixtureRequest, ranks: int) -> None:
    """Pipeline 2, and pipeline 2 x data 2: uneven stages, ZeRO 1 in fp32, weight decay,
    clipping.
    """
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks])
    for losses in pool.run("benchmarks.peer_pipeline_engine:losses", shape=SHAPE, steps=STEPS):
        assert losses["megagpt"] == pytest.approx(losses["PipelineEngine"], rel=1e-6)
        assert losses["megagpt"][-1] < losses["megagpt"][0]
        assert len(losses["megagpt"]) == STEPS
