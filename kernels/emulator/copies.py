"""Asynchronous copies between global and shared memory.

PTX ISA, "Data Movement and Conversion Instructions: Asynchronous copy": cp.async (non-bulk), which
a thread waits for itself, and cp.async.bulk.tensor (TMA), which an mbarrier or a bulk group waits
for.

A copy happens at any time between its start and the end of the wait for it. Early ones happen at
once; of late ones the destination is undefined until then.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.emulator import EmulatorError
from kernels.emulator.formats import Array
from kernels.emulator.instructions import (
    Action,
    Mask,
    Operands,
    address,
    allow,
    meaning,
    unknown,
)
from kernels.emulator.memory import GlobalMemory, lanes
from kernels.emulator.parser import Instruction

# ----------------------------------------------------------------------------- cp.async, by threads


class _Copy:
    """What a gang's cp.async brings: the bytes of each thread, for all its warps."""

    def __init__(
        self, gang: Any, which: Array, to: Array, origin: Array, sizes: Array, size: int, line: int
    ) -> None:
        self.cta, self.line, self.size = gang.cta, line, size
        self.warps = gang.warp_of[which]
        self.to, self.origin, self.sizes = to, origin, sizes
        shared = self.cta.shared
        self.units = shared.tracker.units(to, size)
        shared.tracker.check_write(self.warps, self.units, line)
        np.add.at(shared.tracker.arriving, self.units, 1)
        places = to[:, None] + np.arange(size)
        shared.older[places] = shared.bytes[places]
        self.is_late = self.cta.is_late()
        if self.is_late:
            shared.poison(places)
        else:
            shared.bytes[places] = self._data(np.arange(len(to)))

    def _data(self, rows: Array) -> Array:
        """Return the bytes of some threads; those above a thread's own size are zero."""
        found = np.zeros((len(rows), self.size), np.uint8)
        for size in np.unique(self.sizes[rows]):
            some = np.flatnonzero(self.sizes[rows] == size)
            if size:
                origin = self.origin[rows[some]]
                for part in self.cta.memory.split(origin, int(size), self.line, self.size):
                    segment, offsets, inside = part
                    self.cta.memory.note_read(
                        segment, offsets, int(size), self.cta.number, self.line
                    )
                    places = offsets[:, None] + np.arange(size)
                    found[some[inside], :size] = segment.bytes[places]
        return found

    def finish(self, first: int, last: int) -> None:
        """End the copies of some warps, which have waited for them."""
        rows = np.flatnonzero((self.warps >= first) & (self.warps < last))
        if not len(rows):
            return
        shared = self.cta.shared
        if self.is_late:
            shared.bytes[self.to[rows, None] + np.arange(self.size)] = self._data(rows)
        np.subtract.at(shared.tracker.arriving, self.units[rows], 1)
        shared.tracker.note_write(self.warps[rows], self.units[rows], generic=2)


class CopyQueue:
    """The copies of one warp: those not committed yet, and groups not waited for yet."""

    def __init__(self) -> None:
        self.open: list[Any] = []
        self.groups: list[list[Any]] = []

    def commit(self) -> None:
        """Make a group of the copies started since the last one."""
        self.groups.append(self.open)
        self.open = []

    def unfinished(self) -> list[Any]:
        """Return what was started and not waited for."""
        return [copy for group in (*self.groups, self.open) for copy in group]

    def take(self, allowed: int) -> list[Any]:
        """Return the copies of all groups but the newest few."""
        count = max(0, len(self.groups) - allowed)
        done = [copy for group in self.groups[:count] for copy in group]
        del self.groups[:count]
        return done


@meaning("cp")
def copy(ins: Instruction, operands: Operands) -> Action:
    """Distinguish the instructions that begin with cp.async."""
    kind = ins.modifiers[1] if len(ins.modifiers) > 1 else ""
    if ins.modifiers[0] != "async":
        raise unknown(ins)
    if kind == "bulk":
        return _bulk(ins, operands)
    if kind == "commit_group":
        return lambda gang, mask: [
            gang.cta.copies[warp].commit() for warp in range(gang.first, gang.last)
        ]
    if kind == "wait_group":
        return _wait(int(ins.operands[0], 0))
    if kind == "wait_all":
        return _wait(0, commits=True)
    return _start(ins, operands)


