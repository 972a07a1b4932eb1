"""How long a step waits for other ranks, by a clock that fits the device.

On a CPU the host waits: everything that blocks in torch.distributed calls `Work.wait`. On a GPU the
host queues collectives and continues, and the device's stream waits, inside NCCL's kernels and for
other streams. There, events recorded before and after each call that can block the stream measure
the time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Protocol

import torch
import torch.distributed as dist

# Methods of a process group that queue an NCCL kernel on the current stream, in torch 2.11 and
# 2.13.
_COLLECTIVES = (
    *(
        "allreduce",
        "allreduce_coalesced",
        "reduce",
        "broadcast",
        "barrier",
        "gather",
        "scatter",
        "send",
        "recv",
    ),
    *("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced"),
    *(
        "reduce_scatter",
        "_reduce_scatter_base",
        "reduce_scatter_tensor_coalesced",
        "alltoall",
        "alltoall_base",
    ),
    *(
        "all_gather_single",
        "all_gather_single_coalesced",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
    ),
    *("all_to_all_single", "_end_coalescing"),
)


class Clock(Protocol):
    """A clock whose marks can be compared later; every ``every``-th step is measured."""

    every: int

    def mark(self) -> Any: ...

    def between_s(self, earlier: Any, later: Any) -> float: ...


class HostClock:
    """The host's clock."""

    every = 1

    def mark(self) -> float:
        return time.perf_counter()

    def between_s(self, earlier: float, later: float) -> float:
        return later - earlier


class DeviceClock:
    """The clock of the GPU stream that is current when it is created.

    Work queued on other streams does not count. Two events per collective cost some microseconds of
    host time, so not every step is measured.
    """

    every = 5

    def __init__(self) -> None:
        self.stream = torch.cuda.current_stream()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def between_s(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        """Return the seconds between two marks; wait until the device has reached the later one."""
        later.synchronize()
        return earlier.elapsed_time(later) / 1000


class _Here(threading.local):
    """Whether this thread is inside a timed call.

    `Stream.wait_stream` calls `wait_event`, which calls `Event.wait`: only the outermost counts.
    """

    inside = False


_here = _Here()
_clock: Clock | None = None  # while a step is measured
_stalls: list[tuple[Any, Any]] = []
_hooked: set[str] = set()


def begin(clock: Clock) -> None:
    """Start recording when this rank waits."""
    global _clock
    _stalls.clear()
    _clock = clock


def end() -> list[tuple[Any, Any]]:
    """Stop recording; return the marks before and after each wait since ``begin``."""
    global _clock
    _clock = None
    return _stalls.copy()


def timed(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call so that its duration counts as waiting.

    Costs a fraction of a microsecond while nothing is measured.
    """

    @wraps(method)
    def _timed_wait(*arguments: Any, **options: Any) -> Any:
        clock = _clock
        if clock is None or _here.inside:
            return method(*arguments, **options)
        _here.inside, begun = True, clock.mark()
        try:
            return method(*arguments, **options)
        finally:
            _here.inside = False
            _stalls.append((begun, clock.mark()))

    return _timed_wait


def hook(device: torch.device) -> None:
    """Time every call that may make a rank on this device wait for others; idempotent."""
    for owner, name in _waiting_calls(device):
        key = f"{owner.__name__}.{name}"
        if key not in _hooked and hasattr(owner, name):
            _hooked.add(key)
            setattr(owner, name, timed(getattr(owner, name)))


def _waiting_calls(device: torch.device) -> Iterator[tuple[Any, str]]:
    yield dist.Work, "wait"
    if device.type == "cuda":
        yield dist.Work, "block_current_stream"
        yield from ((dist.ProcessGroup, name) for name in _COLLECTIVES)
        # DeepSpeed communicates on its own streams; the host or the main stream waits for them.
        yield from (
            (torch.cuda.Stream, name) for name in ("wait_stream", "wait_event", "synchronize")
        )
        yield from ((torch.cuda.Event, name) for name in ("wait", "synchronize"))
        yield torch.cuda, "synchronize"
