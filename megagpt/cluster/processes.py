"""The processes of this machine, from /proc: parents and command lines.

Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LISTENS = "0A"  # TCP_LISTEN of include/net/tcp_states.h


@dataclass(frozen=True)
class Process:
    """One process; number and start time distinguish it from a later one with the same number."""

    number: int
    parent: int
    started: int  # clock ticks since the machine started
    words: tuple[str, ...]  # its command line

    @property
    def name(self) -> str:
        """The program's name without directory; `sshd` for a daemon's title `sshd: root@pts/0`."""
        return Path(self.words[0].split(":")[0]).name if self.words else ""

    def is_alive(self) -> bool:
        """Return whether it still runs; a zombie does not."""
        try:
            state, _, started = _status(self.number)
        except OSError:
            return False
        return started == self.started and state not in "ZX"


def process(number: int) -> Process | None:
    """Return the process with this number; None if there is none, or no /proc."""
    try:
        words = (
            (PROC / str(number) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        )
        _, parent, started = _status(number)
    except OSError:
        return None
    return Process(number, parent, started, tuple(words))


def ancestors(number: int | None = None) -> Iterator[Process]:
    """Yield the parent of a process (default: this one), its parent, and so on."""
    own = process(os.getpid() if number is None else number)
    while own is not None and own.parent > 0:
        own = process(own.parent)
        if own is not None:
            yield own


def all_processes() -> Iterator[Process]:
    """Yield every process that can be seen."""
    try:
        numbers = [int(path.name) for path in PROC.iterdir() if path.name.isdecimal()]
    except OSError:
        return
    for number in numbers:
        if (found := process(number)) is not None:
            yield found


def listener(port: int) -> Process | None:
    """Return the process that listens on a TCP port of this machine, if this user may see it."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    return (
        next((member for member in all_processes() if sockets & _open_files(member)), None)
        if sockets
        else None
    )


def _listening(port: int) -> Iterator[str]:
    """Yield the inodes of the sockets that listen on a port (proc_pid_net(5)).

    Address, state and inode are words 1, 3 and 9.
    """
    for table in ("tcp", "tcp6"):
        try:
            lines = (PROC / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for words in map(str.split, lines):
            if words[3] == LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                yield words[9]


def _open_files(member: Process) -> set[str]:
    """Return the targets of a process's open files; empty if it is another user's."""
    found = set()
    with suppress(OSError):
        for link in (PROC / str(member.number) / "fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found.add(os.readlink(link))
    return found


def _status(number: int) -> tuple[str, int, int]:
    """Return state, parent and start time: fields 3, 4 and 22 of proc_pid_stat(5).

    The name before them may contain blanks.
    """
    fields = (PROC / str(number) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])
