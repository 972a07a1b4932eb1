"""Signals and the stop file: one rank hears them, all ranks save at the same step, and the run
says how it ended.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint.format import complete_steps
from megagpt.checkpoint.reader import open_checkpoint
from megagpt.monitoring.metrics import read_metrics
from megagpt.rundir import signals
from megagpt.rundir.end_record import EndRecord
from megagpt.rundir.signals import SignalListener, StopRequest, StopRequests
from tests import REPOSITORY
from tests.support.jobs.checkpoint import assert_same_state, gathered, run_config
from tests.support.processes import (
    PATIENCE_S,
    Start,
    ranks_of,
    seconds_to_its_end,
    until,
    until_it_trains,
)
from tests.support.ranks import RankPool
from tests.support.shards import stored_tensors
from tests.support.trained_run import write_dataset

TRAIN = "tests.support.jobs.survival:train_with_requests"
STEPS = 8
PEERS_END_WITHIN_S = 5.0
SAVED_WITHIN_S = 25.0  # a launcher that passes a signal on kills 30 s later


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


# ------------------------------------------------------------------------------ one rank that hears


class Ended(list[signal.Signals]):
    """The signals that would have ended the process."""


@pytest.fixture
def listener() -> Iterator[tuple[StopRequests, Ended]]:
    requests, ended = StopRequests(), Ended()
    requests.awaited = True
    with SignalListener(requests, ended.append):
        yield requests, ended


def send(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_a_signal_becomes_a_wish(listener: tuple[StopRequests, Ended]) -> None:
    requests, _ = listener
    assert requests.take() is StopRequest.NOTHING
    send(signal.SIGUSR1)
    assert until(requests.take) is StopRequest.SAVE
    assert requests.take() is StopRequest.NOTHING
    send(signal.SIGTERM)
    assert until(requests.take) is StopRequest.SIGTERM
    assert requests.take() is StopRequest.SIGTERM


def test_one_press_arrives_twice_and_counts_once(listener: tuple[StopRequests, Ended]) -> None:
    requests, ended = listener
    send(signal.SIGINT, signal.SIGTERM, signal.SIGINT)
    assert until(lambda: requests.take() is StopRequest.SIGTERM)
    assert not ended


def test_the_same_signal_again_ends_the_process(
    listener: tuple[StopRequests, Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds later, that is; the launcher's SIGTERM 30 s after the terminal's SIGINT is another
    signal.
    """
    requests, ended = listener
    monkeypatch.setattr(signals, "SAME_PRESS_S", 0.05)
    send(signal.SIGINT, signal.SIGTERM)
    until(lambda: requests.take() is StopRequest.SIGTERM)
    time.sleep(0.1)
    send(signal.SIGINT)
    assert until(lambda: list(ended)) == [signal.SIGINT]


def test_before_the_first_step_nothing_has_to_be_waited_for(
    listener: tuple[StopRequests, Ended],
) -> None:
    requests, ended = listener
    requests.awaited = False
    send(signal.SIGTERM)
    assert until(lambda: list(ended)) == [signal.SIGTERM]


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    with SignalListener(StopRequests(), lambda heard: None):
        assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before


def test_a_stop_file_is_a_wish_until_it_is_removed(tmp_path: Path) -> None:
    requests = StopRequests(tmp_path / "stop")
    assert requests.take() is StopRequest.NOTHING
    (tmp_path / "stop").touch()
    assert requests.take() is StopRequest.STOP_FILE
    assert StopRequest.STOP_FILE.ends_the_run
    assert not StopRequest.SAVE.ends_the_run


# ---------------------------------------------------------------------------- ranks that must agree


@pytest.mark.rotate(2)
@pytest.mark.parametrize(("stage", "rank"), [(0, 1), (3, 0)])
def test_one_rank_is_told_and_all_end_at_the_same_step(
    two_ranks: RankPool, data: Path, tmp_path: Path, stage: int, rank: int
) -> None:
    """The checkpoint is that step's, and what follows after a resume is bit for bit what would
    have been.
    """

    def train(directory: Path, requests: dict[int, StopRequest]) -> list[dict[str, Any]]:
        config = run_config(data, STEPS, (stage, "none", "none"))
        return two_ranks.run(
            TRAIN, config=config, directory=directory, rank=rank, requests=requests
        )

    whole = train(tmp_path / "whole", {})
    first = train(tmp_path / "parts", {2: StopRequest.SAVE, 5: StopRequest.SIGTERM})
    assert [(ended["request"], ended["state"].step) for ended in first] == [
        (StopRequest.SIGTERM, 5)
    ] * 2
    assert complete_steps(tmp_path / "parts" / "checkpoints") == [5, 2]
    (stop,) = read_metrics(tmp_path / "parts").events_named("stop")
    assert (stop["step"], stop["wish"]) == (5, "SIGTERM")
    second = train(tmp_path / "parts", {})
    assert [ended["request"] for ended in second] == [StopRequest.NOTHING] * 2
    assert_same_state(gathered(whole, "at_end"), gathered(second, "at_end"))


