"""Search the fastest layouts that fit: branch and bound over `Space`, exact.

No layout is faster than its bound (`estimate` without simulation), which depends on the two halves
of a choice separately. So choices are looked at in the order of their bounds, and the search ends
when the next bound is above the slowest of those to be shown. A layout's memory is the sum of what
its halves hold, so each half is computed once for all its partners.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.cluster.hosts import Host
from megagpt.config import ConfigError, ResolvedConfig, RunConfig
from megagpt.planning.alternatives import set_items
from megagpt.planning.cost.memory import RankMemory, fullest_states, rank_memory
from megagpt.planning.cost.model_states import shard_of
from megagpt.planning.cost.performance import (
    Assumptions,
    Estimate,
    end_of_step,
    estimate,
    extremes,
    shortest_passes,
)
from megagpt.planning.cost.working_memory import working_memory
from megagpt.planning.layout import Layout
from megagpt.planning.legality import World, judge
from megagpt.planning.plan import Limits, fits_device, host_gib, layout_of
from megagpt.planning.rules import refusals
from megagpt.planning.search.space import Mesh, Space, States, Work
from megagpt.utils import GIB

MOST_SHOWN = 10
STATES_OF_BOUND = States(1, "none", "none")
SAME_TIME = 1e-9  # relative difference of step times below which two layouts count as equally fast


@dataclass(frozen=True)
class Found:
    """A layout that is legal and fits, and the `--set` items that select it."""

    layout: Layout
    items: tuple[str, ...]
    estimate: Estimate
    device_gib: float
    host_gib: float

    @property
    def rank(self) -> tuple[Any, ...]:
        """The order: the fastest first; of equally fast ones what needs least host memory first."""
        return (self.estimate.step_s, *self.need)

    @property
    def need(self) -> tuple[float, float, int, tuple[str, ...]]:
        """What is compared of equally fast layouts: memory of host and device, then the items."""
        return (self.host_gib, self.device_gib, len(self.items), self.items)


def best(found: Iterable[Found], most: int = MOST_SHOWN) -> list[Found]:
    """Return the fastest, one of each step time: the one that needs the least memory."""
    shown: list[Found] = []
    for one in sorted(found, key=lambda one: one.rank):
        if shown and _same(one.estimate.step_s, shown[-1].estimate.step_s):
            if one.need < shown[-1].need:
                shown[-1] = one
        elif len(shown) < most:
            shown.append(one)
        else:
            break
    return shown


def _same(one_s: float, other_s: float) -> bool:
    return math.isclose(one_s, other_s, rel_tol=SAME_TIME)


@dataclass
class Search:
    """One search: the space, the rates and limits, and what makes a choice legal.

    `written` is the configuration that the `--set` items are for, `resolved` the same run on one
    rank from ZeRO 1 on and at ZeRO 0, which the rules judge with other numbers put in.
    """

    space: Space
    assumed: Assumptions
    limits: Limits
    hosts: Sequence[Host]
    written: RunConfig
    resolved: dict[bool, ResolvedConfig]
    world: World

    def __post_init__(self) -> None:
        self._legal: dict[tuple[Any, ...], bool] = {}
        self._held: dict[tuple[Any, ...], list[float] | None] = {}
        self._kept: dict[tuple[Any, ...], list[float]] = {}

    def run(self, most: int = MOST_SHOWN) -> list[Found]:
        """Return the fastest layouts that are legal and fit, fastest first."""
        found: list[Found] = []
        slowest = math.inf
        for bound, mesh, work, states in self._by_bound():
            if bound > slowest * (1 + SAME_TIME):
                break
            found += self._judged(mesh, work, states, slowest)
            shown = best(found, most)
            slowest = shown[-1].estimate.step_s if len(shown) == most else math.inf
        return best(found, most)

    def _by_bound(self) -> list[tuple[float, Mesh, Work, States]]:
        """Return every choice with seconds that its step takes at least, in their order."""
        states = list(self.space.states())
        found = []
        for mesh in self.space.meshes():
            ends: dict[tuple[Any, ...], float] = {}
            passes: dict[tuple[Any, ...], float] = {}
            for work in self.space.works(mesh):
                key = (work.virtual_stages, work.micro_batch, work.recompute)
                if key not in passes:  # ZeRO 3 waits in addition, fewer shards of norms are slower
                    layout = self.space.layout(mesh, work, STATES_OF_BOUND, mesh.tensor > 1)
                    passes[key] = shortest_passes(layout, self.assumed)
                for state in states:
                    end = self._end_key(work, state)
                    if end not in ends:
                        layout = self.space.layout(mesh, work, state, False)
                        ranks = extremes(mesh.pipeline)
                        ends[end] = sum(end_of_step(layout, self.assumed, ranks))
                    found.append((passes[key] + ends[end], mesh, work, state))
        return sorted(found)

    def _end_key(self, work: Work, state: States) -> tuple[Any, ...]:
        """Return what the end of a step depends on, on one mesh."""
        each = work.micro_batches if state.stage >= 2 else 1
        return (work.virtual_stages, each, state)

    def _judged(self, mesh: Mesh, work: Work, states: States, slowest: float) -> Iterator[Found]:
        """Yield the layouts of a choice that are legal, fit and are not slower than `slowest`."""
        for sequence in self.space.sequences(mesh):
            if not self._may_fit(mesh, work, states, sequence):
                continue
            layout = self.space.layout(mesh, work, states, sequence)
            limit = slowest * (1 + SAME_TIME)
            if (
                not self._is_legal(layout, mesh, work, states, sequence)
                or estimate(layout, self.assumed, simulated=False).step_s > limit
            ):
                continue
            result = estimate(layout, self.assumed)
            if result.step_s <= limit and (one := self._found(layout, result)):
                yield one

    def _may_fit(self, mesh: Mesh, work: Work, states: States, sequence: bool) -> bool:
        """Return whether the ranks that differ most have room for what both halves hold.

        Without offload to the host where it has no room. Not sufficient: `_found` counts all.
        """
        key = (mesh, work.virtual_stages, states, work.micro_batches > 1)
        if key not in self._held:
            self._held[key] = self._held_by(self.space.layout(mesh, work, states, False))
        if (held := self._held[key]) is None:
            return False
        passes = (mesh, work, states.stage > 0, sequence)
        if passes not in self._kept:
            layout = self.space.layout(mesh, work, states, sequence)
            self._kept[passes] = [_of_work(layout, rank) for rank in extremes(mesh.pipeline)]
        both = zip(held, self._kept[passes], strict=True)
        return all(one + other <= self._room for one, other in both)

    @property
    def _room(self) -> float:
        """Bytes of a device that are ours."""
        if self.limits.shared:
            return math.inf
        return (self.limits.device_gib - self.limits.reserve_gib) * GIB

    def _held_by(self, layout: Layout) -> list[float] | None:
        """Return the device bytes of ZeRO's half on the ranks that differ most.

        None if the hosts have no room for its part of them.
        """
        held = []
        for rank in extremes(layout.pipeline):
            shard = shard_of(layout, rank)
            states = fullest_states(layout, rank, data_ranks=1)
            memory = RankMemory(
                layout, rank, states, working_memory(layout, rank, shard, work=False)
            )
            held.append((memory.resident + memory.phases["forward and backward"]).device)
            if memory.peak.device > self._room:
                return None
        if layout.zero.optimizer_device == layout.zero.parameter_device == "none":
            return held
        ranks = [rank_memory(layout, rank) for rank in range(layout.pipeline)]
        return held if host_gib(layout, ranks, self.hosts) <= self.limits.host_gib else None

    def _is_legal(
        self, layout: Layout, mesh: Mesh, work: Work, states: States, sequence: bool
    ) -> bool:
        """Return whether the rules allow it; what they look at decides for all micro-batches."""
        key = (mesh, work.schedule, work.virtual_stages, states, sequence)
        if key not in self._legal:
            self._legal[key] = not refusals(self._resolved(layout))
        return self._legal[key]

    def _resolved(self, layout: Layout) -> ResolvedConfig:
        """Return the run on this layout, as the rules read it."""
        base = self.resolved[layout.zero.stage > 0]
        training = base.megagpt.training.model_copy(update={"recompute": layout.recompute})
        changes = {"parallel": layout.parallel, "training": training}
        return base.model_copy(
            update={
                "train_batch_size": self.space.batch,
                "train_micro_batch_size_per_gpu": layout.micro_batch,
                "gradient_accumulation_steps": layout.micro_batches,
                "zero_optimization": layout.zero,
                "megagpt": base.megagpt.model_copy(update=changes),
            }
        )

    def _found(self, layout: Layout, result: Estimate) -> Found | None:
        """Return the layout with its `--set` items, or None.

        The items are read again and judged like a command's, so that what is printed works.
        """
        memory = [rank_memory(layout, rank) for rank in range(layout.pipeline)]
        in_host = host_gib(layout, memory, self.hosts, shared=self.limits.shared)
        if in_host > self.limits.host_gib or not all(
            fits_device(rank, self.limits) for rank in memory
        ):
            return None
        items = set_items(self.written, layout)
        try:
            verdict = judge(self.written.changed(items), self.world)
        except ConfigError:
            return None
        if verdict.refused or verdict.impossible:
            return None
        assert isinstance(verdict.config, ResolvedConfig)  # nothing was impossible
        if layout_of(verdict.config, self.limits) != layout:
            return None
        peak = max(rank.peak.device for rank in memory) / GIB
        return Found(layout, tuple(items), result, peak, in_host)


def _of_work(layout: Layout, rank: int) -> float:
    """Return the device bytes that a rank's passes keep, whatever ZeRO does."""
    work = working_memory(layout, rank, shard_of(layout, rank))
    return work.activations + work.head + work.recomputation + work.pipeline_buffers
