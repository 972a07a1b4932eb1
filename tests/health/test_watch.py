"""A run that hangs ends itself and says who differs; a rank that the others wait for is named."""

import inspect
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megagpt.health.hang_page import hang_page, hang_verdict, odd_ranks
from megagpt.health.stragglers import slower_ranks
from megagpt.health.watch import RankState
from megagpt.monitoring.metrics import read_metrics
from megagpt.parallel import timeouts as waits
from megagpt.rundir.end_record import EndRecord
from megagpt.utils import ExitCode
from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.jobs.survival import RecordedClock
from tests.support.processes import PATIENCE_S, Process, Start
from tests.support.ranks import RankPool
from tests.support.trained_run import write_dataset

TIMEOUT_S = 6
FOUND_WITHIN_S = TIMEOUT_S + 5
HUNG_STEP = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


def hung(
    start: Start, data: Path, tmp_path: Path, fault: str, ranks: int, stage: int
) -> tuple[Path, list[Process]]:
    """A run of which rank 1 does not end step 4: its directory, and its ranks once all but a
    stopped one have ended.

    They have within the timeout and five seconds, from the moment that the fault struck, by the
    clock of the files.
    """
    config = run_config(data, 100, (stage, "none", "none"), save_every=2)
    config["megagpt"]["monitor"]["stall_timeout_s"] = TIMEOUT_S
    path, run = tmp_path / "config.json", tmp_path / "run"
    path.write_text(json.dumps(config | {"train_batch_size": 4 * ranks}))
    faults = f"{fault}@rank=1,step={HUNG_STEP}"
    processes = start("--deepspeed_config", path, "--run_dir", run, ranks=ranks, faults=faults)
    for rank, process in enumerate(processes):
        if fault != "stop" or rank != 1:
            assert process.wait(PATIENCE_S) == 1
    struck_s = (run / "logs" / "faults.txt").stat().st_mtime
    assert time.time() - struck_s < FOUND_WITHIN_S
    for page in ("logs/crash.txt", "logs/watch/reported", "end.json"):
        assert TIMEOUT_S - 1 < (run / page).stat().st_mtime - struck_s < FOUND_WITHIN_S
    return run, processes


