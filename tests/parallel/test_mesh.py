"""A rank of a full mesh: what it is called, how long it waits for others, what the first says at
the start.
"""

import itertools
import socket
from datetime import timedelta

import pytest

from megagpt.parallel.engine import WATCH_SPEAKS_S
from tests.support.configurations import tiny, with_zero
from tests.support.ranks import RankPool

STALL_TIMEOUT_S = 7200  # longer than any default of torch's


@pytest.mark.slow
def test_ranks_of_a_full_mesh_have_names_and_wait_longer_than_the_watch(
    eight_ranks: RankPool,
) -> None:
    config = with_zero(tiny(batch=8, micro=2, num_layers=4), 1)
    config["megagpt"] |= {
        "parallel": {"pipeline": 2, "tensor": 2},
        "monitor": {"stall_timeout_s": STALL_TIMEOUT_S},
    }
    ranks = eight_ranks.run("tests.support.jobs.pipeline:begun", config=config, deadline_s=400)
    places = itertools.product(range(2), repeat=3)
    for rank, ((pipeline, data, tensor), (name, timeouts, _)) in enumerate(
        zip(places, ranks, strict=True)
    ):
        assert (
            name == f"pipeline {pipeline}, data {data}, tensor {tensor} (rank {rank}, host "
            f"{socket.gethostname()})"
        )
        assert (
            timeouts == [timedelta(seconds=STALL_TIMEOUT_S + WATCH_SPEAKS_S)] * 5
        )  # three axes, replica, tied weight
    screens = [screen for *_, screen in ranks]
    assert "pipeline, 1f1b: stage 0: " in screens[0]
    assert "; stage 1: " in screens[0]
    assert not any(screens[1:])