def test_a_wish_in_a_validation_does_not_wait_for_another_step(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    config = run_config(data, STEPS, (1, "none", "none"), save_every=0)
    config["megagpt"]["training"] |= {"eval_interval_steps": 2, "eval_batches": 1}
    requests = {
        2: StopRequest.SAVE,
        4: StopRequest.SIGTERM,
    }  # to save can wait, for the end of step 3
    arguments = {
        "config": config,
        "directory": tmp_path,
        "rank": 1,
        "requests": requests,
        "during": "validation",
    }
    ranks = two_ranks.run(TRAIN, **arguments)
    assert [(ended["request"], ended["state"].step) for ended in ranks] == [
        (StopRequest.SIGTERM, 4)
    ] * 2
    assert complete_steps(tmp_path / "checkpoints") == [4, 3]
    assert [event["step"] for event in read_metrics(tmp_path).events_named("eval")] == [2, 4]


def test_a_wish_in_the_last_step_changes_nothing(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    config = run_config(data, 3, (1, "none", "none"))
    ranks = two_ranks.run(
        TRAIN, config=config, directory=tmp_path, rank=1, requests={3: StopRequest.SIGINT}
    )
    assert [ended["request"] for ended in ranks] == [StopRequest.NOTHING] * 2
    assert complete_steps(tmp_path / "checkpoints") == [3]


# -------------------------------------------------------------------------------- the whole command


@pytest.fixture
def configuration(data: Path, tmp_path: Path) -> Path:
    """A run that nobody waits for the end of."""
    path = tmp_path / "long.json"
    path.write_text(json.dumps(run_config(data, 10**6, (1, "none", "none"), save_every=0)))
    return path


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGTERM,
        *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGINT, "stop file")),
    ],
    ids=str,
)
def test_one_process_saves_and_exits_with_three(
    start: Start, configuration: Path, tmp_path: Path, how: Any
) -> None:
    run = tmp_path / "run"
    (process,) = start("--deepspeed_config", configuration, "--run_dir", run)
    until_it_trains(run, [process])
    if how == "stop file":
        (run / "stop").touch()
    else:
        process.send_signal(how)
    assert process.wait(PATIENCE_S) == 3
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code) == ("pre-empted", 3)
    assert complete_steps(run / "checkpoints") == [record.step]
    assert not (run / "stop").exists()


