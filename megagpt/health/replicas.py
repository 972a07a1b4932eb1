"""Finds replicas that have drifted apart, by comparing checksums of identical copies.

A flipped bit or a lost update on one rank raises no error and no jump in the loss, and can stay
unseen for weeks.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.checkpoint.writer import kinds, parameter_shapes
from megagpt.parallel.compat import MOMENTS
from megagpt.parallel.engine import Engine
from megagpt.parallel.rectangles import whole

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by an element's size in bytes

# (what it is, values); the values are valid only until the next item is requested.
Copies = Iterable[tuple[str, Tensor]]


def data_copies(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield what must be identical on every rank of this data axis.

    These are parameters below ZeRO-3, the small ones that ZeRO-3 leaves whole, and Adam's moments
    at ZeRO 0.
    """
    for parameter, name in engine.names.items():
        if engine.zero_stage < 3 or parameter.ds_persist:  # type: ignore[attr-defined]  # ZeRO 3 puts it there
            yield name, parameter.detach()
    if engine.zero_stage == 0:
        for bucket in engine.buckets():
            with bucket.resident(False) as (_, state):
                for moment in MOMENTS:
                    if moment in state:
                        yield f"{moment} of {bucket.pieces[0].name}", state[moment]


def tensor_copies(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield what must be identical on every rank of this tensor axis.

    These are master weights and moments of parameters that are not shared (norms, the biases after
    a sum, positions), or the shards of them that ZeRO gives this data rank.
    """
    shapes = parameter_shapes(engine)
    for bucket in engine.buckets():
        pieces = [
            piece
            for piece in bucket.pieces
            if engine.boxes[piece.name] == whole(shapes[piece.name])
        ]
        if not pieces:
            continue
        with bucket.resident(False) as held:
            for kind, flat in kinds(*held).items():
                for piece in pieces:
                    yield f"{kind} of {piece.name}", flat[piece.offset : piece.offset + piece.numel]


def all_copies(engine: Engine) -> Iterator[tuple[dist.ProcessGroup, Copies]]:
    """Yield the group of each axis along which this rank holds copies, and the copies."""
    mesh = engine.mesh
    if mesh.data_size > 1:
        yield mesh.data_group, data_copies(engine)
    if mesh.tensor_size > 1:
        yield mesh.tensor_group, tensor_copies(engine)


def checksum(values: Tensor) -> Tensor:
    """Return the sum of the elements' bit patterns modulo 2**64, a scalar.

    One flipped bit always changes it.
    """
    return values.contiguous().view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64)


def find_drift(engine: Engine) -> str | None:
    """Return which value differs on which rank, or None; the same on every rank.

    Every rank must call it.
    """
    mine = [_difference(group, copies, engine.device) for group, copies in all_copies(engine)]
    found: list[list[str | None]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next(filter(None, (difference for of_rank in found for difference in of_rank)), None)


def _difference(group: dist.ProcessGroup, copies: Copies, device: torch.device) -> str | None:
    """Return the first value that differs within a group, or None."""
    sums = {name: checksum(values).to(device) for name, values in copies}
    if not sums:
        return None
    mine = torch.stack([*sums.values()])
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, mine, group=group)
    for name, by_rank in zip(sums, torch.stack(of_ranks).T.tolist(), strict=True):
        if len(set(by_rank)) > 1:
            return f"{name} {_who_differs(by_rank, dist.get_process_group_ranks(group))}"
    return None


def _who_differs(sums: list[int], ranks: list[int]) -> str:
    """Return the ranks without the most common checksum, in words.

    Of two ranks alone, neither is known to be right.
    """
    usual, votes = Counter(sums).most_common(1)[0]
    odd = [rank for rank, value in zip(ranks, sums, strict=True) if value != usual]
    if 2 * votes <= len(ranks):
        return f"differs between ranks {', '.join(map(str, ranks))}"
    return f"differs on rank {', '.join(map(str, odd))} from the others"
