"""Ranks that never come are named, with their hosts, within the time that is allowed; nothing
hangs.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megagpt.cluster import rendezvous
from megagpt.cluster.hosts import Host
from megagpt.cluster.launch_command import COMMAND_VARIABLE
from megagpt.cluster.launchers import Launch
from megagpt.cluster.processes import listener
from megagpt.cluster.rendezvous import TIMEOUT_VARIABLE, gathered_ranks
from megagpt.utils import UserError
from tests import REPOSITORY
from tests.support.monitoring import ENVIRONMENT
from tests.support.processes import until
from tests.support.ranks import free_port

HOSTS = (Host("host-a", 2), Host("host-b", 2))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def refusal(monkeypatch: pytest.MonkeyPatch, rank: int) -> str:
    """What one of four ranks says that finds itself alone."""
    monkeypatch.setattr(
        rendezvous, "adopt_launch", lambda: Launch("deepspeed", rank, 4, rank % 2, 2, 2, HOSTS)
    )
    with pytest.raises(UserError) as error, gathered_ranks():
        raise AssertionError("nobody else has come")
    return str(error.value)


def test_missing_ranks_are_named_with_their_hosts(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.0)
    said = refusal(monkeypatch, 0)
    missing = "rank 1 (host host-a), rank 2 (host host-b), rank 3 (host host-b)"
    assert said.startswith(
        f"{missing} did not join within 1 s; look for an error in its output, or check all hosts: "
    )
    shown = capfd.readouterr().err
    notice = (
        rf"^waiting for {re.escape(missing)}; [01] s left "
        rf"\(set {TIMEOUT_VARIABLE} to wait longer\)$"
    )
    assert re.search(notice, shown, re.MULTILINE)


def test_a_first_rank_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, 3)
    assert said.startswith("rank 0 (host host-a) did not answer at 127.0.0.1:")
    assert (
        "within 1 s ([Errno 111] Connection refused); check its host, its log and the firewall"
        in said
    )


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        said = refusal(monkeypatch, 0)
    own = re.escape(
        f"port {port} of host {socket.gethostname()} is in use by process {os.getpid()} ("
    )
    assert re.match(
        rf"{own}.*; to end it: kill {os.getpid()}\); stop what uses it, or choose another: "
        rf"deepspeed --master_port",
        said,
    )


def test_a_leftover_rank_that_holds_the_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first rank whose peers never came, of a launch that nobody remembers."""
    ours = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "DS_ACCELERATOR": "cpu",
        TIMEOUT_VARIABLE: "300",
    }
    command = [sys.executable, "-c", RANK, "None", "leftover"]
    leftover = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT | ours)
    try:
        holder = until(lambda: listener(int(os.environ["MASTER_PORT"])))
        assert holder.number == leftover.pid
        said = refusal(monkeypatch, 0)
    finally:
        leftover.kill()
        leftover.wait()
    assert f"is in use by process {leftover.pid} ({sys.executable} -c" in said
    assert f"to end it: kill {leftover.pid}" in said
    assert listener(int(os.environ["MASTER_PORT"])) is None


@pytest.mark.parametrize("text", ["soon", "0", "-1", "1.5"])
def test_a_time_limit_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    assert f"{TIMEOUT_VARIABLE}='{text}' is not a whole number of seconds" in refusal(
        monkeypatch, 0
    )


def test_a_rank_alone_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "adopt_launch", lambda: Launch("python", 0, 1, 0))
    with gathered_ranks():
        pass


RANK = f"""
import os, sys
import torch.distributed as dist
from megagpt.cluster import rendezvous
rendezvous.command_of_launcher = lambda: eval(sys.argv[1])
with rendezvous.gathered_ranks():
    dist.init_process_group("gloo")
dist.barrier()
print(os.environ.get({COMMAND_VARIABLE!r}))
"""


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks of which the second alone can see the command that was typed."""
    monkeypatch.setenv(TIMEOUT_VARIABLE, "100")
    processes = []
    for rank, sees in ((0, None), (1, ["deepspeed", "--hostfile", "my hosts"])):
        ours = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, "-c", RANK, repr(sees)]
        environment = dict(rendezvous.os.environ) | ENVIRONMENT | ours
        processes.append(
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
            )
        )
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_all_learn_what_one_can_see_and_go_on_to_torchs_own_group(
    two_processes: list[subprocess.Popen[str]],
) -> None:
    answers = [process.communicate(timeout=100)[0].splitlines()[-1] for process in two_processes]
    assert answers == [shlex.join(["deepspeed", "--hostfile", "my hosts"])] * 2
    assert [process.returncode for process in two_processes] == [0, 0]
