"""The command above a rank: found among its ancestors, across ssh too, and what it says of hosts
and hostfiles.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.cluster import launch_command
from megagpt.cluster.hosts import Host
from megagpt.cluster.launch_command import command_of_launcher, hostfile_of_launcher, typed
from megagpt.cluster.processes import Process
from tests import REPOSITORY

WORLD = base64.urlsafe_b64encode(json.dumps({"host-a": [0, 1], "host-b": [0, 1]}).encode()).decode()
LAUNCH = [
    f"--world_info={WORLD}",
    "--node_rank=1",
    "--master_addr=192.0.2.1",
    "--master_port=29500",
]
RANK = """
from megagpt.cluster import launch_command as found
print(found.hostfile_of_launcher(), found.command_of_launcher(), sep=chr(10))
print(found.hosts_of_launcher())
"""
PARENT = "import subprocess, sys; subprocess.run(eval(sys.argv[1]), check=True)"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--hostfile", "my hosts"], "my hosts"),
        (["--hostfile=hosts"], "hosts"),
        (["-H", "hosts", "launch/train.py"], "hosts"),
        (["launch/train.py"], "None"),
    ],
)
def test_a_rank_finds_the_hostfile_of_the_command_that_started_it(
    tmp_path: Path, options: list[str], found: str
) -> None:
    """Two processes below it, as DeepSpeed's launcher has one between the command and the ranks."""
    (tmp_path / "deepspeed").write_text(
        "import subprocess, sys\n"
        f"node = [sys.executable, '-c', {PARENT!r}, repr([sys.executable, '-c', {RANK!r}]), "
        f"*{LAUNCH!r}]\n"
        f"subprocess.run([*node, '-m', {launch_command.NODE_LAUNCHER!r}], check=True)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "deepspeed", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        found,
        str(["deepspeed", *options]),
        str([Host("host-a", 2), Host("host-b", 2)]),
    ]


def test_without_a_launcher_there_is_nothing_to_find() -> None:
    assert hostfile_of_launcher(1) is None
    assert command_of_launcher(1) is None
    assert launch_command.hosts_of_launcher(1) == []


def member(number: int, parent: int, *words: str) -> Process:
    return Process(number, parent, started=0, words=words)


DEEPSPEED = member(
    10, 1, "python3", "/venv/bin/deepspeed", "--hostfile", "hosts", "launch/train.py"
)
PDSH = member(11, 10, "pdsh", "-S", "-w", "host-a,host-b", "cd /work;", *LAUNCH, "launch/train.py")
OTHERS_PDSH = member(
    12, 1, "pdsh", "-S", "-w", "c", "cd /work;", "--world_info=e30=", *LAUNCH[2:], "launch/train.py"
)
NODE = member(
    21, 20, "python3", "-u", "-m", launch_command.NODE_LAUNCHER, *LAUNCH, "launch/train.py"
)
SSHD = member(19, 1, "sshd: root@notty")
SHELL = member(20, 19, "bash", "-c", "cd /work; python3 ...")


@pytest.mark.parametrize(
    ("here", "found"), [([OTHERS_PDSH, PDSH], typed(DEEPSPEED)), ([OTHERS_PDSH], None)]
)
def test_across_ssh_the_command_is_seen_where_its_pdsh_runs(
    monkeypatch: pytest.MonkeyPatch, here: list[Process], found: list[str] | None
) -> None:
    """Of the launches on this machine, the one that started this rank counts."""
    lineages = {
        PDSH.number: [DEEPSPEED],
        OTHERS_PDSH.number: [member(9, 1, "python3", "/bin/deepspeed", "other.py")],
    }
    monkeypatch.setattr(launch_command, "_lineage", lambda number: [NODE, SHELL, SSHD])
    monkeypatch.setattr(launch_command, "all_processes", lambda: here)
    monkeypatch.setattr(launch_command, "ancestors", lineages.__getitem__)
    assert command_of_launcher() == found
    assert hostfile_of_launcher() == (Path("hosts") if found else None)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (
            ["python3", "/venv/bin/deepspeed", "-H", "hosts", "x.py"],
            ["deepspeed", "-H", "hosts", "x.py"],
        ),
        (["/venv/bin/torchrun", "x.py"], ["torchrun", "x.py"]),
        (
            ["python3", "-m", "torch.distributed.run", "--nnodes", "2", "x.py"],
            ["torchrun", "--nnodes", "2", "x.py"],
        ),
        (["vim", "notes", "deepspeed"], None),
        ([], None),
    ],
)
def test_launchers_are_told_from_other_programs(
    words: list[str], command: list[str] | None
) -> None:
    assert typed(member(1, 0, *words)) == command
