"""Starts a training command and restarts it after a crash; it resumes from its newest checkpoint.

How a run ended is read from its end record: DeepSpeed's launcher changes exit codes, and a killed
run leaves no record. What is not a crash (done, bad input, pre-empted, stopped by a guard) is never
restarted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import FrameType

from megagpt.cluster.hosts import read_hostfile
from megagpt.cluster.launch_command import hostfile_in
from megagpt.cluster.processes import PROC, all_processes
from megagpt.common.arguments import (
    CommandParser,
    add_config_option,
    add_launcher_options,
    user_path,
)
from megagpt.monitoring.metrics import METRICS_FILE, Line, MetricsFile, plain, read_metrics
from megagpt.rundir.directory import directory_of_run
from megagpt.rundir.end_record import END_FILE, ENDED_AT_ONCE, FAILED, EndRecord
from megagpt.rundir.signals import StopRequest
from megagpt.utils import ExitCode, UserError, human_duration

FIRST_BACK_OFF_S = 1.0
LONGEST_BACK_OFF_S = 60.0
LEFTOVERS_MAY_TAKE_S = 35.0  # DeepSpeed's launcher gives each rank 30 s to end
NOT_A_CRASH = (
    ExitCode.DONE,
    ExitCode.BAD_INPUT,
    ExitCode.PREEMPTED_AND_SAVED,
    ExitCode.STOPPED_BY_GUARD,
)
ANY_STEP = sys.maxsize
MARK = "MEGAGPT_SUPERVISOR"
MOST_CHARACTERS = 160  # of a record's detail
# Errors of gloo, NCCL and torch's store on a rank whose peer was killed.
PEER_HAS_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|remote process exited|connection was likely closed",
    re.IGNORECASE,
)
CRASHES_IN_A_PLACE = 2
KILLS_IN_A_PLACE = 3


@dataclass(frozen=True)
class Ending:
    """How one attempt ended.

    ``step`` is the last step (None: it never trained), ``checkpoint`` the newest checkpoint ("" for
    none). ``killed``: the run has not recorded what was wrong, or only that a peer was gone.
    """

    code: int
    step: int | None
    checkpoint: str
    reason: str
    final: bool
    killed: bool = False

    @property
    def place(self) -> tuple[int | None, str]:
        return self.step, self.checkpoint

    @property
    def most_in_a_place(self) -> int:
        """After so many ends at the same place, another start would end there too.

        The step of a killed run is known only from its last logged line, and whoever kills (a
        scheduler, a host that goes down) does not look at steps: two kills may well fall between
        the same two lines. But the kernel's kill of a process that needs too much memory looks the
        same, so kills are limited too.
        """
        return KILLS_IN_A_PLACE if self.killed else CRASHES_IN_A_PLACE


def run_directory_of(command: Sequence[str]) -> Path:
    """Return the run directory that a training command will use."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run_dir", type=user_path)
    add_config_option(parser)
    add_launcher_options(parser)
    known, _ = parser.parse_known_args(command)
    return directory_of_run(known.run_dir, known.deepspeed_config)