def _start(ins: Instruction, operands: Operands) -> Action:
    allow(
        ins,
        {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint", "L2::64B",
         "L2::128B", "L2::256B"},
    )  # fmt: skip
    to, to_offset = address(ins, ins.operands[0], operands)
    origin, origin_offset = address(ins, ins.operands[1], operands)
    size = int(ins.operands[2], 0)
    if size not in (4, 8, 16) or ("cg" in ins.modifiers and size != 16):
        raise unknown(ins, "size")
    if len(ins.operands) > 4:
        raise unknown(ins, "operands")
    given = operands.source(ins, ins.operands[3], "b32") if len(ins.operands) == 4 else None

    def run(gang: Any, mask: Mask) -> None:
        which = lanes(mask, gang.threads)
        if not len(which):
            return
        views = gang.views
        sizes = np.full(len(which), size) if given is None else views[given][which].astype(np.int64)
        if (sizes > size).any():
            raise EmulatorError(f"line {ins.line}: cp.async reads more bytes than it writes")
        where = views[to][which] + views[to].dtype.type(to_offset)
        offsets = gang.cta.shared.offsets(where, size, ins.line)
        source = views[origin][which] + np.uint64(origin_offset)
        started = _Copy(gang, which, offsets, source, sizes, size, ins.line)
        for warp in range(gang.first, gang.last):
            gang.cta.copies[warp].open.append(started)

    return run


def _wait(allowed: int, commits: bool = False) -> Action:
    def run(gang: Any, mask: Mask) -> None:
        queues = gang.cta.copies[gang.first : gang.last]
        if commits:
            for queue in queues:
                queue.commit()
        done = [queue.take(allowed) for queue in queues]
        if all(copies == done[0] for copies in done):
            for started in done[0]:
                started.finish(gang.first, gang.last)
            return
        for warp, copies in enumerate(done, gang.first):
            for started in copies:
                started.finish(warp, warp + 1)

    return run


# ------------------------------------------------------------------------ cp.async.bulk.tensor: TMA


