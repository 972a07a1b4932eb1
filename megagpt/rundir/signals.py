"""Requests to a run from outside: to save, or to save and end.

They are received at once and acted on at the end of a step.

    SIGTERM, SIGINT     save and end with exit code 3; the same signal again after some seconds ends
                        the process at once
    SIGUSR1             save and continue
    runs/NAME/stop      a file; creating it has the effect of SIGTERM; the run removes it
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from megagpt.utils import ExitCode

log = logging.getLogger(__name__)

STOP_FILE = "stop"
# One Ctrl-C arrives twice, from the terminal and from the launcher. A second press comes later.
SAME_PRESS_S = 3.0
_WAKE_TO_CLOSE = 0  # no signal has this number


class StopRequest(IntEnum):
    """A request to the run; the greatest over all ranks counts.

    Those from ``STOP_FILE`` on end the run.
    """

    NOTHING = 0
    SAVE = 1
    STOP_FILE = 2
    ORPHANED = 3
    SIGINT = 4
    SIGTERM = 5

    @property
    def ends_the_run(self) -> bool:
        return self >= StopRequest.STOP_FILE


STOP_SIGNALS = {
    signal.SIGUSR1: StopRequest.SAVE,
    signal.SIGINT: StopRequest.SIGINT,
    signal.SIGTERM: StopRequest.SIGTERM,
}


class StopRequests:
    """The requests to this rank. Any thread may add one; the loop takes them after a step.

    ``awaited`` is true while a loop runs that will take them.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.awaited = False
        self._save = False
        self._stop = StopRequest.NOTHING

    def add(self, request: StopRequest) -> None:
        """Add a request; one that ends the run is never withdrawn."""
        if request.ends_the_run:
            self._stop = max(self._stop, request)
        else:
            self._save = True

    def take(self) -> StopRequest:
        """Return the greatest request; a request to save is returned once."""
        save = self._save
        self._save = False
        if self.stop_file is not None and self.stop_file.exists():
            self.add(StopRequest.STOP_FILE)
        return self._stop or (StopRequest.SAVE if save else StopRequest.NOTHING)


class SignalListener:
    """Turns signals into requests while it is entered, on the main thread.

    Python runs its own handlers between two instructions of the main thread, so never while that
    thread waits in a collective. A thread that reads the wake-up pipe receives them all the same,
    and can end a process that hangs. ``end_at_once(signal)`` is called for a repeated signal, and
    for any signal while requests are not awaited: before the first step there is nothing to save,
    and compiling ops takes minutes.
    """

    def __init__(
        self, requests: StopRequests, end_at_once: Callable[[signal.Signals], None]
    ) -> None:
        self.requests = requests
        self.end_at_once = end_at_once
        self._first_heard_s: dict[signal.Signals, float] = {}

    def __enter__(self) -> Self:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)  # set_wakeup_fd requires it
        self._previous_pipe = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._previous_handlers = {
            number: signal.signal(number, _heard_by_the_thread) for number in STOP_SIGNALS
        }
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        os.write(self._writing, bytes([_WAKE_TO_CLOSE]))
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)

    def _listen(self) -> None:
        while (number := os.read(self._reading, 1)[0]) != _WAKE_TO_CLOSE:
            if number in STOP_SIGNALS:  # the pipe carries every signal that has a handler in Python
                self._hear(signal.Signals(number))

    def _hear(self, heard: signal.Signals) -> None:
        request = STOP_SIGNALS[heard]
        if request.ends_the_run and (self._insists(heard) or not self.requests.awaited):
            self.end_at_once(heard)
        log.info(
            "%s: %s at the end of this step",
            heard.name,
            "save and end" if request.ends_the_run else "save",
        )
        self.requests.add(request)

    def _insists(self, heard: signal.Signals) -> bool:
        """Return whether the same signal came again, seconds later.

        The second signal of one Ctrl-C may come at any time: DeepSpeed's launcher passes it on to
        one rank after another, and waits 30 s for each.
        """
        now_s = time.monotonic()
        return now_s - self._first_heard_s.setdefault(heard, now_s) > SAME_PRESS_S


@contextmanager
def ends_before_the_start() -> Iterator[None]:
    """End the command on SIGTERM or SIGINT until a SignalListener takes over.

    There is nothing to save yet; the exit code is that of a pre-empted run. SIGUSR1, which would
    otherwise end the process, does nothing.
    """

    def end(number: int, frame: object) -> None:
        print(
            f"{signal.Signals(number).name}: ended before the first step",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(ExitCode.PREEMPTED_AND_SAVED)

    def ignore(number: int, frame: object) -> None:
        """Ignore the signal; unlike SIG_IGN, this handler is not inherited by child processes."""

    handlers = {
        number: ignore if request is StopRequest.SAVE else end
        for number, request in STOP_SIGNALS.items()
    }
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _heard_by_the_thread(number: int, frame: object) -> None:
    """Do nothing: a signal reaches the wake-up pipe only if Python has a handler for it."""