class Supervisor:
    """One command under supervision; ``run`` returns the exit code of the whole."""

    def __init__(self, command: Sequence[str], restarts: int) -> None:
        self.command = list(command)
        self.restarts = restarts
        self.directory = run_directory_of(command)
        self.crashes: list[Ending] = []
        self.mark = f"{os.getpid()}-{time.time_ns()}"  # marks every process it starts
        self.running = False
        self.asked_to_stop = threading.Event()

    def run(self) -> int:
        """Start the command, and restart it as long as that can help; return the exit code.

        Raise UserError if it cannot be started at all.
        """
        started_s = time.monotonic()
        first_step = last_step(self.directory)
        self._forward_signals()
        while True:
            ending = self._attempt()
            if (why_not := self._why_not_again(ending)) is not None:
                break
            self._record_restart(ending)
            self.crashes.append(ending)
            if self.asked_to_stop.wait(self._back_off_s()):
                why_not = f"{ending.reason}, and it was asked to stop before it started again"
                break
        self._report(ending, why_not, time.monotonic() - started_s, first_step)
        return ending.code

    # ---------------------------------------------------------------------------------- one attempt

    def _attempt(self) -> Ending:
        """Run the command once, until everything that it started has ended."""
        record_before = stamp(self.directory / END_FILE)
        metrics_before = stamp(self.directory / METRICS_FILE)
        try:
            process = subprocess.Popen(
                self.command, start_new_session=True, env=os.environ | {MARK: self.mark}
            )
        except OSError as error:
            raise UserError(
                f"{self.command[0]}: cannot be started ({error.strerror}); source "
                f".venv/bin/activate, or give its path"
            ) from error
        self.running = True
        if self.asked_to_stop.is_set():  # the signal came before ``running`` was set
            self._forward_stop()
        code = process.wait()
        self._end_leftovers()
        self.running = False
        record = (
            EndRecord.read(self.directory)
            if stamp(self.directory / END_FILE) != record_before
            else None
        )
        return self._ending(
            code, record, trained=stamp(self.directory / METRICS_FILE) != metrics_before
        )

    def _end_leftovers(self) -> None:
        """Wait for the ranks, which outlive a killed launcher, and kill those that take too long.

        Ranks that save on request may take their time.
        """
        end = time.monotonic() + LEFTOVERS_MAY_TAKE_S
        time.sleep(0.1)  # a process that was just started does not have its environment yet
        while any(members(self.mark)):
            if time.monotonic() > end and not self.asked_to_stop.is_set():
                self._signal_all(signal.SIGKILL)
            time.sleep(0.1)

    def _ending(self, code: int, record: EndRecord | None, *, trained: bool) -> Ending:
        step = last_step(self.directory) if trained else None
        checkpoint = newest_checkpoint(self.directory)
        if record is not None:
            detail = (
                f": {textwrap.shorten(record.detail, MOST_CHARACTERS)}" if record.detail else ""
            )
            # The launcher crashed, and the run saved because of that.
            orphaned = record.detail == StopRequest.ORPHANED.name
            final = (
                record.exit_code in NOT_A_CRASH and not orphaned
            ) or record.reason == ENDED_AT_ONCE
            killed = record.reason == FAILED and PEER_HAS_GONE.search(record.detail) is not None
            return Ending(
                record.exit_code, record.step, checkpoint, f"{record.reason}{detail}", final, killed
            )
        if code in NOT_A_CRASH and code != ExitCode.DONE:  # a killed launcher may exit with 0 too
            return Ending(code, step, checkpoint, f"exit code {code}", final=True)
        reason = (
            f"killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exit code {code}, no end record"
        )
        return Ending(
            ExitCode.FAILED, step, checkpoint, reason, final=False, killed=code != ExitCode.FAILED
        )

    # ----------------------------------------------------------------------------- between attempts

    def _why_not_again(self, ending: Ending) -> str | None:
        """Return why the command is not restarted, or None if it is."""
        if ending.final:
            return ending.reason
        if self.asked_to_stop.is_set():
            return f"{ending.reason}, after it was asked to stop"
        in_this_place = takewhile(lambda crash: crash.place == ending.place, reversed(self.crashes))
        here = 1 + sum(crash.killed == ending.killed for crash in in_this_place)
        if here >= ending.most_in_a_place:
            return (
                f"{ending.reason}; {here} times after step {ending.step}, without a new checkpoint"
            )
        if len(self.crashes) == self.restarts:
            return f"{ending.reason}; {self.restarts} restarts are used up"
        return None

    def _back_off_s(self) -> float:
        """Return the pause before a restart, longer each time a start made no new checkpoint."""
        in_vain = 0
        for earlier, later in zip(self.crashes[-2::-1], self.crashes[:0:-1], strict=True):
            if earlier.checkpoint != later.checkpoint:
                break
            in_vain += 1
        return min(FIRST_BACK_OFF_S * 2**in_vain, LONGEST_BACK_OFF_S)

    def _record_restart(self, ending: Ending) -> None:
        number = len(self.crashes) + 1
        print(
            f"supervise: {ending.reason}; restart {number} of {self.restarts}, from "
            f"{ending.checkpoint or 'the start'}",
            file=sys.stderr,
            flush=True,
        )
        # The resumed run keeps the lines of the record up to this step.
        step = int(ending.checkpoint.rpartition("_")[2] or 0)
        self._write(
            {
                "event": "restart",
                "step": step,
                "crashed_after_step": ending.step,
                "reason": ending.reason,
            }
        )

    def _report(self, ending: Ending, why: str, wall_s: float, first_step: int) -> None:
        """Record and print how much of the time went into steps that count."""
        if not (self.directory / METRICS_FILE).exists():
            return
        history = read_metrics(self.directory)
        productive_s = history.time_in_steps_s(first_step)
        line = {
            "event": "supervise",
            "step": history.steps[-1].step if history.steps else 0,
            "outcome": why,
            "restarts": len(self.crashes),
            "wall_s": wall_s,
            "productive_s": productive_s,
            "effective_training_time_ratio": productive_s / wall_s,
        }
        self._write(line)
        print(
            f"supervise: {why}; {len(self.crashes)} restarts, {productive_s / wall_s:.1%} of "
            f"{human_duration(wall_s)} in steps that count",
            file=sys.stderr,
            flush=True,
        )

    def _write(self, line: Line) -> None:
        """Append to the run's record, which no rank has open at this point."""
        if self.directory.is_dir():
            metrics = MetricsFile(self.directory, start_step=ANY_STEP)
            metrics.write(plain(line))
            metrics.close()

    # -------------------------------------------------------------------------------------- signals

    def _forward_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward_stop)
        signal.signal(signal.SIGUSR1, self._forward_save)

    def _forward_stop(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Ask the ranks of this host to stop; if none listens yet, signal all processes.

        A launcher would end on the signal and leave the ranks less time.
        """
        self.asked_to_stop.set()
        if self.running and not self._signal_ranks(signal.SIGTERM):
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in members(self.mark):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(process, number)

    def _forward_save(self, number: int, frame: FrameType | None) -> None:
        self._signal_ranks(signal.SIGUSR1)

    def _signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to the ranks of this host; return whether there is one.

        Ranks are the processes that handle SIGUSR1, which would end any other process.
        """
        ranks = [process for process in members(self.mark) if handles(process, signal.SIGUSR1)]
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, number)
        return bool(ranks)


