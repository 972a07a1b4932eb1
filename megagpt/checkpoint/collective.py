"""Work that each rank does alone and that fails on all ranks if it fails on one.

All ranks of ``group`` must call every function here; if it is None, all ranks of the run.
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
EXPECTED = (OSError, UserError, *DAMAGE)  # errors of files, disks and input; others are bugs


def together(work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Run ``work`` on every rank; if it fails on one rank, raise on all.

    ``work`` makes no collective call. Raise UserError with the first failing rank's reason. A rank
    with an unexpected error raises that error itself.
    """
    result, fault, error = _attempt(work, group)
    if fault is not None:
        raise UserError(fault.reason) from error
    return result  # type: ignore[return-value]  # no rank failed, so this one has its result


@dataclass(frozen=True)
class RankFailure:
    """The first failing rank's reason.

    ``damage`` is true if the data it read are damaged, false if reading failed.
    """

    reason: str
    damage: bool


def attempt(work: Callable[[], Result]) -> Result | RankFailure:
    """Run ``work`` on every rank; return this rank's result, or the same failure on all ranks."""
    result, fault, _ = _attempt(work, None)
    return fault if fault is not None else result  # type: ignore[return-value]  # as above


def from_rank0(work: Callable[[], Result]) -> Result:
    """Return rank 0's result on every rank.

    File systems may show different files to different hosts.
    """
    box: list[Any] = [together(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def everyones(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Return the values of all ranks, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank0(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Return the values of all ranks on rank 0, an empty list elsewhere."""
    is_rank0 = dist.get_rank() == 0
    values: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, values if is_rank0 else None, group=group)
    return values if is_rank0 else []


def _attempt(
    work: Callable[[], Result], group: dist.ProcessGroup | None
) -> tuple[Result | None, RankFailure | None, Exception | None]:
    """Return this rank's result, the first failing rank's failure and this rank's error.

    No rank waits for ever, whatever fails.
    """
    result: Result | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:  # of any kind: the others wait in all_gather_object below
        error = caught
    reason = None if error is None else f"{str(error) or repr(error)} (rank {dist.get_rank()})"
    faults = everyones(RankFailure(reason, isinstance(error, DAMAGE)) if reason else None, group)
    if error is not None and not isinstance(error, EXPECTED):
        raise error
    return result, next(filter(None, faults), None), error
