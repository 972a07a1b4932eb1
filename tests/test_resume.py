"""A run that was interrupted goes on as if it never had been, on the same mesh bit for bit, on any other in value."""

import shutil
from itertools import permutations
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
    (1, "none", "none"),
    (3, "cpu", "cpu"),
    (3, "nvme", "none"),
    *(
        pytest.param(zero, marks=pytest.mark.slow)
        for zero in ((0, "none", "none"), (2, "cpu", "none"), (3, "none", "none"))
    ),
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


def test_a_run_goes_on_in_the_middle_of_an_evaluation_interval(two_ranks: RankPool, data: Path, tmp_path: Path) -> None:
    """Evaluations after steps 4, 8 and 12, the interruption after 6: the same validation losses, the same state."""

    def train(steps: int, directory: Path) -> list[dict[str, Any]]:
        config = run_config(data, steps, (3, "none", "none"), dropout=0.1)
        config["megagpt"]["training"] |= {"eval_interval_steps": 4, "eval_batches": 2}
        return two_ranks.run(TRAIN, config=config, directory=directory)

    def evaluations(directory: Path) -> list[tuple[int, float]]:
        return [(event["step"], event["val_loss"]) for event in read_metrics(directory).events_named("eval")]

    whole = train(WHOLE, tmp_path / "whole")
    train(HALF, tmp_path / "parts")
    parts = train(WHOLE, tmp_path / "parts")
    assert [step for step, _ in evaluations(tmp_path / "whole")] == [4, 8, 12]
    assert [event for event in evaluations(tmp_path / "parts") if event[0] != HALF] == evaluations(tmp_path / "whole")
    assert_same_state(gathered(whole, "at_end"), gathered(parts, "at_end"))
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "parts")


Execution = tuple[tuple[int, str, str], int, dict[str, Any]]  # ZeRO stage, optimizer on, parameters on; ranks; mesh
PLAIN = ("none", "none")
EXECUTIONS: dict[str, Execution] = {
    "one process": ((0, *PLAIN), 1, {}),
    "data 2, ZeRO 1": ((1, *PLAIN), 2, {}),
    "data 2, ZeRO 2, optimizer in host memory": ((2, "cpu", "none"), 2, {}),
    "data 2, ZeRO 3, both in host memory": ((3, "cpu", "cpu"), 2, {}),
    "pipeline 2, ZeRO 3": ((3, *PLAIN), 2, {"pipeline": 2}),
    "tensor 2 with sequence, ZeRO 3": ((3, *PLAIN), 2, {"tensor": 2, "sequence": True}),
    "tensor 2 x data 2, ZeRO 1": ((1, *PLAIN), 4, {"tensor": 2}),
    "pipeline 2 x tensor 2, ZeRO 3": ((3, *PLAIN), 4, {"pipeline": 2, "tensor": 2}),
}
ON_DISK: dict[str, Execution] = {
    "data 2, ZeRO 3, optimizer on NVMe": ((3, "nvme", "none"), 2, {}),
    "pipeline 2, ZeRO 3, optimizer on NVMe": ((3, "nvme", "none"), 2, {"pipeline": 2}),
    "tensor 2, ZeRO 3, optimizer on NVMe": ((3, "nvme", "none"), 2, {"tensor": 2}),
}
IN_MAKE_TEST = {
    ("pipeline 2 x tensor 2, ZeRO 3", "one process"),
    ("one process", "pipeline 2 x tensor 2, ZeRO 3"),
    ("tensor 2 x data 2, ZeRO 1", "data 2, ZeRO 2, optimizer in host memory"),
}
PAIRS = [
    pytest.param(writer, reader, marks=() if (writer, reader) in IN_MAKE_TEST else pytest.mark.slow)
    for writer, reader in permutations(EXECUTIONS, 2)
]
PAIRS += [
    pytest.param(*pair, marks=pytest.mark.slow)
    for name in ON_DISK
    for pair in (("one process", name), (name, "one process"))
]


class Written:
    """Runs stopped half-way, one an execution, each made when first asked for and continued where it is."""

    def __init__(self, request: pytest.FixtureRequest, data: Path, directory: Path) -> None:
        self.request, self.data, self.directory = request, data, directory
        self.made: dict[tuple[str, bool], tuple[Path, Any, Any]] = {}

    def train(self, steps: int, name: str, directory: Path, stacked: bool) -> list[dict[str, Any]]:
        zero, ranks, parallel = (EXECUTIONS | ON_DISK)[name]
        pool = self.request.getfixturevalue("pools").get(ranks)
        config = run_config(
            self.data, steps, zero, nvme=self.directory / "swap", **(STACKED if stacked else {"dropout": 0.1})
        )
        config["megagpt"]["parallel"] = parallel
        return pool.run(TRAIN, config=config, directory=directory)

    def half(self, name: str, stacked: bool) -> tuple[Path, Any, Any]:
        """The directory of the half run, what its ranks held, and what they read and held after going on."""
        if (name, stacked) not in self.made:
            directory = self.directory / f"{name} {stacked}"
            half = self.train(HALF, name, directory / "half", stacked)
            shutil.copytree(directory / "half", directory / "stayed")
            self.made[name, stacked] = directory, half, self.train(WHOLE, name, directory / "stayed", stacked)
        return self.made[name, stacked]


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(request, data, tmp_path_factory.mktemp("written"))


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_a_run_goes_on_under_any_other_execution(
    request: pytest.FixtureRequest, written: Written, tmp_path: Path, writer: str, reader: str
) -> None:
    """The gathered state bit for bit; the losses that follow within 1e-5; the same samples."""
    stacked = writer in ON_DISK or reader in ON_DISK
    if stacked:
        request.getfixturevalue("nvme")
    directory, half, stayed = written.half(writer, stacked)
    shutil.copytree(directory / "half", tmp_path / "moved")
    moved = written.train(WHOLE, reader, tmp_path / "moved", stacked)
    assert_same_state(gathered(half, "at_end"), gathered(moved, "at_start"))
    assert samples_by_step(moved) == samples_by_step(stayed)
    for column in (2, 4):  # losses and learning rates
        after = {run: [step[column] for step in recorded(run)] for run in (tmp_path / "moved", directory / "stayed")}
        assert after[tmp_path / "moved"] == pytest.approx(after[directory / "stayed"], abs=1e-5 if column == 2 else 0)


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