@pytest.mark.parametrize(
    ("fault", "where", "stage"),
    [
        ("hang", "training in step 4 in module blocks.0", 1),
        pytest.param("hang_load", "loading samples in step 4", 3, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_with_what_it_does(
    start: Start, data: Path, tmp_path: Path, fault: str, where: str, stage: int
) -> None:
    run, processes = hung(start, data, tmp_path, fault, ranks=3, stage=stage)
    page = (run / "logs" / "crash.txt").read_text()
    flowing = " ".join(page.split())
    assert f"rank 1 differs: {where}" in flowing
    assert "while ranks 0, 2 are training in step 4" in flowing
    assert "waiting in" in flowing
    assert "checkpoints/step_00000002" in page
    shown = [process.communicate()[1] for process in processes]
    assert sum(page in text for text in shown) == 1
    assert not any("Traceback" in text for text in shown)
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code, record.step) == ("hung", 1, HUNG_STEP - 1)
    assert "rank 1 differs" in record.detail
    states = [
        json.loads(path.read_text())
        for path in sorted((run / "logs" / "watch").glob("rank_*.json"))
    ]
    assert [state["rank"] for state in states] == [0, 1, 2]
    assert any("support/faults.py" in frame for frame in states[1]["stack"])
    assert [bool(state["collective"]) for state in states] == [True, False, True]
    assert "torch's flight recorder: rank 1 not yet in" in flowing
    assert all(group["waiting"] is None for group in states[1]["groups"])


@pytest.mark.slow
def test_a_stopped_process_is_named_with_the_last_that_was_seen_of_it(
    start: Start, data: Path, tmp_path: Path
) -> None:
    run, processes = hung(start, data, tmp_path, "stop", ranks=2, stage=1)
    assert processes[1].poll() is None
    flowing = " ".join((run / "logs" / "crash.txt").read_text().split())
    assert "rank 1 differs: no sign of life for" in flowing
    states = [
        json.loads(path.read_text())
        for path in sorted((run / "logs" / "watch").glob("rank_*.json"))
    ]
    assert [state["rank"] for state in states] == [0, 1]
    assert all(state["stack"] for state in states)


# Rank 1 never comes back from the disk that holds the checkpoint; the start may last no longer than
# a step.
HANGING_START = """
import os, sys, time
sys.path[0] = {repository!r}
from launch.train import parse_arguments
from megagpt.run import assembly, startup; from megagpt.health import watch
from megagpt.utils import run_command

resume = assembly.resume

def hanging(engine, directory, *known):
    if os.environ["RANK"] == "1":
        open({hangs!r}, "w").close()
        time.sleep(1000)
    return resume(engine, directory, *known)

assembly.resume, watch.START_S = hanging, 0.0
sys.exit(run_command(lambda: startup.main(parse_arguments())))
"""
START_TIMEOUT_S = 20  # each stage of a start has to end in it, on a busy machine too


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_loads_is_named_before_the_first_step(
    start: Start, data: Path, tmp_path: Path
) -> None:
    """And an alarm of an earlier end in the same directory is nobody's any more."""
    config = run_config(data, 100, (1, "none", "none"))
    config["megagpt"]["monitor"]["stall_timeout_s"] = START_TIMEOUT_S
    path, run, script, hangs = (
        tmp_path / name for name in ("config.json", "run", "hanging.py", "hangs")
    )
    path.write_text(json.dumps(config))
    script.write_text(HANGING_START.format(repository=str(REPOSITORY), hangs=str(hangs)))
    (run / "logs" / "watch").mkdir(parents=True)
    (run / "logs" / "watch" / "alarm").touch()
    processes = start("--deepspeed_config", path, "--run_dir", run, ranks=2, script=script)
    assert [process.wait(PATIENCE_S) for process in processes] == [1, 1]
    assert (
        run / "logs" / "watch" / "reported"
    ).stat().st_mtime - hangs.stat().st_mtime < START_TIMEOUT_S + 5
    flowing = " ".join((run / "logs" / "crash.txt").read_text().split())
    assert f"no progress for {START_TIMEOUT_S} s" in flowing
    assert (
        "rank 1 differs: loading the checkpoint before the first step, while rank 0 is loading"
        in flowing
    )
    assert "hanging.py" in flowing
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code, record.step) == ("hung", 1, None)


WATCHING = """
import sys, time
from pathlib import Path
from megagpt.health.watch import Pulse, Watch

pulse = Pulse()
with Watch(Path(sys.argv[1]), pulse, rank=0, world_size=1, timeout_s=1, report=print):
    pulse.beat("training", 1)
    time.sleep(1000)
"""


@pytest.mark.slow
def test_a_watch_whose_disk_does_not_answer_still_ends_its_rank(tmp_path: Path) -> None:
    """As when the network goes and a shared disk with it.

    Whoever opens a pipe that nobody reads waits like that.
    """
    written = tmp_path / "logs" / "watch" / "rank_00000.partial"
    written.parent.mkdir(parents=True)
    os.mkfifo(written)
    command = [sys.executable, "-c", WATCHING, str(tmp_path)]
    done = subprocess.run(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, timeout=PATIENCE_S, check=False
    )
    assert (done.returncode, done.stdout) == (ExitCode.FAILED, b"")  # it had no chance to report
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_slow_rank_is_named_within_twenty_steps_and_the_run_goes_on(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    config = run_config(data, 22, (1, "none", "none"), save_every=0)
    faults = "slow@rank=1,step=3,seconds=0.1"
    ranks = two_ranks.run(
        "tests.support.jobs.survival:train_sabotaged",
        config=config,
        directory=tmp_path,
        faults=faults,
    )
    assert [rank["state"].step for rank in ranks] == [22, 22]
    (named,) = [
        event for event in read_metrics(tmp_path).events_named("straggler") if event["rank"] == 1
    ]
    assert named["step"] <= 3 + 20
    assert named["who"].startswith("pipeline 0, data 1, tensor 0 (rank 1, host ")
    assert named["times_as_long"] > 1.3


def test_a_slow_device_is_named_although_no_host_waits(two_ranks: RankPool) -> None:
    """The host's clock sees nothing of it, and names nobody."""
    arguments = {"work_s": [0.1, 0.2], "steps": 16}
    for by_host, named in ((False, [(1, pytest.approx(2.0))]), (True, [])):
        for rank in two_ranks.run(
            "tests.support.jobs.survival:named_by_a_device", by_host=by_host, **arguments
        ):
            assert rank[14] == named  # three windows of five steps
            assert not any(rank[:14] + rank[15:])


def test_a_call_inside_a_timed_call_is_no_second_wait() -> None:
    """torch's `Stream.wait_stream` calls `wait_event`, which calls `Event.wait`: all three are
    hooked.
    """
    clock = RecordedClock()
    wait_stream = waits.timed(waits.timed(waits.timed(clock.advance)))
    waits.begin(clock)
    for seconds in (1.0, 2.0):
        wait_stream(seconds)
    assert [clock.between_s(*stall) for stall in waits.end()] == [1.0, 2.0]


def test_every_collective_of_this_torch_is_hooked_on_a_gpu() -> None:
    """torch 2.13 calls other methods of a group than 2.11 does."""
    called = set(re.findall(r"\bgroup\.([a-z_]+)\(", inspect.getsource(distributed_c10d))) & set(
        dir(dist.ProcessGroup)
    )
    queues_nothing = {
        "rank",
        "size",
        "name",
        "recv_anysource",
        "monitored_barrier",
        "shutdown",
        "split_group",
        "abort",
    }
    collectives = {name for name in called if not name.startswith("_")} - queues_nothing
    assert {"allreduce", "broadcast", "send"} <= collectives
    hooked = {
        name
        for owner, name in waits._waiting_calls(torch.device("cuda"))
        if owner is dist.ProcessGroup
    }
    assert collectives <= hooked


@pytest.mark.gpu
def test_a_stream_that_waits_for_another_stands_still() -> None:
    cycles, device = 100_000_000, torch.device("cuda")
    waits.hook(device)
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    clock, other = waits.DeviceClock(), torch.cuda.Stream()
    begun = clock.mark()
    waits.begin(clock)
    with torch.cuda.stream(other):
        torch.cuda._sleep(cycles)  # a collective, say
    torch.cuda.current_stream().wait_stream(other)
    torch.cuda._sleep(cycles)
    (stall,), ended = waits.end(), clock.mark()
    assert 0.3 < clock.between_s(*stall) / clock.between_s(begun, ended) < 0.7


# -------------------------------------------------------------------------------------- the verdict


def waiting(rank: int) -> RankState:
    return RankState(
        rank=rank,
        name=f"pipeline 0, data {rank}, tensor 0 (rank {rank}, host a)",
        step=7,
        doing="training",
        for_s=10.5,
        module=None,
        collective="all_reduce",
        place="megagpt/parallel/pipeline.py:120 mean_loss",
        stack=(
            "torch/c10d.py:1 all_reduce",
            "megagpt/parallel/pipeline.py:120 mean_loss",
            "megagpt/train.py:70 train",
        ),
        final=True,
    )


ALL = [waiting(rank) for rank in range(4)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"silent_s": 31.2},
            "rank 2 differs: no sign of life for 31 s, last seen training in step 7, while ranks "
            "0-1, 3",
        ),
        (
            {"step": 6},
            "rank 2 differs: training in step 6, waiting in all_reduce, while ranks 0-1, 3 are "
            "training in",
        ),
        (
            {"collective": None, "module": "blocks.3.mlp"},
            "rank 2 differs: training in step 7 in module blocks.3.mlp, ",
        ),
        (
            {"collective": "broadcast"},
            "rank 2 differs: training in step 7, waiting in broadcast, while ranks 0-1, 3 ",
        ),
    ],
)
def test_the_rank_that_differs_is_found(changes: dict[str, Any], said: str) -> None:
    states = [replace(state, **changes) if state.rank == 2 else state for state in ALL]
    assert odd_ranks(states) == [2]
    assert hang_verdict(states).startswith(said)