def stamp(path: Path) -> tuple[int, int] | None:
    """Return a value that changes whenever the file is written."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def newest_checkpoint(directory: Path) -> str:
    """Return the name of the newest committed checkpoint, or an empty string."""
    names = (path.name for path in (directory / "checkpoints").glob("step_*"))
    return max((name for name in names if name.removeprefix("step_").isdecimal()), default="")


def last_step(directory: Path) -> int:
    """Return the last recorded step, or 0."""
    if not (directory / METRICS_FILE).exists():
        return 0
    steps = read_metrics(directory).steps
    return steps[-1].step if steps else 0


def members(mark: str) -> Iterator[int]:
    """Yield the living processes of this host that have a mark in their environment.

    It finds them whoever started them: torchrun's ranks have sessions of their own, and outlive a
    killed torchrun.
    """
    marked = f"{MARK}={mark}".encode()
    for process in all_processes():
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if (
                marked in (PROC / str(process.number) / "environ").read_bytes().split(b"\0")
                and process.is_alive()
            ):
                yield process.number


def handles(process: int, number: signal.Signals) -> bool:
    """Return whether a process has its own handler for a signal."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def supervise(command: Sequence[str], restarts: int) -> int:
    """Run a training command, restarted after at most ``restarts`` crashes.

    Return an exit code.
    """
    if not command:
        raise UserError(
            "supervise: no command given; for example: python launch/supervise.py --restarts 5 -- "
            "deepspeed launch/train.py"
        )
    if (hostfile := hostfile_in(command)) is not None:
        read_hostfile(hostfile)  # check it here: DeepSpeed passes its content to ssh unchecked
    print(f"supervise: {shlex.join(command)}", file=sys.stderr, flush=True)
    return Supervisor(command, restarts).run()
