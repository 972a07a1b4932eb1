"""Ends a run that hangs and says where: a thread on every rank, independent of the main thread.

The loop says what it begins. Now and then the thread writes that, with the main thread's stack,
into a file that the other ranks can read when this rank no longer answers:

    runs/NAME/logs/watch/rank_00001.json    the step, the activity, the module or collective
    runs/NAME/logs/watch/alarm              made by the first rank whose step takes too long
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from megagpt.health.flight_recorder import GroupState, group_states
from megagpt.utils import REPOSITORY, ExitCode

log = logging.getLogger(__name__)

COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
OWN = str(REPOSITORY / "megagpt")
MODULE_CALLS = ("forward", "_call_impl")
MOST_FRAMES = 40
LISTS = ("members", "peers")  # of a GroupState, tuples here and lists in JSON
# One activity of the start may take minutes: compiling an op, reading a checkpoint.
START_S = 900.0


@dataclass
class Pulse:
    """What the main thread is doing; the loop sets it, the watch reads it."""

    step: int = 0
    doing: str = "starting"
    since_s: float = 0.0

    def beat(self, doing: str, step: int | None = None) -> None:
        """Begin another activity."""
        self.step = self.step if step is None else step
        self.doing = doing
        self.since_s = time.monotonic()


@dataclass(frozen=True)
class RankState:
    """A rank's own report of where it is.

    ``silent_s`` is the report's age in seconds if the rank does not answer now.
    """

    rank: int
    name: str
    step: int
    doing: str
    for_s: float
    module: str | None
    collective: str | None
    place: str
    stack: tuple[str, ...]
    final: bool = False
    silent_s: float | None = None
    groups: tuple[GroupState, ...] = ()  # only in the final state, if torch records operations

    @property
    def whereabouts(self) -> tuple[Any, ...]:
        """Equal for ranks that are at the same point."""
        return (
            self.step,
            self.doing,
            self.module,
            self.collective,
            self.place,
            self.silent_s is None,
        )


class Watch:
    """The thread of one rank; it runs while the context is entered.

    If a step takes longer than ``timeout_s``, or an activity of the start longer than that and
    ``START_S``, one rank calls ``report(states of all ranks, the seconds)``, and every rank then
    ends itself with exit code 1.
    """

    def __init__(
        self,
        directory: Path,
        pulse: Pulse,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        report: Callable[[list[RankState], float], None],
    ) -> None:
        self.directory = directory / "logs" / "watch"
        self.pulse = pulse
        self.rank = rank
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.report = report
        self.name = f"rank {rank}"
        self.module_names = dict[int, str]()
        # A hang is seen one tick late and reported ``_patience_s`` later: within 5 s.
        self.tick_s = min(1.0, max(0.1, timeout_s / 50))
        self.write_every_s = min(30.0, max(self.tick_s, timeout_s / 20))
        self._main_thread = threading.main_thread().ident or 0
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        if self.timeout_s:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.pulse.beat("starting")
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
            threading.Thread(target=self._insist, name="watch of the clock", daemon=True).start()
        return self

    def know(self, name: str, module_names: Mapping[int, str]) -> None:
        """Set this rank's name and the names of modules by their ids, once there is an engine."""
        self.name = name
        self.module_names = dict(module_names)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        if self.timeout_s:
            self._thread.join()

    def _run(self) -> None:
        ticked_s = written_s = 0.0
        while not self._closing.wait(self.tick_s):
            now_s = time.monotonic()
            if ticked_s and now_s - ticked_s > 5 + 5 * self.tick_s:
                # The whole process was stopped (SIGSTOP, a debugger); that time does not count.
                self.pulse.since_s = now_s
            ticked_s = now_s
            if now_s - self.pulse.since_s > self.limit_s or self._alarm.exists():
                self._end_the_run()
            if now_s - written_s > self.write_every_s:
                written_s = now_s
                self._write(self._own_state())

    def _insist(self) -> None:
        """End this rank if its watch cannot.

        The shared disk may have gone with the network, and then every read or write there blocks
        for ever.
        """
        overdue_s = 0.0
        while not self._closing.wait(self.tick_s):
            overdue = time.monotonic() - self.pulse.since_s > self.limit_s
            overdue_s = overdue_s + self.tick_s if overdue else 0.0
            if overdue_s > 4 * self._patience_s:
                os._exit(ExitCode.FAILED)

    @property
    def limit_s(self) -> float:
        """How long the present step, or the present activity of the start, may take."""
        return self.timeout_s if self.pulse.step else max(self.timeout_s, START_S)

    @property
    def _alarm(self) -> Path:
        return self.directory / "alarm"

    def _end_the_run(self) -> None:
        """Write where this rank is, and end it.

        The rank that raised the alarm first waits for the others to write, and reports.
        """
        self._write(replace(self._own_state(), final=True, groups=group_states()))
        try:
            with self._alarm.open("x") as file:
                file.write(f"rank {self.rank}\n")
        except FileExistsError:
            self._wait_until(self._reported.exists)
        except OSError as error:
            log.warning("the hang alarm was not written: %s", error)
        else:
            self._wait_until(lambda: all(state.final for state in self._states()))
            self.report(self._states(), self.limit_s)
            self._reported.touch()
        os._exit(ExitCode.FAILED)

    @property
    def _patience_s(self) -> float:
        return 2 + self.tick_s

    @property
    def _reported(self) -> Path:
        return self.directory / "reported"

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a short time at most: the rank that is waited for may be the one that hangs."""
        end = time.monotonic() + self._patience_s
        while time.monotonic() < end and not condition():
            time.sleep(self.tick_s / 4)

    def _states(self) -> list[RankState]:
        """Return what every rank has written last; ranks that do not answer are marked."""
        now = self._file(self.rank).stat().st_mtime  # the clock of the disk that all ranks share
        return [self._state(rank, now) for rank in range(self.world_size)]

    def _state(self, rank: int, now: float) -> RankState:
        path = self._file(rank)
        try:
            found = json.loads(path.read_text())
            groups = tuple(
                GroupState(**group | {k: tuple(group[k]) for k in LISTS})
                for group in found["groups"]
            )
            state = RankState(**found | {"stack": tuple(found["stack"]), "groups": groups})
            return (
                state
                if state.final
                else replace(state, silent_s=max(0.0, now - path.stat().st_mtime))
            )
        except (OSError, ValueError, TypeError, KeyError):
            return RankState(
                rank, f"rank {rank}", 0, "unknown", 0.0, None, None, "no heartbeat was written", ()
            )

    def _file(self, rank: int) -> Path:
        return self.directory / f"rank_{rank:05d}.json"

    def _write(self, state: RankState) -> None:
        aside = self._file(self.rank).with_suffix(".partial")
        try:
            aside.write_text(json.dumps(asdict(state), indent=1))
            aside.replace(self._file(self.rank))
        except OSError as error:  # a full disk
            log.warning("%s: %s", aside, error)

    def _own_state(self) -> RankState:
        frames = frames_of(sys._current_frames().get(self._main_thread))
        return RankState(
            rank=self.rank,
            name=self.name,
            step=self.pulse.step,
            doing=self.pulse.doing,
            for_s=round(time.monotonic() - self.pulse.since_s, 1),
            module=innermost_module(frames, self.module_names),
            collective=innermost_collective(frames),
            place=next(
                (shown(frame) for frame in frames if frame.f_code.co_filename.startswith(OWN)),
                "unknown",
            ),
            stack=tuple(shown(frame) for frame in frames[:MOST_FRAMES]),
        )


def frames_of(frame: FrameType | None) -> list[FrameType]:
    """Return the stack, innermost first."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def innermost_collective(frames: list[FrameType]) -> str | None:
    """Return the function of torch.distributed that the main thread is in, or None.

    A wait for another rank outside such a function is named after its caller.
    """
    called = [frame for frame in frames if frame.f_code.co_filename.endswith(COLLECTIVES)]
    public = [frame.f_code.co_name for frame in called if not frame.f_code.co_name.startswith("_")]
    if public:
        return public[-1]
    waiting = frames[0].f_code.co_name == "_timed_wait" if frames else False
    return f"wait of {frames[1].f_code.co_name}" if waiting and len(frames) > 1 else None


def innermost_module(frames: list[FrameType], names: Mapping[int, str]) -> str | None:
    """Return the name of the module whose forward pass is running, or None."""
    for frame in frames:
        if frame.f_code.co_name in MODULE_CALLS and (
            name := names.get(id(frame.f_locals.get("self")))
        ):
            return name
    return None


def shown(frame: FrameType) -> str:
    """Return `megagpt/train.py:70 train`."""
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
