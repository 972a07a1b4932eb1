"""Pipelines in fp16: the loss is scaled once, whatever the number of stages, and all ranks agree
on an overflow.
"""

from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint.format import complete_steps
from tests.health.test_guard import CLEAN_STEPS, TRAIN, assert_nothing_changes, guarded_config
from tests.support import plain
from tests.support.configurations import Config, tiny, with_zero
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

STEPS = 4


class AllowingFp16:
    """A pool of ranks whose jobs may compute in fp16."""

    def __init__(self, pool: RankPool) -> None:
        self.pool, self.world_size = pool, pool.world_size

    def run(self, job: str, **arguments: Any) -> list[Any]:
        return self.pool.run("tests.support.jobs.training:allowing_fp16", of=job, **arguments)


def in_fp16(stage: int, parallel: dict[str, Any], optimizer: str = "none", **fp16: Any) -> Config:
    config = with_zero(tiny(batch=16, micro=2, steps=STEPS, num_layers=5), stage, optimizer)
    config["megagpt"]["parallel"] = parallel
    return config | {"fp16": {"enabled": True, "initial_scale_power": 12} | fp16}


def same_run_in_fp32(config: Config) -> plain.plain.PlainRun:
    return plain.train({key: value for key, value in config.items() if key != "fp16"}, STEPS)


CASES = [
    (3, {"pipeline": 2}, "none"),
    pytest.param(1, {"pipeline": 4}, "none", marks=pytest.mark.slow),
    pytest.param(
        2,
        {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
        "cpu",
        marks=pytest.mark.slow,
    ),
    pytest.param(3, {"pipeline": 2, "tensor": 2, "sequence": True}, "cpu", marks=pytest.mark.slow),
    pytest.param(
        3, {"pipeline": 2, "gradient_reduction": "per_micro_batch"}, "none", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("stage", "parallel", "optimizer"), CASES, ids=str)
def test_a_pipeline_in_fp16_strays_from_fp32_by_its_rounding_only(
    four_ranks: RankPool, stage: int, parallel: dict[str, Any], optimizer: str
) -> None:
    """A second scaling of what stages send each other would be seen in the norm, 4,096 times too
    large.
    """
    config = in_fp16(stage, parallel, optimizer)
    reference = same_run_in_fp32(config)
    for rank in AllowingFp16(four_ranks).run(
        "tests.support.jobs.training:train_with_loss_scale", config=config, steps=STEPS
    ):
        assert rank["evidence"]["parameter_type"] == "torch.float16"
        assert rank["scales"] == [2.0**12] * STEPS
        assert all(result.applied for result in rank["results"])
        assert [result.loss for result in rank["results"]] == pytest.approx(
            reference.losses, rel=2e-3
        )
        assert [result.grad_norm for result in rank["results"]] == pytest.approx(
            reference.norms, rel=2e-2
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_stages_skip_a_step_that_overflows_on_one_and_lower_the_scale_together(
    four_ranks: RankPool, stage: int
) -> None:
    """The scale begins too high: gradients overflow, every rank skips and halves the scale until
    all of them fit.
    """
    config = in_fp16(stage, {"pipeline": 2}, initial_scale_power=30, hysteresis=1)
    ranks = AllowingFp16(four_ranks).run(
        "tests.support.jobs.training:train_with_loss_scale", config=config, steps=20
    )
    scales = ranks[0]["scales"]
    assert scales[0] == 2.0**30
    applied = [result.applied for result in ranks[0]["results"]]
    assert not applied[0]
    assert applied[-1]
    first = applied.index(True)
    assert scales[: first + 1] == [2.0 ** (30 - step) for step in range(first + 1)]
    for rank in ranks:
        assert rank["scales"] == scales
        assert [result.applied for result in rank["results"]] == applied


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "parallel", "rank", "kind"),
    [
        (1, {"pipeline": 2}, 0, "nan"),
        (2, {"pipeline": 2}, 3, "inf"),
        (3, {"pipeline": 2}, 1, "inf"),
        (3, {"tensor": 2}, 2, "nan"),
    ],
    ids=str,
)
def test_one_bad_gradient_on_one_rank_of_a_mesh_changes_no_weight_anywhere(
    four_ranks: RankPool, tmp_path: Path, stage: int, parallel: dict[str, int], rank: int, kind: str
) -> None:
    config = guarded_config(write_dataset(tmp_path / "data"), CLEAN_STEPS, stage)
    config["megagpt"]["parallel"] = parallel
    config["fp16"] = {"enabled": True, "initial_scale_power": 12}
    assert_nothing_changes(AllowingFp16(four_ranks), config, tmp_path, rank=rank, kind=kind)


def fp16_run(data: Path, steps: int, **fp16: Any) -> Config:
    return guarded_config(data, steps, 1) | {"fp16": {"enabled": True, "hysteresis": 1} | fp16}


@pytest.mark.slow
def test_a_scale_that_can_fall_no_further_ends_the_run_by_its_guard(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """DeepSpeed would raise an exception at the third overflow: 4, 2, 1 and no smaller."""
    config = fp16_run(write_dataset(tmp_path / "data"), 12, initial_scale_power=2)
    poison = {"steps": range(3, 12), "rank": 1, "kind": "inf"}
    for rank in AllowingFp16(two_ranks).run(
        TRAIN, config=config, directory=tmp_path / "run", poison=poison
    ):
        assert "step 7: a gradient is not finite" in rank["stopped"]
        assert "5 steps in a row: lower optimizer.params.lr" in rank["stopped"]
        assert rank["scaler_at_end"]["cur_scale"] == 1
    assert complete_steps(tmp_path / "run/checkpoints")[0] == 7


@pytest.mark.slow
def test_the_loss_scale_goes_on_or_begins_as_configured(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    """From fp32 there is none to go on with; between runs in fp16 it is part of the state; bf16
    has no use for it.
    """
    ranks, data, directory = (
        AllowingFp16(two_ranks),
        write_dataset(tmp_path / "data"),
        tmp_path / "run",
    )
    ranks.run(TRAIN, config=guarded_config(data, 2, 1), directory=directory)
    switched = ranks.run(
        TRAIN, config=fp16_run(data, 8, initial_scale_power=30), directory=directory
    )
    resumed = ranks.run(
        TRAIN, config=fp16_run(data, 10, initial_scale_power=4), directory=directory
    )
    left = ranks.run(TRAIN, config=guarded_config(data, 11, 1, "bf16"), directory=directory)
    for rank in (0, 1):
        assert switched[rank]["scaler_at_start"]["cur_scale"] == 2**30
        assert switched[rank]["scaler_at_end"]["cur_scale"] < 2**30
        assert resumed[rank]["scaler_at_start"] == switched[rank]["scaler_at_end"]
        assert left[rank]["scaler_at_start"] == {}
        assert left[rank]["state"].step == 11
