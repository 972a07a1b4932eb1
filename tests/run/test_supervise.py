"""Restarts after crashes, and after nothing else; what is left over is ended; the time that
counted is on record.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt.monitoring.metrics import History, read_metrics
from megagpt.monitoring.report import write_report
from megagpt.run import supervise
from megagpt.run.supervise import handles, members, run_directory_of
from megagpt.rundir.end_record import EndRecord
from tests.support.jobs.checkpoint import assert_same_state, run_config
from tests.support.monitoring import record
from tests.support.processes import (
    PATIENCE_S,
    PROGRAMS,
    Process,
    Start,
    ranks_of,
    seconds_to_its_end,
    until,
)
from tests.support.ranks import free_port
from tests.support.shards import stored_tensors
from tests.support.trained_run import write_dataset

SUPERVISE = "launch/supervise.py"
PLAN = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from megagpt.rundir.end_record import EndRecord
from megagpt.monitoring.metrics import MetricsFile
from tests.support.monitoring import record

run = Path(sys.argv[sys.argv.index("--run_dir") + 1])
plan = json.loads((run / "plan.json").read_text())
first, *rest = plan
(run / "plan.json").write_text(json.dumps(rest))
if first.get("checkpoint"):
    (run / "checkpoints" / f"step_{first['checkpoint']:08d}").mkdir(parents=True, exist_ok=True)
if first.get("step"):
    file = MetricsFile(run, start_step=first["step"] - 1)
    file.write(record(first["step"], step_time_s=0.001).as_line())
    file.close()
if first.get("reason"):
    detail = first.get("detail", "")
    EndRecord(first["reason"], first["code"], first.get("step"), 0, detail).write(run)
if first.get("leave"):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
if first.get("wait"):
    (run / "waiting").touch()
    end = EndRecord("pre-empted", 3, 7, 0)
    signal.signal(signal.SIGTERM, lambda *_: (end.write(run), os._exit(143)))
    signal.signal(signal.SIGUSR1, lambda *_: (run / "saved").touch())
    while True:
        time.sleep(0.05)
if first.get("signal"):
    os.kill(os.getpid(), first["signal"])
sys.exit(first["code"])
"""


def pretend(start: Start, run: Path, *plan: dict[str, Any], restarts: int = 3) -> Process:
    """Supervise a command that does not train but ends, start by start, as planned."""
    run.mkdir()
    (run / "plan.json").write_text(json.dumps(plan))
    (run / "pretend.py").write_text(PLAN)
    command = [sys.executable, run / "pretend.py", "--run_dir", run]
    (process,) = start("--restarts", restarts, "--", *command, script=SUPERVISE)
    return process


def unused(run: Path) -> int:
    """Starts that were planned and never made."""
    return len(json.loads((run / "plan.json").read_text()))


def failed(step: int, **more: Any) -> dict[str, Any]:
    return {"code": 1, "reason": "failed", "step": step, **more}


DONE = {"code": 0, "reason": "done", "step": 9}


