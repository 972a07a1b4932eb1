"""What pipelines post reaches its end where NCCL does one thing at a time on a communicator
(`compat.batch_p2p`).
"""

from functools import cache

import pytest

from tests.support.serial_communicator import (
    Execution,
    Post,
    Program,
    lazily_of_a_pair,
    of_the_group,
    one_by_one,
    one_for_all,
    programs,
)

SIZES = [  # schedule, ranks, stages of each, micro-batches
    *[
        (schedule, *size)
        for schedule in ("gpipe", "1f1b")
        for size in [(2, 1, 1), (2, 1, 4), (4, 1, 4), (4, 1, 9)]
    ],
    ("1f1b", 4, 1, 2),  # GPipe's order
    ("1f1b", 8, 1, 16),
    *[
        ("interleaved", *size)
        for size in [(2, 2, 2), (2, 3, 4), (3, 2, 6), (4, 2, 8), (4, 2, 10), (4, 2, 3), (4, 4, 8)]
    ],
]


@cache
def posted(
    schedule: str, pipeline: int, virtual_stages: int, micro_batches: int, work: str = "tet"
) -> list[Program]:
    return programs(schedule, pipeline, virtual_stages, micro_batches, work)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_and_evaluation_end(size: tuple[str, int, int, int]) -> None:
    ranks = posted(*size)
    for communicator in (of_the_group, lazily_of_a_pair, one_for_all):
        assert Execution(ranks, communicator).stuck == {}
    batches = [step.batch for program in ranks for step in program if isinstance(step, Post)]
    sent = sum(
        operation.sends for batch in batches if batch.together for operation in batch.operations
    )
    _, pipeline, virtual_stages, micro_batches = size
    assert (
        sent >= (2 + 1 + 2) * (pipeline * virtual_stages - 1) * micro_batches
    )  # torch 2.11 tries the links, too


def test_an_order_that_is_not_safe_is_found() -> None:
    """1F1B has both directions due at once: as single operations, each rank's send waits for the
    other's.
    """
    for communicator in (of_the_group, lazily_of_a_pair):
        stuck = Execution(one_by_one(posted("1f1b", 2, 1, 4)), communicator).stuck
        assert {rank: operation.peer for rank, operation in stuck.items()} == {0: 1, 1: 0}


@pytest.mark.parametrize(
    ("size", "ideal", "slower"),
    [
        (("1f1b", 4, 1, 8), 33, 1.0),
        (("interleaved", 4, 2, 8), 57, 1.23),
        (("interleaved", 8, 2, 16), 117, 1.47),
    ],
    ids=str,
)
def test_a_group_for_each_neighbour_keeps_the_interleaved_schedule_from_waiting(
    size: tuple[str, int, int, int], ideal: float, slower: float
) -> None:
    """`ideal` is (1 + 2) (v m + p - 1): no rank waits for more than the pipeline's own idle
    time.
    """
    ranks = posted(*size, work="t")
    assert Execution(ranks, of_the_group).duration == ideal
    assert Execution(ranks, one_for_all).duration / ideal == pytest.approx(slower, abs=0.005)