def swizzled(addresses: Array, span: int) -> Array:
    """Return shared addresses with their 16-byte chunks permuted within a span of bytes.

    PTX ISA, "Tensors: Swizzling Modes": the chunk's number is combined with that of the 128-byte
    row. Spans are 0 (none), 32, 64 and 128.
    """
    return addresses ^ ((addresses >> 7 & (span // 16 - 1)) << 4) if span else addresses


@dataclass(frozen=True)
class TensorMap:
    """What TMA knows of a tensor: its innermost dimension last, strides in bytes."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int

    def rows(self, corner: list[int]) -> tuple[Array, Array, int, int]:
        """Return the address of each row of a box, which rows exist, and where they begin and end.

        ``corner`` has the innermost coordinate first, as the instruction.
        """
        start = corner[::-1]
        address = np.array([self.pointer], np.int64)
        exists = np.array([True])
        for dim in range(len(self.shape) - 1):
            positions = start[dim] + np.arange(self.box[dim])
            inside = (positions >= 0) & (positions < self.shape[dim])
            address = (
                address[:, None] + np.where(inside, positions, 0) * self.strides[dim]
            ).ravel()
            exists = (exists[:, None] & inside).ravel()
        begin = max(0, -start[-1])
        end = min(self.box[-1], self.shape[-1] - start[-1])
        return address + (start[-1] + begin) * self.itemsize, exists, begin, max(begin, end)

    @property
    def bytes(self) -> int:
        """Return the size of a box."""
        return int(np.prod(self.box)) * self.itemsize

    def read(self, memory: GlobalMemory, corner: list[int], cta: int, line: int) -> Array:
        """Return a box as (rows, bytes); zeros outside the tensor."""
        address, exists, begin, end = self.rows(corner)
        found = np.zeros((len(address), self.box[-1] * self.itemsize), np.uint8)
        size, column = (end - begin) * self.itemsize, begin * self.itemsize
        if size and exists.any():
            rows = np.flatnonzero(exists)
            for segment, offsets, inside in memory.split(
                address[rows].astype(np.uint64), size, line, self.itemsize
            ):
                memory.note_read(segment, offsets, size, cta, line)
                found[rows[inside], column : column + size] = segment.bytes[
                    offsets[:, None] + np.arange(size)
                ]
        return found

    def write(
        self, memory: GlobalMemory, corner: list[int], data: Array, cta: int, line: int
    ) -> None:
        """Write the part of a box that is inside the tensor."""
        address, exists, begin, end = self.rows(corner)
        size, column = (end - begin) * self.itemsize, begin * self.itemsize
        if size and exists.any():
            rows = np.flatnonzero(exists)
            for segment, offsets, inside in memory.split(
                address[rows].astype(np.uint64), size, line, self.itemsize
            ):
                memory.note_write(segment, offsets, size, cta, line)
                segment.bytes[offsets[:, None] + np.arange(size)] = data[
                    rows[inside], column : column + size
                ]


class TensorLoad:
    """A box on its way into shared memory."""

    def __init__(
        self,
        cta: Any,
        warp: int,
        box: TensorMap,
        corner: list[int],
        to: int,
        barrier: int,
        line: int,
    ) -> None:
        self.cta, self.box, self.corner, self.to, self.line = cta, box, corner, to, line
        shared = cta.shared
        self.barrier = cta.barriers.at(barrier, line)
        if to < 0 or to + box.bytes > shared.size or to % 128:
            raise EmulatorError(
                f"line {line}: TMA writes bytes {to} to {to + box.bytes - 1} of {shared.size} in "
                "shared memory; they must be inside and begin at a multiple of 128"
            )
        self.units = np.arange(to // shared.tracker.unit, (to + box.bytes) // shared.tracker.unit)
        shared.tracker.check_async_write(warp, self.units, line)
        shared.tracker.arriving[self.units] += 1
        shared.poison(slice(to, to + box.bytes))

    def finish(self) -> None:
        """Write the box and complete its bytes on the mbarrier."""
        shared, base = self.cta.shared, self.cta.shared_base
        data = self.box.read(self.cta.memory, self.corner, self.cta.number, self.line)
        places = base + self.to + np.arange(data.size).reshape(data.shape)
        places = swizzled(places, self.box.swizzle) - base
        shared.bytes[places] = shared.older[places] = data
        shared.tracker.arriving[self.units] -= 1
        agent, clock = self.barrier.writes()
        shared.tracker.note_arrival(agent, clock, self.units)
        self.barrier.complete_bytes(data.size, self.line)


class TensorStore:
    """A box on its way out of shared memory."""

    def __init__(
        self, cta: Any, warp: int, box: TensorMap, corner: list[int], origin: int, line: int
    ) -> None:
        self.cta, self.warp, self.box, self.corner, self.line = cta, warp, box, corner, line
        shared, tracker = cta.shared, cta.shared.tracker
        if origin < 0 or origin + box.bytes > shared.size or origin % 128:
            raise EmulatorError(f"line {line}: TMA reads outside of shared memory, or unaligned")
        self.units = np.arange(origin // tracker.unit, (origin + box.bytes) // tracker.unit)
        shape = (-1, box.box[-1] * box.itemsize)
        places = cta.shared_base + origin + np.arange(box.bytes).reshape(shape)
        self.places = swizzled(places, box.swizzle) - cta.shared_base
        tracker.check_async_read(slice(warp, warp + 1), self.units, line)
        self.stale = tracker.unfenced(
            slice(warp, warp + 1), self.places // tracker.unit, line, "TMA"
        )
        tracker.in_use[self.units] += 1
        self.is_late = cta.is_late()
        if not self.is_late:
            self._write()

    def _write(self) -> None:
        data = self.cta.shared.async_load(self.places, self.stale)
        self.box.write(self.cta.memory, self.corner, data, self.cta.number, self.line)

    def finish(self) -> None:
        """End the copy, which its thread has waited for."""
        if self.is_late:
            self._write()
        tracker = self.cta.shared.tracker
        tracker.in_use[self.units] -= 1
        tracker.note_async_read(self.warp, self.cta.clocks.now(self.warp), self.units)


def _bulk(ins: Instruction, operands: Operands) -> Action:
    rest = ins.modifiers[2:]
    if rest[:1] == ("commit_group",):
        return lambda gang, mask: [
            gang.cta.bulk_copies[gang.warp_of[lane]].commit() for lane in _firsts(gang, mask)
        ]
    if rest[:1] == ("wait_group",):
        allowed = int(ins.operands[0], 0)

        def wait(gang: Any, mask: Mask) -> None:
            for warp in range(gang.first, gang.last):
                for started in gang.cta.bulk_copies[warp].take(allowed):
                    started.finish()

        return wait
    if rest[:1] != ("tensor",):
        raise unknown(ins)
    allow(
        ins,
        {"async", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d", "shared::cluster", "shared::cta",
         "global", "tile", "mbarrier::complete_tx::bytes", "bulk_group"},
    )  # fmt: skip
    if "bulk_group" in rest:
        return _tensor_store(ins, operands)
    return _tensor_load(ins, operands)


def _firsts(gang: Any, mask: Mask) -> Array:
    """Return one thread of each warp that takes part."""
    which = lanes(mask, gang.threads)
    return which[np.unique(which // 32, return_index=True)[1]]


def _box(ins: Instruction, text: str, operands: Operands) -> tuple[int, list[int]]:
    """Return the slots of the tensor map and of the coordinates: ``[%rd1, {%r1, %r2}]``."""
    match = re.fullmatch(r"\[\s*(\S+)\s*,\s*\{(.*)\}\s*\]", text)
    if match is None:
        raise unknown(ins, "tensor operand")
    coordinates = [operands.source(ins, part.strip(), "s32") for part in match[2].split(",")]
    return operands.source(ins, match[1], "b64"), coordinates


def _tensor_load(ins: Instruction, operands: Operands) -> Action:
    to, to_offset = address(ins, ins.operands[0], operands)
    tensor, coordinates = _box(ins, ins.operands[1], operands)
    barrier, barrier_offset = address(ins, ins.operands[2], operands)

    def run(gang: Any, mask: Mask) -> None:
        views, cta = gang.views, gang.cta
        for lane in lanes(mask, gang.threads):
            box = cta.tensor_map(int(views[tensor][lane]), ins.line)
            corner = [int(views[slot][lane]) for slot in coordinates]
            where = int(views[to][lane]) + to_offset - cta.shared_base
            warp = int(gang.warp_of[lane])
            key = int(views[barrier][lane]) + barrier_offset
            cta.barriers.check_seen_by_tma(warp, key, ins.line)
            cta.start_load(TensorLoad(cta, warp, box, corner, where, key, ins.line))

    return run


def _tensor_store(ins: Instruction, operands: Operands) -> Action:
    tensor, coordinates = _box(ins, ins.operands[0], operands)
    origin, offset = address(ins, ins.operands[1], operands)

    def run(gang: Any, mask: Mask) -> None:
        views, cta = gang.views, gang.cta
        for lane in lanes(mask, gang.threads):
            box = cta.tensor_map(int(views[tensor][lane]), ins.line)
            corner = [int(views[slot][lane]) for slot in coordinates]
            where = int(views[origin][lane]) + offset - cta.shared_base
            warp = int(gang.warp_of[lane])
            started = TensorStore(cta, warp, box, corner, where, ins.line)
            cta.bulk_copies[warp].open.append(started)

    return run
