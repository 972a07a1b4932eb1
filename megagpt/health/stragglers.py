"""Names the rank that the others wait for, once it is slower than its peers several times in a row.

Every rank's steps last equally long, as all wait for the slowest; what differs is how long each one
works in them.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megagpt.distributed import Mesh
from megagpt.parallel import timeouts as waits

WINDOW_STEPS = 5
WINDOWS_IN_A_ROW = 3  # one window may hold a page fault or a neighbour's compilation
SLOWER = 1.3  # times the median of its peers
# of a step's time: what a rank may work longer before it costs the others anything worth saying
LEAST_SHARE = 0.1


class StragglerWatch:
    """Adds up what this rank works in its steps and compares it with its peers every
    ``WINDOW_STEPS``.

    On a GPU one step of a window is measured. Copies between host and device on other streams count
    as waiting there, so that a slow bus does not show.
    """

    def __init__(self, mesh: Mesh, device: torch.device, clock: waits.Clock | None = None) -> None:
        self.device = device
        self.peers = peers(mesh.device_mesh.mesh)
        self.clock: waits.Clock = clock or (
            waits.DeviceClock() if device.type == "cuda" else waits.HostClock()
        )
        self.steps = 0
        self.worked_s = 0.0
        self.lasted_s = 0.0
        self.rows: Counter[int] = Counter()
        waits.hook(device)

    def begin_step(self) -> None:
        """Before the samples are loaded: a slow disk counts as work."""
        if self._measures:
            self.started = self.clock.mark()
            waits.begin(self.clock)

    @property
    def _measures(self) -> bool:
        """Whether the step that comes, or is under way, is measured."""
        return (self.steps + 1) % self.clock.every == 0

    def end_step(self) -> list[tuple[int, float]]:
        """The ranks that have become stragglers with this step, and how many times as long as its
        peers each works.

        Every rank must call it; all get the same answer. A straggler is named again only after it
        has caught up.
        """
        if self._measures:
            stalls, ended = waits.end(), self.clock.mark()
            lasted_s = self.clock.between_s(self.started, ended)
            self.lasted_s += lasted_s
            self.worked_s += lasted_s - sum(self.clock.between_s(*stall) for stall in stalls)
        self.steps += 1
        if self.steps % WINDOW_STEPS:
            return []
        mine = torch.tensor([self.worked_s, self.lasted_s], dtype=torch.float64, device=self.device)
        of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(of_ranks, mine)
        self.worked_s = 0.0
        self.lasted_s = 0.0
        worked_s, lasted_s = torch.stack(of_ranks).T.tolist()
        return self._named(slower_ranks(worked_s, max(lasted_s), self.peers))

    def _named(self, slower: dict[int, float]) -> list[tuple[int, float]]:
        self.rows = Counter({rank: self.rows[rank] + 1 for rank in slower})
        return [
            (rank, ratio) for rank, ratio in slower.items() if self.rows[rank] == WINDOWS_IN_A_ROW
        ]


def peers(ranks: torch.Tensor) -> Callable[[int], list[int]]:
    """Who does the same work as a rank: the others of its pipeline stage, or everyone else where it
    is alone there.

    ``ranks`` is the mesh (pipeline, data, tensor).
    """
    stages = ranks.flatten(1).tolist()
    everyone = [rank for stage in stages for rank in stage]

    def of(rank: int) -> list[int]:
        stage = next(stage for stage in stages if rank in stage)
        return [other for other in (stage if len(stage) > 1 else everyone) if other != rank]

    return of


def slower_ranks(
    worked_s: Sequence[float], lasted_s: float, peers_of: Callable[[int], list[int]]
) -> dict[int, float]:
    """Each rank that works longer than its peers, by enough to matter, and how many times as
    long.
    """
    slower = {}
    for rank, mine_s in enumerate(worked_s):
        others = peers_of(rank)
        usual_s = statistics.median(worked_s[other] for other in others) if others else mine_s
        if mine_s > SLOWER * usual_s and mine_s - usual_s > LEAST_SHARE * lasted_s:
            slower[rank] = mine_s / usual_s
    return slower
