"""A run that was interrupted goes on as if it never had been, on the same mesh bit for bit, on
any other in value.
"""

import shutil
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from megagpt.monitoring.metrics import read_metrics
from tests.conftest import _Pools
from tests.support.configurations import Config
from tests.support.jobs.checkpoint import STACKED, assert_same_state, gathered, run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

HALF, WHOLE = 6, 12
FOLLOWING = 10  # steps that are compared after a resume elsewhere
TRAIN = "tests.support.jobs.checkpoint:train"
MODELS: tuple[dict[str, Any], ...] = (
    {"dropout": 0.1},
    STACKED,
    {"hidden_size": 512, "num_layers": 1},
)
PLAIN = ("none", "none")


@dataclass(frozen=True)
class Execution:
    """How a run is executed: ZeRO stage, where optimizer and parameters lie, ranks and their
    mesh, precision.
    """

    zero: tuple[int, str, str]
    ranks: int = 2
    parallel: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False

    def config(self, data: Path, steps: int, **keys: Any) -> Config:
        """Of a run of so many steps."""
        config = run_config(data, steps, self.zero, **keys)
        config["megagpt"]["parallel"] = self.parallel
        config["bf16"] = {"enabled": self.bf16}
        return config

    @property
    def on_nvme(self) -> set[str]:
        """What DeepSpeed has to swap."""
        return {
            kind
            for kind, place in zip(("optimizer", "parameters"), self.zero[1:], strict=True)
            if place == "nvme"
        }

    @property
    def model(self) -> int:
        """Index of the smallest of ``MODELS`` of which DeepSpeed moves to NVMe what it is told
        to.
        """
        return 2 if "parameters" in self.on_nvme else 1 if self.on_nvme else 0


