"""The host waits for the device once a step in our code; the waits of DeepSpeed are known."""

from pathlib import Path
from typing import Any

import pytest

from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

JOB = "tests.support.jobs.reads:reads_by_step"
STEPS = 14  # two windows of the watch for stragglers, whose times travel with the loss
ORDINARY = range(2, STEPS - 1)  # the first makes optimizer states, the last saves
# DeepSpeed 0.19.8's own, in an ordinary step with clipping and two groups of parameters, in fp32;
# None: one for each parameter of the rank's part. docs/performance.md has this table.
INVALID_NORM = "deepspeed/runtime/utils.py:233"
OFFLOADED_12 = {
    INVALID_NORM: 3,
    "deepspeed/runtime/zero/stage_1_and_2.py:1792": None,
    "deepspeed/runtime/zero/stage_1_and_2.py:1929": None,
    "deepspeed/runtime/zero/stage_1_and_2.py:1949": 2,
}
DEEPSPEED: dict[tuple[int, str], dict[str, int | None]] = {
    (0, "none"): {},
    (1, "none"): {INVALID_NORM: 3},
    (2, "none"): {INVALID_NORM: 3},
    (3, "none"): {INVALID_NORM: 1},
    (1, "cpu"): OFFLOADED_12,
    (2, "cpu"): OFFLOADED_12,
    (3, "cpu"): {
        INVALID_NORM: 1,
        "deepspeed/runtime/zero/stage3.py:1989": 2,
        "deepspeed/runtime/zero/stage3.py:2003": 2,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def watched(pool: RankPool, data: Path, directory: Path, zero: Any, **training: Any) -> list[Any]:
    config = run_config(data, STEPS, zero, save_every=0)
    config["megagpt"]["training"] |= training
    return pool.run(JOB, config=config, directory=directory)


@pytest.mark.parametrize(("stage", "optimizer"), DEEPSPEED)
def test_one_read_a_step(
    two_ranks: RankPool, data: Path, tmp_path: Path, stage: int, optimizer: str
) -> None:
    for rank in watched(two_ranks, data, tmp_path, (stage, optimizer, "none")):
        for step in ORDINARY:
            ours = {p: n for p, n in rank[step].items() if not p.startswith("deepspeed/")}
            assert sum(ours.values()) == 1, (step, ours)
            theirs = {p: n for p, n in rank[step].items() if p.startswith("deepspeed/")}
            expected = DEEPSPEED[stage, optimizer]
            assert theirs.keys() == expected.keys(), step
            counted = {place: count for place, count in expected.items() if count is not None}
            assert counted.items() <= theirs.items(), step


def test_a_loss_that_may_be_refused_is_read_before_the_update(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    for rank in watched(two_ranks, data, tmp_path, (2, "none", "none"), on_spike="skip"):
        for step in ORDINARY:
            assert sum(n for p, n in rank[step].items() if p.startswith("megagpt/")) == 2


def test_the_page_has_the_lines_of_deepspeed() -> None:
    page = (REPOSITORY / "docs/performance.md").read_text()
    for lines in DEEPSPEED.values():
        assert all(line.removeprefix("deepspeed/") in page for line in lines)