def test_crashes_are_followed_by_restarts(start: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed = {"code": 1, "signal": signal.SIGKILL, "step": 5, "checkpoint": 4}
    process = pretend(start, run, failed(3), killed, failed(5, checkpoint=5), DONE)
    assert process.wait(PATIENCE_S) == 0
    assert unused(run) == 0
    history = read_metrics(run)
    restarts = history.events_named("restart")
    assert [event["crashed_after_step"] for event in restarts] == [3, 5, 5]
    assert [event["step"] for event in restarts] == [0, 4, 5]
    assert [event["reason"] for event in restarts] == ["failed", "killed by SIGKILL", "failed"]
    (whole,) = history.events_named("supervise")
    assert whole["restarts"] == 3
    assert 0 < whole["effective_training_time_ratio"] < 1
    page = write_report(run).read_text()
    assert "Effective training time" in page
    assert "killed by SIGKILL" in page


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_what_is_no_crash_is_not_started_again(start: Start, tmp_path: Path, code: int) -> None:
    """Also where the launcher makes another exit code of it, and where there is a record of an
    earlier end.
    """
    first = {"code": code} | ({"reason": "done", "step": 9} if code == 0 else {})
    process = pretend(start, tmp_path / "run", first, DONE)
    assert process.wait(PATIENCE_S) == code
    assert unused(tmp_path / "run") == 1
    ended = {"code": code, "reason": "whatever", "step": 1, "signal": signal.SIGKILL}
    process = pretend(start, tmp_path / "other", failed(1), ended, DONE)
    assert process.wait(PATIENCE_S) == code
    assert unused(tmp_path / "other") == 1


@pytest.mark.slow
def test_two_crashes_in_the_same_place_are_enough(start: Start, tmp_path: Path) -> None:
    process = pretend(
        start, tmp_path / "run", failed(5, checkpoint=4), failed(5, checkpoint=4), DONE
    )
    assert process.wait(PATIENCE_S) == 1
    assert unused(tmp_path / "run") == 1
    (whole,) = read_metrics(tmp_path / "run").events_named("supervise")
    assert "2 times after step 5, without a new checkpoint" in whole["outcome"]


LOST = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by "
    "peer [127.0.0.1]:4711"
)


@pytest.mark.parametrize(
    "killed",
    [
        {"code": 1, "signal": signal.SIGKILL, "step": 5, "checkpoint": 4},
        pytest.param(failed(5, checkpoint=4, detail=LOST), marks=pytest.mark.slow),
    ],
    ids=["alone", "peer"],
)
def test_kills_that_happen_to_meet_in_the_same_place_are_two_kills(
    start: Start, tmp_path: Path, killed: dict[str, Any]
) -> None:
    """Between the same two logged steps, without a new checkpoint; a third makes it the fault of
    that place.
    """
    process = pretend(start, tmp_path / "run", killed, killed, killed, DONE)
    assert process.wait(PATIENCE_S) == 1
    assert unused(tmp_path / "run") == 1
    (whole,) = read_metrics(tmp_path / "run").events_named("supervise")
    assert whole["restarts"] == 2
    assert "3 times after step 5, without a new checkpoint" in whole["outcome"]


@pytest.mark.slow
def test_a_launcher_that_was_killed_exits_0_and_the_run_is_not_done(
    start: Start, tmp_path: Path
) -> None:
    process = pretend(start, tmp_path / "run", {"code": 0, "step": 4}, DONE)
    assert process.wait(PATIENCE_S) == 0
    assert unused(tmp_path / "run") == 0
    (restart,) = read_metrics(tmp_path / "run").events_named("restart")
    assert restart["reason"] == "exit code 0, no end record"


@pytest.mark.slow
def test_a_run_that_saved_because_its_launcher_died_goes_on(start: Start, tmp_path: Path) -> None:
    orphaned = {"code": 3, "reason": "pre-empted", "detail": "ORPHANED", "step": 4, "checkpoint": 4}
    process = pretend(start, tmp_path / "run", orphaned, DONE)
    assert process.wait(PATIENCE_S) == 0
    assert unused(tmp_path / "run") == 0


@pytest.mark.slow
def test_a_crash_while_it_starts_is_not_the_one_before(start: Start, tmp_path: Path) -> None:
    """The first crash in step 5 is on record still when the second ends the start that follows."""
    killed = {"code": 1, "signal": signal.SIGKILL}
    process = pretend(
        start, tmp_path / "run", killed | {"step": 5}, killed, killed | {"step": 5}, DONE
    )
    assert process.wait(PATIENCE_S) == 0
    assert unused(tmp_path / "run") == 0


@pytest.mark.slow
def test_restarts_are_used_up(start: Start, tmp_path: Path) -> None:
    process = pretend(start, tmp_path / "run", failed(1), failed(2), failed(3), DONE, restarts=2)
    assert process.wait(PATIENCE_S) == 1
    assert unused(tmp_path / "run") == 1