@pytest.mark.slow
def test_the_second_sigterm_ends_a_process_whose_main_thread_hangs(
    start: Start, data: Path, tmp_path: Path
) -> None:
    """At once, and with the last checkpoint intact (F4)."""
    configuration, run = tmp_path / "config.json", tmp_path / "run"
    configuration.write_text(json.dumps(run_config(data, 10, (1, "none", "none"), save_every=2)))
    (process,) = start("--deepspeed_config", configuration, "--run_dir", run, faults="hang@step=4")
    until((run / "logs" / "faults.txt").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(signals.SAME_PRESS_S + 1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 1
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.step, record.detail) == ("ended at once", 3, "SIGTERM")
    assert open_checkpoint(run).manifest.state.step == 2


# The file of a save is half on the disk, and the disk does not answer any more: of one rank.
HANGING_SAVE = """
import os, sys, time
sys.path[0] = {repository!r}
from launch.train import parse_arguments
from megagpt.checkpoint import writer as checkpoint_writer; from megagpt.run import startup
from megagpt.utils import run_command

write_file = checkpoint_writer._write_file

def hanging(staging, flats, planned):
    stored = write_file(staging, flats, planned)
    if staging.name.endswith("step_00000004") and os.environ["RANK"] == {rank!r}:
        os.truncate(staging / planned.name, planned.bytes // 2)
        open({hangs!r}, "w").close()
        time.sleep(1000)
    return stored

checkpoint_writer._write_file = hanging
sys.exit(run_command(lambda: startup.main(parse_arguments())))
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize(
    "told", [[0], [0, 1], [1, 0]], ids=["one process", "rank 0 of two", "rank 1 of two"]
)
def test_the_second_sigterm_ends_a_process_that_saves(
    start: Start, data: Path, tmp_path: Path, told: list[int], asynchronous: bool
) -> None:
    """Nothing torn can ever be read, and the run goes on from the checkpoint before (F4).

    Of two ranks the first of ``told`` hangs, and it alone is told; the other waits for it, and ends
    with it.
    """
    configuration, run = tmp_path / "config.json", tmp_path / "run"
    config = run_config(data, 10, (1, "none", "none"), save_every=2)
    config["megagpt"]["checkpoint"]["asynchronous"] = asynchronous
    configuration.write_text(json.dumps(config))
    hangs, script = tmp_path / "hangs", tmp_path / "hanging.py"
    script.write_text(
        HANGING_SAVE.format(repository=str(REPOSITORY), hangs=str(hangs), rank=str(told[0]))
    )
    words = ["--deepspeed_config", configuration, "--run_dir", run]
    ranks = start(*words, ranks=len(told), script=script)
    process, *peers = [ranks[rank] for rank in told]
    until(hangs.exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(signals.SAME_PRESS_S + 1)
    assert [rank.poll() for rank in ranks] == [None] * len(ranks)
    assert complete_steps(run / "checkpoints") == [2]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 1
    for peer in peers:
        assert seconds_to_its_end(peer) < PEERS_END_WITHIN_S
        assert peer.wait() == 1
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code, record.rank, record.detail) == (
        "ended at once",
        1,
        told[0],
        "SIGTERM",
    )
    assert complete_steps(run / "checkpoints") == [2]
    assert open_checkpoint(run).manifest.state.step == 2
    assert [rank.wait(PATIENCE_S) for rank in start(*words, ranks=len(told))] == [0] * len(told)
    (resume,) = read_metrics(run).events_named("resume")
    assert (resume["step"], resume["passed_over"]) == (2, [])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "latest",
        "step_00000002",  # was loaded, so it is known to load
        "step_00000008",
        "step_00000010",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_one_of_two_ranks_is_told_and_both_save_the_same_step(
    start: Start, data: Path, tmp_path: Path, told: int
) -> None:
    """In processes of their own, without a launcher; resumed, they end bit for bit as an
    undisturbed run (F3).
    """
    configuration, run, undisturbed = (
        tmp_path / name for name in ("config.json", "run", "undisturbed")
    )
    configuration.write_text(json.dumps(run_config(data, 12, (1, "none", "none"), save_every=12)))
    words = ["--deepspeed_config", configuration, "--run_dir"]
    ranks = start(
        *words, run, ranks=2, faults="slow@step=3,seconds=0.5"
    )  # so that it is told in time
    until_it_trains(run, ranks)
    at_s = time.monotonic()
    ranks[told].send_signal(signal.SIGTERM)
    assert [rank.wait(PATIENCE_S) for rank in ranks] == [3, 3]
    assert time.monotonic() - at_s < SAVED_WITHIN_S
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code, record.detail) == ("pre-empted", 3, "SIGTERM")
    assert complete_steps(run / "checkpoints") == [record.step]
    assert {name[:10] for name in open_checkpoint(run).manifest.files} == {
        "rank_00000",
        "rank_00001",
    }
    logs = [(run / "logs" / f"rank_{rank:05d}.log").read_text() for rank in (0, 1)]
    assert ["SIGTERM: save and end" in log for log in logs] == [rank == told for rank in (0, 1)]
    for directory in (run, undisturbed):
        assert [rank.wait(PATIENCE_S) for rank in start(*words, directory, ranks=2)] == [0, 0]
    (resume,) = read_metrics(run).events_named("resume")
    assert resume["step"] == record.step
    assert_same_state(stored_tensors(run), stored_tensors(undisturbed))
    losses = [
        [(made.step, made.loss) for made in read_metrics(directory).steps]
        for directory in (run, undisturbed)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_ctrl_c_under_the_launcher(start: Start, configuration: Path, tmp_path: Path) -> None:
    """The terminal sends SIGINT to everyone; the launcher adds a SIGTERM for one rank after
    another.
    """
    run = tmp_path / "run"
    (process,) = start("--deepspeed_config", configuration, "--run_dir", run, launched=2)
    until_it_trains(run, [process])
    os.killpg(process.pid, signal.SIGINT)
    record = until(lambda: EndRecord.read(run))
    assert (record.reason, record.exit_code) == ("pre-empted", 3)
    assert record.detail in ("SIGINT", "SIGTERM")
    assert complete_steps(run / "checkpoints") == [record.step]
    assert process.wait(PATIENCE_S) != 0


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_and_end(
    start: Start, configuration: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (process,) = start("--deepspeed_config", configuration, "--run_dir", run, launched=2)
    until_it_trains(run, [process])
    process.kill()
    record = until(lambda: EndRecord.read(run))
    assert (record.reason, record.exit_code, record.detail) == ("pre-empted", 3, "ORPHANED")
    assert complete_steps(run / "checkpoints") == [record.step]


@pytest.mark.slow
def test_ranks_whose_launcher_is_told_to_end_save_and_end(
    start: Start, configuration: Path, tmp_path: Path
) -> None:
    """DeepSpeed's command dies of SIGTERM and does not tell its ranks; both save, well before a
    launcher kills (F3).
    """
    run = tmp_path / "run"
    (process,) = start("--deepspeed_config", configuration, "--run_dir", run, launched=2)
    until_it_trains(run, [process])
    told = time.monotonic()
    process.send_signal(signal.SIGTERM)
    record = until(lambda: EndRecord.read(run))
    assert time.monotonic() - told < SAVED_WITHIN_S
    assert process.wait(PATIENCE_S) == -signal.SIGTERM
    assert (record.reason, record.exit_code, record.detail) == ("pre-empted", 3, "ORPHANED")
    assert complete_steps(run / "checkpoints") == [record.step]
    files = open_checkpoint(run).manifest.files
    assert {name[:10] for name in files} == {"rank_00000", "rank_00001"}
    until(lambda: not ranks_of(run))
    logs = [(run / "logs" / f"rank_{rank:05d}.log").read_text() for rank in (0, 1)]
    assert any(
        "the launcher has died" in log for log in logs
    )  # the first to notice tells the other
