"""Engines that are closed do not pile up: nor do the gloo threads of their groups, each of which
polls for ever.
"""

from typing import Any

import pytest

from tests.support.configurations import tiny, with_zero
from tests.support.ranks import RankPool


@pytest.mark.rotate(2)
@pytest.mark.parametrize(("stage", "parallel"), [(1, {"pipeline": 2}), (3, {})])
def test_nothing_of_an_engine_outlives_it(
    two_ranks: RankPool, stage: int, parallel: dict[str, Any]
) -> None:
    config = with_zero(tiny(steps=2), stage)
    config["megagpt"]["parallel"] = parallel
    held = [
        two_ranks.run("tests.support.jobs.training:left_after_training", config=config, steps=2)
        for _ in range(3)
    ]
    assert held[2] == held[1] == held[0]
    assert all(own for *_, own in held[0]), "ZeRO-3 replaces torch's linear"