def test_a_signal_reaches_the_ranks_and_ends_the_restarts(start: Start, tmp_path: Path) -> None:
    """The launcher dies with 143; what counts is what the run says of itself."""
    run = tmp_path / "run"
    process = pretend(start, run, {"wait": True, "code": 0}, DONE)
    until((run / "waiting").exists)
    until(lambda: any(handles(child, signal.SIGUSR1) for child in children(process)))
    process.send_signal(signal.SIGUSR1)
    until((run / "saved").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 3
    assert unused(run) == 1


def children(process: Process) -> list[int]:
    return [
        int(child)
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def test_what_a_crash_leaves_running_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "LEFTOVERS_MAY_TAKE_S", 0.2)
    script = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(1000)'])"
    )
    command = [sys.executable, "-c", f"{script}; sys.exit(1)", "--run_dir", str(tmp_path)]
    found: list[int] = []
    monkeypatch.setattr(
        supervise, "members", lambda mark: found.extend(members(mark)) or list(members(mark))
    )
    supervisor = supervise.Supervisor(command, 0)
    ending = supervisor._attempt()
    assert (ending.code, ending.final) == (1, False)
    assert found
    assert not list(members(supervisor.mark))


def test_nothing_starts_after_it_was_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal between two starts; the pause is over at once, and the run stays ended."""
    command = [sys.executable, "-c", "import sys; sys.exit(1)", "--run_dir", str(tmp_path)]
    supervisor = supervise.Supervisor(command, 5)
    attempts: list[int] = []
    attempt = supervisor._attempt
    monkeypatch.setattr(supervisor, "_attempt", lambda: attempts.append(1) or attempt())
    monkeypatch.setattr(supervisor, "_back_off_s", lambda: supervisor.asked_to_stop.set() or 60.0)
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        assert supervisor.run() == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(attempts) == 1


def test_members_are_marked_and_may_have_a_session_of_their_own() -> None:
    """As torchrun gives its ranks."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
    process = subprocess.Popen(
        sleeper, env=os.environ | {supervise.MARK: "own"}, start_new_session=True
    )
    try:
        assert list(members("own")) == [process.pid]
        assert not list(members("another"))
    finally:
        process.kill()
        process.wait()


