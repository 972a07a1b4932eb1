"""The host and mesh position of every rank, as `distributed.py` assigns them.

Known before any process exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megagpt.cluster.hosts import Host
from megagpt.planning.layout import Layout


class Place(NamedTuple):
    """One rank: where it runs, and its position on the axes."""

    rank: int
    host: str
    slot: int
    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Placement:
    """The place of every rank, in the order of ranks.

    Hosts are filled one after another; tensor is the innermost axis.
    """

    places: tuple[Place, ...]

    @classmethod
    def of(cls, layout: Layout, hosts: Sequence[Host]) -> Placement:
        """Place a layout's ranks on hosts, which must have as many slots together."""
        slots = [(host.name, slot) for host in hosts for slot in range(host.slots)]
        places = []
        for rank, (host, slot) in enumerate(slots):
            replica, tensor = divmod(rank, layout.tensor)
            pipeline, data = divmod(replica, layout.data)
            places.append(Place(rank, host, slot, pipeline, data, tensor))
        return cls(tuple(places))

    def of_pipeline_rank(self, pipeline_rank: int) -> list[Place]:
        """Return the ranks that hold the same stages."""
        return [place for place in self.places if place.pipeline == pipeline_rank]

    def split_tensor_groups(self) -> list[list[Place]]:
        """Return the tensor groups that span several hosts; they use the network in every layer."""
        groups: dict[tuple[int, int], list[Place]] = {}
        for place in self.places:
            groups.setdefault((place.pipeline, place.data), []).append(place)
        return [group for group in groups.values() if len({place.host for place in group}) > 1]


def ranks_by_host(layout: Layout, hosts: Sequence[Host]) -> list[dict[int, int]]:
    """Return for each host how many of its ranks each pipeline rank has."""
    width = layout.data * layout.tensor
    found = []
    first = 0
    for host in hosts:
        last = first + host.slots
        found.append(
            {
                rank: min(last, (rank + 1) * width) - max(first, rank * width)
                for rank in range(first // width, -(-last // width))
            }
        )
        first = last
    return found


def hosts_of(ranks: int, ranks_per_host: int) -> list[Host]:
    """Return hosts with made-up names for this many ranks; the last may have fewer slots."""
    whole, rest = divmod(ranks, ranks_per_host)
    hosts = [Host(f"host-{index + 1}", ranks_per_host) for index in range(whole)]
    return hosts + ([Host(f"host-{whole + 1}", rest)] if rest else [])
