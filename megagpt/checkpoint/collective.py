"""Work that every rank does for itself and all answer for together: where it fails on one rank, it
fails on all.

Every function here must be called by all ranks of ``group``, all ranks of the run where that is
None.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from megagpt.checkpoint.format import DamagedCheckpointError
from megagpt.utils import UserError

Result = TypeVar("Result")

DAMAGE = (SafetensorError, DamagedCheckpointError)
EXPECTED = (OSError, UserError, *DAMAGE)  # what files and disks may do to a run


def together(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Run ``work``, which makes no collective call, on every rank; where it fails on any, raise on
    all.

    Raises UserError with the first failing rank's reason. A rank whose error is no bad input raises
    that error itself.
    """
    result, fault, error = _attempt(work, group)
    if fault is not None:
        raise UserError(fault.reason) from error
    return result  # type: ignore[return-value]  # no rank failed, so this one has its result


@dataclass(frozen=True)
class RankFailure:
    """What the first failing rank says; ``damage`` where what it read is at fault, and not the
    reading.
    """

    reason: str
    damage: bool


def attempt(work: Callable[[], Result]) -> Result | RankFailure:
    """Run ``work`` on every rank: this rank's result where all succeed, else the same fault on
    all.
    """
    result, fault, _ = _attempt(work, None)
    return fault if fault is not None else result  # type: ignore[return-value]  # as above


def from_rank0(work: Callable[[], Result]) -> Result:
    """Rank 0's answer, on every rank: file systems may show different things to different hosts."""
    box: list[Any] = [together(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def everyones(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """The values of all ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank0(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """The values of all ranks, on rank 0; nothing elsewhere."""
    is_rank0 = dist.get_rank() == 0
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, values if is_rank0 else None, group=group)
    return values if is_rank0 else []


def _attempt(
    work: Callable[[], Result], group: dist.ProcessGroup | None
) -> tuple[Result | None, RankFailure | None, Exception | None]:
    """This rank's result, the first failing rank's fault, this rank's error; whatever happens,
    none waits for ever.
    """
    result: Result | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # of any kind: the others wait for this rank's word
        error = caught
    reason = None if error is None else f"{str(error) or repr(error)} (rank {dist.get_rank()})"
    faults = everyones(RankFailure(reason, isinstance(error, DAMAGE)) if reason else None, group)
    if error is not None and not isinstance(error, EXPECTED):
        raise error
    return result, next(filter(None, faults), None), error
