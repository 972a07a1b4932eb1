"""How long this process has waited for other ranks: whatever blocks in torch.distributed passes through `Work.wait`.

On GPUs that call returns as soon as the wait is queued on the device: there, only the host's part of waiting is seen.
"""

import time
from typing import Any

import torch.distributed as dist

_total_s = 0.0
_wait = dist.Work.wait


def _timed_wait(self: dist.Work, *arguments: Any, **options: Any) -> bool:
    global _total_s
    started = time.perf_counter()
    try:
        return _wait(self, *arguments, **options)
    finally:
        _total_s += time.perf_counter() - started


def measure() -> None:
    """From now on waiting is timed, at a fraction of a microsecond a call."""
    dist.Work.wait = _timed_wait  # type: ignore[method-assign]


def waited_s() -> float:
    """The time since ``measure`` that was spent waiting."""
    return _total_s
