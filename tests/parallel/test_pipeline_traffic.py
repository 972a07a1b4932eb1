"""What a pipeline sends: gradients once a step or once a micro-batch, and ZeRO-3's parameters as
rarely as it may.
"""

from typing import Any

import pytest

from tests.support import plain
from tests.support.configurations import Config, tiny, with_zero
from tests.support.equality import STEPS, assert_equal_training
from tests.support.ranks import RankPool

MICRO_BATCHES = 4
SEPARATELY = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


def pipeline_of_two(stage: int, zero: dict[str, Any], **parallel: Any) -> Config:
    """Pipeline 2 x data 2; untied, as per_micro_batch needs it."""
    config = with_zero(
        tiny(batch=4 * MICRO_BATCHES, steps=STEPS, num_layers=4, tie_embeddings=False),
        stage,
        **zero,
    )
    config["megagpt"]["parallel"] = {"pipeline": 2} | parallel
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "times"), [(1, 1), (3, MICRO_BATCHES)])
def test_per_step_sends_each_gradient_once(four_ranks: RankPool, stage: int, times: int) -> None:
    """Per micro-batch, those stages send each time that cut gradients; ZeRO 1 waits for the last
    by itself.
    """
    operation = "reduce_scatter" if stage == 3 else "all_reduce"
    sent = {}
    for reduction in ("per_step", "per_micro_batch"):
        config = pipeline_of_two(stage, {}, gradient_reduction=reduction)
        ranks = four_ranks.run("tests.support.jobs.training:train", config=config, steps=STEPS)
        sent[reduction] = [rank["traffic"]["data", operation][1] for rank in ranks]
    own = [rank["evidence"]["stage_elements"] for rank in ranks]
    few = 8  # numbers beside gradients: the loss, the norm, an overflow
    assert [pytest.approx(elements, abs=few) for elements in own] == sent["per_step"]
    assert [pytest.approx(times * elements, abs=few) for elements in own] == sent["per_micro_batch"]


@pytest.mark.parametrize(
    "schedule",
    [{"schedule": "1f1b"}, pytest.param({"schedule": "gpipe"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_zero_3_fetches_ahead_and_keeps_what_the_next_micro_batch_needs(
    four_ranks: RankPool, schedule: dict[str, str]
) -> None:
    """Its trace spans the step: without it, every micro-batch gathered every parameter forward
    and backward.
    """
    gathered = {}
    for name, zero in (("ahead", {}), ("separately", SEPARATELY)):
        config = pipeline_of_two(3, zero, **schedule)
        ranks = four_ranks.run("tests.support.jobs.training:train", config=config, steps=STEPS)
        assert_equal_training(ranks, plain.train(config, STEPS), 8, tolerance=2e-5)
        gathered[name] = [rank["traffic"]["data", "all_gather"] for rank in ranks]
    elements = ranks[0]["evidence"]["stage_elements"]
    for (calls, ahead), (many_calls, separately) in zip(
        gathered["ahead"], gathered["separately"], strict=True
    ):
        assert separately == pytest.approx(2 * MICRO_BATCHES * elements, rel=0.02)
        assert ahead < separately / 2
        assert calls < many_calls / 3
