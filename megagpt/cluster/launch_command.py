"""The command that started this rank, and the hosts that DeepSpeed's launcher was given.

On each host `deepspeed` runs one process (`deepspeed.launcher.launch`) that starts the ranks there.
On one host it is a child of `deepspeed`, on several it runs through pdsh and ssh. A rank learns of
the others only from these command lines.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from megagpt.cluster.hosts import Host
from megagpt.cluster.processes import Process, all_processes, ancestors, process

# the command that was typed, for ranks that cannot see it (`rendezvous.py`)
COMMAND_VARIABLE = "MEGAGPT_COMMAND"
NODE_LAUNCHER = "deepspeed.launcher.launch"
TYPED = ("deepspeed", "torchrun")
TORCH_RUN = ("-m", "torch.distributed.run")  # the long form of torchrun
SAME_LAUNCH = ("--world_info=", "--master_addr=", "--master_port=")


def command_of_launcher(process_id: int | None = None) -> list[str] | None:
    """Return the `deepspeed` or `torchrun` command that started this process, or None.

    It is an ancestor of this process or, across ssh, of the pdsh of the same launch. None if it
    runs on another machine.
    """
    lineage = _lineage(process_id)
    return (
        _typed_among(lineage)
        or ((pdsh := pdsh_of(lineage)) and _typed_among(ancestors(pdsh.number)))
        or None
    )


def hostfile_of_launcher(process_id: int | None = None) -> Path | None:
    """Return the --hostfile of the `deepspeed` command that started this process, or None.

    DeepSpeed reads it before any of our code runs. If it is missing, DeepSpeed warns and trains
    on this machine alone.
    """
    return hostfile_in(command_of_launcher(process_id) or [""])


def hostfile_in(command: Sequence[str]) -> Path | None:
    """Return the --hostfile of a `deepspeed` command; None without one and for other commands."""
    launcher, *words = command
    return _option(words, "--hostfile", "-H") if Path(launcher).name == "deepspeed" else None


def hosts_of_launcher(process_id: int | None = None) -> list[Host]:
    """Return the hosts of DeepSpeed's launcher, in the order of the ranks; empty without it."""
    node = node_launcher(_lineage(process_id))
    if node is None:
        return []
    (encoded,) = (word.partition("=")[2] for word in node.words if word.startswith("--world_info="))
    devices = json.loads(base64.urlsafe_b64decode(encoded))
    return [Host(name, len(slots)) for name, slots in devices.items()]


def launcher_number() -> int | None:
    """Return the number of DeepSpeed's process on this host, the same for all its ranks."""
    node = node_launcher(ancestors())
    return None if node is None else node.number


def hosts_without_session(process_id: int | None = None) -> list[str]:
    """Return the hosts of this launch whose ssh session has ended.

    Empty if the pdsh that opened the sessions runs on another machine. pdsh keeps one ssh child
    for each host, and continues with the others when one ends.
    """
    pdsh = pdsh_of(_lineage(process_id))
    if pdsh is None:
        return []
    sessions = [
        other for other in all_processes() if other.parent == pdsh.number and other.name == "ssh"
    ]
    reached = {word for session in sessions for word in session.words}
    return [
        host.name
        for host in hosts_of_launcher(process_id)
        if sessions and host.address not in reached
    ]


def node_launcher(lineage: Iterable[Process]) -> Process | None:
    """Return DeepSpeed's process of this host among a rank's ancestors, or None."""
    return next((member for member in lineage if NODE_LAUNCHER in member.words), None)


def pdsh_of(lineage: Iterable[Process]) -> Process | None:
    """Return the pdsh that started these processes by ssh, if it runs on this machine."""
    node = node_launcher(lineage)
    if node is None:
        return None
    launch = {word for word in node.words if word.startswith(SAME_LAUNCH)}
    return next(
        (other for other in all_processes() if other.name == "pdsh" and launch <= {*other.words}),
        None,
    )


def typed(member: Process) -> list[str] | None:
    """Return the command if a process is a launcher that users type, else None.

    A script's name follows that of its interpreter.
    """
    for position, word in enumerate(member.words[:2]):
        if (name := Path(word).name) in TYPED:
            return [name, *member.words[position + 1 :]]
    for position in range(1, len(member.words) - 1):
        if member.words[position : position + 2] == TORCH_RUN:
            return ["torchrun", *member.words[position + 2 :]]
    return None


def _typed_among(processes: Iterable[Process]) -> list[str] | None:
    return next((command for member in processes if (command := typed(member))), None)


def _lineage(process_id: int | None) -> list[Process]:
    """Return a process and its ancestors."""
    number = os.getpid() if process_id is None else process_id
    return [*filter(None, [process(number)]), *ancestors(number)]


def _option(words: list[str], *names: str) -> Path | None:
    for word, following in itertools.pairwise([*words, ""]):
        if word in names:
            return Path(following)
        if word.partition("=")[0] in names and "=" in word:
            return Path(word.partition("=")[2])
    return None