def test_where_all_wait_alike_nobody_is_accused() -> None:
    assert odd_ranks(ALL) == []
    assert hang_verdict(ALL).startswith("no rank differs")
    halves = [replace(state, collective="broadcast") if state.rank > 1 else state for state in ALL]
    assert odd_ranks(halves) == []


def test_the_page_fits_a_screen_however_many_ranks_there_are() -> None:
    states = [waiting(rank) for rank in range(500)]
    states[77] = replace(
        states[77],
        collective=None,
        place="megagpt/parallel/batches.py:31 load",
        stack=("x" * 200,) * 40,
    )
    page = hang_page(
        states, timeout_s=900, last_checkpoint=None, resume_command=None, stacks=Path("logs/watch")
    )
    lines = page.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert "ranks 0-76, 78-499" in page
    assert page.index("(rank 77, host a)") < page.index("ranks 0-76, 78-499\n")


def test_slowness_counts_against_ones_peers_only() -> None:
    everyone = list(range(4))
    peers = {rank: [other for other in everyone if other != rank] for rank in everyone}
    assert slower_ranks([1.0, 1.1, 1.0, 2.0], 2.5, peers.__getitem__) == {3: 2.0}
    assert (
        slower_ranks([0.01, 0.01, 0.01, 0.02], 2.5, peers.__getitem__) == {}
    )  # it costs nobody anything
    stages = {0: [1], 1: [0], 2: [3], 3: [2]}
    assert slower_ranks([1.0, 1.0, 2.0, 2.0], 2.5, stages.__getitem__) == {}
    assert slower_ranks([1.0], 2.5, {0: []}.__getitem__) == {}
