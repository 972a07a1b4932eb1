"""Whether a host has the memory that a run takes from it: by the planner, before anything starts.

Optimizer state, parameters and copies for checkpoints may lie in host memory, and on GPUs a part of
them is page-locked, which the system may limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megagpt.config import ConfigError, ResolvedConfig, RunConfig
from megagpt.planning.cost.memory import rank_memory
from megagpt.planning.cost.model_states import shard_of
from megagpt.planning.cost.page_locking import locked_blocks
from megagpt.planning.layout import Layout, Pins
from megagpt.planning.legality import judge
from megagpt.planning.plan import world_and_notes
from megagpt.utils import GIB, human_bytes

LOCKED_BY_DEEPSPEED = "native"  # the value of DS_PIN_MEMORY_BACKEND for mlock


@dataclass(frozen=True)
class Need:
    """Host memory of the fullest rank: all of it, and what DeepSpeed locks, in bytes."""

    rank_bytes: float
    locked_bytes: int


def need(config: RunConfig, ranks: int, values: dict[str, Any]) -> Need | None:
    """Return what a rank on a host with these answers needs; None if it cannot be planned."""
    on_gpu = bool(values.get("devices"))
    native = values.get("pins") == LOCKED_BY_DEEPSPEED
    world, _ = world_and_notes(config, ranks, bf16_native=on_gpu)
    try:
        verdict = judge(config, world)
    except ConfigError:
        return None
    if verdict.impossible or verdict.refused or not isinstance(verdict.config, ResolvedConfig):
        return None
    pins: Pins = "nobody" if not on_gpu else "native" if native else "torch"
    layout = Layout.of(verdict.config, pins=pins)
    peaks = [rank_memory(layout, rank).peak for rank in range(layout.pipeline)]
    locked = 0
    if pins == "native":
        stages = range(layout.pipeline)
        locked = max(sum(locked_blocks(shard_of(layout, rank))) for rank in stages)
    return Need(max(peak.host + (0 if on_gpu else peak.device) for peak in peaks), locked)


def problems(name: str, needed: Need, slots: int, values: dict[str, Any]) -> Iterator[str]:
    """Yield what a host lacks for `slots` ranks."""
    free, limit = values.get("memory_bytes"), values.get("memlock_bytes")
    total = slots * needed.rank_bytes
    if free is not None and total > free:
        yield (
            f"{name}: {slots} ranks take {human_bytes(total)} of host memory, {human_bytes(free)} "
            f"are free; stop what uses it, or plan with it: python launch/plan.py --search "
            f"--host_memory_gib {free // GIB}"
        )
    if limit is not None and needed.locked_bytes > limit:
        yield (
            f"{name}: a rank locks {human_bytes(needed.locked_bytes)} "
            f"(DS_PIN_MEMORY_BACKEND=native), the limit is {human_bytes(limit)}; ulimit -l "
            f"unlimited there, or unset the variable"
        )