def test_who_handles_what() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    assert handles(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert not handles(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_back_off_grows_while_nothing_is_gained() -> None:
    supervisor = supervise.Supervisor(["x"], 9)
    waits = []
    for checkpoint in ("a", "a", "a", "b", "b"):
        supervisor.crashes.append(supervise.Ending(1, 1, checkpoint, "", final=False))
        waits.append(supervisor._back_off_s())
    assert waits == [1, 2, 4, 1, 2]


def test_the_run_directory_is_the_commands() -> None:
    assert run_directory_of(["deepspeed", "launch/train.py"]) == Path("runs/default")
    assert run_directory_of(["deepspeed", "x.py", "--deepspeed_config", "a/b.json"]) == Path(
        "runs/b"
    )
    assert run_directory_of(["python", "x.py", "--run_dir=here/it", "--set", "a=1"]) == Path(
        "here/it"
    )


def test_time_in_steps_counts_what_no_record_stands_for_by_its_neighbours() -> None:
    history = History([record(10, step_time_s=0.5), record(20, step_time_s=0.25)], [])
    assert history.time_in_steps_s() == 7.5
    assert history.time_in_steps_s(after_step=10) == 2.5


def test_a_command_that_does_not_exist(start: Start) -> None:
    (process,) = start("--", "no_such_command", script=SUPERVISE)
    assert process.wait(PATIENCE_S) == 2
    assert (
        "no_such_command: cannot be started (No such file or directory)" in process.communicate()[1]
    )


# ---------------------------------------------------------------------------------- runs that train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_to_the_same_end(
    start: Start, data: Path, tmp_path: Path, ranks: int
) -> None:
    """kill -9 of a rank in the middle of a step, with and without DeepSpeed's launcher (F1)."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(run_config(data, 8, (1, "none", "none"), save_every=2)))
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [
            PROGRAMS / "deepspeed",
            "--num_accelerators",
            ranks,
            "--master_port",
            free_port(),
        ]
    words = ["launch/train.py", "--deepspeed_config", path, "--run_dir"]
    (killed,) = start(
        *("--restarts", 2, "--", *launcher, *words, tmp_path / "killed"),
        script=SUPERVISE,
        faults=f"kill@rank={ranks - 1},step=6",
    )
    assert killed.wait(2 * PATIENCE_S) == 0
    (undisturbed,) = start("--", *launcher, *words, tmp_path / "undisturbed", script=SUPERVISE)
    assert undisturbed.wait(2 * PATIENCE_S) == 0
    history = read_metrics(tmp_path / "killed")
    (restart,) = history.events_named("restart")
    assert restart["step"] == 4
    assert [event["step"] for event in history.events_named("resume")] == [4]
    (whole,) = history.events_named("supervise")
    assert (whole["restarts"], whole["outcome"]) == (1, "done")
    assert (tmp_path / "killed" / "logs" / "faults.txt").read_text().count("kill@") == 1
    ends = [EndRecord.read(tmp_path / name) for name in ("killed", "undisturbed")]
    assert [end.step for end in ends if end] == [8, 8]
    assert_same_state(*(stored_tensors(tmp_path / name) for name in ("killed", "undisturbed")))
    killed_steps, undisturbed_steps = (
        read_metrics(tmp_path / name).steps for name in ("killed", "undisturbed")
    )
    assert [(s.step, s.loss) for s in killed_steps] == [(s.step, s.loss) for s in undisturbed_steps]


PEERS_END_WITHIN_S = 5.0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_peers_end_with_a_killed_rank_and_the_printed_command_goes_on(
    start: Start, data: Path, tmp_path: Path, victim: int
) -> None:
    """kill -9 of one of two ranks, started one by one, in a step (F1).

    The printed command is that of the rank that prints it, and is typed for the other with its
    numbers.
    """
    path, run = tmp_path / "config.json", tmp_path / "killed"
    path.write_text(json.dumps(run_config(data, 8, (1, "none", "none"), save_every=2)))
    words = ["--deepspeed_config", path, "--run_dir"]
    ranks = start(*words, run, ranks=2, faults=f"kill@rank={victim},step=6")
    assert ranks.pop(victim).wait(PATIENCE_S) == -signal.SIGKILL
    (peer,) = ranks
    assert seconds_to_its_end(peer) < PEERS_END_WITHIN_S
    assert peer.wait() == 1
    assert not ranks_of(run)
    page = peer.communicate()[1]
    (typed,) = re.findall(r"to resume +(.+)\n", page)
    assert (
        f"RANK={1 - victim} WORLD_SIZE=2 LOCAL_RANK={1 - victim} MASTER_ADDR=127.0.0.1 MASTER_PORT="
        in typed
    )
    again = [start(typed=typed.replace(f"RANK={1 - victim}", f"RANK={rank}")) for rank in (0, 1)]
    assert [rank.wait(PATIENCE_S) for (rank,) in again] == [0, 0]
    assert [rank.wait(PATIENCE_S) for rank in start(*words, tmp_path / "undisturbed", ranks=2)] == [
        0,
        0,
    ]
    (resume,) = read_metrics(run).events_named("resume")
    assert resume["step"] == 4
    assert_same_state(*(stored_tensors(tmp_path / name) for name in ("killed", "undisturbed")))
    killed_steps, undisturbed_steps = (
        read_metrics(tmp_path / name).steps for name in ("killed", "undisturbed")
    )
    assert [(s.step, s.loss) for s in killed_steps] == [(s.step, s.loss) for s in undisturbed_steps]
