"""A loss that jumps: its update is made nowhere, or the run goes back to its last checkpoint and
past those samples.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint.format import MANIFEST, read_manifest, step_directory
from megagpt.health.guard import WINDOW_STEPS
from megagpt.monitoring.metrics import REPLACED_FILE, read_metrics
from tests.support.jobs.checkpoint import assert_same_state, gathered, run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

TRAIN = "tests.support.jobs.survival:train_sabotaged"
SPIKED = WINDOW_STEPS + 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def config(
    data: Path, steps: int, stage: int, on_spike: str, save_every: int = 0
) -> dict[str, Any]:
    whole = run_config(data, steps, (stage, "none", "none"), save_every=save_every)
    whole["megagpt"]["training"] |= {"on_spike": on_spike}
    return whole


@pytest.mark.parametrize(
    "stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))]
)
def test_a_spike_is_skipped_on_all_ranks(
    two_ranks: RankPool, data: Path, tmp_path: Path, stage: int
) -> None:
    """Weights, moments and Adam's count are those of the step before; the next step is applied
    again.
    """

    def train(steps: int, faults: str, directory: Path) -> list[dict[str, Any]]:
        return two_ranks.run(
            TRAIN, config=config(data, steps, stage, "skip"), directory=directory, faults=faults
        )

    clean = train(SPIKED - 1, "", tmp_path / "clean")
    spiked = train(SPIKED, f"spike@step={SPIKED}", tmp_path / "spiked")
    assert_same_state(gathered(clean, "at_end"), gathered(spiked, "at_end"))
    assert [(rank["state"].applied_steps, rank["state"].skipped_steps) for rank in spiked] == [
        (SPIKED - 1, 1)
    ] * 2
    (skip,) = read_metrics(tmp_path / "spiked").events_named("skip")
    assert (skip["step"], skip["first_sample"], skip["last_sample"]) == (
        SPIKED,
        8 * (SPIKED - 1),
        8 * SPIKED - 1,
    )
    if stage == 1:
        longer = train(SPIKED + 1, f"spike@step={SPIKED}", tmp_path / "longer")
        assert longer[0]["state"].applied_steps == SPIKED
        losses = [step.loss for step in read_metrics(tmp_path / "longer").steps]
        assert losses[-1] < losses[0] < losses[-2]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_spike_is_rewound_past_its_samples(
    two_ranks: RankPool, data: Path, tmp_path: Path, stage: int
) -> None:
    """As if the run had been resumed from its checkpoint, bit for bit, with the cursor behind
    the spike.
    """
    saved = SPIKED - 2

    def train(directory: Path, faults: str) -> list[dict[str, Any]]:
        job = config(data, SPIKED, stage, "rewind", save_every=saved)
        return two_ranks.run(TRAIN, config=job, directory=directory, faults=faults)

    ranks = train(tmp_path / "rewound", f"spike@step={SPIKED}")
    state = ranks[0]["state"]
    assert (state.step, state.applied_steps, state.cursor) == (SPIKED, SPIKED, 8 * (SPIKED + 2))
    history = read_metrics(tmp_path / "rewound")
    (rewind,) = history.events_named("rewind")
    assert (rewind["step"], rewind["from_step"]) == (saved, SPIKED)
    assert (rewind["first_sample"], rewind["last_sample"]) == (8 * saved, 8 * SPIKED - 1)
    assert [step.step for step in history.steps] == list(range(1, SPIKED + 1))
    assert "jumped from a median" in (tmp_path / "rewound" / REPLACED_FILE).read_text()

    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "rewound", moved)
    shutil.rmtree(step_directory(moved / "checkpoints", SPIKED))
    directory = step_directory(moved / "checkpoints", saved)
    manifest = read_manifest(directory)
    state = replace(manifest.state, cursor=8 * SPIKED)
    (directory / MANIFEST).write_text(replace(manifest, state=state).to_json())
    assert_same_state(gathered(ranks, "at_end"), gathered(train(moved, ""), "at_end"))


def test_a_resumed_guard_knows_the_losses_before_the_save(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    """It refuses the step that an undisturbed run refuses."""
    jobs = [config(data, steps, 1, "skip", save_every=SPIKED - 1) for steps in (SPIKED - 1, SPIKED)]
    first, second = (
        two_ranks.run(TRAIN, config=job, directory=tmp_path, faults=f"spike@step={SPIKED}")
        for job in jobs
    )
    assert [(rank["state"].step, rank["state"].skipped_steps) for rank in second] == [
        (SPIKED, 1)
    ] * 2
    assert_same_state(gathered(first, "at_end"), gathered(second, "at_end"))


def test_without_a_checkpoint_a_rewind_is_a_skip(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    job = config(data, SPIKED, 1, "rewind")
    ranks = two_ranks.run(TRAIN, config=job, directory=tmp_path, faults=f"spike@step={SPIKED - 1}")
    assert [(rank["state"].step, rank["state"].skipped_steps) for rank in ranks] == [
        (SPIKED, 1)
    ] * 2
