"""Run one command in a process group of its own, with a time limit. No torch."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PAUSE_S = 0.05


@dataclass(frozen=True)
class Ended:
    """How the process ended.

    ``code`` is subprocess's return code (-9: killed by signal 9). ``killed``: at the limit, by us.
    """

    code: int
    seconds: float
    killed: bool


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    log: IO[bytes],
    limit_s: float,
) -> Ended:
    """Run to its end or to the limit, then kill what is left of its process group.

    This holds also if the caller is interrupted.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=dict(environment),
        cwd=folder,
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    killed = False
    try:
        while not _has_ended(process.pid):
            if time.monotonic() - began > limit_s:
                killed = True
                break
            time.sleep(PAUSE_S)
    finally:
        # Kill before the wait: until then no other process can have its id, which is the group's.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return Ended(code, time.monotonic() - began, killed)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
