"""How long a step stands still for other ranks, by a clock that fits where it computes.

On a CPU the host waits: whatever blocks in torch.distributed passes through `Work.wait`. On a GPU the host queues
collectives and goes on; the device's stream stands still, inside NCCL's kernels and for other streams. There, events
before and after each call that can make the stream stand still tell for how long it did.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Protocol

import torch
import torch.distributed as dist

# Methods of a process group that queue a kernel of NCCL's on the current stream, in torch 2.11 and 2.13.
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "gather", "scatter", "send", "recv"),
    *("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base"),
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("all_to_all_single", "_end_coalescing"),
)


class Clock(Protocol):
    """Marks moments whose distance is asked for later; a step in ``every`` is measured."""

    every: int

    def mark(self) -> Any: ...

    def between_s(self, earlier: Any, later: Any) -> float: ...


class HostClock:
    """The host's time."""

    every = 1

    def mark(self) -> float:
        return time.perf_counter()

    def between_s(self, earlier: float, later: float) -> float:
        return later - earlier


class DeviceClock:
    """The time of a GPU's stream, the one that is current when the clock is made.

    What is queued on other streams meanwhile takes none. Two events a collective are some microseconds of the host's
    time, hence not every step.
    """

    every = 5

    def __init__(self) -> None:
        self.stream = torch.cuda.current_stream()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def between_s(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        """Waits until the device has come to the later one."""
        later.synchronize()
        return earlier.elapsed_time(later) / 1000


class _Here(threading.local):
    """Whether this thread is inside a timed call: `Stream.wait_stream` calls `wait_event`, which calls `Event.wait`."""

    inside = False


_here = _Here()
_clock: Clock | None = None  # while a step is measured
_stalls: list[tuple[Any, Any]] = []
_hooked: set[str] = set()


def begin(clock: Clock) -> None:
    """Note from now on when this rank stands still."""
    global _clock
    _stalls.clear()
    _clock = clock


def end() -> list[tuple[Any, Any]]:
    """Return the marks before and after each time since ``begin``, and note no more."""
    global _clock
    _clock = None
    return _stalls.copy()


def timed(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a call count as a time of standing still, at a fraction of a microsecond where nothing is measured."""

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
    """Time whatever may make a rank on this device stand still for others; once is enough."""
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
        # DeepSpeed communicates on streams of its own, for which its host or the main stream waits.
        yield from ((torch.cuda.Stream, name) for name in ("wait_stream", "wait_event", "synchronize"))
        yield from ((torch.cuda.Event, name) for name in ("wait", "synchronize"))
        yield torch.cuda, "synchronize"
