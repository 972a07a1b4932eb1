"""Replicas that drift apart: one flipped bit on one rank is found at the next comparison, and
the rank is named.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint.format import complete_steps
from megagpt.health.replicas import checksum
from tests.support.jobs.checkpoint import run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

TRAIN = "tests.support.jobs.survival:train_sabotaged"
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def config(data: Path, stage: int, **parallel: Any) -> dict[str, Any]:
    whole = run_config(data, STEPS, (stage, "none", "none"), save_every=1)
    whole["megagpt"]["training"] |= {"drift_check_interval_steps": 2}
    whole["megagpt"]["parallel"] = parallel
    if stage == 3:
        whole["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return whole


AMONG_FOUR, AMONG_TWO = "on rank 3 from the others", "between ranks 2, 3"


@pytest.mark.rotate(2)
@pytest.mark.parametrize(
    ("stage", "parallel", "what", "who"),
    [
        (0, {}, "exp_avg_sq of head.norm.bias", AMONG_FOUR),
        (2, {}, "head.norm.bias", AMONG_FOUR),
        pytest.param(1, {"pipeline": 2}, "head.norm.bias", AMONG_TWO, marks=pytest.mark.slow),
        (3, {}, "head.norm.bias", AMONG_FOUR),
        pytest.param(
            0, {"tensor": 4}, "exp_avg_sq of head.norm.bias", AMONG_FOUR, marks=pytest.mark.slow
        ),
        pytest.param(
            1, {"tensor": 4}, "exp_avg_sq of head.norm.bias", AMONG_FOUR, marks=pytest.mark.slow
        ),
        (3, {"tensor": 2, "sequence": True}, "exp_avg_sq of head.norm.bias", AMONG_TWO),
    ],
)
def test_a_flipped_bit_is_found_and_the_rank_named(
    four_ranks: RankPool,
    data: Path,
    tmp_path: Path,
    stage: int,
    parallel: dict[str, Any],
    what: str,
    who: str,
) -> None:
    """Nothing that was trained since the last comparison is saved after it was found."""
    job = config(data, stage, **parallel)
    ranks = four_ranks.run(TRAIN, config=job, directory=tmp_path, faults="flip_bit@rank=3,step=4")
    for rank in ranks:
        assert f"step 4: {what} differs {who}" in rank["stopped"]
    assert complete_steps(tmp_path / "checkpoints") == [3, 2]


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=["data 2", "tensor 2"])
def test_sound_replicas_are_left_alone(
    two_ranks: RankPool, data: Path, tmp_path: Path, parallel: dict[str, int]
) -> None:
    ranks = two_ranks.run(TRAIN, config=config(data, 0, **parallel), directory=tmp_path, faults="")
    assert [rank["state"].step for rank in ranks] == [STEPS] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_bit_counts(dtype: torch.dtype) -> None:
    values = torch.randn(5, 7).to(dtype)
    integers = torch.int32 if dtype is torch.float32 else torch.int16
    clean = checksum(values)
    for bit in range(8 * values.element_size()):
        flipped = values.clone()
        flipped.view(integers)[3, 4] ^= (
            1 << bit if bit < 8 * values.element_size() - 1 else -(1 << bit)
        )
        assert checksum(flipped) != clean, bit
    assert checksum(values.T) == clean
    assert checksum(torch.tensor(1.0, dtype=dtype)).shape == ()
