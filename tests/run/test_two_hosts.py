"""`deepspeed --hostfile hosts launch/train.py`, and parity/compare.py, over ssh and pdsh between
two hosts (two_hosts.py).

It trains as one process does, over the cable; hosts that are missing, uneven, dead or lost end it,
by name.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from megagpt.checkpoint.format import complete_steps
from megagpt.cluster.processes import Process, all_processes, process
from megagpt.monitoring.metrics import read_metrics
from megagpt.preflight import ssh
from megagpt.rundir import directory as run_directory
from megagpt.rundir.end_record import EndRecord
from tests import REPOSITORY
from tests.support.jobs.checkpoint import run_config
from tests.support.monitoring import CANARY, ENVIRONMENT, SECRETS
from tests.support.processes import import_s
from tests.support.trained_run import write_dataset
from tests.support.two_hosts import SSH_GIVES_UP_S, TwoHosts, two_hosts, why_not_here

pytestmark = pytest.mark.root

STEPS = 4
DEADLINE_S = 240.0
ONE_EACH = {"host-a": 1, "host-b": 1}
TWO_EACH = {"host-a": 2, "host-b": 2}
# DeepSpeed is imported by its launcher, then by a process on each host, then by the ranks, on as
# few as two cores.
REFUSED_WITHIN_S, IMPORTS = 10.0, 5
PDSH_GIVES_UP_S = 10.0  # on a host that does not answer
STALL, STALL_S = "megagpt.monitor.stall_timeout_s", 10


@pytest.fixture(scope="module")
def hosts(compiled_ops: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if (reason := why_not_here()) is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def sound(hosts: TwoHosts) -> Iterator[TwoHosts]:
    """The hosts, both accepting ssh again afterwards and without processes of the test."""
    yield hosts
    hosts.forward()
    hosts.plug_cable("host-b")
    for host in set(ONE_EACH) - set(hosts.daemons):
        hosts.start_daemon(host)
    assert [rank.words for rank in ranks_on(hosts)] == []


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("configuration")
    config = run_config(write_dataset(directory), STEPS, (3, "none", "none"), save_every=2)
    (directory / "small.json").write_text(json.dumps(config))
    return directory / "small.json"


@pytest.fixture(scope="module")
def alone(
    compiled_ops: None, configuration: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of the same run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run(
        [sys.executable, *training(configuration, run)],
        cwd=REPOSITORY,
        env=os.environ | ENVIRONMENT | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        check=True,
    )
    return losses(run)


def training(configuration: Path, run: Path, *overrides: str) -> list[str]:
    words = ["launch/train.py", "--deepspeed_config", str(configuration), "--run_dir", str(run)]
    return [*words, *(["--set", *overrides] if overrides else [])]


def launch(hosts: TwoHosts, words: list[str], *options: str) -> tuple[int, str]:
    """Type the command on the first host; its exit code and what it showed."""
    code, shown, _ = watched_launch(hosts, words, *options)
    return code, shown


def watched_launch(
    hosts: TwoHosts, words: list[str], *options: str
) -> tuple[int, str, set[Process]]:
    """The same, and the processes that could be listed meanwhile: of both hosts, which share
    this machine's /proc.
    """
    command = hosts.start(
        "host-a", ["deepspeed", "--hostfile", hosts.directory / "hosts", *options, *words]
    )
    seen: set[Process] = set()

    def shown() -> tuple[str, str] | None:
        seen.update(all_processes())
        with suppress(subprocess.TimeoutExpired):
            return command.communicate(timeout=0.2)
        return None

    text, _ = wait_for(shown)
    return command.returncode, text, seen


def losses(run: Path) -> list[float]:
    return [step.loss for step in read_metrics(run).steps]


def ranks_on(hosts: TwoHosts, *names: str) -> list[Process]:
    """The ranks that live on hosts (on both, by default)."""
    found = [process(number) for host in names or ONE_EACH for number in hosts.processes(host)]
    return [rank for rank in found if rank and is_rank(rank)]


def is_rank(member: Process) -> bool:
    return any(word.startswith("--local_rank") for word in member.words[:4])


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (result := condition()):
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.1)
    return result


@contextmanager
def within_seconds(waits_s: float = 0.0) -> Iterator[None]:
    """What is done inside takes no more than REFUSED_WITHIN_S, IMPORTS, and what it waits for by
    design.

    A start is imports above all, five of six seconds on an idle machine: beside other work both
    take longer, so that the longer one of an import before and one after is the reference. They
    count as the start does, waits for a core included, as its processes on the other host cannot be
    asked for theirs.
    """
    before_s = import_s(queued=True)
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began
    yardstick_s = max(before_s, import_s(queued=True))
    assert took_s < REFUSED_WITHIN_S + IMPORTS * yardstick_s + waits_s


@pytest.mark.parametrize(
    ("slots", "mesh"),
    [(ONE_EACH, []), (TWO_EACH, ["megagpt.parallel.pipeline=2"])],
    ids=["ZeRO-3", "PP 2 x ZeRO-3"],
)
def test_two_hosts_train_as_one_process_does(
    sound: TwoHosts,
    configuration: Path,
    alone: list[float],
    tmp_path: Path,
    slots: dict[str, int],
    mesh: list[str],
) -> None:
    """With keys in the environment that must appear nowhere, nor in a listing of processes (S4).

    Pipeline stages lie on different hosts.
    """
    ranks = sum(slots.values())
    sound.write_hostfile(slots)
    before = {host: sound.bytes_sent(host) for host in slots}
    run = tmp_path / "run"
    stated = f"megagpt.parallel.world_size={ranks}"
    with pytest.MonkeyPatch.context() as environment:
        for name in SECRETS:
            environment.setenv(name, CANARY)
        code, shown, seen = watched_launch(sound, training(configuration, run, stated, *mesh))
    assert code == 0, shown
    assert losses(run) == pytest.approx(alone, abs=1e-5)
    for rank in range(ranks):
        log = (run / "logs" / f"rank_{rank:05d}.log").read_text()
        assert (
            f"rank {rank} of {ranks}, on host {'host-a' if rank < ranks // 2 else 'host-b'} by "
            f"deepspeed" in log
        )
        assert CANARY not in log
    assert CANARY not in shown
    assert (
        len({member.number for member in seen if is_rank(member) and str(run) in member.words})
        == ranks
    )
    assert [member for member in seen if CANARY in " ".join(member.words)] == []
    parameters = (
        4 * 38_304
    )  # bytes of the model in fp32; ZeRO-3 gathers the other half of them again and again
    carried = {host: sound.bytes_sent(host) - before[host] for host in slots}
    assert all(sent > STEPS * parameters / 2 for sent in carried.values()), carried


def test_two_hosts_compare_as_one_machine_does(sound: TwoHosts) -> None:
    """Of each parameter a host holds a half, which the other gathers; a host that is missing is
    noticed.
    """
    sound.write_hostfile(ONE_EACH)
    before = {host: sound.bytes_sent(host) for host in ONE_EACH}
    words = ["launch/parity.py", "--own_only", "--steps", "1", "--ranks", "2"]
    code, shown = launch(sound, words)
    assert code == 0, shown
    assert "1 strategy on 2 ranks (cpu), 1 steps of" in shown
    assert len(re.findall(r"^(?:host-a: )?1 +1 +3 +cpu +cpu .* 5\d%$", shown, re.MULTILINE)) == 1
    assert "1 of 1 strategies equal one plain process" in shown
    (parameters,) = re.findall(r"a GPT of ([\d,]+) parameters", shown)
    carried = {host: sound.bytes_sent(host) - before[host] for host in ONE_EACH}
    assert all(sent > 4 * int(parameters.replace(",", "")) / 2 for sent in carried.values()), (
        carried
    )
    sound.write_hostfile({"host-a": 1})
    code, shown = launch(sound, words)
    assert code == 2, shown
    assert "--ranks 2: a launcher has started 1" in shown


@pytest.mark.parametrize(
    ("slots", "overrides", "said"),
    [
        (None, ["megagpt.parallel.world_size=2"], "no such hostfile; write one line a host"),
        ({"host-a": 1}, ["megagpt.parallel.world_size=2"], "the run expects 2 ranks and 1 started"),
        (ONE_EACH, [], "missing (need it on 2 hosts, so that an absent host is noticed)"),
        (
            {"host-a": 1, "host-b": 2},
            ["megagpt.parallel.world_size=3"],
            "host-b has 2 slots and most hosts have 1",
        ),
    ],
    ids=["no hostfile", "a host gone", "no size stated", "uneven slots"],
)
def test_hosts_that_are_not_those_of_the_run_are_refused(
    sound: TwoHosts,
    configuration: Path,
    tmp_path: Path,
    slots: dict[str, int] | None,
    overrides: list[str],
    said: str,
) -> None:
    sound.write_hostfile(slots or {})
    if slots is None:
        (sound.directory / "hosts").unlink()
    with within_seconds():
        code, shown = launch(sound, training(configuration, tmp_path / "run", *overrides))
    assert code == 2, shown
    assert said in shown
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------ dead and lost


def preflight(hosts: TwoHosts, configuration: Path, run: Path, *options: str) -> tuple[int, str]:
    words = [
        "launch/preflight.py",
        "--hostfile",
        hosts.directory / "hosts",
        "--deepspeed_config",
        configuration,
    ]
    command = hosts.start("host-a", [sys.executable, *words, "--run_dir", run, *options])
    shown, _ = command.communicate(timeout=DEADLINE_S)
    return command.returncode, shown


def test_preflight_looks_at_both_hosts_and_the_cable(
    sound: TwoHosts, configuration: Path, tmp_path: Path
) -> None:
    sound.write_hostfile(ONE_EACH)
    before = sound.bytes_sent("host-b")
    size = "megagpt.parallel.world_size=2"
    code, shown = preflight(sound, configuration, tmp_path / "run", "--set", size, "--bandwidth")
    assert code == 0, shown
    assert [line.split()[:2] for line in shown.splitlines()[1:3]] == [
        ["host-a", "ok"],
        ["host-b", "ok"],
    ]
    assert re.search(
        r"all-reduce over 2 ranks \(gloo\): \d+ us for a number, .*/s a link for 64.00 MiB", shown
    )
    assert sound.bytes_sent("host-b") - before > 5 * 64 * 1024**2
    assert list(tmp_path.iterdir()) == []


def test_dead_hosts_are_named_by_preflight(
    sound: TwoHosts, configuration: Path, tmp_path: Path
) -> None:
    """One whose ssh daemon does not run, one at whose address nobody is, one that does not
    answer: asked together.
    """
    sound.stop_daemon("host-b")
    sound.write_hostfile(ONE_EACH | {"dead": 1, "silent": 1})
    size = ("megagpt.parallel.world_size=4", "train_batch_size=8")
    with within_seconds(ssh.CONNECT_S):
        code, shown = preflight(sound, configuration, tmp_path / "run", "--set", *size)
    assert code == 2
    assert (
        "host-b: ssh: 'ssh: connect to host 192.0.2.2 port 22: Connection refused': no ssh "
        "daemon listens on the host" in shown
    )
    for host, said in (
        ("dead", "192.0.2.9 port 22: No route"),
        ("silent", "192.0.2.10 port 22: Connection timed out"),
    ):
        assert re.search(
            rf"{host}: ssh: .*{said}.*: the host does not answer; check that it is up", shown
        )
    assert [line.split()[:2] for line in shown.splitlines()[1:2]] == [["host-a", "ok"]]


@pytest.mark.parametrize(
    ("host", "said", "waits_s"),
    [("host-b", "Connection refused", 0.0), ("silent", "Connection timed out", PDSH_GIVES_UP_S)],
    ids=["no daemon", "no answer"],
)
def test_a_dead_host_ends_the_start_at_once(
    sound: TwoHosts, configuration: Path, tmp_path: Path, host: str, said: str, waits_s: float
) -> None:
    """pdsh goes on with the hosts that it reached; the rank beside it sees the ssh session go."""
    sound.stop_daemon("host-b")
    sound.write_hostfile({"host-a": 1, host: 1})
    with within_seconds(waits_s):
        code, shown = launch(
            sound, training(configuration, tmp_path / "run", "megagpt.parallel.world_size=2")
        )
    assert code != 0
    assert re.search(rf"{host}: ssh: connect to host \S+ port 22: {said}", shown)
    assert (
        f"the ssh session to {host} has ended, so rank 1 (host {host}) cannot join; see its output "
        f"above" in shown
    )
    assert not (tmp_path / "run").exists()


def test_a_first_host_that_does_not_answer_ends_the_launcher(
    sound: TwoHosts, configuration: Path, tmp_path: Path
) -> None:
    """Before any code of ours runs: it asks that host for its address, for as long as ssh tries
    (docs/clusters.md).
    """
    sound.write_hostfile({"silent": 1, "host-a": 1})
    with within_seconds(SSH_GIVES_UP_S):
        code, shown = launch(
            sound, training(configuration, tmp_path / "run", "megagpt.parallel.world_size=2")
        )
    assert code != 0
    assert "host=silent was not reachable via ssh" in shown


def test_a_rank_that_never_joins_is_named_by_the_others(
    sound: TwoHosts, configuration: Path, tmp_path: Path
) -> None:
    """Its host is up and its process stopped, as on a disk that hangs."""
    sound.write_hostfile(ONE_EACH)
    sound.forward(MEGAGPT_JOIN_TIMEOUT_S="10")
    words = training(configuration, tmp_path / "run", "megagpt.parallel.world_size=2")
    command = sound.start("host-a", ["deepspeed", "--hostfile", sound.directory / "hosts", *words])
    (stopped,) = wait_for(lambda: ranks_on(sound, "host-b"))
    os.kill(stopped.number, signal.SIGSTOP)
    wait_for(lambda: ranks_on(sound, "host-a"))
    wait_for(lambda: not ranks_on(sound, "host-a"))
    os.kill(stopped.number, signal.SIGKILL)
    shown, _ = command.communicate(timeout=DEADLINE_S)
    assert command.returncode != 0
    assert "rank 1 (host host-b) did not join within 10 s; look for an error in its output" in shown


def test_a_second_run_in_the_directory_is_refused_on_both_hosts(
    sound: TwoHosts, configuration: Path, tmp_path: Path
) -> None:
    """Rank 0 finds the lock; the rank of the other host is told of it."""
    sound.write_hostfile(ONE_EACH)
    run = tmp_path / "run"
    with run_directory.lock(run):
        code, shown = launch(sound, training(configuration, run, "megagpt.parallel.world_size=2"))
    assert code == 2
    said = [
        line.split(":")[0] for line in shown.splitlines() if "trains in it; end that run" in line
    ]
    assert sorted(said) == [*ONE_EACH]
    assert [path.name for path in run.iterdir()] == [run_directory.LOCK_FILE]


def test_a_lost_session_ends_the_ranks_of_both_hosts_and_the_run_goes_on_later(
    sound: TwoHosts, configuration: Path, tmp_path: Path
) -> None:
    """The host stays up and its rank never hears from the launcher again; the page shows the
    command as typed.
    """
    sound.write_hostfile(ONE_EACH)
    run = tmp_path / "run"
    overrides = ["megagpt.parallel.world_size=2", "megagpt.training.total_steps=1000000"]
    words = training(configuration, run, *overrides, "megagpt.checkpoint.interval_steps=1")
    typed = ["deepspeed", "--hostfile", str(sound.directory / "hosts"), *words]
    command = sound.start("host-a", typed)
    try:
        wait_for(lambda: len(complete_steps(run / "checkpoints")) >= 2)
        assert [len(ranks_on(sound, host)) for host in ONE_EACH] == [1, 1]
        for session in sessions_on(sound, "host-b"):
            os.kill(session, signal.SIGKILL)
        wait_for(lambda: not ranks_on(sound))
    finally:
        shown, _ = command.communicate(timeout=DEADLINE_S)
    assert command.returncode != 0
    assert "the launcher has died" in (run / "logs" / "rank_00001.log").read_text()
    assert f"ended; to resume: {' '.join(typed)}" in shown
    last = max(complete_steps(run / "checkpoints"))
    code, shown = launch(
        sound,
        training(configuration, run, overrides[0], f"megagpt.training.total_steps={last + 1}"),
    )
    assert code == 0, shown
    (resume,) = read_metrics(run).events_named("resume")
    assert (resume["step"], resume["passed_over"]) == (last, [])


def test_a_host_that_drops_out_ends_the_run_on_both_sides_of_the_cable(
    sound: TwoHosts, configuration: Path, tmp_path: Path
) -> None:
    """Nobody closes a connection: each side waits for the other until its own watch ends it (F18).

    Neither saves anything without the other, and with the host back the run goes on.
    """
    sound.write_hostfile(ONE_EACH)
    run = tmp_path / "run"
    often = ["megagpt.parallel.world_size=2", "megagpt.checkpoint.interval_steps=1"]
    endless = training(
        configuration, run, *often, "megagpt.training.total_steps=1000000", f"{STALL}={STALL_S}"
    )
    command = sound.start(
        "host-a", ["deepspeed", "--hostfile", sound.directory / "hosts", *endless]
    )
    try:
        wait_for(lambda: len(complete_steps(run / "checkpoints")) >= 2)
        sound.pull_cable("host-b")
        pulled, last_steps = time.monotonic(), complete_steps(run / "checkpoints")
        wait_for(lambda: not ranks_on(sound))
        took_s = time.monotonic() - pulled
        assert took_s < STALL_S + 5
    finally:
        sound.plug_cable("host-b")  # ssh is told of the end of the session
        shown, _ = command.communicate(timeout=DEADLINE_S)
    assert command.returncode != 0
    record = EndRecord.read(run)
    assert record is not None
    assert (record.reason, record.exit_code) == ("hung", 1)
    assert f"no progress for {STALL_S} s" in shown
    steps = complete_steps(run / "checkpoints")
    assert max(steps) - max(last_steps) <= 1  # one may have been on its way
    code, shown = launch(
        sound,
        training(configuration, run, *often, f"megagpt.training.total_steps={max(steps) + 2}"),
    )
    assert code == 0, shown
    (resume,) = read_metrics(run).events_named("resume")
    assert (resume["step"], resume["passed_over"]) == (max(steps), [])


def sessions_on(hosts: TwoHosts, host: str) -> list[int]:
    """The processes of ssh sessions on a host, without the daemon that started them."""
    found = [process(number) for number in hosts.processes(host)]
    daemon = hosts.daemons[host].pid
    return [
        session.number
        for session in found
        if session and session.name.startswith("sshd") and session.number != daemon
    ]
