"""What the matrix (tests/equality/test_matrix.py) does not show: NVMe at DeepSpeed's own limit,
gradients while they add up.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import plain
from tests.support.configurations import tiny, with_zero
from tests.support.equality import (
    STEPS,
    assert_a_rank_holds_and_reduces_its_share,
    assert_equal_training,
)
from tests.support.ranks import RankPool
from tests.support.shards import whole_tensors

MESHES = [  # ranks, parameters, parallel
    ("two_ranks", "none", {}),
    pytest.param("two_ranks", "cpu", {}, marks=pytest.mark.slow),
    pytest.param("four_ranks", "cpu", {"pipeline": 2}, marks=pytest.mark.slow),
    pytest.param(
        "eight_ranks", "cpu", {"pipeline": 2, "tensor": 2, "sequence": True}, marks=pytest.mark.slow
    ),
]


@pytest.mark.usefixtures("nvme")
@pytest.mark.parametrize(("pool", "parameters", "parallel"), MESHES, ids=str)
def test_an_optimizer_on_nvme_swaps_what_deepspeed_swaps(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pool: str,
    parameters: str,
    parallel: dict[str, Any],
) -> None:
    """Optimizer tiles of 1 MiB and more: the model grows with the ranks, so that a rank's share
    is as large.
    """
    ranks: RankPool = request.getfixturevalue(pool)
    shape = {"hidden_size": 128, "num_layers": 2 * ranks.world_size}
    config = with_zero(tiny(batch=8, steps=STEPS, **shape), 3, "nvme", parameters)
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(tmp_path)
    config["megagpt"]["parallel"] = parallel
    found = ranks.run(
        "tests.support.jobs.training:train", config=config, steps=STEPS, deadline_s=400
    )
    assert_equal_training(found, plain.train(config, STEPS), 32, tolerance=2e-5)
    replicas = ranks.world_size // (parallel.get("pipeline", 1) * parallel.get("tensor", 1))
    for rank in found:
        assert_a_rank_holds_and_reduces_its_share(
            rank, 3, ("nvme", parameters), parallel, replicas, 4 // replicas
        )
        swapped = sum(size for _, size in rank["evidence"]["swap_files"])
        assert swapped >= 0.95 * 3 * 4 * rank["evidence"]["master_elements"] > 0.95 * 3 * 2**20


@pytest.mark.usefixtures("nvme")
def test_bf16_parameters_on_nvme_equal_those_in_host_memory(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """DeepSpeed swaps 16-bit parameters only; matrices are wide enough that each rank's shard
    reaches its 1 MiB.
    """
    shape = {"num_layers": 1, "hidden_size": 512, "sequence_length": 8}
    config = tiny(batch=4, micro=2, steps=2, **shape) | {"bf16": {"enabled": True}}
    on_disk = {"device": "nvme", "nvme_path": str(tmp_path)}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    cells = {
        "cpu": zero | {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        "nvme": zero
        | {
            "offload_optimizer": on_disk,
            "offload_param": on_disk | {"max_in_cpu": 0, "buffer_size": 2**20},
        },
    }
    runs = {
        name: two_ranks.run(
            "tests.support.jobs.training:train",
            config=config | {"zero_optimization": cell},
            steps=2,
        )
        for name, cell in cells.items()
    }
    assert [r.loss for r in runs["nvme"][0]["results"]] == [
        r.loss for r in runs["cpu"][0]["results"]
    ]
    like = plain.train(config, 2)
    assert [r.loss for r in runs["cpu"][0]["results"]] == pytest.approx(like.losses, rel=1e-2)
    in_memory, swapped = (
        whole_tensors(rank["state"] for rank in runs[name]) for name in ("cpu", "nvme")
    )
    assert in_memory.keys() == swapped.keys()
    for key, values in in_memory.items():
        torch.testing.assert_close(swapped[key], values, rtol=0, atol=1e-7, msg="/".join(key))
    for rank in runs["nvme"]:
        files = rank["evidence"]["swap_files"]
        assert any("param" in name for name, _ in files), files
        assert rank["evidence"]["elements_on_nvme"] >= 2 * 512 * 2048 / 2, (
            "both MLP matrices, half of each on a rank"
        )


def test_zero_2_keeps_its_share_of_the_gradients_while_a_step_accumulates(
    two_ranks: RankPool,
) -> None:
    held = {
        stage: two_ranks.run(
            "tests.support.jobs.training:gradients_after_one_micro_batch",
            config=with_zero(tiny(batch=12, micro=2), stage),
        )
        for stage in (1, 2)
    }
    elements = sum(values.numel() for values in plain.train(tiny(), 0).state["weight"].values())
    assert held[1] == [elements, elements]
    assert all(
        elements / 2 <= of_rank < 0.6 * elements for of_rank in held[2]
    )  # its half, and the last bucket
