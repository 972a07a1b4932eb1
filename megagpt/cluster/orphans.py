"""End a rank when its launcher has died; otherwise it would keep its GPU and its run's lock.

DeepSpeed's and torch's launchers start ranks as ordinary processes, which outlive a launcher that
was killed. Through pdsh they also outlive a lost ssh session. (Linux can signal a process when its
parent dies, but not when its grandparent, pdsh or ssh session does.)
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable

from megagpt.cluster.launch_command import NODE_LAUNCHER, pdsh_of, typed
from megagpt.cluster.processes import Process, ancestors
from megagpt.utils import ExitCode

INTERVAL_S = 1.0
FAREWELL_S = 2.0  # limit for writing the last log line: the log or its reader may hang
GRACE_S = 25.0  # for a rank that was asked to save; DeepSpeed's launcher waits 30 s

log = logging.getLogger(__name__)


def end_with_launcher(ask_to_stop: Callable[[], None] | None = None) -> None:
    """End this rank (exit code 1) within about a second after its launcher dies.

    ``ask_to_stop`` is called first, in a thread of its own, and the rank has GRACE_S to end by
    itself. Its last checkpoint stays valid: an interrupted save is never committed. Without a
    launcher, as in `python launch/train.py`, this does nothing.
    """
    launcher = launcher_processes([*ancestors()])
    if launcher:
        threading.Thread(
            target=_watch, args=(launcher, ask_to_stop), name="launcher watch", daemon=True
        ).start()


def launcher_processes(lineage: list[Process]) -> list[Process]:
    """Return a rank's ancestors, nearest first, whose death ends the rank.

    The last one is the command that was typed (its parent, for example a shell, may end) or, on
    a host reached by ssh, the session. pdsh and the command above it are included if they run
    on this machine.
    """
    last = 0
    across_ssh = False
    for position, process in enumerate(lineage, start=1):
        if typed(process) is not None or process.name.startswith("slurmstepd"):
            return lineage[:position]
        if NODE_LAUNCHER in process.words:
            last = position
            across_ssh = True
        elif across_ssh and process.name.startswith("sshd"):
            return lineage[:position] + _launcher_beyond_ssh(lineage)
    return lineage[:last]


def _launcher_beyond_ssh(lineage: list[Process]) -> list[Process]:
    """Return the pdsh that opened the session and the `deepspeed` above it, if on this machine."""
    pdsh = pdsh_of(lineage)
    if pdsh is None:
        return []
    above = [*ancestors(pdsh.number)]
    command = next(
        (position for position, process in enumerate(above, start=1) if typed(process)), 0
    )
    return [pdsh, *above[:command]]


def _watch(launcher: Iterable[Process], ask_to_stop: Callable[[], None] | None) -> None:
    """Wait until any of these processes dies, then end this one."""
    while all(process.is_alive() for process in launcher):
        time.sleep(INTERVAL_S)
    dead = next(process for process in launcher if not process.is_alive())
    if ask_to_stop is not None:
        ask_to_stop()
        log.critical(
            "the launcher has died (process %d, %s): saving, then this rank ends",
            dead.number,
            dead.name,
        )
        time.sleep(GRACE_S)
    threading.Timer(FAREWELL_S, os._exit, (ExitCode.FAILED,)).start()
    log.critical("the launcher has died (process %d, %s): this rank ends", dead.number, dead.name)
    os._exit(ExitCode.FAILED)