PIPELINE_X_TENSOR = {"pipeline": 2, "tensor": 2}
SAME_MESH = [
    Execution((1, *PLAIN)),
    Execution((3, "cpu", "cpu")),
    *(
        pytest.param(execution, marks=pytest.mark.slow)
        for execution in (
            Execution((3, "nvme", "none")),
            Execution((0, *PLAIN)),
            Execution((2, "cpu", "none")),
            Execution((3, *PLAIN)),
            Execution((3, *PLAIN), 4, PIPELINE_X_TENSOR),
            Execution((1, *PLAIN), bf16=True),
            Execution((3, "nvme", "nvme"), bf16=True),
        )
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def recorded(directory: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says of each step, but its speed."""
    steps = read_metrics(directory).steps
    return [
        (s.step, s.tokens, s.loss, s.grad_norm, s.learning_rate, s.skipped_steps) for s in steps
    ]


def swapped(directory: Path) -> set[str]:
    """What lies there: zero_stage_3/optimizer/rank0/... and
    zero_stage_3/bfloat16params/rank0/...
    """
    kinds = {path.relative_to(directory).parts[1] for path in directory.rglob("*.swp")}
    return {"parameters" if kind.endswith("params") else kind for kind in kinds}


def samples_by_step(*runs: list[dict[str, Any]]) -> dict[int, list[int]]:
    """The samples of each step over all ranks of runs that continue each other; pipeline ranks
    read alike.
    """
    steps = sorted({step for ranks in runs for rank in ranks for step in rank["samples"]})
    read = [rank["samples"] for ranks in runs for rank in ranks]
    return {
        step: sorted({sample for samples in read for sample in samples.get(step, ())})
        for step in steps
    }


@pytest.mark.rotate(2)
@pytest.mark.parametrize("execution", SAME_MESH, ids=str)
def test_six_and_six_steps_are_twelve(
    request: pytest.FixtureRequest, pools: _Pools, data: Path, tmp_path: Path, execution: Execution
) -> None:
    """Weights, moments, losses, norms, learning rates and samples; the data's first epoch ends
    on the way.
    """
    if execution.on_nvme:
        request.getfixturevalue("nvme")
    model = MODELS[execution.model] | {"dropout": 0.1}

    def train(steps: int, directory: Path) -> list[dict[str, Any]]:
        config = execution.config(data, steps, nvme=tmp_path / "swap", **model)
        return pools.get(execution.ranks).run(TRAIN, config=config, directory=directory)

    whole = train(WHOLE, tmp_path / "whole")
    first, second = train(HALF, tmp_path / "parts"), train(WHOLE, tmp_path / "parts")
    assert {rank["first_step"] for rank in second} == {HALF}
    assert_same_state(gathered(first, "at_end"), gathered(second, "at_start"))
    assert_same_state(gathered(whole, "at_end"), gathered(second, "at_end"))
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "parts")
    assert swapped(tmp_path / "swap") == execution.on_nvme
    assert samples_by_step(whole) == samples_by_step(first, second)
    assert samples_by_step(whole)[WHOLE] == list(range(8 * (WHOLE - 1), 8 * WHOLE))


@pytest.fixture(scope="module")
def epoch_samples(data: Path) -> int:
    from megagpt.dataset import SampleStream

    stream = SampleStream.open(
        [(data, 1.0)], split="train", sequence_length=16, seed=0, document_mask=False
    )
    return stream.samples_per_epoch


def test_the_runs_above_cross_the_end_of_an_epoch_after_they_resume(epoch_samples: int) -> None:
    assert 8 * HALF < epoch_samples < 8 * WHOLE


def test_a_run_goes_on_in_the_middle_of_an_evaluation_interval(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    """Evaluations after steps 4, 8 and 12, the interruption after 6: the same validation losses,
    the same state.
    """

    def train(steps: int, directory: Path) -> list[dict[str, Any]]:
        config = run_config(data, steps, (3, "none", "none"), dropout=0.1)
        config["megagpt"]["training"] |= {"eval_interval_steps": 4, "eval_batches": 2}
        return two_ranks.run(TRAIN, config=config, directory=directory)

    def evaluations(directory: Path) -> list[tuple[int, float]]:
        return [
            (event["step"], event["val_loss"])
            for event in read_metrics(directory).events_named("eval")
        ]

    whole = train(WHOLE, tmp_path / "whole")
    train(HALF, tmp_path / "parts")
    parts = train(WHOLE, tmp_path / "parts")
    assert [step for step, _ in evaluations(tmp_path / "whole")] == [4, 8, 12]
    assert [event for event in evaluations(tmp_path / "parts") if event[0] != HALF] == evaluations(
        tmp_path / "whole"
    )
    assert_same_state(gathered(whole, "at_end"), gathered(parts, "at_end"))
    assert recorded(tmp_path / "whole") == recorded(tmp_path / "parts")


EXECUTIONS = {
    "one process": Execution((0, *PLAIN), 1),
    "data 2, ZeRO 1": Execution((1, *PLAIN)),
    "data 2, ZeRO 2, optimizer in host memory": Execution((2, "cpu", "none")),
    "data 2, ZeRO 3, both in host memory": Execution((3, "cpu", "cpu")),
    "pipeline 2, ZeRO 3": Execution((3, *PLAIN), 2, {"pipeline": 2}),
    "tensor 2 with sequence, ZeRO 3": Execution((3, *PLAIN), 2, {"tensor": 2, "sequence": True}),
    "tensor 2 x data 2, ZeRO 1": Execution((1, *PLAIN), 4, {"tensor": 2}),
    "pipeline 2 x tensor 2, ZeRO 3": Execution((3, *PLAIN), 4, PIPELINE_X_TENSOR),
}
IN_BF16 = {
    "data 2, ZeRO 1, bf16": Execution((1, *PLAIN), bf16=True),
    "data 2, ZeRO 3, bf16": Execution((3, *PLAIN), bf16=True),
    "pipeline 2 x tensor 2, ZeRO 3, bf16": Execution((3, *PLAIN), 4, PIPELINE_X_TENSOR, bf16=True),
}
ON_DISK = {
    "data 2, ZeRO 3, optimizer on NVMe": Execution((3, "nvme", "none")),
    "data 2, ZeRO 3, both on NVMe, bf16": Execution((3, "nvme", "nvme"), bf16=True),
    "pipeline 2, ZeRO 3, optimizer on NVMe": Execution((3, "nvme", "none"), 2, {"pipeline": 2}),
    "tensor 2, ZeRO 3, optimizer on NVMe": Execution((3, "nvme", "none"), 2, {"tensor": 2}),
}
ALL = EXECUTIONS | IN_BF16 | ON_DISK
IN_MAKE_TEST = {
    ("pipeline 2 x tensor 2, ZeRO 3", "one process"),
    ("one process", "pipeline 2 x tensor 2, ZeRO 3"),
    ("tensor 2 x data 2, ZeRO 1", "data 2, ZeRO 2, optimizer in host memory"),
    ("one process", "data 2, ZeRO 3, bf16"),
}
TOPOLOGIES = list(permutations(EXECUTIONS, 2))
CHANGES = [
    pair for name in IN_BF16 | ON_DISK for pair in (("one process", name), (name, "one process"))
]
CHANGES += permutations(IN_BF16, 2)
PAIRS = [
    pytest.param(*pair, marks=() if pair in IN_MAKE_TEST else pytest.mark.slow)
    for pair in [*TOPOLOGIES, *CHANGES]
]


class Written:
    """Runs stopped half-way, one an execution, each made when first asked for and continued
    where it is.
    """

    def __init__(self, request: pytest.FixtureRequest, data: Path, directory: Path) -> None:
        self.request, self.data, self.directory = request, data, directory
        self.made: dict[tuple[str, int], tuple[Path, Any, Any]] = {}

    def train(self, steps: int, name: str, directory: Path, model: int) -> list[dict[str, Any]]:
        pool = self.request.getfixturevalue("pools").get(ALL[name].ranks)
        config = ALL[name].config(self.data, steps, nvme=self.directory / "swap", **MODELS[model])
        return pool.run(TRAIN, config=config, directory=directory)

    def half(self, name: str, model: int) -> tuple[Path, Any, Any]:
        """The directory of the half run, what its ranks held, and what they read and held after
        going on.
        """
        if (name, model) not in self.made:
            directory = self.directory / f"{name} {model}"
            half = self.train(HALF, name, directory / "half", model)
            shutil.copytree(directory / "half", directory / "stayed")
            stayed = self.train(HALF + FOLLOWING, name, directory / "stayed", model)
            self.made[name, model] = directory, half, stayed
        return self.made[name, model]


@pytest.fixture(scope="module")
def written(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Written:
    return Written(request, data, tmp_path_factory.mktemp("written"))


@pytest.mark.rotate(2)
@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_a_run_goes_on_under_any_other_execution(
    request: pytest.FixtureRequest, written: Written, tmp_path: Path, writer: str, reader: str
) -> None:
    """The gathered state bit for bit; the ten losses that follow within 1e-5 in fp32, 2 % in
    bf16; the same samples.
    """
    model = max(ALL[writer].model, ALL[reader].model)
    if model:
        request.getfixturevalue("nvme")
    directory, half, stayed = written.half(writer, model)
    shutil.copytree(directory / "half", tmp_path / "moved")
    moved = written.train(HALF + FOLLOWING, reader, tmp_path / "moved", model)
    assert_same_state(gathered(half, "at_end"), gathered(moved, "at_start"))
    assert samples_by_step(moved) == samples_by_step(stayed)
    after, expected = (recorded(run)[HALF:] for run in (tmp_path / "moved", directory / "stayed"))
    assert len(after) == len(expected) == FOLLOWING
    losses, tolerance = [loss for _, _, loss, *_ in expected], {"abs": 1e-5}
    if ALL[writer].bf16 or ALL[reader].bf16:
        tolerance = {"rel": 2e-2}
    assert [loss for _, _, loss, *_ in after] == pytest.approx(losses, **tolerance)
    assert [step[4] for step in after] == [step[4] for step in expected]  # learning rates


def test_a_skipped_step_counts_on_both_sides_of_a_resume(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    """Adam's count and the schedule lag behind the steps by the skipped one, and still do after
    the resume.
    """
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
    assert str(recorded(tmp_path / "whole")) == str(
        recorded(tmp_path / "parts")
    )  # the text, as NaN is not NaN
