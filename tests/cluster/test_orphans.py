"""A rank ends with its launcher: kill any process between it and the command, and it goes within
seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.cluster.launch_command import NODE_LAUNCHER
from megagpt.cluster.orphans import INTERVAL_S, launcher_processes
from megagpt.cluster.processes import Process, process
from megagpt.utils import ExitCode
from tests import REPOSITORY

DEADLINE_S = 20.0  # of the test, on a busy machine; the watch looks every second
RANK = """
import os, sys, time
from megagpt.cluster.orphans import end_with_launcher
end_with_launcher(*eval(sys.argv[1]))
open(sys.argv[2], "w").write(str(os.getpid()))
time.sleep(600)
"""
# Runs the command in its first word and leaves its exit code in the file that its second names.
PARENT = """
import subprocess, sys
code = subprocess.run(eval(sys.argv[1])).returncode
open(sys.argv[2], "a").write(str(code))
"""


class Launch:
    """A rank below `shell > deepspeed > node launcher`, as DeepSpeed starts it on one machine."""

    def __init__(self, directory: Path, watch: str = "()", command: str = "deepspeed") -> None:
        self.directory = directory
        (directory / command).write_text(PARENT)
        rank = [sys.executable, "-c", RANK, watch, str(directory / "rank")]
        node = [sys.executable, "-c", PARENT, repr(rank), str(directory / "code"), NODE_LAUNCHER]
        typed = [sys.executable, str(directory / command), repr(node), "/dev/null"]
        shell = [sys.executable, "-c", PARENT, repr(typed), "/dev/null"]
        with (directory / "output").open("w") as output:
            self.shell = subprocess.Popen(shell, cwd=REPOSITORY, stdout=output, stderr=output)
        number = int(
            wait_for(lambda: (directory / "rank").exists() and (directory / "rank").read_text())
        )
        found = process(number)
        assert found is not None
        self.rank = found
        self.chain = [found, *self._above(found)]

    def _above(self, below: Process) -> Iterator[Process]:
        while below.number != self.shell.pid:
            above = process(below.parent)
            assert above is not None
            yield above
            below = above

    def end(self) -> None:
        for member in self.chain:
            if member.is_alive():
                os.kill(member.number, signal.SIGKILL)
        self.shell.wait()


def wait_for(condition):  # type: ignore[no-untyped-def]  # whatever the condition returns
    end = time.monotonic() + DEADLINE_S
    while not (result := condition()):
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.05)
    return result


def code_in(directory: Path) -> list[str]:
    """What the launcher has written, once it has."""
    wait_for(lambda: (directory / "code").exists() and (directory / "code").read_text())
    return (directory / "code").read_text().split()


@pytest.mark.parametrize(("position", "name"), [(1, "node launcher"), (2, "deepspeed")])
def test_a_rank_ends_with_every_process_of_its_launcher(
    tmp_path: Path, position: int, name: str
) -> None:
    launch = Launch(tmp_path)
    try:
        os.kill(launch.chain[position].number, signal.SIGKILL)
        wait_for(lambda: not launch.rank.is_alive())
        assert (
            f"the launcher has died (process {launch.chain[position].number}, "
            in (tmp_path / "output").read_text()
        )
        if name == "deepspeed":  # the node launcher is alive, and is told of it
            assert code_in(tmp_path) == [str(int(ExitCode.FAILED))]
    finally:
        launch.end()


def test_a_rank_outlives_the_shell_of_its_launcher(tmp_path: Path) -> None:
    """`nohup deepspeed ... &`, and the terminal is closed: nobody wants the run to end with it."""
    launch = Launch(tmp_path)
    try:
        launch.shell.kill()
        launch.shell.wait()
        time.sleep(3 * INTERVAL_S)
        assert launch.rank.is_alive()
    finally:
        launch.end()


def test_a_rank_may_be_asked_to_save_first(tmp_path: Path) -> None:
    ask = f"(lambda: (open({str(tmp_path / 'saved')!r}, 'w').close(), os._exit(3)),)"
    launch = Launch(tmp_path, watch=ask)
    try:
        os.kill(launch.chain[2].number, signal.SIGKILL)
        wait_for(lambda: not launch.rank.is_alive())
        assert (tmp_path / "saved").exists()
        assert code_in(tmp_path) == ["3"]
    finally:
        launch.end()


def named(*words: str) -> Process:
    return Process(len(words), 1, 0, words)


TORCHRUN = named("python3", "/venv/bin/torchrun", "launch/train.py")
DEEPSPEED = named("python3", "/venv/bin/deepspeed", "launch/train.py")
NODE = named("python3", "-u", "-m", NODE_LAUNCHER, "launch/train.py")
SHELL, SSHD, INIT = (
    named("bash", "-c", "cd /work; ..."),
    named("sshd: root@notty"),
    named("/sbin/init"),
)
STEP = named("slurmstepd: [4711.0]")


@pytest.mark.parametrize(
    ("lineage", "watched"),
    [
        (
            [NODE, DEEPSPEED, SHELL, SSHD, INIT],
            2,
        ),  # on one machine, typed in a session that may end
        ([NODE, SHELL, SSHD, INIT], 3),  # through pdsh
        ([SHELL, NODE, SHELL, SSHD, INIT], 4),  # with a wrapper round the rank
        ([NODE, INIT], 1),
        ([TORCHRUN, SHELL, INIT], 1),
        ([TORCHRUN, STEP, INIT], 1),
        ([STEP, INIT], 1),
        ([SHELL, SSHD, INIT], 0),  # python launch/train.py
        ([], 0),
    ],
)
def test_which_ancestors_belong_to_the_launch(lineage: list[Process], watched: int) -> None:
    assert launcher_processes(lineage) == lineage[:watched]
