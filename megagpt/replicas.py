"""Finds data-parallel replicas that have drifted apart: what must be equal bit for bit is compared by its checksum.

A flipped bit or a lost update on one rank makes no error and no jump in the loss. It stays unseen for weeks.
"""

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.compat import MOMENTS
from megagpt.engine import Engine

_INTEGERS = {2: torch.int16, 4: torch.int32}  # of an element's size in bytes


def replicated(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """What every rank of this data axis holds alike, by name.

    Parameters below ZeRO 3; those that ZeRO 3 leaves whole because they are small; Adam's moments at ZeRO 0.
    """
    for parameter, name in engine.names.items():
        if engine.stage < 3 or parameter.ds_persist:  # type: ignore[attr-defined]  # ZeRO 3 puts it there
            yield name, parameter.detach()
    if engine.stage == 0:
        for bucket in engine.buckets():
            with bucket.resident(False) as (_, state):
                for moment in MOMENTS:
                    if moment in state:
                        yield f"{moment} of {bucket.pieces[0].name}", state[moment]


def checksum(values: Tensor) -> Tensor:
    """The sum of the elements' bit patterns modulo 2**64, a scalar: one flipped bit always changes it."""
    return values.contiguous().view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64)


def find_drift(engine: Engine) -> str | None:
    """Which value differs on which rank, or None where all is well; alike on every rank, all of which must call it."""
    mine = _differences(engine)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next(filter(None, found), None)


def _differences(engine: Engine) -> str | None:
    """The first value that differs within this rank's data axis."""
    values = dict(replicated(engine))
    if not values or engine.mesh.data_size == 1:
        return None
    mine = torch.stack([checksum(value) for value in values.values()])
    of_ranks = [torch.empty_like(mine) for _ in range(engine.mesh.data_size)]
    dist.all_gather(of_ranks, mine, group=engine.mesh.data_group)
    for name, sums in zip(values, torch.stack(of_ranks).T.tolist(), strict=True):
        if len(set(sums)) > 1:
            return f"{name} {_who_differs(sums, dist.get_process_group_ranks(engine.mesh.data_group))}"
    return None


def _who_differs(sums: list[int], ranks: list[int]) -> str:
    """Those without the most common checksum; of two alone nobody can say which is right."""
    usual, votes = Counter(sums).most_common(1)[0]
    odd = [rank for rank, value in zip(ranks, sums, strict=True) if value != usual]
    if 2 * votes <= len(ranks):
        return f"differs between ranks {', '.join(map(str, ranks))}"
    return f"differs on rank {', '.join(map(str, odd))} from the others"
