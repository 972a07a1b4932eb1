"""A run that was interrupted goes on as if it never had been, on the same mesh bit for bit, on any other in value."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from megagpt.metrics import read_metrics
from tests.checkpoint_jobs import STACKED, assert_same_state, gathered, run_config
from tests.ranks import RankPool
from tests.trained_run import write_dataset

HALF, WHOLE = 6, 12
TRAIN = "tests.checkpoint_jobs:train"
SAME_MESH = [
    (0, "none", "none"),
    (1, "none", "none"),
    (2, "cpu", "none"),
    (3, "none", "none"),
    (3, "cpu", "cpu"),
    (3, "nvme", "none"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def recorded(directory: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says of each step, but its speed."""
    steps = read_metrics(directory).steps
    return [(s.step, s.tokens, s.loss, s.grad_norm, s.learning_rate, s.skipped_steps) for s in steps]


def samples_by_step(*runs: list[dict[str, Any]]) -> dict[int, list[int]]:
    """The samples of each step over all ranks of runs that continue each other; pipeline ranks read alike."""
    steps = sorted({step for ranks in runs for rank in ranks for step in rank["samples"]})
    read = [rank["samples"] for ranks in runs for rank in ranks]
    return {step: sorted({sample for samples in read for sample in samples.get(step, ())}) for step in steps}


@pytest.mark.parametrize("zero", SAME_MESH, ids=str)
def test_six_and_six_steps_are_twelve(
    request: pytest.FixtureRequest, two_ranks: RankPool, data: Path, tmp_path: Path, zero: tuple[int, str, str]
) -> None:
    """Weights, moments, losses, norms, learning rates and samples; the data's first epoch ends on the way."""
    model: dict[str, Any] = {"dropout": 0.1}
    if "nvme" in zero:
        request.getfixturevalue("nvme")
        model |= STACKED

    def train(steps: int, directory: Path) -> list[dict[str, Any]]:
        config = run_config(data, steps, zero, nvme=tmp_path / "swap", **model)
        return two_ranks.run(TRAIN, config=config, directory=directory)

    whole = train(WHOLE, tmp_path / "whole")
    first, second = train(HALF, tmp_path / "parts"), train(WHOLE, tmp_path / "parts")
    assert [rank["first_step"] for rank in second] == [HALF, HALF]
    assert_same_state(gathered(first, "at_end"), gathered(second, "at_start"))
    assert_same_state(gathered(whole, "at_end"), gathered(second, "at_end"))
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "parts")
    assert any((tmp_path / "swap").rglob("*.swp")) == ("nvme" in zero)
    assert samples_by_step(whole) == samples_by_step(first, second)
    assert samples_by_step(whole)[WHOLE] == list(range(8 * (WHOLE - 1), 8 * WHOLE))


@pytest.fixture(scope="module")
def epoch_samples(data: Path) -> int:
    from megagpt.dataset import SampleStream

    stream = SampleStream.open([(data, 1.0)], split="train", sequence_length=16, seed=0, document_mask=False)
    return stream.samples_per_epoch


def test_the_runs_above_cross_the_end_of_an_epoch_after_they_resume(epoch_samples: int) -> None:
    assert 8 * HALF < epoch_samples < 8 * WHOLE


# (written by: ZeRO stage, optimizer on, parameters on; ranks, of them in a pipeline) -> (read by ...)
OTHER_MESH = [
    (((3, "cpu", "cpu"), 2, 2), ((0, "none", "none"), 1)),
    (((3, "none", "none"), 2), ((1, "none", "none"), 2, 2)),
    pytest.param(((1, "none", "none"), 1), ((3, "nvme", "none"), 2, 2), marks=pytest.mark.slow),
    (((3, "none", "none"), 2), ((0, "none", "none"), 1)),
    (((0, "none", "none"), 1), ((2, "none", "none"), 2)),
    pytest.param(((2, "cpu", "none"), 2), ((3, "nvme", "none"), 2), marks=pytest.mark.slow),
    pytest.param(((3, "cpu", "cpu"), 2), ((1, "none", "none"), 1), marks=pytest.mark.slow),
    pytest.param(((1, "none", "none"), 1), ((3, "cpu", "none"), 1), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("writer", "reader"), OTHER_MESH, ids=str)
def test_a_run_goes_on_under_any_other_execution(
    request: pytest.FixtureRequest, data: Path, tmp_path: Path, writer: Any, reader: Any
) -> None:
    """The gathered state bit for bit; the losses that follow within 1e-5; the same samples."""
    model = {}
    if "nvme" in reader[0]:
        request.getfixturevalue("nvme")
        model = STACKED

    def train(steps: int, execution: Any, directory: Path) -> list[dict[str, Any]]:
        zero, ranks, *pipeline = execution
        pool = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
        config = run_config(data, steps, zero, nvme=tmp_path / "swap", **model)
        config["megagpt"]["parallel"] = {"pipeline": pipeline[0] if pipeline else 1}
        return pool.run(TRAIN, config=config, directory=directory)

    half = train(HALF, writer, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "stayed")
    moved, stayed = train(WHOLE, reader, tmp_path / "moved"), train(WHOLE, writer, tmp_path / "stayed")
    assert_same_state(gathered(half, "at_end"), gathered(moved, "at_start"))
    assert samples_by_step(moved) == samples_by_step(stayed)
    losses = {name: [step[2] for step in recorded(tmp_path / name)] for name in ("moved", "stayed")}
    assert losses["moved"] == pytest.approx(losses["stayed"], abs=1e-5)
    rates = {name: [step[4] for step in recorded(tmp_path / name)] for name in ("moved", "stayed")}
    assert rates["moved"] == rates["stayed"]


def test_a_skipped_step_counts_on_both_sides_of_a_resume(two_ranks: RankPool, data: Path, tmp_path: Path) -> None:
    """Adam's count and the schedule lag behind the steps by the skipped one, and still do after the resume."""
    poison = {"steps": [3], "rank": 1, "kind": "nan"}

    def train(steps: int, directory: Path) -> list[dict[str, Any]]:
        config = run_config(data, steps, (1, "none", "none"))
        return two_ranks.run(TRAIN, config=config, directory=directory, poison=poison)

    whole = train(WHOLE, tmp_path / "whole")
    train(HALF, tmp_path / "parts")
    parts = train(WHOLE, tmp_path / "parts")
    state = parts[0]["state"]
    assert (state.step, state.applied_steps, state.skipped_steps) == (WHOLE, WHOLE - 1, 1)
    assert state == whole[0]["state"]
    assert_same_state(gathered(whole, "at_end"), gathered(parts, "at_end"))
    assert str(recorded(tmp_path / "whole")) == str(recorded(tmp_path / "parts"))  # the text, as NaN is not NaN
