"""A gradient that is not finite: the step is skipped on every rank, it is on record, and five in
a row end the run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint.format import complete_steps
from megagpt.config import RunConfig
from megagpt.health.guard import LEAST_SPIKE, MOST_REWINDS, WINDOW_STEPS, Guard
from megagpt.monitoring.metrics import read_metrics
from megagpt.parallel.pipeline import StepResult
from tests import REPOSITORY
from tests.support.jobs.checkpoint import assert_same_state, gathered, run_config
from tests.support.monitoring import ENVIRONMENT
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

TRAIN = "tests.support.jobs.checkpoint:train"
CLEAN_STEPS = 2
CASES = [
    (0, "nan", "fp32"),
    (0, "inf", "fp32"),
    (1, "nan", "fp32"),
    (2, "inf", "fp32"),
    (3, "loss", "fp32"),
    (3, "inf", "fp32"),
    *(pytest.param(stage, "loss", "fp32", marks=pytest.mark.slow) for stage in (0, 1, 2)),
    pytest.param(3, "nan", "fp32", marks=pytest.mark.slow),
    (1, "inf", "bf16"),
    pytest.param(2, "nan", "bf16", marks=pytest.mark.slow),
    pytest.param(2, "inf", "bf16", marks=pytest.mark.slow),
    (3, "nan", "bf16"),
]
PIPELINE, TENSOR = (
    {"pipeline": 2},
    {"tensor": 2},
)  # of four ranks, so that there are two replicas as well
MESHES = [  # the rank whose gradient is corrupted: of the first or the last stage
    (PIPELINE, 1, 0, "nan"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (PIPELINE, 1, 3, "inf"),
            (PIPELINE, 3, 3, "nan"),
            (PIPELINE, 3, 1, "inf"),
            (TENSOR, 1, 1, "nan"),
            (TENSOR, 1, 2, "inf"),
        ]
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def guarded_config(
    data: Path, steps: int, stage: int, precision: str = "fp32", **training: Any
) -> dict[str, Any]:
    config = run_config(data, steps, (stage, "none", "none"))
    config["megagpt"]["training"] |= training
    return config | {"bf16": {"enabled": precision == "bf16"}}


@pytest.mark.rotate(3)
@pytest.mark.parametrize(("stage", "kind", "precision"), CASES)
def test_one_bad_gradient_on_one_rank_changes_no_weight_anywhere(
    two_ranks: RankPool, data: Path, tmp_path: Path, stage: int, kind: str, precision: str
) -> None:
    config = guarded_config(data, CLEAN_STEPS, stage, precision)
    assert_nothing_changes(two_ranks, config, tmp_path, rank=1, kind=kind)


@pytest.mark.parametrize(("parallel", "stage", "rank", "kind"), MESHES, ids=str)
def test_one_bad_gradient_on_one_rank_of_a_mesh_changes_no_weight_anywhere(
    four_ranks: RankPool,
    data: Path,
    tmp_path: Path,
    parallel: dict[str, int],
    stage: int,
    rank: int,
    kind: str,
) -> None:
    """Nor on the stage or the tensor-parallel rank whose own gradients are all finite."""
    config = guarded_config(data, CLEAN_STEPS, stage)
    config["megagpt"]["parallel"] = parallel
    assert_nothing_changes(four_ranks, config, tmp_path, rank=rank, kind=kind)


def assert_nothing_changes(
    ranks: Any, config: dict[str, Any], directory: Path, rank: int, kind: str
) -> None:
    """By a step that is corrupt on one rank, compared with a run that ends before it; and it is
    on record.
    """
    bad_step = CLEAN_STEPS + 1
    clean = ranks.run(TRAIN, config=config, directory=directory / "clean")
    config["megagpt"]["training"]["total_steps"] = bad_step
    poison = {"steps": [bad_step], "rank": rank, "kind": kind}
    bad = ranks.run(TRAIN, config=config, directory=directory / "bad", poison=poison)
    assert_same_state(gathered(clean, "at_end"), gathered(bad, "at_end"))
    counts = [(held["state"].step, held["state"].skipped_steps) for held in bad]
    assert counts == [(bad_step, 1)] * ranks.world_size
    (skip,) = read_metrics(directory / "bad").events_named("skip")
    assert (skip["step"], skip["first_sample"], skip["last_sample"]) == (
        bad_step,
        8 * CLEAN_STEPS,
        8 * bad_step - 1,
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_training_goes_on_after_a_skip(
    two_ranks: RankPool, data: Path, tmp_path: Path, stage: int
) -> None:
    poison = {"steps": [2, 4], "rank": 0, "kind": "nan"}
    config = guarded_config(data, 6, stage)
    ranks = two_ranks.run(TRAIN, config=config, directory=tmp_path, poison=poison)
    assert [rank["state"].skipped_steps for rank in ranks] == [2, 2]
    assert all(values.isfinite().all() for values in gathered(ranks, "at_end").values())
    records = read_metrics(tmp_path).steps
    assert [record.skipped_steps for record in records] == [0, 1, 1, 2, 2, 2]
    assert [
        record.step for record in records if record.loss is None or record.loss != record.loss
    ] == [2, 4]


def test_five_skips_in_a_row_stop_the_run(two_ranks: RankPool, data: Path, tmp_path: Path) -> None:
    poison = {"steps": range(3, 9), "rank": 1, "kind": "nan"}
    config = guarded_config(data, 8, 1)
    config["megagpt"]["checkpoint"]["interval_steps"] = 0
    ranks = two_ranks.run(TRAIN, config=config, directory=tmp_path, poison=poison)
    for rank in ranks:
        assert "step 7: the loss is not finite (loss nan)" in rank["stopped"]
        assert "5 steps in a row: lower optimizer.params.lr" in rank["stopped"]
        assert rank["state"].step == 7
    assert complete_steps(tmp_path / "checkpoints") == [
        7
    ]  # the weights of step 2, which no later step changed
    assert [skip["step"] for skip in read_metrics(tmp_path).events_named("skip")] == [3, 4, 5, 6, 7]


def test_a_run_may_be_told_to_stop_at_the_first(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    poison = {"steps": [2], "rank": 0, "kind": "inf"}
    config = guarded_config(data, 4, 2, on_nonfinite="stop")
    ranks = two_ranks.run(TRAIN, config=config, directory=tmp_path, poison=poison)
    assert all("megagpt.training.on_nonfinite is stop" in rank["stopped"] for rank in ranks)
    assert [skip["step"] for skip in read_metrics(tmp_path).events_named("skip")] == [2]


# ----------------------------------------------------------------------------- verdicts, one by one


def step_of(loss: float, *, applied: bool = True) -> StepResult:
    return StepResult(loss=loss, grad_norm=1.0, learning_rate=1e-3, applied=applied)


def steady_guard(on_spike: str = "warn") -> Guard:
    guard = Guard("skip", on_spike)
    for step in range(WINDOW_STEPS):
        assert guard.judge(step, step_of(3.0 + 0.01 * (step % 2))) is None
    return guard


def test_a_spike_is_named_within_its_step() -> None:
    verdict = steady_guard().judge(51, step_of(3.01 + 2 * LEAST_SPIKE))
    assert verdict is not None
    assert not verdict.fatal
    assert verdict.message == "step 51: loss 4.010 jumped from a median of 3.005 over 50 steps"


def test_noise_is_no_spike_and_spikes_may_be_ignored() -> None:
    assert steady_guard().judge(51, step_of(3.01 + 0.9 * LEAST_SPIKE)) is None
    assert steady_guard("ignore").judge(51, step_of(30.0)) is None


def test_a_spike_that_must_not_act_is_refused_before_it_does() -> None:
    guard = steady_guard("skip")
    assert not guard.refuses(3.1)
    assert guard.refuses(30.0)
    assert not steady_guard("warn").refuses(30.0)
    verdict = guard.judge(51, step_of(30.0, applied=False))
    assert verdict is not None
    assert verdict.message.endswith("weights unchanged")
    assert (verdict.fatal, verdict.rewind) == (False, False)
    assert guard.refuses(30.0)  # however often it comes: the median has not followed it


def test_a_loss_that_jumped_for_good_ends_the_run() -> None:
    guard = steady_guard("skip")
    verdicts = [guard.judge(step, step_of(9.0, applied=False)) for step in range(51, 56)]
    assert [verdict.fatal for verdict in verdicts if verdict] == [False] * 4 + [True]


def test_rewinds_come_to_an_end() -> None:
    guard = steady_guard("rewind")
    verdicts = []
    for step in range(51, 51 + MOST_REWINDS + 1):
        verdicts.append(guard.judge(step, step_of(9.0, applied=False)))
        assert guard.judge(step, step_of(3.0)) is None
    assert [(v.rewind, v.fatal) for v in verdicts if v] == [(True, False)] * MOST_REWINDS + [
        (False, True)
    ]


def test_a_loss_that_is_not_finite_is_no_spike() -> None:
    """What happens to such a step is for `on_nonfinite` to say."""
    guard = steady_guard("rewind")
    assert not guard.refuses(float("inf"))
    assert not guard.refuses(float("nan"))


def test_a_young_run_has_no_spikes() -> None:
    guard = Guard("skip", "warn")
    assert guard.judge(1, step_of(3.0)) is None
    assert guard.judge(2, step_of(30.0)) is None


def test_a_loss_far_above_a_uniform_guess_is_said_once_until_it_falls() -> None:
    """As after 20 steps at a learning rate of 1000: finite, applied, and hopeless."""
    guard = Guard("skip", "warn", vocabulary=4096, learning_rate=1000.0)
    losses = [8.4, 16.5, 16.7, 2e8, 9.0, 30.0]  # ln 4096 = 8.318
    said = [guard.judge(step, step_of(loss)) for step, loss in enumerate(losses, start=1)]
    assert [verdict is not None for verdict in said] == [False, False, True, False, False, True]
    assert said[2] is not None
    assert said[2].message == (
        "step 3: loss 16.700 is far above ln(4096) = 8.318, that of a uniform guess: the run "
        "diverges; lower optimizer.params.lr (found 1000), or warm up longer"
    )
    assert not said[2].fatal
    assert Guard("skip", "ignore", vocabulary=4096).judge(1, step_of(2e8)) is not None


def test_the_guard_of_a_run_knows_its_vocabulary(data: Path) -> None:
    config = RunConfig.from_json(json.dumps(guarded_config(data, 60, 1)))
    guard = Guard.of(config.resolved(world_size=1, vocabulary=300, bf16_native=False))
    assert (guard.vocabulary, guard.learning_rate) == (300, 0.001)


def test_a_step_that_was_applied_ends_a_row_of_skips() -> None:
    guard = Guard("skip", "warn")
    for step in range(1, 30):
        applied = step % 5 == 0
        verdict = guard.judge(step, step_of(3.0, applied=applied))
        assert (verdict is None) == applied
        assert verdict is None or not verdict.fatal


def test_a_dynamic_loss_scale_may_use_up_its_hysteresis_and_then_halve(data: Path) -> None:
    fp16 = {"enabled": True, "initial_scale_power": 16, "hysteresis": 4}
    config = RunConfig.from_json(
        json.dumps(guarded_config(data, 60, 1) | {"bf16": {"enabled": False}, "fp16": fp16})
    )
    resolved = config.resolved(world_size=1, vocabulary=384, bf16_native=False)
    assert Guard.of(resolved).most_skips_in_a_row == 20


@pytest.mark.gpu
def test_a_dynamic_loss_scale_halves_until_gradients_fit(data: Path, tmp_path: Path) -> None:
    """Of a whole run, which needs a GPU in fp16.

    From 2**30 the scale halves more often than five times in a row.
    """
    fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}
    config = guarded_config(data, 60, 3) | {"fp16": fp16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        "launch/train.py",
        "--deepspeed_config",
        str(tmp_path / "config.json"),
    ]
    environment = {
        key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"
    } | ENVIRONMENT
    result = subprocess.run(
        [*command, "--run_dir", str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    records = read_metrics(tmp_path / "run").steps
    skipped = records[-1].skipped_steps
    assert 5 < skipped < 30
    assert records[-1].loss < records[skipped].loss - 0.1
