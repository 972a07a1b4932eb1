"""Shared memory of one CTA, and global memory as the storages of tensors.

PTX ISA, "State Spaces": a shared address is an offset in the shared window, a global one is the
address of the tensor's bytes in this process.
"""

import ctypes
from random import Random
from typing import Any

import numpy as np

from kernels.emulator import EmulatorError, Findings
from kernels.emulator.formats import UNSIGNED, Array
from kernels.emulator.instructions import SHARED_BASE, Mask
from kernels.emulator.ordering import Clocks, Tracker

_POISON = 0xFF  # a NaN in every floating-point format


class SharedMemory:
    """Bytes, and what they were before the last write through the generic proxy.

    The asynchronous proxy (matrix products of warp groups, TMA) gets those older bytes where no
    proxy fence separates the write from its read.
    """

    def __init__(
        self, size: int, unit: int, clocks: Clocks, findings: Findings, rng: Random
    ) -> None:
        self.size, self.random = size, rng
        self.bytes = np.full((size + 15) // 16 * 16, _POISON, np.uint8)
        self.older = self.bytes.copy()
        self.tracker = Tracker(size, unit, clocks, findings)

    def offsets(self, addresses: Array, size: int, line: int) -> Array:
        """Return where in the memory accesses of some bytes lie; raise if outside or unaligned."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if len(offsets) and (offsets.min() < 0 or offsets.max() + size > self.size):
            raise EmulatorError(
                f"line {line}: shared access out of bounds (bytes {offsets.min()} to "
                f"{offsets.max() + size - 1} of {self.size})"
            )
        if (addresses % size).any():
            raise EmulatorError(f"line {line}: shared access not aligned to its {size} bytes")
        return offsets

    def load(self, warp: Array, offsets: Array, size: int, line: int) -> Array:
        """Return the bytes of each access: (accesses, size)."""
        units = self.tracker.units(offsets, size)
        self.tracker.check_read(warp, units, line)
        self.tracker.note_read(warp, units)
        return self.bytes[offsets[:, None] + np.arange(size)]

    def store(self, warp: Array, offsets: Array, data: Array, line: int, generic: int = 1) -> None:
        """Write the bytes of each access, (accesses, size), through the generic proxy.

        Threads that write the bytes that are there already (copies of one value) race with nobody.
        """
        places = offsets[:, None] + np.arange(data.shape[1])
        units = self.tracker.units(offsets, data.shape[1])
        before = self.bytes[places]
        changed = (before != data).any(axis=1)
        if changed.any():
            self.tracker.check_write(warp[changed], units[changed], line)
        self.older[places] = before
        self.bytes[places] = data
        self.tracker.note_write(warp, units, generic)
        lost = (self.bytes[places] != data).any(axis=1)
        if lost.any():
            self._settle(warp, places, data, self.tracker.writer[units[:, 0]], lost, line)

    def _settle(
        self, warp: Array, places: Array, data: Array, winner: Array, lost: Array, line: int
    ) -> None:
        """Let any of several threads that write one place win. PTX ISA, st: which is undefined."""
        if (winner != warp)[lost].any():
            self.tracker.findings.add("write races with a write", line, "two warps, one place")
        else:
            self.tracker.findings.add(
                "threads of a warp write different values to one place", line, "any may win"
            )
        for row in self.random.sample(range(len(data)), len(data)):
            self.bytes[places[row]] = data[row]

    def async_load(self, places: Array, stale: Array) -> Array:
        """Return bytes at places, the older ones where stale."""
        return np.where(stale, self.older[places], self.bytes[places])

    def poison(self, places: Array) -> None:
        """Make bytes undefined until a copy arrives."""
        self.bytes[places] = _POISON


class Segment:
    """The storage of a tensor."""

    def __init__(self, pointer: int, size: int) -> None:
        self.pointer, self.size = pointer, size
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        self.wide = {bits: self.bytes[: size // (bits // 8) * (bits // 8)].view(kind)
                     for bits, kind in UNSIGNED.items()}  # fmt: skip
        # By two bytes: the CTA that wrote or read them last, _NOBODY, or _MANY.
        self.writers = np.full(size // 2 + 1, _NOBODY, np.int32)
        self.readers = np.full(size // 2 + 1, _NOBODY, np.int32)


_NOBODY, _MANY = -1, -2


class GlobalMemory:
    """The storages that a launch may touch. CTAs must not touch what others write.

    Atomics are ordered with one another, so they count as no write.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.segments: list[Segment] = []

    def add(self, pointer: int, size: int) -> None:
        """Allow accesses to these bytes. Of storages with one address the longest counts."""
        known = next((s for s in self.segments if s.pointer == pointer), None)
        if size and (known is None or known.size < size):
            self.segments = [s for s in self.segments if s is not known]
            self.segments.append(Segment(pointer, size))

    def split(
        self, addresses: Array, size: int, line: int, alignment: int | None = None
    ) -> list[tuple[Segment, Array, Any]]:
        """Return (segment, offsets, which accesses) of accesses of some bytes each."""
        if not len(addresses):
            return []
        if (addresses % np.uint64(alignment or size)).any():
            raise EmulatorError(
                f"line {line}: global access not aligned to {alignment or size} bytes"
            )
        low, high = int(addresses.min()), int(addresses.max()) + size
        segment = self._find(low, high)
        if segment is not None:
            return [(segment, (addresses - np.uint64(segment.pointer)).astype(np.int64), ...)]
        parts, left = [], np.ones(len(addresses), bool)
        while left.any():
            one = int(addresses[np.argmax(left)])
            segment = self._find(one, one + size)
            if segment is None:
                raise EmulatorError(f"line {line}: {self._where(one)}")
            start = np.uint64(segment.pointer)
            inside = left & (addresses >= start)
            inside &= addresses + np.uint64(size) <= start + np.uint64(segment.size)
            parts.append((segment, (addresses[inside] - start).astype(np.int64), inside))
            left &= ~inside
        return parts

    def _find(self, low: int, high: int) -> Segment | None:
        for segment in self.segments:
            if segment.pointer <= low and high <= segment.pointer + segment.size:
                return segment
        return None

    def _where(self, address: int) -> str:
        if not self.segments:
            return f"global access to {address:#x}, and no tensor was given"
        near = min(self.segments, key=lambda s: abs(address - s.pointer - s.size // 2) - s.size / 2)
        return (
            f"global access out of bounds: byte {address - near.pointer} of a tensor of "
            f"{near.size} bytes"
        )

    def note_read(self, segment: Segment, offsets: Array, size: int, cta: int, line: int) -> None:
        """Report a read of what another CTA wrote."""
        places = (offsets[:, None] + np.arange(0, size, 2)) >> 1
        writers = segment.writers[places]
        if ((writers != _NOBODY) & (writers != cta)).any():
            self.findings.add("read of what another CTA wrote", line, f"CTA {cta}")
        readers = segment.readers[places]
        segment.readers[places] = np.where((readers == _NOBODY) | (readers == cta), cta, _MANY)

    def note_write(self, segment: Segment, offsets: Array, size: int, cta: int, line: int) -> None:
        """Report a write over what another CTA wrote or read."""
        places = (offsets[:, None] + np.arange(0, size, 2)) >> 1
        for what, agents in (("wrote", segment.writers), ("read", segment.readers)):
            others = agents[places]
            if ((others != _NOBODY) & (others != cta)).any():
                self.findings.add(f"write over what another CTA {what}", line, f"CTA {cta}")
        segment.writers[places] = cta

    def load(self, addresses: Array, size: int, cta: int, line: int) -> Array:
        """Return the bytes of each access: (accesses, size)."""
        found = np.empty((len(addresses), size), np.uint8)
        for segment, offsets, which in self.split(addresses, size, line):
            self.note_read(segment, offsets, size, cta, line)
            found[which] = _gather(segment, offsets, size)
        return found

    def store(self, addresses: Array, data: Array, cta: int, line: int) -> None:
        """Write the bytes of each access: (accesses, size)."""
        size = data.shape[1]
        for segment, offsets, which in self.split(addresses, size, line):
            self.note_write(segment, offsets, size, cta, line)
            segment.bytes[offsets[:, None] + np.arange(size)] = data[which]


def _gather(segment: Segment, offsets: Array, size: int) -> Array:
    """Return the bytes at offsets, by words as wide as possible."""
    bits = 8 * min(size, 8)
    words = segment.wide[bits]
    first = offsets // (bits // 8)
    return words[first[:, None] + np.arange(8 * size // bits)].view(np.uint8)


def lanes(mask: Mask, count: int) -> Array:
    """Return the numbers of the threads of a mask."""
    return np.arange(count) if mask is None else np.flatnonzero(mask)
