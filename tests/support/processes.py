"""Training commands in processes of their own, to be stopped, killed and waited for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagpt.cluster import processes
from megagpt.monitoring.metrics import read_metrics
from tests import REPOSITORY
from tests.support.faults import VARIABLE
from tests.support.monitoring import ENVIRONMENT
from tests.support.ranks import free_port

PATIENCE_S = 150.0
PROGRAMS = Path(sys.executable).parent

Process = subprocess.Popen[str]
Start = Callable[..., list[Process]]


@contextmanager
def starter() -> Iterator[Start]:
    """Yields ``start(*words, ranks=1, launched=0, faults="", script=..., typed="", screen=None)``:
    the processes.

    ``launched`` ranks come from DeepSpeed's launcher, one process to us; ``ranks`` are started
    directly, one each. ``typed`` is a line for a shell in place of script and words; ``screen`` a
    file for all that would be shown, where only stderr comes in a pipe otherwise. Every process has
    a group of its own, which is killed in the end.
    """
    started: list[Process] = []

    def start(
        *words: object,
        ranks: int = 1,
        launched: int = 0,
        faults: str = "",
        script: object = "launch/train.py",
        typed: str = "",
        screen: Path | None = None,
    ) -> list[Process]:
        search = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
        environment = (
            os.environ | ENVIRONMENT | {"PATH": search, "DS_ACCELERATOR": "cpu", VARIABLE: faults}
        )
        train = "tests/support/train_with_faults.py" if faults else "launch/train.py"
        script, *words = (train if word == "launch/train.py" else word for word in (script, *words))
        port, command = str(free_port()), [sys.executable, str(script), *map(str, words)]
        if typed:
            command = ["sh", "-c", typed]
        if launched:
            launcher = [
                str(PROGRAMS / "deepspeed"),
                "--num_accelerators",
                str(launched),
                "--master_port",
                port,
            ]
            command = launcher + command[1:]
        of_all = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        places = [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        if launched or ranks == 1:
            places = [{}]
        new = [_open(command, environment | place, screen) for place in places]
        started.extend(new)
        return new

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _open(command: list[str], environment: dict[str, str], screen: Path | None) -> Process:
    with open(screen or os.devnull, "ab") as shown:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=shown,
            stderr=shown if screen else subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


def until(condition: Callable[[], Any]) -> Any:
    """What the condition yields, once that is something; polled, with patience."""
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.02)
    return found


def seconds_to_its_end(process: "subprocess.Popen[Any]") -> float:
    """How long a process takes from now to its end, without what it only waits for a core that
    others keep busy.

    The kernel counts that wait for the main thread (Documentation/scheduler/sched-stats.rst,
    /proc/<pid>/schedstat).
    """

    def waited_s() -> float:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9

    began, waited = time.monotonic(), waited_s()
    until(lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG))
    return time.monotonic() - began - (waited_s() - waited)


def import_s(*, queued: bool = False) -> float:
    """How long importing what a rank imports takes now; other work on the machine slows that and a
    rank alike.

    ``queued``: with its waits for a core, for comparison with a time that has such waits in it.
    """
    began = time.monotonic()
    importing = subprocess.Popen(
        [sys.executable, "-c", "import deepspeed"], stderr=subprocess.DEVNULL
    )
    net_s = seconds_to_its_end(importing)
    assert importing.wait() == 0
    return time.monotonic() - began if queued else net_s


def ranks_of(run: Path) -> list[processes.Process]:
    """The living processes of this machine whose command line names a run directory, launchers
    among them.
    """
    return [
        member
        for member in processes.all_processes()
        if str(run) in member.words and member.is_alive()
    ]


def until_it_trains(run: Path, of: Sequence[Process], steps: int = 3) -> None:
    """Wait for the first steps of a run; a process that has ended before them says why."""
    until(lambda: steps_on_record(run) >= steps or any(p.poll() is not None for p in of))
    if steps_on_record(run) < steps:
        ended = next(p for p in of if p.poll() is not None)
        raise AssertionError(f"ended: {ended.stderr.read() if ended.stderr else ended.returncode}")


def steps_on_record(run: Path) -> int:
    """The logged steps of a run that may not have begun."""
    return len(read_metrics(run).steps) if (run / "metrics.jsonl").exists() else 0
