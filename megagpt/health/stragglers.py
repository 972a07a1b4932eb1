"""Names a rank that the others wait for, after it was slower than its peers several times in a row.

The steps of all ranks take equally long, because all wait for the slowest; only the time that each
rank works in a step differs.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megagpt.distributed import Mesh
from megagpt.parallel import timeouts as waits

WINDOW_STEPS = 5
WINDOWS_IN_A_ROW = 3  # one window may be slowed by a page fault or another program
SLOWER = 1.3  # times the median of its peers
# The share of a step's time by which a rank must work longer to be worth reporting.
LEAST_SHARE = 0.1


class StragglerWatch:
    """Sums this rank's working time and compares it with its peers every ``WINDOW_STEPS``.

    On a GPU one step of a window is measured. Copies between host and device on other streams count
    as waiting there, so a slow bus does not show.
    """

    def __init__(self, mesh: Mesh, device: torch.device, clock: waits.Clock | None = None) -> None:
        self.peers = peers(mesh.device_mesh.mesh)
        self.clock: waits.Clock = clock or (
            waits.DeviceClock() if device.type == "cuda" else waits.HostClock()
        )
        self.steps = 0
        self.worked_s = 0.0
        self.lasted_s = 0.0
        self.rows: Counter[int] = Counter()
        self.of_window: tuple[float, float] | None = None  # (worked, lasted) of a window to share
        waits.hook(device)

    def begin_step(self) -> None:
        """Start a step, before the samples are loaded: a slow disk counts as work."""
        if self._measures:
            self.started = self.clock.mark()
            waits.begin(self.clock)

    @property
    def _measures(self) -> bool:
        """Whether the next or current step is measured."""
        return (self.steps + 1) % self.clock.every == 0

    def end_step(self) -> None:
        """End a step; at the end of a window, its times are there to be shared."""
        if self._measures:
            stalls = waits.end()
            ended = self.clock.mark()
            lasted_s = self.clock.between_s(self.started, ended)
            self.lasted_s += lasted_s
            self.worked_s += lasted_s - sum(self.clock.between_s(*stall) for stall in stalls)
        self.steps += 1
        if self.steps % WINDOW_STEPS == 0:
            self.of_window = (self.worked_s, self.lasted_s)
            self.worked_s = 0.0
            self.lasted_s = 0.0

    def share(self) -> list[float]:
        """Return numbers whose sums over all ranks ``named`` takes; none until a window has ended.

        All ranks return equally many. They travel with the next step's loss, so that nothing waits
        for them.
        """
        if self.of_window is None:
            return []
        numbers = [0.0] * (2 * dist.get_world_size())
        place = 2 * dist.get_rank()
        numbers[place : place + 2] = self.of_window
        self.of_window = None
        return numbers

    def named(self, sums: Sequence[float]) -> list[tuple[int, float]]:
        """Return the new stragglers, each with its working time relative to its peers'.

        All ranks get the same answer. A straggler is named again only after it has caught up.
        """
        if not sums:
            return []
        return self._named(slower_ranks(sums[::2], max(sums[1::2]), self.peers))

    def _named(self, slower: dict[int, float]) -> list[tuple[int, float]]:
        self.rows = Counter({rank: self.rows[rank] + 1 for rank in slower})
        return [
            (rank, ratio) for rank, ratio in slower.items() if self.rows[rank] == WINDOWS_IN_A_ROW
        ]


def peers(ranks: torch.Tensor) -> Callable[[int], list[int]]:
    """Return a function from a rank to the ranks that do the same work.

    These are the others of its pipeline stage, or all others if it is alone there. ``ranks`` is the
    mesh (pipeline, data, tensor).
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
    """Return each rank that works notably longer than its peers, with the ratio."""
    slower = {}
    for rank, mine_s in enumerate(worked_s):
        others = peers_of(rank)
        usual_s = statistics.median(worked_s[other] for other in others) if others else mine_s
        if mine_s > SLOWER * usual_s and mine_s - usual_s > LEAST_SHARE * lasted_s:
            slower[rank] = mine_s / usual_s
    return slower
