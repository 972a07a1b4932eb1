"""Saving beside training: in the background, one save at a time, of the state that was; which
checkpoints are kept.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megagpt.checkpoint.directory import retire
from megagpt.checkpoint.format import complete_steps, read_manifest, step_directory
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.checkpoint.resume_proof import NEXT_STEP
from megagpt.monitoring.metrics import read_metrics
from megagpt.rundir.signals import StopRequest
from tests.support.configurations import Config
from tests.support.jobs.checkpoint import run_config, train_and_die
from tests.support.ranks import RankPool
from tests.support.shards import whole_tensors
from tests.support.trained_run import write_dataset, write_run

HELD_BACK = "tests.support.jobs.saving:train_with_slow_disk"
ZERO3 = (3, "none", "none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def asynchronous(data: Path, steps: int, zero: tuple[int, str, str] = ZERO3, **keys: Any) -> Config:
    config = run_config(data, steps, zero, **keys)
    config["megagpt"]["checkpoint"] |= {"asynchronous": True, "keep": 3}
    return config


def saves(directory: Path) -> list[tuple[int, int]]:
    """(step of the checkpoint, step at which it was committed) in the order of the commits."""
    return [
        (event["step"], event["at_step"]) for event in read_metrics(directory).events_named("save")
    ]


# -------------------------------------------------------------------------------- in the background


SLOW_WRITERS = [pytest.param((2, "cpu", "none"), marks=pytest.mark.slow)]
SLOW_WRITERS += [pytest.param((3, "nvme", "none"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("zero", [(0, "none", "none"), ZERO3, *SLOW_WRITERS], ids=str)
def test_training_goes_on_while_a_save_is_written(
    request: pytest.FixtureRequest,
    two_ranks: RankPool,
    data: Path,
    tmp_path: Path,
    zero: tuple[int, str, str],
) -> None:
    """The disk of both ranks stands still until step 4 is made; what is committed is step 2 bit
    for bit.
    """
    model: dict[str, Any] = {}
    if "nvme" in zero:
        request.getfixturevalue("nvme")
        model = {"hidden_size": 128, "num_layers": 4}
    config = asynchronous(data, 5, zero, save_every=2, nvme=tmp_path / "swap", **model)
    ranks = two_ranks.run(
        HELD_BACK, config=config, directory=tmp_path / "run", saved_step=2, until_step=4
    )
    assert saves(tmp_path / "run")[0] == (2, 4)
    assert any((tmp_path / "swap").rglob("*.swp")) == ("nvme" in zero)
    at_save, later = (whole_tensors(rank[key] for rank in ranks) for key in ("at_save", "later"))
    reader = open_checkpoint(tmp_path / "run", 2)
    assert {name for _, name in at_save} == reader.manifest.tensors.keys()
    for (kind, name), values in at_save.items():
        stored = reader.tensor(kind, name).flatten()
        assert torch.equal(stored, values), (kind, name)
    moved = [key for key, values in later.items() if not torch.equal(values, at_save[key])]
    assert len(moved) > len(later) / 2
    assert (reader.directory / NEXT_STEP).exists()


@pytest.mark.slow
def test_a_save_that_is_due_waits_for_the_one_before_and_says_so(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    """The disk stands still until the next save asks for the end of this one."""
    config = asynchronous(data, 4, save_every=2)
    two_ranks.run(HELD_BACK, config=config, directory=tmp_path, saved_step=2, until_step=None)
    assert saves(tmp_path) == [(2, 4), (4, 4)]
    assert complete_steps(tmp_path / "checkpoints") == [4, 2]
    (warning,) = read_metrics(tmp_path).events_named("warning")
    assert warning["step"] == 4
    assert warning["message"].startswith("saving step 4 waited ")
    assert (
        "for the previous checkpoint to be written; raise megagpt.checkpoint" in warning["message"]
    )
    assert open_checkpoint(tmp_path, 4).manifest.state.step == 4


@pytest.mark.rotate(2)
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_an_error_in_the_background_ends_all_ranks_with_its_reason(
    two_ranks: RankPool, data: Path, tmp_path: Path, failing_rank: int
) -> None:
    two_ranks.run(
        "tests.support.jobs.checkpoint:train", config=run_config(data, 2, ZERO3), directory=tmp_path
    )
    told = two_ranks.run(
        "tests.support.jobs.saving:background_failure",
        config=asynchronous(data, 9, save_every=4),
        directory=tmp_path,
        failing_rank=failing_rank,
    )
    assert told[0] == told[1]
    step, message = told[0]
    assert step > 4
    assert f"rank_{failing_rank:05d}_000.safetensors: File too large" in message
    assert "a checkpoint needs" in message
    assert complete_steps(tmp_path / "checkpoints") == [2]
    assert not list((tmp_path / "checkpoints").glob(".staging_*"))
    assert open_checkpoint(tmp_path).manifest.state.step == 2


KILLS = [("within a file", 1)]
SLOW_KILLS = [
    ("within a file", 0),
    ("before the report", 1),
    ("after the report", 1),
    ("after the manifest", 0),
]


@pytest.mark.parametrize(
    ("point", "victim"),
    [*KILLS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_KILLS)],
)
def test_a_rank_killed_while_it_writes_in_the_background_leaves_nothing_readable(
    two_ranks: RankPool, data: Path, tmp_path: Path, point: str, victim: int
) -> None:
    """Once all have reported, rank 0 commits what the other, killed meanwhile, has written."""
    newest = 6 if point == "after the report" else 3
    codes = train_and_die(asynchronous(data, 6, save_every=3), tmp_path, victim, point)
    assert codes[victim] == -9
    assert complete_steps(tmp_path / "checkpoints")[0] == newest
    ranks = two_ranks.run(
        "tests.support.jobs.checkpoint:train", config=asynchronous(data, 7), directory=tmp_path
    )
    assert [rank["first_step"] for rank in ranks] == [newest] * 2
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_signal_is_obeyed_only_when_the_save_is_committed(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    config, requests = asynchronous(data, 9), {3: StopRequest.SIGTERM}
    two_ranks.run(
        "tests.support.jobs.survival:train_with_requests",
        config=config,
        directory=tmp_path,
        rank=1,
        requests=requests,
    )
    assert saves(tmp_path) == [(3, 3)]
    assert complete_steps(tmp_path / "checkpoints") == [3]


def test_both_ways_of_saving_write_the_same_files(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    for name, config in {"now": run_config(data, 3, ZERO3), "later": asynchronous(data, 3)}.items():
        two_ranks.run(
            "tests.support.jobs.checkpoint:train", config=config, directory=tmp_path / name
        )
    now, later = (
        read_manifest(step_directory(tmp_path / name / "checkpoints", 3))
        for name in ("now", "later")
    )
    assert (now.files, now.tensors, now.state) == (later.files, later.tensors, later.state)


# ------------------------------------------------------------------------------------------ keeping


def test_milestones_are_kept_for_good(two_ranks: RankPool, data: Path, tmp_path: Path) -> None:
    config = run_config(data, 9, ZERO3, save_every=1)
    config["megagpt"]["checkpoint"]["milestone_interval_steps"] = 3
    two_ranks.run("tests.support.jobs.checkpoint:train", config=config, directory=tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == [9, 8, 6, 3]


def steps_after_retiring(directory: Path, **rule: int) -> list[int]:
    retire(directory / "checkpoints", **({"keep": 2, "milestone_interval_steps": 0} | rule))
    return complete_steps(directory / "checkpoints")


def test_what_has_no_sound_manifest_pushes_nothing_out(data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", data, steps=(1, 2, 3))
    for step in (7, 8):
        step_directory(run / "checkpoints", step).mkdir()
    assert steps_after_retiring(run, last_good_step=3) == [8, 7, 3, 2]


def test_the_last_checkpoint_that_is_known_to_load_is_never_retired(
    data: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", data, steps=(1, 2, 3, 7, 8))
    assert steps_after_retiring(run, last_good_step=2) == [8, 7, 2]


@pytest.mark.slow
def test_the_checkpoint_that_a_run_went_on_from_stays(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    for steps in (2, 6):
        config = run_config(data, steps, ZERO3, save_every=1)
        two_ranks.run("tests.support.jobs.checkpoint:train", config=config, directory=tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == [6, 5, 2]
