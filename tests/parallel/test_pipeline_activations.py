"""How many micro-batches' activations a pipeline rank holds: what each schedule promises
(docs/parallelism.md).
"""

import pytest

from tests.support.configurations import Config, tiny, with_zero
from tests.support.ranks import RankPool

RANKS = 4


def pipeline_of_four(schedule: str, micro_batches: int, stage: int) -> Config:
    virtual = 2 if schedule == "interleaved" else 1
    config = with_zero(tiny(batch=micro_batches, micro=1, num_layers=8), stage)
    config["megagpt"]["parallel"] = {
        "pipeline": RANKS,
        "schedule": schedule,
        "virtual_stages": virtual,
    }
    return config


def expected(schedule: str, rank: int, micro_batches: int) -> int:
    """Forwards held at most, each of a stage: 1F1B warms up with one for each stage behind,
    unless there are fewer micro-batches than stages, where it is GPipe; interleaved, with two
    for each rank behind and a round of the first chunk (Narayanan et al. 2021, arXiv 2104.04473,
    section 2.2).
    """
    if schedule == "gpipe" or micro_batches < RANKS:
        return micro_batches
    if schedule == "1f1b":
        return RANKS - rank
    return min(2 * (RANKS - rank - 1) + RANKS + 1, 2 * micro_batches)


@pytest.mark.rotate(2)
@pytest.mark.parametrize(
    ("schedule", "micro_batches", "stage"),
    [("gpipe", 6, 1), ("1f1b", 6, 1), ("1f1b", 6, 3), ("1f1b", 2, 1), ("interleaved", 8, 1)],
)
def test_ranks_hold_the_activations_of_as_many_micro_batches_as_the_schedule_says(
    four_ranks: RankPool, schedule: str, micro_batches: int, stage: int
) -> None:
    counts = four_ranks.run(
        "tests.support.jobs.pipeline:live_micro_batches",
        config=pipeline_of_four(schedule, micro_batches, stage),
    )
    virtual = 2 if schedule == "interleaved" else 1
    for rank, held in enumerate(counts):
        assert len(held) == 2 * micro_batches * virtual
        assert max(held) == expected(schedule, rank, micro_batches)
        assert held[-1] == 0
