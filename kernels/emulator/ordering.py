"""Which thread has seen what: vector clocks, and the rules for shared memory that they decide.

PTX ISA, "Memory Consistency Model" (causality order, proxies) and "Async Proxy". The agents are the
warps; one more for each warp group, which reads for its matrix products; and one for each mbarrier,
which writes for the copies that complete on it. An access is ordered before another if the second
agent has, by barriers, heard of the first one's clock.
"""

from typing import Any

import numpy as np

from kernels.emulator import Findings
from kernels.emulator.formats import Array

MOST_BARRIERS = 64
_NOBODY = -1  # the last column of a clock, which everybody has seen
_NEVER = np.iinfo(np.int32).max


class Clocks:
    """For each warp: the newest clock it has seen of every agent, and that proxy fences cover."""

    def __init__(self, warps: int) -> None:
        self.warps = warps
        groups = (warps + 3) // 4
        self.first_group = warps
        self.first_barrier = warps + groups
        agents = self.first_barrier + MOST_BARRIERS
        self.seen = np.zeros((warps, agents + 1), np.int32)
        self.fenced = np.zeros((warps, agents + 1), np.int32)
        self.seen[:, _NOBODY] = self.fenced[:, _NOBODY] = _NEVER
        self.seen[np.arange(warps), np.arange(warps)] = 1

    def now(self, warp: Any) -> Any:
        """Return the clock of a warp, or of each warp of an array."""
        return self.seen[warp, warp]

    def tick(self, warp: int) -> None:
        """Begin a new clock: what the warp does next is newer than what others have heard of."""
        self.seen[warp, warp] += 1

    def fence(self, warp: int) -> None:
        """Cover all writes the warp knows of by a proxy fence."""
        self.fenced[warp] = np.maximum(self.fenced[warp], self.seen[warp])
        self.tick(warp)

    def meet(self, warps: list[int]) -> None:
        """Let warps that met at a barrier know what each of them knew."""
        for table in (self.seen, self.fenced):
            table[warps] = table[warps].max(axis=0)
        for warp in warps:
            self.tick(warp)

    def snapshot(self, warp: int) -> Array:
        """Return what a warp knows, to be handed to whoever waits for it."""
        known = np.stack([self.seen[warp], self.fenced[warp]])
        self.tick(warp)
        return known

    def learn(self, warp: int, known: Array) -> None:
        """Add what was handed over."""
        self.seen[warp] = np.maximum(self.seen[warp], known[0])
        self.fenced[warp] = np.maximum(self.fenced[warp], known[1])


class Tracker:
    """The last write and the last reads of every unit of shared memory, and the rules they break.

    A unit is two bytes (one where the kernel accesses single bytes).
    """

    def __init__(self, size: int, unit: int, clocks: Clocks, findings: Findings) -> None:
        self.unit, self.clocks, self.findings = unit, clocks, findings
        count = size // unit + 1
        self.writer = np.full(count, _NOBODY, np.int16)
        self.written = np.zeros(count, np.int32)
        self.generic = np.zeros(count, np.int8)  # 1: st.shared wrote it, 2: cp.async
        self.read = np.zeros((clocks.first_barrier, count), np.int32)
        self.has_read = np.zeros(clocks.first_barrier, bool)
        self.arriving = np.zeros(count, np.int16)  # copies that nobody has waited for yet
        self.in_use = np.zeros(count, np.int16)  # asynchronous reads that nobody has waited for

    def units(self, start: Array, size: int) -> Array:
        """Return the units of accesses of some bytes each: (accesses, units)."""
        steps = np.arange(0, size, self.unit) // self.unit
        return (start // self.unit)[:, None] + steps

    def check_read(self, warp: Array, units: Array, line: int) -> None:
        """Report a read of what another warp wrote, or a copy brings, without waiting for it."""
        unseen = self.written[units] > self.clocks.seen[warp[:, None], self.writer[units]]
        if unseen.any():
            self._report("read races with a write", units[unseen], line)
        if self.arriving[units].any():
            self._report(
                "read of a copy that nobody waited for", units[self.arriving[units] > 0], line
            )

    def note_read(self, warp: Array, units: Array) -> None:
        """Remember a read by each warp."""
        self.read[warp[:, None], units] = self.clocks.now(warp)[:, None]
        self.has_read[warp] = True

    def note_async_read(self, agent: int, clock: int, units: Array) -> None:
        """Remember a read that ended, by a warp group's products or a bulk copy."""
        self.read[agent, units] = clock
        self.has_read[agent] = True

    def check_write(self, warp: Array, units: Array, line: int) -> None:
        """Report a write over what another warp wrote, reads, or a copy brings."""
        seen = self.clocks.seen[warp]
        unseen = self.written[units] > seen[np.arange(len(warp))[:, None], self.writer[units]]
        if unseen.any():
            self._report("write races with a write", units[unseen], line)
        for agent in np.flatnonzero(self.has_read):
            late = self.read[agent][units] > seen[:, agent, None]
            if late.any():
                self._report("write races with a read", units[late], line)
        if self.arriving[units].any():
            self._report("write over a copy that nobody waited for", units, line)
        if self.in_use[units].any():
            self._report("write over what an asynchronous read still uses", units, line)

    def note_write(self, warp: Array, units: Array, generic: int) -> None:
        """Remember a write by each warp."""
        self.writer[units] = np.broadcast_to(warp[:, None], units.shape)
        self.written[units] = np.broadcast_to(self.clocks.now(warp)[:, None], units.shape)
        self.generic[units] = generic

    def note_arrival(self, agent: int, clock: int, units: Array) -> None:
        """Remember what the asynchronous proxy wrote, on behalf of an mbarrier."""
        self.writer[units] = agent
        self.written[units] = clock
        self.generic[units] = 0

    def unfenced(self, warps: slice, units: Array, line: int, reader: str) -> Array:
        """Return which units the asynchronous proxy need not see yet, and report them.

        Written through the generic proxy, with no ``fence.proxy.async`` between the write and these
        warps.
        """
        fenced = self.clocks.fenced[warps].min(axis=0)
        old = (self.generic[units] > 0) & (self.written[units] > fenced[self.writer[units]])
        if old.any():
            origin = "cp.async" if (self.generic[units][old] == 2).any() else "st.shared"
            self._report(
                f"{reader} reads what {origin} wrote, without a proxy fence", units[old], line
            )
        return old

    def check_async_read(self, warps: slice, units: Array, line: int) -> None:
        """Report an asynchronous read of what some of these warps have not seen written."""
        seen = self.clocks.seen[warps].min(axis=0)
        unseen = self.written[units] > seen[self.writer[units]]
        if unseen.any():
            self._report("asynchronous read races with a write", units[unseen], line)
        if self.arriving[units].any():
            self._report("asynchronous read of a copy that nobody waited for", units, line)

    def check_async_write(self, warp: int, units: Array, line: int) -> None:
        """Report a copy over what is still read or written."""
        self.check_write(np.array([warp]), units.reshape(1, -1), line)

    def _report(self, kind: str, units: Array, line: int) -> None:
        first, last = int(units.min()) * self.unit, (int(units.max()) + 1) * self.unit - 1
        self.findings.add(kind, line, f"bytes {first} to {last} of shared memory")
