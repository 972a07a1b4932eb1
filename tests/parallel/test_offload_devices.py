"""What is offloaded lies in host memory, the rest on the device: seen by the tensors, where
there is a GPU.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import REPOSITORY
from tests.support.configurations import tiny, with_zero
from tests.support.monitoring import ENVIRONMENT
from tests.support.ranks import RankPool

CASES = [
    (1, "cpu", "none"),
    (3, "cpu", "none"),
    (3, "cpu", "cpu"),
    (3, "none", "none"),
]  # ZeRO, optimizer, parameters
KINDS = ("master_weights", "moments", "parameter_shards")
ONE_RANK = """
import json, sys
from megagpt.parallel.engine import join_ranks
from tests.support.jobs import training as jobs

join_ranks()
print(json.dumps(jobs.train(json.loads(sys.argv[1]), steps=2)["evidence"]["devices"]))
"""


def config(stage: int, optimizer: str, parameters: str) -> dict[str, Any]:
    return with_zero(tiny(batch=4, steps=2), stage, optimizer, parameters)


@pytest.mark.rotate(2)
@pytest.mark.parametrize(("stage", "optimizer", "parameters"), CASES)
def test_on_a_cpu_there_is_one_place(
    two_ranks: RankPool, stage: int, optimizer: str, parameters: str
) -> None:
    for rank in two_ranks.run(
        "tests.support.jobs.training:train", config=config(stage, optimizer, parameters), steps=2
    ):
        assert rank["evidence"]["devices"] == {kind: ["cpu"] for kind in KINDS}


@pytest.mark.gpu
@pytest.mark.parametrize(("stage", "optimizer", "parameters"), CASES)
def test_on_a_gpu_what_is_offloaded_lies_in_host_memory(
    stage: int, optimizer: str, parameters: str
) -> None:
    """In a process of its own: the pools' ranks compute on the CPU."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK, json.dumps(config(stage, optimizer, parameters))],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
        | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = ("cpu" if place == "cpu" else "cuda" for place in (optimizer, optimizer, parameters))
    assert json.loads(done.stdout.splitlines()[-1]) == {
        kind: [at] for kind, at in zip(KINDS, expected, strict=True)
    }
